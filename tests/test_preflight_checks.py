"""Each check finds what it is for, says nothing otherwise, and shows no secret."""

import datetime
import re
import shutil
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import preflight_checks
import preflight_facts
import pytest
import yaml
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID
from preflight_checks import Host, Run, gather, network, services

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = str(ROOT / "files/litellm_sqlalchemy")
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
        "litellm_environment": {"type": "dict", "default": {}},
        "litellm_router_settings": {"type": "dict", "default": {}},
        "litellm_settings": {"type": "dict", "default": {}},
    },
    "litellm_logger": {
        "litellm_logger_database_host": {"type": "str", "required": True},
        "litellm_logger_settings": {"type": "dict", "default": {}},
        "litellm_logger_validation_model": {"type": "str", "default": ""},
    },
    "firewall": {"firewall_rules": {"type": "list", "elements": "dict"}, "firewall_enabled": {"type": "bool"}},
    "postgresql_backup": {
        "postgresql_backup_schedules": {"type": "dict"},
        "postgresql_backup_limits": {"type": "dict"},
        "postgresql_backup_retention": {"type": "dict"},
        "postgresql_backup_recovery_window_days": {"type": "int"},
        "postgresql_backup_archive_timeout": {"type": "int"},
        "postgresql_backup_dump_share": {"type": "float"},
        "postgresql_backup_offsite_required": {"type": "bool", "default": False},
        "postgresql_backup_offsite_s3": {"type": "dict", "default": {}, "no_log": True},
    },
}
BACKUP = {
    "postgresql_backup_schedules": {"dump": "hourly", "base_full": "Sun *-*-* 01:00"},
    "postgresql_backup_limits": {"dump": 7200, "drill": 691200},
    "postgresql_backup_retention": {"hourly": 24, "daily": 7},
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
        "calendars": {},
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
    db1 = Host("db1", ["postgresql", "postgresql_backup", "firewall"], values, facts=facts(**(db_facts or {})))
    values = {
        "litellm_models": MODELS,
        "litellm_provider_keys": shared["vault_keys"],
        "litellm_logger_database_host": "db1.example.net",
        **shared,
        **(gateway or {}),
    }
    gw1 = Host("gw1", ["litellm", "litellm_logger", "firewall"], values, facts=facts(**(gateway_facts or {})))
    settings = {
        "hosts": [db1, gw1],
        "specs": SPECS,
        "defaults": {"postgresql_backup": BACKUP},
        "mentioned": {"firewall_gateway_sources"},
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
            "database_environment": ["DATABASE_URL", "DATABASE_USER"],
            "decided_settings": {"port": "postgresql", "wal_level": "postgresql_backup"},
            "log_refusals": {},
            "log_unchecked": set(),
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
    "setting-in-clear": (
        {"gateway": {"litellm_settings": {"cache_params": [{"password": "sk-1234"}]}}},
        "[gw1]  litellm_settings.cache_params holds a key that begins with sk- in clear",
    ),
    "gateway-database": ({"gateway": {"litellm_environment": {"DATABASE_URL": STRONG}}}, "sets DATABASE_URL"),
    "certificate-files": ({"db": {"postgresql_tls_key_file": "/k"}}, "postgresql_tls_key_file set, but not"),
    "unknown-variable": ({"db": {"postgresql_listen_adresses": []}}, "rename it to postgresql_listen_addresses"),
    "variable-overridden": ({"db": {"postgresql_port": 1}, "overridden": {"postgresql_port": "x.yml"}}, "no effect"),
    "variable-type": ({"gateway": {"litellm_port": "4o00"}}, "litellm_port is a text ('4o00'), not a whole number"),
    "connection-checks": ({"db": {"ansible_ssh_common_args": "-o StrictHostKeyChecking=no"}}, "host keys off"),
    "log-settings": (
        controller(log_refusals={"gw1": [("litellm_logger_settings", "unknown key `contents`")]}),
        "[gw1]  litellm_logger_settings is refused by the log: unknown key `contents`",
    ),
    "validation-model": (
        {"gateway": {"litellm_logger_validation_model": "fats"}},
        "litellm_logger_validation_model is fats, which litellm_models does not have. Fix: set it to one that",
    ),
    "environment-names": ({"gateway": {"litellm_provider_keys": {"PATH": STRONG}}}, "has PATH, which would take the"),
    "firewall-sources": (
        {"gateway": {"firewall_gateway_sources": ["10.0.0.0/33"]}},
        "firewall_gateway_sources has '10.0.0.0/33', which is no address, network or name",
    ),
    "postgresql-settings": (
        {"db": {"postgresql_settings": {"port": 1}}},
        "[db1]  postgresql_settings.port is decided by the role postgresql.",
    ),
    "backup-values": (
        {"db": {"postgresql_backup_retention": {"daily": "7"}}},
        "[db1]  postgresql_backup_retention has daily: '7'. Fix: give it a whole number of at least 0, without quotes",
    ),
    "schedule": (
        {"db_facts": {"calendars": {"hourly": "Failed to parse"}}},
        "[db1]  postgresql_backup_schedules.dump is 'hourly', which systemd does not take as a time",
    ),
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


@pytest.mark.parametrize("model", ["fast", "openai/x", "smart", "anthropic/claude", ""])
def test_a_model_has_several_names(model):
    wildcard = {"model_name": "anthropic/*", "litellm_params": {"model": "anthropic/*"}}
    aliases = {"litellm_router_settings": {"model_group_alias": {"smart": "fast"}}}
    assert found(scene(gateway={"litellm_models": [*MODELS, wildcard], **aliases, **validating(model)}))[0] == set()
    assert ("validation-model" in found(scene(gateway=validating(model)))[0]) is (
        model in ("smart", "anthropic/claude")
    )


def validating(model):
    """Return the settings that take the variable's place."""
    return {
        "litellm_logger_validation_model": "none",
        "litellm_logger_settings": {"validation": {"model": model}},
    }


@pytest.mark.parametrize(
    ("name", "seen"),
    [
        ("openai-api-key", "entry 1, 'openai-api-key'"),
        ("../key", "entry 1, '../key'"),
        ("1ST_KEY", "entry 1, '1ST_KEY'"),
        ("sk-abc", "entry 1, (6 characters, hidden)"),
        ("9" + STRONG, "entry 1, (48 characters, hidden)"),
        ("LD_PRELOAD", "has LD_PRELOAD"),
        ("PYTHONPATH", "has PYTHONPATH"),
        ("LITELLM_MASTER_KEY", "has LITELLM_MASTER_KEY"),
        ("LITELLM_MASTER_KEY_PREVIOUS", "has LITELLM_MASTER_KEY_PREVIOUS"),
        ("GATEWAY_MAX_REQUEST_MB", "has GATEWAY_MAX_REQUEST_MB"),
        ("DATABASE_USER", "litellm_provider_keys sets DATABASE_USER"),
        ("_PATH", None),
        ("AZURE_API_KEY_2", None),
    ],
)
def test_names_of_keys(name, seen):
    report = found(scene(gateway={"litellm_models": [], "litellm_provider_keys": {name: STRONG[5:]}}))[1]
    assert report.count("ERROR") == (seen is not None)
    assert (seen or "") in report
    assert "sk-abc" not in report
    assert STRONG[5:] not in report


def test_the_gateways_environment_may_be_set_and_has_names():
    assert found(scene(gateway={"litellm_environment": {"PATH": "/opt/bin:/usr/bin"}}))[0] == set()
    assert "litellm_environment has a name that" in found(scene(gateway={"litellm_environment": {"MY-URL": "x"}}))[1]


@pytest.mark.parametrize(
    ("source", "wrong"),
    [
        ("192.0.2.10", False),
        ("192.0.2.5/24", False),
        ("0.0.0.0/0", False),
        ("2001:db8::/64", False),
        ("gateway1.example.net", False),
        ("gateway1", False),
        ("10.0.0/8", True),
        ("10.0.0.0/255.0.0.0", True),
        ("10.0.0.1-10.0.0.9", True),
        ("300.0.0.1", True),
        ("fe80::1%eth0", True),
        ("https://gateway1", True),
        ("a, b", True),
        ("", True),
        (10, True),
        (None, True),
    ],
)
def test_sources_of_the_firewall(source, wrong):
    rules = {"firewall_rules": [{"name": "x", "port": 1}, {"name": "metrics", "port": 9100, "sources": [source]}]}
    for values, name in (
        ({"gateway": {"firewall_gateway_sources": [source]}}, "[gw1]  firewall_gateway_sources has "),
        ({"db": rules}, "[db1]  firewall_rules[1].sources has "),
    ):
        report = found(scene(**values))[1]
        assert (name in report) is wrong, report
        assert report.count("ERROR") == wrong
        off = {"firewall_enabled": False}
        assert found(scene(**{host: {**part, **off} for host, part in values.items()}))[0] == set()


def test_sources_are_a_list():
    report = found(scene(gateway={"firewall_gateway_sources": "10.0.0.0/8"}))[1]
    assert "firewall_gateway_sources is a text ('10.0.0.0/8'), not a list" in report


def test_a_host_resolves_the_names_that_its_firewall_lets_in():
    run = scene(gateway={"firewall_gateway_sources": ["office.example.net", "10.0.0.0/8", "localhost"]})
    gateway = run.hosts[1]
    names = ["db1.example.net", "localhost", "office.example.net"]
    assert network.names_to_resolve(run, gateway, []) == names
    assert network.names_to_resolve(run, run.hosts[0], []) == []
    gateway.facts["names"] = {"office.example.net": {"error": "not known"}, "localhost": {"addresses": ["127.0.0.1"]}}
    ids, report = found(run)
    assert ids == {"name-resolution"}
    assert "[gw1]  office.example.net does not resolve: not known" in report


@pytest.mark.parametrize(
    ("name", "value", "seen"),
    [
        ("Port", 1, "postgresql_settings.Port is decided by the role postgresql"),
        ("wal_level", "minimal", "postgresql_settings.wal_level is decided by the role postgresql_backup"),
        ("max connections", 1, "postgresql_settings has 'max connections', which is no setting's name"),
        ("work_mem", {"MB": 8}, "postgresql_settings.work_mem is a mapping ({'MB': 8})"),
        ("work_mem", None, "postgresql_settings.work_mem is empty"),
        ("search_path", ["a", None], "postgresql_settings.search_path is a list"),
        ("shared_preload_libraries", ["a", "b"], None),
        ("pg_stat_statements.max", 1000, None),
        ("jit", True, None),
        ("log_min_duration_statement", "500ms", None),
    ],
)
def test_settings_of_postgresql(name, value, seen):
    report = found(scene(db={"postgresql_settings": {name: value}}))[1]
    assert report.count("ERROR") == (seen is not None)
    assert (seen or "") in report


@pytest.mark.parametrize(
    ("variable", "value", "seen"),
    [
        ("schedules", {"dump": "daily"}, "has no base_full"),
        ("schedules", {"dump": "daily", "base_full": "daily", "drill": "daily"}, "has drill, which nothing reads"),
        ("schedules", {"dump": ["daily"], "base_full": "daily"}, "has dump: ['daily']"),
        ("schedules", {"dump": datetime.date(2099, 1, 1), "base_full": "daily"}, None),
        ("limits", {"dump": 60}, "has no drill"),
        ("limits", {"dump": 60, "drill": 0}, "has drill: 0"),
        ("limits", {"dump": 60, "drill": "1d"}, "has drill: '1d'"),
        ("retention", {"daily": -1}, "has daily: -1"),
        ("retention", {"daily": True}, "has daily: True"),
        ("retention", {"dayly": 1}, "has dayly, which nothing reads"),
        ("retention", {"daily": 0}, None),
        ("recovery_window_days", 0, "is 0"),
        ("archive_timeout", "-1", "is -1"),
        ("archive_timeout", 0, None),
        ("dump_share", 1.5, "is 1.5"),
        ("dump_share", 1, None),
    ],
)
def test_what_the_backups_go_by(variable, value, seen):
    report = found(scene(db={f"postgresql_backup_{variable}": value}))[1]
    assert report.count("ERROR") == (seen is not None)
    assert f"[db1]  postgresql_backup_{variable} {seen}" in report or seen is None


@pytest.mark.parametrize(
    ("settings", "refusal"),
    [
        ({"litellm_logger_settings": {"content": {"mode": "some"}}}, "`content.mode` is 'some'"),
        ({"litellm_logger_settings": {"contents": {}}}, "unknown key `contents`"),
        ({"litellm_logger_settings": {"content": {"retention_days": "x"}}}, "`content.retention_days` is 'x'"),
        ({"litellm_logger_settings": {"database": None}}, "`database` is None"),
        ({"litellm_logger_settings": {"spool": {"max_size": datetime.date(2099, 1, 1)}}}, "`spool.max_size` is"),
        ({"litellm_logger_settings": {"content": {"policies": {"keys": {"sk-abc": "full"}}}}}, "never the key"),
        ({"litellm_logger_retention_days": 1}, "`content.retention_days` is 1"),
        ({"litellm_logger_front_url": "gateway1"}, "`validation.front_url` is 'gateway1'"),
        ({"litellm_logger_settings": {"database": {"pool_size": 3}, "content": {"mode": "metadata"}}}, None),
        ({"litellm_logger_retention_days": 0, "litellm_logger_front_url": ""}, None),
    ],
)
def test_the_log_itself_says_what_it_refuses(settings, refusal):
    refusals, unchecked = gather.log_refusals(scene(gateway=settings), PACKAGE)
    assert not unchecked
    if refusal is None:
        assert not refusals
        return
    [(variable, seen)] = refusals.pop("gw1")
    assert variable in settings
    assert refusal in seen
    assert "/dev/stdin" not in seen
    assert "sk-abc" not in seen


def test_a_log_that_cannot_be_asked_is_said(monkeypatch):
    monkeypatch.setattr(sys, "executable", sys._base_executable)  # a Python without the controller's packages
    gather.asked_log.cache_clear()
    refusals, unchecked = gather.log_refusals(scene(gateway={"litellm_logger_retention_days": 9}), PACKAGE)
    gather.asked_log.cache_clear()
    assert not refusals
    report = found(scene(**controller(log_unchecked=unchecked)))[1]
    assert "[controller]  the log's settings cannot be checked: " in report
    assert "uv sync" in report


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="this machine has no systemd to ask")
def test_systemd_says_which_times_it_takes():
    for good in ("hourly", "Mon..Sat *-*-* 01:00", "2099-01-01"):
        assert preflight_facts.calendar_error(good) == ""
    for bad in ("every night", "", "Sun 25:00", "36000", "--help"):
        assert preflight_facts.calendar_error(bad), bad


def test_a_wrong_inventory_is_told_what_is_wrong_and_where(tmp_path):
    """By the playbook, with this machine as the host; it has other faults, too."""
    wrong = {
        "litellm_logger_settings": {"content": {"mode": "some"}},
        "litellm_logger_prune_schedule": "every night",
        "litellm_models": [{"model_name": "a", "litellm_params": {"model": "openai/a"}}],
        "litellm_provider_keys": {"DATABASE_NAME": STRONG},
        "firewall_gateway_sources": ["nowhere.invalid"],
        "postgresql_settings": {"ssl": "off", "archive_mode": "off", "shared_preload_libraries": "pg_stat_statements"},
        "preflight_check_downloads": False,
        "ansible_connection": "local",
        "ansible_become": False,
        "ansible_python_interpreter": sys.executable,
    }
    rules = {"firewall_rules": [{"name": "metrics", "port": 9100, "sources": ["10.0.0.0/33"]}]}
    groups = {"postgresql": {"gw1": None}, "litellm": {"gw1": None}, "backup": {"store1": rules}}
    children = {name: {"hosts": hosts} for name, hosts in groups.items()}
    (tmp_path / "hosts.yml").write_text(yaml.safe_dump({"all": {"vars": wrong, "children": children}}))
    (tmp_path / "group_vars/all").mkdir(parents=True)
    for model in ("a", "b"):  # the last file counts
        (tmp_path / f"group_vars/all/{model}.yml").write_text(f"litellm_logger_validation_model: {model}\n")
    command = ["ansible-playbook", "-i", str(tmp_path / "hosts.yml"), "playbooks/preflight.yml"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0
    lines = [" ".join(line.split()) for line in done.stdout.splitlines() if line.startswith("ERROR")]
    place = r"\(\S*hosts.yml:\d+\)"
    expected = [
        rf"log-settings \[gw1\] litellm_logger_settings {place} is refused by the log: `content.mode` is 'some'",
        r"validation-model \[gw1\] litellm_logger_validation_model \(\S*/b.yml:1\) is b",
        r"gateway-database \[gw1\] litellm_provider_keys sets DATABASE_NAME\.",
        r"name-resolution \[gw1\] nowhere.invalid does not resolve",
        rf"firewall-sources \[store1\] firewall_rules\[0\].sources {place} has '10.0.0.0/33'",
        rf"postgresql-settings \[gw1\] postgresql_settings.ssl {place} is decided by the role postgresql\.",
        rf"postgresql_settings.archive_mode {place} is decided by the role postgresql_backup",
    ]
    if shutil.which("systemd-analyze"):
        expected.append(rf"schedule \[gw1\] litellm_logger_prune_schedule {place} is 'every night'")
    for pattern in expected:
        assert any(re.search(pattern, line) for line in lines), (pattern, done.stdout)
    assert "shared_preload_libraries" not in done.stdout
    assert STRONG not in done.stdout


def test_clients_certificates_need_the_projects_authority():
    own = dict.fromkeys(services.CERTIFICATE_VARIABLES, "/pem")
    for asked, refused in ((True, True), (False, False)):
        report = found(scene(db={**own, "postgresql_client_certificates": asked}))[1]
        assert ("[db1]  postgresql_client_certificates is true, and so is set" in report) is refused


@pytest.mark.parametrize("option", ["-i https://x", "--extra-index-url https://x", "-e .", "--find-links=/x"])
def test_a_lock_names_no_index(option):
    lock = f"{option}\nlitellm==1.106.2 --hash=sha256:00\n".encode()
    assert f"/lock has the option {re.match('[a-z-]+', option)[0]}," in found(scene(files={"/lock": lock}))[1]


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


def test_the_databases_name_is_not_the_inventorys_to_choose():
    """Which the playbooks of the server, the log and the backups have in common."""
    _handed, overridden = gather.playbook_variables(str(ROOT / "playbooks"))
    run = scene(gateway={"litellm_logger_database_name": "calls"}, overridden=overridden)
    ids, report = found(run)
    assert "variable-overridden" in ids
    assert "litellm_logger_database_name has no effect: playbooks/litellm.yml sets it itself." in report


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
