"""The validation report goes red for each fault that it claims to find, and for nothing else.

Faults that do not hide each other are made together: a report takes seconds.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import yaml
from conftest import Psql, Run
from test_refusals import certificate

SETTINGS = "/etc/litellm-sqlalchemy/settings.yml"
ETC = "/etc/postgresql/17/main"
CERTIFICATES = "/etc/litellm-sqlalchemy/certificates"
GATEWAYS = {f"gateway.request[http://127.0.0.1:{port}]" for port in (4000, 4001)}
Red = Callable[..., dict[str, str]]


@pytest.fixture(scope="module")
def red(run: Run) -> Red:
    """`red(database={...})` validates with changed settings and returns what failed: by check, what was seen."""

    def validate(**changes: dict[str, Any]) -> dict[str, str]:
        settings = yaml.safe_load(run("cat", SETTINGS))
        for section, values in changes.items():
            settings[section] |= values
        path = "/run/validation-settings.yml"
        run("install", "-m", "0600", "/dev/stdin", path, input=yaml.safe_dump(settings))
        report = json.loads(run("litellm-sqlalchemy", "validate", "--settings", path, "--json", check=False))
        assert all(check["ok"] or check["remedy"] for check in report["checks"])
        return {check["id"]: check["seen"] for check in report["checks"] if not check["ok"]}

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
    )
    run("rm", "/run/wrong-key")
    assert seen.keys() == {"database.verify_full", "database.scram", "gateway.front"} | GATEWAYS
    assert "verify failed" in seen["gateway.front"] or "issuer" in seen["gateway.front"]


def test_no_database_and_no_spool(red: Red) -> None:
    seen = red(database={"port": 5433}, spool={"directory": "/run/no-spool"})
    database = {"database.reachable", "database.tls", "database.certificate", "schema.head", "pool.reuse"}
    assert database | {"spool.writable", "writer.running"} <= seen.keys()
    assert not {"settings", "certificates.authority", "certificates.clients", "gateway.front"} & seen.keys()


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


def test_certificates_that_end_soon(red: Red, run: Run, secrets: dict[str, Any], active: dict[str, str]) -> None:
    passphrase = secrets["vault_postgresql_ca_passphrase"]
    idle = f"{active['litellm_reader'][:-1]}{'b' if active['litellm_reader'].endswith('a') else 'a'}"
    soon, _ = certificate(idle, (-1, 10), passphrase)
    with replaced(run, f"{CERTIFICATES}/{idle}/client.crt", soon):
        seen = red()
    assert seen.keys() == {"certificates.clients"}
    assert f"certificate of {idle} ends" in seen["certificates.clients"]


def test_nothing_runs(red: Red, run: Run) -> None:
    units = ("haproxy", "litellm-log-writer")
    run("systemctl", "stop", *units)
    try:
        seen = red()
    finally:
        run("systemctl", "start", *units)
    assert seen.keys() >= {"writer.running", "gateway.front"}
