"""Each check finds what it is for, says nothing otherwise, and shows no secret."""

import datetime
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

import preflight_checks
import preflight_facts
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID
from preflight_checks import Host, Run, services

GIB = 1024**3
STRONG = "MV1BbOK1BI2OWquLLeaSQE8mm6XZsRY53hdU6SHkJ5rhbIy"
SPECS = {
    "postgresql": {
        "postgresql_listen_addresses": {"type": "list", "elements": "str", "required": True, "description": "Where."},
        "postgresql_port": {"type": "int", "default": 5432},
        "postgresql_settings": {"type": "dict", "default": {}},
        "postgresql_ca_passphrase": {"type": "str", "no_log": True},
    },
    "litellm": {
        "litellm_bind_address": {"type": "str", "default": "127.0.0.1"},
        "litellm_port": {"type": "int", "default": 4000},
        "litellm_instances": {"type": "int", "default": 2},
        "litellm_models": {"type": "list", "elements": "dict", "required": True},
        "litellm_provider_keys": {"type": "dict", "no_log": True},
    },
    "litellm_logger": {"litellm_logger_database_host": {"type": "str", "required": True}},
    "postgresql_backup": {
        "postgresql_backup_offsite_required": {"type": "bool", "default": False},
        "postgresql_backup_offsite_s3": {"type": "dict", "default": {}, "no_log": True},
    },
}
MODELS = [{"model_name": "fast", "litellm_params": {"model": "openai/x", "api_key": "os.environ/OPENAI_API_KEY"}}]


def facts(**more):
    """Return the facts of a host that has nothing to complain about."""
    return {
        "uid": 0,
        "os": {"id": "debian", "version_id": "13", "pretty_name": "Debian GNU/Linux 13 (trixie)"},
        "architecture": "x86_64",
        "python": [3, 13, 5],
        "systemd": 257,
        "init": "systemd",
        "container": False,
        "memory": 8 * GIB,
        "disks": [{"path": "/opt", "free": 50 * GIB, "inodes_free_percent": 90, "read_only": False, "noexec": False}],
        "listeners": [],
        "bind_errors": {},
        "own_addresses": ["127.0.0.1", "10.0.0.7"],
        "clock_synchronised": True,
        "half_installed": [],
        "clusters": [],
        "installed": [],
        "names": {},
        "urls": {},
        "endpoints": {},
        "package_sources": {"http://deb.debian.org/debian/dists/trixie/InRelease": ""},
        **more,
    }


def scene(db=None, gateway=None, db_facts=None, gateway_facts=None, **more):
    """Return a sound run with a database and a gateway host; the arguments say what is different."""
    shared = {
        "vault_a": STRONG,
        "vault_key": "sk-" + STRONG[::-1],
        "vault_keys": {"OPENAI_API_KEY": "sk-" + STRONG[5:]},
    }
    values = {"postgresql_listen_addresses": ["127.0.0.1", "10.0.0.7"], **shared, **(db or {})}
    db1 = Host("db1", ["postgresql", "postgresql_backup"], values, facts=facts(**(db_facts or {})))
    values = {
        "litellm_models": MODELS,
        "litellm_provider_keys": shared["vault_keys"],
        "litellm_logger_database_host": "db1.example.net",
        **shared,
        **(gateway or {}),
    }
    gw1 = Host("gw1", ["litellm", "litellm_logger"], values, facts=facts(**(gateway_facts or {})))
    settings = {
        "hosts": [db1, gw1],
        "specs": SPECS,
        "secrets": {"vault_a": "password", "vault_key": "gateway_key", "vault_keys": "keys"},
        "files": {"/lock": b"litellm==1.106.2 --hash=sha256:00\n"},
        "role_hosts": {"postgresql": ["db1"], "litellm": ["gw1"], "litellm_logger": ["gw1"]},
        "minimum": {
            "ansible_core": "2.19",
            "python": "3.11",
            "systemd": 257,
            "collections": {"community.crypto": "3.0.0"},
            "memory": {"postgresql": 0.5, "litellm": 1.4},
            "disk": {"litellm": {"/opt": 2}, "litellm_logger": {"/opt": 0.5}},
            "clock_skew": 10,
            "secret_length": 24,
            "secret_bits": 80,
        },
        "controller": {
            "ansible_core": "2.19.4",
            "litellm_minimum": "1.83.9",
            "collections": {"community.crypto": "3.0.5"},
            "lock_files": {"gw1": "/lock"},
            "clear_vaults": [],
        },
        **more,
    }
    return Run(**settings)


def controller(**more):
    return {"controller": {**scene().controller, **more}}


def found(run):
    """Return {(id, severity)} and the report's text."""
    findings = preflight_checks.check_all(run)
    return {finding.check for finding in findings}, "\n".join(preflight_checks.render(findings, len(run.hosts)))


def test_a_sound_inventory_has_no_finding():
    assert found(scene())[1] == f"{len(preflight_checks.CHECKS)} checks on 2 hosts: 0 errors, 0 warnings"


LISTENER = {"address": "127.0.0.1", "port": 4000, "process": "nginx", "unit": "nginx.service"}
CLUSTER = {"version": "17", "name": "main", "directory": "/var/lib/postgresql/17/main", "checksums": True}
DISK = facts()["disks"][0]

CASES = {
    "host-access": ({"gateway_facts": {"uid": 1000}}, "user id 1000"),
    "os-version": ({"db_facts": {"os": {"id": "ubuntu", "version_id": "24.04"}}}, "runs ubuntu"),
    "architecture": ({"db_facts": {"architecture": "riscv64"}}, "riscv64"),
    "python-version": ({"db_facts": {"python": [3, 9, 2]}}, "3.9.2"),
    "systemd-version": ({"db_facts": {"systemd": 252}}, "252"),
    "memory": ({"gateway_facts": {"memory": GIB}}, "has 1.0 GiB"),
    "disk-space": ({"gateway_facts": {"disks": [{**DISK, "free": 2.2 * GIB}]}}, "/opt has 2.2 GiB free; 2.5 GiB"),
    "disk-mount": ({"gateway_facts": {"disks": [{**DISK, "noexec": True}]}}, "noexec"),
    "clock-synchronised": ({"db_facts": {"clock_synchronised": False}}, "not synchronised"),
    "package-state": ({"db_facts": {"half_installed": ["libpq5"]}}, "libpq5"),
    "cluster-version": ({"db_facts": {"clusters": [{**CLUSTER, "version": "15"}]}}, "15/main"),
    "cluster-checksums": ({"db_facts": {"clusters": [{**CLUSTER, "checksums": False}]}}, "pg_checksums --enable"),
    "listen-all": ({"db": {"postgresql_listen_addresses": ["0.0.0.0", "10.0.0.7"]}}, "is 0.0.0.0"),
    "bind-address": ({"db_facts": {"bind_errors": {"10.0.0.7": "Cannot assign"}}}, "10.0.0.7: Cannot assign"),
    "port-taken": ({"gateway_facts": {"listeners": [LISTENER]}}, "port 4000 (litellm_port) is taken by nginx.service"),
    "port-duplicate": ({"gateway": {"litellm_port": 9464}}, "port 9465 is used by both"),
    "port-range": ({"gateway": {"litellm_port": 80}}, "litellm_port is 80"),
    "name-resolution": ({"gateway_facts": {"names": {"db1": {"error": "not known"}}}}, "db1 does not resolve"),
    "package-sources": ({"db_facts": {"package_sources": {"http://x/InRelease": "timed out"}}}, "timed out"),
    "backup-endpoint": (
        {"db_facts": {"endpoints": {"s3.example.net:443": "Connection refused"}}},
        "s3.example.net:443 of postgresql_backup_offsite_s3 cannot be reached",
    ),
    "package-index": ({"gateway_facts": {"urls": {"https://pypi.org/simple": "refused"}}}, "refused"),
    "secret-missing": ({"gateway": {"vault_a": ""}, "db": {"vault_a": None}}, "[db1, gw1]  not set or empty: vault_a"),
    "secret-type": ({"gateway": {"vault_key": 12345678}}, "vault_key is a number"),
    "secret-example": ({"gateway": {"vault_key": "sk-1234"}}, "vault_key is still an example value"),
    "secret-weak": ({"gateway": {"vault_a": "a" * 40}}, "vault_a has 40 characters and about 0 bits"),
    "secret-reused": ({"gateway": {"vault_key": STRONG}}, "vault_a and vault_key have the same value"),
    "secret-in-clear": (controller(clear_vaults=["inventories/x/vault.yml"]), "is not encrypted"),
    "topology": ({"role_hosts": {"postgresql": ["db1"], "litellm": []}}, "group litellm is empty"),
    "database-unreachable": ({"db": {"postgresql_listen_addresses": ["127.0.0.1"]}}, "gw1 connects over the network"),
    "backup-offsite": ({"db": {"postgresql_backup_offsite_required": True}}, "there is no off-host copy"),
    "model-list": ({"gateway": {"litellm_models": [{"model_name": "x"}]}}, "litellm_models[0] (x) has no"),
    "provider-keys": ({"gateway": {"litellm_provider_keys": {}}}, "os.environ/OPENAI_API_KEY, which is not set"),
    "gateway-database": ({"gateway": {"litellm_environment": {"DATABASE_URL": STRONG}}}, "sets DATABASE_URL"),
    "certificate-files": ({"db": {"postgresql_tls_key_file": "/k"}}, "postgresql_tls_key_file set, but not"),
    "unknown-variable": ({"db": {"postgresql_listen_adresses": []}}, "rename it to postgresql_listen_addresses"),
    "variable-overridden": ({"db": {"postgresql_port": 1}, "overridden": {"postgresql_port": "x.yml"}}, "no effect"),
    "variable-type": ({"gateway": {"litellm_port": "4o00"}}, "litellm_port is a text ('4o00'), not a whole number"),
    "connection-checks": ({"db": {"ansible_ssh_common_args": "-o StrictHostKeyChecking=no"}}, "host keys off"),
    "ansible-version": (controller(ansible_core="2.18.1"), "2.18.1"),
    "collection-version": (controller(collections={}), "community.crypto is missing"),
    "gateway-lock": ({"files": {"/lock": b"litellm==1.82.7 --hash=sha256:00\n"}}, "pins litellm 1.82.7"),
}
TOLD_APART = {"clock-skew", "undefined-variable", "variable-missing"}


@pytest.mark.parametrize("check", CASES)
def test_a_check_finds_what_it_is_for(check):
    changes, text = CASES[check]
    ids, report = found(scene(**changes))
    assert check in ids
    assert text in report
    for secret in (STRONG, "a" * 40, "12345678", "sk-1234"):
        assert secret not in report


def test_what_is_installed_needs_the_room_of_its_installation_no_more():
    """A host whose disk has filled up over a year is no fresh one; a full one is refused all the same."""
    minimum = {**scene().minimum, "disk": {**scene().minimum["disk"], "postgresql": {"/opt": 2}}}
    programs = ["/opt/litellm/current", "/opt/litellm-sqlalchemy/current"]
    for free, installed, clusters, seen in (
        (2.2, ["/opt/litellm/current"], [CLUSTER], []),
        (0.6, programs, [CLUSTER], []),
        (0.2, programs, [CLUSTER], ["[gw1]  /opt has 0.2 GiB free; 0.25 GiB"]),
        (0.6, programs[:1], [CLUSTER], ["[gw1]  /opt has 0.6 GiB free; 0.7 GiB"]),
        (1.5, programs, [{**CLUSTER, "name": "other"}], ["[db1]  /opt has 1.5 GiB free; 2 GiB"]),
    ):
        disks = [{**DISK, "free": free * GIB}]
        changed = {"disks": disks, "installed": installed, "clusters": clusters}
        run = scene(db_facts=changed, gateway_facts=changed, minimum=minimum)
        report = preflight_checks.render(list(preflight_checks.CHECKS["disk-space"].run(run)), 2)
        lines = [line for line in report if "GiB free" in line]
        assert len(lines) == len(seen), report
        assert all(words in line for words, line in zip(seen, lines, strict=True)), report


def test_an_example_on_a_roles_own_variable_is_found():
    ids, report = found(scene(db={"postgresql_ca_passphrase": "changeme-please-1234"}))
    assert "secret-example" in ids
    assert "postgresql_ca_passphrase is an example value" in report
    assert "changeme-please" not in report


def test_a_secret_in_clear_on_a_roles_own_variable_is_found():
    run = scene(gateway={"litellm_provider_keys": {"OPENAI_API_KEY": "sk-" + STRONG[7:]}})
    assert "secret-in-clear" not in found(run)[0]
    run.hosts[1].clear, run.hosts[1].origins = {"litellm_provider_keys"}, {"litellm_provider_keys": "all.yml:7"}
    ids, report = found(run)
    assert "secret-in-clear" in ids
    assert "litellm_provider_keys.OPENAI_API_KEY (all.yml:7) holds a secret in clear" in report
    assert STRONG[7:] not in report


def test_a_reference_to_the_vault_is_no_secret_in_clear():
    run = scene(db={"postgresql_ca_passphrase": STRONG})
    run.hosts[0].clear = {"postgresql_ca_passphrase"}
    assert "secret-in-clear" not in found(run)[0]


def test_the_ports_of_the_front_are_looked_at():
    run = scene(gateway={"haproxy_bind_address": "10.0.0.7", "haproxy_metrics_port": 9465})
    run.hosts[1].roles.append("haproxy")
    assert "port 9465 is used by both haproxy_metrics_port and litellm_logger_settings.writer.listen" in found(run)[1]
    run.hosts[1].values["haproxy_metrics_port"] = 0
    assert found(run)[0] == set()


def test_every_check_is_tested():
    assert CASES.keys() | TOLD_APART == preflight_checks.CHECKS.keys()


def test_clock_skew():
    run = scene()
    run.hosts[1].skew = -42.0
    assert "42 s behind" in found(run)[1]


def test_a_missing_secret_is_not_told_twice():
    run = scene(gateway={"vault_a": None})
    run.hosts[1].unset = {"litellm_x": "'vault_a' is undefined"}
    assert "undefined-variable" not in found(run)[0]
    run.hosts[1].unset = {"litellm_x": "'other' is undefined"}
    assert "undefined-variable" in found(run)[0]


@pytest.mark.parametrize("name", ["vault_a", "vault_keys"])
def test_a_secret_with_braces_is_told_once_and_nothing_of_it_is_shown(name):
    run = scene()
    for host in run.hosts:
        del host.values[name]
        host.unset = {name: "'k3yPart' is undefined", "own": "in a template: 'k3yPart' is undefined"}
    checks, report = found(run)
    assert checks == {"undefined-variable"}
    assert report.count("cannot be evaluated") == 1
    assert "k3yPart" not in report


def test_a_provider_key_is_a_text():
    report = found(scene(gateway={"vault_keys": {"OPENAI_API_KEY": 123456}}))[1]
    assert "vault_keys.OPENAI_API_KEY is a number, not a text (value hidden)" in report
    assert "123456" not in report


@pytest.mark.parametrize("count", [0, "0", -1])
def test_a_gateway_without_instances_is_refused(count):
    assert f"[gw1]  litellm_instances is {count}." in found(scene(gateway={"litellm_instances": count}))[1]


def test_one_off_host_place_is_enough_and_two_are_too_many():
    store = {"postgresql_backup_store": ["store1"]}
    required = {"postgresql_backup_offsite_required": True}
    bucket = {"postgresql_backup_offsite_s3": {"bucket": "b", "secret": STRONG}}
    assert found(scene(db=required, role_hosts=store))[0] == set()
    assert found(scene(db={**required, **bucket}))[0] == set()
    ids, report = found(scene(db=bucket, role_hosts=store))
    assert ids == {"backup-offsite"}
    assert "group backup: store1; postgresql_backup_offsite_s3" in report
    assert STRONG not in report


@pytest.mark.parametrize(
    "place",
    [
        {"postgresql_backup_offsite_host": {"host": "10.0.0.7", "host_keys": []}},
        {"postgresql_backup_offsite_host": {"host": "localhost", "host_keys": []}},
        {"postgresql_backup_offsite_s3": {"endpoint": "127.0.0.1", "secret": STRONG}},
        {},
    ],
)
def test_a_copy_on_the_database_host_itself_is_no_off_host_copy(place):
    hosts = {"role_hosts": {**scene().role_hosts, **({} if place else {"postgresql_backup_store": ["db1"]})}}
    assert "backup-offsite" not in found(scene(db=place, **hosts))[0]
    ids, report = found(scene(db={"postgresql_backup_offsite_required": True, **place}, **hosts))
    assert "backup-offsite" in ids
    assert "is the database host itself" in report


def test_a_required_variable_may_come_from_a_playbook():
    run = scene()
    del run.hosts[1].values["litellm_logger_database_host"]
    assert "variable-missing" in found(run)[0]
    run.handed = {"litellm_logger_database_host"}
    assert "variable-missing" not in found(run)[0]


def test_a_host_that_cannot_be_looked_at_is_one_finding():
    run = scene()
    run.hosts[0].facts, run.hosts[0].error = None, "No route to host"
    assert found(run)[0] == {"host-access"}


def test_our_own_services_may_hold_their_ports():
    own = {"address": "127.0.0.1", "port": 4001, "process": "python3", "unit": "litellm@2.service"}
    assert found(scene(gateway_facts={"listeners": [own]}))[0] == set()
    ids, report = found(scene(gateway_facts={"listeners": [{**own, "unit": "litellm@1.service"}]}))
    assert ids == {"port-taken"}, "an instance whose port is given to another one"
    assert "port 4001 (litellm_port + 1) is taken by litellm@1.service" in report
    elsewhere = {**LISTENER, "address": "10.0.0.9"}
    assert found(scene(gateway_facts={"listeners": [elsewhere]}))[0] == set()


def test_an_accepted_finding_is_a_warning():
    run = scene(gateway_facts={"memory": GIB})
    assert {finding.severity for finding in preflight_checks.check_all(run, frozenset(["memory"]))} == {"warning"}


def test_downloads_are_a_warning_once_something_is_installed():
    more = {"urls": {"https://pypi.org/simple": "refused"}, "installed": ["/opt/litellm/current"]}
    assert {finding.severity for finding in preflight_checks.check_all(scene(gateway_facts=more))} == {"warning"}


def test_what_several_hosts_share_is_said_once():
    report = found(scene(db_facts={"architecture": "riscv64"}, gateway_facts={"architecture": "riscv64"}))[1]
    assert report.count("riscv64") == 1
    assert "[db1, gw1]" in report


@pytest.mark.parametrize(
    ("spec", "value", "wrong"),
    [
        ({"type": "list", "elements": "str"}, "a", True),
        ({"type": "list", "elements": "int"}, ["x"], True),
        ({"type": "dict"}, {"any": 1}, False),
        ({"type": "str"}, ["a"], True),
        ({"type": "str", "choices": ["a", "b"]}, "c", True),
        ({"type": "bool"}, "no", False),
        ({"type": "int"}, "12", False),
        ({"type": "int"}, None, True),
        ({"type": "list", "elements": "dict", "options": {"name": {"type": "str"}}}, [{"nmae": "x"}], True),
    ],
)
def test_types(spec, value, wrong):
    from preflight_checks.variables import type_faults

    assert bool(list(type_faults("thing", spec, value))) is wrong


def issued(name: str, days: int = 30, key=None, issuer=None):
    """Return (certificate, key) as PEM; signed by `issuer`, a (name, key) pair, or by itself."""
    key = key or generate_private_key(SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    signer_name, signer_key = issuer or (subject, key)
    now = datetime.datetime.now(datetime.UTC)
    builder = x509.CertificateBuilder().subject_name(subject).issuer_name(signer_name).public_key(key.public_key())
    builder = builder.serial_number(1).not_valid_before(now - datetime.timedelta(days=60))
    builder = builder.not_valid_after(now + datetime.timedelta(days=days))
    builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
    certificate = builder.sign(signer_key, hashes.SHA256())
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return certificate.public_bytes(Encoding.PEM), pem, subject, key


def test_certificates():
    authority, _, name, authority_key = issued("ca")
    good, key, *_ = issued("db1.example.net", issuer=(name, authority_key))
    expired, expired_key, *_ = issued("db1.example.net", days=-1, issuer=(name, authority_key))
    other, other_key, *_ = issued("other")

    def faults(certificate, key, authority, names=("db1.example.net",)):
        now = datetime.datetime.now(datetime.UTC)
        return " ".join(seen for seen, _ in services.certificate_faults(certificate, key, authority, list(names), now))

    assert faults(good, key, authority) == ""
    assert "does not belong" in faults(good, other_key, authority)
    assert "expired" in faults(expired, expired_key, authority)
    assert "does not hold the certificate's issuer" in faults(good, key, other)
    assert "does not name db2" in faults(good, key, authority, ["db2"])
    assert "not usable PEM" in faults(b"x", key, authority)
    assert services.matches("*.example.net", "db1.example.net")
    assert not services.matches("*.example.net", "a.b.example.net")


@pytest.mark.parametrize(
    ("statuses", "seconds", "answer", "asked"),
    [((503, 503, 200), 30, "", 3), ((404, 200), 30, "HTTP status 404", 1), ((503,) * 9, 2, "HTTP status 503", None)],
)
def test_what_may_be_over_in_a_moment_is_tried_again(statuses, seconds, answer, asked):
    left = list(statuses)

    class Busy(BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_response(left.pop(0))
            self.end_headers()

        def log_message(self, *arguments):
            pass

    with HTTPServer(("127.0.0.1", 0), Busy) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url, answers = f"http://127.0.0.1:{server.server_port}/", {}
        preflight_facts.probe(answers, url, preflight_facts.fetch, (url, ""), time.monotonic() + seconds)
        server.shutdown()
    assert answers == {url: answer}
    assert asked is None or len(statuses) - len(left) == asked
