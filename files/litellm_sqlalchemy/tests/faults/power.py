"""Power cuts: what a disk holds of a spool at any moment of a process's life, from the log of its system calls.

A frame is on the disk when a sync of its file has begun after it was written and has ended; a file is there when its
directory was synced after it was made. What was written since may be there, too, or be gone, or read as zeros.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

_LINE = re.compile(r"(\d+) +([\d.]+) (.*)")
_BEGUN = " <unfinished ...>"
_RESUMED = re.compile(r"<\.\.\. \w+ resumed>(.*)")
_CALL = re.compile(r"(\w+)\((.*)\) += (-?\d+)(.*?)(?: <([\d.]+)>)?$")
_FILE = re.compile(r"\d+<([^>]*)>")
_NAMES = re.compile(r'"([^"]*)"')


@dataclass(frozen=True)
class SystemCall:
    """A call that has succeeded; times are seconds since 1970."""

    name: str
    files: tuple[str, ...]
    """The file behind its descriptor, or the names that it was given."""
    result: int
    text: str
    begun: float
    ended: float


def logging_calls(log: Path) -> list[str]:
    """Return the prefix of a command whose calls are to be read by `read_calls`."""
    calls = "openat,write,writev,fsync,fdatasync,rename,unlink"
    return ["strace", "-f", "-qq", "-ttt", "-T", "-y", "-s", "64", "-e", f"trace={calls}", "-e", "signal=none",
            "-o", str(log)]  # fmt: skip


def read_calls(log: Path) -> list[SystemCall]:
    """Return the calls of a log in the order of their ends."""
    begun: dict[str, tuple[float, str]] = {}
    calls = []
    for line in log.read_text(errors="replace").splitlines():
        match = _LINE.fullmatch(line)
        assert match, line
        thread, time, text = match[1], float(match[2]), match[3]
        if text.endswith(_BEGUN):
            begun[thread] = time, text.removesuffix(_BEGUN)
            continue
        if resumed := _RESUMED.fullmatch(text):
            time, first = begun.pop(thread)
            text = first + resumed[1]
        call = _CALL.match(text)
        if call and int(call[3]) >= 0:
            name, arguments = call[1], call[2]
            described = call[3] + call[4] if name == "openat" else arguments
            files = _NAMES.findall(arguments) if name in ("rename", "unlink") else _FILE.findall(described)[:1]
            calls.append(SystemCall(name, tuple(files), int(call[3]), arguments, time, time + float(call[5] or 0)))
    return sorted(calls, key=lambda one: one.ended)


class Disk:
    """What a disk holds of a spool whose processes only append to it."""

    def __init__(self, spool: Path, calls: Sequence[SystemCall]) -> None:
        """Take the spool as it was at the end, and the calls that led there."""
        self.spool = spool
        self._calls = calls
        self._segments = sorted(spool.glob("producers/[!.]*/*.seg"))

    def moments(self) -> Iterator[float]:
        """Yield a moment between each two calls."""
        for before, behind in pairwise(self._calls):
            yield (before.ended + behind.ended) / 2

    def cut(self, moment: float, into: Path, *, zeros: bool = False) -> None:
        """Write what is on the disk after a power cut to `into`; what was not synced is gone, or is zeros."""
        calls = [call for call in self._calls if call.ended <= moment]
        for segment in self._segments:
            durable, written = self._sizes(segment, calls)
            if durable is None:
                continue
            file = into / segment.relative_to(self.spool)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(segment.read_bytes()[:durable] + bytes(written - durable if zeros else 0))

    def _sizes(self, segment: Path, calls: Sequence[SystemCall]) -> tuple[int | None, int]:
        """Return how many bytes of a segment are durable, None where its name is not, and how many were written."""
        folder = str(segment.parent)
        made = [call.ended for call in calls if call.name == "openat" and call.files == (str(segment),)]
        named = [call.ended for call in calls if call.name == "rename" and call.files[-1] == folder]
        if not (made and named):
            return None, 0
        is_named = _synced(calls, folder, made[0]) and _synced(calls, str(segment.parents[1]), named[0])
        writes = [call for call in calls if call.name == "write" and call.files == (str(segment),)]
        last = max((call.begun for call in calls if _syncs(call, str(segment))), default=0.0)
        durable = sum(call.result for call in writes if call.ended <= last)
        return durable if is_named else None, sum(call.result for call in writes)


def not_durable_in_time(calls: Sequence[SystemCall], spool: Path) -> list[tuple[str, ...]]:
    """Return the files that were put in their place before what they hold was durable, or whose name was not durable
    when the next file went or came; of delivered segments none has to be.
    """
    changes = [call for call in calls if call.name in ("rename", "unlink") and call.files[0].startswith(str(spool))]
    found = []
    for call, following in pairwise(changes):
        source, target = call.files[0], call.files[-1]
        if call.name == "rename" and "/retired/" not in target:
            written = max((one.ended for one in calls if one.name == "write" and one.files == (source,)
                           and one.ended <= call.begun), default=0.0)  # fmt: skip
            holds = [one for one in calls if one.ended <= call.begun]
            named = [one for one in calls if one.ended <= following.begun]
            if not (_synced(holds, source, written) and _synced(named, str(Path(target).parent), call.ended)):
                found.append(call.files)
    return found


def _syncs(call: SystemCall, file: str) -> bool:
    return call.name in ("fsync", "fdatasync") and call.files == (file,)


def _synced(calls: Sequence[SystemCall], file: str, since: float) -> bool:
    return any(_syncs(call, file) and call.begun >= since for call in calls)
