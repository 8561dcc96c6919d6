"""Start one LiteLLM instance, or check a configuration, with systemd's credentials as environment variables.

Usage: launcher.py CONFIG HOST FIRST_PORT INSTANCE | launcher.py --check MINIMUM_VERSION

The credentials are put into the environment of the running program only: /proc/PID/environ and `systemctl show` never
hold them. systemd is told that the unit is ready when LiteLLM's readiness check answers.
"""

import asyncio
import contextlib
import gc
import hmac
import http.client
import importlib
import importlib.metadata
import importlib.util
import json
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

PREVIOUS_KEYS = "key_LITELLM_MASTER_KEY_PREVIOUS.cred"
HOOKS = "LITELLM_WORKER_STARTUP_HOOKS"
#: A printable character as URLs encode it; what else is encoded stays so, or a client could make up lines of a log.
ENCODED = re.compile(rb"%([2-6][0-9A-Fa-f]|7[0-9A-Ea-e])")
MEGABYTE = 1024 * 1024
#: Largest bodies that running calls may have together; beyond it, none of more than a megabyte is taken, and beyond one
#: more none of more than a server hands on at once.
LARGEST_TOGETHER, SMALL = 4, 64 * 1024
#: Bytes that a body, or its end, has to come on by, and the seconds it may take: 35 kbit/s, and no longer pause.
PACE, PATIENCE = 256 * 1024, 60
#: Characters that begin and part the values of a JSON body: LiteLLM takes up to 80 bytes for a value. There may be more
#: where the largest body has more bytes for each.
MOST_VALUES, BYTES_FOR_VALUE = 1_000_000, 100
#: A form without files: to decode it takes LiteLLM two seconds a megabyte, in which no other call goes on.
FORM, LARGEST_FORM = b"application/x-www-form-urlencoded", 256 * 1024
#: What LiteLLM imports in the midst of a first call, which takes half a second each.
LATE_IMPORTS = "openai.resources", "litellm.litellm_core_utils.default_encoding"


class PreviousKeys:
    """An ASGI application around LiteLLM's that accepts master keys which were replaced, each until its end.

    LiteLLM knows one master key: a header that holds a previous one goes on with the present one in its place.
    """

    def __init__(self, app: Any, keys: list[tuple[float, bytes]], present: bytes) -> None:
        self.app, self.keys, self.present = app, keys, present

    def translated(self, value: bytes) -> bytes:
        scheme, space, key = value.rpartition(b" ")
        now = time.time()
        for end, previous in self.keys:
            if now < end and hmac.compare_digest(key, previous):
                return scheme + space + self.present
        return value

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if "headers" in scope:
            scope = scope | {"headers": [(name, self.translated(value)) for name, value in scope["headers"]]}
        await self.app(scope, receive, send)


class BodyRefusedError(Exception):
    """Ends what LiteLLM does with a request whose body is refused."""


class Body:
    """The body of a request on its way in."""

    def __init__(self, scope: Any, receive: Any) -> None:
        """Take ASGI's scope of the request, and the way that its messages come by."""
        self.receive, self.size, self.complete = receive, 0, False
        self.due, self.patience = PACE, PATIENCE
        self.begin, self.values = b"", 0
        length = dict(scope["headers"]).get(b"content-length", b"")
        self.declared = int(length) if length.isdigit() else 0
        kinds = [value.split(b";")[0] for name, value in scope["headers"] if name == b"content-type"]
        self.is_form = FORM in (kind.strip().lower() for kind in kinds)

    async def next(self) -> Any:
        """Return the next message. Raises TimeoutError where the body does not come on."""
        loop = asyncio.get_running_loop()
        began = loop.time()
        async with asyncio.timeout(None if self.complete else self.patience):
            message = await self.receive()
        self.patience -= loop.time() - began
        content = message.get("body", b"")
        self.size += len(content)
        self.complete = not message.get("more_body", False)
        if self.size >= self.due:
            self.due, self.patience = self.size + PACE, PATIENCE
        if not self.complete or self.size > MOST_VALUES:
            self.begin = self.begin or content.lstrip()[:1]
            if self.begin in (b"{", b"["):
                self.values += len(content) - len(content.translate(None, b",{["))
        return message


class LimitedBodies:
    """An ASGI application around LiteLLM's that takes no body beyond a size, and not too many large ones at a time.

    LiteLLM reads a body whole, and what it says, before it looks at the key: anybody could take an instance's memory or
    time, and with it the calls of others. What has come of a body that stops on its way is not kept for long, either.
    """

    def __init__(self, app: Any, largest: int) -> None:
        """Take the size in bytes."""
        self.app, self.largest, self.held = app, largest, 0
        self.most_values = max(MOST_VALUES, largest // BYTES_FOR_VALUE)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        body, answering = Body(scope, receive), False
        refused = self.refusal(body)

        async def limited_receive() -> Any:
            nonlocal refused
            if not refused:
                before = body.size
                try:
                    message = await body.next()
                except TimeoutError:
                    refused = 408, f"The request stopped on its way: {PACE // 1024} KB have to come in {PATIENCE} s"
                else:
                    self.held += body.size - before
                    refused = self.refusal(body)
            if refused:
                raise BodyRefusedError
            return message

        async def limited_send(message: Any) -> None:
            nonlocal answering
            if not refused or answering:
                answering = True
                await send(message)

        try:
            if not refused:
                await self.app(scope, limited_receive, limited_send)
        except Exception:
            if not refused or answering:
                raise
        finally:
            self.held -= body.size
        if refused and not answering:
            with contextlib.suppress(TimeoutError):
                # A client that sends all before it reads, and HAProxy with it, would wait for ever.
                while refused[0] != 408 and not body.complete:
                    await body.next()
            await refuse(*refused, send)

    def refusal(self, body: Body) -> tuple[int, str] | None:
        """Return the status and the reason by which a body is refused, None where it is taken."""
        size = max(body.size, body.declared)
        if size > self.largest:
            return 413, f"The request is too large: {self.largest // MEGABYTE} MB are taken (litellm_max_request_mb)"
        if body.is_form and size > LARGEST_FORM:
            return 413, f"The form is too large: {LARGEST_FORM // 1024} KB are taken as {FORM.decode()}"
        if body.values > self.most_values:
            return (
                413,
                f"The request has more than {self.most_values} commas, braces and brackets (litellm_max_request_mb)",
            )
        beyond = self.held - LARGEST_TOGETHER * self.largest
        if beyond > 0 and body.size > (MEGABYTE if beyond <= self.largest else SMALL):
            return 503, "This gateway has too many large requests at work: try again"
        return None


class FairTurns:
    """An ASGI application around LiteLLM's that lets the other calls go on between two parts of a stream or session.

    Where a provider, or the client of a session, is faster than LiteLLM, nothing that LiteLLM awaits has to wait: the
    event loop would do nothing else before the end.
    """

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        is_session = scope["type"] == "websocket"

        async def fair_receive() -> Any:
            await asyncio.sleep(0)
            return await receive()

        async def fair_send(message: Any) -> None:
            await send(message)
            if is_session or message.get("more_body"):
                await asyncio.sleep(0)

        await self.app(scope, fair_receive if is_session else receive, fair_send)


async def refuse(status: int, reason: str, send: Any) -> None:
    """Answer."""
    body = json.dumps({"error": {"message": reason, "type": "request_refused", "code": str(status)}}).encode()
    close = (b"connection", b"close")  # what may still come is no next request
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body)), close]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


class Scrubbed:
    """A standard stream that replaces what has the shape of a secret: LiteLLM logs what clients and providers say."""

    def __init__(self, stream: Any, scrub: Callable[[bytes], bytes]) -> None:
        self.stream, self.scrub = stream, scrub

    def write(self, text: str) -> int:
        content = text.encode(errors="replace")
        clean = self.scrub(content)
        decoded = ENCODED.sub(lambda found: bytes([int(found[1], 16)]), content)
        if decoded != content and (scrubbed := self.scrub(decoded)) != decoded:
            clean = scrubbed  # a path in the access log, whose secret shows only so
        self.stream.write(clean.decode(errors="replace"))
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def keep_secrets_out_of_the_journal() -> None:
    """Scrub both standard streams by the rules of the request log, where that is installed."""
    if importlib.util.find_spec("litellm_sqlalchemy") is None:
        return
    from litellm_sqlalchemy.redaction import scrubbed

    sys.stdout, sys.stderr = Scrubbed(sys.stdout, scrubbed), Scrubbed(sys.stderr, scrubbed)


async def go_into_service() -> None:
    """LiteLLM calls this hook at its start, when all is loaded and its middleware is built."""
    load_what_comes_late()
    await build_routes()
    leave_out_what_is_loaded()
    take_turns()
    limit_bodies()
    accept_previous_keys()


def load_what_comes_late() -> None:
    """Import now what would keep all calls waiting later, as far as this LiteLLM has it."""
    for name in LATE_IMPORTS:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)


async def build_routes() -> None:
    """Look for a page that there is not: FastAPI builds a route when it is compared first, all of them in a second."""
    from litellm.proxy.proxy_server import app

    async def ignore(_message: Any) -> None:
        """Send nothing."""

    page = {"type": "http", "method": "GET", "path": "/no/such/page", "query_string": b"", "headers": []}
    await app.router(page, None, ignore)


def leave_out_what_is_loaded() -> None:
    """Collect garbage from now on, but not among what was loaded: to look at all of it keeps every request waiting."""
    gc.freeze()
    gc.enable()


def take_turns() -> None:
    """Stand around LiteLLM's application."""
    from litellm.proxy.proxy_server import app

    app.middleware_stack = FairTurns(app.middleware_stack)


def limit_bodies() -> None:
    """Stand around LiteLLM's application where there is a limit."""
    from litellm.proxy.proxy_server import app

    if megabytes := int(os.environ["GATEWAY_MAX_REQUEST_MB"]):
        app.middleware_stack = LimitedBodies(app.middleware_stack, megabytes * MEGABYTE)


def accept_previous_keys() -> None:
    """Stand around LiteLLM's application where there are previous keys."""
    from litellm.proxy.proxy_server import app

    file = Path(os.environ["CREDENTIALS_DIRECTORY"]) / PREVIOUS_KEYS
    lines = [line.split(" ", 1) for line in file.read_text().splitlines() if " " in line] if file.exists() else []
    keys = [(float(end), key.encode()) for end, key in lines]
    if keys:
        app.middleware_stack = PreviousKeys(app.middleware_stack, keys, os.environ["LITELLM_MASTER_KEY"].encode())


def leave_link() -> None:
    """Start again from the release itself: modules imported later must not come from the next one."""
    release = Path(sys.prefix).resolve()
    if str(release) != sys.prefix:
        python = str(release / "bin/python")
        os.execv(python, [python, "-I", *sys.argv])


def load_credentials() -> Path:
    """Put each credential, key_<name>.cred, into the environment under its name."""
    directory = Path(os.environ["CREDENTIALS_DIRECTORY"])
    for file in directory.glob("key_*.cred"):
        if file.name != PREVIOUS_KEYS:
            os.environ[file.stem.removeprefix("key_")] = file.read_text().strip()
    return directory


def numbers(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version)[:3]]


def refuse_older_than(minimum: str) -> None:
    """Exit when the LiteLLM that is installed, whatever the lock says, is older."""
    installed = importlib.metadata.version("litellm")
    if numbers(installed) < numbers(minimum):
        sys.exit(f"LiteLLM {installed} is installed there, and at least {minimum} is needed: lock a later one")


def is_ready(host: str, port: int) -> bool:
    connection = http.client.HTTPConnection(host, port, timeout=10)
    try:
        connection.request("GET", "/health/readiness")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def report_readiness(host: str, port: int, notify_socket: str) -> None:
    while not is_ready(host, port):
        time.sleep(0.3)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as connection:
        connection.sendto(b"READY=1", notify_socket.replace("@", "\0", 1))


def main() -> None:
    leave_link()
    keep_secrets_out_of_the_journal()
    credentials = load_credentials()
    if sys.argv[1] == "--check":
        refuse_older_than(sys.argv[2])
        arguments = ["--config", str(credentials / "config.yaml"), "--validate_config"]
    else:
        config, host, first_port, instance = sys.argv[1:]
        port = int(first_port) + int(instance) - 1
        arguments = ["--config", config, "--host", host, "--port", str(port)]
        if notify_socket := os.environ.pop("NOTIFY_SOCKET", None):
            threading.Thread(target=report_readiness, args=(host, port, notify_socket), daemon=True).start()

    os.environ[HOOKS] = ",".join(filter(None, (f"{__name__}:go_into_service", os.environ.get(HOOKS))))
    gc.disable()  # to load LiteLLM makes much, and nothing that is garbage
    from litellm import run_server

    sys.argv = ["litellm", *arguments]
    run_server()


if __name__ == "__main__":
    main()
