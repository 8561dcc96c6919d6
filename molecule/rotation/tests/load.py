"""Load that must not notice a rotation: database clients and HTTP clients, each counting what failed."""

import json
import subprocess
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx

TESTS = Path(__file__).resolve().parent


class DatabaseClient:
    """A client on the host that opens a new connection for each query."""

    def __init__(self, container: str, login: str, rate: float) -> None:
        """Start it."""
        program = (TESTS / "database_client.py").read_text()
        command = ["podman", "exec", "--interactive", container, "/opt/litellm-sqlalchemy/current/bin/python", "-I"]
        self.login = login
        self.process = subprocess.Popen(
            [*command, "-c", program, login, str(rate)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def stop(self) -> dict[str, Any]:
        """End it and return its count, its failures and the logins that it was."""
        output = self.process.communicate(timeout=60)[0]
        result: dict[str, Any] = json.loads(output)
        return result


class HttpClient(threading.Thread):
    """A client of the gateway through HAProxy: a call after the other, each over a new connection."""

    def __init__(self, client: Callable[[], httpx.Client], model: str, pause: float) -> None:
        """Start it; `client` makes an HTTP client that holds the key of that moment."""
        super().__init__(daemon=True)
        self.client, self.model, self.pause = client, model, pause
        self.prefix = f"rotation-{model}-{uuid.uuid4().hex[:8]}"
        self.count, self.failures, self.ended = 0, [], threading.Event()  # type: ignore[var-annotated]
        self.start()

    def run(self) -> None:
        """Send until told to stop."""
        while not self.ended.is_set():
            self.count += 1
            try:
                self.send(f"{self.prefix}-{self.count}")
            except Exception as error:
                self.failures.append(f"{time.strftime('%H:%M:%S')} {type(error).__name__}: {error}"[:300])
            self.ended.wait(self.pause)

    def send(self, call_id: str) -> None:
        """Send one call and read its answer to the end."""
        body = {"model": self.model, "stream": self.model == "slow", "messages": [{"role": "user", "content": call_id}]}
        with (
            self.client() as client,
            client.stream("POST", "/v1/chat/completions", json=body, headers={"x-litellm-call-id": call_id}) as answer,
        ):
            text = "".join(answer.iter_text())
            if answer.status_code != 200:
                raise RuntimeError(f"HTTP {answer.status_code}: {text[:200]}")
            if body["stream"] and not text.rstrip().endswith("data: [DONE]"):
                raise RuntimeError("the stream ended before its end")

    def stop(self) -> None:
        """End it after the call that it is at."""
        self.ended.set()
        self.join(120)
