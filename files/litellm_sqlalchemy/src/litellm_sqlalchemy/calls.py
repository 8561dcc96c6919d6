"""One client call, from its first byte in to its last byte out, and the records made of it.

LiteLLM's events are not calls: a retry that succeeds fires a failure and a success, a failed pass-through fires only a
hook, a rejected key fires two. The HTTP exchange is the call: `CallObserver` (ASGI) opens a `Call`, LiteLLM's hooks add
what they know to it, and it ends when the exchange has ended and LiteLLM has told the outcome.

Nothing here waits for anything: the request record is appended to the spool when LiteLLM accepts the call, the
response record after the last byte has gone out.
"""

import hashlib
import ipaddress
import logging
import time
from asyncio import TimerHandle, get_running_loop
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from typing import Any

import orjson

from litellm_sqlalchemy.frames import Kind
from litellm_sqlalchemy.identifiers import uuid7
from litellm_sqlalchemy.redaction import REDACTION_VERSION, redact
from litellm_sqlalchemy.settings import Settings
from litellm_sqlalchemy.spool import Producer

_log = logging.getLogger(__name__)

#: Characters kept of a text that is indexed (a btree entry holds 2,704 bytes) and of any other one.
_INDEXED_LENGTH = 512
_TEXT_LENGTH = 8192
_INT4_MAX = 2**31 - 1
#: The call that the running task works for; LiteLLM runs its logging in the context of the request.
current_call: ContextVar["Call | None"] = ContextVar("litellm_sqlalchemy_call", default=None)


def text(value: object, length: int = _INDEXED_LENGTH) -> str | None:
    """Return a value as text that PostgreSQL can hold, None where there is none."""
    if value is None or value == "":
        return None
    result = value if isinstance(value, str) else str(value)
    if len(result) > length:
        result = result[:length]
    if not result.isascii():
        result = result.encode(errors="replace").decode()
    return result.replace("\0", "\N{REPLACEMENT CHARACTER}") if "\0" in result else result


def number(value: object) -> int | None:
    """Return a token count as it fits the column, None where there is none."""
    return min(int(value), _INT4_MAX) if isinstance(value, int | float) and value == value and value >= 0 else None  # noqa: PLR0124


def milliseconds(value: object) -> float | None:
    """Return a duration, None where it is none."""
    return round(float(value), 3) if isinstance(value, int | float) else None


class Body:
    """Bytes that pass by: their count, digest and, up to a limit, themselves."""

    __slots__ = ("_chunks", "_digest", "_kept", "_limit", "size")

    def __init__(self, limit: int) -> None:
        self.size = 0
        self._kept = 0
        self._limit = limit
        self._chunks: list[bytes] = []
        self._digest = hashlib.sha256()

    def add(self, chunk: bytes) -> None:
        """Take note of a chunk."""
        self.size += len(chunk)
        self._digest.update(chunk)
        if self._kept < self._limit:
            kept = chunk[: self._limit - self._kept]
            self._kept += len(kept)
            self._chunks.append(kept)

    def content(self) -> bytes:
        """Return what is kept."""
        return self._chunks[0] if len(self._chunks) == 1 else b"".join(self._chunks)

    @property
    def truncated(self) -> bool:
        """Whether there was more than what is kept."""
        return self.size > self._kept

    def digest(self) -> str | None:
        """Return the SHA-256 of all of it, hexadecimal."""
        return self._digest.hexdigest() if self.size else None


class Recorder:
    """Writes the records of calls to the spool; one per gateway process."""

    def __init__(self, settings: Settings) -> None:
        """Take the policy; the spool is opened by the first record."""
        self.settings = settings
        self.content = settings.content
        self.producer = Producer(settings.spool)
        self.failures = 0
        self._rejected = _TokenBucket(settings.content.rejected_rate)

    def write(self, kind: Kind, metadata: dict[str, Any], payload: bytes, body: Body | None) -> bool:
        """Append a record, its payload by policy; return whether it stands in the spool."""
        mode = self.content.mode
        metadata["content_mode"] = mode
        metadata["redaction_version"] = REDACTION_VERSION
        metadata["payload_size"] = body.size if body else len(payload)
        metadata["payload_digest"] = body.digest() if body else None
        if mode != "full":
            payload = redact(payload) if mode == "redacted" and not (body and body.truncated) else b""
        elif body and body.truncated and payload:
            metadata["payload_truncated"] = True
        elif len(payload) > self.content.max_payload_size:
            metadata["payload_truncated"] = True
            payload = payload[: self.content.max_payload_size]
        return self.producer.append(kind, orjson.dumps(metadata), payload)

    def admit_rejected(self) -> int:
        """Return for how many rejected calls a row shall be written now; 0 for none."""
        return self._rejected.take()


class _TokenBucket:
    """Lets `rate` events a second pass, with a burst of ten seconds' worth, and counts those it holds back."""

    def __init__(self, rate: float) -> None:
        self._rate = rate
        self._tokens = self._capacity = rate * 10
        self._at = time.monotonic()
        self._held = 0

    def take(self) -> int:
        now = time.monotonic()
        self._tokens = min(self._capacity, self._tokens + (now - self._at) * self._rate)
        self._at = now
        self._held += 1
        if self._tokens < 1:
            return 0
        self._tokens -= 1
        held, self._held = self._held, 0
        return held


class Call:
    """What is known of one client call; LiteLLM's hooks and the ASGI observer fill it in."""

    __slots__ = (
        "_recorder", "_timer", "_written", "accepted", "attempts", "call_id", "caller", "client", "content_type",
        "data", "disconnected", "done", "ended_at", "endpoint", "error", "event", "failed", "first_byte_at", "gateway",
        "id", "method", "noticed", "origin", "request", "response", "started", "started_at", "status_code", "streamed",
        "user_agent",
    )  # fmt: skip

    def __init__(self, recorder: Recorder, gateway: str, origin: str = "client") -> None:
        self._recorder = recorder
        self._timer: TimerHandle | None = None
        self._written = False
        limit = recorder.content.max_payload_size if recorder.content.mode != "metadata" else 0
        self.id = uuid7().hex
        self.gateway = gateway
        self.origin = origin
        self.started_at = time.time_ns() // 1000
        self.started = time.perf_counter()
        self.first_byte_at = self.ended_at = 0.0
        self.method: str | None = None
        self.endpoint: str | None = None
        self.client: str | None = None
        self.user_agent: str | None = None
        self.request = Body(limit)
        self.response = Body(limit)
        self.content_type = b""
        self.streamed = False
        self.status_code: int | None = None
        self.disconnected = False
        self.call_id: str | None = None
        self.noticed = False  # LiteLLM has fired a hook: this exchange is a call
        self.accepted = False  # LiteLLM's pre-call hook was reached
        self.failed = False  # LiteLLM's post-call failure hook was reached
        self.done = False
        self.caller: dict[str, Any] = {}
        self.data: Mapping[str, Any] = {}
        self.attempts: list[dict[str, Any]] = []
        self.event: dict[str, Any] = {}
        self.error: dict[str, Any] = {}

    def accept(self, key: Any, data: Mapping[str, Any], call_type: str | None) -> None:
        """Take note that LiteLLM has accepted the call, and write its request record."""
        self.noticed = self.accepted = True
        self.describe(key, data, call_type)
        self.write_request()

    def describe(self, key: Any, data: Mapping[str, Any], call_type: str | None) -> None:
        """Take what LiteLLM knows of the caller (UserAPIKeyAuth) and of the request's data."""
        self.data = data
        metadata = data.get("metadata") or data.get("litellm_metadata")
        metadata = metadata if isinstance(metadata, dict) else {}
        tags = metadata.get("tags")
        logging_object = data.get("litellm_logging_obj")  # all that a pass-through call has
        call_id = data.get("litellm_call_id") or getattr(logging_object, "litellm_call_id", None)
        self.call_id = text(call_id) or self.call_id
        self.caller = {
            "call_type": text(call_type),
            "trace_id": text(data.get("litellm_trace_id") or metadata.get("trace_id")),
            "session_id": text(data.get("litellm_session_id") or metadata.get("session_id")),
            "model": text(data.get("model")),
            "stream": data.get("stream") is True,
            "key_hash": text(getattr(key, "api_key", None)),
            "key_alias": text(getattr(key, "key_alias", None)),
            "user_id": text(getattr(key, "user_id", None)),
            "team_id": text(getattr(key, "team_id", None)),
            "organization_id": text(getattr(key, "org_id", None)),
            "end_user": text(getattr(key, "end_user_id", None) or data.get("user")),
            "tags": [tag for tag in map(text, tags) if tag] if isinstance(tags, list) else None,
        }

    def write_request(self, calls: int = 1) -> None:
        """Write the request record, once."""
        if self._written:
            return
        content = self._recorder.content
        metadata = {
            "id": self.id,
            "created_at": self.started_at,
            "gateway": self.gateway,
            "origin": self.origin,
            "calls": calls,
            "call_id": self.call_id,
            "method": self.method,
            "endpoint": text(self.endpoint),
            "stream": False,
            "client_address": self.client if content.client_address else None,
            "user_agent": text(self.user_agent) if content.user_agent else None,
            **self.caller,
        }
        self._written = self._recorder.write(Kind.REQUEST, metadata, self._request_payload(), self.request)

    def conclude(self) -> None:
        """End the call where all is known: the exchange has ended and LiteLLM has told the outcome."""
        if self.done or not self.ended_at:
            return
        if not self.noticed:
            self.done = True  # no call: a model list, a health probe, a page
        elif self.event.get("status") == "success" or self.failed or (self.status_code or 0) >= 400:
            self.finish()
        elif self._timer is None:
            self._timer = get_running_loop().call_later(self._recorder.content.event_timeout, self.finish)

    def finish(self) -> None:
        """Write the response record, once."""
        if self.done:
            return
        self.done = True
        if self._timer is not None:
            self._timer.cancel()
        if not self.accepted:
            calls = self._recorder.admit_rejected()
            if not calls:
                return
            self.write_request(calls)
        if not self._written:
            self._recorder.producer.skip()  # a response without its request fits no table: counted with it
            return
        self._recorder.write(Kind.RESPONSE, self._response_metadata(), *self._response_payload())

    def _status(self) -> str:
        if self.disconnected or self.event.get("error_code") == "499":
            return "client_disconnected"
        if self.failed or (self.status_code or 200) >= 400 or self.event.get("status") == "failure":
            return "failure"
        return "success"

    def _response_metadata(self) -> dict[str, Any]:
        event = self.event
        status = self._status()
        error = {} if status == "success" else {**_without_none(event.get("error")), **self.error}
        return {
            "request_id": self.id,
            "created_at": self.started_at + int((self.ended_at - self.started) * 1e6),
            "status": status,
            "status_code": self.status_code,
            **event.get("columns", {}),
            **error,
            "duration_ms": milliseconds((self.ended_at - self.started) * 1000),
            "time_to_first_token_ms": milliseconds((self.first_byte_at - self.started) * 1000)
            if self.first_byte_at and status != "failure"
            else None,
            "attempt_count": len(self.attempts) + (event.get("status") == "success"),
            "attempts": self.attempts or None,
        }

    def _request_payload(self) -> bytes:
        if self.request.size and not self._is_multipart():
            return self.request.content()
        if not self._is_multipart():
            return b""
        fields = {key: value for key, value in self.data.items() if isinstance(value, str | int | float | bool)}
        return orjson.dumps(fields)

    def _is_multipart(self) -> bool:
        return self.content_type.startswith(b"multipart/")

    def _response_payload(self) -> tuple[bytes, Body | None]:
        if self.streamed or not self.response.size:
            assembled = self.event.get("response")
            return (orjson.dumps(assembled, default=str) if assembled else b""), None
        return self.response.content(), self.response


def _without_none(mapping: Mapping[str, Any] | None) -> dict[str, Any]:
    return {key: value for key, value in (mapping or {}).items() if value is not None}


def event_of(payload: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a response record takes from LiteLLM's StandardLoggingPayload.

    Its static price map (`model_map_information`, 60 % of it) is not touched.
    """
    hidden = payload.get("hidden_params") or {}
    error = payload.get("error_information") or {}
    metadata = payload.get("metadata") or {}
    usage = metadata.get("usage_object") or {}
    response = payload.get("response")
    return {
        "status": payload.get("status"),
        "error_code": text(error.get("error_code")),
        "error": {
            "error_type": text(error.get("error_class")),
            "error_code": text(error.get("error_code")),
            "error_message": text(error.get("error_message") or payload.get("error_str"), _TEXT_LENGTH),
        },
        "response": response,
        "columns": {
            "model": text(payload.get("model")),
            "provider": text(payload.get("custom_llm_provider")),
            "deployment": text(payload.get("model_id")),
            "api_base": text(payload.get("api_base")),
            "provider_response_id": text(payload.get("id")),
            "finish_reason": text(_finish_reason(response)),
            "cache_hit": bool(payload.get("cache_hit")),
            "prompt_tokens": number(payload.get("prompt_tokens")),
            "completion_tokens": number(payload.get("completion_tokens")),
            "total_tokens": number(payload.get("total_tokens")),
            "cached_tokens": number(_detail(usage, "cached_tokens", "prompt_tokens_details", "input_tokens_details")),
            "reasoning_tokens": number(
                _detail(usage, "reasoning_tokens", "completion_tokens_details", "output_tokens_details")
            ),
            "cost": payload.get("response_cost"),
            "overhead_ms": milliseconds(hidden.get("litellm_overhead_time_ms")),
            "guardrails": payload.get("guardrail_information") or None,
        },
    }


def _detail(usage: Mapping[str, Any], name: str, *groups: str) -> object:
    for group in groups:
        details = usage.get(group)
        if isinstance(details, Mapping) and details.get(name) is not None:
            return details[name]
    return None


def _finish_reason(response: object) -> object:
    if not isinstance(response, Mapping):
        return None
    choices = response.get("choices")
    if isinstance(choices, Sequence) and choices and isinstance(choices[0], Mapping):
        return choices[0].get("finish_reason")
    return response.get("stop_reason") or response.get("status")


def client_address(scope: Mapping[str, Any]) -> str | None:
    """Return the client's address of an ASGI scope, None where it is no IP address."""
    client = scope.get("client")
    try:
        return str(ipaddress.ip_address(client[0])) if client else None
    except ValueError:
        return None
