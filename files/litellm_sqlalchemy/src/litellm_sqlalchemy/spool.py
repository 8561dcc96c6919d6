"""The spool: append-only files between the gateway's processes and the writer.

    <directory>/
      format                      "1": of another version, nothing here touches it
      writer.lock                 held by the writer
      state.json                  the writer's cursor of each producer and its counters
      producers/<uuid>/           one per gateway process, so that none waits for another
        lock                      held while the process lives
        0000000001.seg ...        frames; only the last one grows
        counters.json             the process's own counters: what it wanted to write, what it had to drop
      dead/                       what PostgreSQL refused for good, with the reason
      retired/<uuid>/             delivered segments, for `spool.retain` seconds (retention.py)

A producer only appends; the writer only reads and unlinks. What counts as delivered is what the database committed:
the writer moves its cursor behind it, durably, and then retires the segments that lie before the cursor.
"""

import contextlib
import errno
import fcntl
import json
import logging
import os
import threading
import time
from asyncio import AbstractEventLoop, Future, get_running_loop
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from litellm_sqlalchemy import frames
from litellm_sqlalchemy.errors import LockedError, SpoolError, SpoolFull
from litellm_sqlalchemy.frames import Frame, Kind
from litellm_sqlalchemy.identifiers import uuid7
from litellm_sqlalchemy.settings import SpoolSettings

_log = logging.getLogger(__name__)

FORMAT = "1"
#: Seconds between two attempts to write to a disk that failed, two looks at a spool that is full, two counter files.
_RETRY_INTERVAL = 1.0
_FULL_INTERVAL = 0.1
_COUNTERS_INTERVAL = 5.0
#: Bytes of a counter file: padded, so that writing it again needs no space on a full disk.
_COUNTERS_SIZE = 512
#: In a folder of requeued dead letters: the names of those it was made of.
REQUEUED_FILE = "requeued.json"
#: Part of `max_size` that a producer claims at once; with `when_full: refuse`, half of it has to be left for the frames
#: of calls that were accepted.
_PART = 32
#: The writer's memory, and bytes kept allocated for its next version: on a full disk the writer makes room.
STATE_FILE = "state.json"
_STATE_RESERVE = 64 * 1024


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
        found = marker.read_text(errors="replace").strip()
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
            (directory / name).mkdir(exist_ok=True)
        reserve_space(directory / STATE_FILE)
        replace_file(directory / "format", FORMAT.encode())
    except OSError as error:
        raise SpoolError(f"spool directory {directory} cannot be written: {error.strerror}") from None


def replace_file(file: Path, content: bytes, *, reserved: bool = False) -> None:
    """Put `content` in the place of `file`, atomically and durably; on an error `file` stays as it was.

    `reserved` uses what `reserve_space` has allocated.
    """
    temporary = _reserve(file) if reserved else file.with_name(f".{file.name}.{os.getpid()}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT, 0o660)
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
        descriptor = os.open(_reserve(file), os.O_WRONLY | os.O_CREAT, 0o660)
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
        self._descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o660)
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


class _Segment:
    """A file that a producer appends to."""

    def __init__(self, file: Path) -> None:
        self.folder = file.parent
        self.descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o660)
        self.size = 0
        self.unsynced: list[bytes] = []
        self.named = False  # whether the file's name is durable

    def append(self, data: bytes) -> None:
        """Write all of `data` or, as far as the disk allows, nothing of it. Raises OSError."""
        written = os.write(self.descriptor, data)
        if written != len(data):
            os.ftruncate(self.descriptor, self.size)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.size += written
        self.unsynced.append(data)

    def sync(self) -> None:
        """Make what was appended durable. Raises OSError, after which the descriptor must not be synced again."""
        os.fdatasync(self.descriptor)
        if not self.named:
            sync_directory(self.folder)
            sync_directory(self.folder.parent)
            self.named = True

    def close(self) -> None:
        """Close the file."""
        os.close(self.descriptor)


class Producer:
    """Appends the frames of one gateway process to its own segments; used by one thread.

    `append` writes and returns; a thread makes durable what was written, within `fsync_interval` or, with `always`, at
    once: whoever awaits `synced` waits for that. No method raises because of the disk: what
    cannot be written is counted in `dropped`. With `when_full: refuse`, `check_space` tells the caller to refuse a
    call before it is accepted.
    """

    def __init__(self, settings: SpoolSettings) -> None:
        """Take the policy; the directory is opened by the first frame."""
        self._settings = settings
        self._name = str(uuid7())
        self._folder: Path | None = None
        self._lock: Lock | None = None
        self._counters: int | None = None  # descriptor of counters.json
        self._number = 0
        self._retry_at = 0.0
        self._measure_at = 0.0
        self._room = 0  # bytes that may be appended before the spool is measured again
        self._segment: _Segment | None = None
        self._sealed: list[_Segment] = []
        self._rewrite: list[bytes] = []  # what a failed fsync may have lost
        self._waiting: list[tuple[AbstractEventLoop, Future[None]]] = []
        self._guard = threading.Lock()  # for all above
        self._dirty = threading.Event()
        self._closed = threading.Event()
        self.received = 0
        self.dropped = 0
        self.last_error = ""
        self.calls = 0  # told by the callback: calls that have ended, and the seconds that its hooks took
        self.seconds = 0.0
        self._thread = threading.Thread(target=self._sync_loop, name="litellm-sqlalchemy-sync", daemon=True)
        self._thread.start()

    def append(self, kind: Kind, metadata: bytes, payload: bytes = b"") -> bool:
        """Append one frame; return whether it stands in the spool."""
        with self._guard:
            self.received += 1
            try:
                self._append(frames.encode(Frame(kind, self.received, metadata, payload), frames.seed_of(self._name)))
            except (OSError, SpoolError) as error:
                self._drop(error)
                return False
        self._dirty.set()
        return True

    def skip(self) -> None:
        """Count a frame that is not written because the one it belongs to was dropped."""
        with self._guard:
            self.received += 1
            self.dropped += 1
            self._write_counters()

    async def synced(self) -> None:
        """With `fsync: always`, wait until all that was appended is on disk; otherwise return at once."""
        if self._settings.fsync != "always":
            return
        loop = get_running_loop()
        future: Future[None] = loop.create_future()
        with self._guard:
            self._waiting.append((loop, future))
        self._dirty.set()
        await future

    def check_space(self) -> None:
        """Raise SpoolError where the policy is to refuse calls that cannot be logged, and they cannot be."""
        if self._settings.when_full != "refuse":
            return
        try:
            with self._guard:
                self._open_segment()
                self._claim((self._settings.max_size or 0) // (2 * _PART))
            disk = os.statvfs(self._settings.directory)
        except OSError as error:
            raise SpoolError(f"spool directory {self._settings.directory}: {error.strerror}") from None
        if disk.f_bavail * disk.f_frsize < self._settings.segment_size:
            raise SpoolFull(f"less than `spool.segment_size` is free in {self._settings.directory}")

    def close(self) -> None:
        """Make all durable and let go of the lock."""
        self._closed.set()
        self._dirty.set()
        self._thread.join()
        with self._guard:
            if self._segment is not None:
                self._segment.close()
                self._segment = None
            self._leave()

    def _append(self, data: bytes) -> None:
        segment = self._open_segment()
        try:
            self._claim(len(data))
        except SpoolFull:
            if segment.size:  # an empty one behind it: the writer can then remove what is delivered of this one
                self._seal(segment)
                self._segment = self._next_segment()
            raise
        try:
            segment.append(data)
        except OSError as error:
            self._retry_at = time.monotonic() + _RETRY_INTERVAL
            if segment.size or error.errno != errno.ENOSPC:
                self._seal(segment)
            raise
        self._room -= len(data)

    def _open_segment(self) -> _Segment:
        """Return the segment to append to, a new one where there is none or it is full."""
        now = time.monotonic()
        if now < self._retry_at:
            raise SpoolError(self.last_error)
        if self._segment is not None and self._segment.size >= self._settings.segment_size:
            self._seal(self._segment)
        if self._segment is None:
            self._retry_at = now + _RETRY_INTERVAL
            self._segment = self._next_segment()
            self._retry_at = 0.0
        return self._segment

    def _claim(self, size: int) -> None:
        """Raise SpoolFull where `size` bytes could exceed the cap.

        A producer claims a part of the cap when the others' parts would still fit, too.
        """
        cap = self._settings.max_size
        if cap is None or size <= self._room:
            return
        now = time.monotonic()
        if now >= self._measure_at:
            directory, part = self._settings.directory, cap // _PART
            others = sum(1 for _ in (directory / "producers").glob("[!.]*")) - 1
            left = cap - sum(size for _file, size in segment_sizes(directory)) - others * part
            self._room = min(max(size, part), left)
            if self._room < size:
                self._measure_at = now + _FULL_INTERVAL
        if self._room < size:
            raise SpoolFull(f"the spool has reached `spool.max_size` of {cap} bytes")

    def _next_segment(self) -> _Segment:
        folder = self._folder or self._enter()
        self._number += 1
        segment = _Segment(folder / f"{self._number:010}.seg")
        try:
            for data in self._rewrite:
                segment.append(data)
        except OSError:
            self._sealed.append(segment)
            raise
        self._rewrite.clear()
        return segment

    def _enter(self) -> Path:
        """Make the producer's folder; the writer sees it when its lock is held."""
        folder = open_directory(self._settings.directory, create=True) / "producers" / self._name
        hidden = folder.with_name(f".{folder.name}")
        hidden.mkdir(exist_ok=True)
        self._lock = self._lock or Lock(hidden / "lock")
        self._counters = self._counters or os.open(hidden / "counters.json", os.O_WRONLY | os.O_CREAT, 0o660)
        os.posix_fallocate(self._counters, 0, _COUNTERS_SIZE)
        self._write_counters()
        hidden.rename(folder)  # the first segment's sync makes its name durable
        self._folder = folder
        return folder

    def _leave(self) -> None:
        """Let go of the folder."""
        self._write_counters()
        if self._lock is not None:
            self._lock.release()
        if self._counters is not None:
            os.close(self._counters)
        self._folder = self._lock = self._counters = None

    def _seal(self, segment: _Segment) -> None:
        """Append no more to a segment; the sync thread makes it durable and closes it."""
        self._segment = None
        self._sealed.append(segment)

    def _drop(self, error: OSError | SpoolError) -> None:
        self.dropped += 1
        message = f"{error.strerror}" if isinstance(error, OSError) else str(error)
        if message != self.last_error:
            _log.error("request log: %s; events are dropped and counted until it is mended", message)
        self.last_error = message
        self._write_counters()

    def _sync_loop(self) -> None:
        counters_at = 0.0
        while not self._closed.is_set():
            if self._dirty.wait(_COUNTERS_INTERVAL) and self._settings.fsync != "always":
                self._closed.wait(self._settings.fsync_interval)  # what comes meanwhile shares the fsync
            self._dirty.clear()
            self._sync_all()
            if time.monotonic() >= counters_at:
                self._look_around()
                counters_at = time.monotonic() + _COUNTERS_INTERVAL
        self._sync_all()

    def _sync_all(self) -> None:
        """Sync the segments, oldest first; close those that are sealed."""
        with self._guard:
            segments = [*self._sealed, *([self._segment] if self._segment else [])]
            counts = [len(segment.unsynced) for segment in segments]
            waiting, self._waiting = self._waiting, []
        failed = False
        for segment, count in zip(segments, counts, strict=True):
            try:
                if self._settings.fsync != "never" and count:
                    segment.sync()
            except OSError as error:
                failed = True
                self._replace(segment, error)
            else:
                with self._guard:
                    del segment.unsynced[:count]
                    if segment is not self._segment and not segment.unsynced:
                        self._sealed.remove(segment)
                        segment.close()
        with self._guard:
            if failed and not self._rewrite:  # not durable yet: the next round syncs the segment that holds it
                self._waiting = waiting + self._waiting
                self._dirty.set()
                return
        for loop, future in waiting:
            loop.call_soon_threadsafe(_set_result, future)

    def _replace(self, segment: _Segment, error: OSError) -> None:
        """Write again, to a new segment, what a failed fsync may have lost.

        A second fsync on the same descriptor could succeed without having written anything (fsync(2), NOTES).
        """
        _log.error("request log: fsync failed (%s); going on in a new segment", error.strerror)
        with self._guard:
            self.last_error = f"fsync: {error.strerror}"
            self._rewrite += segment.unsynced
            if segment is not self._segment:
                self._sealed.remove(segment)
            segment.close()
            if self._segment is not None and self._segment is not segment:
                self._sealed.append(self._segment)
            self._segment = None
            try:
                self._segment = self._next_segment()
            except (OSError, SpoolError) as second:  # the next frame tries again; nobody waits for it
                self.last_error = str(second)

    def _look_around(self) -> None:
        """Write the counters, have the spool measured, and begin anew where the folder was taken away."""
        with self._guard:
            self._room = 0
            if self._folder is not None and not self._folder.is_dir():
                _log.error("request log: %s was removed; going on in a new folder", self._folder)
                if self._segment is not None:
                    self._seal(self._segment)
                self._leave()
            self._write_counters()

    def _write_counters(self) -> None:
        if self._counters is None:
            return
        content = {
            "received": self.received,
            "dropped": self.dropped,
            "calls": self.calls,
            "seconds": round(self.seconds, 6),
            "last_error": self.last_error[:200],
        }
        try:
            os.pwrite(self._counters, json.dumps(content).encode().ljust(_COUNTERS_SIZE), 0)
        except OSError as error:  # the disk's error shows at the next frame, too
            self.last_error = f"{error.strerror}"


def read_counters(folder: Path) -> dict[str, Any]:
    """Return the counters that the process of a producer's folder wrote; nothing where there are none."""
    try:
        content: dict[str, Any] = json.loads((folder / "counters.json").read_bytes())
    except (OSError, ValueError):
        return {}
    return content


def remove_requeued(folder: Path) -> None:
    """Remove the dead letters that a producer's folder was made of, now that it is durable."""
    file = folder / REQUEUED_FILE
    if file.exists():
        for name in json.loads(file.read_bytes()):
            (folder.parent.parent / "dead" / f"{name}.json").unlink(missing_ok=True)
        file.unlink()


def _set_result(future: Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def segment_sizes(directory: Path) -> Iterator[tuple[Path, int]]:
    """Yield every segment of the spool with its size in bytes."""
    for file in sorted(directory.glob("producers/[!.]*/*.seg")):
        try:
            yield file, file.stat().st_size
        except FileNotFoundError:  # unlinked by the writer meanwhile
            continue
