"""A gateway that is without a callback, with an empty one or with the log, as its client asks: `PUT /switch/KIND`.

Processes of the same kind differ by 5 % in what a call takes: more than what is measured. So all is done by one.
"""

import asyncio
import gc
from typing import Any

import litellm
from litellm.proxy import proxy_server

from benchmarks.empty import logger as empty_logger

_WITHOUT = proxy_server.app.middleware_stack

from litellm_sqlalchemy.callback import logger  # noqa: E402  # puts the observer around what is there

_WITH = proxy_server.app.middleware_stack
_KINDS = {"without": (_WITHOUT, []), "empty": (_WITHOUT, [empty_logger]), "with": (_WITH, [logger])}
#: Seconds in which LiteLLM ends what it does behind an answer.
_BEHIND = 0.1


class _Switch:
    """The application that is on, and the path that turns to another."""

    def __init__(self) -> None:
        self._app = _WITH

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        path = scope.get("path", "")
        if not path.startswith("/switch/"):
            await self._app(scope, receive, send)
            return
        await asyncio.sleep(_BEHIND)
        self._app, loggers = _KINDS[path.removeprefix("/switch/")]
        for registered in (
            litellm.callbacks, litellm.success_callback, litellm.failure_callback, litellm._async_success_callback,
            litellm._async_failure_callback,
        ):  # fmt: skip
            registered[:] = [one for one in registered if one not in (logger, empty_logger)] + loggers
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body"})


proxy_server.app.middleware_stack = _Switch()
gc.freeze()  # as the launcher of the role `litellm` does
