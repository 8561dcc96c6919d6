"""Records as the callback writes them, and a ledger of what was sent."""

import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import orjson

from litellm_sqlalchemy.frames import Frame, Kind
from litellm_sqlalchemy.identifiers import uuid7
from litellm_sqlalchemy.spool import Producer

BODY = b'{"model":"demo","messages":[{"role":"user","content":"hello"}]}'


def request(identifier: str, **changes: Any) -> bytes:
    """Return the metadata of a request record."""
    return orjson.dumps(
        {
            "id": identifier,
            "created_at": time.time_ns() // 1000,
            "gateway": "test:4000",
            "origin": "client",
            "calls": 1,
            "call_id": identifier,
            "endpoint": "/v1/chat/completions",
            "model": "demo",
            "stream": False,
            "content_mode": "full",
            "redaction_version": 1,
            "payload_size": len(BODY),
            **changes,
        }
    )


def response(identifier: str, **changes: Any) -> bytes:
    """Return the metadata of a response record."""
    return orjson.dumps(
        {
            "request_id": identifier,
            "created_at": time.time_ns() // 1000,
            "status": "success",
            "status_code": 200,
            "attempt_count": 1,
            "content_mode": "full",
            "redaction_version": 1,
            "payload_size": len(BODY),
            **changes,
        }
    )


def pairs(count: int, payload: bytes = BODY) -> list[Frame]:
    """Return the frames of `count` calls, numbered as one producer does."""
    frames: list[Frame] = []
    for _ in range(count):
        identifier = uuid7().hex
        frames.append(Frame(Kind.REQUEST, len(frames) + 1, request(identifier), payload))
        frames.append(Frame(Kind.RESPONSE, len(frames) + 1, response(identifier), payload))
    return frames


@dataclass
class Ledger:
    """What was handed to producers: frames tried, frames acknowledged, by kind and call."""

    tried: set[tuple[Kind, str]] = field(default_factory=set)
    acknowledged: set[tuple[Kind, str]] = field(default_factory=set)
    received: int = 0
    dropped: int = 0

    def send(self, producer: Producer, calls: int, payload: bytes = BODY) -> None:
        """Append the pairs of `calls` calls; a response whose request was dropped is skipped, as the callback does."""
        for _ in range(calls):
            identifier = uuid7().hex
            if self.append(producer, Kind.REQUEST, identifier, request(identifier), payload):
                self.append(producer, Kind.RESPONSE, identifier, response(identifier), payload)
            else:
                producer.skip()
                self.received += 1
                self.dropped += 1

    def append(self, producer: Producer, kind: Kind, identifier: str, metadata: bytes, payload: bytes) -> bool:
        """Append one frame and take note of what became of it."""
        self.received += 1
        self.tried.add((kind, identifier))
        if producer.append(kind, metadata, payload):
            self.acknowledged.add((kind, identifier))
            return True
        self.dropped += 1
        return False

    def merge(self, others: Iterable["Ledger"]) -> "Ledger":
        """Add the ledgers of other producers."""
        for other in others:
            self.tried |= other.tried
            self.acknowledged |= other.acknowledged
            self.received += other.received
            self.dropped += other.dropped
        return self
