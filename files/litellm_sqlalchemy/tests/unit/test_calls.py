"""A call, from what the observer and the hooks tell it to its records."""

import asyncio
import gzip
import hashlib
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import orjson
import pytest

from litellm_sqlalchemy.calls import Call, current_call
from litellm_sqlalchemy.events import event_of
from litellm_sqlalchemy.frames import Kind
from litellm_sqlalchemy.observer import CallObserver
from litellm_sqlalchemy.recorder import Body, Recorder
from litellm_sqlalchemy.settings import Settings
from litellm_sqlalchemy.spool import Counters
from litellm_sqlalchemy.values import number, real, text


class FakeProducer:
    """Keeps what it gets."""

    def __init__(self) -> None:
        self.records: list[tuple[Kind, dict[str, Any], bytes]] = []
        self.accepted: list[bool] = []
        self.skipped = 0
        self.full = False
        self.counters = Counters()

    def append(self, kind: Kind, metadata: bytes, payload: bytes = b"", *, accepted: bool = True) -> bool:
        self.accepted.append(accepted)
        if not self.full:
            self.records.append((kind, orjson.loads(metadata), payload))
        return not self.full

    def skip(self) -> None:
        self.skipped += 1

    async def synced(self) -> None:
        pass


def make_recorder(tmp_path: Path, **content: Any) -> tuple[Recorder, FakeProducer]:
    """Return a recorder whose records can be looked at."""
    settings = Settings.model_validate(
        {"database": {"host": "x"}, "spool": {"directory": tmp_path, "fsync": "never"}, "content": content}
    )
    producer = FakeProducer()
    return Recorder(settings, producer), producer  # type: ignore[arg-type]


def make_call(recorder: Recorder, request: bytes = b'{"model":"m"}', response: bytes = b'{"id":"1"}') -> Call:
    """Return a call that has ended well, of which LiteLLM has not told anything yet."""
    call = Call(recorder, "test:1")
    call.request.add(request)
    call.response.add(response)
    call.status_code = 200
    return call


def form(*parts: tuple[str, str], boundary: str = "x") -> bytes:
    """Return a form with files (multipart/form-data) of parts' headers and values."""
    head = f"--{boundary}\r\nContent-Disposition: form-data; "
    return "".join(f"{head}{headers}\r\n\r\n{value}\r\n" for headers, value in parts).encode() + (
        f"--{boundary}--\r\n".encode()
    )


def end(call: Call) -> None:
    """End the exchange."""
    call.ended_at = call.started + 0.25
    call.conclude()


async def wait_for(condition: Callable[[], bool]) -> None:
    """Return when a condition holds; fail after some seconds."""
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.005)


SUCCESS = {"status": "success", "litellm_call_id": "c", "id": "r", "cache_hit": None}
FAILURE = {"status": "failure", "litellm_call_id": "c", "id": "c", "error_information": {"error_class": "E"}}


def test_event_before_the_end(tmp_path: Path) -> None:
    recorder, producer = make_recorder(tmp_path)
    call = make_call(recorder)
    call.accept(None, {"model": "m", "litellm_call_id": "c"}, "acompletion")
    call.event = event_of(SUCCESS)
    call.conclude()
    assert [kind for kind, _, _ in producer.records] == [Kind.REQUEST]
    end(call)
    call.conclude()
    assert [kind for kind, _, _ in producer.records] == [Kind.REQUEST, Kind.RESPONSE]
    assert producer.records[1][1]["status"] == "success"
    assert producer.records[1][1]["duration_ms"] == 250.0


def test_end_before_the_event(tmp_path: Path) -> None:
    async def scenario() -> None:
        call = make_call(recorder)
        call.accept(None, {}, None)
        end(call)
        assert len(producer.records) == 1
        call.event = event_of(SUCCESS)
        call.conclude()

    recorder, producer = make_recorder(tmp_path)
    asyncio.run(scenario())
    assert [kind for kind, _, _ in producer.records] == [Kind.REQUEST, Kind.RESPONSE]


def test_an_event_that_never_comes(tmp_path: Path) -> None:
    async def scenario() -> None:
        call = make_call(recorder)
        call.accept(None, {}, None)
        end(call)
        await wait_for(lambda: call.done)

    recorder, producer = make_recorder(tmp_path, event_timeout=0.02)
    asyncio.run(scenario())
    assert [record[1].get("status") for record in producer.records] == [None, "success"]


def test_an_answer_that_is_told_after_the_call_has_failed(tmp_path: Path) -> None:
    """As when a guardrail refuses an answer: what it cost is told by LiteLLM's logging, which may come late."""

    async def scenario(event: dict[str, Any] | None) -> None:
        call = make_call(recorder)
        call.accept(None, {}, None)
        call.status_code, call.failed, call.error = 400, True, {"error_type": "HTTPException"}
        end(call)
        assert not call.done
        if event:
            call.event = event_of(event)
            call.conclude()
        await wait_for(lambda: call.done)

    recorder, producer = make_recorder(tmp_path)
    asyncio.run(scenario({**SUCCESS, "prompt_tokens": 7}))
    asyncio.run(scenario(None))
    told, untold = (metadata for kind, metadata, _ in producer.records if kind is Kind.RESPONSE)
    assert (told["status"], told["error_type"], told["prompt_tokens"]) == ("failure", "HTTPException", 7)
    assert (untold["status"], untold["error_type"]) == ("failure", "HTTPException")


def test_a_call_that_the_provider_failed_waits_for_nothing(tmp_path: Path) -> None:
    recorder, producer = make_recorder(tmp_path)
    call = make_call(recorder)
    call.accept(None, {}, None)
    call.attempts, call.status_code, call.failed = [{"ended_ms": 1.0}], 500, True
    end(call)
    assert producer.records[1][1]["status"] == "failure"


def test_what_was_told_before_the_call_was_accepted_is_of_another_one(tmp_path: Path) -> None:
    """A guardrail that asks a model before LiteLLM's last hook has seen the call."""
    recorder, producer = make_recorder(tmp_path)
    call = make_call(recorder)
    call.event = event_of({**SUCCESS, "prompt_tokens": 99, "model": "judge"})
    call.accept(None, {}, None)
    call.event = event_of(FAILURE)
    call.attempts, call.status_code = [{"ended_ms": 1.0}], 500
    end(call)
    metadata = producer.records[1][1]
    assert (metadata["status"], metadata["model"], metadata["prompt_tokens"]) == ("failure", None, None)


@pytest.mark.parametrize(
    "data",
    [
        {"metadata": {"tags": ["a"], "trace_id": "t"}},
        {"metadata": {"user_id": "of the client", "tags": ["b"]}, "litellm_metadata": {"tags": ["a"], "trace_id": "t"}},
    ],
    ids=["chat", "messages and responses"],
)
def test_metadata_is_that_of_litellm(tmp_path: Path, data: dict[str, Any]) -> None:
    recorder, producer = make_recorder(tmp_path)
    make_call(recorder).accept(None, data, None)
    assert (producer.records[0][1]["tags"], producer.records[0][1]["trace_id"]) == (["a"], "t")


def test_a_rejected_body_is_cut(tmp_path: Path) -> None:
    recorder, producer = make_recorder(tmp_path)
    body = b"x" * 20_000
    for accepted in (True, False):
        call = make_call(recorder, body)
        if accepted:
            call.accept(None, {}, None)
            call.event = event_of(SUCCESS)
        call.noticed = call.failed = True
        end(call)
    kept, cut = (record for record in producer.records if record[0] is Kind.REQUEST)
    assert (kept[2], len(cut[2])) == (body, 16 * 1024)
    assert (cut[1]["payload_truncated"], cut[1]["payload_digest"]) == (True, hashlib.sha256(body).hexdigest())


def test_a_guardrail_that_reports_much(tmp_path: Path) -> None:
    recorder, producer = make_recorder(tmp_path)
    call = make_call(recorder)
    call.accept(None, {}, None)
    report = {"guardrail_name": "pii", "guardrail_status": "passed", "guardrail_response": "x" * 100_000}
    call.event = event_of({**SUCCESS, "guardrail_information": report})
    end(call)
    assert producer.records[1][1]["guardrails"] == [{"guardrail_name": "pii", "guardrail_status": "passed"}]


def test_no_call(tmp_path: Path) -> None:
    recorder, producer = make_recorder(tmp_path)
    end(make_call(recorder))
    assert producer.records == []


def test_no_response_without_its_request(tmp_path: Path) -> None:
    recorder, producer = make_recorder(tmp_path)
    producer.full = True
    call = make_call(recorder)
    call.accept(None, {}, None)
    producer.full = False
    call.event = event_of(SUCCESS)
    end(call)
    assert (producer.records, producer.skipped) == ([], 1)


@pytest.mark.parametrize("count", [1, 20, 21, 57])
def test_a_flood_of_rejected_calls(tmp_path: Path, count: int) -> None:
    """The burst passes one by one; the rest shares rows, and all are counted soon after the last. So does the next."""

    async def scenario() -> None:
        for flood in (1, 2):
            for _ in range(count):
                call = make_call(recorder)
                call.noticed = call.failed = True
                end(call)
            await wait_for(lambda total=flood * count: sum(counted()) == total)
            recorder.rejections._at -= 3600  # an hour goes by

    def counted() -> list[int]:
        return [metadata["calls"] for kind, metadata, _ in producer.records if kind is Kind.REQUEST]

    recorder, producer = make_recorder(tmp_path, rejected_rate=2)
    asyncio.run(scenario())
    calls = counted()
    assert len(calls) == 2 * min(count, 21)
    assert len(producer.records) == 2 * len(calls)


@pytest.mark.parametrize("broken", ["describe", "_request_payload", "_response_metadata", "_response_payload"])
def test_a_defect_costs_no_call(tmp_path: Path, broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("broken by the test")

    recorder, producer = make_recorder(tmp_path)
    call = make_call(recorder)
    monkeypatch.setattr(Call, broken, fail)
    if broken == "describe":
        with pytest.raises(RuntimeError):
            call.accept(None, {}, None)  # the hook's guard counts it
    else:
        call.accept(None, {}, None)
    call.event = event_of(SUCCESS)
    end(call)
    assert [kind for kind, _, _ in producer.records] == [Kind.REQUEST, Kind.RESPONSE]
    assert producer.records[1][1]["status"] == "success"
    assert recorder.hooks.failures == (broken != "describe")


def test_metadata_of_no_known_type(tmp_path: Path) -> None:
    recorder, producer = make_recorder(tmp_path)
    call = make_call(recorder)
    call.accept(None, {}, None)
    call.event = event_of(
        {**SUCCESS, "response_cost": object(), "guardrail_information": [{"of": object(), 1: "\ud800"}]}
    )
    end(call)
    metadata = producer.records[1][1]
    assert (metadata["status"], metadata["cost"], recorder.hooks.failures) == ("success", None, 0)
    assert metadata["guardrails"][0]["1"] == "?"


@pytest.mark.parametrize(
    ("state", "status"),
    [
        ({}, "success"),
        ({"failed": True}, "failure"),
        ({"status_code": 500}, "failure"),
        ({"aborted": True}, "failure"),
        ({"interrupted": True}, "interrupted"),
        ({"disconnected": True, "failed": True}, "client_disconnected"),
        ({"event": {"status": "success", "error_code": "499", "columns": {"cache_hit": False}}}, "client_disconnected"),
    ],
)
def test_status(tmp_path: Path, state: dict[str, Any], status: str) -> None:
    recorder, producer = make_recorder(tmp_path)
    call = make_call(recorder)
    call.accept(None, {}, None)
    call.event = event_of(SUCCESS)
    for name, value in state.items():
        setattr(call, name, value)
    end(call)
    assert producer.records[1][1]["status"] == status


@pytest.mark.parametrize(("mode", "kept"), [("full", b"word"), ("redacted", b"[redacted]"), ("metadata", b"")])
def test_content_mode(tmp_path: Path, mode: str, kept: bytes) -> None:
    recorder, producer = make_recorder(tmp_path, mode=mode)
    body = b'{"content":"word"}'
    call = make_call(recorder, body, body)
    call.accept(None, {}, None)
    call.event = event_of(SUCCESS)
    end(call)
    for _, metadata, payload in producer.records:
        assert kept in payload
        assert mode == "full" or b"word" not in payload
        assert metadata["payload_size"] == len(body)
        assert metadata.get("payload_digest") == (None if mode == "full" else hashlib.sha256(body).hexdigest())
    assert producer.records[0][1]["content_mode"] == mode


POLICIES = {"keys": {"nightly": "full"}, "teams": {"legal": "metadata"}, "models": {"gpt-*": "redacted"}}


@pytest.mark.parametrize(
    ("alias", "team", "model", "mode"),
    [
        (None, None, "demo", "full"),
        (None, None, "gpt-5", "redacted"),
        (None, "legal", "gpt-5", "metadata"),
        ("nightly", "legal", "gpt-5", "full"),
    ],
)
def test_a_policy_holds_for_request_and_response(
    tmp_path: Path, alias: str | None, team: str | None, model: str, mode: str
) -> None:
    recorder, producer = make_recorder(tmp_path, policies=POLICIES)
    call = make_call(recorder, b'{"content":"word"}', b'{"content":"word"}')
    call.accept(SimpleNamespace(key_alias=alias, team_id=team), {"model": model}, None)
    call.event = event_of(SUCCESS)
    end(call)
    assert producer.records[0][1]["content_mode"] == mode
    assert [b"word" in payload for _, _, payload in producer.records] == [mode == "full"] * 2


@pytest.mark.parametrize("accepted", [True, False], ids=["LiteLLM's data is broken", "LiteLLM rejects the caller"])
def test_an_unknown_caller_has_the_strictest_policy(tmp_path: Path, accepted: bool) -> None:
    recorder, producer = make_recorder(tmp_path, policies=POLICIES)
    call = make_call(recorder)
    if accepted:
        with pytest.raises(AttributeError):
            call.accept(None, None, None)  # type: ignore[arg-type]
    else:
        call.describe(SimpleNamespace(key_alias="nightly"), {"model": "demo"}, None)
        call.noticed = call.failed = True
    call.event = event_of(SUCCESS if accepted else FAILURE)
    end(call)
    assert producer.records[0][1]["content_mode"] == "metadata"
    assert [payload for _, _, payload in producer.records] == [b"", b""]


@pytest.mark.parametrize("mode", ["full", "redacted", "metadata"])
def test_messages_that_may_quote_content_follow_the_mode(tmp_path: Path, mode: str) -> None:
    recorder, producer = make_recorder(tmp_path, mode=mode)
    call = make_call(recorder)
    call.accept(None, {}, None)
    found = [{"guardrail_name": "pii", "guardrail_status": "blocked", "guardrail_response": "saw word"}]
    call.event = event_of(FAILURE | {"guardrail_information": found})
    call.error = {"error_type": "E", "error_code": "400", "error_message": "cannot answer word"}
    call.attempts = [{"deployment": "d", "error_type": "E", "error_message": "word", "duration_ms": 1.0}]
    call.status_code, call.failed = 400, True
    end(call)
    _, metadata, _ = producer.records[1]
    assert (b"word" in orjson.dumps(metadata)) == (mode == "full")
    assert (metadata["error_type"], metadata["error_code"]) == ("E", "400")
    assert metadata["attempts"][0]["deployment"] == "d"
    assert metadata["guardrails"][0]["guardrail_name"] == "pii"


def test_a_compressed_answer_is_readable(tmp_path: Path) -> None:
    recorder, producer = make_recorder(tmp_path)
    call = make_call(recorder, response=gzip.compress(b'{"answer":1}'))
    call.content_encoding = b"gzip"
    call.accept(None, {}, None)
    call.event = event_of(SUCCESS)
    end(call)
    assert producer.records[1][2] == b'{"answer":1}'


@pytest.mark.parametrize(
    ("body", "kept"),
    [
        (gzip.compress(b'{"api_key":"hunter2"}'), b'{"api_key":"[redacted]"}'),
        (gzip.compress(b"q" * 5000), b"q" * 1000),
        (b"\x1f\x8bnone", b"\x1f\x8bnone"),
    ],
    ids=["a secret", "above the limit", "not compressed"],
)
def test_a_compressed_request_is_readable(tmp_path: Path, body: bytes, kept: bytes) -> None:
    """LiteLLM reads none, but a secret in it has to show."""
    recorder, producer = make_recorder(tmp_path, max_payload_size=1000)
    call = make_call(recorder, body)
    call.accept(None, {}, None)
    assert producer.records[0][2] == kept


def test_sizes_above_the_limit(tmp_path: Path) -> None:
    recorder, producer = make_recorder(tmp_path, max_payload_size=100)
    call = make_call(recorder, b"q" * 300, gzip.compress(b"r" * 5000))
    call.content_encoding = b"gzip"
    call.accept(None, {}, None)
    call.event = event_of(SUCCESS)
    end(call)
    assert [payload for _, _, payload in producer.records] == [b"q" * 100, b"r" * 100]
    assert [metadata["payload_truncated"] for _, metadata, _ in producer.records] == [True, True]
    assert producer.records[0][1]["payload_digest"] == hashlib.sha256(b"q" * 300).hexdigest()


@pytest.mark.parametrize("chunks", [[], [b"abc"], [b"ab", b"cd", b"ef"], [b"abcdef"]])
def test_body(chunks: list[bytes]) -> None:
    body = Body(3)
    for chunk in chunks:
        body.add(chunk)
    whole = b"".join(chunks)
    digest = hashlib.sha256(whole).hexdigest() if whole else None
    assert (body.content(), body.size, body.truncated) == (whole[:3], len(whole), len(whole) > 3)
    assert body.digest() == digest
    body.forget()
    assert (body.content(), body.size, body.digest()) == (b"", len(whole), digest)


def test_a_key_is_never_stored(tmp_path: Path) -> None:
    class Key:
        api_key = "plain-secret"

    recorder, producer = make_recorder(tmp_path)
    make_call(recorder).accept(Key(), {}, None)
    assert producer.records[0][1]["key_hash"] == hashlib.sha256(b"plain-secret").hexdigest()


def test_retry_then_success(tmp_path: Path) -> None:
    recorder, producer = make_recorder(tmp_path)
    call = make_call(recorder)
    call.accept(None, {}, None)
    call.attempts = [{"error_type": "E", "ended_ms": 1.0}]
    call.event = event_of(FAILURE)
    call.event = event_of(SUCCESS)
    end(call)
    metadata = producer.records[1][1]
    assert (metadata["status"], metadata["attempt_count"], metadata.get("error_type")) == ("success", 2, None)


@pytest.mark.parametrize(
    ("value", "kept"),
    [
        (3, 3),
        (2**40, 2**31 - 1),
        (-1, None),
        (3.0, 3),
        (float("nan"), None),
        (float("inf"), None),
        ("3", None),
        (None, None),
    ],
)
def test_number(value: object, kept: int | None) -> None:
    assert number(value) == kept


@pytest.mark.parametrize(
    ("value", "kept"), [(3, 3.0), (0.5, 0.5), (float("inf"), None), ("3", None), (object(), None), (None, None)]
)
def test_real(value: object, kept: float | None) -> None:
    assert real(value) == kept


@pytest.mark.parametrize(
    ("value", "kept"),
    [("", None), (None, None), ("a\0b", "a\ufffdb"), ("\ud800", "?"), ("x" * 600, "x" * 512), (5, "5")],
)
def test_text(value: object, kept: str | None) -> None:
    assert text(value) == kept


def exchange(
    tmp_path: Path, application: Any, incoming: list[dict[str, Any]], kind: str = "http", wait: float = 0
) -> tuple[list[Any], FakeProducer]:
    """Take an exchange through the observer; return what went out, and the records."""

    async def receive() -> dict[str, Any]:
        if not incoming:
            await asyncio.get_running_loop().create_future()  # the client waits for the answer
        return incoming.pop(0)

    async def send(message: Any) -> None:
        sent.append(message)

    async def scenario() -> None:
        scope = {"type": kind, "path": "/x", "headers": [], "client": ("192.0.2.1", 1)}
        scope |= {"method": "POST"} if kind == "http" else {}
        await CallObserver(application, recorder, "/x".__eq__)(scope, receive, send)
        await asyncio.sleep(wait)

    recorder, producer = make_recorder(tmp_path)
    sent: list[Any] = []
    asyncio.run(scenario())
    return sent, producer


def answering() -> Any:
    """Return an application that answers `ok` to the whole body."""

    async def application(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        call = current_call.get()
        assert call is not None
        call.accept(None, {}, None)
        call.event = event_of(SUCCESS)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"ok"})

    return application


def test_observer_changes_nothing(tmp_path: Path) -> None:
    sent, producer = exchange(tmp_path, answering(), [{"type": "http.request", "body": b"{}"}])
    assert sent == [
        {"type": "http.response.start", "status": 200, "headers": []},
        {"type": "http.response.body", "body": b"ok"},
    ]
    assert producer.records[1][1]["status"] == "success"
    hooks = producer.counters.hooks
    assert (hooks.calls, sum(hooks.counts), 0 < hooks.seconds < 60) == (1, 1, True)


@pytest.mark.parametrize(("root", "endpoint"), [("", "/api/v1/x"), ("/api", "/v1/x"), ("/other", "/api/v1/x")])
def test_the_endpoint_is_that_of_litellm(tmp_path: Path, root: str, endpoint: str) -> None:
    """Whatever path the gateway has in front of its own (`SERVER_ROOT_PATH`)."""
    recorder, producer = make_recorder(tmp_path)
    scope = {"type": "http", "path": "/api/v1/x", "root_path": root, "method": "POST", "headers": [], "client": None}
    incoming = iter([{"type": "http.request", "body": b"{}"}])

    async def receive() -> dict[str, Any]:
        return next(incoming)

    asyncio.run(CallObserver(answering(), recorder)(scope, receive, lambda message: asyncio.sleep(0)))  # type: ignore[arg-type]
    assert producer.records[0][1]["endpoint"] == endpoint


def test_a_client_gone_before_the_answer(tmp_path: Path) -> None:
    incoming: list[dict[str, Any]] = [{"type": "http.request", "body": b"{}"}, {"type": "http.disconnect"}]
    _, producer = exchange(tmp_path, answering(), incoming)
    assert producer.records[1][1]["status"] == "client_disconnected"
    assert producer.records[1][2] == b"ok"


def test_a_server_that_gives_up_on_an_exchange(tmp_path: Path) -> None:
    async def application(scope: Any, receive: Any, send: Any) -> None:
        call = current_call.get()
        assert call is not None
        call.accept(None, {}, None)
        raise asyncio.CancelledError

    recorder, producer = make_recorder(tmp_path)
    scope = {"type": "http", "path": "/x", "method": "POST", "headers": [], "client": None}
    with pytest.raises(asyncio.CancelledError):
        asyncio.run(CallObserver(application, recorder)(scope, None, None))  # type: ignore[arg-type]
    assert producer.records[1][1]["status"] == "interrupted"


def test_a_websocket_session_is_a_call(tmp_path: Path) -> None:
    async def application(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        call = current_call.get()
        assert call is not None
        call.accept(None, {"model": "realtime"}, "_arealtime")
        await send({"type": "websocket.accept"})
        assert (await receive())["text"] == '{"say":"a"}'
        await send({"type": "websocket.send", "text": '{"said":"a"}'})
        await send({"type": "websocket.send", "bytes": b'{"said":"b"}'})
        await receive()
        call.event = event_of(SUCCESS)

    incoming: list[dict[str, Any]] = [
        {"type": "websocket.connect"}, {"type": "websocket.receive", "text": '{"say":"a"}'},
        {"type": "websocket.disconnect", "code": 1000},
    ]  # fmt: skip
    sent, producer = exchange(tmp_path, application, incoming, "websocket")
    assert [message["type"] for message in sent] == ["websocket.accept", "websocket.send", "websocket.send"]
    (_, request, _), (_, response, answer) = producer.records
    assert (request["method"], request["endpoint"], request["model"]) == ("GET", "/x", "realtime")
    assert (response["status"], response["status_code"]) == ("success", 101)
    assert answer == b'{"say":"a"}\n{"said":"a"}\n{"said":"b"}\n'
    assert response["time_to_first_token_ms"] > 0


def test_a_websocket_session_that_is_refused(tmp_path: Path) -> None:
    async def application(scope: Any, receive: Any, send: Any) -> None:
        call = current_call.get()
        assert call is not None
        call.noticed = call.failed = True
        await send({"type": "websocket.close", "code": 1008})

    _, producer = exchange(tmp_path, application, [], "websocket")
    assert (producer.records[1][1]["status"], producer.records[1][1]["status_code"]) == ("failure", 403)


@pytest.mark.parametrize("is_told", [True, False], ids=["accepted", "of which no hook tells"])
@pytest.mark.parametrize(
    ("code", "gone", "status"),
    [
        (1011, False, "failure"), (1008, False, "failure"),
        (1000, False, "success"), (1001, False, "success"), (1011, True, "success"),
    ],
)  # fmt: skip
def test_a_websocket_session_that_litellm_closes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, gone: bool, status: str, is_told: bool
) -> None:
    """An error ends it with a code of its own; what is closed after the client has gone is not LiteLLM's decision."""
    monkeypatch.setattr("litellm_sqlalchemy.calls._LATE_HOOK", 0.01)

    async def application(scope: Any, receive: Any, send: Any) -> None:
        call = current_call.get()
        assert call is not None
        await send({"type": "websocket.accept"})
        if is_told:
            call.accept(None, {"model": "realtime"}, "_arealtime")
            call.event = event_of(SUCCESS)
        if gone:
            await receive()
        await send({"type": "websocket.close", "code": code, "reason": "no reason"})

    incoming = [{"type": "websocket.disconnect", "code": 1006}]
    _, producer = exchange(tmp_path, application, incoming if gone else [], "websocket", wait=0.05)
    told = [(metadata["status"], metadata.get("error_code"), metadata.get("error_message"))
            for kind, metadata, _ in producer.records if kind is Kind.RESPONSE]  # fmt: skip
    if status == "failure":
        assert told == [(status, str(code), "no reason")]
    else:
        assert told == ([(status, None, None)] if is_told else [])


@pytest.mark.parametrize("kind", [b"application/json", b"multipart/form-data"])
@pytest.mark.parametrize(("path", "kept"), [("/x", b'{"note":"word"}'), ("/key/generate", b"")])
def test_nothing_is_kept_of_what_is_refused_where_no_calls_go(
    tmp_path: Path, path: str, kept: bytes, kind: bytes
) -> None:
    """It may be a provider's key, or a password: what is known is that somebody had a wrong key."""
    body = b'{"note":"word"}'

    async def application(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        call = current_call.get()
        assert call is not None
        call.noticed = call.failed = True
        call.describe(None, {"proxy_server_request": {"body": {"note": "word"}}}, None)
        await send({"type": "http.response.start", "status": 401, "headers": []})
        await send({"type": "http.response.body", "body": b"{}"})

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body}

    recorder, producer = make_recorder(tmp_path)
    headers = [(b"content-type", kind)]
    scope = {"type": "http", "path": path, "method": "POST", "headers": headers, "client": None}
    observer = CallObserver(application, recorder, "/x".__eq__)
    asyncio.run(observer(scope, receive, lambda message: asyncio.sleep(0)))  # type: ignore[arg-type]
    (_, metadata, payload), (_, response, _) = producer.records
    assert (payload, metadata["payload_size"], response["status"]) == (kept, len(body), "failure")
    assert metadata.get("payload_digest") == (None if kept else hashlib.sha256(body).hexdigest())


@pytest.mark.parametrize(
    ("method", "path", "status", "is_told", "expected"),
    [
        ("POST", "/v1/calls", 400, False, [(None, "400")]),
        ("POST", "/v1/calls", 422, True, [("of the key", "the hook's")]),
        ("POST", "/v1/calls", 200, False, []),
        ("POST", "/v1/calls", 404, False, []),
        ("POST", "/v1/calls", 405, False, []),
        ("GET", "/v1/calls", 422, False, []),
        ("POST", "/v1/others", 422, False, []),
    ],
)
def test_what_is_refused_without_a_hook_is_a_call_where_calls_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, path: str, status: int, is_told: bool, expected: Any
) -> None:
    """A hook may come from a task of its own, behind the answer: it tells more."""
    monkeypatch.setattr("litellm_sqlalchemy.calls._LATE_HOOK", 0.02)

    async def application(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": status, "headers": []})
        await send({"type": "http.response.body", "body": b"{}"})

    async def run() -> None:
        scope = {"type": "http", "path": path, "method": method, "headers": [], "client": None}
        observer = CallObserver(application, recorder, lambda path: path == "/v1/calls")
        await observer(scope, None, lambda message: asyncio.sleep(0))  # type: ignore[arg-type]
        call = current_call.get()
        assert call is not None
        if is_told:
            call.noticed = call.failed = True
            call.describe(SimpleNamespace(key_alias="of the key"), {}, None)
            call.error = {"error_code": "the hook's"}
            call.conclude()
        await asyncio.sleep(0.1)  # nothing may come of it afterwards, either

    recorder, producer = make_recorder(tmp_path)
    asyncio.run(run())
    requests, responses = producer.records[::2], producer.records[1::2]
    assert [(request[1].get("key_alias"), response[1]["error_code"]) for request, response in zip(
        requests, responses, strict=True)] == expected  # fmt: skip
    assert {response[1]["status"] for response in responses} <= {"failure"}


@pytest.mark.parametrize("listed", [[], ["X-Request-Id", "x-note"]])
def test_only_listed_headers_are_kept(tmp_path: Path, listed: list[str]) -> None:
    recorder, producer = make_recorder(tmp_path, headers=listed)
    sent = [(b"x-request-id", b"17"), (b"authorization", b"Bearer of-a-secret-token"), (b"x-other", b"o")]
    sent.append((b"x-note", b"my key is sk-" + b"a1B2" * 8))

    async def application(scope: Any, receive: Any, send: Any) -> None:
        call = current_call.get()
        assert call is not None
        call.accept(None, {}, None)
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def run() -> None:
        scope = {"type": "http", "path": "/x", "method": "POST", "headers": sent, "client": ("192.0.2.1", 1)}
        await CallObserver(application, recorder)(scope, None, lambda message: asyncio.sleep(0))  # type: ignore[arg-type]

    asyncio.run(run())
    expected = {"x-request-id": "17", "x-note": "my key is [redacted]"} if listed else None
    assert producer.records[0][1]["headers"] == expected


def test_the_spool_is_told_whether_a_call_was_accepted(tmp_path: Path) -> None:
    recorder, producer = make_recorder(tmp_path)
    call = make_call(recorder)
    call.accept(None, {}, None)
    call.event = event_of(SUCCESS)
    end(call)
    call = make_call(recorder)
    call.noticed = call.failed = True
    end(call)
    assert producer.accepted == [True, True, False, False]


@pytest.mark.parametrize(
    ("body", "kept"),
    [
        (b"note=a+b%26c&password=hunter2", b'{"note":"a b&c","password":"[redacted]"}'),
        (b"list=1&list=2&empty=&alone", b'{"list":["1","2"],"empty":"","alone":""}'),
        (b"%ff=%00&%zz=\xff", b'{"\xef\xbf\xbd":"\\u0000","%zz":"\xef\xbf\xbd"}'),
        (b"", b""),
        (b'{"password":"hunter2&a=b"}', b'{"password":"[redacted]"}'),
    ],
)
def test_the_fields_of_a_form(tmp_path: Path, body: bytes, kept: bytes) -> None:
    """As JSON, so that credentials show by the names of their fields; `curl -d` calls everything such a form."""
    recorder, producer = make_recorder(tmp_path)
    call = make_call(recorder, body)
    call.content_type = b"Application/X-WWW-Form-Urlencoded; charset=utf-8"
    call.accept(None, {"litellm_logging_obj": object(), "password": "of LiteLLM"}, "pass_through_endpoint")
    _, metadata, payload = producer.records[0]
    assert payload == kept
    assert metadata.get("payload_digest") == (hashlib.sha256(body).hexdigest() if body else None)


@pytest.mark.parametrize("field", [b"a&", b"password=hunter2&", b"%41"])
def test_of_a_large_form_the_beginning_is_kept(tmp_path: Path, field: bytes) -> None:
    """To read a megabyte of fields would keep all other calls waiting."""
    recorder, producer = make_recorder(tmp_path)
    body = field * (1024 * 1024 // len(field))
    call = make_call(recorder, body)
    call.content_type = b"application/x-www-form-urlencoded"
    call.accept(None, {}, "pass_through_endpoint")
    _, metadata, payload = producer.records[0]
    assert metadata["payload_truncated"]
    assert metadata["payload_digest"] == hashlib.sha256(body).hexdigest()
    assert len(payload) < 4 * 64 * 1024
    assert b"hunter2" not in payload


def test_what_is_not_kept_of_a_form_is_not_searched(tmp_path: Path) -> None:
    """A form with files may have a hundred fields of a megabyte, each full of what looks like secrets."""
    recorder, producer = make_recorder(tmp_path)

    def seconds(count: int) -> float:
        fields = {f"field-{number}": "://a:b@c " * 100_000 for number in range(count)}
        call = make_call(recorder, form(*((f'name="{name}"', value) for name, value in fields.items())))
        call.content_type = b"multipart/form-data; boundary=x"
        started = time.thread_time()
        call.accept(None, {"proxy_server_request": {"body": fields}}, None)
        return time.thread_time() - started

    one = seconds(1)
    assert seconds(30) < 10 * one
    assert b"[redacted]" in producer.records[0][2]
    assert producer.records[1][1]["payload_truncated"]


@pytest.mark.parametrize(
    ("parts", "kept"),
    [
        ([('name="model"', "m"), ('name="file"; filename="a.wav"', "\0\r\nnoise"), ('name="note"', "a\r\n--xy")],
         {"model": "m", "note": "a\r\n--xy"}),
        ([('name="list"', "1"), ('name="list"', "2"), ('name="empty"', "")], {"list": ["1", "2"], "empty": ""}),
        ([("name=bare", "1"), ('NAME="upper"', "2"), ('name="file"; filename*=utf-8\'\'a', "3")],
         {"bare": "1", "upper": "2"}),
        ([('name="password"', "hunter2")], {"password": "[redacted]"}),
        ([('name="cut', "off")], {"cut": "off"}),
        ([('name="filename"', "a")], {"filename": "a"}),
        ([("no=name", "a"), ("x" * 2000 + '; name="far"', "a"), ('name="near"', "b")], {"near": "b"}),
    ],
)  # fmt: skip
def test_the_fields_of_a_form_with_files(tmp_path: Path, parts: Any, kept: dict[str, Any]) -> None:
    """As the client has sent them: LiteLLM does not read those of each form, and adds to others."""
    recorder, producer = make_recorder(tmp_path)
    body = form(*parts, boundary="x:y")
    call = make_call(recorder, body)
    call.content_type = b'Multipart/Form-Data; Boundary="x:y"; charset=utf-8'
    call.accept(None, {"model": "of LiteLLM", "proxy_server_request": {"body": {"provider": "of LiteLLM"}}}, None)
    _, metadata, payload = producer.records[0]
    assert orjson.loads(payload) == kept
    assert (metadata["payload_digest"], "payload_truncated" in metadata) == (hashlib.sha256(body).hexdigest(), False)


@pytest.mark.parametrize("kind", [b"multipart/form-data", b"multipart/form-data; boundary=other"])
@pytest.mark.parametrize(
    ("read", "kept"),
    [
        ({"proxy_server_request": {"body": {"note": "as LiteLLM reads it"}}}, b'{"note":"as LiteLLM reads it"}'),
        ({"proxy_server_request": {"body": "note"}}, b"{}"),
        ({"litellm_logging_obj": object()}, b"{}"),
    ],
)
def test_a_form_whose_parts_nobody_finds(tmp_path: Path, kind: bytes, read: dict[str, Any], kept: bytes) -> None:
    recorder, producer = make_recorder(tmp_path)
    call = make_call(recorder, form(('name="note"', "a")))
    call.content_type = kind
    call.accept(None, read, None)
    assert producer.records[0][2] == kept
    assert recorder.hooks.failures == 0


def test_of_a_form_that_is_not_kept_whole_litellm_knows_the_rest(tmp_path: Path) -> None:
    recorder, producer = make_recorder(tmp_path, max_payload_size=1000)
    call = make_call(
        recorder, form(('name="first"', "1"), ('name="file"; filename="a"', "x" * 2000), ('name="n"', "2"))
    )
    call.content_type = b"multipart/form-data; boundary=x"
    read = {"first": "read", "n": "2", "file": object(), "litellm_call_id": "of LiteLLM"}
    call.accept(None, {"proxy_server_request": {"body": read}}, None)
    assert orjson.loads(producer.records[0][2]) == {"first": "1", "n": "2"}


def test_of_many_parts_the_first_are_read(tmp_path: Path) -> None:
    recorder, producer = make_recorder(tmp_path)
    call = make_call(recorder, form(*((f'name="{number}"', "") for number in range(5000))))
    call.content_type = b"multipart/form-data; boundary=x"
    call.accept(None, {}, None)
    assert len(orjson.loads(producer.records[0][2])) == 999


@pytest.mark.parametrize(
    ("kind", "body", "kept"),
    [
        (b"audio/wav", b"RIFF\0noise", b""),
        (b"Application/Octet-Stream", b"noise", b""),
        (b"audio/wav", b' {"messages":[]}', b' {"messages":[]}'),
        (b"text/plain", b"words", b"words"),
    ],
)
def test_a_body_that_is_a_file_is_not_kept(tmp_path: Path, kind: bytes, body: bytes, kept: bytes) -> None:
    """LiteLLM takes JSON for what it is, whatever its type says: nobody keeps a call out of the log by that."""
    recorder, producer = make_recorder(tmp_path)
    call = make_call(recorder, body)
    call.content_type = kind
    call.accept(None, {}, None)
    _, metadata, payload = producer.records[0]
    assert (payload, metadata["payload_size"]) == (kept, len(body))
    assert metadata.get("payload_digest") == (None if kept else hashlib.sha256(body).hexdigest())


@pytest.mark.parametrize("mark", ["?token=word&q=word", "#word", "?#word"])
def test_no_query_string_is_kept(mark: str) -> None:
    """Of a pass-through call LiteLLM says the target with it."""
    columns = event_of({**SUCCESS, "api_base": f"https://example.net/pass{mark}"})["columns"]
    assert columns["api_base"] == "https://example.net/pass"


@pytest.mark.parametrize("kind", ["multipart/form-data; boundary=x", "application/x-www-form-urlencoded"])
def test_a_rejected_form_is_cut(tmp_path: Path, kind: str) -> None:
    recorder, producer = make_recorder(tmp_path)
    note = "x" * 50_000
    body = form(('name="note"', note)) if kind.startswith("multipart") else f"note={note}".encode()
    call = make_call(recorder, body)
    call.content_type = kind.encode()
    call.describe(None, {"note": note}, None)
    call.noticed = call.failed = True
    end(call)
    _, metadata, payload = producer.records[0]
    assert len(payload) < 16 * 1024 + 20
    assert (metadata["payload_truncated"], metadata["payload_digest"]) == (True, hashlib.sha256(body).hexdigest())


class Answer:
    """An answer of a deployment as LiteLLM hands it on."""

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens
        self._hidden_params = {"response_cost": tokens / 8}

    def model_dump(self) -> dict[str, Any]:
        details = {"cached_tokens": 1}
        return {"usage": {"prompt_tokens": self.tokens, "total_tokens": self.tokens, "prompt_tokens_details": details}}


def test_the_answers_of_several_models_add_up(tmp_path: Path) -> None:
    """LiteLLM tells of one; it hands on the same answer more than once, and in another form, where calls are nested."""
    recorder, producer = make_recorder(tmp_path)
    call = make_call(recorder)
    call.accept(None, {"litellm_call_id": "c"}, "acompletion")
    first, second = Answer(2), Answer(4)
    for answer, call_type in ((first, "acompletion"), (second, "aresponses"), (second, "acompletion")) * 2:
        call.take_answer(answer, call_type)
    call.event = event_of({**SUCCESS, "prompt_tokens": 4, "completion_tokens": 3, "response_cost": 0.5})
    end(call)
    metadata = producer.records[1][1]
    assert (metadata["prompt_tokens"], metadata["total_tokens"], metadata["cached_tokens"]) == (6, 6, 2)
    assert (metadata["cost"], metadata["attempt_count"]) == (0.75, 2)
    assert metadata["completion_tokens"] == 3, "what the answers do not tell is that of the event"


def test_one_answer_counts_once(tmp_path: Path) -> None:
    recorder, producer = make_recorder(tmp_path)
    call = make_call(recorder)
    call.accept(None, {"litellm_call_id": "c"}, "acompletion")
    call.take_answer(Answer(2), "acompletion")
    call.event = event_of({**SUCCESS, "prompt_tokens": 2, "response_cost": 0.25})
    end(call)
    metadata = producer.records[1][1]
    assert (metadata["prompt_tokens"], metadata["cost"], metadata["attempt_count"]) == (2, 0.25, 1)


@pytest.mark.parametrize(
    ("known", "count"),
    [
        ({}, 0),
        ({"streamed": True, "status_code": 200}, 1),
        ({"streamed": True, "status_code": 500}, 0),
        ({"status_code": 200}, 0),
        ({"answer": Answer(2), "attempts": [{}]}, 2),
        ({"event": event_of(FAILURE)}, 0),
        ({"event": event_of({**FAILURE, "api_base": "https://example.net"})}, 1),
        ({"event": event_of({**FAILURE, "api_base": "https://example.net"}), "attempts": [{}]}, 1),
    ],
)
def test_an_attempt_is_what_a_provider_was_asked(tmp_path: Path, known: dict[str, Any], count: int) -> None:
    """Of a call whose success nobody tells: the last attempt may be among those that have failed, or not."""
    recorder, producer = make_recorder(tmp_path)
    call = make_call(recorder)
    call.accept(None, {}, None)
    call.interrupted = True
    for name, value in known.items():
        setattr(call, name, value)
    end(call)
    assert producer.records[1][1]["attempt_count"] == count


@pytest.mark.parametrize(
    ("state", "event", "tokens"),
    [
        ({}, None, 7),
        ({}, FAILURE, 7),
        ({}, {**SUCCESS, "prompt_tokens": 9}, 9),
        ({"failed": True, "status_code": 500}, None, None),
    ],
    ids=["nothing", "a failed attempt", "the outcome", "the call has failed"],
)
def test_the_outcome_of_an_inner_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state: dict[str, Any], event: dict[str, Any] | None,
    tokens: int | None,
) -> None:  # fmt: skip
    """It stands for that of the call where LiteLLM tells none of a call that has succeeded."""

    async def scenario() -> None:
        call = make_call(recorder)
        call.accept(None, {}, "acompletion")
        call.inner = event_of({**SUCCESS, "litellm_call_id": "other", "prompt_tokens": 7})
        call.event = event_of(event) if event else call.event
        for name, value in state.items():
            setattr(call, name, value)
        end(call)
        await wait_for(lambda: call.done)

    monkeypatch.setattr("litellm_sqlalchemy.calls._LATE_EVENT", 0.02)
    recorder, producer = make_recorder(tmp_path, event_timeout=0.02)
    asyncio.run(scenario())
    metadata = producer.records[1][1]
    assert (metadata["status"], metadata.get("prompt_tokens")) == ("failure" if state else "success", tokens)


def test_the_last_outcome_that_comes_is_waited_for_shortly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of generateContent LiteLLM tells only that of the chat call that it makes of it."""

    async def scenario() -> None:
        call = make_call(recorder)
        call.accept(None, {}, "agenerate_content")
        end(call)
        call.inner = event_of({**SUCCESS, "prompt_tokens": 7})
        call.conclude()
        await wait_for(lambda: call.done)

    monkeypatch.setattr("litellm_sqlalchemy.calls._LATE_EVENT", 0.02)
    recorder, producer = make_recorder(tmp_path, event_timeout=60)
    asyncio.run(scenario())
    assert producer.records[1][1]["prompt_tokens"] == 7


@pytest.mark.parametrize(
    ("data", "call_id", "foreign"),
    [
        ({"litellm_call_id": "c"}, "c", False),
        ({"litellm_call_id": "c"}, "d", True),
        ({"litellm_call_id": "c"}, None, False),
        ({"litellm_logging_obj": SimpleNamespace(litellm_call_id="c")}, "d", True),
        ({}, "d", False),
    ],
)
def test_what_is_of_another_call(tmp_path: Path, data: dict[str, Any], call_id: str | None, foreign: bool) -> None:
    """Ids are compared where LiteLLM has told one: of a session that is passed through it tells none."""
    call = make_call(make_recorder(tmp_path)[0])
    call.call_id = "of the client"
    assert not call.is_foreign(call_id)
    call.accept(None, data, None)
    assert call.is_foreign(call_id) == foreign


@pytest.mark.parametrize("started", [None, 200])
def test_an_application_that_breaks(tmp_path: Path, started: int | None) -> None:
    """The server answers 500 in its place; where the answer had begun, it cuts the connection."""

    async def application(scope: Any, receive: Any, send: Any) -> None:
        call = current_call.get()
        assert call is not None
        call.accept(None, {}, None)
        call.attempts = [{"ended_ms": 1.0}]
        call.event = event_of(SUCCESS)
        if started:
            await send({"type": "http.response.start", "status": started, "headers": []})
        raise RuntimeError("broken by the test")

    recorder, producer = make_recorder(tmp_path)
    scope = {"type": "http", "path": "/x", "method": "POST", "headers": [], "client": None}
    with pytest.raises(RuntimeError, match="broken by the test"):
        asyncio.run(CallObserver(application, recorder)(scope, None, lambda message: asyncio.sleep(0)))  # type: ignore[arg-type]
    metadata = producer.records[1][1]
    assert (metadata["status"], metadata["status_code"]) == ("failure", started or 500)
