"""Break what each item of the CIS benchmark looks at, one after the other, and print what the item said as JSON.

Runs as root on the database's host. For each item: whether it held before, and whether it holds while broken; items
that do not hold in a deployment (they have exceptions) are mended instead. What takes a restart is broken together.
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
    "3.2": ("pgaudit.log", "write"),
    "6.2": ("jit_profiling_support", "on"),
    "6.4": ("full_page_writes", "off"),
    "6.5": ("zero_damaged_pages", "on"),
    "6.8": ("ssl", "off"),
    "6.9": ("ssl_min_protocol_version", "TLSv1.2"),
    "6.10": ("ssl_ciphers", "DEFAULT"),
    "7.2": ("log_replication_commands", "off"),
    "8.1": ("temp_file_limit", "-1"),
    "8.3": ("dynamic_library_path", "$libdir:/tmp"),
}
# Put in force by one restart for all.
RESTARTED = {
    "3.1.3": ("logging_collector", "off"),
    "5.2": ("listen_addresses", "*"),
    "5.6": ("shared_preload_libraries", "pgaudit, auth_delay"),
    "6.3": ("ignore_invalid_pages", "on"),
    "7.4": ("archive_mode", "off"),
}
# (database, statement, statement that takes it back)
STATEMENTS = {
    "4.3": ("postgres", "CREATE ROLE broken CREATEROLE", "DROP ROLE broken"),
    "4.5": (
        "litellm",
        "CREATE FUNCTION broken() RETURNS int LANGUAGE sql SECURITY DEFINER AS 'SELECT 1'",
        "DROP FUNCTION broken()",
    ),
    "4.6": ("litellm", "GRANT SELECT ON alembic_version TO PUBLIC", "REVOKE SELECT ON alembic_version FROM PUBLIC"),
    "5.5": ("postgres", "CREATE ROLE broken LOGIN", "DROP ROLE broken"),
    "6.6": (
        "postgres",
        "ALTER ROLE litellm_reader_a SET log_min_messages = 'panic'",
        "ALTER ROLE litellm_reader_a RESET log_min_messages",
    ),
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


def holds(*ids: str) -> dict[str, bool]:
    with contextlib.closing(cis.Server()) as server:
        return {one.id: one.look(server)[0] for one in cis.ITEMS if one.id in ids}


@contextlib.contextmanager
def setting(name: str, value: str) -> Iterator[None]:
    DROPIN.write_text(f"{name} = '{value}'\n")
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
        execute(connection, change)
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
    "1.6": lambda: file("/etc/profile.d/broken.sh", "export PGPASSWORD=x\n"),
    "1.7": lambda: process(PGPASSWORD="x"),
    "2.2": lambda: mode(EXTENSIONS, 0o777),
    "2.3": lambda: file("/root/.psql_history", "SELECT 1;\n"),
    "2.4": lambda: file("/root/.pg_service.conf", "[x]\npassword=x\n"),
    "4.1": lambda: between(("usermod", "-p", "x", "postgres"), ("usermod", "-p", SHADOW, "postgres")),
    "4.8": lambda: file(str(EXTENSIONS / "set_user.control"), "default_version = '1'\n"),
    "5.1": lambda: process("postgresql://user:password@host/database"),
    "5.3": lambda: appended(ETC / "pg_hba.conf", "local all all trust\n"),
    "5.4": lambda: appended(ETC / "pg_hba.conf", "host all all 0.0.0.0/0 md5\n"),
    "6.11": lambda: moved(EXTENSIONS / "pgcrypto.control"),
    "8.2": lambda: moved(Path("/usr/bin/pgbackrest")),
    **{id_: (lambda pair=pair: setting(*pair)) for id_, pair in SETTINGS.items()},
    **{id_: (lambda all_=all_: statement(*all_)) for id_, all_ in STATEMENTS.items()},
}

everything = [one.id for one in cis.ITEMS]
before = holds(*everything)
broken = {}
for id_, breaking in BREAKINGS.items():
    with breaking():
        broken |= holds(id_)
with restarted():
    broken |= holds(*RESTARTED, "2.1")
print(json.dumps({"before": before, "broken": broken, "after": holds(*everything)}))
