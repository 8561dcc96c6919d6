"""Replay: after a restore of the database to an earlier time, store again what the spool has since.

A call that ran while the database went back has lost its request, for which its response was refused: with the request
there again, such dead letters get another chance.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass

from litellm_sqlalchemy.consumer import READ_SIZE
from litellm_sqlalchemy.database import ErrorClass, make_engine
from litellm_sqlalchemy.dead_letters import read_letters, requeue
from litellm_sqlalchemy.errors import DatabaseError
from litellm_sqlalchemy.frames import Frame, body_size
from litellm_sqlalchemy.retention import delivered_since
from litellm_sqlalchemy.settings import Settings
from litellm_sqlalchemy.spool import open_directory
from litellm_sqlalchemy.store import Delivery, Store, Unavailable, retry_delay

#: How the reason of a dead letter says that its request is not there (foreign_key_violation).
_FOREIGN_KEY = "SQLSTATE 23503"
#: Attempts at a batch: as many as a thousand frames take to be halved down to one.
_ATTEMPTS = 10


@dataclass
class Replayed:
    """Counts of frames: seen = restored + present + refused; and of dead letters that were requeued.

    What an attempt had stored before it failed is present at the next one.
    """

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
    store, result = Store(engine, settings.writer.statement_timeout), Replayed()
    directory = open_directory(settings.spool.directory)
    frames = delivered_since(directory, since)
    try:
        for batch in _batches(frames, settings.writer.batch_size):
            delivery = _deliver(store, batch, settings.writer.retry_delay_max)
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


def _deliver(store: Store, batch: list[Frame], longest_delay: float) -> Delivery:
    """Store a batch, in smaller parts after an attempt that took too long. Raises Unavailable."""
    attempt = 0
    while True:
        attempt += 1
        try:
            return store.deliver(batch, give_up_on_unknown=True)
        except Unavailable as error:
            if error.cause is not ErrorClass.RETRY or attempt == _ATTEMPTS:
                raise
        time.sleep(retry_delay(attempt, longest_delay))


def _batches(frames: Iterator[Frame], limit: int) -> Iterator[list[Frame]]:
    """Yield batches as the writer has them: of at most `limit` frames, and no more once they hold `READ_SIZE` bytes."""
    batch: list[Frame] = []
    size = 0
    for frame in frames:
        batch.append(frame)
        size += body_size(frame)
        if len(batch) >= limit or size >= READ_SIZE:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
