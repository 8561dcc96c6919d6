"""Restores a backup into a new cluster beside the live one, and puts that into its place when told to.

Nothing of the live cluster is touched before `promote`, and `promote` keeps its data directory.
"""

import json
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from postgresql_backup import base, drill, dumps
from postgresql_backup.database import one, rows, session
from postgresql_backup.errors import BackupError, DamagedError, RefusedError, ToolError
from postgresql_backup.settings import Settings
from postgresql_backup.tools import (
    CLUSTER_ROOM,
    acting_as,
    check_room,
    environment,
    last_error,
    last_words,
    lock,
    run,
    sync_directory,
    wait_for,
    write_json,
)

RESTORED = "restored"
#: Unit of a restore that goes on by itself.
UNIT = "postgresql-backup-restore.service"
_BASE_UNIT = "postgresql-backup-base@full.service"
_LSN = re.compile(r"^[0-9A-F]{1,8}/[0-9A-F]{1,8}$", re.IGNORECASE)
_PROGRESS = re.compile(r"\(([\d.]+[KMGT]?B), ([\d.]+)%\)")
_RECOVERY_TIMEOUT = 24 * 3600.0


@dataclass
class Target:
    """Up to where to recover; all empty is up to the newest archived WAL."""

    time: str = ""
    lsn: str = ""
    name: str = ""

    def options(
        self, found: list[base.BaseBackup], now: datetime, points: dict[str, list[datetime]] | None = None
    ) -> tuple[list[str], str]:
        """Return pgBackRest's options and the target in words; `points` are the known ones. Raises RefusedError."""
        given = [value for value in (self.time, self.lsn, self.name) if value]
        if len(given) > 1:
            raise RefusedError(f"give one of time, lsn and name (seen: {', '.join(given)})")
        if not found:
            raise RefusedError("the repository holds no base backup of the present cluster: postgresql-backup list")
        if self.time:
            moment = self._moment(found, now)
            last = self._last(found, self.time, lambda backup: backup.ended <= moment)
            text = moment.strftime("%Y-%m-%d %H:%M:%S.%f+00")
            return self._to("time", text, last), f"time {text}"
        if self.lsn:
            if not _LSN.match(self.lsn):
                raise RefusedError(f"{self.lsn!r} is no LSN: it looks like 0/3000148")
            number = base.lsn_number(self.lsn)
            last = self._last(found, f"LSN {self.lsn}", lambda backup: backup.lsn <= number)
            return self._to("lsn", self.lsn, last), f"LSN {self.lsn}"
        if self.name:
            last = found[-1]
            if points:
                if self.name not in points:
                    names = sorted(points, key=lambda name: points[name])[-5:]
                    raise RefusedError(f"there is no point {self.name}; the last ones are {', '.join(names)}")
                *earlier, written = points[self.name]
                last = self._last(found, f"point {self.name}", lambda backup: backup.ended <= written)
                if any(moment >= last.ended for moment in earlier):
                    raise RefusedError(
                        f"point {self.name} was named several times since base backup {last.label}, and recovery would "
                        f"stop at the first; for the last one give its time, {written.isoformat()}"
                    )
            return self._to("name", self.name, last), f"point {self.name}"
        return [f"--set={found[-1].label}", "--type=default"], "the newest archived WAL"

    @staticmethod
    def _to(kind: str, target: str, backup: base.BaseBackup) -> list[str]:
        return [f"--set={backup.label}", f"--type={kind}", f"--target={target}", "--target-action=promote"]

    @staticmethod
    def _last(found: list[base.BaseBackup], what: str, before: Callable[[base.BaseBackup], bool]) -> base.BaseBackup:
        """Return the last base backup that recovery to the target can begin with. Raises RefusedError."""
        whole = [backup for backup in found if before(backup)]
        if not whole:
            raise RefusedError(
                f"{what} is before the end of the first base backup: {_available(found)}; for what was before, choose "
                "a dump (postgresql-backup list)"
            )
        return whole[-1]

    def _moment(self, found: list[base.BaseBackup], now: datetime) -> datetime:
        try:
            moment = datetime.fromisoformat(self.time)
        except ValueError:
            raise RefusedError(f"{self.time!r} is no time: write it as 2026-11-23T14:30:00+00:00") from None
        if moment.tzinfo is None:
            raise RefusedError(f"{self.time} has no time zone: write {self.time}+00:00 for UTC")
        if moment > now:
            raise RefusedError(
                f"{self.time} is in the future: {_available(found)} (now {now.isoformat(timespec='seconds')}); "
                "leave it out for the newest"
            )
        return moment


def _available(found: list[base.BaseBackup]) -> str:
    return f"a recovery can go to any time after {found[0].ended.isoformat()}"


class Restored:
    """The cluster `restored`."""

    def __init__(self, settings: Settings, port: int) -> None:
        """Take the port that its socket is named by."""
        self._settings, self.port = settings, port
        self.data = settings.data.with_name(RESTORED)
        self.etc = Path(f"/etc/postgresql/{settings.version}/{RESTORED}")
        self.unit = f"postgresql@{settings.version}-{RESTORED}.service"
        self.scratch = self.data.with_name(f"{RESTORED}.scratch")
        self.progress = Path(settings.run) / "restore.json"
        self.description = Path(settings.state) / "restored.json"
        self.promotion = Path(settings.state) / "promotion.json"

    def described(self) -> dict[str, Any]:
        """Return what a restore left of itself: whether it came to its end, up to where, of which cluster."""
        try:
            found: dict[str, Any] = json.loads(self.description.read_bytes())
        except (OSError, ValueError):
            return {}
        return found

    def describe(self, **values: Any) -> None:
        """Keep what is known of the restored cluster, beyond a boot of the host."""
        write_json(self.description, values)

    def refuse_promotion(self) -> None:
        """Raise RefusedError while a promotion is unfinished."""
        if self.promotion.exists():
            raise RefusedError(
                "the last promotion did not come to its end: playbooks/promote-restored.yml goes on with it"
            )

    def refuse_existing(self) -> None:
        """Raise RefusedError when a restored cluster is there; what a killed restore left is removed."""
        self.refuse_promotion()
        if self.described().get("complete") is False:
            self.discard()
        for path in (self.etc, self.data):
            if path.exists():
                raise RefusedError(
                    f"{path} is there already, and a restore overwrites nothing: "
                    "promote it (playbooks/promote-restored.yml) or remove it (playbooks/discard-restored.yml) first"
                )

    def refuse_small_disk(self, size: float) -> None:
        """Raise RefusedError when the disk has not room for the cluster and a tenth more, and for WAL."""
        check_room(self.data.parent, size * 1.1 + CLUSTER_ROOM, "the restore")

    def create(self) -> None:
        """Make the cluster as Debian does: a socket of its own, no network, no archiving."""
        version = self._settings.version
        self.describe(complete=False)
        run(["pg_createcluster", "--port", str(self.port), "--start-conf", "manual", version, RESTORED])
        values = {"listen_addresses": "", "archive_mode": "off", "hot_standby": "off", "ssl": "off", "jit": "off"}
        with acting_as("postgres"):  # in directories of its own it could have put links in root's way
            drop_in = self.etc / "conf.d" / "50-restored.conf"
            drop_in.write_text("".join(f"{name} = '{value}'\n" for name, value in values.items()))
            (self.etc / "pg_hba.conf").write_text("local all postgres peer\n")

    def say(self, phase: str, percent: float = 0.0, message: str = "") -> None:
        """Leave the progress for `progress`; the message is the summary, or why it failed."""
        write_json(self.progress, {"phase": phase, "percent": percent, "message": message, "at": time.time()})

    def control(self) -> dict[str, str]:
        """Return what the cluster's control file says. Raises ToolError."""
        text = run([f"{self._settings.bin}/pg_controldata", str(self.data)], user="postgres")
        pairs = (line.split(":", 1) for line in text.splitlines() if ":" in line)
        return {name.strip(): value.strip() for name, value in pairs}

    @contextmanager
    def told(self) -> Iterator[None]:
        """Leave the reason for `progress` when the block fails."""
        try:
            yield
        except BaseException as error:
            self.say("failed", message=str(error) or type(error).__name__)
            raise

    def complete(self, target: str, summary: str, gap: str = "") -> None:
        """Say that the restore came to its end: only now it can be promoted; a gap has to be accepted."""
        self.describe(complete=True, target=target, gap=gap, identifier=self.control()["Database system identifier"])
        self.say("done", 100.0, summary)

    def start(self) -> None:
        """Start, and wait until recovery is over. Raises DamagedError with the server's last words."""
        try:
            run(["systemctl", "start", self.unit])
        except ToolError:
            raise DamagedError(f"the restored cluster does not start: {self.last_words()}") from None

        def over() -> bool:
            if subprocess.run(["systemctl", "is-active", "--quiet", self.unit], check=False).returncode:
                raise DamagedError(f"recovery ended before its target: {self.last_words()}")
            try:
                with session(self._settings, "postgres", port=self.port) as connection:
                    return not one(connection, "SELECT pg_is_in_recovery()")
            except BackupError:
                return False

        if not wait_for(over, _RECOVERY_TIMEOUT, 0.5):
            raise DamagedError(f"recovery did not end within a day: {self.last_words()}")

    def last_words(self) -> str:
        """Return what the server said last of an error."""
        log = Path(f"/var/log/postgresql/postgresql-{self._settings.version}-{RESTORED}.log")
        with acting_as("postgres"):
            said = last_error(log.read_text(errors="replace"), "FATAL|PANIC") if log.exists() else "it left no log"
        if "before configured recovery target" in said:
            return "the archived WAL ends before the target, or has no point of that name (recovery target not reached)"
        return said

    def discard(self) -> None:
        """Stop and remove the cluster."""
        if (self.etc / "postgresql.conf").exists():
            run(["pg_dropcluster", "--stop", self._settings.version, RESTORED])
        # what pg_dropcluster does not know, or an interrupted run left
        for directory in (self.etc, self.data, self.scratch):
            if directory.exists():
                shutil.rmtree(directory)
        self.description.unlink(missing_ok=True)


def restore_base(settings: Settings, target: Target, repository: int, port: int) -> str:
    """Recover up to the target; return the summary. Raises BackupError, and leaves no half cluster then."""
    cluster = Restored(settings, port)
    with lock(Path(settings.state) / "restore.lock"), cluster.told():
        cluster.refuse_existing()
        found = base.usable_in(settings, repository)
        options, words = target.options(found, datetime.now(UTC), base.points(settings) if target.name else None)
        cluster.refuse_small_disk(found[-1].size)
        lacking = base.catch_up(settings, repository)
        newest = base.newest_segment(settings, repository)
        cluster.say("preparing")
        began = time.monotonic()
        try:
            cluster.create()
            with acting_as("postgres"):
                shutil.rmtree(cluster.data)
                cluster.data.mkdir(mode=0o700)
            _pgbackrest_restore(settings, cluster, [f"--repo={repository}", *options])
            cluster.say("recovering", 100.0)
            cluster.start()
        except BaseException:
            cluster.discard()
            raise
        if gap := _gap(settings, cluster, target, newest):
            lacking = f"{gap}; {lacking}" if lacking else gap
        summary = _summary(settings, cluster, words, time.monotonic() - began, lacking)
        cluster.complete(words, summary, gap)
    return summary


def _pgbackrest_restore(settings: Settings, cluster: Restored, options: list[str]) -> None:
    """Run the restore as postgres and pass its percentage on."""
    # It dies with this process: what it would still write must not meet the next restore.
    command = ["setpriv", "--reuid=postgres", "--regid=postgres", "--init-groups", "--pdeathsig=KILL", "--",
               "pgbackrest", f"--stanza={settings.stanza}",
               f"--pg1-path={cluster.data}",
               "--archive-mode=off", "--log-level-console=detail", *options, "restore"]  # fmt: skip
    lines: list[str] = []
    said = time.monotonic()
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment(), cwd="/", text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            lines = [*lines[-50:], line]
            seen = _PROGRESS.search(line)
            if seen and time.monotonic() - said > 1:
                said = time.monotonic()
                cluster.say("restoring", float(seen[2]))
                with suppress(BrokenPipeError):  # who looked has gone; the restore goes on
                    print(f"restored {seen[2]} %", flush=True)
    if process.returncode:
        raise ToolError(f"pgbackrest: {last_words(''.join(lines).encode(), None, process.returncode)}")


def restore_dump(settings: Settings, name: str, identity: str, port: int) -> str:
    """Restore a dump (the newest, unless named) into the new cluster; return the summary. Raises BackupError."""
    cluster = Restored(settings, port)
    directory = Path(settings.dumps)
    with lock(Path(settings.state) / "restore.lock"), cluster.told():
        cluster.refuse_existing()
        if not identity.startswith("AGE-SECRET-KEY-"):
            raise RefusedError(
                "the recovery key is missing: a dump is decrypted with the secret vault_postgresql_backup_identity only"
            )
        if name and name not in dumps.names(directory):
            raise RefusedError(f"there is no dump {name}: postgresql-backup list names all")
        manifest = dumps.load(directory / name) if name else dumps.newest(directory)
        drill.check_version(settings, manifest.server_version)
        dumps.check_files(directory / manifest.name, manifest)
        cluster.refuse_small_disk(sum(found["size"] for found in manifest.databases.values()) + manifest.size)
        cluster.say("preparing")
        began = time.monotonic()
        try:
            cluster.create()
            with acting_as("postgres"):
                cluster.scratch.mkdir(mode=0o700)
            cluster.start()
            cluster.say("restoring")
            libpq = {"PGHOST": settings.socket, "PGPORT": str(port), "PGUSER": "postgres"}
            drill.restore_dump(settings, directory / manifest.name, manifest, identity, libpq, cluster.scratch)
            shutil.rmtree(cluster.scratch)
        except BaseException:
            cluster.discard()
            raise
        taken = next(iter(manifest.databases.values()))["snapshot_at"]
        summary = (
            f"Dump {manifest.name} is restored into {settings.version}/{RESTORED} (port {port}, socket only) in "
            f"{time.monotonic() - began:.0f} s: {manifest.rows} rows as of {taken[:19]} UTC.\n"
            "Missing: everything committed after that.\n" + _next_steps(settings, port)
        )
        cluster.complete(f"dump {manifest.name}", summary)
    return summary


def _gap(settings: Settings, cluster: Restored, target: Target, segment: str) -> str:
    """Say what of the archive recovery to the newest has not reached: without a target it ends where WAL is missing."""
    if target != Target() or not segment:
        return ""
    start = f"{segment[8:16].lstrip('0') or '0'}/{int(segment[16:24], 16) << 24:X}"
    with session(settings, "postgres", port=cluster.port) as connection:
        reached, whole = rows(
            connection, "SELECT pg_last_wal_replay_lsn()::text, pg_last_wal_replay_lsn() > %s::pg_lsn", start
        )[0]
    with acting_as("postgres"):
        history = _newest_history(cluster.data)
        followed = base.parse_history(history.read_text()) if history else {}
    if int(segment[:8], 16) not in followed:
        lacking = "the history file of their timeline"
    elif not whole:
        lacking = "one before it"
    else:
        return ""
    return f"WAL after {reached}: the archive has segments up to {segment}, and {lacking} is missing"


def _summary(settings: Settings, cluster: Restored, words: str, seconds: float, lacking: str) -> str:
    with session(settings, "postgres", port=cluster.port) as connection:
        last = one(connection, "SELECT pg_last_xact_replay_timestamp()")
    until = (
        f"the last transaction in it is of {last:%Y-%m-%d %H:%M:%S} UTC"
        if last
        else "no WAL was needed after the backup"
    )
    return (
        f"Recovered up to {words} into {settings.version}/{RESTORED} (port {cluster.port}, socket only) in "
        f"{seconds:.0f} s: {until}.\nMissing: everything committed after that{f'; {lacking}' if lacking else ''}.\n"
        + _next_steps(settings, cluster.port)
    )


def _next_steps(settings: Settings, port: int) -> str:
    return (
        f"Next: look at it (sudo -u postgres psql -p {port} {settings.databases[0]}); then put it into the place of "
        f"{settings.version}/{settings.cluster} with playbooks/promote-restored.yml, or copy what you need out of it; "
        "playbooks/discard-restored.yml removes it."
    )


class Promotion:
    """Puts the restored cluster into the live one's place, in steps that can be taken twice.

    What is to be done is written down before the first step, so that a promotion that was killed is gone on with.
    """

    def __init__(self, settings: Settings, port: int, *, accept_gap: bool = False) -> None:
        """Take the clusters; `accept_gap` promotes one that lacks archived WAL."""
        self._settings, self._cluster, self._accept_gap = settings, Restored(settings, port), accept_gap
        self._unit = f"postgresql@{settings.version}-{settings.cluster}.service"

    def run(self) -> Path:
        """Take all steps; return where the replaced data directory is. Raises BackupError."""
        file = self._cluster.promotion
        if not file.exists():
            identifier = self._refuse_incomplete()
            old = self._settings.data.with_name(f"{self._settings.cluster}.replaced-{datetime.now(UTC):%Y%m%dT%H%M%SZ}")
            write_json(file, {"old": str(old), "identifier": identifier})
        plan = json.loads(file.read_bytes())
        self._old, self._identifier = Path(plan["old"]), int(plan["identifier"])
        for step in (self.stop, self.set_aside, self.put, self.configure, self.start, self.adopt, self.finish):
            step()
        return self._old

    def _refuse_incomplete(self) -> str:
        cluster = self._cluster
        described = cluster.described()
        if not cluster.data.exists() or not described:
            raise RefusedError(
                f"there is no restored cluster in {cluster.data}: playbooks/restore-backup.yml makes one"
            )
        if not described["complete"]:
            raise RefusedError(
                "the restore did not come to its end: nothing was promoted; run playbooks/restore-backup.yml again"
            )
        if described["gap"] and not self._accept_gap:
            raise RefusedError(
                f"the restored cluster lacks {described['gap']}: restore from the other repository "
                "(-e restore_repository=2), or promote what there is with -e promote_accept_gap=true"
            )
        control = cluster.control()
        state, identifier = control["Database cluster state"], control["Database system identifier"]
        if "recovery" in state:
            raise RefusedError(f"the restored cluster is still recovering ({state}): wait until it is done")
        if identifier != described["identifier"]:
            raise RefusedError(
                f"{cluster.data} is another cluster (system identifier {identifier}) than the one that was restored "
                f"({described['identifier']}): playbooks/discard-restored.yml, then restore again"
            )
        return identifier

    def stop(self) -> None:
        """Stop both clusters, as long as the restored one is not in its place."""
        if self._cluster.data.exists():
            run(["systemctl", "stop", self._cluster.unit, self._unit])

    def set_aside(self) -> None:
        """Keep the live cluster's data directory under another name; a rebuilt host may have none."""
        if self._cluster.data.exists() and self._settings.data.exists():
            self._settings.data.rename(self._old)
            sync_directory(self._old.parent)

    def put(self) -> None:
        """Give the restored data directory its name."""
        if self._cluster.data.exists():
            self._cluster.data.rename(self._settings.data)
            sync_directory(self._old.parent)

    def configure(self) -> None:
        """Forget what was the restored cluster's alone."""
        if self._cluster.etc.exists():
            shutil.rmtree(self._cluster.etc)
        with acting_as("postgres"):
            _forget_recovery(self._settings.data / "postgresql.auto.conf")
            announce_timeline(self._settings.data)

    def start(self) -> None:
        """Start it in its place."""
        run(["systemctl", "daemon-reload"])
        try:
            run(["systemctl", "start", self._unit])
        except ToolError:
            raise ToolError(
                f"{self._unit} does not start (journalctl -u {self._unit}): mend that, then promote again. The data "
                f"directory that was replaced is {self._old}"
            ) from None

    def adopt(self) -> None:
        """Let the repositories take WAL of a cluster that was made of a dump: it has another system identifier.

        Any other begins a base backup; that one lacks the markers' database until site.yml has made it. So it is with a
        repository that is still to be made, as on a host that was lost: the server archives nothing before.
        """
        databases = base.info(self._settings).get("db", [])
        if databases and self._identifier not in {int(database["system-id"]) for database in databases}:
            run(["pgbackrest", f"--stanza={self._settings.stanza}", "stanza-upgrade"], user="postgres")
        elif {database["repo-key"] for database in databases} >= set(self._settings.repositories):
            run(["systemctl", "start", "--no-block", _BASE_UNIT])

    def finish(self) -> None:
        """Forget the restore and the promotion."""
        self._cluster.description.unlink(missing_ok=True)
        self._cluster.promotion.unlink()


def promote(settings: Settings, port: int, *, accept_gap: bool = False) -> str:
    """Put the restored cluster into the live one's place, whose data directory is kept; return the summary."""
    with lock(Path(settings.state) / "restore.lock"):
        old = Promotion(settings, port, accept_gap=accept_gap).run()
    kept = (
        f"The data directory that it replaced is {old}: remove it when nothing of it is needed any more."
        if old.exists()
        else "There was no data directory in its place."
    )
    return (
        f"The restored cluster is {settings.version}/{settings.cluster} now, and archives again. {kept}\n"
        "A full base backup has begun (journalctl -u postgresql-backup-base@full); after a dump, and where a "
        "repository is still to be made, site.yml takes it.\n"
        "Next: run site.yml, which puts the present credentials in force, and replay the gateways' spools "
        "(litellm-sqlalchemy replay --since TIME)."
    )


def _forget_recovery(file: Path) -> None:
    """Remove what pgBackRest wrote for the recovery that is over."""
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    stay = [line for line in lines if not line.startswith(("restore_command", "recovery_target", "archive_mode"))]
    if stay != lines:
        file.write_text("".join(stay))


def _newest_history(data: Path) -> Path | None:
    """Return the history file of a cluster's timeline; the first timeline has none."""
    return max((data / "pg_wal").glob("????????.history"), default=None)


def announce_timeline(data: Path) -> None:
    """Have the timeline's history archived: the server does so at the end of recovery only, which did not archive.

    Without it a restore follows the timeline that was left, and the next promotion takes this one's number again.
    """
    history = _newest_history(data)
    if history:
        state = data / "pg_wal" / "archive_status" / history.name
        if not state.with_name(f"{history.name}.done").exists():
            state.with_name(f"{history.name}.ready").touch(mode=0o600)


def discard(settings: Settings, port: int, *, incomplete: bool = False) -> str:
    """Remove the restored cluster; with `incomplete`, only one whose restore was killed. Raises BackupError."""
    cluster = Restored(settings, port)
    with lock(Path(settings.state) / "restore.lock"):
        cluster.refuse_promotion()
        if incomplete and cluster.described().get("complete") is not False:
            return "there is nothing of a killed restore"
        cluster.discard()
        if incomplete:
            cluster.say("failed", message="the restore was killed; what it had made was removed")
    return "there is no restored cluster any more"


def begin(settings: Settings, arguments: Sequence[str], identity: str, port: int) -> None:
    """Start a restore as a unit of its own, and return; systemd hands the recovery key on, it is in no file."""
    cluster = Restored(settings, port)
    door = Path(settings.run) / "identity.sock"
    with lock(Path(settings.state) / "restore.lock"):
        cluster.say("preparing")
    program = "/usr/local/bin/postgresql-backup"
    command = ["systemd-run", "--quiet", "--collect", "--no-block", f"--unit={UNIT}",
               "--description=Restore of a backup of PostgreSQL",
               f"--property=ExecStopPost=-{program} discard --incomplete --port {port}"]  # fmt: skip
    door.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX) as listener:
        if identity:
            listener.bind(str(door))
            listener.listen(1)
            listener.settimeout(60)
            command.append(f"--property=LoadCredential=identity:{door}")
        try:
            run([*command, program, "restore", *arguments])
            if identity:
                taker, _ = listener.accept()
                with taker:
                    taker.sendall(identity.encode())
        except TimeoutError:
            raise ToolError(f"systemd did not start {UNIT} within 60 s: journalctl -u {UNIT}") from None
        finally:
            door.unlink(missing_ok=True)


def progress(settings: Settings) -> dict[str, object]:
    """Return what the restore that is going on, or was the last one, says of itself."""
    try:
        found: dict[str, object] = json.loads((Path(settings.run) / "restore.json").read_bytes())
    except (OSError, ValueError):
        return {"phase": "none", "percent": 0.0}
    return found
