"""What a real gateway does with the request log under faults, and what the log relies on in LiteLLM."""

import json
import re
import signal
import statistics
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from faults.proxy import Toxics, fault_proxy
from support.cases import rows
from support.clients import Clients
from support.gateway import Gateway
from support.keys import MASTER_KEY, OPAQUE_KEY, PROVIDER_KEY, USER_KEY
from support.postgresql import Database, Server
from support.processes import Deployment, WriterProcess, resources_of
from support.upstream import COMPLETION_TOKENS, PROMPT_TOKENS, TEXT, Upstream
from support.waiting import wait_until
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

_CHAT = "/v1/chat/completions"


def _body(model: str = "ok", **more: Any) -> dict[str, Any]:
    return {"model": model, "messages": [{"role": "user", "content": "hello"}], **more}


def _outcomes(database: Database, call_id: str) -> list[tuple[Any, ...]]:
    return database.query(
        "SELECT status, status_code, attempt_count FROM requests JOIN responses ON request_id = id WHERE call_id = %s",
        call_id,
    )


def _rejected(url: str, count: int, call_id: str) -> None:
    """Make calls with a bad key, as fast as it goes."""

    def call(_: int) -> int:
        headers = {"authorization": "Bearer sk-flood", "x-litellm-call-id": call_id}
        return client.post(f"{url}{_CHAT}", json=_body(), headers=headers).status_code

    with httpx.Client(timeout=30) as client, ThreadPoolExecutor(8) as pool:
        assert set(pool.map(call, range(count))) == {401}


def _counted(database: Database, call_id: str) -> tuple[int, int, int]:
    """Return the rows of a flood, the calls that they stand for, and their responses."""
    rows = database.query(
        "SELECT count(*), coalesce(sum(calls), 0), count(request_id) FROM requests "
        "LEFT JOIN responses ON request_id = id WHERE call_id = %s",
        call_id,
    )
    return int(rows[0][0]), int(rows[0][1]), int(rows[0][2])


def test_a_refused_authorization_is_no_call(gateway: Gateway, gateway_database: Database, upstream: Upstream) -> None:
    """Its body is a credential, and LiteLLM counts its path among those of models."""
    before, after = (Clients(gateway.url, name, upstream) for name in ("oauth", "after-oauth"))
    form = {"grant_type": "authorization_code", "code": "of-a-client"}
    answer = before.http.post("/token", headers={"x-litellm-call-id": "oauth"}, data=form)
    assert answer.status_code >= 400
    assert answer.status_code not in (404, 405)
    after.post("/v1/chat/completions", b"[]")
    wait_until(lambda: _counted(gateway_database, "after-oauth")[2], "the next refused call is stored")
    assert _counted(gateway_database, "oauth") == (0, 0, 0)


def test_assumptions(gateway: Gateway) -> None:
    """LiteLLM's side of what the package relies on: when an upgrade changes it, look here first."""
    found = gateway.state("assumptions")
    assert found["stack"] == "CallObserver"
    assert "RequestLogger" in found["callbacks"]
    assert found["worker_context"] == "of this request"
    event = ["self", "kwargs", "response_obj", "start_time", "end_time"]
    assert found["hooks"] == {
        "async_pre_call_hook": ["self", "user_api_key_dict", "cache", "data", "call_type"],
        "async_log_success_event": event,
        "async_log_failure_event": event,
        "async_post_call_failure_hook": [
            "self", "request_data", "original_exception", "user_api_key_dict", "traceback_str"
        ],
        "async_post_call_success_deployment_hook": ["self", "request_data", "response", "call_type"],
        "async_post_call_failure_deployment_hook": [
            "self", "request_data", "exception", "call_type", "fallback_depth"
        ],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("broken", "model", "status"),
    [
        ("accept", "ok", 200),
        ("describe", "ok", 200),
        ("event_of", "ok", 200),
        ("_response_metadata", "ok", 200),
        ("_response_payload", "ok", 200),
        ("_note_start", "ok", 200),
        ("_error_of", "error-500", 500),
        ("_attempt_of", "error-500", 500),
    ],
)
def test_a_defect_of_the_log(  # F45
    gateway: Gateway, gateway_database: Database, upstream: Upstream, broken: str, model: str, status: int
) -> None:
    call_id = f"defect-{broken}"
    before = gateway.state()["failures"]
    headers = {"x-litellm-call-id": call_id, "authorization": f"Bearer {USER_KEY}"}
    usual = httpx.post(f"{gateway.url}{_CHAT}", json=_body(model), headers={**headers, "x-litellm-call-id": "usual"})
    answer = httpx.post(
        f"{gateway.url}{_CHAT}", json=_body(model), headers={**headers, "user-agent": f"break {broken}"}
    )
    assert (answer.status_code, answer.content) == (status, usual.content)
    wait_until(lambda: _outcomes(gateway_database, call_id), "the call is stored")
    outcomes = _outcomes(gateway_database, call_id)
    assert [outcome[0] for outcome in outcomes] == ["success" if status == 200 else "failure"]
    assert gateway.state()["failures"] > before


def test_health_check(gateway: Gateway, gateway_database: Database) -> None:
    def stored() -> list[tuple[Any, ...]]:
        return gateway_database.query(
            "SELECT origin, r.model, key_hash, client_address, status, s.model, attempt_count "
            "FROM requests r JOIN responses s ON request_id = id WHERE origin <> 'client'"
        )

    before = gateway_database.count("requests")
    answer = httpx.get(f"{gateway.url}/health?model=ok", headers={"authorization": f"Bearer {MASTER_KEY}"}, timeout=60)
    assert answer.json()["healthy_count"] == 1
    wait_until(stored, "the health check is stored")
    assert stored() == [("health_check", "ok", None, None, "success", "ok", 1)]
    assert gateway_database.count("requests") == before + 1


def test_a_realtime_session(gateway: Gateway, gateway_database: Database) -> None:
    """A WebSocket session is one call, with all that was said in it."""
    headers = {"authorization": f"Bearer {USER_KEY}", "x-litellm-call-id": "realtime"}
    url = gateway.url.replace("http", "ws") + "/v1/realtime?model=realtime"
    with connect(url, additional_headers=headers, user_agent_header="talker") as session:
        assert json.loads(session.recv())["type"] == "session.created"
        session.send(json.dumps({"type": "response.create"}))
        assert json.loads(session.recv())["type"] == "response.done"
    query = "SELECT * FROM requests q JOIN responses p ON request_id = q.id WHERE user_agent = 'talker'"
    wait_until(lambda: gateway_database.query(query), "the session is stored")
    requests, responses = rows(gateway_database, "realtime")
    assert (len(requests), len(responses)) == (1, 1)
    request, response = requests[0], responses[0]
    assert (request["origin"], request["endpoint"], request["model"]) == ("client", "/v1/realtime", "realtime")
    assert (request["key_alias"], request["payload"]) == ("alias-1", None)
    assert (response["status"], response["status_code"], response["model"]) == ("success", 101, "openai/gpt-realtime")
    assert (response["prompt_tokens"], response["completion_tokens"]) == (PROMPT_TOKENS, COMPLETION_TOKENS)
    said = [json.loads(line)["type"] for line in response["payload"].splitlines()]
    assert said == ["session.created", "response.create", "response.done"]
    assert TEXT in response["payload"]


@pytest.mark.parametrize(
    ("path", "code", "known"),
    [("/v1/responses?model=ok", "1011", ("ok", "alias-1")), ("/v1/responses", "1008", (None, None))],
    ids=["after LiteLLM has accepted it", "before"],
)
def test_a_session_that_litellm_breaks_off(
    gateway: Gateway, gateway_database: Database, path: str, code: str, known: tuple[Any, ...]
) -> None:
    """Nobody else tells of it: no hook fires, as the provider speaks no WebSocket, or the first message is none."""
    agent = f"broken off with {code}"
    kind = "response.create" if code == "1011" else "nonsense"
    headers = {"authorization": f"Bearer {USER_KEY}"}
    url = gateway.url.replace("http", "ws") + path
    with connect(url, additional_headers=headers, user_agent_header=agent) as session:
        session.send(json.dumps({"type": kind, "model": "ok", "input": "hello"}))
        with pytest.raises(ConnectionClosed):
            [session.recv() for _ in range(3)]
        assert str(session.close_code) == code
    query = (
        "SELECT q.model, key_alias, status, status_code, error_code, error_message "
        "FROM requests q JOIN responses ON request_id = q.id WHERE user_agent = %s"
    )
    wait_until(lambda: gateway_database.query(query, agent), "the session is stored")
    ((*found, reason),) = gateway_database.query(query, agent)
    assert tuple(found) == (*known, "failure", 101, code)
    assert reason


def test_a_flood_of_bad_keys(gateway: Gateway, gateway_database: Database) -> None:
    """A row each for a burst of 100, then for 10 a second; a few more stand for those that have none."""
    began = time.monotonic()
    _rejected(gateway.url, 300, "flood")
    wait_until(lambda: _counted(gateway_database, "flood")[1] == 300, "every rejected call is counted", timeout=5)
    rows, _, responses = _counted(gateway_database, "flood")
    assert rows == responses <= 100 + 10 * (time.monotonic() - began) + 10


def test_calls_leave_nothing_behind(gateway: Gateway, gateway_database: Database, upstream: Upstream) -> None:
    """Neither tasks nor file descriptors nor threads; idle connections to the provider are kept for a while."""
    idle = 8

    def held() -> tuple[int, ...]:
        assert gateway.process is not None
        return (gateway.state()["tasks"], *resources_of(gateway.process.pid))

    _mixed(gateway, gateway_database, 200, "warm-up")
    tasks, descriptors, _ = held()
    with ThreadPoolExecutor(20) as pool, upstream.holding():
        waiting = [pool.submit(Clients(gateway.url, f"open-{number}", upstream).chat, "held") for number in range(20)]
        for _ in waiting:
            upstream.wait_for_held()
        busy = held()
    for one in waiting:
        one.result()
    assert (busy[0] > tasks + idle, busy[1] > descriptors + idle) == (True, True), "calls that go on are seen"
    before = held()
    _mixed(gateway, gateway_database, 400, "more")
    wait_until(
        lambda: all(now <= then + idle for now, then in zip(held(), before, strict=True)), f"about what was: {before}"
    )


def _mixed(gateway: Gateway, database: Database, count: int, call_id: str) -> None:
    """Make calls that succeed, are streamed and fail; return when all are stored."""
    kinds = ((_body(), 200), (_body(stream=True), 200), (_body("error-500"), 500))

    def call(number: int) -> None:
        body, status = kinds[number % len(kinds)]
        headers = {"authorization": f"Bearer {USER_KEY}", "x-litellm-call-id": call_id}
        assert client.post(f"{gateway.url}{_CHAT}", json=body, headers=headers).status_code == status

    with httpx.Client(timeout=60) as client, ThreadPoolExecutor(8) as pool:
        list(pool.map(call, range(count)))
    wait_until(lambda: _counted(database, call_id) == (count, count, count), "every call is stored")


def test_database_down(gateway: Gateway, gateway_database: Database, upstream: Upstream, server: Server) -> None:
    server.stop("immediate")
    try:
        clients = Clients(gateway.url, "database-down", upstream)
        clients.chat()
        assert clients.response.status_code == 200
    finally:
        server.start()
    wait_until(lambda: _outcomes(gateway_database, "database-down"), "the call is stored")
    assert _outcomes(gateway_database, "database-down") == [("success", 200, 1)]


def test_a_slow_or_missing_database_adds_nothing(  # F07, F08
    gateway: Gateway, gateway_writer: WriterProcess, gateway_deployment: Deployment, gateway_database: Database,
    server: Server,
) -> None:  # fmt: skip
    """Rounds take turns, so that what else the machine does hits all states alike."""
    states = {
        "well": Toxics(),
        "2 s latency": Toxics(latency=2),
        "50 kB/s": Toxics(bandwidth=50_000, slice=700),
        "unreachable": Toxics(refuse=True),
    }
    seconds: dict[str, list[float]] = {state: [] for state in states}
    with fault_proxy(server.port) as proxy:
        _restart_on(gateway_writer, gateway_deployment, proxy.port)
        try:
            for _ in range(5):
                for state, toxics in states.items():
                    proxy.toxics = toxics
                    if toxics.refuse:
                        proxy.reset()
                    seconds[state] += _durations(gateway.url, 20, "patient")
        finally:
            _restart_on(gateway_writer, gateway_deployment, server.port)
    p95 = {state: statistics.quantiles(found, n=20)[18] for state, found in seconds.items()}
    print({state: f"{statistics.median(found) * 1000:.1f} ms, p95 {p95[state] * 1000:.1f} ms"
           for state, found in seconds.items()})  # fmt: skip
    bound = 2 * p95["well"] + 0.05
    assert max(p95.values()) < bound, "waiting for the database would take seconds"
    assert min(_durations(gateway.url, 3, "waiting", "delay accept")) > bound, "a log that waits is seen"
    calls = sum(map(len, seconds.values()))
    wait_until(lambda: _counted(gateway_database, "patient") == (calls, calls, calls), "every call is stored")


def _restart_on(writer: WriterProcess, deployment: Deployment, port: int) -> None:
    writer.kill()  # to stop, it would finish its transaction, which takes its time
    deployment.update(database={"port": port})
    writer.start()


def _durations(url: str, count: int, call_id: str, user_agent: str = "test") -> list[float]:
    """Make calls one after the other; return the seconds that each took."""
    headers = {"authorization": f"Bearer {USER_KEY}", "x-litellm-call-id": call_id, "user-agent": user_agent}
    result = []
    with httpx.Client(timeout=30) as client:
        for _ in range(count):
            started = time.perf_counter()
            assert client.post(f"{url}{_CHAT}", json=_body(), headers=headers).status_code == 200
            result.append(time.perf_counter() - started)
    return result


def test_no_secret_is_stored(
    gateway: Gateway, gateway_database: Database, gateway_directory: Path, upstream: Upstream
) -> None:
    secrets = [MASTER_KEY, PROVIDER_KEY, USER_KEY, OPAQUE_KEY, "sk-never-known", "never-known", "sk-own-one"]
    for key in secrets[:-1]:
        clients = Clients(gateway.url, f"secret-{secrets.index(key)}", upstream)
        with clients.expecting_errors():
            clients.chat(key=key, extra_body={"api_key": "sk-own-one"})
    for number in range(len(secrets) - 1):
        wait_until(lambda number=number: _outcomes(gateway_database, f"secret-{number}"), "the call is stored")  # type: ignore[misc]
    tables = ("requests", "responses")
    rows = "\n".join(row for table in tables for (row,) in gateway_database.query(f"SELECT t::text FROM {table} t"))
    assert [secret for secret in secrets if secret in rows] == []
    assert "secret-0" in rows, "the search finds what is there"
    files = [file for file in (gateway_directory / "spool").rglob("*") if file.is_file()]
    assert files
    content = b"".join(file.read_bytes() for file in files)
    assert [secret for secret in secrets if secret.encode() in content] == []
    assert b"secret-0" in content, "the search finds what is there"


@pytest.fixture(scope="module")
def bare_gateway(
    gateway: Gateway, gateway_deployment: Deployment, gateway_directory: Path, upstream: Upstream
) -> Iterator[Gateway]:
    """The same gateway without the request log."""
    result = Gateway(gateway_directory / "bare", upstream, gateway_deployment, with_log=False).launch()
    try:
        yield result.wait()
    finally:
        result.kill()


def _seen(
    gateway: Gateway, path: str, body: bytes, key: str, user_agent: str = "test"
) -> tuple[int, dict[str, str], str]:
    """Return status, headers and body of an answer, without what differs from call to call."""
    headers = {"authorization": f"Bearer {key}", "content-type": "application/json", "x-litellm-call-id": "same"}
    headers["user-agent"] = user_agent
    with httpx.Client(base_url=gateway.url, timeout=30) as client:
        answer = client.post(path, content=body, headers=headers)
    changing = re.compile(
        r"(llm_provider-)?date|x-litellm-(response-duration|overhead-duration|timing|callback-duration).*"
    )
    return (
        answer.status_code,
        {name: value for name, value in answer.headers.items() if not changing.fullmatch(name)},
        re.sub(r'"created":\s*\d+', '"created":0', answer.text.replace(str(gateway.port), "PORT")),
    )


def test_the_client_sees_no_difference(gateway: Gateway, bare_gateway: Gateway) -> None:
    for path, body, key in (
        (_CHAT, b'{"model":"ok","messages":[{"role":"user","content":"x"}]}', USER_KEY),
        (_CHAT, b'{"model":"ok","stream":true,"messages":[{"role":"user","content":"x"}]}', USER_KEY),
        (_CHAT, b'{"model":"error-500","messages":[{"role":"user","content":"x"}]}', USER_KEY),
        (_CHAT, b'{"model":"malformed","stream":true,"messages":[{"role":"user","content":"x"}]}', USER_KEY),
        (_CHAT, b'{"model":"unknown","messages":[]}', USER_KEY),
        (_CHAT, b'{"model":"ok","messages":[{"role":"user","content":"x"}]}', "sk-wrong"),
        (_CHAT, b"{no JSON", USER_KEY),
        ("/v1/embeddings", b'{"model":"embedding","input":"x"}', USER_KEY),
        ("/v1/messages", b'{"model":"claude","max_tokens":5,"messages":[{"role":"user","content":"x"}]}', USER_KEY),
        ("/v1/nowhere", b"{}", USER_KEY),
    ):
        with_log, without_log = (_seen(one, path, body, key) for one in (gateway, bare_gateway))
        assert dict(with_log[1].items() ^ without_log[1].items()) == {}, (path, body)
        assert with_log == without_log, (path, body)
    altered = _seen(gateway, "/v1/nowhere", b"{}", USER_KEY, "alter the answer")
    assert altered != _seen(bare_gateway, "/v1/nowhere", b"{}", USER_KEY), "a difference would be seen"


def test_no_spool_at_boot_then_killed_then_stopped(
    deployment: Deployment, database: Database, writer: WriterProcess, upstream: Upstream, server: Server,
    tmp_path: Path,
) -> None:  # fmt: skip
    """One gateway through its faults, because it takes its time to start."""
    spool = deployment.spool
    spool.rmdir()
    server.stop()  # F05
    gateway = Gateway(tmp_path / "litellm", upstream, deployment).launch()
    try:
        gateway.wait()
        server.start()
        without_spool = Clients(gateway.url, "without-spool", upstream)
        without_spool.chat()
        assert without_spool.response.status_code == 200
        wait_until(lambda: gateway.state()["dropped"] == 2, "both records of the call are counted as dropped")
        assert f"spool directory {spool} does not exist" in gateway.log.read_text()

        spool.mkdir()
        writer.start()
        wait_until(lambda: _recorded(gateway, upstream), "the spool is used", interval=0.2)
        wait_until(lambda: _outcomes(database, "with-spool"), "the call is stored")
        assert database.query("SELECT 1 FROM requests WHERE call_id = 'without-spool'") == []

        with upstream.holding(), ThreadPoolExecutor(1) as pool:  # F35
            clients = Clients(gateway.url, "killed", upstream)
            with clients.expecting_errors():
                waiting = pool.submit(clients.chat, "held")
                upstream.wait_for_held()
                wait_until(
                    lambda: database.query("SELECT 1 FROM requests WHERE call_id = 'killed'"), "the request is stored"
                )
                assert _outcomes(database, "killed") == []
                gateway.kill()
                waiting.result(30)
        wait_until(lambda: _outcomes(database, "killed"), "the call is told to be interrupted")
        assert _outcomes(database, "killed") == [("interrupted", None, 0)]

        gateway.launch().wait()
        _rejected(gateway.url, 250, "flood")
        assert gateway.process is not None
        gateway.process.send_signal(signal.SIGTERM)
        gateway.process.wait(40)
        wait_until(lambda: _counted(database, "flood")[1] == 250, "a stopped gateway has counted every rejected call")
    finally:
        gateway.kill()


def _recorded(gateway: Gateway, upstream: Upstream) -> bool:
    """Make a call; return whether it stands in the spool."""
    before = gateway.state()["dropped"]
    Clients(gateway.url, "with-spool", upstream).chat()
    return bool(gateway.state()["dropped"] == before)


def test_a_form_with_a_query_string(gateway: Gateway, gateway_database: Database) -> None:
    """To a pass-through target: the credentials in both go to it, and not into the log."""
    form = {"password": "hunter2-of-the-form", "note": ["a", "b"]}
    headers = {"authorization": f"Bearer {USER_KEY}"}
    url = f"{gateway.url}/pass?token=hunter2-of-the-query"
    call_id = httpx.post(url, data=form, headers=headers).headers["x-litellm-call-id"]
    wait_until(lambda: _outcomes(gateway_database, call_id), "the call is stored")
    ((request,), (response,)) = rows(gateway_database, call_id)
    assert request["payload"] == {"password": "[redacted]", "note": ["a", "b"]}
    assert response["api_base"] == f"{gateway.upstream.url}/pass"
    assert "hunter2" not in str({**request, **response})


@pytest.mark.parametrize("headers", [{}, {"x-litellm-call-id": "of-the-client"}], ids=["no id", "an id"])
def test_a_session_that_is_passed_through(
    gateway: Gateway, gateway_database: Database, headers: dict[str, str]
) -> None:
    """LiteLLM tells its outcome by an id that it has told nobody."""
    agent = f"passed through with {len(headers)}"
    headers = {"authorization": f"Bearer {USER_KEY}", **headers}
    url = gateway.url.replace("http", "ws") + "/test/session"
    with connect(url, additional_headers=headers, user_agent_header=agent) as session:
        assert json.loads(session.recv())["type"] == "session.created"
    query = (
        "SELECT status, status_code, call_type, api_base, attempt_count "
        "FROM requests JOIN responses ON request_id = id WHERE user_agent = %s"
    )
    wait_until(lambda: gateway_database.query(query, agent), "the session is stored")
    base = gateway.upstream.realtime_url.replace("http", "ws")
    assert gateway_database.query(query, agent) == [("success", 101, "pass_through_endpoint", base, 1)]
