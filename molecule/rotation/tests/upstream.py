"""A provider that streams a chat completion for ten seconds; runs on the host under test."""

import json
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

CHUNKS = 20


class Slow(BaseHTTPRequestHandler):
    """Answers every POST with a stream of `CHUNKS` words."""

    def do_POST(self) -> None:
        """Stream one word each half second."""
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        for number in range(CHUNKS + 1):
            delta = {"content": f"word{number} "} if number < CHUNKS else {}
            choice = {"index": 0, "delta": delta, "finish_reason": None if number < CHUNKS else "stop"}
            chunk = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "slow", "choices": [choice]}
            self.wfile.write(f"data: {json.dumps(chunk)}\n\n".encode())
            self.wfile.flush()
            time.sleep(0.5)
        self.wfile.write(b"data: [DONE]\n\n")

    def log_message(self, *_: object) -> None:
        """Say nothing."""


ThreadingHTTPServer(("127.0.0.1", 9999), Slow).serve_forever()
