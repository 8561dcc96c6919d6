"""The gateway's side of the spool: frames appended by the event loop, made durable by a thread."""

import asyncio
import contextlib
import ctypes
import errno
import logging
import os
import threading
import time
from asyncio import AbstractEventLoop, Future
from pathlib import Path

from litellm_sqlalchemy import frames
from litellm_sqlalchemy.errors import SpoolError, SpoolFull
from litellm_sqlalchemy.frames import Frame, Kind
from litellm_sqlalchemy.identifiers import uuid7
from litellm_sqlalchemy.settings import SpoolSettings
from litellm_sqlalchemy.spool import (
    COUNTERS_SIZE,
    Counters,
    Lock,
    has_ended,
    make_directory,
    make_file,
    open_directory,
    producers,
    spool_size,
    sync_directory,
)

_log = logging.getLogger(__name__)

#: Seconds between two attempts to write to a disk that failed, two looks at a spool that is full, two counter files.
_RETRY_INTERVAL = 1.0
_FULL_INTERVAL = 0.1
_COUNTERS_INTERVAL = 5.0
#: Seconds after a failure before which a frame that is written does not end it: at its cap a spool takes one at times.
_WELL_AFTER = 5.0
#: Seconds that a call waits for its record to be durable, at most: a disk that hangs must not stop the gateway.
_SYNC_LIMIT = 5.0
#: The most seconds between two fsyncs where one after the other fails: each has all that is not durable written again.
_SYNC_PAUSE = 60.0
#: Part of what the spool may take that a producer claims at once, and the most of it in bytes; with `when_full: refuse`
#: half of it is left for the frames of calls that were accepted.
_PART = 32
_PART_SIZE = 64 * 1024 * 1024
#: Blocks of the file system that a last frame, a new segment and the counters may begin: frames are counted in bytes.
_BEGUN_BLOCKS = 3
#: Part of a process's time that it may take to measure a spool which is full, and how much longer the event loop waits
#: with that than the thread.
_MEASURED_PART = 0.01
_PREFER_THREAD = 5


#: write(2) that keeps Python's lock: `os.write` lets LiteLLM's other threads run first and waits for them, which takes
#: longer than to copy a record into the page cache.
_write = ctypes.PyDLL(None, use_errno=True).write
_write.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_size_t)
_write.restype = ctypes.c_ssize_t


class _Segment:
    """A file that a producer appends to."""

    def __init__(self, file: Path) -> None:
        self.folder = file.parent
        self.descriptor = make_file(file, os.O_WRONLY | os.O_APPEND)  # empty, if an attempt that failed has left it
        self.size = 0
        self.unsynced: list[bytes] = []
        self.named = False  # whether the file's name is durable

    def append(self, data: bytes) -> None:
        """Write all of `data` or, as far as the disk allows, nothing of it. Raises OSError."""
        written = _write(self.descriptor, data, len(data))
        if written < 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
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
        """Close the file, whose content is durable by now or stands in another one."""
        with contextlib.suppress(OSError):
            os.close(self.descriptor)


class Producer:
    """Appends the frames of one gateway process to its own segments; used by one thread.

    `append` writes and returns; a thread makes durable what was written, within `fsync_interval` or, with `always`, at
    once: whoever awaits `synced` waits for that. No method raises because of the disk: what cannot be written is
    counted. With `when_full: refuse`, `check_space` tells the caller to refuse a call before it is accepted; what was
    accepted is written as long as the disk takes it, and of other calls what leaves room for that.
    """

    def __init__(self, settings: SpoolSettings) -> None:
        """Take the policy; the directory is opened by the first frame."""
        self._settings = settings
        self._name = str(uuid7())
        self._seed = frames.seed_of(self._name)
        self._folder: Path | None = None
        self._lock: Lock | None = None
        self._counters_file: int | None = None  # descriptor
        self._number = 0
        self._retry_at = 0.0
        self._failing = ""  # why nothing was written, until it is over
        self._failed_at = 0.0
        self._room = _Room(settings)
        self._segment: _Segment | None = None
        self._sealed: list[_Segment] = []
        self._rewrite: list[bytes] = []  # what a failed fsync may have lost
        self._waiting: list[tuple[AbstractEventLoop, Future[bool]]] = []
        self._guard = threading.Lock()  # for all above
        self._sync_at = self._sync_pause = 0.0  # the thread's own: no fsync before that time; the wait after a failure
        self._dirty = threading.Event()
        self._closed = threading.Event()
        self.counters = Counters()
        self._thread = threading.Thread(target=self._work, name="litellm-sqlalchemy-sync", daemon=True)
        self._thread.start()

    @property
    def received(self) -> int:
        """Frames so far."""
        return self.counters.received

    @property
    def dropped(self) -> int:
        """Frames that could not be written."""
        return self.counters.dropped

    @property
    def last_error(self) -> str:
        """Why the last of them could not be."""
        return self.counters.last_error

    def append(self, kind: Kind, metadata: bytes, payload: bytes = b"", *, accepted: bool = True) -> bool:
        """Append one frame, of a call that was accepted or not; return whether it stands in the spool."""
        with self._guard:
            frame = Frame(kind, self.counters.received + 1, metadata, payload)
            try:
                self._append(frames.encode(frame, self._seed), accepted)
            except (OSError, SpoolError) as error:
                self._drop(error)
                return False
            self.counters.received += 1  # not before: what is counted and neither there nor dropped is lost by the disk
        if not self._dirty.is_set():  # to set it again takes longer than to look
            self._dirty.set()
        return True

    def skip(self) -> None:
        """Count a frame that is not written because the one it belongs to was dropped."""
        with self._guard:
            self.counters.received += 1
            self.counters.dropped += 1
            self._write_counters()

    async def synced(self) -> None:
        """With `fsync: always`, wait until all that was appended is on disk, for some seconds at most."""
        if self._settings.fsync != "always":
            return
        loop, began = asyncio.get_running_loop(), time.monotonic()
        future: Future[bool] = loop.create_future()
        with self._guard:
            self._waiting.append((loop, future))
        self._dirty.set()
        try:
            durable = await asyncio.wait_for(future, _SYNC_LIMIT)
        except TimeoutError:
            durable = False
        if not durable:
            self.counters.unsynced += 1
            waited = time.monotonic() - began
            _log.error("request log: a record is not durable after %.1f s; the call goes on", waited)

    def check_space(self) -> None:
        """Raise SpoolError where the policy is to refuse calls that cannot be logged, and they cannot be."""
        if self._settings.when_full != "refuse":
            return
        with self._guard:
            try:
                segment = self._open_segment()
                try:
                    self._room.check()
                except SpoolFull:
                    self._make_way(segment)
                    raise
            except (OSError, SpoolError) as error:
                self._note(error, "calls are refused")
                if isinstance(error, SpoolError):
                    raise
                raise SpoolError(f"spool directory {self._settings.directory}: {error.strerror}") from None

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

    def _append(self, data: bytes, accepted: bool) -> None:
        segment = self._open_segment()
        try:
            if self._settings.when_full == "drop":
                self._room.claim(len(data))
            elif not accepted:  # anybody can make such calls; one that was accepted is worth going beyond the cap
                self._room.check(len(data))
        except SpoolFull:
            self._make_way(segment)
            raise
        try:
            segment.append(data)
        except OSError as error:
            self._retry_at = time.monotonic() + _RETRY_INTERVAL
            if segment.size or error.errno != errno.ENOSPC:
                self._seal(segment)
            raise
        self._room.take(len(data))
        if self._failing and time.monotonic() >= self._failed_at + _WELL_AFTER:
            self._failing = ""

    def _make_way(self, segment: _Segment) -> None:
        """Go on in an empty segment: the writer can then remove what is delivered of this one."""
        if segment.size:
            self._seal(segment)
            self._segment = self._next_segment()

    def _open_segment(self) -> _Segment:
        """Return the segment to append to, a new one where there is none or it is full."""
        now = time.monotonic()
        if now < self._retry_at:
            raise SpoolError(self._failing)
        if self._segment is not None and self._segment.size >= self._settings.segment_size:
            self._seal(self._segment)
        if self._segment is None:
            self._retry_at = now + _RETRY_INTERVAL
            self._segment = self._next_segment()
            self._retry_at = 0.0
        return self._segment

    def _next_segment(self) -> _Segment:
        folder = self._folder or self._enter()
        segment = _Segment(folder / f"{self._number + 1:010}.seg")
        self._number += 1  # now: a first segment of another number than 1 means that the writer has lost its memory
        try:
            for data in self._rewrite:
                segment.append(data)
                self._room.take(len(data))
        except OSError:
            segment.close()  # all that it holds is still to be written again
            raise
        self._rewrite.clear()
        return segment

    def _enter(self) -> Path:
        """Make the producer's folder; the writer sees it when its lock is held."""
        folder = open_directory(self._settings.directory, create=True) / "producers" / self._name
        hidden = folder.with_name(f".{folder.name}")
        with contextlib.suppress(FileExistsError):
            make_directory(hidden)
        self._lock = self._lock or Lock(hidden / "lock")
        self._counters_file = self._counters_file or make_file(hidden / "counters.json", os.O_WRONLY)
        os.posix_fallocate(self._counters_file, 0, COUNTERS_SIZE)
        self._write_counters()
        hidden.rename(folder)  # the first segment's sync makes its name durable
        self._folder = folder
        return folder

    def _leave(self) -> None:
        """Let go of the folder."""
        self._write_counters()
        if self._lock is not None:
            self._lock.release()
        if self._counters_file is not None:
            os.close(self._counters_file)
        self._folder = self._lock = self._counters_file = None

    def _seal(self, segment: _Segment) -> None:
        """Append no more to a segment; the thread makes it durable and closes it."""
        self._segment = None
        self._sealed.append(segment)

    def _drop(self, error: OSError | SpoolError) -> None:
        self.counters.received += 1
        self.counters.dropped += 1
        self._note(error, "events are dropped and counted")
        self._write_counters()
        self._dirty.set()  # the thread looks whether there is room again

    def _note(self, error: OSError | SpoolError, consequence: str) -> None:
        """Say why nothing is written: at its first time, not for each frame or call."""
        message = f"{error.strerror}" if isinstance(error, OSError) else str(error)
        if message != self._failing:
            _log.error("request log: %s; %s until it is mended", message, consequence)
        self._failing, self._failed_at = message, time.monotonic()
        self.counters.last_error = message

    def _work(self) -> None:
        """Sync and measure until the producer is closed; the thread's whole life."""
        look_at = 0.0
        while not self._closed.is_set():
            if self._dirty.wait(self._idle_time()) and self._settings.fsync != "always":
                self._closed.wait(self._settings.fsync_interval)  # what comes meanwhile shares the fsync
            self._dirty.clear()
            try:
                self._sync_all()
                self._measure()
                if time.monotonic() >= look_at:
                    look_at = time.monotonic() + _COUNTERS_INTERVAL
                    self._look_around()
            except Exception:
                _log.exception("request log: the spool's thread failed; it goes on")
                self.counters.hooks.failures += 1
                self._closed.wait(_RETRY_INTERVAL)
        self._sync_all()

    def _idle_time(self) -> float:
        """Return how long the thread may sleep where nothing is appended."""
        left = self._sync_at - time.monotonic()
        return min(left, _COUNTERS_INTERVAL) if left > 0 else _COUNTERS_INTERVAL

    def _sync_all(self) -> None:
        """Sync the segments, oldest first, unless that has failed just now; close those that are sealed."""
        if time.monotonic() < self._sync_at and not self._closed.is_set():
            return
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
        if any(counts):
            self._pace(failed=failed)
        with self._guard:
            if failed and not self._rewrite:  # not durable yet: the next round syncs the segment that holds it
                self._waiting = [waiter for waiter in waiting if not waiter[1].done()] + self._waiting
                self._dirty.set()
                return
            durable = not self._rewrite  # what could not be written again yet may be lost
        for loop, future in waiting:
            with contextlib.suppress(RuntimeError):  # a loop that has ended meanwhile
                loop.call_soon_threadsafe(_set_result, future, durable)

    def _pace(self, *, failed: bool) -> None:
        """Set when to sync again: at once after the first failure, later and later where others follow it."""
        if failed:
            self._sync_at = time.monotonic() + self._sync_pause
            self._sync_pause = min(max(2 * self._sync_pause, _RETRY_INTERVAL), _SYNC_PAUSE)
        else:
            self._sync_pause = 0.0

    def _replace(self, segment: _Segment, error: OSError) -> None:
        """Write again, to a new segment, what a failed fsync may have lost.

        A second fsync on the same descriptor could succeed without having written anything (fsync(2), NOTES).
        """
        _log.error("request log: fsync failed (%s); going on in a new segment", error.strerror)
        with self._guard:
            self.counters.last_error = f"fsync: {error.strerror}"
            self._rewrite += segment.unsynced
            if segment is not self._segment:
                self._sealed.remove(segment)
            segment.close()
            if self._segment is not None and self._segment is not segment:
                self._sealed.append(self._segment)
            self._segment = None
            try:
                self._segment = self._next_segment()
            except (OSError, SpoolError) as second:  # the next frame tries again; nobody waits for that
                self.counters.last_error = str(second)

    def _measure(self) -> None:
        with contextlib.suppress(OSError):  # a directory that is gone: the next frame tells
            if self._folder is not None:
                self._room.renew(self._guard)

    def _look_around(self) -> None:
        """Write the counters, and begin anew where the folder was taken away."""
        with self._guard:
            if self._folder is not None and not self._folder.is_dir():
                _log.error("request log: %s was removed; going on in a new folder", self._folder)
                if self._segment is not None:
                    self._seal(self._segment)
                self._leave()
            self._write_counters()

    def _write_counters(self) -> None:
        if self._counters_file is None:
            return
        try:
            os.pwrite(self._counters_file, self.counters.encode(), 0)
        except OSError as error:  # the disk's error shows at the next frame, too
            self.counters.last_error = f"{error.strerror}"


class _Room:
    """What a producer may append before the spool is measured again, by `max_size` and `reserve`.

    A producer claims a part of what is left when the others' parts would still fit, too. To measure takes the longer,
    the more is spooled: where it takes long only the producer's thread does it, and rarely.
    """

    def __init__(self, settings: SpoolSettings) -> None:
        self._settings = settings
        self._left = self._taken = 0
        self._wanted = 0  # bytes of the last frame, which may be larger than a part
        self._part = 0
        self._scarce = False  # there was less than a part
        self._cost = 0.0  # CPU seconds that it took to measure
        self._measured_at = 0.0
        self._full = ""

    def claim(self, size: int) -> None:
        """Raise SpoolFull where `size` more bytes would be too many, OSError where nothing can be measured."""
        self._wanted = size
        if size > self._left and self._is_old(_PREFER_THREAD):
            self._left = self._measure()
        if size > self._left:
            raise SpoolFull(self._full)

    def check(self, size: int = 0) -> None:
        """Raise SpoolFull where `size` more bytes would leave less than half a part. Raises OSError."""
        if not self._part:
            self._left = self._measure()
        self.claim(self._part // 2 + size)

    def take(self, size: int) -> None:
        """Count what was appended."""
        self._left -= size
        self._taken += size

    def renew(self, guard: threading.Lock) -> None:
        """Measure before a claim has to, without the guard that the event loop needs. Raises OSError."""
        if self._left > self._part // 2 or not self._is_old():
            return
        taken = self._taken
        left = self._measure()
        with guard:
            self._left = left - (self._taken - taken)

    def _is_old(self, patience: int = 1) -> bool:
        """Return whether to measure again: where little was left, not too often, by what that costs.

        `patience` is for who would rather have somebody else do it.
        """
        wait = max(_FULL_INTERVAL, patience * self._cost / _MEASURED_PART)
        return not self._scarce or time.monotonic() >= self._measured_at + wait

    def _measure(self) -> int:
        """Return what may be appended from now on."""
        self._measured_at, started = time.monotonic(), time.thread_time()
        directory, cap, reserve = self._settings.directory, self._settings.max_size, self._settings.reserve
        disk = os.statvfs(directory)
        total = disk.f_blocks * disk.f_frsize
        self._part = min((cap or total) // _PART, _PART_SIZE)
        left = disk.f_bavail * disk.f_frsize - int(total * reserve)
        if reserve:
            left -= _BEGUN_BLOCKS * disk.f_frsize
        full = f"`spool.reserve` leaves {reserve:.0%} of the file system of {directory} free"
        if cap is not None:
            folders = (directory / "producers" / name for name in producers(directory))
            others = sum(not has_ended(folder) for folder in folders) - 1  # who is gone appends no more
            left_of_cap = cap - spool_size(directory) - others * self._part
            if left_of_cap < left:
                left, full = left_of_cap, f"the spool has reached `spool.max_size` of {cap} bytes"
        self._full = full  # now: the event loop may tell it at any time
        self._cost = time.thread_time() - started
        part = max(self._part, self._wanted)
        self._scarce = left < part
        return min(part, left)


def _set_result(future: Future[bool], durable: bool) -> None:
    if not future.done():
        future.set_result(durable)
