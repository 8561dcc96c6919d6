"""A store in memory with PostgreSQL's rules, and crashes at chosen places."""

import os
from collections.abc import Callable
from typing import Any

import orjson

from litellm_sqlalchemy.frames import Frame, Kind
from litellm_sqlalchemy.producer import Producer
from litellm_sqlalchemy.store import DeadLetter, Delivery

POISON = b"poison"


class CrashError(BaseException):
    """The process died here."""


class FakeStore:
    """Holds rows by key; a response needs its request; a payload of `POISON` is refused for good."""

    def __init__(self) -> None:
        """Start empty."""
        self.rows: list[tuple[tuple[Kind, str], str]] = []
        self.idempotent = True

    def deliver(self, frames: list[Frame], *, give_up_on_unknown: bool = False) -> Delivery:
        """Store a batch like `Store.deliver`."""
        delivery = Delivery()
        there = {record for record, _ in self.rows}
        for frame in frames:
            metadata = orjson.loads(frame.metadata)
            call = metadata["id" if frame.kind is Kind.REQUEST else "request_id"]
            record = (frame.kind, call)
            if frame.payload == POISON or (frame.kind is Kind.RESPONSE and (Kind.REQUEST, call) not in there):
                delivery.dead.append(DeadLetter(frame, "refused"))
            elif record in there and self.idempotent:
                delivery.duplicates += 1
            else:
                there.add(record)
                self.rows.append((record, metadata.get("status", "")))
                delivery.inserted += 1
        return delivery


def crashing(function: Callable[..., Any], *, before: bool) -> Callable[..., Any]:
    """Return `function` with a crash before or after it."""

    def crash(*arguments: Any, **keywords: Any) -> Any:
        if not before:
            function(*arguments, **keywords)
        raise CrashError

    return crash


def kill(producer: Producer) -> None:
    """Leave a producer's folder as SIGKILL leaves it: what was written is there, the lock is free, no counters."""
    producer._closed.set()
    producer._dirty.set()
    producer._thread.join()
    if producer._segment is not None:
        os.close(producer._segment.descriptor)
    if producer._lock is not None:
        producer._lock.release()
    if producer._counters_file is not None:
        os.close(producer._counters_file)
