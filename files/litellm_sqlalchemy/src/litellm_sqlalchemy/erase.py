"""Erasure of what is stored of one user: the one that owns a key, or the `user` that a client names.

Rows are deleted, not blanked: a time, a team and a model still tell of a person where the team has one member. The
report says what they came to by month, and in `daily_usage` their sums become those of nobody and no key, so that the
books stay whole without them. The spool's copies go, too: delivered frames are overwritten in place - nobody but a
replay reads them again, and it passes over them - and dead letters are removed. What is not delivered yet, and calls
that still run, are reported: a repetition finds them.
"""

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import orjson
from sqlalchemy import Connection, text

from litellm_sqlalchemy import frames
from litellm_sqlalchemy.consumer import Cursor, read_state
from litellm_sqlalchemy.database import maintaining, vacuum
from litellm_sqlalchemy.dead_letters import call_of, metadata_of, read_letters
from litellm_sqlalchemy.frames import Frame
from litellm_sqlalchemy.retention import is_retired, open_segments
from litellm_sqlalchemy.settings import Settings
from litellm_sqlalchemy.spool import open_directory, read_file
from litellm_sqlalchemy.usage import forget_user
from litellm_sqlalchemy.users import as_starter
from litellm_sqlalchemy.values import text as as_stored

#: The user's calls, and whether each has ended: no call takes a day, whatever became of its response.
_CALLS = """
SELECT replace(CAST(q.id AS text), '-', ''),
       EXISTS (SELECT FROM responses a WHERE a.request_id = q.id) OR q.created_at < now() - interval '1 day'
  FROM requests q WHERE q.user_id = :user OR q.end_user = :user
"""
_MONTHS = """
SELECT to_char(q.created_at AT TIME ZONE 'UTC', 'YYYY-MM'), sum(q.calls)::bigint,
       coalesce(sum(a.total_tokens), 0)::bigint, coalesce(sum(a.cost), 0)
  FROM requests q LEFT JOIN responses a ON a.request_id = q.id WHERE q.id = ANY(CAST(:calls AS uuid[]))
 GROUP BY 1 ORDER BY 1
"""
_POLL_INTERVAL = 0.2


@dataclass
class Month:
    """What the erased calls of a month (UTC) came to; the cost in US dollars."""

    month: str
    calls: int
    total_tokens: int
    cost: float


@dataclass
class Erasure:
    """Counts of what was - in a dry run: would be - erased, and of what is left.

    requests, responses: rows; frames: delivered ones in the spool; dead_letters: files, damaged ones included;
    spooled: frames that the writer has not delivered yet; running: calls that have not ended yet.
    """

    requests: int = 0
    responses: int = 0
    frames: int = 0
    dead_letters: int = 0
    spooled: int = 0
    running: int = 0
    months: list[Month] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        """Whether nothing is left."""
        return not self.spooled and not self.running

    def __str__(self) -> str:
        """Return the counts in one line, and a line for each month."""
        counts = ", ".join(f"{name} {number}" for name, number in vars(self).items() if name != "months")
        months = (f"{m.month}  {m.calls} calls  {m.total_tokens} tokens  {m.cost:.6f} USD" for m in self.months)
        return "\n".join((counts, *months))


def erase(settings: Settings, user: str, *, dry_run: bool = False, wait: float = 30) -> Erasure:
    """Erase a user's rows, delivered frames and dead letters; undelivered frames are waited for, up to `wait` seconds.

    It may be broken off anywhere and repeated. Raises DatabaseError, SettingsError, SpoolError.
    """
    user = as_stored(user) or ""
    directory = open_directory(settings.spool.directory)
    spooled = {place.call for _file, places in _segments(directory) for place in places if user in place.users}
    result, deadline = Erasure(), time.monotonic() + (0 if dry_run else wait)
    while (left := _undelivered(directory, spooled)) and time.monotonic() < deadline:
        time.sleep(_POLL_INTERVAL)
    result.spooled = left
    with maintaining(settings.database, "erase") as connection:
        deleted, running = _erase_rows(connection, user, result, dry_run)
    calls = (spooled | deleted) - running
    _erase_frames(directory, calls, result, dry_run)
    _erase_letters(directory, user, calls, result, dry_run)
    return result


def _undelivered(directory: Path, calls: set[str]) -> int:
    """Return how many frames of the calls the writer has not delivered yet."""
    waiting = (place.call for _file, places in _segments(directory) for place in places if not place.delivered)
    return sum(call in calls for call in waiting)


def _erase_rows(connection: Connection, user: str, result: Erasure, dry_run: bool) -> tuple[set[str], set[str]]:
    """Delete the rows of the calls that have ended, in one transaction; return these calls and those still running."""
    found = [(call, ended) for call, ended in connection.execute(text(_CALLS), {"user": user})]
    calls = {"calls": [call for call, ended in found if ended]}
    running = {call for call, ended in found if not ended}
    result.running = len(running)
    result.months = [Month(*row) for row in connection.execute(text(_MONTHS), calls)]
    for table, column in (("responses", "request_id"), ("requests", "id")):
        condition = f"{table} WHERE {column} = ANY(CAST(:calls AS uuid[]))"
        counted = connection.execute(text(f"SELECT count(*) FROM {condition}"), calls).scalar_one()
        setattr(result, table, counted)
        if not dry_run:
            connection.execute(text(f"DELETE FROM {condition}"), calls)
    if not dry_run:
        forget_user(connection, user)
        vacuum(connection, "requests, responses, daily_usage")  # also where an attempt before was broken off
    return set(calls["calls"]), running


def _erase_frames(directory: Path, calls: set[str], result: Erasure, dry_run: bool) -> None:
    """Overwrite the bodies of the calls' delivered frames; a header stays, so that the frame behind it is found."""
    for file, places in _segments(directory):
        chosen = [place for place in places if place.delivered and place.call in calls]
        result.frames += len(chosen)
        if not chosen or dry_run:
            continue
        status = os.fstat(file.fileno())
        for place in chosen:
            os.pwrite(file.fileno(), bytes(place.end - place.start), place.start)
        with as_starter():  # only a file's owner, and root, set a time of it: that at which it was retired
            os.utime(file.fileno(), ns=(status.st_atime_ns, status.st_mtime_ns))
        os.fsync(file.fileno())


def _erase_letters(directory: Path, user: str, calls: set[str], result: Erasure, dry_run: bool) -> None:
    """Remove the dead letters of user and calls, and damaged pieces that name one of them."""
    names = [*(call.encode() for call in calls), orjson.dumps(user)]
    files = [
        directory / "dead" / f"{letter.id}.json"
        for letter in read_letters(directory)
        if letter.call in calls or user in _users(metadata_of(letter.frame))
    ]
    for damaged in directory.glob("dead/*.damaged"):
        content = read_file(damaged)
        if any(name in content for name in names):
            files.append(damaged)
    result.dead_letters = len(files)
    for file in files if not dry_run else ():
        file.unlink(missing_ok=True)


@dataclass(frozen=True)
class _Place:
    """Where a frame's body stands, the call and the users that it names, and whether it is delivered."""

    start: int
    end: int
    call: str
    users: frozenset[str]
    delivered: bool


def _segments(directory: Path) -> Iterator[tuple[BinaryIO, list[_Place]]]:
    """Yield every segment of the spool, the retired ones included, with its frames."""
    _totals, cursors = read_state(directory)
    for segment, file in open_segments(directory, "r+b"):
        data, producer, number = file.read(), segment.parent.name, int(segment.stem)
        cursor = cursors.get(producer, Cursor(segment=0))
        is_behind = is_retired(segment) or number < cursor.segment
        delivered = len(data) if is_behind else cursor.offset if number == cursor.segment else 0
        places = []
        for found, end in frames.decode(data, complete=False, seed=frames.seed_of(producer)):
            if isinstance(found, Frame):
                start = end - frames.body_size(found)
                content = metadata_of(found)
                places.append(_Place(start, end, call_of(content), _users(content), end <= delivered))
        yield file, places


def _users(content: dict[str, Any]) -> frozenset[str]:
    return frozenset(str(content[name]) for name in ("user_id", "end_user") if content.get(name))
