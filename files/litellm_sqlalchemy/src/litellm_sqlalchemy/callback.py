"""The callback for LiteLLM's configuration: `callbacks: [litellm_sqlalchemy.callback.logger]`.

LiteLLM imports this module in each worker process before it serves. From then on every exchange passes a
`CallObserver`, which stands around LiteLLM's application, and the hooks below add what LiteLLM knows. A hook that
fails is counted and logged; the client's call goes on.
"""

import functools
import time
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any, TypeVar

from fastapi import HTTPException
from litellm.integrations.custom_logger import CustomLogger
from litellm.proxy import proxy_server
from litellm.proxy.auth.route_checks import RouteChecks
from litellm.proxy.pass_through_endpoints.pass_through_endpoints import InitPassThroughEndpointHelpers

from litellm_sqlalchemy.calls import Call, current_call
from litellm_sqlalchemy.errors import SpoolError
from litellm_sqlalchemy.events import event_of
from litellm_sqlalchemy.observer import CallObserver
from litellm_sqlalchemy.recorder import Recorder
from litellm_sqlalchemy.settings import load_settings
from litellm_sqlalchemy.values import TEXT_LENGTH, text

#: How LiteLLM tags the calls of its health checks (LITTELM_INTERNAL_HEALTH_SERVICE_ACCOUNT_NAME).
_HEALTH_CHECK = "litellm-internal-health-check"
#: How the paths of OAuth end, which LiteLLM has for MCP and counts among those of models: their bodies are credentials.
_AUTHORIZATION = ("/authorize", "/token", "/register", "/revoke", "/introspect")
_Hook = TypeVar("_Hook", bound=Callable[..., Awaitable[Any]])


def _guarded(hook: _Hook) -> _Hook:
    """Keep an error of the request log away from the request."""

    @functools.wraps(hook)
    async def guarded(self: "RequestLogger", *arguments: Any, **keywords: Any) -> Any:
        started = time.perf_counter()
        try:
            return await hook(self, *arguments, **keywords)
        except HTTPException:  # the call is refused
            raise
        except Exception:
            self.recorder.fail(hook.__name__)
            return None
        finally:
            self.recorder.spent(started)

    return guarded  # type: ignore[return-value]


class RequestLogger(CustomLogger):
    """Hands LiteLLM's events to the call that they belong to."""

    def __init__(self, recorder: Recorder) -> None:
        """Take the recorder that all calls of this process share."""
        super().__init__()
        self.recorder = recorder

    @_guarded
    async def async_pre_call_hook(
        self, user_api_key_dict: Any, cache: Any, data: dict[str, Any], call_type: str
    ) -> None:
        """LiteLLM has accepted a call: write its request record."""
        call = current_call.get()
        if call is None or call.accepted:
            return
        try:
            self.recorder.producer.check_space()
        except SpoolError as error:
            reason = f"the gateway's request log cannot take the call: {error}"
            raise HTTPException(503, {"error": reason}) from None
        call.accept(user_api_key_dict, data, call_type)
        await self.recorder.producer.synced()

    @_guarded
    async def async_log_success_event(
        self, kwargs: dict[str, Any], response_obj: Any, start_time: Any, end_time: Any
    ) -> None:
        """LiteLLM has an answer, whole."""
        self._take_event(kwargs.get("standard_logging_object") or _payload_of(kwargs))
        await self.recorder.producer.synced()

    @_guarded
    async def async_log_failure_event(
        self, kwargs: dict[str, Any], response_obj: Any, start_time: Any, end_time: Any
    ) -> None:
        """An attempt, or the call before any attempt, has failed; awaited inside the request."""
        self._take_event(kwargs.get("standard_logging_object"))

    @_guarded
    async def async_post_call_failure_hook(
        self,
        request_data: dict[str, Any],
        original_exception: Exception,
        user_api_key_dict: Any,
        traceback_str: str | None = None,
    ) -> None:
        """The call has failed for good; awaited inside the request."""
        call = current_call.get()
        if call is None:
            return
        call.noticed = call.failed = True
        try:
            if not call.accepted:
                call.describe(user_api_key_dict, request_data, call.caller.get("call_type"))
            call.error = _error_of(original_exception)
        finally:
            call.conclude()

    @_guarded
    async def async_post_call_failure_deployment_hook(
        self, request_data: Any, exception: Exception, call_type: Any, fallback_depth: int | None = None
    ) -> None:
        """One attempt at one deployment has failed."""
        call = current_call.get()
        if call is None or _is_health_check(call):
            return
        if not call.is_foreign(text(request_data.get("litellm_call_id"))):
            call.attempts = (*call.attempts, _attempt_of(call, request_data, exception))

    @_guarded
    async def async_post_call_success_deployment_hook(self, request_data: Any, response: Any, call_type: Any) -> None:
        """A deployment has answered; LiteLLM tells no outcome of an answer that a guardrail then refuses."""
        call = current_call.get()
        if call is not None and call.accepted and not call.is_foreign(text(request_data.get("litellm_call_id"))):
            call.take_answer(response, call_type)

    def _take_event(self, payload: dict[str, Any] | None) -> None:
        if not payload:
            return
        call = current_call.get()
        if call is None or _is_health_check(call):
            self._record_internal(call, payload, event_of(payload))
            return
        call_id = text(payload.get("litellm_call_id"))
        if call.is_foreign(call_id):
            _take_inner(call, payload)
            call.conclude()
            return
        call.noticed = True
        try:
            self._take_outcome(call, payload)
        except Exception:
            self.recorder.fail("the event")
            call.event = call.event or {"status": payload.get("status"), "columns": {"cache_hit": None}}
        call.conclude()

    @staticmethod
    def _take_outcome(call: Call, payload: dict[str, Any]) -> None:
        if not call.call_id:
            call.call_id = text(payload.get("litellm_call_id"))
        if not call.accepted and not call.caller:
            data = {"model": payload.get("model_group") or payload.get("model")}
            call.describe(_caller_of(payload), data, payload.get("call_type"))
        if payload.get("status") != "failure" or call.event.get("status") != "success":
            call.event = event_of(payload)

    def _record_internal(self, exchange: Call | None, payload: dict[str, Any], event: dict[str, Any]) -> None:
        """Record a call that LiteLLM made by itself: a health check, or what else it does beside the clients' calls."""
        is_check = exchange is not None or _HEALTH_CHECK in (payload.get("request_tags") or ())
        gateway = exchange.gateway if exchange else self.recorder.settings.gateway.name
        call = Call(self.recorder, gateway, "health_check" if is_check else "internal")
        ended, seconds = payload.get("endTime") or time.time(), payload.get("response_time") or 0.0
        call.started_at = int((ended - seconds) * 1e6)
        call.ended_at = call.started + seconds
        call.call_id = text(payload.get("litellm_call_id"))
        call.accept(None, {"model": payload.get("model")}, payload.get("call_type"))
        call.event = event
        call.finish()


def _payload_of(kwargs: dict[str, Any]) -> dict[str, Any] | None:
    """Return what LiteLLM tells of an answer that it counts no tokens of: a list, a file, something that is deleted.

    None where the answer is not the one that the client waits for.
    """
    call = current_call.get()
    call_type = kwargs.get("call_type")
    if call is None or not call.accepted or call_type != call.caller.get("call_type"):
        return None
    parameters = kwargs.get("litellm_params") or {}
    provider = kwargs.get("custom_llm_provider") or parameters.get("custom_llm_provider")
    told = {name: kwargs.get(name) for name in ("litellm_call_id", "model", "response_cost")}
    return {
        **told, "status": "success", "call_type": call_type, "custom_llm_provider": provider,
        "api_base": parameters.get("api_base"),
    }  # fmt: skip


def _caller_of(payload: dict[str, Any]) -> SimpleNamespace:
    """Return what an event tells of the key, as far as it does, under the names of UserAPIKeyAuth."""
    metadata = payload.get("metadata") or {}
    return SimpleNamespace(
        api_key=metadata.get("user_api_key_hash"),
        key_alias=metadata.get("user_api_key_alias"),
        user_id=metadata.get("user_api_key_user_id"),
        team_id=metadata.get("user_api_key_team_id"),
        org_id=metadata.get("user_api_key_org_id"),
        end_user_id=metadata.get("user_api_key_end_user_id"),
    )


def _take_inner(call: Call, payload: dict[str, Any]) -> None:
    """Take the outcome of a call that LiteLLM has made of the client's; it has the client's metadata.

    What a guardrail asks has not. The client gets the answer in another form.
    """
    is_of_client = (payload.get("metadata") or {}).get("user_api_key_request_route")
    if is_of_client and payload.get("status") == "success":
        call.inner = {**event_of(payload), "response": None}


def _is_health_check(exchange: Call) -> bool:
    """Return whether LiteLLM makes the calls of this exchange by itself, to see whether its models answer."""
    return (exchange.endpoint or "").startswith("/health")


def _error_of(error: Exception) -> dict[str, Any]:
    code = getattr(error, "status_code", None) or getattr(error, "code", None)
    message = getattr(error, "message", None) or getattr(error, "detail", None) or str(error)
    return {"error_type": type(error).__name__, "error_code": text(code), "error_message": text(message, TEXT_LENGTH)}


def _attempt_of(call: Call, data: Any, error: Exception) -> dict[str, Any]:
    information = data.get("model_info") or (data.get("litellm_metadata") or data.get("metadata") or {}).get(
        "model_info"
    )
    started = call.attempts[-1]["ended_ms"] if call.attempts else 0.0
    ended = round((time.perf_counter() - call.started) * 1000, 3)
    return {
        "deployment": text((information or {}).get("id")),
        "model": text(data.get("model")),
        **_error_of(error),
        "duration_ms": round(ended - started, 3),
        "ended_ms": ended,
    }


def _is_call(path: str) -> bool:
    """Return whether calls go to a path: one of LiteLLM's own, or one that passes through to a configured target."""
    return not path.endswith(_AUTHORIZATION) and (
        RouteChecks.is_llm_api_route(path) or InitPassThroughEndpointHelpers.is_registered_pass_through_route(path)
    )


def _observe(recorder: Recorder) -> None:
    """Stand around LiteLLM's ASGI application; its middleware stack is built before callbacks are imported."""
    app = proxy_server.app
    if app.middleware_stack is None:
        app.add_middleware(CallObserver, recorder=recorder, is_call=_is_call)
    else:
        app.middleware_stack = CallObserver(app.middleware_stack, recorder, _is_call)


_recorder = Recorder(load_settings())
logger = RequestLogger(_recorder)
_observe(_recorder)
