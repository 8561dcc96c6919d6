"""The stored dumps: one directory each, named by the database's clock, with a manifest; and which of them are kept.

<dumps>/20261123T120000Z/manifest.json, <database>.dump.age, globals.sql.age, configuration.tar.age
<dumps>/.partial-...                    a dump that is being written, or one that was interrupted
<dumps>/.damaged-...                    a dump that its off-host copy has replaced, to be looked at
"""

import json
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from postgresql_backup.errors import BackupError, DamagedError, RefusedError
from postgresql_backup.tools import Pace, hash_file, sync_directory, write_json

FORMAT = 1
NAME = re.compile(r"^\d{8}T\d{6}Z$")
PARTIAL = ".partial-"
DAMAGED = ".damaged-"
_NAME_FORMAT = "%Y%m%dT%H%M%SZ"
#: What two moments share when they are in the same hour, day, week or month.
_PERIODS = {"hourly": "%Y%m%d%H", "daily": "%Y%m%d", "weekly": "%G%V", "monthly": "%Y%m"}


@dataclass
class Manifest:
    """What a dump holds; all times are the database's clock in UTC (ISO 8601), sizes are bytes."""

    name: str
    started_at: str
    ended_at: str
    server_version: str
    tool_version: str
    system_identifier: str
    databases: dict[str, dict[str, Any]] = field(default_factory=dict)
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    format: int = FORMAT

    @property
    def moment(self) -> datetime:
        """When the dump was begun."""
        return datetime.fromisoformat(self.started_at)

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file["size"] for file in self.files.values())

    @property
    def rows(self) -> int:
        """Rows of all tables."""
        return sum(table["rows"] for database in self.databases.values() for table in database["tables"].values())


def name_of(moment: datetime) -> str:
    """Return the name of a dump that was begun at a moment."""
    return moment.astimezone(UTC).strftime(_NAME_FORMAT)


def names(directory: Path) -> list[str]:
    """Return the names of the stored dumps, oldest first."""
    return sorted(entry.name for entry in directory.iterdir() if NAME.match(entry.name))


def load(folder: Path, name: str = "") -> Manifest:
    """Read the manifest of a dump, whose name is the folder's unless given. Raises DamagedError."""
    name = name or folder.name
    try:
        manifest = Manifest(**json.loads((folder / "manifest.json").read_bytes()))
        if manifest.format != FORMAT or manifest.name != name or not manifest.files:
            raise ValueError(f"format {manifest.format}, name {manifest.name}, {len(manifest.files)} files")
        _ = manifest.moment, manifest.size, manifest.rows
        # The names become paths, for root too.
        if odd := [word for word in (*manifest.files, *manifest.databases) if word in ("", ".", "..") or "/" in word]:
            raise ValueError(f"{odd[0]!r} is no name")
    except OSError as error:
        raise DamagedError(f"dump {name} has no manifest that can be read: {error.strerror}") from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DamagedError(f"dump {name} has a damaged manifest ({error})") from None
    return manifest


def save(folder: Path, manifest: Manifest) -> None:
    """Write a dump's manifest."""
    write_json(folder / "manifest.json", asdict(manifest))


def newest(directory: Path) -> Manifest:
    """Return the manifest of the newest dump. Raises DamagedError."""
    found = names(directory)
    if not found:
        raise DamagedError(f"there is no dump in {directory}: systemctl start postgresql-backup-dump.service")
    return load(directory / found[-1])


def check_files(folder: Path, manifest: Manifest, pace: Pace | None = None) -> None:
    """Compare every file with the manifest. Raises DamagedError that names the first that differs."""
    for name, wanted in manifest.files.items():
        file = folder / name
        try:
            size = file.stat().st_size
        except OSError as error:
            raise DamagedError(f"dump {manifest.name}: {name}: {error.strerror}") from None
        if size != wanted["size"]:
            kind = "empty" if not size else "truncated" if size < wanted["size"] else "too long"
            raise DamagedError(f"dump {manifest.name}: {name} is {kind}: {size} bytes instead of {wanted['size']}")
        if hash_file(file, pace).sha256 != wanted["sha256"]:
            raise DamagedError(f"dump {manifest.name}: {name} was changed: its SHA-256 is not the manifest's")


def promote(partial: Path, directory: Path, manifest: Manifest) -> Path:
    """Give a whole and verified dump its name."""
    target = directory / manifest.name
    sync_directory(partial)
    partial.rename(target)
    sync_directory(directory)
    return target


def remove_partial(directory: Path) -> list[str]:
    """Remove what interrupted runs left; only with the lock held."""
    found = [entry for entry in directory.iterdir() if entry.name.startswith(PARTIAL)]
    for entry in found:
        shutil.rmtree(entry)
    return [entry.name for entry in found]


def kept(found: Iterable[str], retention: dict[str, int]) -> set[str]:
    """Return which dumps stay: the newest of each of the last N hours, days, weeks and months that have any.

    Periods are counted where dumps are, not back from now: no clock, however wrong, makes a dump too old.
    """
    if unknown := retention.keys() - _PERIODS.keys():
        raise RefusedError(f"unknown retention {sorted(unknown)[0]}: known are {', '.join(_PERIODS)}")
    newest_first = sorted(found, reverse=True)
    stay = set(newest_first[:1])
    for rule, count in retention.items():
        seen: dict[str, str] = {}
        for name in newest_first:
            moment = datetime.strptime(name, _NAME_FORMAT).replace(tzinfo=UTC)
            seen.setdefault(moment.strftime(_PERIODS[rule]), name)
        stay.update(list(seen.values())[:count])
    return stay


def _fits(folder: Path) -> bool:
    """Return whether a dump has all its files, by their sizes."""
    try:
        manifest = load(folder)
        return all((folder / file).stat().st_size == wanted["size"] for file, wanted in manifest.files.items())
    except (DamagedError, OSError):
        return False


def is_whole(folder: Path) -> bool:
    """Return whether a dump's files are what its manifest says."""
    try:
        check_files(folder, load(folder))
    except DamagedError:
        return False
    return True


@contextmanager
def unless_gone(folder: Path) -> Iterator[None]:
    """Let the block fail in silence when retention has removed the dump meanwhile."""
    try:
        yield
    except (BackupError, OSError):
        if folder.exists():
            raise


def prune(directory: Path, retention: dict[str, int]) -> list[str]:
    """Remove the dumps that no rule keeps; return their names.

    Only dumps that have all their files count, and the newest of them is one whose files were read and are what its
    manifest says: a damaged newest dump never drives out the last good one. A damaged dump is left for the operator to
    look at, and reported by `status`.
    """
    good = [name for name in names(directory) if _fits(directory / name)]
    while good and not is_whole(directory / good[-1]):
        good.pop()
    removed = sorted(set(good) - kept(good, retention))
    for name in removed:
        grave = directory / f"{PARTIAL}pruned-{name}"
        (directory / name).rename(grave)  # gone in one step, whatever interrupts the rest
        shutil.rmtree(grave)
    return removed
