"""One client call, from its first byte in to its last byte out, and the records made of it.

LiteLLM's events are not calls: a retry that succeeds fires a failure and a success, a failed pass-through fires only a
hook, a rejected key fires two. The HTTP exchange is the call: `CallObserver` (ASGI) opens a `Call`, LiteLLM's hooks add
what they know to it, and it ends when the exchange has ended and LiteLLM has told the outcome.

Nothing here waits for anything: the request record is appended to the spool when LiteLLM accepts the call, the
response record after the last byte has gone out.
"""

import hashlib
import re
import time
import zlib
from asyncio import TimerHandle, get_running_loop
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from types import MappingProxyType
from typing import Any
from urllib.parse import parse_qs

import orjson

from litellm_sqlalchemy.events import columns_of_answer, sums_of_answers
from litellm_sqlalchemy.frames import Kind
from litellm_sqlalchemy.identifiers import new_id
from litellm_sqlalchemy.recorder import Body, Recorder
from litellm_sqlalchemy.settings import Mode
from litellm_sqlalchemy.values import KEY_HASH, milliseconds, text

_MAX_TAGS = 64
#: Bytes kept of the body of a call that LiteLLM rejects: anybody can make such calls.
_REJECTED_SIZE = 16 * 1024
#: Bytes of a form without files whose fields are kept: to read them takes the event loop 0.5 s for 1 MB.
_FORM_SIZE = 64 * 1024
#: Seconds that LiteLLM may take to tell of an answer that it has refused to hand on.
_LATE_EVENT = 1.0
#: Seconds that it may take to tell who made a call that it has refused: a hook may run in a task of its own.
_LATE_HOOK = 0.1
#: How the kinds of calls begin whose success LiteLLM does not tell where it makes calls of another kind of them.
_UNTOLD = "agenerate_content"
#: Forms without files, and how a body begins that is none: `curl -d` says of whatever it sends that it is such a form.
_FORM, _JSON = b"application/x-www-form-urlencoded", (b"{", b"[")
#: Of a form with files: separator, name of a part, how many parts are read (LiteLLM reads 1,000), and how much of
#: what stands before the value of each.
_BOUNDARY = re.compile(rb'boundary="?([^";,\s]+)', re.IGNORECASE)
_NAME = re.compile(rb'[\s;]name="?([^";\r\n]*)', re.IGNORECASE)
_IS_FILE = re.compile(rb"[\s;]filename\*?=", re.IGNORECASE)
_MAX_PARTS, _PART_HEADERS = 1000, 1024
#: Bodies that are files, forwarded as they are; but LiteLLM reads JSON whatever it is called.
_FILES = (b"audio/", b"image/", b"video/", b"application/octet-stream")
_GZIP = b"\x1f\x8b"
#: What LiteLLM puts in the place of content where a client or its own setting asks for it.
_LITELLM_REDACTED = b"redacted-by-litellm"
#: Stand for what is not known, or not any more. A call lives until LiteLLM's objects that refer to it are collected:
#: each container of its own brings the next collection nearer.
_NOTHING: Mapping[str, Any] = MappingProxyType({})
_NO_BODY = Body(0)
#: The call that the running task works for; LiteLLM runs its logging in the context of the request.
current_call: ContextVar["Call | None"] = ContextVar("litellm_sqlalchemy_call", default=None)


class Call:
    """What is known of one client call; LiteLLM's hooks and the ASGI observer fill it in."""

    method: str | None = None
    endpoint: str | None = None
    client: str | None = None
    user_agent: str | None = None
    content_type = b""
    content_encoding = b""
    first_byte_at = 0.0
    ended_at = 0.0
    streamed = False
    status_code: int | None = None
    disconnected = False
    """The client hung up before the last byte."""
    aborted = False
    """LiteLLM broke off its answer."""
    interrupted = False
    """The server stopped in the middle of it."""
    call_id: str | None = None
    told_id: str | None = None
    """The call id by which LiteLLM tells what belongs to the call, where it has said one."""
    session_id: str | None = None
    noticed = False
    """LiteLLM has fired a hook: this exchange is a call."""
    accepted = False
    """LiteLLM's pre-call hook was reached."""
    failed = False
    """LiteLLM's post-call failure hook was reached, or a session closed because of an error."""
    rejected = False
    """It has ended, and was never accepted."""
    done = False
    answer: Any = None
    """The last one of a deployment."""
    answers: Sequence[Any] = ()
    """Those of the kind that the client asked for: of a call to several models (`"model": "a,b"`) one of each."""
    headers: Mapping[str, str] = _NOTHING
    """Those of the allow-list."""
    caller: Mapping[str, Any] = _NOTHING
    data: Mapping[str, Any] = _NOTHING
    attempts: Sequence[Mapping[str, Any]] = ()
    """Those that have failed."""
    event: Mapping[str, Any] = _NOTHING
    inner: Mapping[str, Any] = _NOTHING
    """The event of another call, which LiteLLM has made of this one."""
    error: Mapping[str, Any] = _NOTHING
    apparent_error: Mapping[str, Any] = _NOTHING
    """What the exchange shows of an error, where LiteLLM tells none."""
    _timer: TimerHandle | None = None
    _written: bool | None = None
    """Whether the request record stands in the spool; None: not tried."""

    def __init__(self, recorder: Recorder, gateway: str, origin: str = "client") -> None:
        self._recorder = recorder
        self.id = new_id()
        self.gateway = gateway
        self.origin = origin
        self.started_at = time.time_ns() // 1000
        self.started = time.perf_counter()
        self.mode: Mode = recorder.policy.strictest  # until LiteLLM has accepted its caller
        self.request, self.response = Body(recorder.kept_size), Body(recorder.kept_size)

    def accept(self, key: Any, data: Mapping[str, Any], call_type: str | None) -> None:
        """Take note that LiteLLM has accepted the call, and write its request record."""
        self.noticed = self.accepted = True
        self.event = _NOTHING  # of another call, which a hook before ours has made
        try:
            self.describe(key, data, call_type)
        finally:
            self.write_request()

    def describe(self, key: Any, data: Mapping[str, Any], call_type: str | None) -> None:
        """Take what LiteLLM knows of the caller (UserAPIKeyAuth) and of the request's data."""
        self.data = data
        metadata = _metadata(data)
        tags = metadata.get("tags")
        logging_object = data.get("litellm_logging_obj")  # all that a pass-through call has
        call_id = text(data.get("litellm_call_id") or getattr(logging_object, "litellm_call_id", None))
        self.told_id = call_id
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
            "tags": [tag for tag in map(text, tags[:_MAX_TAGS]) if tag] if isinstance(tags, list) else None,
        }

    def is_foreign(self, call_id: str | None) -> bool:
        """Return whether this is the id of another call, which LiteLLM has made for this one."""
        return bool(self.accepted and self.told_id and call_id) and call_id != self.told_id

    def take_answer(self, answer: Any, call_type: str | None) -> None:
        """Take an answer of a deployment; LiteLLM may hand on the same one more than once."""
        self.answer = answer
        if call_type == self.caller.get("call_type") and not any(answer is known for known in self.answers):
            self.answers = (*self.answers, answer)

    def forget_request(self) -> None:
        """Keep nothing of the request's body but its size and digest."""
        self.request.forget()
        self.content_type = b""

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
            self._written = self._record(Kind.REQUEST, {**known, **self.caller}, self.request, payload, truncated)
        except Exception:  # something in the request that nobody thought of: the call itself is recorded all the same
            self._recorder.fail("the request record")
            self._written = self._record(Kind.REQUEST, known, self.request, b"")

    def _record(
        self, kind: Kind, metadata: dict[str, Any], body: Body | None, payload: bytes, truncated: bool = False
    ) -> bool:
        return self._recorder.write(kind, self.mode, metadata, body, payload, truncated, accepted=self.accepted)

    def conclude(self) -> None:
        """End the call where all is known: the exchange has ended and LiteLLM has told the outcome.

        An exchange that LiteLLM fires no hook for is no call: a model list, a health probe, a page. What a provider
        has answered to a call that failed all the same, by a guardrail's decision, may be told after its end.
        """
        if self.done or not self.ended_at or not self.noticed:
            return
        failed = self._has_failed()
        answered = self.event.get("status") == "success"
        if answered or self.interrupted or (failed and (self.attempts or not self.accepted)):
            self.finish()
        else:
            self._finish_in(_LATE_EVENT if failed or self._is_untold() else self._recorder.content.event_timeout)

    def await_hook(self) -> None:
        """End, soon, a call that LiteLLM has refused, or broken down over, before any hook."""
        self._finish_in(_LATE_HOOK)

    def _has_failed(self) -> bool:
        return self.failed or (self.status_code or 0) >= 400

    def _is_untold(self) -> bool:
        """Return whether LiteLLM has told all that it will by the event of another call."""
        return bool(self.inner) and str(self.caller.get("call_type")).startswith(_UNTOLD)

    def _finish_in(self, seconds: float) -> None:
        loop = get_running_loop()
        if self._timer is not None:
            if self._timer.when() <= loop.time() + seconds:
                return
            self._timer.cancel()
        self._timer = loop.call_later(seconds, self.finish)

    def finish(self) -> None:
        """Write what is to be written of the call, once."""
        if self.done:
            return
        self.done = True
        self._recorder.hooks.calls += 1
        if self._timer is not None:
            self._timer.cancel()
        if self.inner and self.event.get("status") != "success" and (self._is_untold() or not self._has_failed()):
            self.event = self.inner
        if self.accepted or self.event.get("status") == "success":
            self.write()
        else:
            self.rejected = True
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
            self._record(Kind.RESPONSE, self._response_metadata(), body, payload, truncated)
        except Exception:
            self._recorder.fail("the response record")
            self._record(Kind.RESPONSE, self._outcome(), body, b"")
        # LiteLLM's objects refer to each other and to the context that holds this call: neither they nor the bodies
        # shall wait for the garbage collector.
        self.caller = self.data = self.event = self.inner = _NOTHING
        self.answer, self.answers = None, ()
        self.request = self.response = _NO_BODY

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
        refused = self.answer is not None and event.get("status") != "success"
        return {
            **event.get("columns", {}),
            **(_without_none(columns_of_answer(self.answer)) if refused else {}),
            **(sums_of_answers(self.answers) if len(self.answers) > 1 else {}),
            **({} if succeeded else {**self.apparent_error, **_without_none(event.get("error")), **self.error}),
            **outcome,
            "time_to_first_token_ms": milliseconds((self.first_byte_at - self.started) * 1000)
            if self.first_byte_at and outcome["status"] != "failure"
            else None,
            "attempt_count": len(self.attempts) + self._last_attempt(),
            "attempts": self.attempts or None,
        }

    def _last_attempt(self) -> int:
        """Return 1 where a provider has answered, however far: that attempt is not among the failed ones.

        Of a call to several models each answer is one. An error that comes as a stream's first event is an answer, too.
        """
        if len(self.answers) > 1:
            return len(self.answers)
        if self.event.get("status") == "success":
            return 0 if self.event["columns"]["cache_hit"] else 1
        asked = not self.attempts and self.event.get("columns", _NOTHING).get("api_base") is not None
        return int(asked or self.answer is not None or (self.streamed and self.status_code == 200))

    def _client_body(self) -> Mapping[str, Any]:
        """Return the request's data as the client sent it, before LiteLLM adds to it."""
        body = (self.data.get("proxy_server_request") or {}).get("body")
        return body if isinstance(body, dict) else self.data

    def _request_payload(self) -> tuple[bytes, bool]:
        """Return the body, of a form its fields without the files; and whether it is only a beginning."""
        kind = self.content_type.lower()
        content, truncated = self.request.content(), self.request.truncated
        if kind.startswith(b"multipart/"):
            content, truncated = orjson.dumps(self._form_fields(content)), False
        elif kind.startswith(_FILES) and not content.lstrip().startswith(_JSON):
            content = b""
        elif content.startswith(_GZIP):  # LiteLLM does not read it, but a secret in it has to show
            content = self._unzipped(content)
        if self.rejected and len(content) > _REJECTED_SIZE:
            content, truncated = content[:_REJECTED_SIZE], True
        if content and kind.startswith(_FORM) and not content.startswith(_JSON):
            content, truncated = _fields(content[:_FORM_SIZE]), truncated or len(content) > _FORM_SIZE
        return content, truncated

    def _form_fields(self, form: bytes) -> dict[str, Any]:
        """Return the fields of a form with files; where not all can be read any more, those that LiteLLM has, too."""
        fields = _fields_beside_files(form, self.content_type)
        if self.request.truncated or not fields:
            read = (self.data.get("proxy_server_request") or {}).get("body")
            for name, value in (read if isinstance(read, dict) else {}).items():
                if isinstance(value, str | int | float | bool) and name != "litellm_call_id":
                    fields.setdefault(name, value)
        return fields

    def _unzipped(self, content: bytes) -> bytes:
        """Return what is kept of a body that is compressed; one that is not, whatever its headers say, as it is."""
        limit = self._recorder.content.max_payload_size + 1  # one more byte shows that there are more
        try:
            return zlib.decompressobj(wbits=31).decompress(content, limit)
        except zlib.error:
            return content

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
            content = self._unzipped(content)
        return content, self.response.truncated


def _fields(form: bytes) -> bytes:
    """Return the fields of a form as JSON, where credentials show by their names; those that come again as lists."""
    fields = parse_qs(form.decode(errors="replace"), keep_blank_values=True)
    return orjson.dumps(_once(fields))


def _fields_beside_files(form: bytes, content_type: bytes) -> dict[str, Any]:
    """Return the fields of a form with files, without these; those that come again as lists."""
    boundary = _BOUNDARY.search(content_type)
    fields: dict[str, list[str]] = {}
    for part in (b"\r\n" + form).split(b"\r\n--" + boundary[1], _MAX_PARTS)[1:-1] if boundary else ():
        headers, _, value = part.partition(b"\r\n\r\n")
        headers = headers[:_PART_HEADERS]
        if (name := _NAME.search(headers)) and not _IS_FILE.search(headers):
            fields.setdefault(name[1].decode(errors="replace"), []).append(value.decode(errors="replace"))
    return _once(fields)


def _once(fields: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    return {name: values if values[1:] else values[0] for name, values in fields.items()}


def _metadata(data: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return LiteLLM's own metadata of a request, which has another name where `metadata` is the client's."""
    for name in ("litellm_metadata", "metadata"):
        if isinstance(found := data.get(name), dict):
            return found
    return {}


def _key_hash(key: object) -> str | None:
    """Return LiteLLM's name of a key; it hashes only keys that begin with `sk-`, and anything else may be the key."""
    if not isinstance(key, str) or not key:
        return None
    return key if KEY_HASH.fullmatch(key) else hashlib.sha256(key.encode(errors="replace")).hexdigest()


def _without_none(mapping: Mapping[str, Any] | None) -> dict[str, Any]:
    return {key: value for key, value in (mapping or {}).items() if value is not None}
