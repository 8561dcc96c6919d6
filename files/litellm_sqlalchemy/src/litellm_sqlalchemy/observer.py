"""An ASGI application around LiteLLM's: it sees every exchange whole, and changes nothing of it."""

import ipaddress
import time
from asyncio import CancelledError
from collections.abc import Awaitable, Callable, Generator, Mapping, MutableMapping
from functools import lru_cache
from typing import Any

from litellm_sqlalchemy.calls import Call, current_call
from litellm_sqlalchemy.recorder import Recorder
from litellm_sqlalchemy.values import text

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]


#: Attributes of a call, the request headers that they are taken from, and characters that are kept.
_KEPT_HEADERS = (
    ("user_agent", b"user-agent", 512),
    ("call_id", b"x-litellm-call-id", 256),
    ("session_id", b"x-litellm-session-id", 512),
)
#: How a WebSocket session ends as it should (RFC 6455): done, or going away.
_NORMAL_CLOSURES = (1000, 1001)


class CallObserver:
    """Opens a `Call` for each HTTP exchange, or WebSocket session, and ends it when the last byte has gone out."""

    def __init__(self, app: Application, recorder: Recorder, is_call: Callable[[str], bool] = bool) -> None:
        """Wrap `app`; `is_call` tells of a path whether calls go there."""
        self._app = app
        self._recorder = recorder
        self._is_call = is_call

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Pass everything through, both ways, as it is."""
        call = self._open(scope) if scope["type"] in ("http", "websocket") else None
        if call is None:
            await self._app(scope, receive, send)
            return
        last_byte_sent = client_gone = False

        async def observed_receive() -> Message:
            nonlocal client_gone
            message = await receive()
            try:
                if message["type"] == "http.request":
                    call.request.add(message.get("body", b""))
                elif message["type"] == "http.disconnect":
                    call.disconnected = call.disconnected or not last_byte_sent
                elif message["type"] == "websocket.receive":
                    call.response.add(_content(message))
                elif message["type"] == "websocket.disconnect":
                    client_gone = True
            except Exception:
                self._recorder.fail("the observer")
            return message

        async def observed_send(message: Message) -> None:
            nonlocal last_byte_sent
            try:
                if message["type"] == "http.response.start":
                    _note_start(call, message)
                elif message["type"] == "http.response.body":
                    _note_answer(call, message.get("body", b""))
                    if not message.get("more_body"):
                        last_byte_sent = True
                        call.disconnected = call.disconnected or _is_gone(receive)
                elif message["type"].startswith("websocket."):
                    last_byte_sent = True  # a session has no last byte that somebody waits for
                    _note_session(call, message)
                    if message["type"] == "websocket.close" and not client_gone:
                        _note_closure(call, message)
            except Exception:
                self._recorder.fail("the observer")
            await send(message)

        try:
            await self._app(scope, observed_receive, observed_send)
        except CancelledError:
            call.interrupted = True  # the server gives up on the exchange
            raise
        except Exception:
            call.aborted = True  # the server will cut the connection: not the client's doing
            call.status_code = call.status_code or 500  # where nothing has gone out yet, it says this
            raise
        finally:
            started = time.perf_counter()
            self._close(call, last_byte_sent)
            if call.done:
                await self._recorder.producer.synced()
            self._recorder.spent(started)

    def _open(self, scope: MutableMapping[str, Any]) -> Call | None:
        try:
            server = scope.get("server")
            port = f":{server[1]}" if server else ""
            call = Call(self._recorder, f"{self._recorder.settings.gateway.name}{port}")
            call.method = scope.get("method", "GET")  # a session begins with a GET
            call.endpoint = scope.get("path", "").removeprefix(scope.get("root_path", ""))
            call.client = _client_address(scope)
            headers = dict(scope.get("headers", ()))
            call.content_type = headers.get(b"content-type", b"")
            for attribute, name, length in _KEPT_HEADERS:
                if name in headers:
                    setattr(call, attribute, headers[name].decode("latin-1")[:length])
            if kept := self._recorder.headers & headers.keys():
                call.headers = {name.decode("latin-1"): headers[name].decode("latin-1")[:512] for name in kept}
        except Exception:
            self._recorder.fail("the observer")
            call = None
        current_call.set(call)
        return call

    def _close(self, call: Call, last_byte_sent: bool) -> None:
        try:
            call.ended_at = time.perf_counter()
            if not last_byte_sent and call.status_code is not None and not (call.aborted or call.interrupted):
                call.disconnected = True
            if call.failed and not call.accepted and not self._is_call(call.endpoint or ""):
                call.forget_request()  # of keys, settings and users: nothing that a log of calls has to know
            if call.noticed or not self._is_refused(call):
                call.conclude()
            else:
                call.apparent_error = call.apparent_error or {"error_code": str(call.status_code)}
                call.await_hook()
        except Exception:
            self._recorder.fail("the observer")

    def _is_refused(self, call: Call) -> bool:
        """Return whether LiteLLM has refused a call, or broken down over it; what goes nowhere is none."""
        code = call.status_code or 0
        refused = code >= 400 and code not in (404, 405) and call.method == "POST"
        return (refused or call.failed) and self._is_call(call.endpoint or "")


def _note_start(call: Call, message: Message) -> None:
    call.status_code = message["status"]
    headers = dict(message.get("headers", ()))
    call.streamed = headers.get(b"content-type", b"").startswith(b"text/event-stream")
    call.content_encoding = headers.get(b"content-encoding", b"")
    if b"x-litellm-call-id" in headers:
        call.call_id = headers[b"x-litellm-call-id"].decode("latin-1")[:256]


def _note_answer(call: Call, content: bytes) -> None:
    if not call.first_byte_at:
        call.first_byte_at = time.perf_counter()
    call.response.add(content)


def _note_session(call: Call, message: Message) -> None:
    """Take note of what goes out in a WebSocket session; one that is closed before it was accepted is refused.

    Its request is written before anything is said: the response holds what both sides say, a line each.
    """
    if message["type"] == "websocket.accept":
        call.status_code = 101
    elif message["type"] == "websocket.send":
        _note_answer(call, _content(message))
    elif message["type"] == "websocket.close":
        call.status_code = call.status_code or 403
    elif message["type"] == "websocket.http.response.start":
        call.status_code = message["status"]


def _note_closure(call: Call, message: Message) -> None:
    """Take note that LiteLLM ends a session because of an error, of which no hook has to tell."""
    code = message.get("code", 1000)
    if code not in _NORMAL_CLOSURES:
        call.failed = True
        call.apparent_error = {"error_code": str(code), "error_message": text(message.get("reason"))}


def _content(message: Message) -> bytes:
    """Return a message of a WebSocket session as a line, nothing for one that opens or closes it."""
    content = message.get("bytes") or (message.get("text") or "").encode(errors="replace")
    return content + b"\n" if content else b""


def _is_gone(receive: Receive) -> bool:
    """Look, without waiting, whether the server has seen the client hang up; all of the request was read by now."""
    seen = getattr(getattr(receive, "__self__", None), "disconnected", None)  # uvicorn's RequestResponseCycle
    if isinstance(seen, bool):
        return seen
    waiting = receive().__await__()
    try:
        next(waiting)  # runs until it would have to wait for a message
    except StopIteration as result:
        return bool(result.value["type"] == "http.disconnect")
    finally:
        if isinstance(waiting, Generator):
            waiting.close()
    return False


def _client_address(scope: Mapping[str, Any]) -> str | None:
    """Return the client's address of an ASGI scope, None where it is no IP address."""
    client = scope.get("client")
    return _address(client[0]) if client else None


@lru_cache(1024)
def _address(name: str) -> str | None:
    try:
        return str(ipaddress.ip_address(name))
    except ValueError:
        return None
