"""The CIS benchmark: each item goes red when what it looks at is broken, and no exception is idle."""

import json
import tomllib
from pathlib import Path

import pytest
from conftest import PROJECT, Run, Show

PROGRAM = Path(__file__).with_name("broken_settings.py").read_text()
EXCEPTIONS = tomllib.loads((PROJECT / "roles/validation/files/cis-exceptions.toml").read_text())["exception"]
EXCEPTED = {one["id"] for one in EXCEPTIONS}
FIPS = "6.7"  # a Debian host cannot be put into FIPS mode


@pytest.fixture(scope="module")
def items(run: Run, show: Show) -> dict[str, dict[str, bool]]:
    seen: dict[str, dict[str, bool]] = json.loads(run("python3", "-", input=PROGRAM))
    words = {True: "holds", False: "red"}
    rows = [[id_, words[before], words[seen["broken"].get(id_, before)]] for id_, before in seen["before"].items()]
    show(f"CIS PostgreSQL 17: {len(rows)} items", [["item", "deployed", "broken (or mended)"], *rows])
    return seen


def test_what_does_not_hold_has_an_exception_and_nothing_else_has(items: dict[str, dict[str, bool]]) -> None:
    assert {id_ for id_, holds in items["before"].items() if not holds} == EXCEPTED


def test_every_item_changes_its_colour(items: dict[str, dict[str, bool]]) -> None:
    assert len(items["before"]) >= 50
    assert items["broken"].keys() == items["before"].keys() - {FIPS}
    assert [id_ for id_, holds in items["broken"].items() if holds == items["before"][id_]] == []


def test_all_is_as_before(items: dict[str, dict[str, bool]]) -> None:
    assert items["after"] == items["before"]
