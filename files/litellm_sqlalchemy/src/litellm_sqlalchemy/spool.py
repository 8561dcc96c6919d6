"""The spool: append-only files between the gateway's processes and the writer.

    <directory>/
      format                      "1": of another version, nothing here touches it
      writer.lock                 held by the writer
      state.json                  the writer's cursor of each producer and its counters
      producers/<uuid>/           one per gateway process, so that none waits for another
        lock                      held while the process lives
        0000000001.seg ...        frames; only the last one grows
        counters.json             the process's own counters, for the metrics
      dead/                       what PostgreSQL refused for good, with the reason

A producer only appends; the writer only reads and unlinks. What counts as delivered is what the database committed:
the writer moves its cursor behind it, durably, and then unlinks the segments that lie before the cursor.
"""

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

from litellm_sqlalchemy import frames
from litellm_sqlalchemy.errors import LockedError, SpoolError, SpoolFull
from litellm_sqlalchemy.frames import Frame, Kind
from litellm_sqlalchemy.identifiers import uuid7
from litellm_sqlalchemy.settings import SpoolSettings

_log = logging.getLogger(__name__)

FORMAT = "1"
#: Seconds between two attempts to open a spool that failed, and between two counter files.
_RETRY_INTERVAL = 1.0
_COUNTERS_INTERVAL = 5.0


def open_directory(directory: Path) -> Path:
    """Check that the spool directory can be used and is of this version; return it. Raises SpoolError."""
    if not directory.is_dir():
        raise SpoolError(f"spool directory {directory} does not exist: create it, or set `spool.directory`")
    if not os.access(directory, os.R_OK | os.W_OK | os.X_OK):
        raise SpoolError(f"spool directory {directory} is not writable for uid {os.geteuid()}: check owner and mode")
    marker = directory / "format"
    try:
        found = marker.read_text().strip()
    except FileNotFoundError:
        try:
            replace_file(marker, FORMAT.encode())
        except OSError as error:
            raise SpoolError(f"spool directory {directory} cannot be written: {error.strerror}") from None
        found = FORMAT
    if found != FORMAT:
        raise SpoolError(
            f"spool directory {directory} has format {found!r:.20}, this version reads {FORMAT!r}: "
            "drain it with the version that wrote it, or set another `spool.directory`"
        )
    (directory / "producers").mkdir(exist_ok=True)
    return directory


def replace_file(file: Path, content: bytes) -> None:
    """Put `content` in the place of `file`, atomically and durably."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o660)
    try:
        os.write(descriptor, content)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    os.replace(temporary, file)
    sync_directory(file.parent)


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
        self._file = file
        self._descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o660)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(self._descriptor, 64).decode(errors="replace").strip() or "unknown"
            os.close(self._descriptor)
            raise LockedError(f"{file} is held by process {holder}: stop it first, or let it work") from None
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, f"{os.getpid()}\n".encode(), 0)

    def release(self) -> None:
        """Give the lock back."""
        os.close(self._descriptor)


class _Segment:
    """The file that a producer appends to."""

    def __init__(self, file: Path) -> None:
        self.descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o660)
        self.size = 0
        self.users = 1  # the producer, and the sync thread while it uses the descriptor
        self.failed = False
        sync_directory(file.parent)

    def append(self, data: bytes) -> None:
        """Write all of `data` or, as far as the disk allows, nothing of it. Raises OSError."""
        written = os.write(self.descriptor, data)
        if written != len(data):
            os.ftruncate(self.descriptor, self.size)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.size += written


class Producer:
    """Appends the frames of one gateway process to its own segments; used by one thread.

    No method raises because of the disk: what cannot be written is counted in `dropped`. With `when_full: refuse`,
    `check_space` tells the caller to refuse the call before it is accepted.
    """

    def __init__(self, settings: SpoolSettings) -> None:
        self._settings = settings
        self._directory: Path | None = None
        self._lock: Lock | None = None
        self._segment: _Segment | None = None
        self._number = 0
        self._retry_at = 0.0
        self._spool_size = 0
        self._counters_at = 0.0
        self._unsynced: list[bytes] = []
        self._waiting: list[tuple[AbstractEventLoop, Future[None]]] = []
        self._guard = threading.Lock()  # for _unsynced, _waiting and the segment between the caller and the sync thread
        self._dirty = threading.Event()
        self._closed = False
        self.received = 0
        self.dropped = 0
        self.last_error = ""
        if settings.fsync != "never":
            threading.Thread(target=self._sync_loop, name="litellm-sqlalchemy-sync", daemon=True).start()

    def append(self, kind: Kind, metadata: bytes, payload: bytes = b"") -> bool:
        """Append one frame; return whether it stands in the spool."""
        self.received += 1
        data = frames.encode(Frame(kind, self.received, metadata, payload))
        try:
            self._append(data)
        except (OSError, SpoolError) as error:
            self._drop(error)
            return False
        if self._settings.fsync != "never":
            self._dirty.set()
        return True

    def skip(self) -> None:
        """Count a frame that is not written because the one it belongs to was dropped."""
        self.received += 1
        self.dropped += 1

    async def synced(self) -> None:
        """With `fsync: always`, wait until all that was appended is on disk; otherwise return at once."""
        if self._settings.fsync != "always" or not self._unsynced:
            return
        loop = get_running_loop()
        future: Future[None] = loop.create_future()
        with self._guard:
            self._waiting.append((loop, future))
        self._dirty.set()
        await future

    def check_space(self) -> None:
        """Raise SpoolFull or SpoolError where the policy is to refuse calls that cannot be logged."""
        if self._settings.when_full != "refuse":
            return
        try:
            self._open_segment(0)
        except OSError as error:
            raise SpoolError(f"spool directory {self._settings.directory}: {error.strerror}") from None

    def close(self) -> None:
        """Make all durable and let go of the lock."""
        self._closed = True
        with self._guard:
            if self._segment is not None:
                os.fsync(self._segment.descriptor)
                os.close(self._segment.descriptor)
                self._segment = None
        self._write_counters()
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def _append(self, data: bytes) -> None:
        segment = self._open_segment(len(data))
        try:
            with self._guard:
                segment.append(data)
                if self._settings.fsync != "never":
                    self._unsynced.append(data)
        except OSError:
            self._seal(segment)
            raise
        self._spool_size += len(data)

    def _open_segment(self, size: int) -> _Segment:
        """Return the segment to append `size` bytes to, a new one where the present one is full or failed."""
        now = time.monotonic()
        if self._segment is None and now < self._retry_at:
            raise SpoolError(self.last_error)
        if now >= self._counters_at:
            self._counters_at = now + _COUNTERS_INTERVAL
            self._write_counters()
        cap = self._settings.max_size
        if cap is not None and self._spool_size + size > cap:
            self._spool_size = self._measure()
            if self._spool_size + size > cap:
                raise SpoolFull(f"spool has reached `spool.max_size` of {cap} bytes")
        segment = self._segment
        if segment is not None and (segment.failed or segment.size >= self._settings.segment_size):
            self._seal(segment)
            segment = None
        if segment is None:
            self._retry_at = now + _RETRY_INTERVAL
            segment = self._segment = self._next_segment()
            self._retry_at = 0.0
        return segment

    def _next_segment(self) -> _Segment:
        if self._directory is None:
            directory = open_directory(self._settings.directory) / "producers" / str(uuid7())
            temporary = directory.with_name(f".{directory.name}")  # unseen by the writer until its lock is held
            temporary.mkdir()
            self._lock = Lock(temporary / "lock")
            temporary.rename(directory)
            sync_directory(directory.parent)
            self._directory = directory
        self._number += 1
        segment = _Segment(self._directory / f"{self._number:010}.seg")
        with self._guard:
            unsynced = b"".join(self._unsynced)  # after a failed fsync: what may not have reached the disk, again
        if unsynced:
            segment.append(unsynced)
        return segment

    def _seal(self, segment: _Segment) -> None:
        """Stop appending to a segment; the sync thread still makes durable what it has."""
        with self._guard:
            if not segment.failed and self._settings.fsync != "never":
                try:
                    os.fdatasync(segment.descriptor)
                except OSError as error:
                    self.last_error = f"fsync: {error.strerror}"
                else:
                    self._synced()
            self._segment = None
            segment.users -= 1
            if not segment.users:
                os.close(segment.descriptor)

    def _drop(self, error: OSError | SpoolError) -> None:
        self.dropped += 1
        message = f"{error.strerror}" if isinstance(error, OSError) else str(error)
        if message != self.last_error:
            _log.error("request log: %s; events are dropped and counted until it is mended", message)
        self.last_error = message

    def _measure(self) -> int:
        return sum(size for _file, size in segment_sizes(self._settings.directory))

    def _write_counters(self) -> None:
        if self._directory is None:
            return
        content = {"received": self.received, "dropped": self.dropped, "last_error": self.last_error}
        try:
            temporary = self._directory / ".counters"
            temporary.write_text(json.dumps(content))
            temporary.replace(self._directory / "counters.json")
        except OSError as error:  # counters are for the metrics only: the disk's own error shows at the next append
            self.last_error = f"{error.strerror}"

    def _sync_loop(self) -> None:
        while not self._closed:
            self._dirty.wait()
            self._dirty.clear()
            self._sync_once()
            if self._settings.fsync == "interval":
                time.sleep(self._settings.fsync_interval)

    def _sync_once(self) -> None:
        with self._guard:
            segment = self._segment
            if segment is None or segment.failed:
                self._resolve(self._waiting)
                self._waiting = []
                return
            segment.users += 1
            count = len(self._unsynced)
            waiting, self._waiting = self._waiting, []
        failed = False
        try:
            os.fdatasync(segment.descriptor)
        except OSError as error:  # a second fsync on this descriptor would lie: seal it, write the rest again
            failed = True
            self.last_error = f"fsync: {error.strerror}"
            _log.error("request log: fsync failed (%s); going on in a new segment", error.strerror)
        with self._guard:
            segment.failed |= failed
            if not failed and segment is self._segment:
                del self._unsynced[:count]
            segment.users -= 1
            if not segment.users:
                os.close(segment.descriptor)
            self._resolve(waiting)

    def _synced(self) -> None:
        self._unsynced.clear()
        self._resolve(self._waiting)
        self._waiting = []

    @staticmethod
    def _resolve(waiting: list[tuple[AbstractEventLoop, Future[None]]]) -> None:
        for loop, future in waiting:
            loop.call_soon_threadsafe(_set_result, future)


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
