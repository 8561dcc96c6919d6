"""CIS PostgreSQL 17 Benchmark: every item that a program can decide, looked at on the database's own host.

Run as root there: `python3 cis.py [--port 5432] [--exceptions FILE] [--json]`. It needs the standard library and
psycopg2 alone, so that this one file can be sent to a host that has nothing else of the package. It changes nothing.
Exit code 0: every item holds or has an exception that has not expired; 1: an item does not; 2: nothing could be asked.

Ids are the benchmark's; titles, findings and remedies are not its text. Left out are the items that only people can
judge: 1.1, 1.2, 3.1.10, 4.2, 4.4, 4.7, 4.9, 6.1, 7.1, 7.3, 7.5.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import glob
import json
import os
import pwd
import re
import stat
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psycopg2

SOCKET_DIRECTORY = "/var/run/postgresql"
#: The oldest release whose known CVEs are fixed, as `server_version_num` counts.
MINIMUM_SERVER_VERSION = 170011
#: Cipher suites with forward secrecy and authenticated encryption (item 6.10), by OpenSSL's names.
STRONG_CIPHERS = re.compile(
    r"TLS_(AES_(128|256)_(GCM|CCM)|CHACHA20)_\w+|"
    r"(ECDHE|DHE)-\w+-(AES(128|256)-(GCM-SHA\d+|CCM)|CHACHA20-POLY1305)"
)
PREFIX_PARTS = (("%m", "%t", "%n"), ("%p",), ("%l",), ("%d",), ("%u",), ("%a",), ("%h", "%r"))

Verdict = tuple[bool, str]
Look = Callable[["Server"], Verdict]


@dataclass(frozen=True)
class Item:
    """One item of the benchmark: how to look, and what to do when it does not hold."""

    id: str
    title: str
    fix: str
    look: Look


@dataclass(frozen=True)
class Finding:
    """What became of an item; `exception` is the reason why it need not hold."""

    id: str
    title: str
    ok: bool
    seen: str
    remedy: str = ""
    exception: str = ""


ITEMS: list[Item] = []


def item(id_: str, title: str, fix: str) -> Callable[[Look], Look]:
    """Register the decorated function as the look at an item."""

    def register(look: Look) -> Look:
        ITEMS.append(Item(id_, title, fix, look))
        return look

    return register


class Server:
    """The running server, asked as its superuser over the socket."""

    def __init__(self, port: int = 5432) -> None:
        """Connect; raises psycopg2.OperationalError, and PermissionError to all but root and postgres."""
        self._port = port
        self._connection = self._connect("postgres")
        self.settings = {str(name): str(value) for name, value in self.rows("SELECT name, setting FROM pg_settings")}
        self.data = Path(self.settings["data_directory"])
        self.pid = int((self.data / "postmaster.pid").read_text().splitlines()[0])

    def _connect(self, database: str) -> Any:
        with as_user("postgres"):
            connection = psycopg2.connect(
                host=SOCKET_DIRECTORY, port=self._port, user="postgres", dbname=database, application_name="cis"
            )
        connection.set_session(readonly=True, autocommit=True)
        return connection

    def rows(self, query: str) -> list[tuple[Any, ...]]:
        """Return the rows of a query on the database postgres."""
        with self._connection.cursor() as cursor:
            cursor.execute(query)
            return list(cursor.fetchall())

    def names(self, query: str) -> list[str]:
        """Return the first column of a query on the database postgres."""
        return [str(row[0]) for row in self.rows(query)]

    def names_everywhere(self, query: str) -> list[str]:
        """Return the first column of a query on every database, each behind the name of the database."""
        found = []
        for database in self.names("SELECT datname FROM pg_database WHERE datallowconn ORDER BY 1"):
            with contextlib.closing(self._connect(database)) as connection, connection.cursor() as cursor:
                cursor.execute(query)
                found += [f"{database}: {row[0]}" for row in cursor.fetchall()]
        return found

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()


@contextlib.contextmanager
def as_user(name: str) -> Iterator[None]:
    """Be this user for a while: peer authentication looks at the effective user of the moment of connecting."""
    before = os.geteuid()
    os.seteuid(pwd.getpwnam(name).pw_uid)
    try:
        yield
    finally:
        os.seteuid(before)


def none_of(found: list[str], nothing: str) -> Verdict:
    """Return a verdict that holds when nothing was found; `nothing` says so."""
    return not found, ", ".join(found[:5]) + (f" and {len(found) - 5} more" if len(found) > 5 else "") or nothing


def setting(id_: str, title: str, name: str, accepts: Callable[[str], bool] | set[str], fix: str) -> None:
    """Register an item that one setting decides."""

    def look(server: Server) -> Verdict:
        value = server.settings.get(name, "")
        return (value in accepts if isinstance(accepts, set) else accepts(value)), f"{name} = '{value}'"

    item(id_, title, fix)(look)


def wanted(id_: str, title: str, values: dict[str, str]) -> None:
    """Register an item that several settings decide, each with one right value."""

    def look(server: Server) -> Verdict:
        wrong = [
            f"{name} = '{server.settings.get(name, '')}'"
            for name, value in values.items()
            if server.settings.get(name, "") != value
        ]
        return none_of(wrong, ", ".join(f"{name} = '{value}'" for name, value in values.items()))

    item(id_, title, "set " + ", ".join(f"{name} = '{value}'" for name, value in values.items()))(look)


def files(*patterns: str) -> Iterator[Path]:
    """Yield the regular files that the patterns match."""
    for pattern in patterns:
        yield from (path for path in map(Path, sorted(glob.glob(pattern))) if path.is_file())


def processes(kind: str) -> Iterator[tuple[int, bytes]]:
    """Yield (process, content) of /proc/<process>/<kind>; processes that end meanwhile are left out."""
    for path in glob.glob(f"/proc/[0-9]*/{kind}"):
        with contextlib.suppress(OSError):  # it has ended
            yield int(path.split("/")[2]), Path(path).read_bytes()


# 1 Installation


@item("1.3", "The server starts at boot", "systemctl enable postgresql.service")
def starts_at_boot(server: Server) -> Verdict:
    """Ask systemd about Debian's unit of all clusters."""
    command = ["systemctl", "is-enabled", "postgresql.service"]
    state = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    return state == "enabled", f"postgresql.service is {state or 'unknown'}"


@item("1.4", "The cluster's files are its server's alone, with checksums", "chmod 0700 on the data directory")
def data_directory(server: Server) -> Verdict:
    """Look at the data directory's owner and mode, and whether pages have checksums."""
    seen = server.data.stat()
    owner, mode = pwd.getpwuid(seen.st_uid).pw_name, stat.S_IMODE(seen.st_mode)
    checksums = server.settings["data_checksums"]
    return (owner, mode, checksums) == ("postgres", 0o700, "on"), f"{owner} {mode:04o}, data_checksums {checksums}"


@item("1.5", "No known vulnerability of the server is unpatched", "apt-get update && apt-get install postgresql-17")
def patched(server: Server) -> Verdict:
    """Compare the server's version with the oldest safe one."""
    return int(server.settings["server_version_num"]) >= MINIMUM_SERVER_VERSION, server.settings["server_version"]


@item("1.6", "No profile holds a database password", "remove PGPASSWORD from the named files")
def profiles(server: Server) -> Verdict:
    """Search the shells' start-up files for PGPASSWORD."""
    names = (".bashrc", ".profile", ".bash_profile", ".zshrc", ".zprofile", ".cshrc")
    homes = {entry.pw_dir for entry in pwd.getpwall() if entry.pw_dir not in ("/", "/nonexistent")}
    patterns = [f"{home}/{name}" for home in sorted(homes) for name in names]
    system = ("/etc/environment", "/etc/profile", "/etc/profile.d/*", "/etc/bash.bashrc", "/etc/environment.d/*")
    return none_of([str(path) for path in files(*patterns, *system) if b"PGPASSWORD" in path.read_bytes()], "none")


@item("1.7", "No process has a database password in its environment", "hand the password over in a file")
def environments(server: Server) -> Verdict:
    """Search every process's environment for PGPASSWORD."""
    found = [str(process) for process, content in processes("environ") if b"PGPASSWORD=" in content]
    return none_of([f"process {process}" for process in found], "none")


# 2 Files


@item("2.1", "What the server makes is readable by its user alone", "set UMask=0077 in the server's unit")
def umask(server: Server) -> Verdict:
    """Read the umask of the running server."""
    seen = re.search(r"^Umask:\s*(\d+)", Path(f"/proc/{server.pid}/status").read_text(), re.MULTILINE)
    value = seen[1] if seen else "unknown"
    return value == "0077", f"umask {value}"


@item("2.2", "Only root changes extensions", "chown root:root and chmod 0755 on the extension directory")
def extension_directory(server: Server) -> Verdict:
    """Look at owner and mode of the extensions' directory."""
    path = Path("/usr/share/postgresql/17/extension")
    seen = path.stat()
    good = (seen.st_uid, seen.st_gid, stat.S_IMODE(seen.st_mode)) == (0, 0, 0o755)
    return good, f"{path} belongs to {seen.st_uid}:{seen.st_gid}, {stat.S_IMODE(seen.st_mode):04o}"


@item("2.3", "psql keeps no history of statements", "remove the named files; psqlrc: \\set HISTFILE /dev/null")
def history(server: Server) -> Verdict:
    """Search homes for psql's history."""
    homes = {entry.pw_dir for entry in pwd.getpwall() if entry.pw_dir not in ("/", "/nonexistent")}
    found = [Path(home) / ".psql_history" for home in sorted(homes | set(glob.glob("/home/*")))]
    return none_of([str(path) for path in found if path.is_file()], "none")


@item("2.4", "No connection service file holds a password", "remove the passwords from the named files")
def service_files(server: Server) -> Verdict:
    """Search libpq's service files for passwords."""
    homes = {entry.pw_dir for entry in pwd.getpwall() if entry.pw_dir not in ("/", "/nonexistent")}
    patterns = [f"{home}/.pg_service.conf" for home in sorted(homes)]
    found = files(*patterns, "/etc/postgresql-common/pg_service.conf", "/etc/pg_service.conf")
    return none_of([str(path) for path in found if re.search(rb"^\s*password\s*=", path.read_bytes(), re.M)], "none")


# 3 Logging

setting(
    "3.1.2",
    "The log goes where programs can read it",
    "log_destination",
    lambda value: bool({part.strip() for part in value.split(",")} & {"jsonlog", "csvlog", "syslog"}),
    "set log_destination = 'jsonlog'",
)
setting("3.1.3", "A collector writes the log", "logging_collector", {"on"}, "set logging_collector = on and restart")


@item("3.1.4", "The log lies outside the data directory", "set log_directory = '/var/log/postgresql/17-main'")
def log_directory(server: Server) -> Verdict:
    """Compare the two directories."""
    directory = Path(server.settings["log_directory"])
    return directory.is_absolute() and server.data not in directory.parents, f"log_directory = '{directory}'"


setting(
    "3.1.5",
    "Each log file has a name of its own",
    "log_filename",
    lambda value: "%d" in value or "%a" in value,
    "set log_filename = '%Y-%m-%d_%H%M%S.log'",
)
setting("3.1.6", "Others cannot read log files", "log_file_mode", {"0600", "0640"}, "set log_file_mode = '0600'")
setting(
    "3.1.7",
    "A log file that comes round again is emptied",
    "log_truncate_on_rotation",
    {"on"},
    "set log_truncate_on_rotation = on",
)
setting(
    "3.1.8",
    "A log file lasts a day at most",
    "log_rotation_age",
    lambda value: 0 < int(value) <= 1440,
    "set log_rotation_age = '1d'",
)
setting(
    "3.1.9",
    "A log file has a limit",
    "log_rotation_size",
    lambda value: int(value) > 0,
    "set log_rotation_size = '100MB'",
)
setting(
    "3.1.11",
    "syslog does not merge repeated messages",
    "syslog_sequence_numbers",
    {"on"},
    "set syslog_sequence_numbers = on",
)
setting(
    "3.1.12", "syslog does not cut long messages", "syslog_split_messages", {"on"}, "set syslog_split_messages = on"
)
setting("3.1.13", "syslog knows the program's name", "syslog_ident", {"postgres"}, "set syslog_ident = 'postgres'")
VERBOSE = {"debug5", "debug4", "debug3", "debug2", "debug1", "info", "notice", "warning"}
setting("3.1.14", "Warnings are logged", "log_min_messages", VERBOSE, "set log_min_messages = 'warning'")
setting(
    "3.1.15",
    "Statements that fail are logged",
    "log_min_error_statement",
    VERBOSE | {"error"},
    "set log_min_error_statement = 'error'",
)
setting("3.1.16", "Parse trees are not logged", "debug_print_parse", {"off"}, "set debug_print_parse = off")
setting(
    "3.1.17", "Rewritten queries are not logged", "debug_print_rewritten", {"off"}, "set debug_print_rewritten = off"
)
setting("3.1.18", "Plans are not logged", "debug_print_plan", {"off"}, "set debug_print_plan = off")
setting("3.1.19", "What is debugged is readable", "debug_pretty_print", {"on"}, "set debug_pretty_print = on")
setting("3.1.20", "Logins are logged", "log_connections", {"on"}, "set log_connections = on")
setting("3.1.21", "Ends of sessions are logged", "log_disconnections", {"on"}, "set log_disconnections = on")
setting(
    "3.1.22",
    "Errors are logged with their place",
    "log_error_verbosity",
    {"verbose"},
    "set log_error_verbosity = 'verbose'",
)
setting("3.1.23", "A login does not wait for name resolution", "log_hostname", {"off"}, "set log_hostname = off")
setting(
    "3.1.24",
    "A line says when, who, where from and which program",
    "log_line_prefix",
    lambda value: all(any(part in value for part in parts) for parts in PREFIX_PARTS),
    "set log_line_prefix = '%m [%p] [%l] %q%u@%d %h %a '",
)
setting("3.1.25", "DDL is logged", "log_statement", {"ddl", "mod", "all"}, "set log_statement = 'ddl'")
setting("3.1.26", "The log's times are UTC", "log_timezone", {"UTC", "GMT", "Etc/UTC"}, "set log_timezone = 'UTC'")


@item(
    "3.2",
    "pgaudit records roles, privileges and DDL, without parameters",
    "set shared_preload_libraries = 'pgaudit', pgaudit.log = 'role, ddl', pgaudit.log_parameter = off",
)
def audit(server: Server) -> Verdict:
    """Look at pgaudit's settings."""
    loaded = "pgaudit" in libraries(server)
    classes = {part.strip().lower() for part in server.settings.get("pgaudit.log", "").split(",")}
    parameters = server.settings.get("pgaudit.log_parameter", "")
    seen = f"loaded: {loaded}, pgaudit.log = '{', '.join(sorted(classes))}', pgaudit.log_parameter = '{parameters}'"
    return loaded and ("all" in classes or {"role", "ddl"} <= classes) and parameters == "off", seen


def libraries(server: Server) -> set[str]:
    """Return the libraries that every session has."""
    return {part.strip().removeprefix("$libdir/") for part in server.settings["shared_preload_libraries"].split(",")}


# 4 Users and privileges


@item("4.1", "Nobody logs in to the host as postgres", "passwd --lock postgres")
def interactive_login(server: Server) -> Verdict:
    """Look for a usable password of the operating system's user."""
    for line in Path("/etc/shadow").read_text().splitlines():
        name, password, *_rest = line.split(":")
        if name == "postgres":
            return password.startswith(("!", "*")), "locked" if password.startswith(("!", "*")) else "has a password"
    return False, "the user postgres is missing"


@item("4.3", "Only the first superuser has administrative attributes", "ALTER ROLE ... NOSUPERUSER NOCREATEROLE ...")
def attributes(server: Server) -> Verdict:
    """List roles with attributes beyond logging in."""
    special = "rolsuper OR rolcreaterole OR rolcreatedb OR rolbypassrls"
    return none_of(server.names(f"SELECT rolname FROM pg_roles WHERE oid <> 10 AND ({special}) ORDER BY 1"), "none")


@item(
    "4.5",
    "A function with its owner's rights is not everybody's, and looks names up where it should",
    "REVOKE EXECUTE ON FUNCTION ... FROM PUBLIC; ALTER FUNCTION ... SET search_path = ...",
)
def functions(server: Server) -> Verdict:
    """List such functions of every database: PUBLIC may execute them, or they take the caller's search_path."""
    return none_of(
        server.names_everywhere(
            "SELECT p.oid::regprocedure::text FROM pg_proc AS p JOIN pg_namespace AS n ON n.oid = p.pronamespace"
            " WHERE p.prosecdef AND n.nspname NOT IN ('pg_catalog', 'information_schema')"
            " AND (coalesce(p.proconfig::text, '') !~ 'search_path=' OR EXISTS (SELECT"
            " FROM aclexplode(coalesce(p.proacl, acldefault('f', p.proowner))) AS a WHERE a.grantee = 0))"
        ),
        "none",
    )


@item("4.6", "PUBLIC has no privilege on a table or schema", "REVOKE ALL ON ... FROM PUBLIC")
def public(server: Server) -> Verdict:
    """List what PUBLIC may do in every database, the system's own schemas left out."""
    own = "nspname NOT IN ('pg_catalog', 'information_schema') AND nspname !~ '^pg_'"
    return none_of(
        server.names_everywhere(
            "SELECT c.oid::regclass || ' ' || a.privilege_type FROM pg_class AS c"
            " JOIN pg_namespace AS n ON n.oid = c.relnamespace, aclexplode(c.relacl) AS a"
            f" WHERE a.grantee = 0 AND {own}"
            " UNION ALL SELECT 'schema ' || nspname || ' ' || a.privilege_type FROM pg_namespace,"
            f" aclexplode(coalesce(nspacl, acldefault('n', nspowner))) AS a WHERE a.grantee = 0 AND {own}"
        ),
        "none",
    )


@item("4.8", "Superusers act through set_user", "install the extension set_user")
def set_user(server: Server) -> Verdict:
    """Ask whether the extension is there."""
    there = server.names("SELECT name FROM pg_available_extensions WHERE name = 'set_user'")
    return bool(there), "available" if there else "not available"


@item("4.10", "Every login has a password, kept as a SCRAM verifier", "ALTER ROLE ... PASSWORD, or NOLOGIN")
def passwords(server: Server) -> Verdict:
    """List logins without one; the first superuser comes in over the socket only (5.3)."""
    scram = "coalesce(rolpassword, '') ~ '^SCRAM-SHA-256[$]'"
    return none_of(
        server.names(f"SELECT rolname FROM pg_authid WHERE rolcanlogin AND oid <> 10 AND NOT {scram}"), "all"
    )


# 5 Connections


@item("5.1", "No command line holds a database password", "hand the password over in a file")
def command_lines(server: Server) -> Verdict:
    """Search every process's arguments for connection strings with a password."""
    shape = re.compile(rb"postgres(ql)?://[^\s:/@]+:[^\s@]+@|(^|[\s\0'\"])password=[^\s\0'\"]")
    found = [f"process {process}" for process, content in processes("cmdline") if shape.search(content)]
    return none_of(found, "none")


@item("5.2", "The server listens on named addresses", "name each address in listen_addresses and restart")
def listen_addresses(server: Server) -> Verdict:
    """Look for addresses that mean all of them."""
    value = server.settings["listen_addresses"]
    return not {part.strip() for part in value.split(",")} & {"*", "0.0.0.0", "::"}, f"listen_addresses = '{value}'"


HBA = "SELECT type || ' ' || array_to_string(user_name, ',') || ' ' || auth_method FROM pg_hba_file_rules"


@item("5.3", "The socket lets in by peer or SCRAM, the superuser by peer alone", "mend the local lines of pg_hba.conf")
def local_rules(server: Server) -> Verdict:
    """List socket rules that are weaker."""
    weak = "auth_method NOT IN ('peer', 'scram-sha-256', 'reject')"
    superuser = "auth_method <> 'peer' AND user_name && ARRAY['postgres', 'all']"
    return none_of(server.names(f"{HBA} WHERE type = 'local' AND ({weak} OR {superuser})"), "peer and scram-sha-256")


@item(
    "5.4",
    "The network lets in by TLS and SCRAM or certificate, never the superuser",
    "leave only hostssl lines with scram-sha-256 or cert, and no `all`, in pg_hba.conf",
)
def network_rules(server: Server) -> Verdict:
    """List network rules that are weaker, and those that PostgreSQL could not read."""
    weak = "type <> 'hostssl' OR auth_method NOT IN ('scram-sha-256', 'cert', 'reject')"
    wide = "auth_method <> 'reject' AND (user_name && ARRAY['postgres', 'all'] OR netmask IN ('0.0.0.0', '::'))"
    broken = server.names("SELECT 'line ' || line_number FROM pg_hba_file_rules WHERE error IS NOT NULL")
    return none_of(
        server.names(f"{HBA} WHERE type <> 'local' AND ({weak} OR {wide})") + broken, "hostssl, scram-sha-256"
    )


@item("5.5", "Every login has a connection limit", "ALTER ROLE ... CONNECTION LIMIT 20")
def connection_limits(server: Server) -> Verdict:
    """List logins without one; a superuser's is never applied."""
    without = "SELECT rolname FROM pg_roles WHERE rolcanlogin AND NOT rolsuper AND rolconnlimit < 0 ORDER BY 1"
    return none_of(server.names(without), "every login has one")


@item("5.6", "Weak passwords are refused", "add passwordcheck to shared_preload_libraries and restart")
def passwordcheck(server: Server) -> Verdict:
    """Ask whether the library is loaded."""
    return "passwordcheck" in libraries(server), f"shared_preload_libraries = '{', '.join(sorted(libraries(server)))}'"


# 6 Settings

wanted(
    "6.2",
    "Sessions neither debug nor hide",
    {
        "ignore_system_indexes": "off",
        "jit_debugging_support": "off",
        "jit_profiling_support": "off",
        "log_connections": "on",
        "log_disconnections": "on",
        "post_auth_delay": "0",
    },
)
wanted("6.3", "The server starts with safe settings", {"data_sync_retry": "off", "ignore_invalid_pages": "off"})
wanted(
    "6.4",
    "Settings of a reload keep data and configuration safe",
    {"fsync": "on", "full_page_writes": "on", "allow_alter_system": "off", "pre_auth_delay": "0"},
)
wanted(
    "6.5",
    "The superuser's settings keep data and catalogues safe",
    {
        "allow_system_table_mods": "off",
        "ignore_checksum_failure": "off",
        "zero_damaged_pages": "off",
        "lo_compat_privileges": "off",
        "session_replication_role": "origin",
        "session_preload_libraries": "",
    },
)


@item("6.6", "No role or database turns logging, auditing or row security down", "ALTER ROLE ... RESET ...")
def overrides(server: Server) -> Verdict:
    """List such settings of roles and databases."""
    risky = "'^(log_|pgaudit[.]|debug_|row_security|session_|local_preload|client_min_messages|password_encryption)'"
    query = (
        "SELECT coalesce(setrole::regrole::text, 'all roles') || ': ' || entry"
        f" FROM pg_db_role_setting, unnest(setconfig) AS entry WHERE entry ~ {risky}"
    )
    return none_of(server.names(query), "none")


@item("6.7", "The host's cryptography is validated (FIPS 140)", "run the database on a host in FIPS mode")
def fips(server: Server) -> Verdict:
    """Ask the kernel."""
    path = Path("/proc/sys/crypto/fips_enabled")
    value = path.read_text().strip() if path.exists() else "0"
    return value == "1", f"fips_enabled {value}"


@item("6.8", "TLS is on, with a key that is the server's alone", "set ssl = on; chmod 0600 on ssl_key_file")
def tls(server: Server) -> Verdict:
    """Look at the setting and at the key file's mode and owner."""
    seen = (server.data / server.settings["ssl_key_file"]).stat()
    mode, owner = stat.S_IMODE(seen.st_mode), pwd.getpwuid(seen.st_uid).pw_name
    good = server.settings["ssl"] == "on" and owner == "postgres" and mode == 0o600
    return good, f"ssl = '{server.settings['ssl']}', key of {owner} {mode:04o}"


setting(
    "6.9", "TLS is 1.3 or newer", "ssl_min_protocol_version", {"TLSv1.3"}, "set ssl_min_protocol_version = 'TLSv1.3'"
)
setting(
    "6.10",
    "Weak ciphers are off",
    "ssl_ciphers",
    lambda value: all(STRONG_CIPHERS.fullmatch(part) for part in re.split("[:, ]+", value)),
    "name only ECDHE suites with GCM or ChaCha20 in ssl_ciphers",
)


@item("6.11", "pgcrypto is at hand", "install PostgreSQL's contributed modules")
def pgcrypto(server: Server) -> Verdict:
    """Ask whether the extension is there."""
    there = server.names("SELECT name FROM pg_available_extensions WHERE name = 'pgcrypto'")
    return bool(there), "available" if there else "not available"


# 7 Replication, 8 Special configuration

setting(
    "7.2", "Replication commands are logged", "log_replication_commands", {"on"}, "set log_replication_commands = on"
)


@item("7.4", "WAL is archived, and the last attempt was good", "ansible-playbook playbooks/backup.yml")
def archiving(server: Server) -> Verdict:
    """Look at the settings and at the archiver's statistics."""
    values = server.settings
    with_what = values["archive_library"] or values["archive_command"].replace("(disabled)", "")
    query = "SELECT coalesce(last_failed_time > coalesce(last_archived_time, '-infinity'), false) FROM pg_stat_archiver"
    failing = bool(server.rows(query)[0][0])
    seen = f"archive_mode = '{values['archive_mode']}', {'with' if with_what else 'without'} a command"
    return values["archive_mode"] == "on" and bool(with_what) and not failing, seen + (", failing" if failing else "")


@item("8.1", "Neither logs nor temporary files can fill the data directory", "set temp_file_limit and log_directory")
def data_directory_alone(server: Server) -> Verdict:
    """Look at what else may grow there."""
    outside = server.data not in (server.data / server.settings["log_directory"]).parents
    limit = server.settings["temp_file_limit"]
    return outside and limit != "-1", f"temp_file_limit = '{limit}', logs {'outside' if outside else 'inside'}"


@item("8.2", "pgBackRest is installed and configured", "ansible-playbook playbooks/backup.yml")
def pgbackrest(server: Server) -> Verdict:
    """Look for the program and its configuration."""
    program = Path("/usr/bin/pgbackrest").exists()
    configured = Path("/etc/pgbackrest.conf").exists() or Path("/etc/pgbackrest/pgbackrest.conf").exists()
    return program and configured, f"installed: {program}, configured: {configured}"


@item(
    "8.3",
    "Sockets and libraries come from trusted places only",
    "set unix_socket_directories = '/var/run/postgresql', dynamic_library_path = '$libdir'",
)
def trusted_places(server: Server) -> Verdict:
    """Look for sockets in directories of everybody, and for libraries from elsewhere."""
    values, wrong = server.settings, []
    for directory in filter(None, (part.strip() for part in values["unix_socket_directories"].split(","))):
        if Path(directory).exists() and Path(directory).stat().st_mode & stat.S_IWOTH:
            wrong.append(f"everybody may write to {directory}")
    if values["dynamic_library_path"] != "$libdir":
        wrong.append(f"dynamic_library_path = '{values['dynamic_library_path']}'")
    wrong += [
        f"{name} is set"
        for name in ("local_preload_libraries", "external_pid_file")
        if values[name] and not values[name].startswith("/var/run/postgresql/")
    ]
    return none_of(wrong, "none from elsewhere")


@dataclass(frozen=True)
class Exemption:
    """Why an item need not hold, and the last day on which that counts."""

    id: str
    reason: str
    expires: datetime.date


def read_exceptions(text: str) -> dict[str, Exemption]:
    """Return the exceptions of a TOML file by item; raises ValueError that says what is wrong with it.

    A file has tables `[[exception]]` with `id`, `reason` and `expires` (a TOML date).
    """
    found = {}
    known = {one.id for one in ITEMS}
    for entry in tomllib.loads(text).get("exception", []):
        id_, reason, expires = (entry.get(name) for name in ("id", "reason", "expires"))
        if id_ not in known:
            raise ValueError(f"exception for {id_!r}, which is no item that is checked")
        if not reason or not isinstance(expires, datetime.date) or isinstance(expires, datetime.datetime):
            raise ValueError(f"the exception for {id_} needs a reason and a day on which it expires (2027-06-30)")
        found[id_] = Exemption(id_, reason, expires)
    return found


def look(server: Server, exceptions: dict[str, Exemption], today: datetime.date) -> Iterator[Finding]:
    """Yield what became of every item."""
    for one in ITEMS:
        try:
            ok, seen = one.look(server)
        except (OSError, psycopg2.Error) as error:  # a file that is missing, say: the other items are looked at
            ok, seen = False, f"cannot be seen: {' '.join(str(error).split())}"
        exemption = exceptions.get(one.id)
        if ok or exemption is None:
            yield Finding(one.id, one.title, ok, seen, "" if ok else one.fix)
        elif exemption.expires < today:
            yield Finding(one.id, one.title, False, f"{seen}; its exception ended on {exemption.expires}", one.fix)
        else:
            reason = f"until {exemption.expires}: {exemption.reason}"
            yield Finding(one.id, one.title, True, seen, exception=reason)


def main(arguments: list[str] | None = None) -> int:
    """Look at every item and print what was seen; return the exit code."""
    parser = argparse.ArgumentParser(prog="cis.py", description="Check the CIS PostgreSQL 17 Benchmark on this host.")
    parser.add_argument("--port", type=int, default=5432, help="port of the server, which names its socket")
    parser.add_argument("--exceptions", type=Path, metavar="FILE", help="TOML file of items that need not hold")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(arguments)
    try:
        exceptions = read_exceptions(options.exceptions.read_text()) if options.exceptions else {}
        server = Server(options.port)
    except (OSError, ValueError, psycopg2.Error) as error:
        print(f"cis.py: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    with contextlib.closing(server):
        findings = list(look(server, exceptions, datetime.datetime.now(datetime.UTC).date()))
    if options.json:
        print(
            json.dumps({"ok": all(one.ok for one in findings), "checks": [asdict(one) for one in findings]}, indent=2)
        )
    else:
        for one in findings:
            state = "EXCEPT" if one.exception else "OK    " if one.ok else "FAILED"
            notes = (f"; {one.exception}" if one.exception else "") + (f"; next: {one.remedy}" if one.remedy else "")
            print(f"{state} {one.id:<7} {one.title}: {one.seen}{notes}")
    return 0 if all(one.ok for one in findings) else 1


if __name__ == "__main__":
    sys.exit(main())
