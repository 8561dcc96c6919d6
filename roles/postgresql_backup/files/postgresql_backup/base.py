"""Base backups and archived WAL: pgBackRest does the work, this asks it and adds the marker that a drill looks for."""

import json
import re
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from postgresql_backup.database import Connection, GivingWay, contents, lock_tables, one, rows, session
from postgresql_backup.errors import BackupError, DatabaseError, LockedError, RefusedError, ToolError
from postgresql_backup.settings import Settings
from postgresql_backup.tools import Pace, check_room, lock, run, utc, wait_for, write_json

_PREPARE = (
    "SET client_min_messages = warning",
    "CREATE SCHEMA IF NOT EXISTS backup",
    "CREATE TABLE IF NOT EXISTS backup.markers (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, "
    "written_at timestamptz NOT NULL DEFAULT clock_timestamp(), name text)",
    "CREATE TABLE IF NOT EXISTS backup.restore_drills (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, "
    "started_at timestamptz NOT NULL, kind text NOT NULL, ok boolean NOT NULL, backup text, message text NOT NULL, "
    "recovered_to timestamptz, recovery_seconds float8, total_seconds float8, details jsonb NOT NULL)",
)
#: How long writers wait at most while a marker's content is fixed.
_STILL_TIMEOUT = "5s"
#: How often that is tried, and seconds in between.
_STILL_ATTEMPTS, _STILL_PAUSE = 20, 30
#: Seconds that the archive may lag behind a new marker.
_ARCHIVE_TIMEOUT = 600
#: pgBackRest's status of a repository that it could not look into.
_UNREADABLE = 99
_POINT_NAME = re.compile(r"^[A-Za-z0-9_.-]{1,63}$")


@dataclass(frozen=True)
class BaseBackup:
    """A base backup as pgBackRest describes it.

    current: whether it is of the cluster that the repository takes WAL of now.
    """

    label: str
    kind: str
    repository: int
    started: datetime
    ended: datetime
    size: int
    stored: int
    error: bool
    lsn: int = 0
    timeline: int = 1
    current: bool = True


def info(settings: Settings, options: Sequence[str] = ()) -> dict[str, Any]:
    """Return what pgBackRest says of the stanza. Raises ToolError."""
    text = run(["pgbackrest", *options, f"--stanza={settings.stanza}", "--output=json", "info"], user="postgres")
    try:
        found: dict[str, Any] = json.loads(text, strict=False)[0]  # its errors have line ends in them
    except (ValueError, IndexError):
        raise ToolError(f"pgbackrest info said nothing that can be read: {text[:200]!r}") from None
    return found


def backups(settings: Settings, options: Sequence[str] = ()) -> list[BaseBackup]:
    """Return the base backups of all repositories, oldest first."""
    return parse_backups(info(settings, options))


def backups_in(settings: Settings, repository: int, options: Sequence[str] = ()) -> list[BaseBackup]:
    """Return the current cluster's base backups in a repository, oldest first. Raises as backups_of does."""
    return backups_of(info(settings, options), repository)


def backups_of(stanza: dict[str, Any], repository: int) -> list[BaseBackup]:
    """Return the current cluster's base backups in a stanza's repository, oldest first.

    Raises ToolError when it cannot be read.
    """
    for found in stanza["repo"]:
        if found["key"] == repository and found["status"]["code"] == _UNREADABLE:
            reason = " ".join(found["status"]["message"].split(" at line")[0].split())
            raise ToolError(f"repository {repository} cannot be read (a wrong passphrase, a damage?): {reason[:300]}")
    return [backup for backup in parse_backups(stanza) if backup.repository == repository and backup.current]


def usable_in(settings: Settings, repository: int) -> list[BaseBackup]:
    """Return those that recovery along the newest timeline can begin with: not what ended behind a fork that was left.

    Raises ToolError when the repository cannot be read.
    """
    stanza = info(settings)
    found = backups_of(stanza, repository)
    archive = _newest_archive(stanza, repository)
    if not (found and archive):
        return found
    place = f"archive/{settings.stanza}/{archive['id']}"
    command = ["pgbackrest", f"--stanza={settings.stanza}", f"--repo={repository}"]
    names = run([*command, "--filter=^[0-9A-F]{8}[.]history$", "repo-ls", place], user="postgres").split()
    if not names:
        return found
    newest = max(names)
    past = parse_history(run([*command, "repo-get", f"{place}/{newest}"], user="postgres"))
    timeline = int(newest[:8], 16)
    return [backup for backup in found if backup.timeline >= timeline or backup.lsn <= past.get(backup.timeline, -1)]


def lsn_number(lsn: str) -> int:
    """Return an LSN as a number."""
    high, low = lsn.split("/")
    return (int(high, 16) << 32) + int(low, 16)


def parse_history(text: str) -> dict[int, int]:
    """Return the timelines that a timeline came from, as its history file has them: up to which LSN they were its past.

    Source: writeTimeLineHistory() in src/backend/access/transam/timeline.c of PostgreSQL.
    """
    lines = [line.split() for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return {int(words[0]): lsn_number(words[1]) for words in lines}


def _newest_databases(stanza: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """Return what pgBackRest says of the newest cluster in each repository that holds one, by the repository's key."""
    found = sorted(stanza.get("db", []), key=lambda database: int(database["id"]))
    return {database["repo-key"]: database for database in found}


def parse_backups(stanza: dict[str, Any]) -> list[BaseBackup]:
    """Return the backups of a stanza, as `pgbackrest info` has them."""
    newest = {repository: database["id"] for repository, database in _newest_databases(stanza).items()}
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
            lsn=lsn_number(backup.get("lsn", {}).get("stop") or "0/0"),
            timeline=int((backup.get("archive", {}).get("stop") or "00000001")[:8], 16),
            current=backup["database"]["id"] == newest.get(backup["database"]["repo-key"]),
        )
        for backup in stanza.get("backup", [])
    ]
    return sorted(found, key=lambda backup: backup.ended)


def take(settings: Settings, kind: str) -> list[BaseBackup]:
    """Take a base backup into every repository, then leave a marker; go on to the next repository when one fails.

    What the recovery window does not need any more goes only when the new backup was read and is whole. Raises, when
    all was tried, a BackupError of the first one's class that says what failed.
    """
    problems: dict[str, BackupError] = {}
    with lock(settings.server / "base-backup.lock"):
        for repository in settings.repositories:
            command = ["pgbackrest", f"--stanza={settings.stanza}", f"--repo={repository}"]
            try:
                if repository == 1:
                    _refuse_small_disk(settings, kind)
                run([*command, f"--type={kind}", "backup"], user="postgres")
                _expire(command, backups_in(settings, repository)[-1].label)
            except BackupError as error:
                problems[f"repository {repository}"] = error
        try:
            mark(settings)
        except BackupError as error:
            problems["marker"] = error
    if problems:
        first = next(iter(problems.values()))
        raise type(first)("; ".join(f"{what}: {error}" for what, error in problems.items()))
    return backups(settings)


def _expire(command: Sequence[str], newest: str) -> None:
    """Remove what the recovery window does not need any more, when the newest backup is whole. Raises ToolError.

    All of a backup is read for that, which takes a while over a network: only when something is going to be removed.
    """
    plan = run([*command, "--dry-run", "--log-level-console=info", "expire"], user="postgres")
    if "remove" not in plan:
        return
    said = run([*command, f"--set={newest}", "--output=text", "--verbose", "verify"], user="postgres")
    if f"backup: {newest}, status: valid" not in said:
        raise ToolError(f"base backup {newest} is not whole, no older one was removed: {' '.join(said.split())[-300:]}")
    run([*command, "expire"], user="postgres")


def _refuse_small_disk(settings: Settings, kind: str) -> None:
    """Refuse to begin what the host's own repository has no room for; an archive without room stops the server."""
    if not Path(settings.repository).exists():
        return  # it is elsewhere, by postgresql_backup_pgbackrest_options
    before = [backup.stored for backup in backups_in(settings, 1) if backup.kind == kind]
    if before:
        needed = before[-1] * 1.2
    else:
        with session(settings, "postgres") as connection:
            needed = float(one(connection, "SELECT sum(pg_database_size(oid)) FROM pg_database"))
    check_room(Path(settings.repository), needed, "the base backup")


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


def mark(settings: Settings, name: str = "", *, content: bool = False) -> dict[str, Any]:
    """Write a marker row, name this point of the WAL, and wait until the archive has it.

    With `content`, leave to the drill what the databases hold at exactly this point.
    """
    if name and not _POINT_NAME.match(name):
        raise RefusedError(f"{name!r} is no name of a point: use at most 63 letters, digits, dots, - and _")
    with session(settings, settings.bookkeeping) as connection:
        number, moment = rows(
            connection, "INSERT INTO backup.markers (name) VALUES (nullif(%s, '')) RETURNING id, written_at", name
        )[0]
        marker = {"id": number, "written_at": moment.isoformat(), "name": name or f"marker-{number}"}
        if not content:
            return {**marker, "segment": _archive(connection, marker["name"])}
        with ExitStack() as views:
            found, marker["segment"] = _still_point(settings, connection, marker["name"], views)
            marker["databases"] = {}
            for database, view in found.items():
                with GivingWay(settings, database, "the marker", pids=[view.info.backend_pid]):
                    marker["databases"][database] = {"tables": contents(view, Pace(settings.dump_share))}
        _wait_archived(connection, marker["segment"])
    write_json(settings.server / "marker.json", marker)
    return marker


def _still_point(
    settings: Settings, connection: Connection, name: str, views: ExitStack
) -> tuple[dict[str, Connection], str]:
    """Name a point at which nobody writes; return what _still does, by database, and the point's segment.

    Who has a table for long - a vacuum against wraparound, a large deletion - is waited for between the attempts, and
    writers wait for none of them longer than _STILL_TIMEOUT. Raises LockedError.
    """
    attempt = 0
    while True:
        attempt += 1
        try:
            with ExitStack() as locks, ExitStack() as opened:
                found = {database: _still(settings, database, locks, opened) for database in settings.databases}
                segment = _point(connection, name)
                views.enter_context(opened.pop_all())
                return found, segment
        except LockedError as error:
            if attempt == _STILL_ATTEMPTS:
                raise
            print(f"{error}; trying again", flush=True)
            time.sleep(_STILL_PAUSE)


def _still(settings: Settings, database: str, locks: ExitStack, views: ExitStack) -> Connection:
    """Let nobody write until `locks` ends; return a session, until `views` ends, with a snapshot of what there is then.

    A restore point that is made meanwhile has all in the WAL before it that the snapshot sees, and nothing else.
    """
    locker = locks.enter_context(session(settings, database))
    rows(locker, f"SET lock_timeout = '{_STILL_TIMEOUT}'")
    rows(locker, "BEGIN")
    lock_tables(locker, "SHARE")
    view = views.enter_context(session(settings, database))
    rows(view, "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY")
    rows(view, "SELECT pg_current_snapshot()")
    lock_tables(view, "ACCESS SHARE")  # what is truncated or rewritten before it was read looks empty to a snapshot
    return view


def _archive(connection: Connection, point: str, seconds: float = _ARCHIVE_TIMEOUT) -> str:
    """Name this point of the WAL and wait until it is archived; return its segment. Raises DatabaseError."""
    segment = _point(connection, point)
    _wait_archived(connection, segment, seconds)
    return segment


def _point(connection: Connection, point: str) -> str:
    segment: str = one(connection, "SELECT pg_walfile_name(pg_create_restore_point(%s))", point)
    rows(connection, "SELECT pg_switch_wal()")
    return segment


def _wait_archived(connection: Connection, segment: str, seconds: float = _ARCHIVE_TIMEOUT) -> None:
    def archived() -> bool:
        last = one(connection, "SELECT coalesce(last_archived_wal, '') FROM pg_stat_archiver")
        return bool(str(last)[:24] >= segment)

    if not wait_for(archived, seconds):
        raise DatabaseError(
            f"the WAL segment {segment} was not archived within {seconds:g} s: journalctl -u postgresql@17-main "
            "and postgresql-backup status say why"
        )


def catch_up(settings: Settings, repository: int) -> str:
    """Let the archive have all that the live cluster has committed, when there is one and it is the archive's.

    Return what is missing, in words. Nothing is lost by a restore to the newest then, and a time that has just passed
    can be recovered to: recovery ends at the first commit behind it.
    """
    held = _newest_databases(info(settings)).get(repository, {}).get("system-id")
    try:
        with session(settings, "postgres") as connection:
            if int(one(connection, "SELECT system_identifier FROM pg_control_system()")) != held:
                return ""
            rows(connection, "SELECT pg_current_xact_id()")  # a commit
            _archive(connection, "restore", 60)  # who restores may do so because nothing is archived
    except DatabaseError as error:
        return f"what the live cluster has not archived ({error})"
    return ""


def newest_segment(settings: Settings, repository: int) -> str:
    """Return the name of the last segment in the archive of the newest cluster there; empty when there is none."""
    return str(_newest_archive(info(settings), repository).get("max") or "")


def _newest_archive(stanza: dict[str, Any], repository: int) -> dict[str, Any]:
    """Return what pgBackRest says of the archive of the newest cluster in a repository; nothing when there is none."""
    found = [archive for archive in stanza.get("archive", []) if archive["database"]["repo-key"] == repository]
    return max(found, key=lambda archive: int(archive["database"]["id"]), default={})


def points(settings: Settings) -> dict[str, list[datetime]]:
    """Return the named points that the live cluster knows, with their times, oldest first; none when it is gone."""
    statement = (
        "SELECT coalesce(name, 'marker-' || id), array_agg(written_at ORDER BY written_at) "
        "FROM backup.markers GROUP BY 1"
    )
    try:
        with session(settings, settings.bookkeeping) as connection:
            return dict(rows(connection, statement))
    except DatabaseError:
        return {}


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
    held = _newest_databases(info(settings))
    for repository, database in held.items():
        other = database["system-id"]
        if other != identifier:
            raise RefusedError(
                f"repository {repository} holds the backups of another cluster (system identifier {other}, this "
                f"cluster is {identifier}): nothing is archived into it. To bring that cluster back: "
                f"playbooks/restore-backup.yml -e restore_repository={repository}; to start anew: give this cluster "
                "another postgresql_backup_stanza"
            )
    if held.keys() >= set(settings.repositories):
        return []  # stanza-create would be refused while a base backup is taken
    try:
        run(["pgbackrest", f"--stanza={settings.stanza}", "stanza-create"], user="postgres")
    except BackupError as error:
        raise ToolError(f"a repository cannot be used: {error}") from None
    after = {repository["key"] for repository in info(settings)["repo"] if repository["status"]["code"] in (0, 2)}
    return [str(key) for key in sorted(after - before - held.keys())]
