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
import re
import time
import zlib
from asyncio import TimerHandle, get_running_loop
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from typing import Any

import orjson

from litellm_sqlalchemy.frames import Kind
from litellm_sqlalchemy.identifiers import uuid7
from litellm_sqlalchemy.policy import Policy
from litellm_sqlalchemy.redaction import REDACTION_VERSION, redact, scrubbed, without_messages
from litellm_sqlalchemy.settings import Mode, Settings
from litellm_sqlalchemy.spool import Producer

_log = logging.getLogger(__name__)

#: Characters kept of a text that is indexed (a btree entry holds 2,704 bytes) and of any other one.
_INDEXED_LENGTH = 512
_TEXT_LENGTH = 8192
_INT4_MAX = 2**31 - 1
#: What LiteLLM calls a key by: its SHA-256, or the master key's name. Anything else may be the key itself.
_KEY_HASH = re.compile(r"[0-9a-f]{64}|litellm_proxy_master_key")
#: What LiteLLM puts in the place of content where a client or its own setting asks for it.
_LITELLM_REDACTED = b"redacted-by-litellm"
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
    return min(int(value), _INT4_MAX) if isinstance(value, int | float) and value == value and value >= 0 else None


def milliseconds(value: object) -> float | None:
    """Return a duration, None where it is none."""
    return round(float(value), 3) if isinstance(value, int | float) else None


class Body:
    """Bytes that pass by: their count, up to a limit themselves, and beyond it their digest."""

    __slots__ = ("_chunks", "_digest", "_kept", "_limit", "size")

    def __init__(self, limit: int) -> None:
        self.size = 0
        self._kept = 0
        self._limit = limit
        self._chunks: list[bytes] = []
        self._digest: Any = None  # of all bytes, once there are more than are kept

    def add(self, chunk: bytes) -> None:
        """Take note of a chunk."""
        self.size += len(chunk)
        if self._digest is not None:
            self._digest.update(chunk)
        elif self.size > self._limit:
            self._digest = hashlib.sha256(self.content())
            self._digest.update(chunk)
        if self._kept < self._limit:
            kept = chunk[: self._limit - self._kept]
            self._kept += len(kept)
            self._chunks.append(kept)

    def content(self) -> bytes:
        """Return what is kept."""
        if len(self._chunks) != 1:
            self._chunks = [b"".join(self._chunks)]
        return self._chunks[0]

    @property
    def truncated(self) -> bool:
        """Whether there was more than what is kept."""
        return self.size > self._kept

    def digest(self) -> str | None:
        """Return the SHA-256 of all of it, hexadecimal."""
        if not self.size:
            return None
        return str((self._digest or hashlib.sha256(self.content())).hexdigest())


class Recorder:
    """Writes the records of calls to the spool; one per gateway process."""

    def __init__(self, settings: Settings) -> None:
        """Take the policy; the spool is opened by the first record."""
        self.settings = settings
        self.content = settings.content
        self.policy = Policy(settings.content)
        self.headers = frozenset(name.encode() for name in settings.content.headers)
        self.producer = Producer(settings.spool)
        self.failures = 0
        self.rejections = _Rejections(settings.content.rejected_rate)

    def write(
        self,
        kind: Kind,
        mode: Mode,
        metadata: dict[str, Any],
        body: Body | None,
        payload: bytes,
        truncated: bool = False,
    ) -> bool:
        """Append a record, its content by `mode`; return whether it stands in the spool.

        `truncated` says that the payload is only the beginning of what there was. The digest of `body` goes with it
        where the payload, as it is written, is not that body.
        """
        truncated = truncated or len(payload) > self.content.max_payload_size
        if kind is Kind.REQUEST:
            metadata["content_mode"] = mode
            metadata["redaction_version"] = REDACTION_VERSION
        if mode != "full":
            payload = redact(payload) if mode == "redacted" and not truncated else b""
            metadata = without_messages(metadata)
        payload = scrubbed(payload)
        if truncated and payload:
            metadata["payload_truncated"] = True
            payload = payload[: self.content.max_payload_size]
        if body is not None and (body.truncated or payload != body.content()):
            metadata["payload_digest"] = body.digest()
        return self.producer.append(kind, scrubbed(orjson.dumps(metadata)), payload)

    def spent(self, since: float) -> None:
        """Count the time that a hook took, since its `time.perf_counter()`."""
        self.producer.seconds += time.perf_counter() - since

    def fail(self, what: str) -> None:
        """Count and log the exception at hand; the client's call goes on."""
        self.failures += 1
        _log.exception("request log: %s failed; the call goes on", what)


class _Rejections:
    """Writes calls that LiteLLM has rejected: at most `rate` a second, after a burst of ten seconds' worth.

    Calls above that are counted, and the last of them is written for all as soon as the rate allows.
    """

    def __init__(self, rate: float) -> None:
        self._rate = rate
        self._tokens = self._capacity = rate * 10
        self._at = time.monotonic()
        self._held = 0
        self._last: Call | None = None
        self._timer: TimerHandle | None = None

    def add(self, call: "Call") -> None:
        self._held += 1
        self._last = call
        if self._timer is not None:
            return
        now = time.monotonic()
        self._tokens = min(self._capacity, self._tokens + (now - self._at) * self._rate)
        self._at = now
        if self._tokens >= 1:
            self._write()
        else:
            self._timer = get_running_loop().call_later((1 - self._tokens) / self._rate, self._write)

    def _write(self) -> None:
        self._timer = None
        self._tokens -= 1
        call, calls = self._last, self._held
        self._last, self._held = None, 0
        if call is not None:
            call.write(calls)


class Call:
    """What is known of one client call; LiteLLM's hooks and the ASGI observer fill it in."""

    __slots__ = (
        "_recorder", "_timer", "_written", "aborted", "accepted", "attempts", "call_id", "caller", "client",
        "content_encoding", "content_type", "data", "disconnected", "done", "ended_at", "endpoint", "error", "event",
        "failed", "first_byte_at", "gateway", "headers", "id", "interrupted", "method", "mode", "noticed", "origin",
        "request", "response", "session_id", "started", "started_at", "status_code", "streamed", "user_agent",
    )  # fmt: skip

    def __init__(self, recorder: Recorder, gateway: str, origin: str = "client") -> None:
        self._recorder = recorder
        self._timer: TimerHandle | None = None
        self._written: bool | None = None  # whether the request record stands in the spool; None: not tried
        limit = recorder.content.max_payload_size if recorder.policy.keeps_content else 0
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
        self.headers: dict[str, str] = {}  # those of the allow-list
        self.request = Body(limit)
        self.response = Body(limit)
        self.content_type = b""
        self.content_encoding = b""
        self.streamed = False
        self.status_code: int | None = None
        self.disconnected = False  # the client hung up before the last byte
        self.aborted = False  # LiteLLM broke off its answer
        self.interrupted = False  # the server stopped in the middle of it
        self.call_id: str | None = None
        self.session_id: str | None = None
        self.noticed = False  # LiteLLM has fired a hook: this exchange is a call
        self.accepted = False  # LiteLLM's pre-call hook was reached
        self.failed = False  # LiteLLM's post-call failure hook was reached
        self.done = False
        self.mode: Mode = recorder.policy.strictest  # until LiteLLM has accepted its caller
        self.caller: dict[str, Any] = {}
        self.data: Mapping[str, Any] = {}
        self.attempts: list[dict[str, Any]] = []
        self.event: dict[str, Any] = {}
        self.error: dict[str, Any] = {}

    def accept(self, key: Any, data: Mapping[str, Any], call_type: str | None) -> None:
        """Take note that LiteLLM has accepted the call, and write its request record."""
        self.noticed = self.accepted = True
        try:
            self.describe(key, data, call_type)
        finally:
            self.write_request()

    def describe(self, key: Any, data: Mapping[str, Any], call_type: str | None) -> None:
        """Take what LiteLLM knows of the caller (UserAPIKeyAuth) and of the request's data."""
        self.data = data
        metadata = data.get("metadata") or data.get("litellm_metadata")
        metadata = metadata if isinstance(metadata, dict) else {}
        tags = metadata.get("tags")
        logging_object = data.get("litellm_logging_obj")  # all that a pass-through call has
        call_id = text(data.get("litellm_call_id") or getattr(logging_object, "litellm_call_id", None))
        if call_id and (self.accepted or not self.call_id):  # for rejected calls LiteLLM makes up an id of its own
            self.call_id = call_id
        self.caller = {
            "call_type": text(call_type),
            "trace_id": text(data.get("litellm_trace_id") or metadata.get("trace_id")),
            "session_id": text(self.session_id or data.get("litellm_session_id") or metadata.get("session_id")),
            "model": text(data.get("model")),
            "stream": data.get("stream") is True,
            "key_hash": _key_hash(getattr(key, "api_key", None)),
            "key_alias": text(getattr(key, "key_alias", None)),
            "user_id": text(getattr(key, "user_id", None)),
            "team_id": text(getattr(key, "team_id", None)),
            "organization_id": text(getattr(key, "org_id", None)),
            "end_user": text(getattr(key, "end_user_id", None) or self._client_body().get("user")),
            "tags": [tag for tag in map(text, tags) if tag] if isinstance(tags, list) else None,
        }

    def write_request(self, calls: int = 1) -> None:
        """Write the request record, once."""
        if self._written is not None:
            return
        content = self._recorder.content
        known = {
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
            "headers": self.headers or None,
            "payload_size": self.request.size,
        }
        self._written = False
        try:
            if self.accepted and self.caller:
                get = self.caller.get
                names = (get("key_hash"), get("key_alias"), get("team_id"), get("model"))
                self.mode = self._recorder.policy.mode(*names)
            payload, truncated = self._request_payload()
            self._written = self._recorder.write(
                Kind.REQUEST, self.mode, {**known, **self.caller}, self.request, payload, truncated
            )
        except Exception:  # something in the request that nobody thought of: the call itself is recorded all the same
            self._recorder.fail("the request record")
            self._written = self._recorder.write(Kind.REQUEST, self.mode, known, self.request, b"")

    def conclude(self) -> None:
        """End the call where all is known: the exchange has ended and LiteLLM has told the outcome.

        An exchange that LiteLLM fires no hook for is no call: a model list, a health probe, a page.
        """
        if self.done or not self.ended_at or not self.noticed:
            return
        if self.event.get("status") == "success" or self.failed or self.interrupted or (self.status_code or 0) >= 400:
            self.finish()
        elif self._timer is None:
            self._timer = get_running_loop().call_later(self._recorder.content.event_timeout, self.finish)

    def finish(self) -> None:
        """Write what is to be written of the call, once."""
        if self.done:
            return
        self.done = True
        self._recorder.producer.calls += 1
        if self._timer is not None:
            self._timer.cancel()
        if self.accepted or self.event.get("status") == "success":
            self.write()
        else:
            self._recorder.rejections.add(self)

    def write(self, calls: int = 1) -> None:
        """Write the response record, and the request record where it is not written yet."""
        self.write_request(calls)
        if not self._written:
            self._recorder.producer.skip()  # a response without its request fits no table: counted with it
            return
        body = None if self.streamed else self.response
        try:
            payload, truncated = self._response_payload()
            self._recorder.write(Kind.RESPONSE, self.mode, self._response_metadata(), body, payload, truncated)
        except Exception:
            self._recorder.fail("the response record")
            self._recorder.write(Kind.RESPONSE, self.mode, self._outcome(), body, b"")
        # LiteLLM's objects refer to each other and to the context that holds this call: they shall not wait for the
        # garbage collector.
        self.data, self.event = {}, {}

    def _status(self) -> str:
        if self.disconnected or self.event.get("error_code") == "499":
            return "client_disconnected"
        if self.interrupted:
            return "interrupted"
        if self.failed or self.aborted or (self.status_code or 200) >= 400 or self.event.get("status") == "failure":
            return "failure"
        return "success"

    def _outcome(self) -> dict[str, Any]:
        """Return what the exchange itself tells."""
        return {
            "request_id": self.id,
            "created_at": self.started_at + int((self.ended_at - self.started) * 1e6),
            "status": self._status(),
            "status_code": self.status_code,
            "duration_ms": milliseconds((self.ended_at - self.started) * 1000),
            "attempt_count": len(self.attempts),
            "payload_size": self.response.size,
        }

    def _response_metadata(self) -> dict[str, Any]:
        outcome, event = self._outcome(), self.event
        succeeded = outcome["status"] == "success"
        return {
            **event.get("columns", {}),
            **({} if succeeded else {**_without_none(event.get("error")), **self.error}),
            **outcome,
            "time_to_first_token_ms": milliseconds((self.first_byte_at - self.started) * 1000)
            if self.first_byte_at and outcome["status"] != "failure"
            else None,
            "attempt_count": len(self.attempts) + self._last_attempt(),
            "attempts": self.attempts or None,
        }

    def _last_attempt(self) -> int:
        """Return 1 where a provider has answered, however far: that attempt is not among the failed ones."""
        if self.event.get("status") == "success":
            return 0 if self.event["columns"]["cache_hit"] else 1
        return int(self.streamed and self.status_code == 200)

    def _client_body(self) -> Mapping[str, Any]:
        """Return the request's data as the client sent it, before LiteLLM adds to it."""
        body = (self.data.get("proxy_server_request") or {}).get("body")
        return body if isinstance(body, dict) else self.data

    def _request_payload(self) -> tuple[bytes, bool]:
        """Return the body, of a form its fields without the files; and whether it is only a beginning."""
        if not self._is_multipart():
            return self.request.content(), self.request.truncated
        fields = {
            name: value
            for name, value in self._client_body().items()
            if isinstance(value, str | int | float | bool) and name != "litellm_call_id"
        }
        return orjson.dumps(fields), False

    def _is_multipart(self) -> bool:
        return self.content_type.startswith(b"multipart/")

    def _response_payload(self) -> tuple[bytes, bool]:
        """Return the body, and whether it is only a beginning.

        Of a stream: the answer that LiteLLM assembled or, without one, what was streamed.
        """
        if self.streamed or not self.response.size:
            assembled = self.event.get("response")
            payload = orjson.dumps(assembled, default=str) if assembled else b""
            if payload and not (self.response.size and _LITELLM_REDACTED in payload):
                return payload, False
        content = self.response.content()
        if self.content_encoding == b"gzip":
            limit = self._recorder.content.max_payload_size + 1  # one more byte shows that there are more
            content = zlib.decompressobj(wbits=31).decompress(content, limit)
        return content, self.response.truncated


def _key_hash(key: object) -> str | None:
    """Return LiteLLM's name of a key; it hashes only keys that begin with `sk-`, so others are hashed here."""
    if not isinstance(key, str) or not key:
        return None
    return key if _KEY_HASH.fullmatch(key) else hashlib.sha256(key.encode(errors="replace")).hexdigest()


def _without_none(mapping: Mapping[str, Any] | None) -> dict[str, Any]:
    return {key: value for key, value in (mapping or {}).items() if value is not None}


def event_of(payload: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a response record takes from LiteLLM's StandardLoggingPayload.

    Its static price map (`model_map_information`, 60 % of it) is not touched.
    """
    hidden = payload.get("hidden_params") or {}
    error = payload.get("error_information") or {}
    metadata = payload.get("metadata") or {}
    cache_hit = bool(payload.get("cache_hit"))
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
        "response": None if payload.get("call_type") == "pass_through_endpoint" else response,
        "columns": {
            "model": text(payload.get("model")),
            "provider": text(payload.get("custom_llm_provider")),
            "deployment": text(payload.get("model_id")),
            "api_base": text(payload.get("api_base")),
            "provider_response_id": _provider_response_id(payload, cache_hit),
            "finish_reason": text(_finish_reason(response)),
            "cache_hit": cache_hit,
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


def _provider_response_id(payload: Mapping[str, Any], cache_hit: bool) -> str | None:
    """Return the provider's id; where there is none LiteLLM says the call id, and it marks those of cache hits."""
    name = text(payload.get("id"))
    if name is None or name == payload.get("litellm_call_id"):
        return None
    return name.partition("_cache_hit")[0] if cache_hit else name


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
