"""What LiteLLM tells of a call: from its StandardLoggingPayload to the columns of a response."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from litellm_sqlalchemy.redaction import guardrail_summary
from litellm_sqlalchemy.values import TEXT_LENGTH, encoded, milliseconds, number, real, text

#: Bytes kept of what guardrails report.
_GUARDRAILS_SIZE = 64 * 1024
_TOKENS = ("prompt_tokens", "completion_tokens", "total_tokens", "cached_tokens", "reasoning_tokens")


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
            "error_message": text(error.get("error_message") or payload.get("error_str"), TEXT_LENGTH),
        },
        "response": None if payload.get("call_type") == "pass_through_endpoint" else response,
        "columns": {
            "model": text(payload.get("model")),
            "provider": text(payload.get("custom_llm_provider")),
            "deployment": text(payload.get("model_id")),
            "api_base": _without_query(text(payload.get("api_base"))),
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
            "cost": real(payload.get("response_cost")),
            "overhead_ms": milliseconds(hidden.get("litellm_overhead_time_ms")),
            "guardrails": _guardrails(payload.get("guardrail_information")),
        },
    }


def columns_of_answer(answer: Any) -> dict[str, Any]:
    """Return what a deployment's answer (ModelResponse and its like) tells: all but the model that was asked."""
    hidden = getattr(answer, "_hidden_params", None) or {}
    content = answer.model_dump() if hasattr(answer, "model_dump") else {}
    usage = content.get("usage") or {}
    prompt, completion = (
        usage.get(one, usage.get(other))
        for one, other in (("prompt_tokens", "input_tokens"), ("completion_tokens", "output_tokens"))
    )
    payload = {
        **content, "response": content, "metadata": {"usage_object": usage}, "prompt_tokens": prompt,
        "completion_tokens": completion, "total_tokens": usage.get("total_tokens"),
        **{name: hidden.get(name) for name in ("model_id", "api_base", "response_cost", "custom_llm_provider")},
    }  # fmt: skip
    columns: dict[str, Any] = event_of(payload)["columns"]
    del columns["model"]
    return columns


def sums_of_answers(answers: Sequence[Any]) -> dict[str, Any]:
    """Return the tokens and the cost of several deployments' answers, added up."""
    columns = [columns_of_answer(answer) for answer in answers]
    told = {name: [one[name] for one in columns if one[name] is not None] for name in (*_TOKENS, "cost")}
    return {name: real(sum(found)) if name == "cost" else number(sum(found)) for name, found in told.items() if found}


def _without_query(url: str | None) -> str | None:
    """Return a URL up to its path: of a pass-through call the rest is the client's, keys and content with it."""
    return url and re.split("[?#]", url, maxsplit=1)[0]


def _guardrails(found: Any) -> list[Any] | None:
    """Return what guardrails report: where that is much, what is kept in other modes than `full`."""
    if not found:
        return None
    reports = found if isinstance(found, list) else [found]
    small = len(encoded(reports)) <= _GUARDRAILS_SIZE
    return reports if small else [guardrail_summary(report) for report in reports]


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
