"""The command `postgresql-backup`."""

import argparse
import contextlib
import errno
import grp
import json
import os
import pwd
import sys
import traceback
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from postgresql_backup import __version__, age, base, drill, dump, dumps, offsite, restore, status
from postgresql_backup.errors import BackupError, DamagedError, ExitCode, RefusedError, ToolError
from postgresql_backup.settings import SETTINGS_FILE, Settings, credential, load_settings
from postgresql_backup.tools import Hashed, duration, lock, megabytes, pump, read_file, run, wait_for, write_file

_EXIT_CODES = "exit codes: " + ", ".join(f"{code.value} {code.name.lower()}" for code in ExitCode)
_PORT = 5433
#: Whom root becomes for a verb; the others need root itself.
_USERS = {
    "dump": "postgresql-backup",
    "copy": "postgresql-backup",
    "prune": "postgresql-backup",
    "verify": "postgresql-backup",
    "fetch": "postgresql-backup",
    "drill": "postgresql-drill",
    "base": "postgres",
    "mark": "postgres",
    "pending": "postgres",
    "prepare": "postgres",
    "report": "postgres",
    "list": "postgres",
    "status": "postgres",
    "validate": "postgres",
}
_Verb = Callable[[Settings, argparse.Namespace], int]


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    options = _parser().parse_args(arguments)
    os.umask(0o027)
    try:
        _become(_USERS.get(options.name, "root"))
        return int(options.verb(load_settings(options.settings), options))
    except BackupError as error:
        print(f"postgresql-backup: {error}", file=sys.stderr)
        return int(error.exit_code)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return int(ExitCode.FAILED)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print(f"postgresql-backup: {where}{error.strerror or error}; {_remedy(error)}", file=sys.stderr)
        return int(ExitCode.FAILED)
    except KeyboardInterrupt:
        return 130
    except Exception as error:  # what is no known failure is one line, too
        frame = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{Path(frame.filename).name}:{frame.lineno}"
        print(
            f"postgresql-backup: {type(error).__name__} in {place}: {error}; this is a defect: report this line with "
            f"`postgresql-backup {options.name}`",
            file=sys.stderr,
        )
        return int(ExitCode.FAILED)


def _remedy(error: OSError) -> str:
    """Say what to do about what the system refused."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "make room on that file system, then run it again; nothing that was there was changed"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return "owner and mode are not what playbooks/backup.yml gives them: run it"
    return "playbooks/backup.yml makes what is missing; postgresql-backup status says what else is wrong"


def _become(user: str) -> None:
    """Let root be the verb's user for good. Raises RefusedError for anybody else."""
    entry = pwd.getpwnam(user)
    if os.geteuid() == entry.pw_uid:
        return
    if os.geteuid():
        raise RefusedError(f"this is for root or {user}: use sudo")
    os.setgroups([group.gr_gid for group in grp.getgrall() if user in group.gr_mem or group.gr_gid == entry.pw_gid]
                 + ([grp.getgrnam("postgresql-backup").gr_gid] if user == "postgres" else []))  # fmt: skip
    os.setgid(entry.pw_gid)
    os.setuid(entry.pw_uid)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="postgresql-backup",
        description="Backups of a PostgreSQL cluster that are proven by restoring them.",
        epilog=f"example: postgresql-backup status --json; {_EXIT_CODES}",
    )
    parser.add_argument("--version", action="version", version=f"postgresql-backup {__version__}")
    parser.add_argument(
        "--settings", type=Path, default=SETTINGS_FILE, metavar="FILE", help=f"default: {SETTINGS_FILE}"
    )
    verbs = parser.add_subparsers(required=True, metavar="VERB", dest="name")

    def add(name: str, verb: _Verb, summary: str) -> argparse.ArgumentParser:
        added = verbs.add_parser(name, help=summary, description=summary, epilog=_EXIT_CODES)
        added.set_defaults(verb=verb)
        return added

    for name, verb, summary in (
        ("status", _status, "Say how old and how proven the backups are; exit 1 when a check fails."),
        ("validate", _status, "The same, as the deployment's final report wants it."),
        ("list", _list, "List dumps, base backups and how far back a recovery can go."),
        ("progress", _progress, "Say how far the running restore is."),
    ):
        added = add(name, verb, summary)
        added.add_argument("--json", action="store_true", help="print JSON")
        if name in ("status", "validate"):
            added.add_argument("--metrics", type=Path, metavar="FILE", help="write Prometheus metrics into FILE too")
        if name == "progress":
            added.add_argument("--wait", type=float, default=0, metavar="SECONDS", help="for its end, at most so long")
    add("dump", _dump, "Take a logical dump (in its unit: postgresql-backup-dump.service).")
    verify = add("verify", _verify, "Compare stored dumps with their manifests; with --decrypt, their content too.")
    verify.add_argument("dump", nargs="?", default="", help="name of a dump (default: all)")
    verify.add_argument("--decrypt", action="store_true", help="read the recovery key from standard input")
    add("prune", _prune, "Remove the dumps that no retention rule keeps, and what killed runs left.")
    add("copy", _copy, "Send dumps to the off-host store (in its unit: postgresql-backup-copy.service).")
    fetch = add("fetch", _fetch, "Bring a dump back from the off-host store.")
    fetch.add_argument("dump", nargs="?", default="", help="name of the dump (default: the newest)")
    add("base", _base, "Take a base backup.").add_argument("kind", choices=["full", "incr"])
    mark = add(
        "mark", _mark, "Name this point of time, so that a restore can go back to it; wait until it is archived."
    )
    mark.add_argument("point", nargs="?", default="", help="name of the point")
    mark.add_argument("--content", action="store_true", help="leave to the drill what the databases hold at this point")
    drilling = add("drill", _drill, "Restore the newest backup into a spare cluster and look at it (in its unit).")
    drilling.add_argument("kind", choices=drill.KINDS)
    drilling.add_argument("--key", type=Path, metavar="FILE", help="file with the recovery key")
    add("report", _report, "Write a drill's report into the table restore_drills.").add_argument(
        "kind", choices=drill.KINDS
    )
    add("publish", _publish, "Put the metrics that status wrote where they are collected.").add_argument(
        "file", type=Path, metavar="FILE"
    )
    add("pending", _pending, "Say whether the server has to be reloaded or restarted, or none.")
    add("first", _first, "Take the first dump, base backup and off-host copy where there is none.")
    add("ready", _ready, "Take a dump when the drill has no key for the newest one.")
    add("prepare", _prepare, "Make tables and stanza; refuse a repository of another cluster.")
    restoring = add("restore", _restore, "Restore into a new cluster beside the live one.")
    restoring.add_argument("--from", dest="source", choices=["base", "dump"], default="base")
    restoring.add_argument("--time", default="", help="up to a time, such as 2026-11-23T14:30:00+00:00")
    restoring.add_argument("--lsn", default="", help="up to an LSN, such as 0/3000148")
    restoring.add_argument("--point", default="", help="up to a named point")
    restoring.add_argument(
        "--dump", default="", help="name of the dump (default: the newest); its key on standard input"
    )
    restoring.add_argument("--repository", type=int, default=1, help="repository of the base backup (default: 1)")
    restoring.add_argument("--background", action="store_true", help="return at once; `progress` says how it goes")
    promoting = add("promote", _promote, "Put the restored cluster into the live one's place; the old data is kept.")
    promoting.add_argument("--accept-gap", action="store_true", help="although archived WAL is missing in it")
    discarding = add("discard", _discard, "Remove the restored cluster.")
    discarding.add_argument("--incomplete", action="store_true", help="only when its restore was killed")
    for added in (restoring, promoting, discarding):
        added.add_argument("--port", type=int, default=_PORT, help=f"port of the restored cluster (default: {_PORT})")
    return parser


def _status(settings: Settings, options: argparse.Namespace) -> int:
    checks = status.Status(settings)
    results = []
    for result in checks.run():
        results.append(result)
        if not options.json:
            remedy = f"; next: {result.remedy}" if result.remedy else ""
            print(f"{'OK    ' if result.ok else 'FAILED'} {result.id:<24} {result.seen}{remedy}", flush=True)
    if options.json:
        ok = all(result.ok for result in results)
        print(json.dumps({"ok": ok, "checks": [asdict(result) for result in results]}, indent=2))
    if options.metrics:
        write_file(options.metrics, status.exposition(checks.metrics).encode(), 0o644)
        return ExitCode.OK
    return ExitCode.OK if all(result.ok for result in results) else ExitCode.FAILED


def _publish(settings: Settings, options: argparse.Namespace) -> int:
    os.umask(0o022)
    options.file.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    write_file(options.file, read_file(settings.server / "status.prom", "postgres"), 0o644)
    return ExitCode.OK


def _list(settings: Settings, options: argparse.Namespace) -> int:
    directory = Path(settings.dumps)
    found, damaged = [], []
    for name in dumps.names(directory):
        try:
            found.append(dumps.load(directory / name))
        except DamagedError as error:
            damaged.append(str(error))
    bases = base.backups(settings)
    if options.json:
        content = {
            "dumps": [asdict(manifest) for manifest in found],
            "damaged": damaged,
            "base_backups": [asdict(backup) for backup in bases],
        }
        print(json.dumps(content, indent=2, default=str))
        return ExitCode.OK
    for manifest in found:
        size = megabytes(manifest.size)
        print(f"dump  {manifest.name}  {manifest.rows} rows, {size}, PostgreSQL {manifest.server_version}")
    for problem in damaged:
        print(f"FAILED {problem}")
    for backup in bases:
        earlier = "" if backup.current else ", of an earlier cluster"
        print(
            f"base  {backup.label}  repository {backup.repository}, {backup.kind}, ended {backup.ended.isoformat()}, "
            f"{megabytes(backup.stored)} of {megabytes(backup.size)}{earlier}"
        )
    current = [backup for backup in bases if backup.current]
    if current:
        print(f"A recovery can go to any time after {current[0].ended.isoformat()}.")
    return ExitCode.OK


def _dump(settings: Settings, options: argparse.Namespace) -> int:
    manifest = dump.take(settings)
    with lock(Path(settings.dumps) / ".lock"):
        removed = dumps.prune(Path(settings.dumps), settings.retention)
    print(
        f"dump {manifest.name}: {manifest.rows} rows, {megabytes(manifest.size)}, verified; "
        f"removed {', '.join(removed) or 'none'}"
    )
    return ExitCode.OK


def _verify(settings: Settings, options: argparse.Namespace) -> int:
    directory = Path(settings.dumps)
    identity = sys.stdin.readline() if options.decrypt else ""
    names = [options.dump] if options.dump else dumps.names(directory)
    code = ExitCode.OK
    for name in names:
        try:
            with contextlib.nullcontext() if options.dump else dumps.unless_gone(directory / name):
                print(f"OK     {name} {_verified(directory / name, identity)}")
        except BackupError as error:
            print(f"FAILED {name} {error}")
            code = ExitCode.DAMAGED
    return code


def _verified(folder: Path, identity: str) -> str:
    """Compare a dump with its manifest, decrypted where there is an identity; return its size. Raises DamagedError."""
    manifest = dumps.load(folder)
    dumps.check_files(folder, manifest)
    for file, wanted in manifest.files.items() if identity else ():
        plain = Hashed()
        with age.decrypted(folder / file, identity) as stream:
            pump(stream, plain)
        if plain.sha256 != wanted["plain_sha256"]:
            raise DamagedError(f"dump {folder.name}: {file} decrypts to something else than was dumped")
    return f"{megabytes(manifest.size)}{', decrypted' if identity else ''}"


def _prune(settings: Settings, options: argparse.Namespace) -> int:
    with lock(Path(settings.dumps) / ".lock"):
        dumps.remove_partial(Path(settings.dumps))
        print(f"removed {', '.join(dumps.prune(Path(settings.dumps), settings.retention)) or 'none'}")
    return ExitCode.OK


def _rclone_configuration(settings: Settings) -> str:
    if not settings.offsite:
        raise RefusedError("no off-host copy is configured: put a host into the inventory group backup")
    directory = os.environ.get("CREDENTIALS_DIRECTORY")
    if not directory:
        raise RefusedError(
            "the off-host store's key is given by systemd only: systemctl start postgresql-backup-copy.service"
        )
    return f"{directory}/rclone.conf"


def _copy(settings: Settings, options: argparse.Namespace) -> int:
    print(f"sent {', '.join(offsite.copy(settings, _rclone_configuration(settings))) or 'nothing: all is there'}")
    return ExitCode.OK


def _fetch(settings: Settings, options: argparse.Namespace) -> int:
    print(offsite.fetch(settings, _rclone_configuration(settings), "" if options.dump == "newest" else options.dump))
    return ExitCode.OK


def _base(settings: Settings, options: argparse.Namespace) -> int:
    newest = base.take(settings, options.kind)[-1]
    print(f"base backup {newest.label}: {newest.kind}, {megabytes(newest.stored)} of {megabytes(newest.size)}")
    return ExitCode.OK


def _mark(settings: Settings, options: argparse.Namespace) -> int:
    marker = base.mark(settings, options.point, content=options.content)
    print(f"point {marker['name']} at {marker['written_at']}, archived in {marker['segment']}")
    return ExitCode.OK


def _drill(settings: Settings, options: argparse.Namespace) -> int:
    identity = options.key.read_text() if options.key else ""
    report = drill.run_drill(settings, options.kind, identity)
    print(drill.summary([report]))
    print(f"took {duration(report.total_seconds)}")
    return ExitCode.OK if report.ok else ExitCode.FAILED


def _report(settings: Settings, options: argparse.Namespace) -> int:
    report = drill.load_report(settings, options.kind)
    if report is None:
        raise RefusedError(f"there is no report of a drill of the {options.kind}")
    drill.store_report(settings, report)
    return ExitCode.OK


def _prepare(settings: Settings, options: argparse.Namespace) -> int:
    made = base.prepare(settings)
    repositories = base.check_repositories(settings)
    restore.announce_timeline(settings.data)  # of a promotion by an earlier version, which did not
    print(json.dumps({"changed": made or bool(repositories), "tables": made, "repositories": repositories}))
    return ExitCode.OK


def _pending(settings: Settings, options: argparse.Namespace) -> int:
    print(base.pending(settings))
    return ExitCode.OK


def _first(settings: Settings, options: argparse.Namespace) -> int:
    """Start the units: only they have the credentials."""
    there = {backup.repository for backup in base.backups(settings) if backup.current}
    units = [] if dumps.names(Path(settings.dumps)) else ["postgresql-backup-dump.service"]
    units += [] if there >= set(settings.repositories) else ["postgresql-backup-base@full.service"]
    if settings.offsite and not offsite.state(settings):
        units.append("postgresql-backup-copy.service")
    for unit in units:
        try:
            run(["systemctl", "start", unit])
        except ToolError:
            said = run(["journalctl", "--unit", unit, "--lines=5", "--output=cat", "--identifier=postgresql-backup"])
            raise ToolError(
                f"{unit} failed: {said.strip().splitlines()[-1] if said.strip() else 'see its journal'}"
            ) from None
        print(f"started {unit}")
    return ExitCode.OK


def _ready(settings: Settings, options: argparse.Namespace) -> int:
    found = dumps.names(Path(settings.dumps))
    if found and (settings.keys / f"{found[-1]}.key").exists():
        return ExitCode.OK
    run(["systemctl", "start", "postgresql-backup-dump.service"])
    print("took a dump: the key of the newest one was not in memory")
    return ExitCode.OK


def _restore(settings: Settings, options: argparse.Namespace) -> int:
    identity = ""
    if options.source == "dump":
        handed = "CREDENTIALS_DIRECTORY" in os.environ
        identity = credential("identity").decode() if handed else sys.stdin.readline()
    if options.background:
        pairs = {"from": options.source, "time": options.time, "lsn": options.lsn, "point": options.point}
        pairs |= {"dump": options.dump, "repository": options.repository, "port": options.port}
        arguments = [f"--{name}={value}" for name, value in pairs.items() if value]
        restore.begin(settings, arguments, identity.strip(), options.port)
        return ExitCode.OK
    if options.source == "dump":
        print(restore.restore_dump(settings, options.dump, identity.strip(), options.port))
    else:
        target = restore.Target(options.time, options.lsn, options.point)
        print(restore.restore_base(settings, target, options.repository, options.port))
    return ExitCode.OK


def _promote(settings: Settings, options: argparse.Namespace) -> int:
    print(restore.promote(settings, options.port, accept_gap=options.accept_gap))
    return ExitCode.OK


def _discard(settings: Settings, options: argparse.Namespace) -> int:
    print(restore.discard(settings, options.port, incomplete=options.incomplete))
    return ExitCode.OK


def _progress(settings: Settings, options: argparse.Namespace) -> int:
    wait_for(lambda: restore.progress(settings)["phase"] in ("done", "failed", "none"), options.wait)
    print(json.dumps(restore.progress(settings)))
    return ExitCode.OK
