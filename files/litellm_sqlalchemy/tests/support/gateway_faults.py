"""What the tests load into a gateway with the request log: faults inside the package, and a look at its state."""

import asyncio
import functools
import inspect
import os
import time
from contextvars import ContextVar
from typing import Annotated, Any

import litellm
from fastapi import Depends, WebSocket
from litellm.integrations.custom_logger import CustomLogger
from litellm.litellm_core_utils.logging_worker import GLOBAL_LOGGING_WORKER
from litellm.proxy import proxy_server
from litellm.proxy.auth.user_api_key_auth import user_api_key_auth_websocket
from litellm.proxy.pass_through_endpoints.pass_through_endpoints import websocket_passthrough_request

from litellm_sqlalchemy import callback, calls, observer

#: Seconds of `delay NAME`.
DELAY = 1.0


class _TwiceHook(CustomLogger):
    """Hands each success to the request log a second time, as LiteLLM has been seen to do."""

    async def async_log_success_event(self, kwargs: Any, response_obj: Any, start_time: Any, end_time: Any) -> None:
        """Call the logger again."""
        if "TWICE" in str(kwargs.get("messages")):
            await callback.logger.async_log_success_event(kwargs, response_obj, start_time, end_time)


twice = _TwiceHook()


def _breakable(owner: Any, name: str) -> None:
    """Make a function of the package raise in calls whose user agent says `break NAME`, and wait for `delay NAME`."""
    original = getattr(owner, name)

    def check() -> None:
        call = calls.current_call.get()
        if call is not None and call.user_agent == f"break {name}":
            raise RuntimeError(f"{name} is broken by the test")
        if call is not None and call.user_agent == f"delay {name}":
            time.sleep(DELAY)

    @functools.wraps(original)
    def broken(*arguments: Any, **keywords: Any) -> Any:
        check()
        return original(*arguments, **keywords)

    setattr(owner, name, broken)


for _owner, _name in (
    (calls.Call, "accept"),
    (calls.Call, "describe"),
    (calls.Call, "conclude"),
    (calls.Call, "_response_metadata"),
    (calls.Call, "_response_payload"),
    (callback, "event_of"),
    (callback, "_error_of"),
    (callback, "_attempt_of"),
    (observer, "_note_start"),
):
    _breakable(_owner, _name)


def _altering(note: Any) -> Any:
    """Let the observer change the answer of calls whose user agent says so, which it never may."""

    def altered(call: calls.Call, message: Any) -> None:
        note(call, message)
        if call.user_agent == "alter the answer":
            message["headers"] = [*message["headers"], (b"x-altered", b"by the log")]

    return altered


observer._note_start = _altering(observer._note_start)


@proxy_server.app.websocket("/test/session")
async def session(websocket: WebSocket, key: Annotated[Any, Depends(user_api_key_auth_websocket)]) -> None:
    """Pass a session through to the provider; LiteLLM's own endpoint of that kind needs Google's credentials."""
    await websocket_passthrough_request(websocket, os.environ["TEST_SESSIONS"], {}, key, endpoint="/test/session")


@proxy_server.app.get("/test/state")
async def state() -> dict[str, Any]:
    """Return the counters of the request log in this process."""
    recorder = callback.logger.recorder
    return {
        "failures": recorder.hooks.failures,
        "received": recorder.producer.received,
        "dropped": recorder.producer.dropped,
        "tasks": len(asyncio.all_tasks()),
    }


@proxy_server.app.get("/test/assumptions")
async def assumptions() -> dict[str, Any]:
    """Return what the package relies on, as it is in this process."""
    hooks = {
        name: list(inspect.signature(getattr(CustomLogger, name)).parameters)
        for name, member in vars(callback.RequestLogger).items()
        if name.startswith("async_")
    }
    return {
        "hooks": hooks,
        "stack": type(proxy_server.app.middleware_stack).__name__,
        "callbacks": [type(item).__name__ for item in litellm.callbacks if not isinstance(item, str)],
        "worker_context": await _seen_by_logging_worker(),
    }


async def _seen_by_logging_worker() -> str | None:
    """Return what LiteLLM's logging worker sees of a context variable of the request."""
    marker: ContextVar[str] = ContextVar("marker")
    marker.set("of this request")
    seen: asyncio.Future[str | None] = asyncio.get_running_loop().create_future()

    async def look() -> None:
        seen.set_result(marker.get(None))

    GLOBAL_LOGGING_WORKER.ensure_initialized_and_enqueue(look())
    return await asyncio.wait_for(seen, 10)
