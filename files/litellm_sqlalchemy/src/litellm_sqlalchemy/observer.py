"""An ASGI application around LiteLLM's: it sees every exchange whole, and changes nothing of it."""

import time
from collections.abc import Awaitable, Callable, MutableMapping
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
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        call = self._open(scope)
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
            if message["type"] == "http.response.start":
                _note_start(call, message)
            elif message["type"] == "http.response.body":
                if not call.first_byte_at:
                    call.first_byte_at = time.perf_counter()
                call.response.add(message.get("body", b""))
                last_byte_sent = not message.get("more_body")
            await send(message)

        try:
            await self._app(scope, observed_receive, observed_send)
        finally:
            call.ended_at = time.perf_counter()
            if not last_byte_sent and call.status_code is not None:
                call.disconnected = True
            call.conclude()
            if call.done and call.noticed:
                await self._recorder.producer.synced()

    def _open(self, scope: MutableMapping[str, Any]) -> Call:
        server = scope.get("server")
        port = f":{server[1]}" if server else ""
        path = scope.get("path", "")
        origin = "health_check" if path == "/health" else "client"
        call = Call(self._recorder, f"{self._recorder.settings.gateway.name}{port}", origin)
        call.method = scope.get("method")
        call.endpoint = path
        call.client = client_address(scope)
        for name, value in scope.get("headers", ()):
            if name == b"user-agent":
                call.user_agent = value.decode("latin-1")
            elif name == b"content-type":
                call.content_type = value
            elif name == b"x-litellm-call-id":
                call.call_id = value.decode("latin-1")[:256]
        current_call.set(call)
        return call


def _note_start(call: Call, message: Message) -> None:
    call.status_code = message["status"]
    for name, value in message.get("headers", ()):
        if name == b"content-type":
            call.streamed = value.startswith(b"text/event-stream")
        elif name == b"x-litellm-call-id":
            call.call_id = value.decode("latin-1")[:256]
