"""Base backups and archived WAL: pgBackRest does the work, this asks it and adds the marker that a drill looks for."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from postgresql_backup.database import one, rows, session
from postgresql_backup.errors import BackupError, DatabaseError, RefusedError, ToolError
from postgresql_backup.settings import Settings
from postgresql_backup.tools import lock, run, utc, wait_for, write_json

_PREPARE = (
    "SET client_min_messages = warning",
    "CREATE SCHEMA IF NOT EXISTS backup",
    "CREATE TABLE IF NOT EXISTS backup.markers (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, "
    "written_at timestamptz NOT NULL DEFAULT clock_timestamp(), name text)",
    "CREATE TABLE IF NOT EXISTS backup.restore_drills (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, "
    "started_at timestamptz NOT NULL, kind text NOT NULL, ok boolean NOT NULL, backup text, message text NOT NULL, "
    "recovered_to timestamptz, recovery_seconds float8, total_seconds float8, details jsonb NOT NULL)",
)
_POINT_NAME = re.compile(r"^[A-Za-z0-9_.-]{1,63}$")


@dataclass(frozen=True)
class BaseBackup:
    """A base backup as pgBackRest describes it."""

    label: str
    kind: str
    repository: int
    started: datetime
    ended: datetime
    size: int
    stored: int
    error: bool


def info(settings: Settings, options: Sequence[str] = ()) -> dict[str, Any]:
    """Return what pgBackRest says of the stanza. Raises ToolError."""
    text = run(["pgbackrest", *options, f"--stanza={settings.stanza}", "--output=json", "info"], user="postgres")
    try:
        found: dict[str, Any] = json.loads(text)[0]
    except (ValueError, IndexError):
        raise ToolError(f"pgbackrest info said nothing that can be read: {text[:200]!r}") from None
    return found


def backups(settings: Settings, options: Sequence[str] = ()) -> list[BaseBackup]:
    """Return the base backups of all repositories, oldest first."""
    return parse_backups(info(settings, options))


def parse_backups(stanza: dict[str, Any]) -> list[BaseBackup]:
    """Return the backups of a stanza, as `pgbackrest info` has them."""
    found = [
        BaseBackup(
            label=backup["label"],
            kind=backup["type"],
            repository=backup["database"]["repo-key"],
            started=utc(backup["timestamp"]["start"]),
            ended=utc(backup["timestamp"]["stop"]),
            size=backup["info"]["size"],
            stored=backup["info"]["repository"].get("delta", 0),
            error=bool(backup.get("error")),
        )
        for backup in stanza.get("backup", [])
    ]
    return sorted(found, key=lambda backup: backup.ended)


def take(settings: Settings, kind: str) -> list[BaseBackup]:
    """Take a base backup into every repository, then leave a marker; go on to the next repository when one fails."""
    problems = []
    with lock(Path(settings.run) / "base-backup.lock"):
        for repository in settings.repositories:
            command = ["pgbackrest", f"--stanza={settings.stanza}", f"--repo={repository}", f"--type={kind}", "backup"]
            try:
                run(command, user="postgres")
            except ToolError as error:
                problems.append(f"repository {repository}: {error}")
        mark(settings)
    if problems:
        raise ToolError("; ".join(problems))
    return backups(settings)


def prepare(settings: Settings) -> bool:
    """Make the tables of markers and drills; return whether there was anything to make."""
    with session(settings, settings.bookkeeping) as connection:
        missing = one(
            connection,
            "SELECT to_regclass('backup.markers') IS NULL OR to_regclass('backup.restore_drills') IS NULL",
        )
        if missing:
            rows(connection, f'SET ROLE "{settings.bookkeeping_owner}"')
            for statement in _PREPARE:
                rows(connection, statement)
    return bool(missing)


def mark(settings: Settings, name: str = "") -> dict[str, Any]:
    """Write a marker row, name this point of the WAL, and wait until the archive has it."""
    if name and not _POINT_NAME.match(name):
        raise RefusedError(f"{name!r} is no name of a point: use at most 63 letters, digits, dots, - and _")
    with session(settings, settings.bookkeeping) as connection:
        number, moment = rows(
            connection, "INSERT INTO backup.markers (name) VALUES (nullif(%s, '')) RETURNING id, written_at", name
        )[0]
        point = name or f"marker-{number}"
        segment = one(connection, "SELECT pg_walfile_name(pg_create_restore_point(%s))", point)
        rows(connection, "SELECT pg_switch_wal()")

        def archived() -> bool:
            last = one(connection, "SELECT coalesce(last_archived_wal, '') FROM pg_stat_archiver")
            return bool(str(last)[:24] >= segment)

        if not wait_for(archived, 60):
            raise DatabaseError(
                f"the WAL segment {segment} was not archived within 60 s: journalctl -u postgresql@17-main "
                "and postgresql-backup status say why"
            )
    marker = {"id": number, "written_at": moment.isoformat(), "name": point, "segment": segment}
    write_json(Path(settings.run) / "marker.json", marker)
    return marker


def pending(settings: Settings) -> str:
    """Return what puts the server's files in force: nothing, a reload or a restart."""
    drop_in = Path(f"/etc/postgresql/{settings.version}/{settings.cluster}/conf.d/60-backup.conf")
    unit = Path(f"/etc/systemd/system/postgresql@{settings.version}-{settings.cluster}.service.d/60-backup.conf")
    try:
        with session(settings, "postgres") as connection:
            started, loaded, mode, waiting = rows(
                connection,
                "SELECT extract(epoch FROM pg_postmaster_start_time()), extract(epoch FROM pg_conf_load_time()), "
                "current_setting('archive_mode'), EXISTS (SELECT FROM pg_settings WHERE pending_restart)",
            )[0]
    except DatabaseError:
        return "restarted"
    if mode != "on" or waiting or unit.stat().st_mtime > started:
        return "restarted"
    return "reloaded" if drop_in.stat().st_mtime > loaded else "none"


def check_repositories(settings: Settings) -> list[str]:
    """Create what is missing of the stanza; return the repositories that were made.

    Raises RefusedError for one that holds another cluster.
    """
    before = {repository["key"] for repository in info(settings)["repo"] if repository["status"]["code"] == 0}
    with session(settings, settings.bookkeeping) as connection:
        identifier = int(one(connection, "SELECT system_identifier FROM pg_control_system()"))
    held = {
        database["repo-key"]: database["system-id"]
        for database in sorted(info(settings).get("db", []), key=lambda database: int(database["id"]))
    }
    for repository, other in held.items():
        if other != identifier:
            raise RefusedError(
                f"repository {repository} holds the backups of another cluster (system identifier {other}, this "
                f"cluster is {identifier}): nothing is archived into it. To bring that cluster back: "
                f"playbooks/restore-backup.yml -e restore_repository={repository}; to start anew: give this cluster "
                "another postgresql_backup_stanza"
            )
    try:
        run(["pgbackrest", f"--stanza={settings.stanza}", "stanza-create"], user="postgres")
    except BackupError as error:
        raise ToolError(f"a repository cannot be used: {error}") from None
    after = {repository["key"] for repository in info(settings)["repo"] if repository["status"]["code"] in (0, 2)}
    return [str(key) for key in sorted(after - before - held.keys())]
