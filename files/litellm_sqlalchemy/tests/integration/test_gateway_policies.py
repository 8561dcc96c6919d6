"""A gateway of two workers that keeps no content, no addresses and, where the log is full, takes no calls."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from support.cases import CASES, Case, differences, rows, said
from support.clients import Clients
from support.gateway import Gateway
from support.keys import OPAQUE_KEY, USER_KEY
from support.postgresql import Database, Server
from support.processes import Deployment, WriterProcess
from support.upstream import Upstream
from support.waiting import wait_until

#: Calls whose outcome depends on what the same worker has done before.
_OF_ONE_WORKER = ("rate-limited", "cache-hit", "cache-hit-stream")
#: What the policy is about; the other columns are those of any gateway.
_CONTENT = ("payload", "payload_encoding", "payload_digest", "payload_truncated", "error_message", "guardrails")
_POLICY = {"content_mode": "redacted", "client_address": None, "user_agent": None}
#: Calls of the key with the stricter policy, and those that have the strictest because nobody knows whose they are.
_STRICTER = (
    "opaque-key", "bad-key", "bad-opaque-key", "no-key", "bad-key-model-list", "bad-key-management", "bad-json",
    "compressed-pass-through", "no-object", "no-file", "over-budget",
)  # fmt: skip
_CALLS = [case for case in CASES if case.name not in _OF_ONE_WORKER]


#: A body of each API.
_BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"model": "ok", "messages": [{"role": "user", "content": "MARK"}]},
    "/v1/messages": {"model": "claude", "max_tokens": 9, "messages": [{"role": "user", "content": "MARK"}]},
    "/v1/responses": {"model": "ok", "input": "MARK"},
    "/v1/embeddings": {"model": "embedding", "input": "MARK"},
    "/pass": {"note": "MARK"},
}


def _post(gateway: Gateway, path: str, call_id: str) -> httpx.Response:
    body = json.dumps(_BODIES[path]).replace("MARK", call_id).encode()
    headers = {"authorization": f"Bearer {USER_KEY}", "x-litellm-call-id": call_id, "content-type": "application/json"}
    return httpx.post(gateway.url + path, content=body, headers=headers, timeout=30)


@pytest.fixture(scope="module")
def upstream() -> Iterator[Upstream]:
    """A provider of its own, which has not seen these prompts yet."""
    with Upstream() as result:
        yield result


@pytest.fixture(scope="module")
def database_of_policies(server: Server, template: str) -> Iterator[Database]:
    """The tables of this gateway."""
    result = server.create_database("policies", template)
    yield result
    result.drop()


@pytest.fixture(scope="module")
def deployment_of_policies(
    server: Server, database_of_policies: Database, tmp_path_factory: pytest.TempPathFactory
) -> Deployment:
    """Its settings."""
    deployment = Deployment.create(tmp_path_factory.mktemp("policies"), server, database_of_policies.name)
    content = {"mode": "redacted", "policies": {"keys": {"opaque": "metadata"}}}
    deployment.update(content={**content, "client_address": False, "user_agent": False, "event_timeout": 20})
    deployment.update(spool={"when_full": "refuse", "max_size": 800_000, "segment_size": 20_000})
    return deployment


@pytest.fixture(scope="module")
def writer_of_policies(deployment_of_policies: Deployment) -> Iterator[WriterProcess]:
    """Its writer."""
    process = WriterProcess(deployment_of_policies).start()
    yield process
    process.kill()


@pytest.fixture(scope="module")
def workers(
    writer_of_policies: WriterProcess, deployment_of_policies: Deployment, upstream: Upstream
) -> Iterator[Gateway]:
    """The gateway, serving."""
    directory = deployment_of_policies.directory / "litellm"
    result = Gateway(directory, upstream, deployment_of_policies, health_checks=True, workers=2).launch()
    try:
        yield result.wait()
    finally:
        result.kill()


@pytest.mark.parametrize("case", _CALLS, ids=lambda case: case.name)
def test_content_is_redacted(case: Case, workers: Gateway, database_of_policies: Database, upstream: Upstream) -> None:
    clients = Clients(workers.url, case.name, upstream)
    with clients.expecting_errors():
        case.call(clients)
    call_id = clients.told_call_id
    wait_until(lambda: rows(database_of_policies, call_id)[1], f"the response of {case.name} is stored")
    requests, responses = rows(database_of_policies, call_id)
    assert (len(requests), len(responses)) == (1, 1)
    request, response = case.expected()
    request |= _POLICY | ({"content_mode": "metadata"} if case.name in _STRICTER else {})
    for expected, row in ((request, requests[0]), (response, responses[0])):
        row["attempts"] = expected["attempts"] = None
        told = {name: value for name, value in row.items() if name in expected and name not in _CONTENT}
        assert differences(expected, told, clients) == []
    assert said(requests[0], responses[0]) == set()


def test_a_stricter_policy_of_a_key(workers: Gateway, database_of_policies: Database, upstream: Upstream) -> None:
    clients = Clients(workers.url, "stricter", upstream)
    clients.chat(key=OPAQUE_KEY)
    wait_until(lambda: rows(database_of_policies, "stricter")[1], "the response is stored")
    for [row] in rows(database_of_policies, "stricter"):
        assert row["payload"] is row["payload_encoding"] is None
        assert row["payload_size"] > 0
        assert len(row["payload_digest"]) == 32


def test_workers_share_a_spool(  # F42
    workers: Gateway, deployment_of_policies: Deployment, database_of_policies: Database
) -> None:
    sent: list[str] = []

    def both_have_worked() -> bool:
        """Make some calls; the second worker may serve later than the first, and the kernel chooses between them."""
        names = [f"worker-{number}" for number in range(len(sent), len(sent) + 200)]
        with ThreadPoolExecutor(16) as pool:
            calls = [pool.submit(_post, workers, "/v1/chat/completions", name) for name in names]
            assert {call.result().status_code for call in calls} == {200}
        sent.extend(names)
        return len(list((deployment_of_policies.spool / "producers").glob("[!.]*"))) == 2

    wait_until(both_have_worked, "each worker has a folder of its own", 120)
    stored = "SELECT call_id FROM requests JOIN responses ON request_id = id WHERE call_id LIKE 'worker-%'"
    wait_until(lambda: len(database_of_policies.query(stored)) >= len(sent), "all calls are stored")
    assert sorted(call for (call,) in database_of_policies.query(stored)) == sorted(sent)


def test_background_health_checks_are_told_from_other_calls(workers: Gateway, database_of_policies: Database) -> None:
    own = "SELECT origin, r.model, key_hash FROM requests r JOIN responses ON request_id = id WHERE origin <> 'client'"
    wait_until(lambda: database_of_policies.query(own), "a health check is stored")
    assert set(database_of_policies.query(own)) == {("health_check", "ok", None)}


def test_a_call_that_cannot_be_logged_is_refused(
    workers: Gateway, writer_of_policies: WriterProcess, database_of_policies: Database, upstream: Upstream
) -> None:
    """With `when_full: refuse`: before it costs anything, in the words of each API; what was accepted is logged."""
    writer_of_policies.kill()
    accepted = 0
    with ThreadPoolExecutor(8) as pool:
        for _ in range(80):
            codes = list(pool.map(lambda _: _post(workers, "/v1/chat/completions", "filling").status_code, range(20)))
            accepted += codes.count(200)
            if set(codes) == {503}:
                break
        else:
            pytest.fail("the cap is never reached")
    for path in _BODIES:
        answer = _post(workers, path, "refused")
        assert answer.status_code == 503, (path, answer.text)
        assert "the gateway's request log cannot take the call: the spool has reached `spool.max_size`" in answer.text
    assert not [one.path for one in upstream.received if b"refused" in one.body], "no provider was asked"
    writer_of_policies.start()
    wait_until(lambda: _post(workers, "/v1/messages", "again").status_code == 200, "calls are taken again")
    stored = (
        "SELECT count(*) FROM requests JOIN responses ON request_id = id "
        "WHERE call_id = 'filling' AND status = 'success'"
    )
    # a call whose outcome LiteLLM does not tell is written after `event_timeout`
    wait_until(lambda: database_of_policies.value(stored) == accepted, "what was accepted is stored")
