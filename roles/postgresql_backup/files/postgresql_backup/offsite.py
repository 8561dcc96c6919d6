"""Copies of the dumps on another host or in an object store; rclone moves the bytes.

A copy is whole when its manifest is there: the manifest is sent last. Base backups and WAL go to the second repository
by pgBackRest itself.
"""

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

from postgresql_backup import dumps
from postgresql_backup.errors import DamagedError, RefusedError
from postgresql_backup.settings import Settings
from postgresql_backup.tools import check_room, lock, run, utc, write_json


def state(settings: Settings) -> dict[str, Any]:
    """Return what was there after the last copy (newest, count, at); empty when none was made to this place."""
    try:
        found: dict[str, Any] = json.loads(_state_file(settings).read_bytes())
    except (OSError, ValueError):
        return {}
    return found if found.get("place") == settings.offsite else {}


def copy(settings: Settings, config: str) -> list[str]:
    """Send what is missing there, the newest first, remove what no rule keeps there; return the names sent.

    Raises BackupError.
    """
    directory = Path(settings.dumps)
    rclone = [*_rclone(settings, config), "--low-level-retries=3", "--retries=2"]
    with lock(directory / ".copy-lock"):
        stored = _stored(rclone, settings.offsite)
        there = _whole(stored)
        wanted = dumps.kept(dumps.names(directory), settings.retention) - there
        for name in sorted(stored.keys() - there - wanted):  # a copy or a removal that was broken off
            _run([*rclone, "purge", f"{settings.offsite}/{name}"])
        sent, problems = [], []
        for name in sorted(wanted, reverse=True):
            try:
                with dumps.unless_gone(directory / name):
                    _send(rclone, directory / name, f"{settings.offsite}/{name}")
                    sent.append(name)
                    there.add(name)
            except DamagedError as error:  # it must not keep the good ones here
                problems.append(str(error))
        for name in sorted(there - dumps.kept(there, settings.retention)):
            _run([*rclone, "purge", f"{settings.offsite}/{name}"])
            there.remove(name)
        write_json(
            _state_file(settings),
            {
                "place": settings.offsite,
                "newest": max(there, default=""),
                "count": len(there),
                "at": utc(time.time()).isoformat(),
            },
        )
    if problems:
        raise DamagedError("; ".join(problems))
    return sent


def fetch(settings: Settings, config: str, name: str = "") -> Path:
    """Bring a dump (the newest, unless named) back from its copy; return its directory.

    A damaged one of that name is kept as `.damaged-<name>`; a good one stays. Raises BackupError.
    """
    rclone = _rclone(settings, config)
    stored = _stored(rclone, settings.offsite)
    there = sorted(_whole(stored))
    name = name or max(there, default="")
    if name not in there:
        raise RefusedError(
            f"{settings.offsite} holds no dump {name or 'at all'}; it holds {', '.join(there) or 'none'}"
        )
    directory = Path(settings.dumps)
    target = directory / name
    with lock(directory / ".lock"):
        if target.exists() and dumps.is_whole(target):
            return target
        check_room(directory, sum(stored[name].values()), "the dump")
        partial = directory / f"{dumps.PARTIAL}{name}"
        _run([*rclone, "copy", f"{settings.offsite}/{name}", str(partial)])
        manifest = dumps.load(partial, name)
        dumps.check_files(partial, manifest)
        if target.exists():
            damaged = directory / f"{dumps.DAMAGED}{name}"
            shutil.rmtree(damaged, ignore_errors=True)
            target.rename(damaged)
        dumps.promote(partial, directory, manifest)
    return target


def _state_file(settings: Settings) -> Path:
    return Path(settings.dumps) / ".offsite.json"


def _rclone(settings: Settings, config: str) -> list[str]:
    return ["rclone", f"--config={config}", "--contimeout=15s", *settings.offsite_options]


def _run(command: list[str]) -> str:
    """Run rclone, which finds the key of the store beside its configuration."""
    return run(
        command, extra={"CREDENTIALS_DIRECTORY": os.environ.get("CREDENTIALS_DIRECTORY", ""), "HOME": "/nonexistent"}
    )


def _stored(rclone: list[str], remote: str) -> dict[str, dict[str, int]]:
    """Return the names of the copies, whole or not, with their files and sizes."""
    _run([*rclone, "mkdir", remote])
    listed = json.loads(_run([*rclone, "lsjson", "--recursive", "--files-only", "--no-modtime", remote]) or "[]")
    found: dict[str, dict[str, int]] = {}
    for file in listed:
        name, _, path = str(file["Path"]).partition("/")
        if dumps.NAME.match(name):
            found.setdefault(name, {})[path] = int(file["Size"])
    return found


def _whole(stored: dict[str, dict[str, int]]) -> set[str]:
    """Return the names of the whole copies: the manifest is sent last."""
    return {name for name, files in stored.items() if "manifest.json" in files}


def _send(rclone: list[str], folder: Path, target: str) -> None:
    """Send a dump that is whole, its manifest last. Raises BackupError."""
    manifest = dumps.load(folder)
    dumps.check_files(folder, manifest)
    _run([*rclone, "copy", "--exclude=manifest.json", str(folder), target])
    _compare(rclone, target, manifest)
    _run([*rclone, "copyto", str(folder / "manifest.json"), f"{target}/manifest.json"])


def _compare(rclone: list[str], target: str, manifest: dumps.Manifest) -> None:
    sizes = {
        file["Path"]: file["Size"]
        for file in json.loads(_run([*rclone, "lsjson", "--files-only", "--no-modtime", target]))
    }
    for name, wanted in manifest.files.items():
        if sizes.get(name) != wanted["size"]:
            raise DamagedError(f"{target}/{name} has {sizes.get(name, 0)} bytes instead of {wanted['size']}")
