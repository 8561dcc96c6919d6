"""One request row and one response row for every kind of call, each column as it has to be."""

import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.cases import CASES, SAID, Case, Row, differences, rows, said, table
from support.clients import Clients
from support.gateway import Gateway
from support.postgresql import Database
from support.upstream import Upstream
from support.waiting import wait_until

DOCUMENT = Path(__file__).parents[4] / "docs" / "calls.md"
#: Columns that identify a row or say when it was made: checked by rules of their own.
_IDENTITY = ("id", "request_id", "created_at", "gateway", "call_id")


def check(case: Case, gateway: Gateway, database: Database, clients: Clients, began: float) -> None:
    """Compare the rows of a finished call with what the case expects."""
    call_id = clients.told_call_id
    wait_until(lambda: rows(database, call_id)[1], f"the response of {case.name} is stored")
    requests, responses = rows(database, call_id)
    assert (len(requests), len(responses)) == (1, 1)
    request, response = requests[0], responses[0]
    expected_request, expected_response = case.expected()
    problems = [f"requests.{line}" for line in differences(expected_request, _told(request), clients)]
    problems += [f"responses.{line}" for line in differences(expected_response, _told(response), clients)]
    assert not problems, "\n".join(problems)
    assert request["id"] == response["request_id"]
    assert request["gateway"] == f"test:{gateway.port}"
    began_at, ended_at = request["created_at"].timestamp(), response["created_at"].timestamp()
    assert began - 0.01 <= began_at <= ended_at <= time.time() + 0.01
    assert abs((uuid.UUID(str(request["id"])).int >> 80) / 1000 - began_at) < 0.05
    assert abs((ended_at - began_at) * 1000 - response["duration_ms"]) < 1


def _told(row: Row) -> Row:
    return {column: value for column, value in row.items() if column not in _IDENTITY}


@pytest.fixture(scope="module")
def made() -> list[Clients]:
    """Every call that the tests of this module have made."""
    return []


@pytest.fixture(scope="module", autouse=True)
def _print_table(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    capture = request.config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled():
        print(f"\n{table()}")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_call(
    case: Case, gateway: Gateway, gateway_database: Database, upstream: Upstream, made: list[Clients]
) -> None:
    clients = Clients(gateway.url, case.name, upstream)
    began = time.time()
    with clients.expecting_errors():
        case.call(clients)
    made += [*clients.earlier, clients]
    check(case, gateway, gateway_database, clients, began)


def test_a_wrong_column_is_noticed(
    gateway: Gateway, gateway_database: Database, upstream: Upstream, made: list[Clients]
) -> None:
    """The negative control: no column of a row can change without a difference."""
    clients = Clients(gateway.url, "control", upstream)
    clients.chat()
    made.append(clients)
    wait_until(lambda: rows(gateway_database, "control")[1], "the response is stored")
    found = rows(gateway_database, "control")
    for expected, row in zip(CASES[0].expected(), (_told(found[0][0]), _told(found[1][0])), strict=True):
        assert differences(expected, row, clients) == []
        assert [column for column in row if not differences(expected, {**row, column: b"other"}, clients)] == []


def test_what_was_said_is_found(gateway_database: Database, made: list[Clients]) -> None:
    """The control of the gateway that keeps no content: its search finds every word where content is kept."""
    found = [rows(gateway_database, clients.told_call_id) for clients in made]
    assert said(*(row for pair in found for kind in pair for row in kind)) == set(SAID)


def test_nothing_else_is_stored(gateway_database: Database, made: list[Clients]) -> None:
    first = min(clients.made_at for clients in made)
    stored = gateway_database.query("SELECT call_id FROM requests WHERE created_at >= to_timestamp(%s)", first - 0.01)
    assert sorted(call_id for (call_id,) in stored) == sorted(clients.told_call_id for clients in made)
    assert gateway_database.count("responses") == gateway_database.count("requests")


def test_document_is_current() -> None:
    assert table() in DOCUMENT.read_text(), f"{DOCUMENT} is out of date: put this in it\n{table()}"
