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
    rows = [[key, words[seen["before"][key.split()[0]]], words[now]] for key, now in seen["broken"].items()]
    title = f"CIS PostgreSQL 17: {len(seen['before'])} items, broken in {len(rows)} ways"
    show(title, [["item", "deployed", "broken (or mended)"], *rows])
    return seen


def test_what_does_not_hold_has_an_exception_and_nothing_else_has(items: dict[str, dict[str, bool]]) -> None:
    assert {id_ for id_, holds in items["before"].items() if not holds} == EXCEPTED


def test_every_item_changes_its_colour_in_each_way(items: dict[str, dict[str, bool]]) -> None:
    assert len(items["before"]) >= 50
    assert {key.split()[0] for key in items["broken"]} == items["before"].keys() - {FIPS}
    assert [key for key, holds in items["broken"].items() if holds == items["before"][key.split()[0]]] == []


def test_all_is_as_before(items: dict[str, dict[str, bool]]) -> None:
    assert items["after"] == items["before"]
