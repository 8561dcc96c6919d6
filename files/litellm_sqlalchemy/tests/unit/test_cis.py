"""Exceptions from the CIS benchmark: what a file may say, and what becomes of an item that has one."""

import datetime
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from litellm_sqlalchemy import cis, validate

TODAY = datetime.date(2026, 11, 30)
GOOD = '[[exception]]\nid = "6.7"\nreason = "no FIPS host"\nexpires = 2026-11-30\n'


def items(*ids: str) -> list[cis.Item]:
    """Return items that do not ask a server: 1.3 holds, others do not."""
    return [cis.Item(id_, "Title", "mend it", lambda server, id_=id_: (id_ == "1.3", f"seen {id_}")) for id_ in ids]


def findings(monkeypatch: pytest.MonkeyPatch, text: str, today: datetime.date) -> dict[str, cis.Finding]:
    exceptions = cis.read_exceptions(text)
    monkeypatch.setattr(cis, "ITEMS", items("1.3", "6.7"))
    return {one.id: one for one in cis.look(None, exceptions, today)}  # type: ignore[arg-type]


def test_without_an_exception_an_item_that_does_not_hold_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    found = findings(monkeypatch, "", TODAY)
    assert (found["1.3"].ok, found["1.3"].remedy) == (True, "")
    assert (found["6.7"].ok, found["6.7"].seen, found["6.7"].remedy) == (False, "seen 6.7", "mend it")


def test_an_exception_counts_on_its_last_day_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    found = findings(monkeypatch, GOOD, TODAY)["6.7"]
    assert (found.ok, found.exception) == (True, "until 2026-11-30: no FIPS host")


def test_an_exception_that_has_ended_counts_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    found = findings(monkeypatch, GOOD, TODAY + datetime.timedelta(days=1))["6.7"]
    assert not found.ok
    assert found.seen == "seen 6.7; its exception ended on 2026-11-30"


def test_an_item_that_holds_needs_no_exception(monkeypatch: pytest.MonkeyPatch) -> None:
    found = findings(monkeypatch, GOOD.replace("6.7", "1.3"), TODAY)["1.3"]
    assert (found.ok, found.exception) == (True, "")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (GOOD.replace("6.7", "9.9"), "no item that is checked"),
        (GOOD.replace("no FIPS host", ""), "6.7 needs a reason and a day"),
        (GOOD.replace("2026-11-30", '"some day"'), "6.7 needs a reason and a day"),
        (GOOD.replace("expires = 2026-11-30", ""), "6.7 needs a reason and a day"),
        ("[[exception", "Expected"),
    ],
)
def test_a_wrong_file_is_refused_with_what_is_wrong(text: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        cis.read_exceptions(text)


def test_every_item_has_an_id_of_its_own_and_says_what_to_do() -> None:
    assert len({one.id for one in cis.ITEMS}) == len(cis.ITEMS) >= 50
    assert all(one.title and one.fix for one in cis.ITEMS)


def test_an_item_that_cannot_be_seen_fails_and_the_others_are_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TLS is off and has no key."""
    server: Any = Namespace(data=tmp_path, settings={"ssl": "off", "ssl_key_file": "server.key"})
    tls = next(one for one in cis.ITEMS if one.id == "6.8")
    monkeypatch.setattr(cis, "ITEMS", [tls, *items("1.3")])
    missing, holds = cis.look(server, {}, TODAY)
    assert (missing.ok, missing.remedy, holds.ok) == (False, tls.fix, True)
    assert missing.seen == f"cannot be seen: [Errno 2] No such file or directory: '{tmp_path}/server.key'"


def test_both_reports_ask_for_the_same_server() -> None:
    """`cis.py` is sent to hosts alone, so that each has its own."""
    assert cis.MINIMUM_SERVER_VERSION == validate.MINIMUM_SERVER_VERSION
