"""Calls as a gateway sees them: 3.5 KB of JSON a pair in the median, English prose, some hundred keys.

Eight tokens go in for one that comes out, as in public traces of chat services; every second call offers tools, as
agents do. Prose shrinks little and tool definitions much: what tables take of it is no flattering number.
"""

import hashlib
import random
import uuid
from collections.abc import Iterator
from pydoc_data.topics import topics
from types import SimpleNamespace
from typing import Any, NamedTuple

import orjson

from litellm_sqlalchemy.calls import Call
from litellm_sqlalchemy.events import event_of
from litellm_sqlalchemy.recorder import Recorder
from litellm_sqlalchemy.settings import Settings

_PROSE = " ".join(" ".join(str(text).split()) for text in topics.values())
MODELS = ("gpt-4o-mini", "gpt-4o", "claude-sonnet-4", "claude-haiku-4", "gemini-2.5-flash", "llama-3.3-70b", "o4-mini")
#: What LiteLLM's payload carries that no record takes: its static price map, most of the payload.
_PRICE_MAP = {f"cost_of_something_{number}": 1.5e-07 for number in range(60)}
_TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": description,
            "parameters": {
                "type": "object",
                "properties": {
                    argument: {"type": "string", "description": f"The {argument} as the customer wrote it"}
                    for argument in arguments
                },
                "required": list(arguments),
            },
        },
    }
    for name, description, arguments in (
        ("find_order", "Look an order up by its number", ("number", "country")),
        ("cancel_order", "Cancel an order that has not been sent", ("number", "reason")),
    )
]


class Sample(NamedTuple):
    """One call: what the client sent and got, and what LiteLLM's hooks hand over."""

    key: SimpleNamespace
    data: dict[str, Any]
    event: dict[str, Any]
    request: bytes
    response: bytes


def _digest(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def _prose(rng: random.Random, median: int) -> str:
    length = int(min(median * 20, median * rng.lognormvariate(0, 0.5)))
    start = rng.randrange(len(_PROSE) - length)
    return _PROSE[start : start + length]


def samples(count: int, seed: int = 1) -> Iterator[Sample]:
    """Yield calls, the same ones for the same seed."""
    rng = random.Random(seed)
    for _ in range(count):
        yield _sample(rng)


def _sample(rng: random.Random) -> Sample:
    owner = min(int(rng.paretovariate(0.8)), 200)
    model = MODELS[min(int(rng.paretovariate(1.0)) - 1, len(MODELS) - 1)]
    call_id = str(uuid.UUID(int=rng.getrandbits(128), version=4))
    key = SimpleNamespace(
        api_key=_digest("key", owner), key_alias=f"service-{owner}", user_id=f"user-{owner % 60}",
        team_id=f"team-{owner % 12}", org_id=None, end_user_id=None,
    )  # fmt: skip
    tools = rng.random() < 0.5
    turns = [_prose(rng, length) for length in ((350, 250, 400) if tools else (600, 400, 650))]
    body = {
        "model": model,
        "messages": [
            {"role": "system", "content": _prose(rng, 700)},
            {"role": "user", "content": turns[0]},
            {"role": "assistant", "content": turns[1]},
            {"role": "user", "content": turns[2]},
        ],
        "temperature": 0.2,
        "max_tokens": 1024,
        **({"tools": _TOOLS, "tool_choice": "auto"} if tools else {}),
    }
    answer = {
        "id": f"chatcmpl-{rng.getrandbits(128):032x}",
        "created": 1_780_000_000,
        "model": model,
        "object": "chat.completion",
        "system_fingerprint": f"fp_{rng.getrandbits(40):010x}",
        "choices": [
            {
                "finish_reason": "stop",
                "index": 0,
                "message": {"content": _prose(rng, 330), "role": "assistant", "tool_calls": None},
            }
        ],
        "usage": {
            "completion_tokens": 225, "prompt_tokens": 450, "total_tokens": 675,
            "completion_tokens_details": {"reasoning_tokens": 0, "accepted_prediction_tokens": 0},
            "prompt_tokens_details": {"cached_tokens": 128, "audio_tokens": 0},
        },
    }  # fmt: skip
    event = {
        "status": "success", "litellm_call_id": call_id, "id": answer["id"], "model": model, "cache_hit": False,
        "custom_llm_provider": "openai", "model_id": _digest("deployment", model), "response": answer,
        "api_base": "https://api.openai.com/v1/", "prompt_tokens": 450, "completion_tokens": 225, "total_tokens": 675,
        "response_cost": rng.random() / 1000, "hidden_params": {"litellm_overhead_time_ms": 2.5},
        "metadata": {"usage_object": answer["usage"]}, "model_map_information": _PRICE_MAP,
    }  # fmt: skip
    data = {**body, "litellm_call_id": call_id}  # no trace id: clients send none by themselves
    return Sample(key, data, event, orjson.dumps(body), orjson.dumps(answer))


def record(recorder: Recorder, sample: Sample, *, failed: bool = False) -> None:
    """Take a call, which its provider may have failed, through what the observer and the hooks do, into the spool."""
    call = Call(recorder, "bench:4000")
    call.method, call.endpoint, call.client = "POST", "/v1/chat/completions", "192.0.2.17"
    call.user_agent, call.content_type = "OpenAI/Python 2.54.0", b"application/json"
    call.request.add(sample.request)
    call.accept(sample.key, sample.data, "acompletion")
    call.status_code = 500 if failed else 200
    call.first_byte_at = call.started + 0.4
    call.response.add(sample.response)
    event = sample.event
    if failed:
        error = {"error_class": "InternalServerError", "error_code": "500", "error_message": "the provider says 500"}
        event = {**event, "status": "failure", "error_information": error}
        call.attempts = [{"deployment": event["model_id"], "error_type": "InternalServerError", "ended_ms": 900.0}]
        call.failed = True
    call.event = event_of(event)
    call.ended_at = call.started + 0.9
    call.conclude()


def fill_spool(settings: Settings, count: int, seed: int = 1) -> Recorder:
    """Put `count` pairs into the spool; return the recorder, whose producer is closed."""
    recorder = Recorder(settings)
    for sample in samples(count, seed):
        record(recorder, sample)
    recorder.producer.close()
    return recorder
