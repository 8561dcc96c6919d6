"""The clients of the cases: the `openai` and `anthropic` packages, and plain HTTP; all say what went over the wire."""

import http.client
import json
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import anthropic
import httpx
import openai

from support.keys import USER_KEY
from support.upstream import Upstream

Json = dict[str, Any]
USER_AGENT = "completeness"
#: A word of every prompt that has no other.
PROMPT_WORD = "marmalade"


class Clients:
    """Clients that make one call and remember it."""

    def __init__(self, url: str, call_id: str, upstream: Upstream) -> None:
        """Take the gateway's address, the call id to send and the provider."""
        self.url = url
        self.call_id = call_id
        self.made_at = time.time()
        self.upstream = upstream
        self.earlier: list[Clients] = []
        self.sent = b""
        self.response: Any = None
        self.error: Exception | None = None
        self._hooks: Any = {"request": [self._note_request], "response": [self._note_response]}
        self.http = httpx.Client(base_url=url, timeout=30, event_hooks=self._hooks)

    def openai(self, key: str = USER_KEY, **headers: str) -> openai.OpenAI:
        """Return the OpenAI client."""
        return openai.OpenAI(
            base_url=f"{self.url}/v1",
            api_key=key,
            max_retries=0,
            http_client=openai.DefaultHttpxClient(event_hooks=self._hooks),
            default_headers=self._headers(headers),
        )

    def anthropic(self, key: str = USER_KEY, **headers: str) -> anthropic.Anthropic:
        """Return the Anthropic client."""
        return anthropic.Anthropic(
            base_url=self.url,
            api_key=key,
            max_retries=0,
            http_client=anthropic.DefaultHttpxClient(event_hooks=self._hooks),
            default_headers=self._headers(headers),
        )

    def chat(
        self,
        model: str = "ok",
        prompt: str | None = None,
        key: str = USER_KEY,
        headers: Json | None = None,
        **more: Any,
    ) -> None:
        """Make a chat call through the OpenAI client; read a stream to its end."""
        messages: Any = [{"role": "user", "content": prompt or self.prompt}]
        create: Callable[..., Any] = self.openai(key, **(headers or {})).chat.completions.create
        answer = create(model=model, messages=messages, **more)
        if more.get("stream"):
            self.read(answer)

    def post(self, path: str, body: bytes | Json, key: str | None = USER_KEY) -> None:
        """Make a call without a client package."""
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.http.post(path, headers=self._headers(self._plain_headers(key)), content=content)

    def hang_up(self, path: str, body: Json, *, after: bytes = b"", reads_on: bool = False) -> None:
        """Make a call to a model that holds its answer; hang up once the provider has it and `after` has come in.

        The provider answers only after the gateway has noticed; LiteLLM `reads_on` or hangs up in its turn.
        """
        self.sent = json.dumps(body).encode()
        connection = http.client.HTTPConnection(self.url.removeprefix("http://"), timeout=30)
        with self.upstream.holding():
            connection.request("POST", path, self.sent, self._headers(self._plain_headers(USER_KEY)))
            self.upstream.wait_for_held()
            if after:
                response = connection.getresponse()
                self.response = httpx.Response(response.status, headers=response.getheaders())
                received = b""
                while after not in received:
                    received += response.read1(65536)
            connection.sock.shutdown(socket.SHUT_WR)
            while connection.sock.recv(65536):
                pass  # the gateway closes its side once it has noticed
            connection.close()
            if not reads_on:
                assert self.upstream.abandoned.wait(20), "LiteLLM has not hung up"

    def before(self) -> "Clients":
        """Return clients for a call that comes before this one."""
        self.earlier.append(Clients(self.url, f"{self.call_id}-before-{len(self.earlier)}", self.upstream))
        return self.earlier[-1]

    @staticmethod
    def read(stream: Iterable[Any]) -> list[Any]:
        """Read a stream to its end."""
        return list(stream)

    @contextmanager
    def expecting_errors(self) -> Iterator[None]:
        """Keep what a client package raises."""
        try:
            yield
        except (openai.OpenAIError, anthropic.AnthropicError, httpx.HTTPError) as error:
            self.error = error

    @property
    def prompt(self) -> str:
        """A prompt that no other call has."""
        return f"{PROMPT_WORD} {self.call_id}"

    @property
    def told_call_id(self) -> str:
        """The call id that the gateway told, otherwise the one that was sent."""
        told = self.response.headers.get("x-litellm-call-id") if self.response is not None else None
        return str(told or self.call_id)

    def _headers(self, headers: Json) -> dict[str, str]:
        return {"x-litellm-call-id": self.call_id, "user-agent": USER_AGENT, **headers}

    @staticmethod
    def _plain_headers(key: str | None) -> dict[str, str]:
        headers = {"content-type": "application/json"}
        return {**headers, "authorization": f"Bearer {key}"} if key else headers

    def _note_request(self, request: Any) -> None:
        self.sent = request.read()

    def _note_response(self, response: Any) -> None:
        self.response = response
