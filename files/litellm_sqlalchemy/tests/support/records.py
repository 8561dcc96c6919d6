"""Records as the callback writes them, and a ledger of what was sent."""

import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import orjson

from litellm_sqlalchemy.calls import Call
from litellm_sqlalchemy.events import event_of
from litellm_sqlalchemy.frames import Frame, Kind
from litellm_sqlalchemy.identifiers import uuid7
from litellm_sqlalchemy.producer import Producer
from litellm_sqlalchemy.recorder import Recorder
from litellm_sqlalchemy.records import identifier
from litellm_sqlalchemy.settings import SpoolSettings

#: JSON that Python's parser gives up on.
DEEP = "[" * 2000
BODY = b'{"model":"demo","messages":[{"role":"user","content":"hello"}]}'


def request(call: str, **changes: Any) -> bytes:
    """Return the metadata of a request record."""
    return orjson.dumps(
        {
            "id": call,
            "created_at": time.time_ns() // 1000,
            "gateway": "test:4000",
            "origin": "client",
            "calls": 1,
            "call_id": call,
            "endpoint": "/v1/chat/completions",
            "model": "demo",
            "stream": False,
            "content_mode": "full",
            "redaction_version": 1,
            "payload_size": len(BODY),
            **changes,
        }
    )


def response(call: str, **changes: Any) -> bytes:
    """Return the metadata of a response record."""
    return orjson.dumps(
        {
            "request_id": call,
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
        call = uuid7().hex
        frames.append(Frame(Kind.REQUEST, len(frames) + 1, request(call), payload))
        frames.append(Frame(Kind.RESPONSE, len(frames) + 1, response(call), payload))
    return frames


def make_calls(recorder: Recorder, count: int, model: str = "demo") -> None:
    """Take calls through what the observer and the hooks tell of them, as fast as it goes."""
    for _ in range(count):
        call = Call(recorder, "test:4000")
        call.method, call.endpoint = "POST", "/v1/chat/completions"
        call.request.add(BODY)
        call.accept(None, {"model": model, "litellm_call_id": call.id}, "acompletion")
        call.status_code = 200
        call.response.add(BODY)
        call.event = event_of({"status": "success", "litellm_call_id": call.id, "model": model, "prompt_tokens": 3})
        call.ended_at = time.perf_counter()
        call.conclude()


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
            call = uuid7().hex
            if self.append(producer, Kind.REQUEST, call, request(call), payload):
                self.append(producer, Kind.RESPONSE, call, response(call), payload)
            else:
                producer.skip()
                self.received += 1
                self.dropped += 1

    def append(self, producer: Producer, kind: Kind, call: str, metadata: bytes, payload: bytes) -> bool:
        """Append one frame and take note of what became of it."""
        self.received += 1
        self.tried.add((kind, call))
        if producer.append(kind, metadata, payload):
            self.acknowledged.add((kind, call))
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


class NotingProducer(Producer):
    """A producer that takes note in a ledger of what it is given and what becomes of it."""

    def __init__(self, settings: SpoolSettings, ledger: Ledger) -> None:
        """Take the ledger, which other producers may share."""
        super().__init__(settings)
        self.ledger = ledger

    def append(self, kind: Kind, metadata: bytes, payload: bytes = b"", *, accepted: bool = True) -> bool:
        """Append and take note."""
        record = (kind, identifier(Frame(kind, 0, metadata, payload)))
        self.ledger.received += 1
        self.ledger.tried.add(record)
        if super().append(kind, metadata, payload, accepted=accepted):
            self.ledger.acknowledged.add(record)
            return True
        self.ledger.dropped += 1
        return False

    def skip(self) -> None:
        """Skip and take note."""
        super().skip()
        self.ledger.received += 1
        self.ledger.dropped += 1
