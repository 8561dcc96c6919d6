"""What became of every frame: from the writer's memory, the segments themselves and, compared with both, the tables.

What is lost stays lost, and is told until somebody has taken note of it: `acknowledge` writes down what is known.
"""

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import orjson
from sqlalchemy import Connection, text

from litellm_sqlalchemy.consumer import Cursor, read_state, sequences
from litellm_sqlalchemy.database import connected
from litellm_sqlalchemy.errors import SpoolError
from litellm_sqlalchemy.settings import Settings
from litellm_sqlalchemy.spool import (
    dead_letters,
    open_directory,
    producers,
    read_counters,
    read_file,
    replace_file,
    segments,
    spool_size,
)

_ACKNOWLEDGED_FILE = "acknowledged.json"
#: Seconds that the writer may take to note what it has committed.
_NOTED_WITHIN = 5.0
_POLL_INTERVAL = 0.1
_STORED = """
SELECT coalesce(sum(responses), 0) FROM daily_usage
WHERE gateway = :gateway OR starts_with(gateway, CAST(:gateway AS text) || ':')
"""
_OPEN = "SELECT count(*) FROM requests WHERE id = ANY(CAST(:calls AS uuid[]))"


@dataclass(frozen=True)
class SpoolStatus:
    """Counts of frames: received = delivered + dead + damaged + dropped + spooled."""

    received: int
    delivered_requests: int
    delivered_responses: int
    duplicates: int
    dead: int
    damaged: int
    dropped: int
    interrupted: int
    spooled: int
    spool_bytes: int
    highest: dict[str, int]
    """Highest sequence number in the spool, by producer."""

    def is_well(self, known: "Known") -> bool:
        """Whether nothing is lost, or waits for a decision, beyond what is known."""
        return not self.dead and self.damaged <= known.damaged and self.dropped <= known.dropped

    def __str__(self) -> str:
        """Return one line for people."""
        return (
            f"received {self.received}, delivered {self.delivered_requests + self.delivered_responses}, "
            f"spooled {self.spooled}, dead {self.dead}, damaged {self.damaged}, dropped {self.dropped}"
        )


def spool_status(directory: Path) -> SpoolStatus:
    """Read the spool, which may change meanwhile: what is delivered while it is read counts as delivered.

    Raises SpoolError.
    """
    _, before = read_state(open_directory(directory))
    seen = [_look(directory / "producers" / name, before.get(name)) for name in producers(directory)]
    totals, cursors = read_state(directory)
    left = set(producers(directory))
    spooled, damaged, dropped = 0, totals.damaged, totals.dropped
    highest = {}
    for producer in seen:
        cursor = cursors.get(producer.name)
        if cursor is None and producer.name not in left:
            continue  # delivered meanwhile: the totals have it
        delivered = cursor.sequence if cursor and cursor.sequence >= 0 else producer.before
        waiting = sum(sequence > delivered for sequence in producer.sequences)
        highest[producer.name] = max(producer.sequences, default=delivered)
        spooled += waiting
        missing = max(max(producer.received, highest[producer.name]) - delivered - waiting, 0)
        more_damaged, more_dropped = (cursor or Cursor()).losses(missing, producer.dropped)
        damaged += more_damaged
        dropped += more_dropped
    dead = len(dead_letters(directory))  # requeued ones have gone back to what is received
    delivered = totals.delivered_requests + totals.delivered_responses
    return SpoolStatus(
        received=delivered + dead + damaged + dropped + spooled,
        delivered_requests=totals.delivered_requests,
        delivered_responses=totals.delivered_responses,
        duplicates=totals.duplicates,
        dead=dead,
        damaged=damaged,
        dropped=dropped,
        interrupted=totals.interrupted,
        spooled=spooled,
        spool_bytes=spool_size(directory),
        highest=highest,
    )


class _Seen(NamedTuple):
    """A producer's folder: frames that it wanted to write and dropped, those that are there, the last before those."""

    name: str
    received: int
    dropped: int
    sequences: set[int]
    before: int


def _look(folder: Path, cursor: Cursor | None) -> _Seen:
    received = read_counters(folder).received  # before the frames
    try:
        numbers = [number for number, _file in segments(folder)]
        found = set(sequences(folder, cursor or Cursor()))
    except FileNotFoundError:  # all is delivered, and the producer gone
        return _Seen(folder.name, received, 0, set(), 0)
    dropped = read_counters(folder).dropped  # after the frames: what was dropped between them is counted by then
    is_whole = cursor is not None or numbers[:1] == [1]
    return _Seen(folder.name, received, dropped, found, 0 if is_whole else min(found, default=1) - 1)


@dataclass(frozen=True)
class TablesStatus:
    """The writer's counters and the tables beside them.

    responses: committed by the writer, those made up for interrupted calls included; stored: rows that the tables were
    given for this gateway, as `daily_usage` counts them, whether they were removed since or not; open: calls whose
    request is delivered and whose response is not; missing: those of them that have no request row.
    """

    responses: int
    stored: int
    open: int
    missing: int

    @property
    def difference(self) -> int:
        """Responses that were delivered and are not stored; below 0 where there are more than were delivered."""
        return self.responses - self.stored

    def agree(self, known: "Known") -> bool:
        """Whether nothing is lost or there twice, beyond what is known; a foreign key keeps requests to responses."""
        return self.difference == known.difference and not self.missing

    def __str__(self) -> str:
        """Return one line for people."""
        if not self.difference and not self.missing:
            return f"tables: all {self.stored} responses are stored, and the requests of {self.open} open calls"
        return (
            f"tables: {self.stored} responses are stored of {self.responses} that were delivered, "
            f"the requests of {self.missing} open calls are missing: after a restore run `litellm-sqlalchemy replay`; "
            "otherwise see whether `gateway.name` was changed, or another spool has the same"
        )


@dataclass(frozen=True)
class Known:
    """Losses that an operator has acknowledged: frames damaged and dropped, and `TablesStatus.difference`."""

    damaged: int = 0
    dropped: int = 0
    difference: int = 0

    def __str__(self) -> str:
        """Return one line for people."""
        return f"acknowledged: damaged {self.damaged}, dropped {self.dropped}, {self.difference} responses not stored"


def read_known(directory: Path) -> Known:
    """Return what was acknowledged for a spool. Raises SpoolError."""
    file = directory / _ACKNOWLEDGED_FILE
    try:
        return Known(**{name: int(value) for name, value in orjson.loads(read_file(file)).items()})
    except FileNotFoundError:
        return Known()
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise SpoolError(f"{file} cannot be read ({error}): remove it, and run status --acknowledge again") from None


def acknowledge(directory: Path, status: SpoolStatus, tables: TablesStatus | None) -> Known:
    """Write down that somebody knows of what is lost; return it. Raises SpoolError.

    Without `tables` what was known of them stays.
    """
    difference = tables.difference if tables else read_known(directory).difference
    known = Known(status.damaged, status.dropped, difference)
    try:
        replace_file(directory / _ACKNOWLEDGED_FILE, json.dumps(asdict(known)).encode())
    except OSError as error:
        raise SpoolError(f"{directory / _ACKNOWLEDGED_FILE} cannot be written: {error.strerror}") from None
    return known


def tables_status(settings: Settings) -> TablesStatus:
    """Compare the writer's counters with the tables, while it works. Raises DatabaseError, SpoolError."""
    directory = open_directory(settings.spool.directory)
    deadline = time.monotonic() + _NOTED_WITHIN
    with connected(settings.database, "reader", "status") as connection:
        before, calls = _delivered(directory)
        stored = int(_count(connection, _STORED, gateway=settings.gateway.name))
        missing = len(calls) - _count(connection, _OPEN, calls=calls)
    after = before
    while after < stored and time.monotonic() < deadline:  # committed, and not noted yet
        time.sleep(_POLL_INTERVAL)
        after, _ = _delivered(directory)
    return TablesStatus(min(max(before, stored), after), stored, len(calls), missing)


def _delivered(directory: Path) -> tuple[int, list[str]]:
    """Return how many responses the writer has committed, and the calls that are open."""
    totals, cursors = read_state(directory)
    calls = [call for cursor in cursors.values() for call in cursor.open]
    return totals.delivered_responses + totals.interrupted, calls


def _count(connection: Connection, query: str, **parameters: object) -> int:
    return int(connection.execute(text(query), parameters).scalar_one())
