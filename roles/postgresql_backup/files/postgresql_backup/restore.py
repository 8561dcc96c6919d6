"""Restores a backup into a new cluster beside the live one, and puts that into its place when told to.

Nothing of the live cluster is touched before `promote`, and `promote` keeps its data directory.
"""

import json
import re
import shutil
import subprocess
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from postgresql_backup import base, drill, dumps
from postgresql_backup.database import one, session
from postgresql_backup.errors import BackupError, DamagedError, RefusedError, ToolError
from postgresql_backup.settings import Settings
from postgresql_backup.tools import environment, last_words, lock, megabytes, run, wait_for, write_json

RESTORED = "restored"
_LSN = re.compile(r"^[0-9A-F]{1,8}/[0-9A-F]{1,8}$", re.IGNORECASE)
_PROGRESS = re.compile(r"\(([\d.]+[KMGT]?B), ([\d.]+)%\)")
_RECOVERY_TIMEOUT = 24 * 3600.0


@dataclass
class Target:
    """Up to where to recover; all empty is up to the newest archived WAL."""

    time: str = ""
    lsn: str = ""
    name: str = ""

    def options(self, found: list[base.BaseBackup], now: datetime) -> tuple[list[str], str]:
        """Return pgBackRest's options and the target in words. Raises RefusedError."""
        given = [value for value in (self.time, self.lsn, self.name) if value]
        if len(given) > 1:
            raise RefusedError(f"give one of time, lsn and name (seen: {', '.join(given)})")
        if not found:
            raise RefusedError("the repository holds no base backup: postgresql-backup list")
        if self.time:
            moment = self._moment(now)
            whole = [backup for backup in found if backup.ended <= moment]
            if not whole:
                raise RefusedError(
                    f"{self.time} is before the end of the first base backup, {found[0].ended.isoformat()}: "
                    "choose a later time, or a dump from before (postgresql-backup list)"
                )
            text = moment.strftime("%Y-%m-%d %H:%M:%S.%f+00")
            return [
                f"--set={whole[-1].label}",
                "--type=time",
                f"--target={text}",
                "--target-action=promote",
            ], f"time {text}"
        if self.lsn:
            if not _LSN.match(self.lsn):
                raise RefusedError(f"{self.lsn!r} is no LSN: it looks like 0/3000148")
            return ["--type=lsn", f"--target={self.lsn}", "--target-action=promote"], f"LSN {self.lsn}"
        if self.name:
            return ["--type=name", f"--target={self.name}", "--target-action=promote"], f"point {self.name}"
        return ["--type=default"], "the newest archived WAL"

    def _moment(self, now: datetime) -> datetime:
        try:
            moment = datetime.fromisoformat(self.time)
        except ValueError:
            raise RefusedError(f"{self.time!r} is no time: write it as 2026-11-23T14:30:00+00:00") from None
        if moment.tzinfo is None:
            raise RefusedError(f"{self.time} has no time zone: write {self.time}+00:00 for UTC")
        if moment > now:
            raise RefusedError(
                f"{self.time} is in the future (now {now.isoformat(timespec='seconds')}): leave it out for the newest"
            )
        return moment


class Restored:
    """The cluster `restored`."""

    def __init__(self, settings: Settings, port: int) -> None:
        """Take the port that its socket is named by."""
        self._settings, self.port = settings, port
        self.data = settings.data.with_name(RESTORED)
        self.etc = Path(f"/etc/postgresql/{settings.version}/{RESTORED}")
        self.unit = f"postgresql@{settings.version}-{RESTORED}.service"
        self.progress = Path(settings.run) / "restore.json"

    def refuse_existing(self) -> None:
        """Raise RefusedError when a restored cluster is there."""
        for path in (self.etc, self.data):
            if path.exists():
                raise RefusedError(
                    f"{path} is there already, and a restore overwrites nothing: "
                    "promote it (playbooks/promote-restored.yml) or remove it (playbooks/discard-restored.yml) first"
                )

    def refuse_small_disk(self, size: float) -> None:
        """Raise RefusedError when the disk has not room for the cluster and a tenth more."""
        free = shutil.disk_usage(self.data.parent).free
        if free < size * 1.1:
            raise RefusedError(
                f"{self.data.parent} has {megabytes(free)} free, {megabytes(size * 1.1)} are needed: nothing was begun"
            )

    def create(self) -> None:
        """Make the cluster as Debian does: a socket of its own, no network, no archiving."""
        version = self._settings.version
        run(["pg_createcluster", "--port", str(self.port), "--start-conf", "manual", version, RESTORED])
        values = {"listen_addresses": "", "archive_mode": "off", "hot_standby": "off", "ssl": "off", "jit": "off"}
        drop_in = self.etc / "conf.d" / "50-restored.conf"
        drop_in.write_text("".join(f"{name} = '{value}'\n" for name, value in values.items()))
        drop_in.chmod(0o644)
        (self.etc / "pg_hba.conf").write_text("local all postgres peer\n")

    def say(self, phase: str, percent: float = 0.0) -> None:
        """Leave the progress for `progress`."""
        write_json(self.progress, {"phase": phase, "percent": percent, "at": time.time()})

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
        lines = log.read_text(errors="replace").splitlines() if log.exists() else []
        telling = [line for line in lines if "FATAL" in line or "PANIC" in line]
        if any("before configured recovery target" in line for line in telling[-1:]):
            return "the archived WAL ends before the target, or has no point of that name (recovery target not reached)"
        return (telling or lines or ["it left no log"])[-1][:400]

    def discard(self) -> None:
        """Stop and remove the cluster."""
        if (self.etc / "postgresql.conf").exists():
            run(["pg_dropcluster", "--stop", self._settings.version, RESTORED])
        for directory in (self.etc, self.data):  # what pg_dropcluster does not know, or an interrupted run left
            if directory.exists():
                shutil.rmtree(directory)


def restore_base(settings: Settings, target: Target, repository: int, port: int) -> str:
    """Recover up to the target; return the summary. Raises BackupError, and leaves no half cluster then."""
    cluster = Restored(settings, port)
    with lock(Path(settings.run) / "restore.lock"):
        cluster.refuse_existing()
        found = [backup for backup in base.backups(settings) if backup.repository == repository]
        options, words = target.options(found, datetime.now(UTC))
        cluster.refuse_small_disk(found[-1].size)
        cluster.say("preparing")
        began = time.monotonic()
        try:
            cluster.create()
            shutil.rmtree(cluster.data)
            run(["install", "-d", "-m", "0700", "-o", "postgres", "-g", "postgres", str(cluster.data)])
            _pgbackrest_restore(settings, cluster, [f"--repo={repository}", *options])
            cluster.say("recovering", 100.0)
            cluster.start()
        except BaseException:
            cluster.discard()
            cluster.say("failed")
            raise
        summary = _summary(settings, cluster, words, time.monotonic() - began)
        cluster.say("done", 100.0)
    return summary


def _pgbackrest_restore(settings: Settings, cluster: Restored, options: list[str]) -> None:
    """Run the restore as postgres and pass its percentage on."""
    command = ["runuser", "-u", "postgres", "--", "pgbackrest", f"--stanza={settings.stanza}",
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
                print(f"restored {seen[2]} %", flush=True)
    if process.returncode:
        raise ToolError(f"pgbackrest: {last_words(''.join(lines).encode(), None, process.returncode)}")


def restore_dump(settings: Settings, name: str, identity: str, port: int) -> str:
    """Restore a dump (the newest, unless named) into the new cluster; return the summary. Raises BackupError."""
    cluster = Restored(settings, port)
    directory = Path(settings.dumps)
    with lock(Path(settings.run) / "restore.lock"):
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
            cluster.start()
            cluster.say("restoring")
            libpq = {"PGHOST": settings.socket, "PGPORT": str(port), "PGUSER": "postgres"}
            drill.restore_dump(settings, directory / manifest.name, manifest, identity, libpq, cluster.data.parent)
        except BaseException:
            cluster.discard()
            cluster.say("failed")
            raise
        seconds = time.monotonic() - began
        cluster.say("done", 100.0)
    taken = next(iter(manifest.databases.values()))["snapshot_at"]
    return (
        f"Dump {manifest.name} is restored into {settings.version}/{RESTORED} (port {port}, socket only) in "
        f"{seconds:.0f} s: {manifest.rows} rows as of {taken[:19]} UTC.\nMissing: everything committed after that.\n"
        + _next_steps(settings, port)
    )


def _summary(settings: Settings, cluster: Restored, words: str, seconds: float) -> str:
    with session(settings, "postgres", port=cluster.port) as connection:
        last = one(connection, "SELECT pg_last_xact_replay_timestamp()")
    until = (
        f"the last transaction in it is of {last:%Y-%m-%d %H:%M:%S} UTC"
        if last
        else "no WAL was needed after the backup"
    )
    return (
        f"Recovered up to {words} into {settings.version}/{RESTORED} (port {cluster.port}, socket only) in "
        f"{seconds:.0f} s: {until}.\nMissing: everything committed after that.\n" + _next_steps(settings, cluster.port)
    )


def _next_steps(settings: Settings, port: int) -> str:
    return (
        f"Next: look at it (sudo -u postgres psql -p {port} {settings.databases[0]}); then put it into the place of "
        f"{settings.version}/{settings.cluster} with playbooks/promote-restored.yml, or copy what you need out of it; "
        "playbooks/discard-restored.yml removes it."
    )


def promote(settings: Settings, port: int) -> str:
    """Put the restored cluster into the live one's place, whose data directory is kept; return the summary."""
    cluster = Restored(settings, port)
    live_unit = f"postgresql@{settings.version}-{settings.cluster}.service"
    with lock(Path(settings.run) / "restore.lock"):
        if not cluster.data.exists():
            raise RefusedError(
                f"there is no restored cluster in {cluster.data}: playbooks/restore-backup.yml makes one"
            )
        with session(settings, "postgres", port=port) as connection:
            if one(connection, "SELECT pg_is_in_recovery()"):
                raise RefusedError("the restored cluster is still recovering: wait until it is done")
            identifier = one(connection, "SELECT system_identifier FROM pg_control_system()")
        old = settings.data.with_name(f"{settings.cluster}.replaced-{datetime.now(UTC):%Y%m%dT%H%M%SZ}")
        run(["systemctl", "stop", cluster.unit])
        run(["systemctl", "stop", live_unit])
        if settings.data.exists():
            settings.data.rename(old)
        cluster.data.rename(settings.data)
        shutil.rmtree(cluster.etc)
        _forget_recovery(settings.data / "postgresql.auto.conf")
        run(["systemctl", "daemon-reload"])
        run(["systemctl", "start", live_unit])
        _adopt(settings, int(identifier))
    return (
        f"The restored cluster is {settings.version}/{settings.cluster} now, and archives again. The data directory "
        f"that it replaced is {old}: remove it when nothing of it is needed any more.\nNext: run site.yml, which puts "
        "the present credentials in force, replay the gateways' spools (litellm-sqlalchemy replay --since TIME) and "
        "start postgresql-backup-base@full.service."
    )


def _forget_recovery(file: Path) -> None:
    """Remove what pgBackRest wrote for the recovery that is over."""
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    stay = [line for line in lines if not line.startswith(("restore_command", "recovery_target", "archive_mode"))]
    if stay != lines:
        file.write_text("".join(stay))


def _adopt(settings: Settings, identifier: int) -> None:
    """Let the repositories take WAL of a cluster that was made of a dump: it has another system identifier."""
    held = {int(database["system-id"]) for database in base.info(settings).get("db", [])}
    if held and identifier not in held:
        run(["pgbackrest", f"--stanza={settings.stanza}", "stanza-upgrade"], user="postgres")


def progress(settings: Settings) -> dict[str, object]:
    """Return what the restore that is going on, or was the last one, says of itself."""
    try:
        found: dict[str, object] = json.loads((Path(settings.run) / "restore.json").read_bytes())
    except (OSError, ValueError):
        return {"phase": "none", "percent": 0.0}
    return found
