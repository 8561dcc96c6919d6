"""Takes a dump: everything in one snapshot per database, encrypted as it is read, promoted only when it is whole."""

import subprocess
from datetime import datetime
from pathlib import Path
from typing import Any

from postgresql_backup import age, dumps
from postgresql_backup.database import (
    LOCK_TIMEOUT,
    Connection,
    GivingWay,
    contents,
    libpq,
    lock_tables,
    login,
    one,
    rows,
    schema_digest,
    session,
)
from postgresql_backup.dumps import Manifest
from postgresql_backup.errors import DamagedError, LockedError, RefusedError, ToolError
from postgresql_backup.settings import Settings
from postgresql_backup.tools import Hashed, Pace, check_room, hash_file, lock, pump, run, running, write_file

_ATTEMPTS = 3


def take(settings: Settings) -> Manifest:
    """Take, verify and promote a dump; return its manifest. Raises BackupError, and then leaves no dump behind."""
    directory = Path(settings.dumps)
    with lock(directory / ".lock"):
        attempt = 0
        while True:
            attempt += 1
            dumps.remove_partial(directory)
            try:
                return _Dump(settings, directory).take()
            except LockedError as error:
                if attempt == _ATTEMPTS:
                    raise
                print(f"{error}; beginning again", flush=True)
            except OSError as error:
                raise ToolError(f"{error.filename or directory}: {error.strerror}; nothing was promoted") from None
            finally:
                dumps.remove_partial(directory)


class _Dump:
    def __init__(self, settings: Settings, directory: Path) -> None:
        self._settings, self._directory = settings, directory
        self._who = login()
        self._libpq = libpq(settings, self._who)
        self._pace = Pace(settings.dump_share)
        self._identity, recipient = age.new_identity()
        self._recipients = [*settings.recipients, recipient]

    def take(self) -> Manifest:
        settings = self._settings
        if not settings.recipients:
            raise RefusedError("there is no recipient: a dump that nobody can decrypt is no backup")
        with session(settings, settings.bookkeeping, self._who) as connection:
            manifest = self._manifest(connection)
            self._refuse_small_disk(connection)
            self._folder = self._directory / f"{dumps.PARTIAL}{manifest.name}"
            self._folder.mkdir(mode=0o750)
            for database in settings.databases:
                manifest.databases[database] = self._database(database, manifest)
            self._globals(manifest)
            self._configuration(manifest)
            manifest.ended_at = _now(connection).isoformat(timespec="seconds")
        self._verify(manifest)
        dumps.save(self._folder, manifest)
        dumps.promote(self._folder, self._directory, manifest)
        self._keep_identity(manifest)
        return manifest

    def _manifest(self, connection: Connection) -> Manifest:
        started = _now(connection)
        name = dumps.name_of(started)
        if (self._directory / name).exists():
            raise RefusedError(f"dump {name} is there already: wait a second")
        return Manifest(
            name=name,
            started_at=started.isoformat(timespec="seconds"),
            ended_at="",
            server_version=one(connection, "SHOW server_version").split()[0],
            tool_version=run([f"{self._settings.bin}/pg_dump", "--version"]).split()[2],
            system_identifier=str(one(connection, "SELECT system_identifier FROM pg_control_system()")),
        )

    def _refuse_small_disk(self, connection: Connection) -> None:
        """Refuse to begin what will not fit: as much as the last dump and a fifth, or the databases as they are."""
        found = dumps.names(self._directory)
        try:
            needed = dumps.load(self._directory / found[-1]).size * 1.2 if found else 0
        except DamagedError:
            needed = 0
        for database in self._settings.databases if not needed else ():
            needed += one(connection, "SELECT pg_database_size(%s)", database)
        check_room(self._directory, needed, "the dump")

    def _database(self, database: str, manifest: Manifest) -> dict[str, Any]:
        """Dump a database; return what its snapshot holds."""
        name = f"{database}.dump.age"
        giving_way = GivingWay(self._settings, database, f"the dump of {database}", self._who)
        with giving_way, session(self._settings, database, self._who) as connection:
            rows(connection, "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY")
            snapshot, taken, lsn = rows(
                connection, "SELECT pg_export_snapshot(), clock_timestamp(), pg_current_wal_lsn()::text"
            )[0]
            # Until all is read, and not by pg_dump alone: a table that was truncated since looks empty to a snapshot.
            lock_tables(connection, "ACCESS SHARE")
            command = [
                f"{self._settings.bin}/pg_dump",
                f"--dbname={database}",
                f"--snapshot={snapshot}",
                "--format=custom",
                "--compress=zstd:3",
                f"--lock-wait-timeout={LOCK_TIMEOUT}",  # pg_dump sets the session's own to none
                "--no-password",
            ]
            plain = self._encrypted(command, name)
            found = {
                "snapshot_at": taken.isoformat(),
                "lsn": lsn,
                "size": one(connection, "SELECT pg_database_size(current_database())"),
                "schema_digest": schema_digest(self._settings, database, self._libpq, snapshot),
                "tables": contents(connection, self._pace),
            }
            rows(connection, "COMMIT")
        self._record(name, plain, manifest)  # with no table held any more
        self._refuse_emptied(database, len(found["tables"]))
        return found

    def _refuse_emptied(self, database: str, tables: int) -> None:
        """Refuse to let a database that has lost all its tables drive good dumps out; a new one may have none yet."""
        before = dumps.names(self._directory)
        if before and not tables:
            earlier = dumps.load(self._directory / before[-1]).databases.get(database, {"tables": {}})["tables"]
            if earlier:
                raise RefusedError(
                    f"database {database} has no table, and dump {before[-1]} has {len(earlier)}: nothing was promoted"
                )

    def _globals(self, manifest: Manifest) -> None:
        command = [
            f"{self._settings.bin}/pg_dumpall",
            "--globals-only",
            "--no-role-passwords",
            "--no-password",
            f"--database={self._settings.bookkeeping}",
        ]
        self._record("globals.sql.age", self._encrypted(command, "globals.sql.age"), manifest)

    def _configuration(self, manifest: Manifest) -> None:
        """Encrypt the archive that the unit made before, as root."""
        archive = Path(self._settings.run) / "configuration.tar"
        if not archive.exists():
            raise RefusedError(f"{archive} is missing: start the unit postgresql-backup-dump.service, which makes it")
        with archive.open("rb") as source:
            self._record(
                "configuration.tar.age",
                age.encrypt(source, self._folder / "configuration.tar.age", self._recipients),
                manifest,
            )

    def _encrypted(self, command: list[str], name: str) -> Hashed:
        """Encrypt what a program prints; return size and SHA-256 of that. Raises ToolError when it fails."""
        program = Path(command[0]).name
        with running(command, f"{program} failed", extra=self._libpq, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            return age.encrypt(process.stdout, self._folder / name, self._recipients, self._pace)

    def _record(self, name: str, plain: Hashed, manifest: Manifest) -> None:
        stored = hash_file(self._folder / name, self._pace)
        manifest.files[name] = {
            "size": stored.size,
            "sha256": stored.sha256,
            "plain_size": plain.size,
            "plain_sha256": plain.sha256,
        }

    def _verify(self, manifest: Manifest) -> None:
        """Decrypt every file again. Raises DamagedError when one is not what was read from the server."""
        dumps.check_files(self._folder, manifest, self._pace)
        for name, wanted in manifest.files.items():
            plain = Hashed()
            with age.decrypted(self._folder / name, self._identity) as stream:
                pump(stream, plain, pace=self._pace)
            if not plain.size or plain.sha256 != wanted["plain_sha256"]:
                raise DamagedError(f"dump {manifest.name}: {name} does not decrypt to what was read from the server")

    def _keep_identity(self, manifest: Manifest) -> None:
        """Leave the dump's own identity in memory for the drill; those of older dumps go."""
        write_file(self._settings.keys / f"{manifest.name}.key", self._identity.encode())
        for file in self._settings.keys.glob("*.key"):
            if file.stem < manifest.name:
                file.unlink()


def _now(connection: Connection) -> datetime:
    moment: datetime = one(connection, "SELECT date_trunc('second', clock_timestamp())")
    return moment
