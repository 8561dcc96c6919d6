"""A provider that says back what it was told: as an answer, a stream, a tool call, an error, or bare.

Usage: canary_upstream.py PORT
"""

import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote

COMMON = {"id": "chatcmpl-echo", "created": 1, "model": "echo"}


def answer(body: dict[str, Any], text: str) -> dict[str, Any]:
    """Return a chat completion; with tools it is a call of the first one."""
    message: dict[str, Any] = {"role": "assistant", "content": text}
    if body.get("tools"):
        function = {"name": body["tools"][0]["function"]["name"], "arguments": json.dumps({"said": text})}
        message = {"role": "assistant", "content": None}
        message["tool_calls"] = [{"id": "call_1", "type": "function", "function": function}]
    choice = {"index": 0, "finish_reason": "stop", "message": message}
    usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
    return {**COMMON, "object": "chat.completion", "choices": [choice], "usage": usage}


def stream(text: str) -> bytes:
    """Return the events of a streamed answer, a few characters in each."""
    deltas: list[dict[str, Any]] = [{"content": text[start : start + 7]} for start in range(0, len(text), 7)]
    events = [
        {**COMMON, "object": "chat.completion.chunk", "choices": [{"index": 0, "delta": delta, "finish_reason": end}]}
        for delta, end in [*((delta, None) for delta in deltas), ({}, "stop")]
    ]
    return b"".join(f"data: {json.dumps(event)}\n\n".encode() for event in events) + b"data: [DONE]\n\n"


class Handler(BaseHTTPRequestHandler):
    """Answers by what the request says."""

    def do_POST(self) -> None:
        """Chat completions by their last message, transcriptions by their file's name; all else comes back as it is."""
        sent = self.rfile.read(int(self.headers["Content-Length"]))
        if "/audio/transcriptions" in self.path:
            name = unquote(sent.partition(b'filename="')[2].partition(b'"')[0].decode())
            self._send(200, "application/json", json.dumps({"text": name}).encode())
            return
        if "/chat/completions" not in self.path:
            self._send(500 if b"FAIL" in sent else 200, "application/json", sent)
            return
        body = json.loads(sent)
        text = str(body["messages"][-1]["content"])
        if text.startswith("FAIL"):
            error = {"message": f"cannot answer {text}", "type": "invalid_request_error", "code": "bad"}
            self._send(400, "application/json", json.dumps({"error": error}).encode())
        elif body.get("stream"):
            self._send(200, "text/event-stream", stream(text))
        else:
            self._send(200, "application/json", json.dumps(answer(body, text)).encode())

    def _send(self, status: int, content_type: str, content: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_arguments: object) -> None:
        """Say nothing: what a provider logs is not the gateway's doing."""


if __name__ == "__main__":
    ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
