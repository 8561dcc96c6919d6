"""Break what each item of the CIS benchmark looks at, one after the other, and print what the item said as JSON.

Runs as root on the database's host. For each item: whether it held before, and whether it holds while broken in each
way that it looks at; items that do not hold in a deployment (they have exceptions) are mended instead. What takes a
restart, and settings of one item that names the wrong ones, are broken together.
"""

import contextlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg2

(MODULE,) = Path("/opt/litellm-sqlalchemy/current/lib").glob("python*/site-packages/litellm_sqlalchemy/cis.py")
SPEC = importlib.util.spec_from_file_location("cis", MODULE)
assert SPEC
assert SPEC.loader
cis = importlib.util.module_from_spec(SPEC)
sys.modules["cis"] = cis  # its dataclasses look themselves up there
SPEC.loader.exec_module(cis)

ETC = Path("/etc/postgresql/17/main")
DROPIN = ETC / "conf.d/99-broken.conf"
DATA = Path("/var/lib/postgresql/17/main")
EXTENSIONS = Path("/usr/share/postgresql/17/extension")
Breaking = contextlib.AbstractContextManager[None]

# Put in force by a reload.
SETTINGS = {
    "3.1.2": ("log_destination", "stderr"),
    "3.1.4": ("log_directory", "log"),
    "3.1.5": ("log_filename", "one.log"),
    "3.1.6": ("log_file_mode", "0644"),
    "3.1.7": ("log_truncate_on_rotation", "off"),
    "3.1.8": ("log_rotation_age", "2d"),
    "3.1.9": ("log_rotation_size", "0"),
    "3.1.11": ("syslog_sequence_numbers", "off"),
    "3.1.12": ("syslog_split_messages", "off"),
    "3.1.13": ("syslog_ident", "other"),
    "3.1.14": ("log_min_messages", "error"),
    "3.1.15": ("log_min_error_statement", "fatal"),
    "3.1.16": ("debug_print_parse", "on"),
    "3.1.17": ("debug_print_rewritten", "on"),
    "3.1.18": ("debug_print_plan", "on"),
    "3.1.19": ("debug_pretty_print", "off"),
    "3.1.20": ("log_connections", "off"),
    "3.1.21": ("log_disconnections", "off"),
    "3.1.22": ("log_error_verbosity", "terse"),
    "3.1.23": ("log_hostname", "on"),
    "3.1.24": ("log_line_prefix", "%m [%p] "),
    "3.1.25": ("log_statement", "ddl"),
    "3.1.26": ("log_timezone", "Europe/Berlin"),
    "3.2 pgaudit.log": ("pgaudit.log", "write"),
    "3.2 pgaudit.log_parameter": ("pgaudit.log_parameter", "on"),
    "6.8 ssl": ("ssl", "off"),
    "6.9": ("ssl_min_protocol_version", "TLSv1.2"),
    "6.10": ("ssl_ciphers", "DEFAULT"),
    "7.2": ("log_replication_commands", "off"),
    "7.4 archive_command": ("archive_command", ""),
    "8.1 temp_file_limit": ("temp_file_limit", "-1"),
    "8.1 log_directory": ("log_directory", "log"),
    "8.3 dynamic_library_path": ("dynamic_library_path", "$libdir:/tmp"),
}
# Put in force by one reload for each line: of these items, which name what is wrong, each setting has to be named.
NAMED = (
    ("6.2", {"ignore_system_indexes": "on", "jit_debugging_support": "on", "jit_profiling_support": "on"}),
    ("6.2", {"log_connections": "off", "log_disconnections": "off", "post_auth_delay": "1"}),
    ("6.4", {"fsync": "off", "full_page_writes": "off", "allow_alter_system": "on", "pre_auth_delay": "1"}),
    ("6.5", {"allow_system_table_mods": "on", "ignore_checksum_failure": "on", "zero_damaged_pages": "on"}),
    (
        "6.5",
        {
            "lo_compat_privileges": "on",
            "session_replication_role": "replica",
            "session_preload_libraries": "auto_explain",
        },
    ),
)
# Put in force by one restart for all.
RESTARTED = {
    "3.1.3": ("logging_collector", "off"),
    "5.2": ("listen_addresses", "*"),
    "5.6": ("shared_preload_libraries", "auth_delay"),
    "6.3 ignore_invalid_pages": ("ignore_invalid_pages", "on"),
    "6.3 data_sync_retry": ("data_sync_retry", "on"),
    "7.4 archive_mode": ("archive_mode", "off"),
    "8.3 unix_socket_directories": ("unix_socket_directories", "/var/run/postgresql, /tmp"),
}
ROLE = "DROP ROLE broken"
FUNCTION = "CREATE FUNCTION broken() RETURNS int LANGUAGE sql SECURITY DEFINER {} AS 'SELECT 1'"
PUBLIC = "REVOKE ALL ON {} FROM PUBLIC"
# (database, statement, statement that takes it back)
STATEMENTS = {
    "4.3 CREATEROLE": ("postgres", "CREATE ROLE broken CREATEROLE", ROLE),
    "4.3 SUPERUSER": ("postgres", "CREATE ROLE broken SUPERUSER", ROLE),
    "4.3 CREATEDB": ("postgres", "CREATE ROLE broken CREATEDB", ROLE),
    "4.3 BYPASSRLS": ("postgres", "CREATE ROLE broken BYPASSRLS", ROLE),
    "4.5 PUBLIC": ("litellm", FUNCTION.format("SET search_path = pg_catalog"), "DROP FUNCTION broken()"),
    "4.5 search_path": (
        "litellm",
        f"{FUNCTION.format('')}; REVOKE ALL ON FUNCTION broken() FROM PUBLIC",
        "DROP FUNCTION broken()",
    ),
    "4.6 table": ("litellm", "GRANT SELECT ON alembic_version TO PUBLIC", PUBLIC.format("alembic_version")),
    "4.6 schema": ("litellm", "GRANT USAGE ON SCHEMA public TO PUBLIC", PUBLIC.format("SCHEMA public")),
    "4.10 none": ("postgres", "CREATE ROLE broken LOGIN CONNECTION LIMIT 1", ROLE),
    "4.10 md5": (
        "postgres",
        "SET password_encryption = md5; CREATE ROLE broken LOGIN CONNECTION LIMIT 1 PASSWORD 'long-enough-1'",
        ROLE,
    ),
    "5.5": ("postgres", "CREATE ROLE broken LOGIN", ROLE),
    "6.6 role": (
        "postgres",
        "ALTER ROLE litellm_reader_a SET log_min_messages = 'panic'",
        "ALTER ROLE litellm_reader_a RESET log_min_messages",
    ),
    "6.6 database": (
        "postgres",
        "ALTER DATABASE litellm SET pgaudit.log = 'none'",
        "ALTER DATABASE litellm RESET pgaudit.log",
    ),
}
# Lines of pg_hba.conf.
RULES = {
    "5.3 trust": "local all all trust",
    "5.3 superuser": "local all postgres scram-sha-256",
    "5.4 method": "hostssl litellm broken 127.0.0.1/32 md5",
    "5.4 plaintext": "host litellm broken 127.0.0.1/32 scram-sha-256",
    "5.4 all users": "hostssl litellm all 127.0.0.1/32 scram-sha-256",
    "5.4 superuser": "hostssl litellm postgres 127.0.0.1/32 scram-sha-256",
    "5.4 everywhere": "hostssl litellm broken 0.0.0.0/0 scram-sha-256",
    "5.4 unreadable": "hostssl litellm broken nowhere scram-sha-256 what=is",
}


def command(*words: str) -> None:
    subprocess.run(words, check=True, capture_output=True)


def connect(database: str) -> Any:
    with cis.as_user("postgres"):
        connection = psycopg2.connect(host=cis.SOCKET_DIRECTORY, user="postgres", dbname=database)
    connection.autocommit = True
    return connection


def execute(connection: Any, statement: str) -> list[tuple[Any, ...]]:
    with connection.cursor() as cursor:
        cursor.execute(statement)
        return list(cursor.fetchall()) if cursor.description else []


def reload() -> None:
    """Have the server load its files; this session loads them after the postmaster has."""
    with contextlib.closing(connect("postgres")) as connection:
        before = execute(connection, "SELECT pg_conf_load_time()")
        execute(connection, "SELECT pg_reload_conf()")
        while execute(connection, "SELECT pg_conf_load_time()") == before:
            time.sleep(0.01)


def look(*ids: str) -> dict[str, tuple[bool, str]]:
    with contextlib.closing(cis.Server()) as server:
        return {one.id: one.look(server) for one in cis.ITEMS if one.id in ids}


def holds(*ids: str) -> dict[str, bool]:
    return {id_: ok for id_, (ok, _seen) in look(*ids).items()}


def named(id_: str, settings: dict[str, str]) -> dict[str, bool]:
    """Return for each setting whether the item holds, or fails without naming it."""
    ok, seen = look(id_)[id_]
    return {f"{id_} {name}": ok or f"{name} = " not in seen for name in settings}


@contextlib.contextmanager
def settings(values: dict[str, str]) -> Iterator[None]:
    DROPIN.write_text("".join(f"{name} = '{value}'\n" for name, value in values.items()))
    shutil.chown(DROPIN, "postgres", "postgres")
    reload()
    try:
        yield
    finally:
        DROPIN.unlink()
        reload()


@contextlib.contextmanager
def statement(database: str, change: str, back: str) -> Iterator[None]:
    with contextlib.closing(connect(database)) as connection:
        for part in change.split("; "):
            execute(connection, part)
        try:
            yield
        finally:
            execute(connection, back)


@contextlib.contextmanager
def file(path: str, content: str, mode: int = 0o644) -> Iterator[None]:
    assert not os.path.exists(path)
    Path(path).write_text(content)
    os.chmod(path, mode)
    try:
        yield
    finally:
        os.unlink(path)


@contextlib.contextmanager
def appended(path: Path, line: str) -> Iterator[None]:
    """Add a line that nobody puts in force: PostgreSQL shows what the file says before it reloads it."""
    before = path.read_text()
    path.write_text(before + line)
    try:
        yield
    finally:
        path.write_text(before)


@contextlib.contextmanager
def mode(path: Path, wrong: int) -> Iterator[None]:
    right = path.stat().st_mode & 0o7777
    path.chmod(wrong)
    try:
        yield
    finally:
        path.chmod(right)


@contextlib.contextmanager
def process(*arguments: str, **environment: str) -> Iterator[None]:
    waits = [sys.executable, "-c", "print(flush=True); input()", *arguments]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(waits, env=dict(os.environ, **environment), **pipes) as started:  # type: ignore[call-overload]
        started.stdout.readline()
        yield
        started.kill()


@contextlib.contextmanager
def between(start: tuple[str, ...], end: tuple[str, ...]) -> Iterator[None]:
    command(*start)
    try:
        yield
    finally:
        command(*end)


@contextlib.contextmanager
def moved(path: Path) -> Iterator[None]:
    aside = path.rename(path.with_suffix(".aside"))
    try:
        yield
    finally:
        aside.rename(path)


@contextlib.contextmanager
def newer_release() -> Iterator[None]:
    before, cis.MINIMUM_SERVER_VERSION = cis.MINIMUM_SERVER_VERSION, 170099
    yield
    cis.MINIMUM_SERVER_VERSION = before


@contextlib.contextmanager
def restarted() -> Iterator[None]:
    """Restart with wrong settings, and with a data directory that makes the server choose another umask."""
    lines = [f"{name} = '{value}'\n" for name, value in RESTARTED.values()]
    try:
        with mode(DATA, 0o750), file(str(DROPIN), "".join(lines)):
            shutil.chown(DROPIN, "postgres", "postgres")
            command("systemctl", "restart", "postgresql@17-main.service")
            yield
    finally:
        command("systemctl", "restart", "postgresql@17-main.service")


SHADOW = next(
    line.split(":")[1] for line in Path("/etc/shadow").read_text().splitlines() if line.startswith("postgres:")
)
BREAKINGS: dict[str, Callable[[], Breaking]] = {
    "1.3": lambda: between(
        ("systemctl", "disable", "postgresql.service"), ("systemctl", "enable", "postgresql.service")
    ),
    "1.4": lambda: mode(DATA, 0o750),
    "1.5": newer_release,
    "1.6 everybody": lambda: file("/etc/profile.d/broken.sh", "export PGPASSWORD=x\n"),
    "1.6 one": lambda: file("/root/.zprofile", "export PGPASSWORD=x\n"),
    "1.7": lambda: process(PGPASSWORD="x"),
    "2.2 mode": lambda: mode(EXTENSIONS, 0o777),
    "2.2 owner": lambda: between(
        ("chown", "postgres:postgres", str(EXTENSIONS)), ("chown", "root:root", str(EXTENSIONS))
    ),
    "2.3": lambda: file("/root/.psql_history", "SELECT 1;\n"),
    "2.4": lambda: file("/root/.pg_service.conf", "[x]\npassword=x\n"),
    "4.1": lambda: between(("usermod", "-p", "x", "postgres"), ("usermod", "-p", SHADOW, "postgres")),
    "4.8": lambda: file(str(EXTENSIONS / "set_user.control"), "default_version = '1'\n"),
    "5.1 address": lambda: process("postgresql://user:password@host/database"),
    "5.1 parameter": lambda: process("host=db1 password=x"),
    "6.8 key": lambda: mode(ETC / "tls/server.key", 0o640),
    "6.11": lambda: moved(EXTENSIONS / "pgcrypto.control"),
    "8.2 program": lambda: moved(Path("/usr/bin/pgbackrest")),
    "8.2 configuration": lambda: moved(Path("/etc/pgbackrest.conf")),
    **{key: (lambda pair=pair: settings(dict([pair]))) for key, pair in SETTINGS.items()},
    **{key: (lambda all_=all_: statement(*all_)) for key, all_ in STATEMENTS.items()},
    **{key: (lambda line=line: appended(ETC / "pg_hba.conf", f"{line}\n")) for key, line in RULES.items()},
}

everything = [one.id for one in cis.ITEMS]
before = holds(*everything)
broken = {}
for key, breaking in BREAKINGS.items():
    with breaking():
        broken[key] = holds(key.split()[0])[key.split()[0]]
for id_, wrong in NAMED:
    with settings(wrong):
        broken |= named(id_, wrong)
with restarted():
    broken |= holds("2.1", "3.1.3", "3.2", "5.2", "5.6", "7.4")
    broken |= named("6.3", {"ignore_invalid_pages": "on", "data_sync_retry": "on"})
    broken["8.3 unix_socket_directories"] = holds("8.3")["8.3"]
print(json.dumps({"before": before, "broken": broken, "after": holds(*everything)}))
