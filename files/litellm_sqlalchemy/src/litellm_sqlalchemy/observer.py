"""An ASGI application around LiteLLM's: it sees every exchange whole, and changes nothing of it."""

import time
from asyncio import CancelledError
from collections.abc import Awaitable, Callable, Generator, MutableMapping
from typing import Any

from litellm_sqlalchemy.calls import Call, Recorder, client_address, current_call

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]


class CallObserver:
    """Opens a `Call` for each HTTP exchange and ends it when the last byte has gone out."""

    def __init__(self, app: Application, recorder: Recorder) -> None:
        """Wrap `app`."""
        self._app = app
        self._recorder = recorder

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Pass everything through, both ways, as it is."""
        call = self._open(scope) if scope["type"] == "http" else None
        if call is None:
            await self._app(scope, receive, send)
            return
        last_byte_sent = False

        async def observed_receive() -> Message:
            message = await receive()
            if message["type"] == "http.request":
                call.request.add(message.get("body", b""))
            elif not last_byte_sent:
                call.disconnected = True
            return message

        async def observed_send(message: Message) -> None:
            nonlocal last_byte_sent
            try:
                if message["type"] == "http.response.start":
                    _note_start(call, message)
                elif message["type"] == "http.response.body":
                    if not call.first_byte_at:
                        call.first_byte_at = time.perf_counter()
                    call.response.add(message.get("body", b""))
                    if not message.get("more_body"):
                        last_byte_sent = True
                        call.disconnected = call.disconnected or _is_gone(receive)
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
            call.method = scope.get("method")
            call.endpoint = scope.get("path", "")
            call.client = client_address(scope)
            for name, value in scope.get("headers", ()):
                if name == b"user-agent":
                    call.user_agent = value.decode("latin-1")
                elif name == b"content-type":
                    call.content_type = value
                elif name == b"x-litellm-call-id":
                    call.call_id = value.decode("latin-1")[:256]
                elif name == b"x-litellm-session-id":
                    call.session_id = value.decode("latin-1")
                if name in self._recorder.headers:
                    call.headers[name.decode("latin-1")] = value.decode("latin-1")[:512]
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
            call.conclude()
        except Exception:
            self._recorder.fail("the observer")


def _note_start(call: Call, message: Message) -> None:
    call.status_code = message["status"]
    for name, value in message.get("headers", ()):
        if name == b"content-type":
            call.streamed = value.startswith(b"text/event-stream")
        elif name == b"content-encoding":
            call.content_encoding = value
        elif name == b"x-litellm-call-id":
            call.call_id = value.decode("latin-1")[:256]


def _is_gone(receive: Receive) -> bool:
    """Look, without waiting, whether the server has seen the client hang up; all of the request was read by now."""
    waiting = receive().__await__()
    try:
        next(waiting)  # runs until it would have to wait for a message
    except StopIteration as result:
        return bool(result.value["type"] == "http.disconnect")
    finally:
        if isinstance(waiting, Generator):
            waiting.close()
    return False
