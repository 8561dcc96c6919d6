"""A PostgreSQL 17 of its own, as in production: TLS, SCRAM, fsync, the project's roles and schema."""

import json
import os
import secrets
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg2
import yaml

from benchmarks.processes import cpu_ticks
from litellm_sqlalchemy.migrate import migrate
from litellm_sqlalchemy.settings import Settings, load_settings

_BINARIES = Path(os.environ.get("PG_BINDIR", "/usr/lib/postgresql/17/bin"))
_GROUPS = ("writer", "reader", "maintainer", "monitor")
_CONFIGURATION = """
listen_addresses = '127.0.0.1'
unix_socket_directories = '{directory}'
port = {port}
ssl = on
ssl_cert_file = '{directory}/server.crt'
ssl_key_file = '{directory}/server.key'
password_encryption = scram-sha-256
shared_buffers = 512MB
max_wal_size = 4GB
wal_compression = lz4
{more}
"""


class Cluster:
    """A running server; `settings` are those of the package, `admin` is a superuser's connection (autocommit)."""

    def __init__(self, directory: Path, port: int, more: str = "") -> None:
        """Make and start the server in `directory`, which must be empty; `more` goes into postgresql.conf."""
        self.directory = directory
        self.port = port
        self._data = directory / "data"
        if os.geteuid() == 0:
            shutil.chown(directory, "postgres", "postgres")
        self._run("initdb", "-D", self._data, "-A", "trust", "-U", "postgres", "--locale=C.UTF-8", "-E", "UTF8")
        self._make_certificate()
        with (self._data / "postgresql.conf").open("a") as file:
            file.write(_CONFIGURATION.format(directory=directory, port=port, more=more))
        (self._data / "pg_hba.conf").write_text(
            "local all postgres trust\nhostssl all all 127.0.0.1/32 scram-sha-256\n"
        )
        self._run("pg_ctl", "-D", self._data, "-w", "-l", directory / "log", "start")
        self.admin = self._connect("postgres")
        self.settings = self._prepare()

    def close(self) -> None:
        """Stop the server."""
        self.admin.close()
        self._run("pg_ctl", "-D", self._data, "-m", "immediate", "stop")

    def query(self, statement: str, parameters: Any = None) -> list[Any]:
        """Run a statement as the superuser; return its rows."""
        with self.admin.cursor() as cursor:
            cursor.execute(statement, parameters)
            return cursor.fetchall() if cursor.description else []

    def empty(self) -> None:
        """Remove all rows and give every measurement the same start."""
        self.query("TRUNCATE requests, responses, daily_usage")
        self.query("CHECKPOINT")

    def cpu_seconds(self) -> float:
        """Return the CPU time of the server with all its processes, those that have ended included."""
        postmaster, *children = self.processes()
        ticks = sum(cpu_ticks(postmaster, (13, 14, 15, 16))) + sum(sum(cpu_ticks(pid, (13, 14))) for pid in children)
        return float(ticks / os.sysconf("SC_CLK_TCK"))

    def processes(self) -> list[int]:
        """Return the ids of the server's processes, the postmaster's first."""
        postmaster = int((self._data / "postmaster.pid").read_text().split()[0])
        children = Path(f"/proc/{postmaster}/task/{postmaster}/children").read_text().split()
        return [postmaster, *map(int, children)]

    def _connect(self, database: str) -> Any:
        connection = psycopg2.connect(host=str(self.directory), port=self.port, user="postgres", dbname=database)
        connection.autocommit = True
        return connection

    def _run(self, program: str, *arguments: object) -> None:
        command = [str(_BINARIES / program), *map(str, arguments)]
        if os.geteuid() == 0:
            command = ["runuser", "-u", "postgres", "--", *command]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd="/")

    def _make_certificate(self) -> None:
        files = [self.directory / "server.key", self.directory / "server.crt"]
        subprocess.run(
            ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "7",
             "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost",
             "-keyout", files[0], "-out", files[1]],
            check=True, capture_output=True,
        )  # fmt: skip
        files[0].chmod(0o600)
        if os.geteuid() == 0:
            for file in files:
                shutil.chown(file, "postgres", "postgres")

    def _prepare(self) -> Settings:
        self.query("CREATE ROLE litellm_owner NOLOGIN")
        self.query("CREATE DATABASE litellm OWNER litellm_owner")
        credentials = self.directory / "credentials"
        credentials.mkdir()
        for name in (*_GROUPS, "migrator"):
            group = "litellm_owner" if name == "migrator" else f"litellm_{name}"
            if name != "migrator":
                self.query(f"CREATE ROLE {group} NOLOGIN")
            password = secrets.token_hex(16)
            self.query(f"CREATE ROLE litellm_{name}_a LOGIN PASSWORD %s IN ROLE {group}", (password,))
            content = {"user": f"litellm_{name}_a", "password": password}
            (credentials / f"{name}.json").write_text(json.dumps(content))
        self.query("GRANT TEMPORARY ON DATABASE litellm TO litellm_writer")
        self.admin.close()
        self.admin = self._connect("litellm")
        settings = load_settings(self.write_settings("settings.yml"))
        migrate(settings)
        return settings

    def write_settings(self, name: str, **sections: dict[str, Any]) -> Path:
        """Write a settings file of the package for this server; `sections` replace what it says. Return the file."""
        spool = self.directory / "spool"
        spool.mkdir(exist_ok=True)
        database = {
            "host": "localhost",
            "port": self.port,
            "sslrootcert": str(self.directory / "server.crt"),
            "credentials_directory": str(self.directory / "credentials"),
        }
        content: dict[str, dict[str, Any]] = {
            "database": database,
            "spool": {"directory": str(spool)},
            "writer": {"listen": None},
        }
        for section, values in sections.items():
            content[section] = {**content.get(section, {}), **values}
        file = self.directory / name
        file.write_text(yaml.safe_dump(content))
        return file


def free_port() -> int:
    """Return a TCP port that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@contextmanager
def running_cluster(more: str = "") -> Iterator[Cluster]:
    """Yield a server that is stopped and removed in the end."""
    directory = Path(
        tempfile.mkdtemp(prefix="litellm-benchmark-", dir=os.environ.get("BENCHMARK_DIRECTORY", "/var/tmp"))
    )
    directory.chmod(0o755)
    cluster = None
    try:
        cluster = Cluster(directory, free_port(), more)
        yield cluster
    finally:
        if cluster is not None:
            cluster.close()
        shutil.rmtree(directory)
