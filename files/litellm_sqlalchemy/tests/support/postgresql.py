"""A real PostgreSQL 17 with TLS and SCRAM, small, in a directory of its own; roles as a deployment has them."""

import getpass
import os
import secrets
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psycopg2

from support.waiting import wait_until

GROUPS = ("writer", "reader", "maintainer", "monitor")
#: Logins by the name of their credential file, and the role each is a member of.
LOGINS = {
    "migrator": ("litellm_migrator_a", "litellm_owner"),
    "writer": ("litellm_writer_a", "litellm_writer"),
    "reader": ("litellm_reader_a", "litellm_reader"),
    "maintainer": ("litellm_maintainer_a", "litellm_maintainer"),
    "monitor": ("litellm_monitor_a", "litellm_monitor"),
}
_CONFIGURATION = """
listen_addresses = '{address}'
port = {port}
unix_socket_directories = '{directory}'
ssl = on
ssl_cert_file = '{directory}/server.crt'
ssl_key_file = '{directory}/server.key'
password_encryption = scram-sha-256
max_connections = 40
shared_buffers = 32MB
max_wal_size = 256MB
autovacuum_naptime = 10min
log_min_messages = fatal
"""
_HBA = """
local   all postgres            peer map=tests
hostssl all all      samenet  scram-sha-256
"""


def binaries() -> Path:
    """Return the directory of PostgreSQL 17's programs."""
    candidates = [Path("/usr/lib/postgresql/17/bin"), Path(shutil.which("postgres") or "/").parent]
    for candidate in candidates:
        if (candidate / "initdb").exists():
            return candidate
    raise RuntimeError("PostgreSQL 17 is not installed here: the integration tests run in the baked test image")


def free_port() -> int:
    """Return a TCP port of 127.0.0.1 that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class Server:
    """A cluster in `directory`; the tests are its superuser through its Unix socket.

    `prefix` runs its programs in another network namespace, where it listens on `address`.
    """

    directory: Path
    address: str = "127.0.0.1"
    prefix: Sequence[str] = ()
    port: int = field(default_factory=free_port)
    passwords: dict[str, str] = field(default_factory=lambda: {login: secrets.token_hex(8) for login in LOGINS})

    @property
    def certificate(self) -> Path:
        """The certificate that clients have to trust."""
        return self.directory / "server.crt"

    @property
    def data(self) -> Path:
        """PGDATA."""
        return self.directory / "data"

    def create(self, *options: str, configuration: str = "") -> None:
        """Make the cluster with options of initdb and lines of configuration, start it and make the roles."""
        self.directory.mkdir(parents=True, exist_ok=True)
        self.certify()
        if os.geteuid() == 0:
            self.directory.chmod(0o755)
            shutil.chown(self.directory, "postgres", "postgres")
        self._run(
            "initdb", "-D", str(self.data), "-U", "postgres", "-E", "UTF8", "--locale=C.UTF-8", "--data-checksums",
            "--no-sync", *options,
        )  # fmt: skip
        with (self.data / "postgresql.conf").open("a") as file:
            file.write(_CONFIGURATION.format(port=self.port, directory=self.directory, address=self.address))
            file.write(configuration)
        (self.data / "pg_hba.conf").write_text(_HBA)
        (self.data / "pg_ident.conf").write_text(f"tests {getpass.getuser()} postgres\ntests postgres postgres\n")
        self.start()
        self.execute("CREATE ROLE litellm_owner NOLOGIN", *(f"CREATE ROLE litellm_{group} NOLOGIN" for group in GROUPS))
        for login, (user, member_of) in LOGINS.items():
            inherit = "FALSE" if login == "migrator" else "TRUE"
            self.execute(
                f"CREATE ROLE {user} LOGIN PASSWORD '{self.passwords[login]}'",
                f"GRANT {member_of} TO {user} WITH INHERIT {inherit}, SET TRUE",
            )
        self.execute("GRANT litellm_maintainer TO litellm_migrator_a WITH INHERIT FALSE, SET TRUE")

    def certify(self, address: str = "", begins: int = 0, ends: int = 2) -> None:
        """Put a new key and certificate in place, for this address unless told otherwise; dates are days from now."""
        address = address or self.address
        dates = [f"{datetime.now(UTC) + timedelta(days=days, minutes=-5):%Y%m%d%H%M%SZ}" for days in (begins, ends)]
        subprocess.run(
            ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes",
             "-not_before", dates[0], "-not_after", dates[1], "-subj", f"/CN={address}",
             "-addext", f"subjectAltName=IP:{address}", "-keyout", "server.key", "-out", "server.crt"],
            cwd=self.directory, check=True, capture_output=True,
        )  # fmt: skip
        for file in (self.certificate, self.directory / "server.key"):
            file.chmod(0o600)
            if os.geteuid() == 0:
                shutil.chown(file, "postgres", "postgres")

    def start(self) -> None:
        """Start; return when connections are taken."""
        self._run("pg_ctl", "-D", str(self.data), "-l", str(self.directory / "server.log"), "-w", "-t", "60", "start")

    def stop(self, mode: str = "fast") -> None:
        """Stop: `fast` rolls back and disconnects, `immediate` is a crash."""
        self._run("pg_ctl", "-D", str(self.data), "-m", mode, "-w", "-t", "60", "stop")

    def restart(self) -> None:
        """Stop and start."""
        self.stop()
        self.start()

    def kill(self) -> None:
        """Kill the postmaster with SIGKILL and wait until its children have noticed."""
        postmaster = self.postmaster()
        children = [int(pid) for (pid,) in self.query("SELECT pid FROM pg_stat_activity")]
        os.kill(postmaster, signal.SIGKILL)
        wait_until(lambda: not any(map(_is_running, [postmaster, *children])), "the backends end after the postmaster")

    def postmaster(self) -> int:
        """Return the process id of the postmaster."""
        return int((self.data / "postmaster.pid").read_text().split("\n", 1)[0])

    def is_running(self) -> bool:
        """Return whether the postmaster runs."""
        try:
            return _is_running(self.postmaster())
        except FileNotFoundError:
            return False

    def revived(self) -> bool:
        """Start it where it has stopped; return whether it answers."""
        try:
            if not self.is_running():
                self.start()
            self.query("SELECT 1")
        except (RuntimeError, psycopg2.OperationalError):
            return False
        return True

    @contextmanager
    def connection(self, database: str = "postgres") -> Iterator[Any]:
        """Yield the superuser's connection, in autocommit mode."""
        connection = psycopg2.connect(host=str(self.directory), port=self.port, user="postgres", dbname=database)
        try:
            connection.autocommit = True
            yield connection
        finally:
            connection.close()

    def execute(self, *statements: str, database: str = "postgres") -> None:
        """Run statements as superuser, each in a transaction of its own."""
        with self.connection(database) as connection, connection.cursor() as cursor:
            for statement in statements:
                cursor.execute(statement)

    def query(self, statement: str, *values: object, database: str = "postgres") -> list[tuple[Any, ...]]:
        """Return the rows of a query of the superuser."""
        with self.connection(database) as connection, connection.cursor() as cursor:
            cursor.execute(statement, values or None)
            rows: list[tuple[Any, ...]] = cursor.fetchall()
            return rows

    def create_database(self, name: str, template: str = "template0") -> "Database":
        """Make a database as the deployment does: an owner, nothing for PUBLIC, nothing on tables."""
        self.execute(
            f"CREATE DATABASE {name} OWNER litellm_owner TEMPLATE {template}",
            f"REVOKE ALL ON DATABASE {name} FROM PUBLIC",
            f"GRANT CONNECT ON DATABASE {name} TO litellm_writer, litellm_reader, litellm_maintainer, litellm_monitor",
            f"GRANT CONNECT ON DATABASE {name} TO litellm_migrator_a",
            f"GRANT TEMPORARY ON DATABASE {name} TO litellm_writer",
        )
        self.execute(
            "REVOKE ALL ON SCHEMA public FROM PUBLIC",
            "GRANT USAGE ON SCHEMA public TO litellm_writer, litellm_reader, litellm_maintainer, litellm_monitor",
            database=name,
        )
        return Database(self, name)

    def _run(self, program: str, *arguments: str) -> None:
        prefix = ["runuser", "-u", "postgres", "--"] if os.geteuid() == 0 else []
        done = subprocess.run(
            [*self.prefix, *prefix, str(binaries() / program), *arguments],
            cwd=self.directory,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,  # pg_ctl's server inherits neither: its log is a file
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            timeout=90,
        )
        if done.returncode:
            raise RuntimeError(f"{program} failed: {done.stdout}")


@dataclass
class Database:
    """One database of a server."""

    server: Server
    name: str

    def execute(self, *statements: str) -> None:
        """Run statements as superuser."""
        self.server.execute(*statements, database=self.name)

    def query(self, statement: str, *values: object) -> list[tuple[Any, ...]]:
        """Return the rows of a query of the superuser."""
        return self.server.query(statement, *values, database=self.name)

    def value(self, statement: str, *values: object) -> Any:
        """Return the one value of a query of the superuser."""
        return self.query(statement, *values)[0][0]

    def count(self, table: str) -> int:
        """Return the number of rows of a table."""
        return int(self.value(f"SELECT count(*) FROM {table}"))

    def drop(self) -> None:
        """Drop it, whoever is connected."""
        self.server.execute(f"DROP DATABASE IF EXISTS {self.name} WITH (FORCE)")


def _is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
