"""Replay: after a restore of the database to an earlier time, store again what the spool has since.

A call that ran while the database went back has lost its request, for which its response was refused: with the request
there again, such dead letters get another chance.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from litellm_sqlalchemy.database import make_engine
from litellm_sqlalchemy.dead_letters import read_letters, requeue
from litellm_sqlalchemy.errors import DatabaseError
from litellm_sqlalchemy.frames import Frame
from litellm_sqlalchemy.retention import delivered_since
from litellm_sqlalchemy.settings import Settings
from litellm_sqlalchemy.spool import open_directory
from litellm_sqlalchemy.store import Store, Unavailable

#: How the reason of a dead letter says that its request is not there (foreign_key_violation).
_FOREIGN_KEY = "SQLSTATE 23503"


@dataclass
class Replayed:
    """Counts of frames: seen = restored + present + refused; and of dead letters that were requeued."""

    seen: int = 0
    restored: int = 0
    present: int = 0
    refused: int = 0
    requeued: int = 0
    reason: str = ""
    """Why the last one was refused."""

    def __str__(self) -> str:
        """Return one line for people."""
        refused = f", {self.refused} were refused (the last one: {self.reason})" if self.refused else ""
        requeued = f"; {self.requeued} dead letters have their request again and were requeued" if self.requeued else ""
        return (
            f"replayed {self.seen} frames: {self.restored} were missing, {self.present} were there{refused}{requeued}"
        )


def replay(settings: Settings, since: float) -> Replayed:
    """Store what was delivered since a time (Unix) again; what is there stays. Raises DatabaseError, SpoolError.

    It goes past the writer, whose counters know these frames already, and may run beside it.
    """
    engine = make_engine(settings.database, "writer", "replay", statement_timeout=settings.writer.statement_timeout)
    store, result = Store(engine), Replayed()
    directory = open_directory(settings.spool.directory)
    frames = delivered_since(directory, since)
    try:
        for batch in _batches(frames, settings.writer.batch_size):
            delivery = store.deliver(batch, give_up_on_unknown=True)
            result.seen += len(batch)
            result.restored += delivery.inserted
            result.present += delivery.duplicates
            result.refused += len(delivery.dead)
            if delivery.dead:
                result.reason = delivery.dead[-1].reason
    except Unavailable as error:
        raise DatabaseError(f"{error}; {result.seen} frames were replayed before: run it again") from None
    finally:
        engine.dispose()
    orphans = [letter.id for letter in read_letters(directory) if _FOREIGN_KEY in letter.reason]
    result.requeued = len(requeue(directory, orphans)) if orphans else 0
    return result


def _batches(frames: Iterator[Frame], size: int) -> Iterator[list[Frame]]:
    while batch := list(islice(frames, size)):
        yield batch
