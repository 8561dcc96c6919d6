"""What the database server refuses and what it lets through, asked of the running server."""

import json
import shlex

import pytest

testinfra_hosts = ["postgresql"]

UNIT = "postgresql@17-main.service"
MAXIMAL_EXPOSURE = 1.5
PAIRS = ("litellm_migrator", "litellm_writer", "litellm_reader", "litellm_monitor")
LOGINS = [f"{pair}_{end}" for pair in PAIRS for end in "ab"]
GROUPS = {"litellm_owner", "litellm_writer", "litellm_reader", "litellm_maintainer", "litellm_monitor"}
BACKUP_LOGINS = ["litellm_backup_a", "litellm_backup_b"]
VERIFIED = "sslmode=verify-full sslrootcert=/etc/postgresql/17/main/tls/ca.crt channel_binding=require"
DENIED, READ_ONLY = "42501", "25006"  # SQLSTATE: insufficient_privilege, read_only_sql_transaction


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
def active(sql):
    """Return the active login by pair, as the server knows it."""
    enabled = sql(
        "SELECT r.rolname FROM pg_roles AS r WHERE rolcanlogin AND rolname LIKE 'litellm%'"
        " ORDER BY shobj_description(oid, 'pg_authid')"
    )
    return {name[:-2]: name for (name,) in enabled}


@pytest.fixture(scope="module")
def passwords(secrets):
    return {pair: secrets[f"vault_{pair}_password"] for pair in PAIRS}


@pytest.fixture(scope="module")
def connect(host, own_address, active, passwords):
    """Return a function that runs a statement over the network as the active login of a pair."""

    def run(pair, statements="SELECT 1", parameters=VERIFIED, database="litellm", password=None, address=own_address):
        target = f"host={address} dbname={database} user={active[pair]} connect_timeout=10 {parameters}"
        statements = [statements] if isinstance(statements, str) else statements
        commands = " ".join(f"-c {shlex.quote(statement)}" for statement in statements)
        secret = shlex.quote(password or passwords[pair])
        return host.run(f"PGPASSWORD={secret} psql -XAtq -v VERBOSITY=sqlstate {commands} {shlex.quote(target)}")

    return run


@pytest.fixture(scope="module")
def another_authority(host):
    path = "/tmp/another-authority.crt"
    host.check_output(
        "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -keyout /dev/null -out %s"
        " -subj /CN=another -days 1 2>/dev/null",
        path,
    )
    yield path
    host.check_output("rm -f %s", path)


def test_version_and_checksums(sql):
    assert sql("SELECT current_setting('server_version_num')::int AS v")[0][0] >= 170011
    assert sql("SELECT current_setting('data_checksums') AS c") == [("on",)]


def test_it_runs_and_starts_at_boot(host):
    assert host.service("postgresql").is_enabled
    assert host.service(UNIT).is_running


def test_unit_is_hardened(host):
    report = host.check_output("systemd-analyze security --no-pager %s", UNIT)
    exposure = float(report.rpartition("Overall exposure level for")[2].split(": ")[1].split()[0])
    assert exposure <= MAXIMAL_EXPOSURE, report


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
        assert rule == ("hostssl", "litellm", ",".join(LOGINS), rule[3], mask, "scram-sha-256", None, None)


def test_a_verified_connection_works_with_tls_1_3(connect):
    for pair in PAIRS:
        result = connect(pair, "SELECT version FROM pg_stat_ssl WHERE pid = pg_backend_pid()")
        assert (result.rc, result.stdout.strip()) == (0, "TLSv1.3"), result.stderr


@pytest.mark.parametrize(
    ("parameters", "reason"),
    [
        ("sslmode=disable", "no encryption"),
        ("sslmode=verify-full sslrootcert={another}", "certificate verify failed"),
        (VERIFIED.replace("channel_binding", "ssl_max_protocol_version=TLSv1.2 channel_binding"), "protocol version"),
        (VERIFIED.replace("channel_binding=require", "require_auth=md5"), "authentication method requirement"),
        (VERIFIED.replace("channel_binding=require", "require_auth=password"), "authentication method requirement"),
        (VERIFIED.replace("channel_binding=require", "require_auth=none"), "authentication method requirement"),
    ],
)
def test_an_unsafe_connection_is_refused(connect, another_authority, parameters, reason):
    result = connect("litellm_writer", parameters=parameters.format(another=another_authority))
    assert result.rc == 2
    assert reason in result.stderr


def test_a_wrong_host_name_is_refused(connect, own_address):
    result = connect("litellm_writer", parameters=f"hostaddr={own_address} {VERIFIED}", address="other.example.net")
    assert result.rc == 2
    assert 'does not match host name "other.example.net"' in result.stderr


def test_a_wrong_password_is_refused(connect):
    result = connect("litellm_writer", password="wrong")
    assert result.rc == 2
    assert "password authentication failed" in result.stderr


@pytest.mark.parametrize("database", ["postgres", "template1"])
@pytest.mark.parametrize("pair", PAIRS)
def test_other_databases_are_refused(connect, pair, database):
    result = connect(pair, database=database)
    assert result.rc == 2
    assert "no pg_hba.conf entry" in result.stderr


def test_the_superuser_is_refused_over_the_network(host, own_address):
    target = f"host={own_address} dbname=litellm user=postgres {VERIFIED}"
    result = host.run("PGPASSWORD=any psql -XAtqc 'SELECT 1' %s", target)
    assert result.rc == 2
    assert "no pg_hba.conf entry" in result.stderr


def test_nobody_but_postgres_comes_in_over_the_socket(host):
    result = host.run("runuser -u nobody -- psql -U postgres -d litellm -XAtqc 'SELECT 1'")
    assert result.rc == 2
    assert "Peer authentication failed" in result.stderr


FORBIDDEN_TO_ALL = {
    "SELECT rolpassword FROM pg_authid": DENIED,
    "SET ROLE postgres": DENIED,
    "SET ROLE litellm_maintainer": DENIED,
    "SELECT pg_read_file('/etc/passwd')": DENIED,
    "COPY (SELECT 1) TO PROGRAM 'true'": DENIED,
    "CREATE SCHEMA s": DENIED,
    "CREATE TABLE public.t ()": DENIED,
    "CREATE ROLE intruder": DENIED,
    "DROP DATABASE postgres": DENIED,
}
FORBIDDEN = {
    "litellm_migrator": {"CREATE TEMPORARY TABLE t ()": DENIED},
    "litellm_writer": {"SET ROLE litellm_owner": DENIED},
    "litellm_reader": {"SET ROLE litellm_owner": DENIED, "CREATE TEMPORARY TABLE t ()": DENIED},
    "litellm_monitor": {"SET ROLE litellm_owner": DENIED, "CREATE TEMPORARY TABLE t ()": DENIED},
}


@pytest.mark.parametrize("pair", PAIRS)
def test_what_a_role_must_not_do_is_refused(connect, pair):
    expected = {**FORBIDDEN_TO_ALL, **FORBIDDEN[pair]}
    # A reader may lift its own read-only default, so that is no protection to rely on.
    result = connect(pair, ["SET default_transaction_read_only = off", *expected])
    answers = [line.removeprefix("ERROR:  ") for line in result.stderr.splitlines()]
    assert result.stdout == ""
    assert dict(zip(expected, answers, strict=True)) == expected


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


def test_exact_memberships(sql):
    expected = {("litellm_monitor", "pg_monitor", True, False, False)}
    expected |= {("litellm_backup", "pg_read_all_data", True, False, False)}
    expected |= {(login, "litellm_backup", True, False, False) for login in BACKUP_LOGINS}
    for end in "ab":
        expected.add((f"litellm_migrator_{end}", "litellm_owner", False, True, False))
        expected |= {(f"{g}_{end}", g, True, False, False) for g in PAIRS if g != "litellm_migrator"}
    found = sql(
        "SELECT m.member::regrole::text AS a, m.roleid::regrole::text AS b, inherit_option, set_option, admin_option"
        " FROM pg_auth_members AS m WHERE m.member::regrole::text !~ '^pg_'"
    )
    assert set(found) == expected


def test_exact_privileges_on_databases(sql):
    found = sql(
        "SELECT d.datname, a.grantee::regrole::text AS g, a.privilege_type FROM pg_database AS d,"
        " aclexplode(coalesce(d.datacl, acldefault('d', d.datdba))) AS a WHERE a.grantee <> d.datdba"
    )
    connecting = {"litellm_migrator_a", "litellm_migrator_b", *GROUPS} - {"litellm_owner"}
    expected = {("litellm", role, "CONNECT") for role in connecting} | {("litellm", "litellm_writer", "TEMPORARY")}
    expected |= {(database, "litellm_backup", "CONNECT") for database in ("litellm", "backup")}
    assert set(found) == expected


@pytest.mark.parametrize("database", ["litellm", "postgres", "template1"])
def test_public_has_nothing_on_the_schema_public(sql, database):
    found = sql(
        "SELECT a.grantee::regrole::text AS g, a.privilege_type FROM pg_namespace AS n,"
        " aclexplode(coalesce(n.nspacl, acldefault('n', n.nspowner))) AS a"
        " WHERE n.nspname = 'public' AND a.grantee <> n.nspowner",
        database,
    )
    users = GROUPS - {"litellm_owner"} if database == "litellm" else set()
    assert set(found) == {(role, "USAGE") for role in users}


def test_every_login_has_a_connection_limit(sql):
    limits = dict(sql("SELECT rolname, rolconnlimit FROM pg_roles WHERE rolname ~ '^litellm.*_[ab]$'"))
    assert limits.keys() == {*LOGINS, *BACKUP_LOGINS}
    assert all(1 <= limit <= 50 for limit in limits.values()), limits


def test_files_are_not_readable_by_others(host):
    for path, mode in {
        "/etc/postgresql/17/main/pg_hba.conf": 0o640,
        "/etc/postgresql/17/main/conf.d/50-managed.conf": 0o640,
        "/etc/postgresql/17/main/tls": 0o700,
        "/etc/postgresql/17/main/tls/server.key": 0o600,
    }.items():
        file = host.file(path)
        assert (file.user, file.mode) == ("postgres", mode), path


def test_log_and_journal_hold_no_password_and_no_verifier(host, passwords):
    for pair, password in passwords.items():
        found = host.run("grep --fixed-strings --count -- %s /var/log/postgresql/postgresql-17-main.log", password)
        assert found.stdout.strip() == "0", pair
        assert host.run("journalctl --no-pager | grep --fixed-strings -- %s", password).stdout == "", pair
    assert host.run("grep -F 'SCRAM-SHA-256$' /var/log/postgresql/postgresql-17-main.log").stdout == ""
