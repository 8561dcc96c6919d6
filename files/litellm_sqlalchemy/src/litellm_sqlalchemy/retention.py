"""Delivered segments, kept for a while: from them comes back what a database restored to an earlier time has lost.

    <spool>/retired/<producer>/<number>.seg      its time of modification says when it was retired
    <spool>/retired/removed                      ... until when segments were removed

A segment goes there when the database has committed all its frames, and is removed after `spool.retain` seconds, above
`spool.retain_size` bytes in all, or when the disk gets full: the live spool comes first.
"""

import contextlib
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Literal

from litellm_sqlalchemy import frames
from litellm_sqlalchemy.frames import Frame
from litellm_sqlalchemy.settings import SpoolSettings
from litellm_sqlalchemy.spool import make_directory, make_file, open_file, producers, segments

_PRUNE_INTERVAL = 60.0
#: Part of the file system that stays free of retired segments, at least.
_FREE = 0.1
_REMOVED = "removed"


class Retention:
    """Keeps delivered segments for as long as the settings say."""

    def __init__(self, settings: SpoolSettings) -> None:
        """Take the limits; nothing is made before the first segment is kept."""
        self._spool = settings.directory
        self._directory = settings.directory / "retired"
        self._seconds, self._size = settings.retain, settings.retain_size
        self._free = max(_FREE, settings.reserve + _FREE / 2)  # more than what producers leave to others
        self._prune_at = 0.0
        self.problem = ""  # why a segment cannot be removed

    def retire(self, segment: Path) -> None:
        """Keep a delivered segment, or remove it where that is not possible."""
        target = self._directory / segment.parent.name / segment.name
        if self._seconds and not self._is_disk_full():
            try:
                for folder in (self._directory, target.parent):
                    if not folder.is_dir():
                        make_directory(folder)
                os.utime(segment)
                segment.rename(target)
            except OSError:  # a full disk must not stop the delivery
                pass
            else:
                return
        segment.unlink()
        self._note_removed(time.time())

    def prune(self) -> None:
        """Remove what is too old or too much, once a minute, and at once when the disk gets full.

        A segment that cannot be removed keeps none of the others; `problem` tells of it.
        """
        with self._noting():
            if time.monotonic() < self._prune_at and not self._is_disk_full():
                return
            self._prune_at = time.monotonic() + _PRUNE_INTERVAL
            self.problem = ""
            self._remove(time.time() - self._seconds)

    def _remove(self, limit: float) -> None:
        """Remove what was retired before a time (Unix), and the oldest of what is too much."""
        kept = []
        for file in self._directory.glob("*/*.seg"):
            with self._noting():
                kept.append((file.lstat(), file))
        kept.sort(key=lambda item: item[0].st_mtime)
        size = sum(status.st_size for status, _file in kept)
        for status, file in kept:
            if status.st_mtime >= limit and size <= self._size and not self._is_disk_full():
                break
            with self._noting():
                file.unlink()
                self._note_removed(status.st_mtime)
                size -= status.st_size
                if not any(file.parent.iterdir()):
                    file.parent.rmdir()

    @contextlib.contextmanager
    def _noting(self) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError:  # gone meanwhile
            pass
        except OSError as error:
            self.problem = f"{error.filename or self._spool}: {error.strerror}"

    def _note_removed(self, until: float) -> None:
        with contextlib.suppress(OSError):  # a disk without an inode left: a replay then tells less
            until = max(until, removed_until(self._spool))
            if not self._directory.is_dir():
                make_directory(self._directory)
            os.close(make_file(self._directory / _REMOVED, os.O_WRONLY))
            os.utime(self._directory / _REMOVED, (until, until))

    def _is_disk_full(self) -> bool:
        usage = shutil.disk_usage(self._spool)
        return usage.free < usage.total * self._free


def removed_until(directory: Path) -> float:
    """Return the time (Unix) up to which the spool may lack what was delivered, 0 where it has everything."""
    try:
        return (directory / "retired" / _REMOVED).stat().st_mtime
    except FileNotFoundError:
        return 0.0


def delivered_since(directory: Path, since: float) -> Iterator[Frame]:
    """Yield every frame that the spool still has of those delivered at or after a time (Unix), and some from before.

    What is not delivered yet is among it: to store it twice changes nothing.
    """
    for segment, file in open_segments(directory, "rb"):
        if is_retired(segment) and os.fstat(file.fileno()).st_mtime < since:
            continue
        for found, _behind in frames.decode(file.read(), complete=False, seed=frames.seed_of(segment.parent.name)):
            if isinstance(found, Frame):
                yield found


def open_segments(directory: Path, mode: Literal["rb", "r+b"]) -> Iterator[tuple[Path, BinaryIO]]:
    """Yield every segment of the spool, each open and with the place that it was found at; some may be retired.

    Raises OSError where one of them, or a folder, cannot be read.
    """
    live = _segments_in(directory, "producers")
    # After the live ones: a segment that is retired meanwhile is found here.
    retired = _segments_in(directory, "retired")
    for producer, name in sorted(live | retired):
        for folder in ("producers", "retired"):  # where it goes, too, in this order
            segment = directory / folder / producer / name
            try:
                file = open_file(segment, mode)
            except FileNotFoundError:  # retired or pruned meanwhile
                continue
            with file:
                yield segment, file
            break


def _segments_in(directory: Path, place: str) -> set[tuple[str, str]]:
    """Return the segments in the producers' folders of a place, as producer and name. Raises OSError."""
    found = set()
    for producer in producers(directory, place):
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):  # gone meanwhile, or no folder
            found |= {(producer, file.name) for _number, file in segments(directory / place / producer)}
    return found


def is_retired(segment: Path) -> bool:
    """Return whether a segment was found among those that are delivered."""
    return segment.parent.parent.name == "retired"
