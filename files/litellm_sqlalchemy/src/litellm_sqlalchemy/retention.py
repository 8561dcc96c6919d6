"""Delivered segments, kept for a while: from them comes back what a database restored to an earlier time has lost.

    <spool>/retired/<producer>/<number>.seg      its time of modification says when it was retired

A segment goes there when the database has committed all its frames, and is removed after `spool.retain` seconds, above
`spool.retain_size` bytes in all, or when the disk gets full: the live spool comes first.
"""

import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from litellm_sqlalchemy import frames
from litellm_sqlalchemy.frames import Frame
from litellm_sqlalchemy.settings import SpoolSettings

_PRUNE_INTERVAL = 60.0
#: Part of the file system that stays free of retired segments.
_FREE_PART = 10


class Retention:
    """Keeps delivered segments for as long as the settings say."""

    def __init__(self, settings: SpoolSettings) -> None:
        """Take the limits; nothing is made before the first segment is kept."""
        self._spool = settings.directory
        self._directory = settings.directory / "retired"
        self._seconds, self._size = settings.retain, settings.retain_size
        self._prune_at = 0.0

    def retire(self, segment: Path) -> None:
        """Keep a delivered segment, or remove it where that is not possible."""
        target = self._directory / segment.parent.name / segment.name
        if self._seconds and not self._is_disk_full():
            try:
                target.parent.mkdir(parents=True, exist_ok=True)
                os.utime(segment)
                segment.rename(target)
            except OSError:  # a full disk must not stop the delivery
                pass
            else:
                return
        segment.unlink()

    def prune(self, *, now: float | None = None) -> None:
        """Remove what is too old or too much, once a minute, and at once when the disk gets full."""
        if now is None and time.monotonic() < self._prune_at and not self._is_disk_full():
            return
        self._prune_at = time.monotonic() + _PRUNE_INTERVAL
        limit = (time.time() if now is None else now) - self._seconds
        found = [(file.stat(), file) for file in self._directory.glob("*/*.seg")]
        kept = sorted(found, key=lambda item: item[0].st_mtime)
        size = sum(status.st_size for status, _file in kept)
        for status, file in kept:
            if status.st_mtime >= limit and size <= self._size and not self._is_disk_full():
                break
            file.unlink()
            size -= status.st_size
            if not any(file.parent.iterdir()):
                file.parent.rmdir()

    def _is_disk_full(self) -> bool:
        usage = shutil.disk_usage(self._spool)
        return usage.free < usage.total / _FREE_PART


def delivered_since(directory: Path, since: float) -> Iterator[Frame]:
    """Yield every frame that the spool still has of those delivered at or after a time (Unix), and some from before.

    What is not delivered yet is among it: to store it twice changes nothing.
    """
    live = {(file.parent.name, file.name): file for file in directory.glob("producers/[!.]*/*.seg")}
    # After the live ones: a segment that is retired meanwhile is found here.
    retired = {(file.parent.name, file.name): file for file in directory.glob("retired/*/*.seg")}
    for producer, name in sorted(live.keys() | retired.keys()):
        file = directory / "retired" / producer / name
        try:
            if (producer, name) in live and not file.exists():
                data = live[producer, name].read_bytes()
            elif file.stat().st_mtime < since:
                continue
            else:
                data = file.read_bytes()
        except FileNotFoundError:  # pruned meanwhile
            continue
        for found, _behind in frames.decode(data, complete=False, seed=frames.seed_of(producer)):
            if isinstance(found, Frame):
                yield found
