"""Status: how old and how proven the backups are, each check with what was seen and what to do; and as metrics."""

import json
import math
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from postgresql_backup import base, drill, dumps, offsite
from postgresql_backup.database import rows, session
from postgresql_backup.errors import BackupError, DamagedError, RefusedError
from postgresql_backup.settings import Settings
from postgresql_backup.tools import duration, megabytes, write_json

_ARCHIVE = """
SELECT last_archived_wal, extract(epoch FROM last_archived_time), failed_count, last_failed_wal,
  coalesce(last_failed_time > coalesce(last_archived_time, '-infinity'), false),
  (SELECT count(*) FROM pg_ls_archive_statusdir() WHERE name LIKE '%%.ready'),
  (SELECT coalesce(extract(epoch FROM clock_timestamp() - min(modification)), 0) FROM pg_ls_archive_statusdir()
    WHERE name LIKE '%%.ready'),
  current_setting('archive_mode'), extract(epoch FROM clock_timestamp()),
  (SELECT setting::int FROM pg_settings WHERE name = 'archive_timeout'),
  extract(epoch FROM pg_postmaster_start_time())
FROM pg_stat_archiver
"""
_ROOM = """
SELECT (SELECT sum(size) FROM pg_ls_waldir()), pg_current_wal_lsn() - '0/0'::pg_lsn,
  wal_bytes / greatest(extract(epoch FROM clock_timestamp() - stats_reset), 900) FROM pg_stat_wal
"""
#: Seconds between two positions of the WAL that are kept, and how long they are.
_SAMPLE, _SAMPLED = 240, 3600
#: Segments that are switched, or a table that is loaded, within as many seconds are no growth that lasts.
_SHORTEST = 900
_LONGEST_ROOM = 30 * 86400.0
#: Seconds that switching to a new segment and archiving the old one may take.
_ARCHIVE_GRACE = 30


@dataclass
class Result:
    """One check: its id, whether it passed, what was seen, and the next step where it did not."""

    id: str
    ok: bool
    seen: str
    remedy: str = ""


def wal_growth(file: Path, now: float, position: int) -> float:
    """Return bytes of WAL a second in the last hour, by positions of earlier runs in the file; this one is added."""
    try:
        found = [(at, before) for at, before in json.loads(file.read_bytes()) if 0 < now - at <= _SAMPLED]
    except (OSError, ValueError, TypeError):
        found = []
    samples = [(at, before) for at, before in found if before <= position]  # a restored cluster begins anew
    if not samples or now - samples[-1][0] >= _SAMPLE:
        with suppress(OSError, RefusedError):  # outside of its unit it may not be able to
            write_json(file, [*samples, (now, position)])
    at, before = samples[0] if samples else (now, position)
    return float((position - before) / max(now - at, _SHORTEST))


class Status:
    """Runs the checks and keeps what the metrics need."""

    def __init__(self, settings: Settings, now: float | None = None) -> None:
        """Take the settings; `now` is Unix time."""
        self._settings = settings
        self._now = time.time() if now is None else now
        self.metrics: dict[str, float] = {"postgresql_backup_status_timestamp_seconds": round(self._now)}

    def run(self) -> Iterator[Result]:
        """Yield one result per check."""
        checks: list[tuple[str, Callable[[], str], str]] = [
            ("dump.newest", self._dump, "systemctl start postgresql-backup-dump.service"),
            ("dump.files", self._files, "postgresql-backup verify"),
            *(
                (f"base_backup.newest[{number}]", lambda number=number: self._base(number), self._base_remedy)
                for number in self._settings.repositories
            ),
            ("archive.working", self._archive, "journalctl -u postgresql@17-main; docs/operations/backup.md"),
            (
                "archive.room",
                self._room,
                "mend the archive, or make room on the file system; docs/operations/backup.md",
            ),
            *(
                (
                    f"drill.{kind}",
                    lambda kind=kind: self._drill(kind),
                    f"systemctl start postgresql-backup-drill@{kind}.service",
                )
                for kind in drill.KINDS
            ),
            *(
                [("offsite.dumps", self._offsite, "systemctl start postgresql-backup-copy.service")]
                if self._settings.offsite
                else []
            ),
        ]
        for identifier, check, remedy in checks:
            try:
                result = Result(identifier, True, check())
            except (BackupError, OSError) as error:
                result = Result(identifier, False, str(error), remedy)
            self.metrics[f'postgresql_backup_check{{check="{identifier}"}}'] = int(result.ok)
            yield result

    _base_remedy = "systemctl start postgresql-backup-base@full.service"

    def _dump(self) -> str:
        manifest = dumps.newest(Path(self._settings.dumps))
        self._success("dump", manifest.moment.timestamp())
        self.metrics['postgresql_backup_size_bytes{kind="dump"}'] = manifest.size
        age = self._age("dump", manifest.moment.timestamp(), "dump")
        return f"{manifest.name}, {age} old, {manifest.rows} rows, {megabytes(manifest.size)}"

    def _files(self) -> str:
        directory = Path(self._settings.dumps)
        found = dumps.names(directory)
        for name in found:
            manifest = dumps.load(directory / name)
            for file, wanted in manifest.files.items():
                path = directory / name / file
                size = path.stat().st_size if path.exists() else -1
                if size != wanted["size"]:
                    raise DamagedError(f"{name}/{file} has {size} bytes instead of {wanted['size']}")
        return f"{len(found)} dumps have all their files"

    def _base(self, repository: int) -> str:
        found = base.backups_in(self._settings, repository)
        if not found:
            raise DamagedError(f"there is no base backup in repository {repository}")
        newest = found[-1]
        self._success(f"base_backup_{repository}", newest.ended.timestamp())
        self.metrics[f'postgresql_backup_size_bytes{{kind="base_backup_{repository}"}}'] = newest.stored
        age = self._age("base backup", newest.ended.timestamp(), "base_backup")
        if newest.error:
            raise DamagedError(f"{newest.label} holds pages whose checksum is wrong")
        return f"{newest.label}, {age} old; {len(found)} backups since {found[0].ended:%Y-%m-%d %H:%M} UTC"

    def _archive(self) -> str:
        with session(self._settings, "postgres") as connection:
            (last, at, failed, failed_wal, failing, ready, oldest, mode, now, timeout, started) = rows(
                connection, _ARCHIVE
            )[0]
        self.metrics["postgresql_backup_archive_failed_total"] = failed
        self.metrics["postgresql_backup_archive_waiting"] = ready
        self.metrics["postgresql_backup_archive_lag_seconds"] = round(float(oldest), 1)
        if mode != "on":
            raise DamagedError(f"archive_mode is {mode}: run playbooks/backup.yml")
        # Statistics begin anew with a crash and with a restore.
        since = float(now) - float(at or started)
        # The server leaves a segment open longer than archive_timeout only when nothing was committed into it.
        point = 0.0 if not ready and since > timeout + _ARCHIVE_GRACE else since
        self.metrics["postgresql_backup_recovery_point_seconds"] = round(point, 1)
        if last is None:
            seen = f"no WAL was archived since the server's start {duration(since)} ago"
        else:
            seen = f"{last} archived {duration(since)} ago"
            self._success("wal", float(at))
        seen += f", recovery point {duration(point)}"
        if failing:
            raise DamagedError(f"archiving of {failed_wal} fails ({failed} failures); {seen}, {ready} segments wait")
        if oldest > self._settings.limit("archive"):
            raise DamagedError(f"{ready} WAL segments wait for {duration(oldest)}; {seen}")
        return f"{seen}, {ready} segments wait"

    def _room(self) -> str:
        """Return how long the file system holds what is written, should nothing be archived from now on."""
        with session(self._settings, "postgres") as connection:
            held, position, ever = (float(value) for value in rows(connection, _ROOM)[0])
        free = shutil.disk_usage(self._settings.data / "pg_wal").free
        growth = max(wal_growth(self._settings.server / "wal.json", self._now, int(position)), ever)
        left = free / growth if growth else math.inf
        self.metrics["postgresql_backup_wal_bytes"] = int(held)
        self.metrics["postgresql_backup_wal_free_bytes"] = free
        self.metrics["postgresql_backup_wal_growth_bytes_per_second"] = round(growth, 1)
        self.metrics["postgresql_backup_wal_room_seconds"] = round(min(left, _LONGEST_ROOM))
        seen = (
            f"pg_wal has {megabytes(held)}, {megabytes(free)} are free, {megabytes(growth * 3600)} an hour are written"
        )
        if left < self._settings.limit("wal_room"):
            allowed = duration(self._settings.limit("wal_room"))
            raise DamagedError(f"without an archive the disk is full in {duration(left)} (limit {allowed}): {seen}")
        return f"{seen}: room for {duration(min(left, _LONGEST_ROOM))}{' or more' if left > _LONGEST_ROOM else ''}"

    def _drill(self, kind: str) -> str:
        report = drill.load_report(self._settings, kind)
        if report is None:
            first = dumps.names(Path(self._settings.dumps))[:1]
            if not first:
                raise DamagedError("there was no drill yet")
            begun = datetime.strptime(first[0], "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC).timestamp()
            self._age("first drill: none yet; the first dump", begun, "drill")
            return f"none yet; postgresql-backup-drill-{kind}.timer starts the first"
        at = datetime.fromisoformat(report.started_at).timestamp()
        if not report.ok:
            raise DamagedError(f"{report.started_at[:19]}: {report.message}")
        self._success(f"drill_{kind}", at)
        self.metrics[f'postgresql_backup_recovery_seconds{{kind="{kind}"}}'] = report.recovery_seconds or 0
        age = self._age("drill", at, "drill")
        return f"{age} ago, recovery time {duration(report.recovery_seconds or 0)}: {report.message}"

    def _offsite(self) -> str:
        state = offsite.state(self._settings)
        if not state:
            raise DamagedError(f"no dump was copied to {self._settings.offsite} yet")
        if not state["newest"]:
            raise DamagedError("no dump is there")
        at = datetime.strptime(state["newest"], "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC).timestamp()
        self._success("offsite", at)
        age = self._age("copy", at, "offsite")
        return f"{state['newest']}, {age} old; {state['count']} dumps in {self._settings.offsite}"

    def _age(self, what: str, moment: float, limit: str) -> str:
        """Return how old something is. Raises DamagedError when that is too old, or from a clock that runs ahead."""
        seconds = self._now - moment
        if seconds < -300:
            raise DamagedError(f"the newest {what} is from the future by {duration(-seconds)}: check the clocks")
        if seconds > self._settings.limit(limit):
            allowed = duration(self._settings.limit(limit))
            raise DamagedError(f"the newest {what} is {duration(seconds)} old, at most {allowed} are allowed")
        return duration(max(seconds, 0))

    def _success(self, kind: str, moment: float) -> None:
        self.metrics[f'postgresql_backup_last_success_timestamp_seconds{{kind="{kind}"}}'] = round(moment)


_HELP = {
    "postgresql_backup_status_timestamp_seconds": "When `postgresql-backup status` looked",
    "postgresql_backup_check": "1 when a check of `postgresql-backup status` passes",
    "postgresql_backup_last_success_timestamp_seconds": "When the newest good one was taken",
    "postgresql_backup_size_bytes": "Size of the newest one as stored",
    "postgresql_backup_recovery_point_seconds": "Age of the commits that a loss of the host would lose now",
    "postgresql_backup_recovery_seconds": "Time to recovery that the last drill measured",
    "postgresql_backup_archive_failed_total": "Failed attempts to archive WAL since the server's statistics began",
    "postgresql_backup_archive_waiting": "WAL segments that wait for the archive",
    "postgresql_backup_archive_lag_seconds": "How long the oldest of them has waited",
    "postgresql_backup_wal_bytes": "Size of pg_wal",
    "postgresql_backup_wal_free_bytes": "Free bytes of its file system",
    "postgresql_backup_wal_growth_bytes_per_second": "WAL that is written",
    "postgresql_backup_wal_room_seconds": "How long WAL fits there when nothing is archived; 30 days at most",
}


def exposition(metrics: dict[str, float]) -> str:
    """Return metrics in Prometheus' text format."""
    lines = []
    for name, text in _HELP.items():
        samples = [f"{key} {value}" for key, value in sorted(metrics.items()) if key.split("{")[0] == name]
        if samples:
            kind = "counter" if name.endswith("_total") else "gauge"
            lines += [f"# HELP {name} {text}", f"# TYPE {name} {kind}", *samples]
    return "\n".join(lines) + "\n"
