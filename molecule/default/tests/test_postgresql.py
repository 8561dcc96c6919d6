"""What the database server refuses and what it lets through, asked of the running server."""

import json
import re
import shlex
import uuid

import pytest

testinfra_hosts = ["postgresql"]

UNIT = "postgresql@17-main.service"
PAIRS = ("litellm_migrator", "litellm_writer", "litellm_reader", "litellm_monitor")
LOGINS = [f"{pair}_{end}" for pair in PAIRS for end in "ab"]
GROUPS = {"litellm_owner", "litellm_writer", "litellm_reader", "litellm_maintainer", "litellm_monitor"}
BACKUP_LOGINS = ["litellm_backup_a", "litellm_backup_b"]
CERTIFICATES = "/etc/litellm-sqlalchemy/certificates"
VERIFIED = "sslmode=verify-full sslrootcert=/etc/postgresql/17/main/tls/ca.crt channel_binding=require"
READ_ONLY = "25006"  # SQLSTATE: read_only_sql_transaction


@pytest.fixture(scope="module")
def sql(host):
    """Return a function that runs a query as the superuser and returns its rows as JSON values."""

    def run(query, database="postgres"):
        command = f"SELECT coalesce(json_agg(q), '[]') FROM ({query}) AS q"
        out = host.check_output("runuser -u postgres -- psql -XAtq -d %s -c %s", database, command)
        return [tuple(row.values()) for row in json.loads(out)]

    return run


@pytest.fixture(scope="module")
def own_address(host, sql):
    """Return the address of the host that the server listens on for others; the loopback when there is no other."""
    named = [item.strip() for item in sql("SELECT current_setting('listen_addresses') AS a")[0][0].split(",")]
    return next((item for item in named if not item.startswith("127.")), "127.0.0.1")


@pytest.fixture(scope="module")
def passwords(secrets):
    return {pair: secrets[f"vault_{pair}_password"] for pair in PAIRS}


@pytest.fixture(scope="module")
def connect(host, own_address, active, passwords):
    """Return a function that runs a statement over the network as the active login of a pair."""

    def run(pair, statements="SELECT 1", parameters=VERIFIED, database="litellm", password=None, address=own_address):
        target = f"host={address} dbname={database} user={active[pair]} connect_timeout=10 {parameters}"
        target += f" sslcert={CERTIFICATES}/{active[pair]}/client.crt sslkey={CERTIFICATES}/{active[pair]}/client.key"
        statements = [statements] if isinstance(statements, str) else statements
        commands = " ".join(f"-c {shlex.quote(statement)}" for statement in statements)
        secret = shlex.quote(password or passwords[pair])
        return host.run(f"PGPASSWORD={secret} psql -XAtq -v VERBOSITY=sqlstate {commands} {shlex.quote(target)}")

    return run


def test_version_and_checksums(sql):
    assert sql("SELECT current_setting('server_version_num')::int AS v")[0][0] >= 170011
    assert sql("SELECT current_setting('data_checksums') AS c") == [("on",)]


def test_it_runs_and_starts_at_boot(host):
    assert host.service("postgresql").is_enabled
    assert host.service(UNIT).is_running


def test_it_starts_when_the_host_has_the_addresses_that_it_listens_on(host):
    for property in ("Wants", "After"):
        assert "network-online.target" in host.check_output(f"systemctl show -P {property} {UNIT}").split()


def test_it_listens_on_the_named_addresses_only(host, sql):
    named = {item.strip() for item in sql("SELECT current_setting('listen_addresses') AS a")[0][0].split(",")}
    lines = host.check_output("ss --tcp --listening --numeric --no-header 'sport = :5432'").splitlines()
    assert {line.split()[3].rpartition(":")[0].strip("[]") for line in lines} == named
    assert not named & {"*", "0.0.0.0", "::"}


def test_no_setting_waits_for_a_restart_and_none_is_broken(sql):
    assert sql("SELECT name FROM pg_settings WHERE pending_restart") == []
    assert sql("SELECT name, error FROM pg_file_settings WHERE error IS NOT NULL") == []


def test_exact_pg_hba_rules(sql, own_address):
    rules = sql(
        "SELECT type, array_to_string(database, ',') AS d, array_to_string(user_name, ',') AS u, address, netmask,"
        " auth_method, options, error FROM pg_hba_file_rules ORDER BY rule_number"
    )
    superuser, backup, *network = rules
    assert superuser == ("local", "all", "postgres", None, None, "peer", None, None)
    assert backup == ("local", "litellm,backup", ",".join(BACKUP_LOGINS), None, None, "scram-sha-256", None, None)
    addresses = [rule[3] for rule in network]
    assert len(addresses) == len(set(addresses))
    assert {own_address, "127.0.0.1"} <= set(addresses)
    for rule in network:
        mask = "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff" if ":" in rule[3] else "255.255.255.255"
        options = ["clientcert=verify-full"]
        assert rule == ("hostssl", "litellm", ",".join(LOGINS), rule[3], mask, "scram-sha-256", options, None)


def test_a_verified_connection_works_with_tls_1_3(connect):
    for pair in PAIRS:
        result = connect(pair, "SELECT version FROM pg_stat_ssl WHERE pid = pg_backend_pid()")
        assert (result.rc, result.stdout.strip()) == (0, "TLSv1.3"), result.stderr


@pytest.mark.parametrize("pair", ["litellm_reader", "litellm_monitor"])
def test_readers_start_read_only(connect, pair):
    assert connect(pair, "CREATE SCHEMA s").stderr.strip() == f"ERROR:  {READ_ONLY}"


def test_the_migrator_becomes_the_owner_by_set_role_alone(connect):
    assert connect("litellm_migrator", "SET ROLE litellm_owner").rc == 0


def test_exact_roles(sql):
    roles = {
        name: (login, stored, special)
        for name, login, stored, special in sql(
            "SELECT rolname, rolcanlogin, left(rolpassword, 19) AS v,"
            " rolsuper OR rolcreaterole OR rolcreatedb OR rolreplication OR rolbypassrls AS special"
            " FROM pg_authid WHERE rolname !~ '^pg_'"
        )
    }
    assert roles.pop("postgres") == (True, None, True)
    groups = GROUPS | {"litellm_backup", "backup_owner"}
    assert roles.keys() == groups | set(LOGINS) | set(BACKUP_LOGINS)
    assert {roles[name] for name in groups} == {(False, None, False)}
    for pair in (*PAIRS, "litellm_backup"):
        both = sorted([roles[f"{pair}_a"], roles[f"{pair}_b"]])
        assert both == [(False, None, False), (True, "SCRAM-SHA-256$4096:", False)], pair


def test_every_login_has_a_connection_limit(sql):
    limits = dict(sql("SELECT rolname, rolconnlimit FROM pg_roles WHERE rolname ~ '^litellm.*_[ab]$'"))
    assert limits.keys() == {*LOGINS, *BACKUP_LOGINS}
    assert all(1 <= limit <= 50 for limit in limits.values()), limits


def test_files_are_not_readable_by_others(host):
    for path, mode in {
        "/etc/postgresql/17/main/pg_hba.conf": 0o640,
        "/etc/postgresql/17/main/conf.d/50-managed.conf": 0o640,
        "/etc/postgresql/17/main/tls": 0o700,
        "/etc/postgresql/17/main/tls/pair/server.key": 0o600,
    }.items():
        file = host.file(path)
        assert (file.user, file.mode) == ("postgres", mode), path


def test_log_and_journal_hold_no_password_and_no_verifier(host, passwords):
    log = host.check_output("cat /var/log/postgresql/*.log /var/log/postgresql/17-main/*")
    journal = host.check_output("journalctl --no-pager")
    assert "AUDIT: SESSION" in log
    for pair, password in passwords.items():
        assert password not in log, pair
        assert password not in journal, pair
    assert not re.search(r"SCRAM-SHA-256\$\d+:", log)
    assert "PASSWORD <REDACTED>" in log


def test_the_audit_log_has_roles_privileges_and_ddl(host):
    name = f"audited_{uuid.uuid4().hex}"
    statements = {
        f"CREATE ROLE {name}": ["ROLE", "CREATE ROLE"],
        f"ALTER ROLE {name} PASSWORD 'never-1-logged'": ["ROLE", "ALTER ROLE"],
        f"CREATE TABLE {name} ()": ["DDL", "CREATE TABLE"],
        f"GRANT SELECT ON {name} TO {name}": ["ROLE", "GRANT"],
        f"DROP TABLE {name}": ["DDL", "DROP TABLE"],
        f"DROP ROLE {name}": ["ROLE", "DROP ROLE"],
    }
    command = " ".join(f"-c {shlex.quote(statement)}" for statement in statements)
    host.check_output(f"runuser -u postgres -- psql -Xq {command}")
    lines = host.check_output("sudo grep -h AUDIT /var/log/postgresql/17-main/*.json").splitlines()
    entries = [json.loads(line) for line in lines if name in line]
    assert [entry["message"].split(",")[3:5] for entry in entries] == list(statements.values())
    assert {(entry["user"], entry["application_name"]) for entry in entries} == {("postgres", "psql")}
    assert "never-1-logged" not in host.check_output("cat /var/log/postgresql/*.log /var/log/postgresql/17-main/*")


def test_old_logs_are_removed_and_the_present_one_stays(host):
    folder = "/var/log/postgresql/17-main"
    host.check_output(f"touch -d '31 days ago' {folder}/old.json && touch -d '29 days ago' {folder}/young.json")
    host.check_output("systemd-tmpfiles --clean /etc/tmpfiles.d/postgresql-log.conf")
    assert not host.file(f"{folder}/old.json").exists
    assert host.file(f"{folder}/young.json").exists
    host.check_output(f"rm {folder}/young.json")
    assert host.check_output("systemctl is-enabled systemd-tmpfiles-clean.timer") in ("static", "enabled")
