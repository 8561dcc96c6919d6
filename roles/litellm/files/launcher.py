"""Start one LiteLLM instance, or check a configuration, with systemd's credentials as environment variables.

Usage: launcher.py CONFIG HOST FIRST_PORT INSTANCE | launcher.py --check MINIMUM_VERSION

The credentials are put into the environment of the running program only: /proc/PID/environ and `systemctl show` never
hold them. systemd is told that the unit is ready when LiteLLM's readiness check answers.
"""

import gc
import hmac
import http.client
import importlib.metadata
import importlib.util
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


def go_into_service() -> None:
    """LiteLLM calls this hook at its start, when all is loaded and its middleware is built."""
    leave_out_what_is_loaded()
    accept_previous_keys()


def leave_out_what_is_loaded() -> None:
    """Collect garbage from now on, but not among what was loaded: to look at all of it keeps every request waiting."""
    gc.freeze()
    gc.enable()


def accept_previous_keys() -> None:
    """Stand around LiteLLM's application."""
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
