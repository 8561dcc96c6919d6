"""Load that must not notice a rotation: database clients and HTTP clients, each request of theirs in one ledger."""

import json
import subprocess
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import httpx

TESTS = Path(__file__).resolve().parent
PYTHON = "/opt/litellm-sqlalchemy/current/bin/python"
LONGEST = 60  # seconds that a request may take


class Request(NamedTuple):
    """A request that has ended."""

    began: float  # Unix time
    client: str
    name: str  # of a call its id, of a query the user that it was
    error: str


def program(container: str, name: str, *arguments: str) -> subprocess.Popen[str]:
    """Start one of the programs beside this file on the host, with the log's Python."""
    source = (TESTS / name).read_text()
    command = ["podman", "exec", "--interactive", container, PYTHON, "-I", "-c", source, *arguments]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def refuse_late(began: float) -> None:
    """Count a request as failed that was answered when nobody would have waited any longer."""
    if (took := time.time() - began) > LONGEST:
        raise TimeoutError(f"answered after {took:.0f} s")


class DatabaseClients(threading.Thread):
    """Clients on the host that open a new connection for each query; `rates` in queries per second, by login."""

    def __init__(self, ledger: list[Request], container: str, rates: dict[str, float]) -> None:
        """Start them."""
        super().__init__(daemon=True)
        self.ledger = ledger
        arguments = [f"{login}={rate}" for login, rate in rates.items()]
        self.process = program(container, "database_client.py", *arguments)
        self.start()

    def run(self) -> None:
        """Keep what they print."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.ledger.append(Request(*json.loads(line)))

    def stop(self) -> None:
        """End them after the query that each is at."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.join(60)
        assert self.process.wait(60) == 0, "the database clients ended by themselves"


class HttpClient(threading.Thread):
    """A client of the gateway through HAProxy that sends one call after the other."""

    def __init__(
        self, ledger: list[Request], client: Callable[[], httpx.Client], model: str, pause: float, calls: int
    ) -> None:
        """Start it; `client` makes an HTTP client with the key of that moment, a new one after so many calls."""
        super().__init__(daemon=True)
        self.ledger, self.client, self.model, self.pause, self.calls_of_connection = ledger, client, model, pause, calls
        self.kind = f"http {'streams' if model == 'slow' else 'kept connection' if calls > 1 else 'new connections'}"
        self.ended = threading.Event()
        self.start()

    def run(self) -> None:
        """Send until told to stop."""
        prefix, count, client = f"rotation-{uuid.uuid4().hex[:12]}", 0, self.client()
        while not self.ended.is_set():
            count += 1
            began, call_id, error = time.time(), f"{prefix}-{count}", ""
            try:
                self.send(client, call_id)
                refuse_late(began)
            except Exception as problem:  # whatever it is, it is what a client would have seen
                error = f"{type(problem).__name__}: {problem}"[:300]
            self.ledger.append(Request(began, self.kind, call_id, error))
            if count % self.calls_of_connection == 0:
                client.close()
                client = self.client()
            self.ended.wait(self.pause)

    def send(self, client: httpx.Client, call_id: str) -> None:
        """Send one call and read its answer to the end."""
        body = {"model": self.model, "stream": self.model == "slow", "messages": [{"role": "user", "content": call_id}]}
        headers = {"x-litellm-call-id": call_id, "X-Forwarded-For": "203.0.113.9"}  # forged
        with client.stream("POST", "/v1/chat/completions", json=body, headers=headers) as answer:
            text = "".join(answer.iter_text())
        if answer.status_code != 200:
            raise RuntimeError(f"HTTP {answer.status_code}: {text[:200]}")
        if not body["stream"] and "Hello from the demo model." not in text:
            raise RuntimeError(f"not the whole answer: {text[:200]}")
        if body["stream"] and not ("word9 " in text and text.rstrip().endswith("data: [DONE]")):
            raise RuntimeError("the stream ended before its end")

    def stop(self) -> None:
        """End it after the call that it is at."""
        self.ended.set()
        self.join(120)
        assert not self.is_alive(), "a call did not end in two minutes"
