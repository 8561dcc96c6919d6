"""The validation report goes red for each fault that it claims to find, `ELSEWHERE` aside, and for nothing else.

Faults that do not hide each other are made together: a report takes seconds.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import pytest
import yaml
from conftest import Chat, Psql, Run
from cryptography import x509
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding
from test_refusals import authority, certificate

SETTINGS = "/etc/litellm-sqlalchemy/settings.yml"
ETC = "/etc/postgresql/17/main"
CERTIFICATES = "/etc/litellm-sqlalchemy/certificates"
PYTHON = "/opt/litellm-sqlalchemy/current/bin/python"
GATEWAYS = {f"gateway.request[http://127.0.0.1:{port}]" for port in (4000, 4001)}
#: What is red below for a fault of its own, not because there is no database to ask.
RED: set[str] = set()
ELSEWHERE = {
    "settings": "wrong ones end the command before there is a report",
    "database.reachable": "test_no_database",
    "database.certificate": "test_certificate_is_refused of the package",
    "database.checksums": "test_server_faults.py of the package",
    "pool.reuse": "only a server that ends sessions within milliseconds would do it",
}
#: The command, for which this server is too old.
TOO_OLD = "from litellm_sqlalchemy import cli, validate; validate.MINIMUM_SERVER_VERSION = 990000; cli.main()"
Red = Callable[..., dict[str, str]]


@pytest.fixture(scope="module")
def red(run: Run) -> Red:
    """`red(database={...})` validates with changed settings and returns what failed: what was seen, by check."""

    def validate(command: tuple[str, ...] = ("litellm-sqlalchemy",), **changes: dict[str, Any]) -> dict[str, str]:
        settings = yaml.safe_load(run("cat", SETTINGS))
        for section, values in changes.items():
            settings[section] |= values
        path = "/run/validation-settings.yml"
        run("install", "-m", "0600", "/dev/stdin", path, input=yaml.safe_dump(settings))
        report = json.loads(run(*command, "validate", "--settings", path, "--json", check=False))
        assert all(check["ok"] or check["remedy"] for check in report["checks"])
        failed = {check["id"]: check["seen"] for check in report["checks"] if not check["ok"]}
        RED.update(set() if "database.reachable" in failed else failed)
        return failed

    return validate


@contextmanager
def replaced(run: Run, path: str, content: str) -> Iterator[None]:
    """Change a file's content, and put it back."""
    before = run("cat", path)
    run("tee", path, input=content)
    try:
        yield
    finally:
        run("tee", path, input=before)


def test_nothing_is_red_without_a_fault(red: Red) -> None:
    assert red() == {}


def test_wrong_settings(red: Red, run: Run) -> None:
    run("install", "-m", "0600", "/dev/stdin", "/run/wrong-key", input="sk-wrong-0123456789abcdef")
    seen = red(
        database={"sslmode": "require", "channel_binding": "prefer"},
        validation={
            "gateway_key_file": "/run/wrong-key",
            "front_ca_file": f"{ETC}/tls/server.crt",
        },
        spool={"directory": "/run/no-spool"},
    )
    run("rm", "/run/wrong-key")
    spool = {"spool.writable", "spool.drained", "writer.running"}
    assert seen.keys() == {"database.verify_full", "database.scram", "gateway.front"} | spool | GATEWAYS
    assert "verify failed" in seen["gateway.front"] or "issuer" in seen["gateway.front"]


def test_no_database(red: Red) -> None:
    """What stays green asks no database."""
    names = "reachable", "tls", "verify_full", "plaintext_refused", "scram", "certificate", "version", "checksums"
    privileges = {f"privileges.{name}" for name in ("exact", "writer_denied", "reader_denied")}
    database = {f"database.{name}" for name in names} | privileges | {"schema.head", "calls.retention", "pool.reuse"}
    assert red(database={"port": 5433}).keys() == database | GATEWAYS


def test_a_loose_database_of_another_schema(red: Red, run: Run, psql: Psql, active: dict[str, str]) -> None:
    loose = "ssl_min_protocol_version = 'TLSv1.2'\nssl_max_protocol_version = 'TLSv1.2'\npassword_encryption = md5\n"
    rules = run("cat", f"{ETC}/pg_hba.conf")
    changes = {
        "UPDATE alembic_version SET version_num = '0' || version_num": (
            "UPDATE alembic_version SET version_num = substr(version_num, 2)"
        ),
        "GRANT SELECT ON requests TO litellm_writer": "REVOKE SELECT ON requests FROM litellm_writer",
        "GRANT INSERT ON requests TO litellm_reader": "REVOKE INSERT ON requests FROM litellm_reader",
    }
    reader = f"hostnossl litellm {active['litellm_reader']} 0.0.0.0/0 scram-sha-256\n"
    with ExitStack() as stack:
        stack.callback(psql, "SELECT pg_reload_conf()")
        run("install", "--owner=postgres", "--mode=0640", "/dev/stdin", f"{ETC}/conf.d/99-loose.conf", input=loose)
        stack.callback(run, "rm", f"{ETC}/conf.d/99-loose.conf")
        stack.enter_context(replaced(run, f"{ETC}/pg_hba.conf", reader + rules))
        for change, back in changes.items():
            psql(change)
            stack.callback(psql, back)
        psql("SELECT pg_reload_conf()")
        seen = red()
    assert seen.keys() >= {
        "database.tls",
        "database.plaintext_refused",
        "database.scram",
        "schema.head",
        "privileges.exact",
        "privileges.writer_denied",
        "privileges.reader_denied",
    }
    assert "TLSv1.2" in seen["database.tls"]


def test_calls_that_are_too_old(red: Red, run: Run, psql: Psql) -> None:
    """Their service removes them, and nothing that is younger; its timer is on."""
    for call_id, age in {"kept": 29, "old": 40}.items():
        at = datetime.now(UTC) - timedelta(days=age)
        first = UUID(int=int(at.timestamp() * 1000) << 80 | 7 << 76 | 0b10 << 62)
        new = {"id": str(first), "call_id": call_id, "created_at": at.isoformat()}
        psql(f"INSERT INTO requests SELECT (jsonb_populate_record(r, '{json.dumps(new)}')).* FROM requests r LIMIT 1")
    seen = red()
    assert seen.keys() == {"calls.retention"}
    assert "30 days are kept" in seen["calls.retention"]
    assert run("systemctl", "is-enabled", "litellm-log-prune.timer").split() == ["enabled"]
    assert run("systemctl", "is-active", "litellm-log-prune.timer").split() == ["active"]
    run("systemctl", "start", "litellm-log-prune.service")
    mine = "DELETE FROM requests WHERE call_id IN ('kept', 'old') RETURNING call_id"
    assert psql(f"WITH mine AS ({mine}) SELECT * FROM mine") == [["kept"]]
    assert red() == {}


def test_certificates_that_end_soon(red: Red, run: Run, secrets: dict[str, Any], active: dict[str, str]) -> None:
    passphrase = secrets["vault_postgresql_ca_passphrase"]
    idle = f"{active['litellm_reader'][:-1]}{'b' if active['litellm_reader'].endswith('a') else 'a'}"
    soon, _ = certificate(idle, (-1, 10), passphrase)
    with replaced(run, f"{CERTIFICATES}/{idle}/client.crt", soon):
        seen = red()
    assert seen.keys() == {"certificates.clients"}
    assert f"certificate of {idle} ends" in seen["certificates.clients"]


def test_an_authority_that_ends_soon(red: Red, run: Run, secrets: dict[str, Any]) -> None:
    """It has the name and the key of the deployed one, so that it verifies the same certificates."""
    own, key = authority(secrets["vault_postgresql_ca_passphrase"])
    begin, end = (datetime.now(UTC) + timedelta(days=days) for days in (-1, 29))
    made = x509.CertificateBuilder(own.subject, own.subject, own.public_key(), own.serial_number, begin, end)
    for extension in own.extensions:
        made = made.add_extension(extension.value, extension.critical)
    soon = made.sign(key, SHA256()).public_bytes(Encoding.PEM).decode()
    run("install", "-m", "0644", "/dev/stdin", "/run/soon.crt", input=soon)
    seen = red(database={"sslrootcert": "/run/soon.crt"})
    run("rm", "/run/soon.crt")
    assert seen.keys() == {"certificates.authority"}
    assert "in 28 days" in seen["certificates.authority"]


def test_a_server_that_is_too_old(red: Red) -> None:
    assert red((PYTHON, "-c", TOO_OLD)).keys() == {"database.version"}


def test_a_dead_letter(red: Red, run: Run) -> None:
    letter = "/var/spool/litellm-sqlalchemy/dead/lost-1.json"
    run("tee", letter, input="{}")
    seen = red()
    run("rm", letter)
    assert seen.keys() == {"spool.drained"}
    assert "spooled 0, dead 1, damaged 0, dropped 0" in seen["spool.drained"]


def test_nothing_runs(red: Red, run: Run, chat: Chat) -> None:
    """The writer is stopped first: what is said then waits in the spool."""
    run("systemctl", "stop", "litellm-log-writer")
    try:
        assert chat("Does anybody write this down?").status_code == 200
        run("systemctl", "stop", "haproxy")
        seen = red()
    finally:
        run("systemctl", "start", "haproxy", "litellm-log-writer")
    assert seen.keys() == {"writer.running", "spool.drained", "gateway.front"} | GATEWAYS
    assert "frames wait" in seen["spool.drained"]


def test_every_check_has_been_red_above(run: Run) -> None:
    report = json.loads(run("litellm-sqlalchemy", "validate", "--json"))
    assert {check["id"] for check in report["checks"]} - RED == ELSEWHERE.keys()
