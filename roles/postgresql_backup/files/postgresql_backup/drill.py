"""Restore drills: a backup is good when a spare cluster was made of it and holds what was there.

A report says when, what, whether it is good and how long it took; `postgresql-backup report` writes it to the table.
"""

import json
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from postgresql_backup import age, base, dumps
from postgresql_backup.database import contents, differences, one, rows, schema_digest, session
from postgresql_backup.dumps import Manifest
from postgresql_backup.errors import BackupError, DamagedError, DatabaseError, ExitCode, SettingsError, ToolError
from postgresql_backup.settings import Settings
from postgresql_backup.spare import Spare
from postgresql_backup.tools import (
    CLUSTER_ROOM,
    acting_as,
    check_room,
    duration,
    lock,
    megabytes,
    run,
    utc,
    write_json,
)

KINDS = ("dump", "base")


@dataclass
class Report:
    """What a drill found; times are UTC (ISO 8601), durations are seconds."""

    kind: str
    started_at: str
    ok: bool = False
    backup: str = ""
    message: str = ""
    recovered_to: str | None = None
    recovery_seconds: float | None = None
    total_seconds: float = 0.0
    details: dict[str, Any] = field(default_factory=dict)


def report_file(settings: Settings, kind: str) -> Path:
    """Return where the newest report of a kind is."""
    return Path(settings.drill) / f"{kind}.json"


def load_report(settings: Settings, kind: str) -> Report | None:
    """Return the newest report of a kind, None before the first drill."""
    try:
        return Report(**json.loads(report_file(settings, kind).read_bytes()))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        return Report(kind, utc(0.0).isoformat(), message=f"the report cannot be read: {error}")


def run_drill(settings: Settings, kind: str, identity: str = "") -> Report:
    """Restore the newest backup of a kind, look at it, leave a report; `identity` replaces the dump's own key."""
    report = Report(kind, utc(time.time()).isoformat())
    began = time.monotonic()
    with lock(Path(settings.drill) / ".lock", wait=True):  # the other kind has its turn first
        # Until the end it counts as failed: a drill that is killed leaves a red report, not an old green one.
        report.message = "the drill did not come to its end: journalctl -u 'postgresql-backup-drill@*'"
        write_json(report_file(settings, kind), asdict(report))
        try:
            spare = Spare(settings)
            with spare.place():
                (
                    _drill_dump(settings, spare, report, identity)
                    if kind == "dump"
                    else _drill_base(settings, spare, report)
                )
            report.ok = True
        except BackupError as error:
            report.message = str(error)
            report.details["error"] = ExitCode(error.exit_code).name
        except OSError as error:
            report.message = f"{error.filename or settings.drill}: {error.strerror}"
        report.total_seconds = round(time.monotonic() - began, 1)
        write_json(report_file(settings, kind), asdict(report))
    return report


def _drill_dump(settings: Settings, spare: Spare, report: Report, identity: str) -> None:
    directory = Path(settings.dumps)
    report.backup = (dumps.names(directory) or [""])[-1]
    manifest = dumps.newest(directory)
    check_age("dump", manifest.moment, settings.limit("dump"))
    check_version(settings, manifest.server_version)
    identity = identity or own_identity(settings, manifest)  # the next dump takes it away
    for name in reversed(dumps.names(directory)):
        with dumps.unless_gone(directory / name):
            dumps.check_files(directory / name, dumps.load(directory / name))
    _check_not_emptied(directory, manifest)
    size = sum(found["size"] for found in manifest.databases.values())
    check_room(Path(settings.drill), size * 1.2 + manifest.size + CLUSTER_ROOM, "the drill")
    began = time.monotonic()
    spare.initialise()
    spare.start()
    restore_dump(settings, directory / manifest.name, manifest, identity, spare.libpq, spare.directory)
    report.recovery_seconds = round(time.monotonic() - began, 1)
    _compare(spare, f"dump {manifest.name}", manifest.databases)
    problems = []
    for database, wanted in manifest.databases.items():
        if schema_digest(settings, database, spare.libpq) != wanted["schema_digest"]:
            problems.append(f"the definitions in database {database} are not those that were dumped")
    if problems:
        raise DamagedError(f"dump {manifest.name}: {'; '.join(problems)}")
    spare.check_structure()
    report.recovered_to = next(iter(manifest.databases.values()))["snapshot_at"]
    report.details |= {"rows": manifest.rows, "size": manifest.size, "restored_size": spare.size}
    report.message = (
        f"dump {manifest.name} restored in {duration(report.recovery_seconds)}: {manifest.rows} rows in "
        f"{sum(len(database['tables']) for database in manifest.databases.values())} tables are what was dumped, "
        f"pg_amcheck finds no damage ({megabytes(spare.size)})"
    )


def _drill_base(settings: Settings, spare: Spare, report: Report) -> None:
    options = [f"--config={_configuration()}"]
    stanza = base.info(settings, options)
    found = base.backups_of(stanza, 1)
    if not found:
        raise DamagedError("there is no base backup: systemctl start postgresql-backup-base@full.service")
    check_version(settings, stanza["db"][-1]["version"])
    marker = _marker(settings)
    # One that has ended since is none that the marker can prove.
    before = [backup for backup in found if backup.ended < datetime.fromisoformat(marker["written_at"])]
    if not before:
        raise DamagedError(
            "no marker was written after the base backup: systemctl start postgresql-backup-mark.service"
        )
    backup = before[-1]
    report.backup = backup.label
    check_age("base backup", backup.ended, settings.limit("base_backup"))
    if backup.error:
        raise DamagedError(
            f"base backup {backup.label} holds pages whose checksum is wrong: pgbackrest info says which"
        )
    check_room(Path(settings.drill), backup.size * 1.2 + CLUSTER_ROOM, "the drill")
    began = time.monotonic()
    try:
        run(["pgbackrest", *options, f"--stanza={settings.stanza}", "--repo=1", f"--set={backup.label}",
             f"--pg1-path={spare.data}", "--type=name", f"--target={marker['name']}", "--target-action=promote",
             "--archive-mode=off", "restore"])  # fmt: skip
    except ToolError as error:
        raise DamagedError(f"base backup {backup.label}: {error}") from None
    version = (spare.data / "PG_VERSION").read_text().strip()
    check_version(settings, version)
    try:
        spare.start()
    except DamagedError as error:
        if "recovery target" in str(error):
            raise DamagedError(
                f"archived WAL is missing: marker {marker['id']} of {marker['written_at'][:19]} did not come back; "
                f"{spare.last_words()}"
            ) from None
        raise
    report.recovery_seconds = round(time.monotonic() - began, 1)
    with spare.session(settings.bookkeeping) as connection:
        last = rows(connection, "SELECT max(id), max(written_at) FROM backup.markers")[0]
    report.recovered_to = last[1].isoformat() if last[1] else None
    if last[0] != marker["id"]:
        raise DamagedError(f"marker {marker['id']} did not come back, the last one is {last[0]} of {str(last[1])[:19]}")
    _compare(spare, f"base backup {backup.label}", marker["databases"])
    spare.check_structure()
    tables = [table for database in marker["databases"].values() for table in database["tables"].values()]
    report.details |= {"marker": marker["id"], "size": backup.size, "restored_size": spare.size}
    report.message = (
        f"base backup {backup.label} and the WAL after it restored in {duration(report.recovery_seconds)}: marker "
        f"{marker['id']} of {marker['written_at'][:19]} is back, {sum(table['rows'] for table in tables)} rows in "
        f"{len(tables)} tables are what was there then, pg_amcheck finds no damage ({megabytes(spare.size)})"
    )


def _compare(spare: Spare, backup: str, databases: dict[str, dict[str, Any]]) -> None:
    """Raise DamagedError that says how what came back differs from what was there."""
    problems = []
    for database, wanted in databases.items():
        try:
            with spare.session(database) as connection:
                problems += differences(wanted["tables"], contents(connection))
        except DatabaseError as error:
            problems.append(str(error))
    if problems:
        raise DamagedError(f"{backup}: {'; '.join(problems)}")


def check_age(what: str, moment: datetime, limit: int) -> None:
    """Raise DamagedError when the newest backup is stale."""
    seconds = (datetime.now(UTC) - moment).total_seconds()
    if seconds > limit:
        raise DamagedError(
            f"the newest {what} is stale: {duration(seconds)} old, at most {duration(limit)} are allowed"
        )


def check_version(settings: Settings, version: str) -> None:
    """Raise DamagedError when a backup is of a server that the programs here cannot be."""
    if version.split(".")[0] != settings.version:
        raise DamagedError(f"the backup is of PostgreSQL {version}, this host has {settings.version}: wrong version")


def own_identity(settings: Settings, manifest: Manifest) -> str:
    """Return the identity that the dump left in memory for its drill. Raises SettingsError."""
    try:
        return (settings.keys / f"{manifest.name}.key").read_text()
    except OSError:
        raise SettingsError(
            f"the drill's key of dump {manifest.name} went with the last start of this host: "
            "systemctl start postgresql-backup-dump.service, or playbooks/run-restore-drill.yml"
        ) from None


def restore_dump(
    settings: Settings, folder: Path, manifest: Manifest, identity: str, libpq: dict[str, str], scratch: Path
) -> None:
    """Restore roles and databases of a dump into an empty cluster. Raises DamagedError, ToolError."""
    with age.decrypted(folder / "globals.sql.age", identity) as stream:
        text = stream.read()
    # The superuser is there already, whatever the cluster's other roles are.
    statements = b"\n".join(line for line in text.splitlines() if line != b"CREATE ROLE postgres;")
    command = [f"{settings.bin}/psql", "--no-psqlrc", "--quiet", "--set=ON_ERROR_STOP=1", "--dbname=postgres"]
    run(command, extra=libpq, stdin=statements, user="postgres")
    for database in manifest.databases:
        plain = scratch / f"{database}.dump"
        try:
            with acting_as("postgres"):
                target = plain.open("xb")
            with age.decrypted(folder / f"{database}.dump.age", identity) as stream, target:
                shutil.copyfileobj(stream, target, 1024 * 1024)
            run([f"{settings.bin}/pg_restore", "--create", "--exit-on-error", f"--jobs={settings.drill_jobs}",
                 "--no-password", "--dbname=postgres", str(plain)], extra=libpq, user="postgres")  # fmt: skip
        except ToolError as error:
            raise DamagedError(f"dump {manifest.name}: {error}") from None
        finally:
            plain.unlink(missing_ok=True)


def store_report(settings: Settings, report: Report) -> None:
    """Write a report into the table of drills, once. Raises DatabaseError."""
    with session(settings, settings.bookkeeping) as connection:
        rows(
            connection,
            "INSERT INTO backup.restore_drills (started_at, kind, ok, backup, message, recovered_to, recovery_seconds, "
            "total_seconds, details) SELECT %(started_at)s, %(kind)s, %(ok)s, nullif(%(backup)s, ''), %(message)s, "
            "%(recovered_to)s, %(recovery_seconds)s, %(total_seconds)s, %(details)s WHERE NOT EXISTS (SELECT FROM "
            "backup.restore_drills WHERE started_at = %(started_at)s::timestamptz AND kind = %(kind)s)",
            {**asdict(report), "details": json.dumps(report.details)},
        )
        one(connection, "SELECT 1")


def _check_not_emptied(directory: Path, manifest: Manifest) -> None:
    if not any(database["tables"] for database in manifest.databases.values()):
        raise DamagedError(f"dump {manifest.name} is empty: there is no table in it")
    if manifest.rows:
        return
    for name in dumps.names(directory)[-2::-1]:
        before = dumps.load(directory / name)
        if before.rows:
            raise DamagedError(f"dump {manifest.name} is empty, dump {name} held {before.rows} rows")


def _configuration() -> str:
    directory = os.environ.get("CREDENTIALS_DIRECTORY")
    if not directory:
        raise SettingsError("a drill needs its unit: systemctl start postgresql-backup-drill@base.service")
    return f"{directory}/pgbackrest.conf"


def _marker(settings: Settings) -> dict[str, Any]:
    try:
        marker: dict[str, Any] = json.loads((settings.server / "marker.json").read_bytes())
        _ = marker["databases"]
    except (OSError, ValueError, KeyError):
        raise DamagedError("there is no marker: systemctl start postgresql-backup-mark.service") from None
    return marker


def summary(reports: Sequence[Report]) -> str:
    """Return one line for each report."""
    return "\n".join(
        f"{'OK    ' if report.ok else 'FAILED'} drill of {report.kind}: {report.message}" for report in reports
    )
