"""Programs that do the work, locks and files that appear whole or not at all."""

import fcntl
import hashlib
import json
import os
import pwd
import re
import shutil
import stat
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any

from postgresql_backup.errors import LockedError, RefusedError, ToolError

_BLOCK = 1024 * 1024
#: Bytes that a cluster takes beside its data while it is restored: an empty one, and WAL. The live one shares the disk.
CLUSTER_ROOM = 1e9
#: Seconds.
_LONGEST_REST = 5.0


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the environment of a program: untranslated, with `extra`."""
    return {"PATH": "/usr/bin:/bin:/usr/sbin:/sbin", "LC_ALL": "C.UTF-8", **(extra or {})}


def run(
    command: Sequence[str],
    *,
    extra: Mapping[str, str] | None = None,
    stdin: bytes | None = None,
    user: str = "",
) -> str:
    """Run a program and return what it printed; `user` is whom root becomes for it. Raises ToolError."""
    identity: dict[str, Any] = {"user": user, "group": user, "extra_groups": []} if user and not os.geteuid() else {}
    try:
        done = subprocess.run(
            command, input=stdin, capture_output=True, env=environment(extra), check=False, cwd="/", **identity
        )
    except OSError as error:
        raise _not_run(command, error) from None
    if done.returncode:
        raise ToolError(f"{Path(command[0]).name} failed: {last_words(done.stderr, done.stdout, done.returncode)}")
    return (done.stdout or b"").decode(errors="replace")


@contextmanager
def running(
    command: Sequence[str], what: str, *, extra: Mapping[str, str] | None = None, **streams: Any
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a program beside the block, which kills it by raising. Raises ToolError: `what`, and its last words."""
    with TemporaryFile() as errors:
        try:
            process = subprocess.Popen(command, stderr=errors, env=environment(extra), cwd="/", **streams)
        except OSError as error:
            raise _not_run(command, error) from None
        try:
            yield process
        except BaseException:
            process.kill()
            raise
        finally:
            code = process.wait()
        if code:
            errors.seek(0)
            raise ToolError(f"{what}: {last_words(errors.read(), None, code).removeprefix('age: error: ')}")


def _not_run(command: Sequence[str], error: OSError) -> ToolError:
    return ToolError(f"{command[0]} cannot be run: {error.strerror}; playbooks/backup.yml installs what is missing")


def last_words(stderr: bytes | None, stdout: bytes | None, code: int) -> str:
    """Return the line of a program's output that says best why it failed."""
    lines = [line.strip() for line in (stderr or stdout or b"").decode(errors="replace").splitlines() if line.strip()]
    telling = [line for line in lines if "ERROR" in line or "error:" in line or "FATAL" in line]
    return (telling or lines or [f"exit status {code}"])[0 if telling else -1][:500]


def last_error(log: str, levels: str) -> str:
    """Return the line of a server's log that says last of an error, of levels such as `FATAL|PANIC`.

    That it refuses connections while it starts, recovers or stops is no error: whoever waits for it asks for them.
    """
    lines = log.splitlines()
    telling = [line for line in lines if re.search(rf"\b(?:{levels})\b(?!:  the database system is )", line)]
    return (telling or lines or ["its log is empty"])[-1][:400]


class Hashed:
    """Writes through to a file while it counts and hashes."""

    def __init__(self, file: IO[bytes] | None = None) -> None:
        self._file, self._hash, self.size = file, hashlib.sha256(), 0

    def write(self, data: bytes) -> None:
        """Take a block."""
        self._hash.update(data)
        self.size += len(data)
        if self._file is not None:
            self._file.write(data)

    @property
    def sha256(self) -> str:
        """SHA-256 of all blocks, in hexadecimal."""
        return self._hash.hexdigest()


class Pace:
    """Spreads work over time: whoever works rests in between, so that `share` of the time is work."""

    def __init__(self, share: float = 1) -> None:
        """Start to work; `share` is more than 0 and at most 1, which never rests."""
        self._share, self._since = share, time.monotonic()

    def rest(self) -> None:
        """Rest for as long as the work since the last rest asks for, at most some seconds: it may have been a wait."""
        time.sleep(min((time.monotonic() - self._since) * (1 / self._share - 1), _LONGEST_REST))
        self._since = time.monotonic()


def pump(source: IO[bytes], *targets: Hashed | IO[bytes], pace: Pace | None = None) -> None:
    """Copy a stream into every target; what fills the stream rests, too, when the pipe between is full."""
    while block := source.read(_BLOCK):
        for target in targets:
            target.write(block)
        if pace:
            pace.rest()


def hash_file(file: Path, pace: Pace | None = None) -> Hashed:
    """Return size and SHA-256 of a file."""
    hashed = Hashed()
    with file.open("rb") as source:
        pump(source, hashed, pace=pace)
    return hashed


def write_file(file: Path, content: bytes, mode: int = 0o640) -> None:
    """Put `content` in the place of `file`, atomically and durably."""
    check_directory(file.parent)
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    temporary.unlink(missing_ok=True)
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, mode)
    with os.fdopen(descriptor, "wb") as target:
        os.fchmod(descriptor, mode)
        target.write(content)
        target.flush()
        os.fsync(descriptor)
    temporary.replace(file)
    sync_directory(file.parent)


def check_directory(directory: Path) -> None:
    """Raise RefusedError when somebody else could put a link where this process is going to write."""
    status = directory.lstat()
    trusted = status.st_uid in (0, os.geteuid()) and not status.st_mode & 0o022
    if not (stat.S_ISDIR(status.st_mode) and trusted):
        raise RefusedError(
            f"{directory} can be written by others (owner {status.st_uid}, mode {stat.filemode(status.st_mode)}): "
            "nothing is written there; playbooks/backup.yml puts it right"
        )


def read_file(file: Path, owner: str) -> bytes:
    """Read a file out of another user's directory: only what is a file and his own. Raises RefusedError."""
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        raise RefusedError(f"{file} is not read: {error.strerror}") from None
    with os.fdopen(descriptor, "rb") as source:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_uid != pwd.getpwnam(owner).pw_uid:
            raise RefusedError(f"{file} is not read: it is no file of {owner}")
        return source.read()


def write_json(file: Path, content: Any) -> None:
    """Write JSON for people and programs."""
    write_file(file, json.dumps(content, indent=1, sort_keys=True).encode() + b"\n")


def check_room(directory: Path, needed: float, what: str) -> None:
    """Raise RefusedError when a file system has not the room that something is going to take."""
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise RefusedError(
            f"{directory} has {megabytes(free)} free, {what} needs {megabytes(needed)}: nothing was begun; make room"
        )


def sync_directory(directory: Path) -> None:
    """Make the names in a directory durable."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def lock(file: Path, *, wait: bool = False) -> Iterator[None]:
    """Hold an exclusive lock; `wait` waits for it. Raises LockedError that names the holder and its age."""
    check_directory(file.parent)
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o640)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            holder = os.read(descriptor, 64).decode(errors="replace").strip() or "unknown"
            age = int(time.time() - os.fstat(descriptor).st_mtime)
            raise LockedError(f"{file} is held by process {holder} since {age} s: wait for it to end") from None
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(descriptor)


@contextmanager
def acting_as(user: str) -> Iterator[None]:
    """Let root be another user for a while; anybody else stays who he is."""
    if os.geteuid():
        yield
        return
    entry = pwd.getpwnam(user)
    os.setegid(entry.pw_gid)
    os.seteuid(entry.pw_uid)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)


def wait_for(condition: Callable[[], bool], seconds: float, interval: float = 0.2) -> bool:
    """Wait until a condition holds; return whether it does."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(interval)
    return True


def utc(moment: datetime | float) -> datetime:
    """Return a moment in UTC without fractions of a second."""
    if isinstance(moment, (int, float)):
        moment = datetime.fromtimestamp(moment, UTC)
    return moment.astimezone(UTC).replace(microsecond=0)


def duration(seconds: float) -> str:
    """Say a duration in the two units that matter."""
    seconds = int(seconds)
    for unit, size, smaller, smaller_size in (("d", 86400, "h", 3600), ("h", 3600, "min", 60), ("min", 60, "s", 1)):
        if seconds >= size:
            rest = seconds % size // smaller_size
            return f"{seconds // size} {unit}" + (f" {rest} {smaller}" if rest else "")
    return f"{seconds} s"


def megabytes(size: float) -> str:
    """Say a size in MB."""
    return f"{size / 1e6:.1f} MB"
