"""A provider that streams a chat completion for some seconds; runs on the host under test.

Usage: upstream.py KEY ... (all are accepted; the answer's first word is the number of the one that was used)
"""

import json
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

CHUNKS, PAUSE = 10, 0.5  # seconds between chunks


class Slow(BaseHTTPRequestHandler):
    """Answers every POST with a stream of `CHUNKS` words."""

    def do_POST(self) -> None:
        """Stream one word each `PAUSE`."""
        self.rfile.read(int(self.headers["Content-Length"]))
        key = (self.headers["Authorization"] or "").removeprefix("Bearer ")
        if key not in sys.argv[1:]:
            self.send_error(401)
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        for number in range(CHUNKS + 1):
            word = f"key{sys.argv.index(key)} " if number == 0 else f"word{number} "
            delta = {"content": word} if number < CHUNKS else {}
            choice = {"index": 0, "delta": delta, "finish_reason": None if number < CHUNKS else "stop"}
            chunk = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "slow", "choices": [choice]}
            self.wfile.write(f"data: {json.dumps(chunk)}\n\n".encode())
            self.wfile.flush()
            time.sleep(PAUSE)
        self.wfile.write(b"data: [DONE]\n\n")

    def log_message(self, *_: object) -> None:
        """Say nothing."""


ThreadingHTTPServer(("127.0.0.1", 9999), Slow).serve_forever()
