"""A fake provider that speaks the shapes of OpenAI, Anthropic and Jina, and misbehaves by the model's name.

The model of a request selects what happens: `ok` answers, `error-500` fails with that status, `flaky` fails the first
request of each prompt, `held` answers only when a block `holding` ends, and so on (see `_Handler._misbehave`).
"""

import json
import select
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

from websockets.sync.server import ServerConnection, serve

WORDS = ("The ", "answer ", "is ", "42.")
TEXT = "".join(WORDS)
AUDIO = b"ID3\x00\xff\xfe not quite an mp3" * 40
IMAGE = "https://images.example.net/1.png"
PROMPT_TOKENS, COMPLETION_TOKENS = 11, 7
#: Seconds that a held answer waits at most.
_PATIENCE = 30.0
#: Seconds between the last words of a stream that breaks off and its end.
_PAUSE = 0.3

Json = dict[str, Any]


class Received(NamedTuple):
    """A request as the provider saw it."""

    path: str
    headers: Mapping[str, str]
    body: bytes


class Upstream:
    """The provider's server, on a port of its own; a context manager."""

    def __init__(self) -> None:
        """Listen; serve once entered."""
        self.received: list[Received] = []
        self.seen: Counter[str] = Counter()
        self.held = threading.Semaphore(0)
        self.abandoned = threading.Event()
        self._released = threading.Event()
        handler = type("Handler", (_Handler,), {"upstream": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self._realtime = serve(_talk, "127.0.0.1", 0)

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    @property
    def realtime_url(self) -> str:
        """Where it listens for realtime sessions."""
        return f"http://127.0.0.1:{self._realtime.socket.getsockname()[1]}"

    def __enter__(self) -> "Upstream":
        """Serve."""
        for server in (self._server, self._realtime):
            threading.Thread(target=server.serve_forever, name="upstream", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        """Serve no more."""
        self._released.set()
        self._server.shutdown()
        self._server.server_close()
        self._realtime.shutdown()

    @contextmanager
    def holding(self) -> Iterator[None]:
        """Keep answers of `held` models back inside the block; they go out when it ends."""
        self.held = threading.Semaphore(0)
        self.abandoned.clear()
        try:
            yield
        finally:
            self._released.set()
            self._released = threading.Event()

    def wait_for_held(self) -> None:
        """Return when a request is being held."""
        assert self.held.acquire(timeout=_PATIENCE), "no held request arrived at the provider"

    def hold(self, connection: socket.socket) -> None:
        """Tell that a request is held, and wait until it is released or the gateway has hung up."""
        released = self._released
        self.held.release()
        deadline = time.monotonic() + _PATIENCE
        while not released.wait(0.02) and time.monotonic() < deadline:
            if select.select([connection], [], [], 0)[0] and not connection.recv(1, socket.MSG_PEEK):
                self.abandoned.set()
                return


def _talk(connection: ServerConnection) -> None:
    """Hold a realtime session: greet, and answer each message that asks for one."""
    session = {"id": "sess_1", "object": "realtime.session", "model": "gpt-realtime", "modalities": ["text"]}
    connection.send(json.dumps({"type": "session.created", "event_id": "event_1", "session": session}))
    for message in connection:
        if json.loads(message)["type"] == "response.create":
            usage = {"total_tokens": 18, "input_tokens": PROMPT_TOKENS, "output_tokens": COMPLETION_TOKENS}
            answer = {"id": "resp_1", "object": "realtime.response", "status": "completed", "usage": usage,
                      "output": [_output_item(TEXT, "completed")]}  # fmt: skip
            connection.send(json.dumps({"type": "response.done", "event_id": "event_2", "response": answer}))


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    upstream: Upstream

    def do_POST(self) -> None:
        """Answer as the model of the request demands."""
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = self.path.partition("?")[0]
        self.upstream.received.append(Received(path, dict(self.headers), body))
        request = self._parsed(body)
        answer = _ANSWERS.get(path, _passed_through)
        is_stream = request.get("stream") or path.endswith(":streamGenerateContent")
        stream = _STREAMS.get(path, _passed_through_stream) if is_stream else None
        if not self._misbehave(str(request.get("model", "ok")), body, stream):
            self._complete(answer, stream, request)

    do_GET = do_DELETE = do_POST  # noqa: N815 - the names that http.server calls

    def _parsed(self, body: bytes) -> Json:
        kind = self.headers.get("Content-Type") or ""
        if kind.startswith("audio/"):
            return {}
        if kind.startswith("multipart/"):
            return {"model": body.partition(b'name="model"\r\n\r\n')[2].partition(b"\r\n")[0].decode()}
        return dict(json.loads(body or b"{}"))

    def _misbehave(self, model: str, body: bytes, stream: Callable[[], list[Json]] | None) -> bool:
        """Do what the model's name says; return whether the request is answered by that."""
        if model.startswith("error-"):
            self._fail(int(model.removeprefix("error-")))
        elif model == "flaky":
            prompt = str(json.loads(body)["messages"])
            self.upstream.seen[prompt] += 1
            if self.upstream.seen[prompt] > 1:
                return False
            self._fail(500)
        elif model == "held" and not stream:
            self.upstream.hold(self.connection)
            return False
        elif stream and model == "overloaded":
            self._begin_stream()
            self._send_event({"error": {"message": "the provider says overloaded", "type": "error_529"}})
            self._send_chunk(b"")
        elif stream and model in ("held", "dying", "malformed"):
            self._begin_stream()
            for event in stream()[:3]:
                self._send_event(event)
            if model == "held":
                self.upstream.hold(self.connection)
                return False
            if model == "malformed":
                self._send_chunk(b"data: {this is no JSON\n\n")
                self._send_chunk(b"")
            else:
                time.sleep(_PAUSE)  # so that the words do not arrive together with the end
            self.close_connection = True
        else:
            return False
        return True

    def _complete(self, answer: Callable[[Json], Any], stream: Callable[[], list[Json]] | None, request: Json) -> None:
        try:
            if stream is None:
                content = answer(request)
                if isinstance(content, bytes):
                    self._answer(200, "audio/mpeg", content)
                else:
                    self._answer(200, "application/json", json.dumps(content).encode())
                return
            if request.get("model") == "held":
                events = stream()[3:]
            else:
                events = stream()
                self._begin_stream()
            for event in events:
                self._send_event(event)
            if "type" not in events[-1]:
                self._send_chunk(b"data: [DONE]\n\n")
            self._send_chunk(b"")
        except OSError:  # the gateway has hung up
            self.close_connection = True

    def _fail(self, status: int) -> None:
        error = {"message": f"the provider says {status}", "type": f"error_{status}", "code": str(status)}
        self._answer(status, "application/json", json.dumps({"type": "error", "error": error}).encode())

    def _answer(self, status: int, content_type: str, content: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def _begin_stream(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()

    def _send_event(self, event: Json) -> None:
        name = f"event: {event['type']}\n".encode() if "type" in event else b""
        self._send_chunk(name + b"data: " + json.dumps(event).encode() + b"\n\n")

    def _send_chunk(self, data: bytes) -> None:
        self.wfile.write(b"%x\r\n%b\r\n" % (len(data), data))
        self.wfile.flush()

    def log_message(self, format: str, *args: object) -> None:
        """Write no access log."""


_USAGE = {
    "prompt_tokens": PROMPT_TOKENS,
    "completion_tokens": COMPLETION_TOKENS,
    "total_tokens": PROMPT_TOKENS + COMPLETION_TOKENS,
    "prompt_tokens_details": {"cached_tokens": 3},
    "completion_tokens_details": {"reasoning_tokens": 2},
}
_MESSAGES_USAGE = {"input_tokens": PROMPT_TOKENS, "output_tokens": COMPLETION_TOKENS}
_RESPONSES_USAGE = {
    **_MESSAGES_USAGE,
    "total_tokens": PROMPT_TOKENS + COMPLETION_TOKENS,
    "input_tokens_details": {"cached_tokens": 3},
    "output_tokens_details": {"reasoning_tokens": 2},
}


def _chat(_: Json) -> Json:
    choice = {"index": 0, "message": {"role": "assistant", "content": TEXT}, "finish_reason": "stop"}
    return {
        "id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": "ok", "choices": [choice],
        "usage": _USAGE,
    }  # fmt: skip


def _chat_stream() -> list[Json]:
    def chunk(delta: Json, finish_reason: str | None = None) -> Json:
        choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
        return {
            "id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "ok", "choices": [choice],
        }  # fmt: skip

    words = [chunk({"role": "assistant", "content": word}) for word in WORDS]
    return [*words, chunk({}, "stop"), {**chunk({}), "choices": [], "usage": _USAGE}]


def _completion(_: Json) -> Json:
    return {
        "id": "cmpl-1", "object": "text_completion", "created": 1, "model": "ok", "usage": _USAGE,
        "choices": [{"index": 0, "text": TEXT, "finish_reason": "stop", "logprobs": None}],
    }  # fmt: skip


def _completion_stream() -> list[Json]:
    head = {"id": "cmpl-1", "object": "text_completion", "created": 1, "model": "ok"}
    words = [
        {**head, "choices": [{"index": 0, "text": word, "finish_reason": None, "logprobs": None}]} for word in WORDS
    ]
    end = {**head, "choices": [{"index": 0, "text": "", "finish_reason": "stop", "logprobs": None}], "usage": _USAGE}
    return [*words, end]


def _embedding(_: Json) -> Json:
    data = [{"object": "embedding", "index": 0, "embedding": [0.5, -0.25, 1.0]}]
    usage = {"prompt_tokens": PROMPT_TOKENS, "total_tokens": PROMPT_TOKENS}
    return {"object": "list", "model": "ok", "data": data, "usage": usage}


def _image(_: Json) -> Json:
    return {"created": 1, "data": [{"url": IMAGE}]}


def _moderation(_: Json) -> Json:
    result = {"flagged": True, "categories": {"violence": True}, "category_scores": {"violence": 0.9}}
    return {"id": "modr-1", "model": "ok", "results": [result]}


def _speech(_: Json) -> bytes:
    return AUDIO


def _transcription(_: Json) -> Json:
    return {"text": TEXT}


def _rerank(_: Json) -> Json:
    results = [{"index": 1, "relevance_score": 0.9}, {"index": 0, "relevance_score": 0.1}]
    return {"id": "rerank-1", "model": "ok", "usage": {"total_tokens": PROMPT_TOKENS}, "results": results}


def _response_object(status: str, output: list[Json]) -> Json:
    return {
        "id": "resp_1", "object": "response", "created_at": 1, "status": status, "model": "ok", "output": output,
        "parallel_tool_calls": True, "tool_choice": "auto", "tools": [], "error": None, "instructions": None,
        "incomplete_details": None, "metadata": {}, "temperature": 1.0, "top_p": 1.0,
        "usage": _RESPONSES_USAGE if status == "completed" else None,
    }  # fmt: skip


def _output_item(text: str, status: str) -> Json:
    content = [{"type": "output_text", "text": text, "annotations": []}] if text else []
    return {"id": "msg_1", "type": "message", "role": "assistant", "status": status, "content": content}


def _response(_: Json) -> Json:
    return _response_object("completed", [_output_item(TEXT, "completed")])


def _response_stream() -> list[Json]:
    place = {"item_id": "msg_1", "output_index": 0, "content_index": 0}
    events: list[Json] = [
        {"type": "response.created", "response": _response_object("in_progress", [])},
        {"type": "response.output_item.added", "output_index": 0, "item": _output_item("", "in_progress")},
        {"type": "response.content_part.added", **place,
         "part": {"type": "output_text", "text": "", "annotations": []}},
        *({"type": "response.output_text.delta", **place, "delta": word} for word in WORDS),
        {"type": "response.output_text.done", **place, "text": TEXT},
        {"type": "response.content_part.done", **place,
         "part": {"type": "output_text", "text": TEXT, "annotations": []}},
        {"type": "response.output_item.done", "output_index": 0, "item": _output_item(TEXT, "completed")},
        {"type": "response.completed", "response": _response({})},
    ]  # fmt: skip
    return [{**event, "sequence_number": number} for number, event in enumerate(events)]


def _message(_: Json) -> Json:
    return {
        "id": "msg_1", "type": "message", "role": "assistant", "model": "ok",
        "content": [{"type": "text", "text": TEXT}], "stop_reason": "end_turn", "stop_sequence": None,
        "usage": _MESSAGES_USAGE,
    }  # fmt: skip


def _message_stream() -> list[Json]:
    start = {**_message({}), "content": [], "stop_reason": None, "usage": {"input_tokens": PROMPT_TOKENS,
                                                                          "output_tokens": 1}}  # fmt: skip
    deltas = [
        {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": word}} for word in WORDS
    ]
    return [
        {"type": "message_start", "message": start},
        {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
        *deltas,
        {"type": "content_block_stop", "index": 0},
        {"type": "message_delta", "delta": {"stop_reason": "end_turn", "stop_sequence": None},
         "usage": {"output_tokens": COMPLETION_TOKENS}},
        {"type": "message_stop"},
    ]  # fmt: skip


def _generated(text: str, usage: Json | None = None) -> Json:
    candidate = {"content": {"role": "model", "parts": [{"text": text}]}, "index": 0, "finishReason": "STOP"}
    return {"responseId": "gemini-1", "modelVersion": "ok", "candidates": [candidate], "usageMetadata": usage or {}}


_GENERATED_USAGE = {
    "promptTokenCount": PROMPT_TOKENS, "candidatesTokenCount": COMPLETION_TOKENS,
    "totalTokenCount": PROMPT_TOKENS + COMPLETION_TOKENS,
}  # fmt: skip


def _generate(_: Json) -> Json:
    return _generated(TEXT, _GENERATED_USAGE)


def _generate_stream() -> list[Json]:
    return [_generated(word, _GENERATED_USAGE if word == WORDS[-1] else None) for word in WORDS]


_FILE = {"id": "file-1", "object": "file", "bytes": 9, "created_at": 1, "filename": "a", "purpose": "batch",
         "status": "processed"}  # fmt: skip


def _file(request: Json) -> Json:
    return _FILE if request else {"object": "list", "data": [_FILE], "has_more": False}


def _deleted(_: Json) -> Json:
    return {"id": "resp_1", "object": "response", "deleted": True}


def _passed_through(request: Json) -> Json:
    return {"echo": request, "note": TEXT}


def _passed_through_stream() -> list[Json]:
    return [{"word": word} for word in WORDS]


_ANSWERS: dict[str, Callable[[Json], Any]] = {
    "/v1/chat/completions": _chat,
    "/v1/completions": _completion,
    "/v1/embeddings": _embedding,
    "/v1/images/generations": _image,
    "/v1/moderations": _moderation,
    "/v1/audio/speech": _speech,
    "/v1/audio/transcriptions": _transcription,
    "/v1/rerank": _rerank,
    "/v1/responses": _response,
    "/v1/messages": _message,
    "/v1/images/edits": _image,
    "/v1/files": _file,
    "/v1/responses/resp_1": _deleted,
    "/models/ok:generateContent": _generate,
}
_STREAMS: dict[str, Callable[[], list[Json]]] = {
    "/v1/chat/completions": _chat_stream,
    "/v1/completions": _completion_stream,
    "/v1/responses": _response_stream,
    "/v1/messages": _message_stream,
    "/models/ok:streamGenerateContent": _generate_stream,
}
