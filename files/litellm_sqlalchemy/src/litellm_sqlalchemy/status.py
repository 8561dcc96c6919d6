"""Status of the spool: what became of every frame, from the writer's memory and the segments themselves."""

from dataclasses import dataclass
from pathlib import Path

from litellm_sqlalchemy.consumer import Cursor, last_sequence, producers, read_state
from litellm_sqlalchemy.spool import open_directory, read_counters, segment_sizes


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
