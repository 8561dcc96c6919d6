"""What became of every frame: from the writer's memory, the segments themselves and, compared with both, the tables."""

import time
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import Connection, text

from litellm_sqlalchemy.consumer import Cursor, last_sequence, producers, read_state
from litellm_sqlalchemy.database import connected
from litellm_sqlalchemy.settings import Settings
from litellm_sqlalchemy.spool import open_directory, read_counters, segment_sizes

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

    def __str__(self) -> str:
        """Return one line for people."""
        return (
            f"received {self.received}, delivered {self.delivered_requests + self.delivered_responses}, "
            f"spooled {self.spooled}, dead {self.dead}, damaged {self.damaged}, dropped {self.dropped}"
        )


def spool_status(directory: Path) -> SpoolStatus:
    """Read the spool; it may change meanwhile. Raises SpoolError."""
    totals, cursors = read_state(open_directory(directory))
    spooled = dropped = 0
    highest = {}
    for producer in producers(directory):
        cursor = cursors.get(producer, Cursor())
        received = read_counters(directory / "producers" / producer).get("received", 0)  # before the frames
        pending, last = last_sequence(directory, producer, cursor)
        spooled += pending
        dropped += max(received, last) - cursor.sequence - pending
        highest[producer] = last
    dead = sum(1 for _ in directory.glob("dead/*.json"))  # requeued ones have gone back to what is received
    delivered = totals.delivered_requests + totals.delivered_responses
    return SpoolStatus(
        received=delivered + dead + totals.damaged + totals.dropped + dropped + spooled,
        delivered_requests=totals.delivered_requests,
        delivered_responses=totals.delivered_responses,
        duplicates=totals.duplicates,
        dead=dead,
        damaged=totals.damaged,
        dropped=totals.dropped + dropped,
        interrupted=totals.interrupted,
        spooled=spooled,
        spool_bytes=sum(size for _file, size in segment_sizes(directory)),
        highest=highest,
    )


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
    def agree(self) -> bool:
        """Whether nothing is lost and nothing is there twice. Every response has its request: a foreign key says so."""
        return self.responses == self.stored and not self.missing

    def __str__(self) -> str:
        """Return one line for people."""
        if self.agree:
            return f"tables: all {self.stored} responses are stored, and the requests of {self.open} open calls"
        return (
            f"tables: {self.stored} responses are stored of {self.responses} that were delivered, "
            f"the requests of {self.missing} open calls are missing: after a restore run `litellm-sqlalchemy replay`; "
            "otherwise see whether `gateway.name` was changed, or another spool has the same"
        )


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
