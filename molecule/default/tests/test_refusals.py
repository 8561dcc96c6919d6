"""What the database refuses: every case of refusals.py, run on the host, with its SQLSTATE or TLS error."""

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import Run, Show

Results = list[dict[str, Any]]
GROUPS = {"identity", "certificate", "login", "database", "socket", "superuser", "address", "limit", "statement"}
PROGRAM = Path(__file__).with_name("refusals.py").read_text()


@pytest.fixture(scope="module")
def results(run: Run, address: str, active: dict[str, str], secrets: dict[str, Any], show: Show) -> Results:
    passwords = {pair: secrets[f"vault_{pair}_password"] for pair in active}
    given = {"address": address, "active": active, "passwords": passwords}
    path = run("mktemp", "--suffix=.py").strip()
    run("tee", path, input=PROGRAM)
    found: Results = json.loads(run("python3", "-I", path, input=json.dumps(given)))
    run("rm", path)
    rows = [[("ok" if one["ok"] else "WRONG"), one["group"], one["case"][:90], one["got"][:70]] for one in found]
    show(f"Refusals ({len(found)})", [["", "group", "case", "SQLSTATE or error"], *rows])
    return found


def test_all_is_refused_as_it_should_be(results: Results) -> None:
    assert [one for one in results if not one["ok"]] == []


def test_there_is_a_case_of_every_kind(results: Results) -> None:
    assert {one["group"] for one in results} == GROUPS | {"control"}
    assert len(results) >= 200
