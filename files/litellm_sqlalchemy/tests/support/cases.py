"""Every kind of call, and the rows that it has to leave; docs/calls.md shows them as a table.

A case lists the columns in which its rows differ from those of a plain chat call that succeeds (`REQUEST`, `RESPONSE`).
A column that neither lists must be NULL. A value may be a rule: a function of the value and the client.
"""

import base64
import gzip
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from psycopg2.extras import RealDictCursor

from litellm_sqlalchemy.redaction import REDACTION_VERSION
from support.clients import PROMPT_WORD, USER_AGENT, Clients, Json
from support.gateway import INPUT_COST, OUTPUT_COST
from support.keys import LIMITED_KEY, OPAQUE_KEY, POOR_KEY, USER_KEY
from support.postgresql import Database
from support.upstream import AUDIO, COMPLETION_TOKENS, IMAGE, PROMPT_TOKENS, TEXT

Rule = Callable[[Any, Clients], bool]
Row = dict[str, Any]


def digest(key: str) -> str:
    """Return what LiteLLM calls a key."""
    return hashlib.sha256(key.encode()).hexdigest()


def sent(value: Any, clients: Clients) -> bool:
    """The payload is what the client sent."""
    return bool(value == json.loads(clients.sent))


def received(value: Any, clients: Clients) -> bool:
    """The payload is what the client got."""
    return bool(value == clients.response.json())


def of_the_answer(value: Any, clients: Clients) -> bool:
    """The payload is all that went over the wire, or there is a digest of it: of a compressed answer."""
    compressed = clients.response is not None and "content-encoding" in clients.response.headers
    return (value is not None) == compressed


def of_the_request(value: Any, clients: Clients) -> bool:
    """The digest is that of the bytes that were sent."""
    return bytes(value) == hashlib.sha256(clients.sent).digest()


def answer(value: Any, clients: Clients) -> bool:
    """The payload is the provider's answer, assembled from a stream."""
    return isinstance(value, dict) and TEXT in json.dumps(value)


def streamed(*words: str) -> Rule:
    """The payload is the stream itself, with these words and no more."""
    return lambda value, clients: (
        isinstance(value, str) and value.startswith(("data:", "event:")) and all(word in value for word in words)
    )


def partly(words: str) -> Rule:
    """The payload is what LiteLLM assembled of the stream's beginning."""
    return lambda value, clients: (
        isinstance(value, dict) and words in json.dumps(value) and TEXT not in json.dumps(value)
    )


def some(value: Any, clients: Clients) -> bool:
    """There is one, above 0."""
    return value is not None and value > 0


def anything(value: Any, clients: Clients) -> bool:
    """Not decided by the log."""
    return True


def nothing_or(part: str) -> Rule:
    """There is nothing, or a text that has this part."""
    return lambda value, clients: value is None or part in value


def holds(part: str) -> Rule:
    """The text has this part."""
    return lambda value, clients: isinstance(value, str) and part in value


def number(value: Any, clients: Clients) -> bool:
    """There is a duration."""
    return isinstance(value, float) and 0 < value < 60_000


def perhaps(value: Any, clients: Clients) -> bool:
    """There is a duration, or LiteLLM did not measure one."""
    return value is None or number(value, clients)


def attempts(*errors: tuple[str, str]) -> Rule:
    """The failed attempts, each with its deployment and error type."""
    return lambda value, clients: (
        isinstance(value, list)
        and [(item["deployment"], item["error_type"]) for item in value] == list(errors)
        and all(item["duration_ms"] > 0 and item["error_message"] and item["error_code"] for item in value)
    )


REQUEST: Json = {
    "origin": "client", "calls": 1, "method": "POST", "endpoint": "/v1/chat/completions", "call_type": "acompletion",
    "model": "ok", "stream": False, "key_hash": digest(USER_KEY), "key_alias": "alias-1", "user_id": "user-1",
    "team_id": "team-1", "organization_id": "organization-1", "client_address": "127.0.0.1", "user_agent": USER_AGENT,
    "content_mode": "full", "redaction_version": REDACTION_VERSION, "payload_encoding": "json", "payload": sent,
    "payload_size": lambda value, clients: value == len(clients.sent), "payload_digest": None,
}  # fmt: skip
RESPONSE: Json = {
    "status": "success", "status_code": 200, "model": "openai/ok", "provider": "openai", "deployment": "deployment-ok",
    "api_base": holds("/v1"), "provider_response_id": "chatcmpl-1", "finish_reason": "stop", "cache_hit": False,
    "prompt_tokens": PROMPT_TOKENS, "completion_tokens": COMPLETION_TOKENS,
    "total_tokens": PROMPT_TOKENS + COMPLETION_TOKENS, "cached_tokens": 3, "reasoning_tokens": 2,
    "cost": PROMPT_TOKENS * INPUT_COST + COMPLETION_TOKENS * OUTPUT_COST, "duration_ms": number,
    "time_to_first_token_ms": number, "overhead_ms": perhaps, "attempt_count": 1,
    "payload_encoding": "json", "payload": received,
    "payload_size": lambda value, clients: value == clients.response.num_bytes_downloaded,
    "payload_digest": of_the_answer,
}  # fmt: skip
STREAM_REQUEST: Json = {"stream": True}
STREAM: Json = {"payload": answer, "payload_digest": None, "overhead_ms": perhaps}
_NO_TOKENS: Json = {
    "prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0, "cached_tokens": None, "reasoning_tokens": None,
    "cost": 0.0,
}  # fmt: skip
FAILURE: Json = {
    **_NO_TOKENS, "status": "failure", "provider_response_id": None, "finish_reason": None,
    "time_to_first_token_ms": None, "overhead_ms": None, "error_message": holds(" "),
}  # fmt: skip
#: Rejected before any provider was asked: the deployment is the one that LiteLLM would have had in mind.
REJECTED: Json = {**FAILURE, "attempt_count": 0, "api_base": None}
UNKNOWN: Json = {**REJECTED, "model": None, "provider": None, "deployment": None}
#: Refused, or broken down over, before LiteLLM fires any hook.
UNHEARD: Json = {
    **UNKNOWN, **dict.fromkeys(_NO_TOKENS), "cache_hit": None, "error_type": None, "error_message": None,
}  # fmt: skip
_NOBODY: Json = {"key_alias": None, "user_id": None, "team_id": None, "organization_id": None}


@dataclass(frozen=True)
class Case:
    """A call and its rows."""

    name: str
    what: str
    call: Callable[[Clients], object]
    request: Json = field(default_factory=dict)
    response: Json = field(default_factory=dict)

    def expected(self) -> tuple[Json, Json]:
        """Return the columns of both rows."""
        return {**REQUEST, **self.request}, {**RESPONSE, **self.response}


def _failed(status: int, error: str, model: str, served: str = "", **more: Any) -> Json:
    return {
        **FAILURE, "status_code": status, "error_type": error, "error_code": str(status),
        "model": f"openai/{served or model}", "deployment": f"deployment-{model}",
        "attempts": attempts((f"deployment-{model}", error)), **more,
    }  # fmt: skip


def _rejected(status: int, error: str, **more: Any) -> Json:
    return {**REJECTED, "status_code": status, "error_type": error, "error_code": str(status), **more}


def _messages(clients: Clients, model: str, **more: Any) -> Any:
    create: Callable[..., Any] = clients.anthropic().messages.create
    return create(model=model, max_tokens=20, messages=[{"role": "user", "content": clients.prompt}], **more)


def _models(clients: Clients, models: str) -> None:
    message = {"role": "user", "content": clients.call_id}
    clients.post("/v1/chat/completions", {"model": models, "messages": [message]})


def _generate(clients: Clients, path: str) -> None:
    content = {"role": "user", "parts": [{"text": clients.call_id}]}
    clients.post(f"/v1beta/models/{path}", {"contents": [content]})


def _twice(clients: Clients, **more: Any) -> None:
    """Make the same call twice, with LiteLLM's cache."""
    more["extra_body"] = {"cache": {"use-cache": True}}
    clients.before().chat(prompt=clients.prompt, **more)
    clients.chat(**more)


def _limited(clients: Clients) -> None:
    clients.before().chat(key=LIMITED_KEY)
    clients.chat(key=LIMITED_KEY)


def _upload(clients: Clients, path: str, **fields: str) -> None:
    headers = clients._headers({"authorization": f"Bearer {USER_KEY}"})
    clients.http.post(path, headers=headers, data=fields, files={"file": ("noise", AUDIO)})


def _delete_response(clients: Clients) -> None:
    answer = clients.before().openai().responses.create(model="ok", input=clients.prompt)
    clients.openai().responses.delete(answer.id)


def _compressed(clients: Clients, path: str, body: Json) -> None:
    headers = clients._headers({**clients._plain_headers(USER_KEY), "content-encoding": "gzip"})
    clients.http.post(path, headers=headers, content=gzip.compress(json.dumps(body).encode()))


_EMBEDDING = {**_NO_TOKENS, "prompt_tokens": PROMPT_TOKENS, "total_tokens": PROMPT_TOKENS,
              "cost": PROMPT_TOKENS * INPUT_COST, "provider_response_id": None, "finish_reason": None}  # fmt: skip
# LiteLLM finds the price of the same model for some calls and not for others
_RESPONSES = {"api_base": holds("/v1/responses"), "provider_response_id": holds("resp_"), "cost": anything,
              "finish_reason": "completed"}  # fmt: skip
_CLAUDE = {"model": "anthropic/ok", "provider": "anthropic", "deployment": "deployment-claude",
           "api_base": holds("/v1/messages"), "provider_response_id": "msg_1", "cached_tokens": 0,
           "reasoning_tokens": 0}  # fmt: skip
_PASSED = {**_NO_TOKENS, "model": "unknown", "provider": None, "deployment": None, "api_base": holds("/pass"),
           "provider_response_id": None, "finish_reason": None}  # fmt: skip
_PASS_REQUEST = {"endpoint": "/pass", "call_type": "pass_through_endpoint", "model": None}
_SPEECH = "/azure_speech/speech/recognition/conversation/cognitiveservices/v1"
_MESSAGES_REQUEST = {"endpoint": "/v1/messages", "call_type": "anthropic_messages"}
_RESPONSES_REQUEST = {"endpoint": "/v1/responses", "call_type": "aresponses"}
_ATTRIBUTES = {"x-litellm-tags": "a,b", "x-litellm-session-id": "session-1"}
_GONE = {"status": "client_disconnected", "payload_size": some}
#: What only LiteLLM's event tells, which does not come for every stream of responses that a client leaves.
_TOLD_BY_LITELLM = (
    "model", "provider", "deployment", "api_base", "provider_response_id", "finish_reason", "cache_hit",
    "prompt_tokens", "completion_tokens", "total_tokens", "cached_tokens", "reasoning_tokens", "cost",
)  # fmt: skip
#: LiteLLM counts what it has sent so far.
_GONE_IN_STREAM = {**STREAM, **_GONE, "error_type": "ClientDisconnected", "error_code": "499",
                   "error_message": holds("disconnected"), "prompt_tokens": some, "completion_tokens": some,
                   "total_tokens": some, "cached_tokens": 0, "reasoning_tokens": 0, "cost": some,
                   "payload": partly("The answer")}  # fmt: skip
_BROKEN_OFF = {"error_code": "500", "attempts": None, "prompt_tokens": some, "completion_tokens": some,
               "total_tokens": some, "cached_tokens": 0, "reasoning_tokens": 0, "cost": some, "payload_digest": None,
               "payload_encoding": "text", "payload": streamed("The ", "is "), "payload_size": some}  # fmt: skip


#: What LiteLLM reads in the answers of providers that it knows.
_READ: Json = {
    "model": "claude-3-haiku-20240307", "api_base": holds("/v1/"), "provider_response_id": holds("chatcmpl-"),
    "finish_reason": "stop", "prompt_tokens": PROMPT_TOKENS, "completion_tokens": COMPLETION_TOKENS,
    "total_tokens": PROMPT_TOKENS + COMPLETION_TOKENS, "cached_tokens": 0, "reasoning_tokens": 0,
}  # fmt: skip


def _fields(**fields: str) -> Json:
    """Return what is kept of a form with a file."""
    return {"payload": lambda value, clients: value == fields, "payload_digest": of_the_request}


#: What LiteLLM tells of answers that it counts no tokens of.
_UNCOUNTED: Json = {
    **dict.fromkeys(_NO_TOKENS), "model": None, "provider": None, "deployment": None, "api_base": None,
    "provider_response_id": None, "finish_reason": None,
}  # fmt: skip


def _times(count: int) -> Json:
    """Return what several answers add up to."""
    summed = ("prompt_tokens", "completion_tokens", "total_tokens", "cached_tokens", "reasoning_tokens", "cost")
    return {"attempt_count": count, **{column: count * RESPONSE[column] for column in summed}}


def _generated(path: str) -> Json:
    return _to(f"/v1beta/models/{path}", "agenerate_content", path.partition(":")[0])


_GEMINI = {"model": "gemini/ok", "provider": "gemini", "deployment": "deployment-gemini",
           "api_base": holds("/models/ok:"), "provider_response_id": anything, "cached_tokens": anything,
           "reasoning_tokens": anything}  # fmt: skip
#: LiteLLM tells only of the chat call that it makes of it, without the deployment.
_BRIDGED = {"model": "ok", "deployment": None}


def _guardrail(name: str) -> Rule:
    return lambda value, clients: [report["guardrail_name"] for report in value] == [name]


def _message(model: str) -> Json:
    return {"model": model, "max_tokens": 9, "messages": [{"role": "user", "content": PROMPT_WORD}]}


def _to(endpoint: str, call_type: str, model: str) -> Json:
    return {"endpoint": endpoint, "call_type": call_type, "model": model}


CASES = (
    # Every kind of call
    Case("chat", "chat", lambda c: c.chat()),
    Case("chat-stream", "chat, streamed", lambda c: c.chat(stream=True), STREAM_REQUEST, STREAM),
    Case(
        "chat-stream-usage", "chat, streamed with usage",
        lambda c: c.chat(stream=True, stream_options={"include_usage": True}), STREAM_REQUEST, STREAM,
    ),
    Case(
        "chat-attributes", "chat with user, tags, trace and session",
        lambda c: c.chat(
            user="end-user-1", headers={"x-litellm-tags": "a,b", "x-litellm-session-id": "session-1"},
            metadata={"trace_id": "trace-1"},
        ),
        {"end_user": "end-user-1", "tags": ["a", "b"], "trace_id": "session-1", "session_id": "session-1"},
    ),  # LiteLLM makes a session's name that of the trace
    Case(
        "chat-trace", "chat with a trace", lambda c: c.chat(metadata={"trace_id": "trace-1"}), {"trace_id": "trace-1"}
    ),
    Case(
        "messages-attributes", "messages with the client's own metadata, tags and session",
        lambda c: c.anthropic(**_ATTRIBUTES).messages.create(
            model="claude", max_tokens=20, messages=[{"role": "user", "content": c.prompt}],
            metadata={"user_id": "end-user-1"},
        ),
        {**_MESSAGES_REQUEST, "model": "claude", "tags": ["a", "b"], "session_id": "session-1", "end_user": anything,
         "trace_id": anything},
        _CLAUDE,
    ),
    Case(
        "responses-attributes", "responses with the client's own metadata, tags and session",
        lambda c: c.openai(**_ATTRIBUTES).responses.create(
            model="ok", input=c.prompt, user="end-user-1", metadata={"tags": "of the client"}
        ),
        {**_RESPONSES_REQUEST, "tags": ["a", "b"], "session_id": "session-1", "end_user": "end-user-1",
         "trace_id": anything},
        _RESPONSES,
    ),
    Case(
        "completion", "text completion", lambda c: c.openai().completions.create(model="ok", prompt=c.prompt),
        _to("/v1/completions", "atext_completion", "ok"),
        {"provider": "text-completion-openai", "provider_response_id": "cmpl-1"},
    ),
    Case(
        "completion-stream", "text completion, streamed",
        lambda c: c.read(c.openai().completions.create(model="ok", prompt=c.prompt, stream=True)),
        {**_to("/v1/completions", "atext_completion", "ok"), **STREAM_REQUEST},
        {**STREAM, "provider": "text-completion-openai", "provider_response_id": "cmpl-1"},
    ),
    Case(
        "embeddings", "embeddings",
        lambda c: c.openai().embeddings.create(model="embedding", input=c.prompt, encoding_format="float"),
        _to("/v1/embeddings", "aembedding", "embedding"), {**_EMBEDDING, "deployment": "deployment-embedding"},
    ),
    Case(
        "image", "image", lambda c: c.openai().images.generate(model="image", prompt=c.prompt),
        _to("/v1/images/generations", "image_generation", "image"),
        {**_NO_TOKENS, "cached_tokens": 0, "deployment": "deployment-image", "provider_response_id": None,
         "finish_reason": None},
    ),
    Case(
        "image-edit", "image edit (the form's fields are kept, the files are not)",
        lambda c: c.openai().images.edit(model="image", prompt=PROMPT_WORD, image=("noise.png", AUDIO)),
        {**_to("/v1/images/edits", "aimage_edit", "image"), **_fields(model="image", prompt=PROMPT_WORD)},
        {**_NO_TOKENS, "cached_tokens": 0, "deployment": "deployment-image", "provider_response_id": None,
         "finish_reason": None},
    ),
    Case(
        "moderation", "moderation", lambda c: c.openai().moderations.create(model="moderation", input=c.prompt),
        _to("/v1/moderations", "moderation", "moderation"),
        {**_NO_TOKENS, "deployment": "deployment-moderation", "provider_response_id": "modr-1", "finish_reason": None},
    ),
    Case(
        "speech", "speech",
        lambda c: c.openai().audio.speech.create(model="speech", input=c.prompt, voice="alloy").read(),
        _to("/v1/audio/speech", "aspeech", "speech"),
        {**_NO_TOKENS, "cost": some, "deployment": "deployment-speech",
         "provider_response_id": None, "finish_reason": None, "payload_encoding": "base64",
         "payload": lambda value, clients: value.startswith("SUQzAP/+") and len(value) > len(AUDIO)},
    ),
    Case(
        "transcription", "transcription (the form's fields are kept, the file is not)",
        lambda c: c.openai().audio.transcriptions.create(
            model="transcription", language="en", file=("speech.wav", AUDIO)
        ),
        {**_to("/v1/audio/transcriptions", "transcription", "transcription"),
         "payload": lambda value, clients: value == {"model": "transcription", "language": "en"},
         "payload_digest": of_the_request},
        {**_NO_TOKENS, "deployment": "deployment-transcription", "provider_response_id": None, "finish_reason": None},
    ),
    Case(
        "file", "file (the form's fields are kept, the file is not)",
        lambda c: c.openai().files.create(purpose="user_data", file=("noise", AUDIO)),
        {**_to("/v1/files", "acreate_file", None), **_fields(purpose="user_data")},
        {**_UNCOUNTED, **_NO_TOKENS, "provider_response_id": "file-1", "finish_reason": "processed"},
    ),
    Case(
        "files", "list of files (LiteLLM tells little of answers that it counts no tokens of)",
        lambda c: c.openai().files.list(),
        {**_to("/v1/files", "alist_fine_tuning_jobs", None), "method": "GET", "payload": None,
         "payload_encoding": None},
        _UNCOUNTED,
    ),
    Case(
        "rerank", "rerank",
        lambda c: c.post("/v1/rerank", {"model": "rerank", "query": c.prompt, "documents": ["a", "b"]}),
        _to("/v1/rerank", "rerank", "rerank"),
        {**_NO_TOKENS, "cost": PROMPT_TOKENS * INPUT_COST, "model": "jina_ai/ok", "provider": "jina_ai",
         "deployment": "deployment-rerank", "provider_response_id": "rerank-1", "finish_reason": None},
    ),
    Case(
        "responses", "responses (OpenAI)", lambda c: c.openai().responses.create(model="ok", input=c.prompt),
        _RESPONSES_REQUEST, _RESPONSES,
    ),
    Case(
        "responses-stream", "responses, streamed",
        lambda c: c.read(c.openai().responses.create(model="ok", input=c.prompt, stream=True)),
        {**_RESPONSES_REQUEST, **STREAM_REQUEST}, {**_RESPONSES, **STREAM},
    ),
    Case(
        "responses-delete", "responses, one is deleted", _delete_response,
        {**_to(anything, "adelete_responses", None), "method": "DELETE", "payload": None, "payload_encoding": None},
        {**_UNCOUNTED, "provider": "openai", "api_base": holds("/v1/responses")},
    ),
    Case(
        "messages", "messages (Anthropic)", lambda c: _messages(c, "claude"), {**_MESSAGES_REQUEST, "model": "claude"},
        _CLAUDE,
    ),
    Case(
        "messages-stream", "messages, streamed", lambda c: c.read(_messages(c, "claude", stream=True)),
        {**_MESSAGES_REQUEST, "model": "claude", **STREAM_REQUEST}, {**_CLAUDE, **STREAM},
    ),
    Case(
        "messages-bridged", "messages to an OpenAI model", lambda c: _messages(c, "ok"), _MESSAGES_REQUEST,
        {**_RESPONSES, "finish_reason": "stop"},
    ),
    Case(
        "messages-bridged-stream", "messages to an OpenAI model, streamed",
        lambda c: c.read(_messages(c, "ok", stream=True)), {**_MESSAGES_REQUEST, **STREAM_REQUEST},
        {**_RESPONSES, **STREAM, "provider_response_id": holds("msg_"), "finish_reason": "stop"},
    ),
    Case(
        "models", "several models at once (tokens and cost of all answers)", lambda c: _models(c, "ok,ok,ok"),
        {"model": "ok,ok,ok"}, _times(3),
    ),
    Case(
        "models-retry", "several models at once, one at the second attempt", lambda c: _models(c, "ok,flaky"),
        {"model": "ok,flaky"},
        {**_times(2), "model": holds("openai/"), "deployment": holds("deployment-"), "attempt_count": 3,
         "attempts": attempts(("deployment-flaky", "InternalServerError"))},
    ),
    Case("alias", "an alias of a model", lambda c: c.chat("alias"), {"model": "alias"}),
    Case(
        "gemini", "generateContent (Gemini)", lambda c: _generate(c, "gemini:generateContent"),
        _generated("gemini:generateContent"), _GEMINI,
    ),
    Case(
        "gemini-stream", "generateContent (Gemini), streamed", lambda c: _generate(c, "gemini:streamGenerateContent"),
        {**_generated("gemini:streamGenerateContent"), "call_type": "agenerate_content_stream", **STREAM_REQUEST},
        {**_GEMINI, **STREAM},
    ),
    Case(
        "generate-content", "generateContent to an OpenAI model", lambda c: _generate(c, "ok:generateContent"),
        _generated("ok:generateContent"), _BRIDGED,
    ),
    Case(
        "generate-content-stream", "generateContent to an OpenAI model, streamed (the stream itself is kept)",
        lambda c: _generate(c, "ok:streamGenerateContent"),
        {**_generated("ok:streamGenerateContent"), "call_type": "agenerate_content_stream", **STREAM_REQUEST},
        {**_BRIDGED, **STREAM, "payload_encoding": "text", "payload": streamed("The ", "42.")},
    ),
    Case(
        "generate-content-fallback", "generateContent to an OpenAI model, fallback succeeds",
        lambda c: _generate(c, "backed-up:generateContent"), _generated("backed-up:generateContent"),
        {**_BRIDGED, "attempt_count": 2, "attempts": attempts(("deployment-backed-up", "APIConnectionError"))},
    ),
    Case("pass-through", "pass-through", lambda c: c.post("/pass", {"note": c.prompt}), _PASS_REQUEST, _PASSED),
    Case(
        "pass-through-stream", "pass-through, streamed (the stream itself is kept)",
        lambda c: c.post("/pass", {"note": c.prompt, "stream": True}), {**_PASS_REQUEST, **STREAM_REQUEST},
        {**_PASSED, **STREAM, "payload_encoding": "text", "payload": streamed("The ", "42.", "[DONE]")},
    ),
    Case(
        "pass-through-form", "pass-through of a form (its fields are kept, the file is not)",
        lambda c: _upload(c, "/pass", note=PROMPT_WORD), {**_PASS_REQUEST, **_fields(note=PROMPT_WORD)}, _PASSED,
    ),
    Case(
        "pass-through-file", "pass-through of a file (it is not kept)",
        lambda c: c.http.post(_SPEECH, headers=c._headers(
            {"authorization": f"Bearer {USER_KEY}", "content-type": "audio/wav"}), content=AUDIO),
        {**_PASS_REQUEST, "endpoint": _SPEECH, "payload": None, "payload_encoding": None,
         "payload_digest": of_the_request},
        {**_PASSED, "model": "azure_speech/short-audio", "provider": "azure_speech", "api_base": None},
    ),
    Case(
        "pass-through-anthropic", "pass-through to Anthropic, whose tokens LiteLLM reads",
        lambda c: c.post("/anthropic/v1/messages", _message("claude-3-haiku-20240307")),
        {**_PASS_REQUEST, "endpoint": "/anthropic/v1/messages", "model": "claude-3-haiku-20240307"},
        {**_PASSED, **_READ},
    ),
    Case(
        "pass-through-anthropic-stream", "pass-through to Anthropic, streamed",
        lambda c: c.post("/anthropic/v1/messages", {**_message("claude-3-haiku-20240307"), "stream": True}),
        {**_PASS_REQUEST, **STREAM_REQUEST, "endpoint": "/anthropic/v1/messages", "model": "claude-3-haiku-20240307"},
        {**_PASSED, **STREAM, "model": "claude-3-haiku-20240307", "api_base": holds("/v1/messages"),
         "payload_encoding": "text", "payload": streamed("The ", "42.")},
    ),
    Case(
        "pass-through-openai", "pass-through to OpenAI",
        lambda c: c.post("/openai/v1/chat/completions", {"model": "gpt-4o", "messages": []}),
        {**_PASS_REQUEST, "endpoint": "/openai/v1/chat/completions", "model": "gpt-4o"},
        {**_PASSED, "model": "gpt-4o", "provider": "openai", "api_base": holds("/v1/chat/completions")},
    ),
    Case(
        "cache-hit", "cache hit", _twice, {},
        {"cache_hit": True, "cost": 0.0, "attempt_count": 0},
    ),
    Case(
        "cache-hit-stream", "cache hit, streamed", lambda c: _twice(c, stream=True), STREAM_REQUEST,
        {**STREAM, "cache_hit": True, "cost": 0.0, "attempt_count": 0, "cached_tokens": None,
         "reasoning_tokens": 0},
    ),
    # What a client cannot decide
    Case("no-log", "the client asks for no log", lambda c: c.chat(extra_body={"no-log": True})),
    Case(
        "redaction-header", "the client asks for redaction",
        lambda c: c.chat(headers={"x-litellm-enable-message-redaction": "true"}),
    ),
    Case(
        "redaction-header-stream", "the client asks for redaction, streamed (the stream itself is kept)",
        lambda c: c.chat(stream=True, headers={"x-litellm-enable-message-redaction": "true"}), STREAM_REQUEST,
        {**STREAM, "payload_encoding": "text", "payload": streamed("The ", "42.")},
    ),
    Case(
        "own-credential", "the client brings a provider's key (it is not kept)",
        lambda c: c.chat(extra_body={"api_key": "sk-brought-along"}),
        {"payload": lambda value, clients: value == {**json.loads(clients.sent), "api_key": "[redacted]"},
         "payload_digest": of_the_request},
        {"deployment": holds("")},
    ),
    Case(
        "opaque-key", "a key that LiteLLM does not hash", lambda c: c.chat(key=OPAQUE_KEY),
        {**_NOBODY, "key_alias": "opaque", "key_hash": digest(OPAQUE_KEY)},
    ),
    Case("event-twice", "LiteLLM tells the outcome twice", lambda c: c.chat(prompt="TWICE")),
    # Rejected before a provider is asked
    Case(
        "bad-key", "unknown key", lambda c: c.chat(key="sk-wrong"), {**_NOBODY, "key_hash": digest("sk-wrong")},
        _rejected(401, "ProxyException"),
    ),
    Case(
        "bad-opaque-key", "unknown key of another shape", lambda c: c.chat(key="not-a-key"),
        {**_NOBODY, "key_hash": digest("not-a-key")}, _rejected(401, "ProxyException"),
    ),
    Case(
        "no-key", "no key", lambda c: c.post("/v1/chat/completions", {"model": "ok"}, None),
        {**_NOBODY, "key_hash": None}, _rejected(401, "ProxyException"),
    ),
    Case(
        "bad-key-model-list", "unknown key at an endpoint that is no call", lambda c: c.http.get(
            "/v1/models", headers={**c._headers({}), "authorization": "Bearer sk-wrong"}),
        {**_NOBODY, "key_hash": digest("sk-wrong"), "method": "GET", "endpoint": "/v1/models", "model": None,
         "call_type": "/v1/models", "payload": None, "payload_encoding": None, "payload_digest": None},
        {**_rejected(401, "ProxyException"), "model": None, "provider": None, "deployment": None},
    ),
    Case(
        "bad-key-management", "unknown key at an endpoint that is no call, with a body (it is not kept)",
        lambda c: c.post("/key/generate", {"note": c.prompt}, "sk-wrong"),
        {**_NOBODY, "key_hash": digest("sk-wrong"), "endpoint": "/key/generate", "model": None,
         "call_type": None, "payload": None, "payload_encoding": None, "payload_digest": of_the_request},
        {**UNHEARD, "status_code": 401, "error_type": "ProxyException", "error_code": "401",
         "error_message": "unknown key"},
    ),
    Case(
        "unknown-model", "unknown model", lambda c: c.chat("nonsense"), {"model": "nonsense"},
        {**UNKNOWN, "model": "nonsense", "status_code": 400, "error_type": "ProxyModelNotFoundError",
         "error_code": "400"},
    ),
    Case(
        "bad-json", "body that is no JSON", lambda c: c.post("/v1/chat/completions", b"{no JSON"),
        {"model": None, "payload_encoding": "text",
         "payload": lambda value, clients: value == "{no JSON"},
        {**UNKNOWN, "status_code": 400, "error_type": "ProxyException", "error_code": "400"},
    ),
    Case(
        "compressed", "body that is compressed (LiteLLM reads none)",
        lambda c: _compressed(c, "/v1/chat/completions", {"model": "ok", "note": c.prompt}),
        {"model": None, "payload": lambda value, clients: value["model"] == "ok", "payload_digest": of_the_request},
        {**UNKNOWN, "status_code": 400, "error_type": "ProxyMissingRequiredParamError", "error_code": "400"},
    ),
    Case(
        "compressed-pass-through", "pass-through of a compressed body",
        lambda c: _compressed(c, "/pass", {"note": c.prompt}),
        {**_NOBODY, **_PASS_REQUEST, "key_hash": None, "call_type": None,
         "payload": lambda value, clients: value == {"note": clients.prompt}, "payload_digest": of_the_request},
        {**UNHEARD, "status_code": 500, "error_code": "500", "payload": None, "payload_encoding": None,
         "payload_size": 0},
    ),
    Case(
        "no-object", "body that is no JSON object", lambda c: c.post("/v1/chat/completions", b"[]"),
        {**_NOBODY, "key_hash": None, "model": None, "call_type": None},
        {**UNHEARD, "status_code": 500, "error_code": "500", "payload": None, "payload_encoding": None,
         "payload_size": 0, "payload_digest": None},
    ),
    Case(
        "no-file", "transcription without its file (nobody has read the fields)", lambda c: c.http.post(
            "/v1/audio/transcriptions", headers=c._headers({"authorization": f"Bearer {USER_KEY}"}),
            files={"other": b"not it"}),
        {**_NOBODY, "key_hash": None, "endpoint": "/v1/audio/transcriptions", "model": None, "call_type": None,
         "payload": {}, "payload_digest": of_the_request},
        {**UNHEARD, "status_code": 422, "error_code": "422"},
    ),
    Case(
        "rate-limited", "key over its rate limit", _limited,
        {**_NOBODY, "key_hash": digest(LIMITED_KEY), "key_alias": "limited"}, _rejected(429, "ProxyRateLimitError"),
    ),
    Case(
        "over-budget", "key over its budget", lambda c: c.chat(key=POOR_KEY),
        {**_NOBODY, "key_hash": digest(POOR_KEY)}, _rejected(422, "BudgetExceededError"),
    ),
    Case(
        "guardrail", "blocked by a guardrail",
        lambda c: c.chat(prompt="FORBIDDEN", extra_body={"guardrails": ["words"]}), {},
        _rejected(400, "HTTPException", guardrails=_guardrail("words")),
    ),
    Case(
        "guardrail-meanwhile", "blocked by a guardrail while the provider answers, or before",
        lambda c: c.chat(prompt="FORBIDDEN", extra_body={"guardrails": ["words-meanwhile"]}), {},
        {**_rejected(400, "HTTPException"), **dict.fromkeys(_TOLD_BY_LITELLM, anything), "overhead_ms": perhaps,
         "guardrails": _guardrail("words-meanwhile"), "attempt_count": lambda value, clients: value in (0, 1)},
    ),
    Case(
        "guardrail-of-answers", "answered, and blocked by a guardrail",
        lambda c: c.chat(prompt="FORBIDDEN", extra_body={"guardrails": ["words-of-answers"]}), {},
        {"status": "failure", "status_code": 400, "error_type": "HTTPException", "error_code": "400",
         "error_message": holds("blocked by the guardrail"), "time_to_first_token_ms": None,
         "guardrails": _guardrail("words-of-answers")},
    ),
    Case(
        "guardrail-asks", "a guardrail asks a model of its own",
        lambda c: c.chat(prompt="DOUBTFUL", extra_body={"guardrails": ["words"]}), {},
        {"guardrails": _guardrail("words")},
    ),
    Case(
        "guardrail-passed", "let through by a guardrail", lambda c: c.chat(extra_body={"guardrails": ["words"]}), {},
        {"guardrails": _guardrail("words")},
    ),
    Case(
        "rejected-by-hook", "rejected by another pre-call hook", lambda c: c.chat(prompt="UNWANTED"), {},
        _rejected(403, "HTTPException"),
    ),
    # The provider fails
    *(
        Case(
            f"provider-{status}", f"provider answers {status}",
            lambda c, status=status: c.chat(f"error-{status}"),  # type: ignore[misc]
            {"model": f"error-{status}"}, _failed(status, error, f"error-{status}"),
        )
        for status, error in (
            (500, "InternalServerError"), (429, "RateLimitError"), (400, "BadRequestError"),
            (401, "AuthenticationError"),
        )
    ),
    Case(
        "provider-500-stream", "provider answers 500 to a streamed call", lambda c: c.chat("error-500", stream=True),
        {"model": "error-500", **STREAM_REQUEST}, _failed(500, "InternalServerError", "error-500"),
    ),
    Case(
        "stream-error-first", "provider answers a streamed call with an error as its first event",
        lambda c: c.chat("overloaded", stream=True), {"model": "overloaded", **STREAM_REQUEST},
        _failed(500, "APIConnectionError", "overloaded", attempts=None),
    ),
    Case(
        "messages-500", "provider answers 500 to messages", lambda c: _messages(c, "claude-failing"),
        {**_MESSAGES_REQUEST, "model": "claude-failing"},
        {**_failed(500, "InternalServerError", "claude-failing"), "model": "anthropic/error-500",
         "provider": "anthropic"},
    ),
    Case(
        "pass-through-503", "pass-through target answers 503", lambda c: c.post("/pass", {"model": "error-503"}),
        {**_PASS_REQUEST, "model": "error-503"},
        {**UNKNOWN, "prompt_tokens": None, "completion_tokens": None, "total_tokens": None, "cost": None,
         "cache_hit": None, "status_code": 503, "error_type": "HTTPException", "error_code": "503"},
    ),
    Case(
        "timeout", "provider does not answer in time", lambda c: c.chat("slow"), {"model": "slow"},
        _failed(408, "Timeout", "slow", "held"),
    ),
    Case(
        "refused", "provider refuses the connection", lambda c: c.chat("refused"), {"model": "refused"},
        _failed(500, "InternalServerError", "refused"),
    ),
    Case(
        "stream-dies", "stream breaks off (what was streamed is kept)", lambda c: c.chat("dying", stream=True),
        {"model": "dying", **STREAM_REQUEST},
        {**_failed(200, "APIConnectionError", "dying"), **_BROKEN_OFF},
    ),
    Case(
        "stream-malformed", "stream with a malformed event (what was streamed is kept)",
        lambda c: c.chat("malformed", stream=True), {"model": "malformed", **STREAM_REQUEST},
        {**_failed(200, "APIConnectionError", "malformed"), **_BROKEN_OFF},
    ),
    Case(
        "pass-through-dies", "pass-through stream breaks off",
        lambda c: c.post("/pass", {"model": "dying", "stream": True}),
        {**_PASS_REQUEST, "model": "dying", **STREAM_REQUEST},
        {**_PASSED, **FAILURE, **STREAM, "status_code": 200, "model": "dying", "error_type": "ReadError",
         "payload_encoding": "text", "payload": streamed("The ", "is "), "payload_size": some},
    ),
    # Retries and fallbacks
    Case(
        "retry", "second attempt succeeds", lambda c: c.chat("flaky"), {"model": "flaky"},
        {"model": "openai/flaky", "deployment": "deployment-flaky", "attempt_count": 2,
         "attempts": attempts(("deployment-flaky", "InternalServerError"))},
    ),
    Case(
        "retry-stream", "second attempt succeeds, streamed", lambda c: c.chat("flaky", stream=True),
        {"model": "flaky", **STREAM_REQUEST},
        {**STREAM, "model": "openai/flaky", "deployment": "deployment-flaky", "attempt_count": 2,
         "attempts": attempts(("deployment-flaky", "InternalServerError"))},
    ),
    Case(
        "retries-fail", "all three attempts fail", lambda c: c.chat("hopeless"), {"model": "hopeless"},
        _failed(500, "InternalServerError", "hopeless", "error-500", attempt_count=3,
                attempts=attempts(*[("deployment-hopeless", "InternalServerError")] * 3)),
    ),
    Case(
        "fallback", "fallback succeeds", lambda c: c.chat("backed-up"), {"model": "backed-up"},
        {"attempt_count": 2, "attempts": attempts(("deployment-backed-up", "InternalServerError"))},
    ),
    Case(
        "fallback-stream", "fallback succeeds, streamed", lambda c: c.chat("backed-up", stream=True),
        {"model": "backed-up", **STREAM_REQUEST},
        {**STREAM, "attempt_count": 2, "attempts": attempts(("deployment-backed-up", "InternalServerError"))},
    ),
    Case(
        "fallback-fails", "fallback fails too", lambda c: c.chat("backed-up-badly"), {"model": "backed-up-badly"},
        _failed(500, "InternalServerError", "backed-up-badly", "error-500", attempt_count=2,
                attempts=attempts(("deployment-backed-up-badly", "InternalServerError"),
                                  ("deployment-error-500", "InternalServerError"))),
    ),
    # The client hangs up
    Case(
        "disconnect", "client hangs up before the answer",
        lambda c: c.hang_up(
            "/v1/chat/completions", {"model": "held", "messages": [{"role": "user", "content": c.prompt}]},
            reads_on=True,
        ),
        {"model": "held"},
        {**_GONE, "model": "openai/held", "deployment": "deployment-held",
         "payload": lambda value, clients: value["choices"][0]["message"]["content"] == TEXT},
    ),
    Case(
        "disconnect-stream", "client hangs up in mid-stream",
        lambda c: c.hang_up(
            "/v1/chat/completions",
            {"model": "held", "stream": True, "messages": [{"role": "user", "content": c.prompt}]}, after=b"answer",
        ),
        {"model": "held", **STREAM_REQUEST},
        {**_GONE_IN_STREAM, "model": "openai/held", "deployment": "deployment-held"},
    ),
    Case(
        "disconnect-responses", "client hangs up in mid-stream of responses (LiteLLM does not always tell its outcome)",
        lambda c: c.hang_up(
            "/v1/responses", {"model": "held", "stream": True, "input": c.prompt}, after=b"added", reads_on=True
        ),
        {**_RESPONSES_REQUEST, "model": "held", **STREAM_REQUEST},
        {**STREAM, **_GONE, **dict.fromkeys(_TOLD_BY_LITELLM, anything), "payload_encoding": anything,
         "error_type": nothing_or("ClientDisconnected"), "error_code": nothing_or("499"),
         "error_message": nothing_or("disconnected"), "payload": lambda value, clients: "resp_" in json.dumps(value)},
    ),
    Case(
        "disconnect-messages", "client hangs up in mid-stream of messages",
        lambda c: c.hang_up(
            "/v1/messages",
            {"model": "claude-held", "stream": True, "max_tokens": 9,
             "messages": [{"role": "user", "content": c.prompt}]},
            after=b"The ",
        ),
        {**_MESSAGES_REQUEST, "model": "claude-held", **STREAM_REQUEST},
        {**_CLAUDE, **_GONE_IN_STREAM, "model": "anthropic/held", "deployment": "deployment-claude-held",
         "payload": partly("The ")},
    ),
    Case(
        "disconnect-pass-through", "client hangs up in mid-stream of a pass-through",
        lambda c: c.hang_up("/pass", {"model": "held", "stream": True}, after=b"answer"),
        {**_PASS_REQUEST, "model": "held", **STREAM_REQUEST},
        {**_PASSED, **STREAM, **_GONE, "model": "held", "payload_encoding": "text",
         "payload": streamed("The ", "is ")},
    ),
)  # fmt: skip


#: What clients and providers say: without content nothing of it may be left, with content all of it is found.
SAID = (
    PROMPT_WORD, "FORBIDDEN", "DOUBTFUL", "UNWANTED", "{no JSON", TEXT, "The answer", IMAGE, "the provider says",
    base64.b64encode(AUDIO[:12]).decode(),  # three bytes are four letters
)  # fmt: skip


def said(*stored: Row) -> set[str]:
    """Return which of the words stand in rows."""
    text = json.dumps(stored, default=str)
    return {words for words in SAID if words in text}


def differences(expected: Json, row: Mapping[str, Any], clients: Clients) -> list[str]:
    """Return what is wrong with a row, a line for each column; columns that are not expected must be NULL."""
    result = []
    for column, value in row.items():
        wanted = expected.get(column)
        if callable(wanted):
            good = wanted(value, clients)
        elif isinstance(wanted, float):
            good = isinstance(value, float) and abs(value - wanted) < 1e-12
        else:
            good = value == wanted
        if not good:
            what = (wanted.__doc__ or wanted.__qualname__) if callable(wanted) else repr(wanted)
            result.append(f"{column} is {value!r:.500}, expected: {what}")
    return result


def rows(database: Database, call_id: str) -> tuple[list[Row], list[Row]]:
    """Return the request and the response rows of a call id."""
    with database.server.connection(database.name) as connection:
        cursor = connection.cursor(cursor_factory=RealDictCursor)
        cursor.execute("SELECT * FROM requests WHERE call_id = %s", (call_id,))
        requests = [dict(row) for row in cursor.fetchall()]
        cursor.execute(
            "SELECT * FROM responses WHERE request_id IN (SELECT id FROM requests WHERE call_id = %s)", (call_id,)
        )
        return requests, [dict(row) for row in cursor.fetchall()]


def _attempts(count: Any) -> str:
    return "0 or 1" if callable(count) else str(count)


def _shown(encoding: Any) -> str:
    return "json or text" if callable(encoding) else encoding or ""


def table() -> str:
    """Return the cases as a Markdown table."""
    lines = [
        "| call | HTTP | status | error | attempts | request payload | response payload |",
        "|---|---|---|---|---|---|---|",
    ]
    for case in CASES:
        request, response = case.expected()
        error = "" if callable(response.get("error_type")) else response.get("error_type") or ""
        lines.append(
            f"| {case.what} | {response['status_code']} | {response['status']} | {error} "
            f"| {_attempts(response['attempt_count'])} | {request['payload_encoding'] or ''} "
            f"| {_shown(response['payload_encoding'])} |"
        )
    return "\n".join(lines)
