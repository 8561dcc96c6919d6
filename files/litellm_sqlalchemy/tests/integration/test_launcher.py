"""What the role's launcher puts around LiteLLM, under the server that LiteLLM runs in."""

import asyncio
import importlib.util
import json
import socket
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from http.client import HTTPResponse
from pathlib import Path
from typing import Any
from urllib.error import HTTPError

import pytest
import uvicorn
from support.cases import rows
from support.clients import Clients
from support.gateway import Gateway
from support.keys import USER_KEY
from support.postgresql import Database
from support.processes import Deployment, WriterProcess
from support.upstream import Upstream
from support.waiting import wait_until
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

LAUNCHER = Path(__file__).parents[4] / "roles/litellm/files/launcher.py"
_PATIENCE = 2.0


def _load_launcher() -> Any:
    specification = importlib.util.spec_from_file_location("launcher", LAUNCHER)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@contextmanager
def _listening(application: Any) -> Iterator[int]:
    """Serve an application; yield the port."""
    server = uvicorn.Server(uvicorn.Config(application, port=0, log_level="critical"))
    thread = threading.Thread(target=server.run)
    thread.start()
    wait_until(lambda: server.started, "it listens")
    yield server.servers[0].sockets[0].getsockname()[1]
    server.should_exit = True
    thread.join(20)


class Served:
    """An application that says how large a body was, behind a limit of 4 MB."""

    def __init__(self) -> None:
        """Load the launcher."""
        self.launcher = _load_launcher()
        self.launcher.PATIENCE = _PATIENCE
        self.limit = self.launcher.LimitedBodies(_say_size, 4 * self.launcher.MEGABYTE)
        self.port = 0

    @contextmanager
    def sending(self, length: int | None, *parts: bytes, kind: str = "application/json") -> Iterator[socket.socket]:
        """Begin a request, chunked where no length is given."""
        how = f"Content-Type: {kind}\r\n"
        how += "Transfer-Encoding: chunked" if length is None else f"Content-Length: {length}"
        with socket.create_connection(("127.0.0.1", self.port), timeout=20) as connection:
            connection.sendall(f"POST / HTTP/1.1\r\nHost: test\r\n{how}\r\n\r\n".encode())
            for part in parts:
                connection.sendall(part if length is not None else b"%x\r\n%b\r\n" % (len(part), part))
            yield connection


async def _say_size(_scope: Any, receive: Any, send: Any) -> None:
    size, more = 0, True
    while more:
        message = await receive()
        size, more = size + len(message["body"]), message["more_body"]
    gone = asyncio.ensure_future(receive())  # as LiteLLM does, to see whether the client hangs up
    done, _ = await asyncio.wait([gone], timeout=2 * _PATIENCE if size == 1 else 0)
    assert not done, gone.result()
    gone.cancel()
    answer = str(size).encode()
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(answer))]})
    await send({"type": "http.response.body", "body": answer})


@pytest.fixture
def served() -> Iterator[Served]:
    result = Served()
    with _listening(result.limit) as result.port:
        yield result


def _answer(connection: socket.socket, *, closed: bool = False) -> tuple[int, str]:
    response = HTTPResponse(connection)
    response.begin()
    body = response.read().decode()
    if closed:
        assert connection.recv(1) == b"", "the server ends the connection"
    return response.status, body


MB = 1 << 20


@pytest.mark.parametrize("length", [4 * MB, None])
def test_bodies_that_stop_keep_others_out_for_a_while_only(served: Served, length: int | None) -> None:
    with ExitStack() as stack:
        stopped = [stack.enter_context(served.sending(length, bytes(4 * MB - 1))) for _ in range(4)]
        wait_until(lambda: served.limit.held == 4 * (4 * MB - 1), "as much as all may have has come")
        with served.sending(2 * MB, bytes(2 * MB)) as other:
            assert _answer(other)[0] == 503
        for connection in stopped:
            status, body = _answer(connection, closed=True)
            assert (status, json.loads(body)["error"]["code"]) == (408, "408")
            assert "256 KB have to come in" in body
    assert served.limit.held == 0
    with served.sending(2 * MB, bytes(2 * MB)) as other:
        assert _answer(other) == (200, str(2 * MB))


def test_many_bodies_that_are_not_large_take_no_more_than_one_that_is(served: Served) -> None:
    """Beyond what is for large bodies they get as much as one of those; then only small ones are taken."""
    with ExitStack() as stack:
        for _ in range(4):
            stack.enter_context(served.sending(4 * MB, bytes(4 * MB - 1)))
        wait_until(lambda: served.limit.held == 16 * MB - 4, "as much as all large ones may have has come")
        for _ in range(4):
            stack.enter_context(served.sending(2 * MB, bytes(MB)))
        wait_until(lambda: served.limit.held == 20 * MB - 4, "as much as one large body more")
        with served.sending(100_000, bytes(100_000)) as other:
            assert _answer(other)[0] == 503
        with served.sending(50_000, bytes(50_000)) as other:
            assert _answer(other) == (200, "50000")


def test_a_body_that_drips_is_given_up(served: Served) -> None:
    with served.sending(4 * MB) as connection:
        began = time.monotonic()
        while not _is_answered(connection, _PATIENCE / 20):
            connection.sendall(b"x")
            assert time.monotonic() < began + 10 * _PATIENCE
        assert _answer(connection, closed=True)[0] == 408


def test_a_slow_body_that_comes_on_is_taken(served: Served) -> None:
    served.launcher.PACE = 4
    with served.sending(40) as connection:
        for _ in range(40):
            assert not _is_answered(connection, _PATIENCE / 20)
            connection.sendall(b"x")
        assert _answer(connection) == (200, "40")


def test_an_answer_may_take_as_long_as_it_likes(served: Served) -> None:
    with served.sending(1, b"x") as connection:
        assert _answer(connection) == (200, "1")


def test_a_body_that_is_too_large_and_stops(served: Served) -> None:
    with served.sending(8 * MB, bytes(5 * MB)) as connection:
        assert _answer(connection, closed=True)[0] == 413


@pytest.mark.parametrize(
    ("kind", "body", "reason"),
    [
        ("application/json", b"[" + b"[]," * 500_000 + b"1]", "commas, braces and brackets"),
        ("text/plain", b" " * 100_000 + b'{"a":[' + b'"",' * 1_000_000 + b"1]}", "commas, braces and brackets"),
        ("application/json", b'{"text":"' + b"word, " * 500_000 + b'"}', ""),
        ("audio/wav", b"RIFF" + b"," * 2 * MB, ""),
        ("Application/X-WWW-Form-Urlencoded ; charset=utf-8", b"a=" + b"%" * MB, "The form is too large: 256 KB"),
        ("application/x-www-form-urlencoded\r\nContent-Type: application/json", b"%" * MB, "The form is too large"),
        ("application/x-www-form-urlencoded", b"a=" + b"%" * (MB // 8), ""),
        ("multipart/form-data; boundary=b", b"--b" + bytes(MB), ""),
    ],
)
@pytest.mark.parametrize("declared", [True, False])
def test_what_keeps_others_waiting_is_refused(
    served: Served, kind: str, body: bytes, reason: str, declared: bool
) -> None:
    with served.sending(len(body) if declared else None, body, kind=kind) as connection:
        connection.sendall(b"" if declared else b"0\r\n\r\n")
        status, said = _answer(connection, closed=bool(reason))
    assert status == (413 if reason else 200)
    assert reason in said if reason else said == str(len(body))


def test_a_larger_limit_takes_more_values() -> None:
    launcher = _load_launcher()
    for megabytes, most in ((1, 1_000_000), (100, 1_048_576), (200, 2_097_152)):
        limit = launcher.LimitedBodies(None, megabytes * MB)
        body = launcher.Body({"headers": []}, None)
        body.values = most
        assert limit.refusal(body) is None
        body.values += 1
        assert limit.refusal(body)[0] == 413


class Busy:
    """An application with work of its own for each part of a stream or session, until another call was answered."""

    def __init__(self) -> None:
        """Nothing is under way."""
        self.parts = 0
        self.under_way, self.other = threading.Event(), threading.Event()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Take part in the conversation; `/other` is the other call."""
        if scope["path"] == "/other":
            self.other.set()
            await _say_size(scope, receive, send)
            return
        is_session = scope["type"] == "websocket"
        await send({"type": "websocket.accept"} if is_session else {"type": "http.response.start", "status": 200})
        while self.parts < _PARTS and not self.other.is_set():
            if is_session:
                await receive()
            else:
                await send({"type": "http.response.body", "body": b"part", "more_body": True})
            time.sleep(0.0005)
            self.parts += 1
            if self.parts == _PARTS // 4:
                self.under_way.set()
        await send({"type": "websocket.close"} if is_session else {"type": "http.response.body", "body": b""})


_PARTS = 4000


@pytest.mark.parametrize("kind", ["stream", "session"])
def test_a_fast_stream_or_session_lets_other_calls_go_on(kind: str) -> None:
    busy = Busy()

    def talk() -> None:
        if kind == "stream":
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/stream", timeout=30) as answer:
                answer.read()
        else:
            with connect(f"ws://127.0.0.1:{port}/session", compression=None) as session, suppress(ConnectionClosed):
                for _ in range(_PARTS + 10):
                    session.send("part")

    with _listening(_load_launcher().FairTurns(busy)) as port:
        talking = threading.Thread(target=talk)
        talking.start()
        assert busy.under_way.wait(20)
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/other", timeout=30) as answer:
            assert answer.read() == b"0"
        talking.join(20)
    assert busy.parts < _PARTS, "the other call had to wait for all of it"


@pytest.fixture(scope="module")
def launched(
    gateway_writer: WriterProcess, gateway_deployment: Deployment, gateway_directory: Path, upstream: Upstream
) -> Iterator[Gateway]:
    """A gateway as on a host, but with less patience."""
    usual, launcher = LAUNCHER.read_text(), gateway_directory / "launcher.py"
    launcher.write_text(usual.replace("PATIENCE = 256 * 1024, 60\n", "PATIENCE = 256 * 1024, 1\n"))
    assert launcher.read_text() != usual
    result = Gateway(gateway_directory / "launched", upstream, gateway_deployment, launcher=launcher).launch()
    try:
        yield result.wait()
    finally:
        result.kill()


@pytest.mark.parametrize("key", [USER_KEY, "sk-unknown"])
@pytest.mark.parametrize(
    ("body", "length", "status"),
    [
        (b"", 100, 408),
        (b'{"model": "ok", "te', 100, 408),
        (b'{"model": "ok", "text": "' + b"x" * 2 * MB, 3 * MB, 408),
        (b'{"model": "ok", "list": [' + b"[]," * 600_000 + b"1]}", None, 413),
    ],
)
def test_a_body_that_is_refused_is_one_call(
    launched: Gateway, gateway_database: Database, upstream: Upstream,
    key: str, body: bytes, length: int | None, status: int,
) -> None:  # fmt: skip
    call_id, length = f"refused-{len(body)}-{key[:5]}", length or len(body)
    before = len(upstream.received)
    with socket.create_connection(("127.0.0.1", launched.port), timeout=20) as connection:
        headers = f"Content-Length: {length}\r\nAuthorization: Bearer {key}\r\nx-litellm-call-id: {call_id}"
        connection.sendall(f"POST /v1/chat/completions HTTP/1.1\r\nHost: test\r\n{headers}\r\n\r\n".encode() + body)
        assert _answer(connection, closed=True)[0] == status
    wait_until(lambda: rows(gateway_database, call_id)[1], "the call is stored")
    requests, responses = rows(gateway_database, call_id)
    assert (len(requests), len(responses)) == (1, 1)
    assert requests[0]["payload_size"] <= len(body)
    assert (responses[0]["status"], responses[0]["status_code"]) == ("failure", status)
    assert "/v1/chat/completions" not in {request.path for request in upstream.received[before:]}
    assert launched.state()["failures"] == 0


def test_first_calls_keep_no_others_waiting(tmp_path: Path, gateway_deployment: Deployment, upstream: Upstream) -> None:
    """What LiteLLM loads and builds when it is first needed is there before the gateway serves."""
    fresh = Gateway(tmp_path, upstream, gateway_deployment, with_log=False, launcher=LAUNCHER).launch()
    try:
        of_start = _cpu_ticks(fresh.wait())
        with pytest.raises(HTTPError, match="404"):
            urllib.request.urlopen(f"{fresh.url}/no/page", timeout=20)
        Clients(fresh.url, "first", upstream).chat()
        Clients(fresh.url, "first-stream", upstream).chat(stream=True)
        assert _cpu_ticks(fresh) - of_start < of_start / 8
    finally:
        fresh.kill()


def _cpu_ticks(gateway: Gateway) -> int:
    assert gateway.process is not None
    fields = Path(f"/proc/{gateway.process.pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])  # proc(5): utime and stime


def _is_answered(connection: socket.socket, within: float) -> bool:
    connection.settimeout(within)
    try:
        return bool(connection.recv(1, socket.MSG_PEEK))
    except TimeoutError:
        return False
    finally:
        connection.settimeout(20)
