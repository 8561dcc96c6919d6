"""A spare cluster for a drill: own user, own directory, own socket, no network, gone when the drill is over."""

import os
import pwd
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from postgresql_backup.database import Connection, one, session
from postgresql_backup.errors import DamagedError, DatabaseError, RefusedError, ToolError
from postgresql_backup.settings import Settings
from postgresql_backup.tools import last_error, run, wait_for

#: As long as the unit may take: a day's WAL of a large cluster is replayed with little of the host.
_START_TIMEOUT = 24 * 3600
#: As the role postgresql makes clusters.
_INITDB = ["--encoding=UTF8", "--locale-provider=builtin", "--builtin-locale=C.UTF-8", "--locale=C.UTF-8"]


class Spare:
    """Paths and processes of the spare cluster."""

    def __init__(self, settings: Settings) -> None:
        """Refuse to be anything that could touch the live cluster. Raises RefusedError."""
        self._settings = settings
        self.directory = Path(settings.drill) / "spare"
        self.data = self.directory / "data"
        self.socket = self.directory / "socket"
        self._log = self.directory / "log"
        self.user = pwd.getpwuid(os.geteuid()).pw_name
        if self.user in ("root", "postgres"):
            raise RefusedError(f"a drill must not run as {self.user}: start postgresql-backup-drill@dump.service")
        live = [settings.data, Path(settings.socket) / f".s.PGSQL.{settings.port}"]
        for path in live:
            if os.access(path, os.R_OK):
                raise RefusedError(f"a drill must not reach the live cluster, and {path} can be opened: check its unit")

    @contextmanager
    def place(self) -> Iterator[None]:
        """Make an empty directory for the cluster; remove all of it in the end."""
        self.remove()
        for directory in (self.directory, self.data, self.socket):
            directory.mkdir()
            directory.chmod(0o700)  # not the group of the directory above
        try:
            yield
        finally:
            self.stop()
            self.remove()

    def initialise(self) -> None:
        """Make an empty cluster."""
        run([f"{self._settings.bin}/initdb", "--pgdata", str(self.data), "--username=postgres", "--no-sync",
             "--auth=peer", "--data-checksums", *_INITDB])  # fmt: skip

    def start(self) -> None:
        """Start, and wait until recovery is over. Raises DamagedError with the server's last words."""
        configuration = self.directory / "postgresql.conf"
        (self.directory / "pg_hba.conf").write_text("local all postgres peer map=spare\n")
        (self.directory / "pg_ident.conf").write_text(f"spare {self.user} postgres\n")
        values = {
            "listen_addresses": "",
            "unix_socket_directories": str(self.socket),
            "hba_file": str(self.directory / "pg_hba.conf"),
            "ident_file": str(self.directory / "pg_ident.conf"),
            "hot_standby": "off",
            "archive_mode": "off",
            "fsync": "off",
            "autovacuum": "off",
            "jit": "off",
            "shared_buffers": "128MB",
            "maintenance_work_mem": "128MB",
            "max_wal_size": "512MB",  # the live server may share the disk
            "logging_collector": "off",
        }
        configuration.write_text("".join(f"{name} = '{value}'\n" for name, value in values.items()))
        command = [f"{self._settings.bin}/pg_ctl", "--pgdata", str(self.data), "--log", str(self._log), "--wait"]
        try:
            run([*command, f"--timeout={_START_TIMEOUT}", "--options", f"-c config_file={configuration}", "start"])
        except ToolError:
            raise DamagedError(f"the spare cluster does not start: {self.last_words()}") from None
        if not wait_for(self._recovered, _START_TIMEOUT, 0.5):  # pg_ctl is content with a server that recovers
            raise DamagedError(f"the spare cluster does not end its recovery: {self.last_words()}")

    def _recovered(self) -> bool:
        if not (self.data / "postmaster.pid").exists():
            raise DamagedError(f"the spare cluster's recovery failed: {self.last_words()}")
        try:
            with self.session() as connection:
                return not one(connection, "SELECT pg_is_in_recovery()")
        except DatabaseError:
            return False

    def last_words(self) -> str:
        """Return what the server said last of an error."""
        try:
            return last_error(self._log.read_text(errors="replace"), "FATAL|PANIC|ERROR")
        except FileNotFoundError:
            return "it left no log"

    def stop(self) -> None:
        """Stop at once; what it holds is thrown away."""
        if (self.data / "postmaster.pid").exists():
            try:
                run([f"{self._settings.bin}/pg_ctl", "--pgdata", str(self.data), "--mode=immediate", "--wait", "stop"])
            except ToolError:
                if (self.data / "postmaster.pid").exists():
                    raise

    def remove(self) -> None:
        """Remove the cluster's directory."""
        if self.directory.exists():
            shutil.rmtree(self.directory)

    @contextmanager
    def session(self, database: str = "postgres") -> Iterator[Connection]:
        """Open a superuser's session with the spare cluster."""
        with session(self._settings, database, socket=str(self.socket), port=5432) as connection:
            yield connection

    @property
    def libpq(self) -> dict[str, str]:
        """Environment with which PostgreSQL's programs reach the spare cluster."""
        return {"PGHOST": str(self.socket), "PGPORT": "5432", "PGUSER": "postgres"}

    def check_structure(self) -> None:
        """Let pg_amcheck look at every table and index. Raises DamagedError."""
        command = [
            f"{self._settings.bin}/pg_amcheck",
            "--all",
            "--install-missing",
            "--heapallindexed",
            "--no-password",
        ]
        try:
            run([*command, f"--jobs={self._settings.drill_jobs}"], extra=self.libpq)
        except ToolError as error:
            raise DamagedError(f"pg_amcheck finds damage: {error}") from None

    @property
    def size(self) -> int:
        """Bytes of the cluster on disk."""
        return sum(file.stat().st_size for file in self.data.rglob("*") if file.is_file() and not file.is_symlink())
