"""The spool: append-only files between the gateway's processes and the writer.

    <directory>/
      format                      "1": of another version, nothing here touches it
      writer.lock                 held by the writer
      state.json                  the writer's cursor of each producer and its counters
      producers/<uuid>/           one per gateway process, so that none waits for another
        lock                      held while the process lives
        0000000001.seg ...        frames; only the last one grows
        counters.json             the process's own counters (`Counters`)
      dead/                       what PostgreSQL refused for good, with the reason
      retired/<uuid>/             delivered segments, for `spool.retain` seconds (retention.py)
      acknowledged.json           losses that an operator knows of (status.py)

A producer only appends; the writer only reads and unlinks, and adds a last segment once the process is gone. What
counts as delivered is what the database committed: the writer moves its cursor behind it, durably, and then retires the
segments that lie before the cursor.
"""

import contextlib
import errno
import fcntl
import logging
import os
import re
import stat
from bisect import bisect_left
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Literal, Self

import orjson

from litellm_sqlalchemy.errors import LockedError, SpoolError

_log = logging.getLogger(__name__)

FORMAT = "1"
#: Bytes of a counter file: padded, so that writing it again needs no space on a full disk.
COUNTERS_SIZE = 1024
_ERROR_LENGTH = 100
#: The writer's memory, and bytes kept allocated for its next version: on a full disk the writer makes room.
STATE_FILE = "state.json"
_STATE_RESERVE = 256 * 1024  # some 7,000 calls that are running
_SEGMENT_NAME = re.compile(r"(\d{10})\.seg")
#: Upper bounds, in seconds, of what the time of a hook is counted in; the last one is open.
HOOK_SECONDS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.1, 1.0)


def open_directory(directory: Path, *, create: bool = False) -> Path:
    """Check that the spool directory can be used and is of this version; return it. Raises SpoolError.

    `create` makes what belongs in an empty one; readers leave that to those that write to it, who own it then.
    """
    if not directory.is_dir():
        raise SpoolError(f"spool directory {directory} does not exist: create it, or set `spool.directory`")
    if not os.access(directory, os.R_OK | os.W_OK | os.X_OK):
        raise SpoolError(f"spool directory {directory} is not writable for uid {os.geteuid()}: check owner and mode")
    marker = directory / "format"
    try:
        found = read_file(marker).decode(errors="replace").strip()
    except FileNotFoundError:
        found = FORMAT
        if create:
            _initialise(directory)
    except OSError as error:
        raise SpoolError(f"{marker} cannot be read: {error.strerror}") from None
    if found != FORMAT:
        raise SpoolError(
            f"spool directory {directory} has format {found!r:.20}, this version reads {FORMAT!r}: "
            "drain it with the version that wrote it, or set another `spool.directory`"
        )
    return directory


def _initialise(directory: Path) -> None:
    try:
        for name in ("producers", "dead"):
            with contextlib.suppress(FileExistsError):
                make_directory(directory / name)
        reserve_space(directory / STATE_FILE)
        replace_file(directory / "format", FORMAT.encode())
    except OSError as error:
        raise SpoolError(f"spool directory {directory} cannot be written: {error.strerror}") from None


def make_directory(directory: Path) -> None:
    """Make a directory for whoever may use its parent. Raises OSError."""
    directory.mkdir()
    _share(directory, 0o7770)


def make_file(file: Path, flags: int) -> int:
    """Open a file, which may be new, for whoever may use its directory; return its descriptor. Raises OSError."""
    descriptor = os.open(file, flags | os.O_CREAT, 0o600)
    try:
        if os.fstat(descriptor).st_uid == os.geteuid():
            _share(descriptor, 0o660, file.parent)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _share(made: Path | int, mask: int, parent: Path | None = None) -> None:
    """Give what was made the owner and the mode of the directory around it.

    Gateway, writer and root's commands are different users that share the spool, whatever their umask is; nobody else.
    """
    around = os.stat(parent or Path(str(made)).parent)
    mode, has = around.st_mode & mask, os.stat(made)
    if (has.st_uid, has.st_gid) != (around.st_uid, around.st_gid) and os.geteuid() == 0:
        os.chown(made, around.st_uid, around.st_gid)
    if has.st_mode & 0o7777 != mode:
        os.chmod(made, mode)


def open_file(file: Path, mode: Literal["rb", "r+b"] = "rb") -> BinaryIO:
    """Open a file of the spool, never a link, nor a pipe that would be waited at. Raises OSError.

    What is no frame goes to the dead letters: a link of the gateway's to the writer's password would bring it there.
    """
    return open(file, mode, opener=_open_regular)


def read_file(file: Path) -> bytes:
    """Return what a file of the spool holds, opened likewise. Raises OSError."""
    with open_file(file) as opened:
        return opened.read()


def _open_regular(name: str, flags: int) -> int:
    descriptor = os.open(name, flags | os.O_NOFOLLOW | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "Not a regular file", str(name))
    return descriptor


def replace_file(file: Path, content: bytes, *, reserved: bool = False) -> None:
    """Put `content` in the place of `file`, atomically and durably; on an error `file` stays as it was.

    `reserved` uses what `reserve_space` has allocated.
    """
    temporary = _reserve(file) if reserved else file.with_name(f".{file.name}.{os.getpid()}")
    descriptor = make_file(temporary, os.O_WRONLY)
    try:
        written = 0
        while written < len(content):
            written += os.write(descriptor, content[written:])
        os.ftruncate(descriptor, written)
        os.fsync(descriptor)
    except OSError:
        if not reserved:
            temporary.unlink()
        raise
    finally:
        os.close(descriptor)
    os.replace(temporary, file)
    sync_directory(file.parent)


def reserve_space(file: Path) -> None:
    """Allocate what the next `replace_file` of `file` needs, as far as the disk allows."""
    try:
        descriptor = make_file(_reserve(file), os.O_WRONLY)
        try:
            os.posix_fallocate(descriptor, 0, _STATE_RESERVE)
        finally:
            os.close(descriptor)
    except OSError as error:
        _log.warning("no space can be reserved for %s: %s", file, error.strerror)


def _reserve(file: Path) -> Path:
    return file.with_name(f".{file.name}")


def sync_directory(directory: Path) -> None:
    """Make the names in a directory durable."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Lock:
    """An exclusive lock on a file, held until the process ends or `release` is called."""

    def __init__(self, file: Path) -> None:
        """Take the lock. Raises LockedError that names the holder's process."""
        self._descriptor = make_file(file, os.O_RDWR)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(self._descriptor, 64).decode(errors="replace").strip() or "unknown"
            os.close(self._descriptor)
            raise LockedError(f"{file} is held by process {holder}: stop it first, or let it work") from None
        with contextlib.suppress(OSError):  # on a full disk the holder has no name
            os.ftruncate(self._descriptor, 0)
            os.pwrite(self._descriptor, f"{os.getpid()}\n".encode(), 0)

    def release(self) -> None:
        """Give the lock back."""
        os.close(self._descriptor)


def has_ended(folder: Path) -> bool:
    """Return whether the process that wrote a producer's folder is gone."""
    try:
        descriptor = os.open(folder / "lock", os.O_RDWR)
    except FileNotFoundError:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)  # shared: others may ask at the same time
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)
    return True


@dataclass
class HookTimes:
    """What the callback's hooks did: calls that ended, hooks that failed, their time in all and by `HOOK_SECONDS`."""

    calls: int = 0
    failures: int = 0
    seconds: float = 0.0
    counts: list[int] = field(default_factory=lambda: [0] * (len(HOOK_SECONDS) + 1))

    def add(self, seconds: float) -> None:
        """Count a hook."""
        self.seconds += seconds
        self.counts[bisect_left(HOOK_SECONDS, seconds)] += 1

    def __iadd__(self, other: "HookTimes") -> Self:
        """Add those of another process."""
        self.calls += other.calls
        self.failures += other.failures
        self.seconds += other.seconds
        self.counts = [one + more for one, more in zip(self.counts, other.counts, strict=True)]
        return self


@dataclass
class Counters:
    """What a producer has done: frames that it wanted to write, those it had to drop, and what its callback tells.

    unsynced: calls that went on, with `spool.fsync: always`, before their record was durable.
    """

    received: int = 0
    dropped: int = 0
    unsynced: int = 0
    hooks: HookTimes = field(default_factory=HookTimes)
    last_error: str = ""

    def encode(self) -> bytes:
        """Return the content of `counters.json`, always of the same size."""
        error = re.sub(r"[^ -~]", "?", self.last_error)[:_ERROR_LENGTH]
        content = {**vars(self), "hooks": vars(self.hooks), "last_error": error}
        return orjson.dumps(content).ljust(COUNTERS_SIZE)


def read_counters(folder: Path) -> Counters:
    """Return the counters that the process of a producer's folder wrote; zeros for what it did not write."""
    try:
        content = orjson.loads(read_file(folder / "counters.json"))
        received, dropped, unsynced = (int(content.get(name, 0)) for name in ("received", "dropped", "unsynced"))
        return Counters(received, dropped, unsynced, HookTimes(**content.get("hooks", {})))
    except (OSError, ValueError, TypeError, AttributeError):  # none, or damaged
        return Counters()


def segments(folder: Path) -> list[tuple[int, Path]]:
    """Return the segments of a producer's folder by number. Raises OSError."""
    found = ((_SEGMENT_NAME.fullmatch(name), name) for name in os.listdir(folder))
    return sorted((int(match[1]), folder / name) for match, name in found if match)


def producers(directory: Path, place: str = "producers") -> list[str]:
    """Return the producers that have a folder, oldest first; a name that nobody can print is none of theirs."""
    try:
        return sorted(name for name in os.listdir(directory / place) if name[0] != "." and name.isprintable())
    except FileNotFoundError:
        return []


def dead_letters(directory: Path) -> list[Path]:
    """Return the files of the dead letters. Raises OSError."""
    try:
        return [directory / "dead" / name for name in os.listdir(directory / "dead") if name.endswith(".json")]
    except FileNotFoundError:
        return []


def spool_size(directory: Path) -> int:
    """Return the size in bytes of all segments that are not delivered yet, or not wholly."""
    size = 0
    for producer in producers(directory):
        with contextlib.suppress(FileNotFoundError), os.scandir(directory / "producers" / producer) as entries:
            for entry in entries:
                if entry.name.endswith(".seg"):
                    with contextlib.suppress(FileNotFoundError):  # unlinked by the writer meanwhile
                        size += entry.stat().st_size
    return size
