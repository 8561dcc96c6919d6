"""What the verbs that read the log print of values that clients chose."""

import csv
import io
from argparse import ArgumentTypeError, Namespace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from litellm_sqlalchemy import cli, reports
from litellm_sqlalchemy.dead_letters import Letter
from litellm_sqlalchemy.frames import Frame, Kind

_FORGED = "\x1b]0;pwned\x07\x1b[2J\nforged\trow\r\x9b1A\u202e"
_SHOWN = r"\x1b]0;pwned\x07\x1b[2J\nforged\trow\r\x9b1A\u202e"


@pytest.mark.parametrize(
    ("text", "keep", "shown"),
    [
        ("gpt-4o é 漢", "", "gpt-4o é 漢"),
        (_FORGED, "", _SHOWN),
        ("é\n\tb\r\x1b", "\n\t", "é\n\tb\\r\\x1b"),
        ("\ud800", "", r"\ud800"),
    ],
)
def test_printable(text: str, keep: str, shown: str) -> None:
    assert reports.printable(text, keep) == shown


def test_a_table_has_a_line_for_each_row(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"model": _FORGED, "tags": {"a": _FORGED}, "calls": 3}, {"model": None, "tags": None, "calls": -1}]
    reports._print(rows, Namespace(json=False, csv=False))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert _SHOWN in lines[1]
    assert all(line.isprintable() for line in lines)


def test_a_call_keeps_the_lines_of_its_payloads(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    row = {"model": _FORGED, "tags": [_FORGED], "headers": {"x": "\x9b"}, "request": "a\n\tb\x1b", "response": None}
    monkeypatch.setattr(reports.queries, "find_calls", lambda *_: [row])
    monkeypatch.setattr(reports, "_reader", lambda settings: io.StringIO())  # any context manager
    reports._call(None, Namespace(json=False, csv=False, identifier="x"))  # type: ignore[arg-type]
    model, tags, headers, first, second, _ = capsys.readouterr().out.splitlines()
    assert model.endswith(_SHOWN)
    assert tags.isprintable()
    assert headers.endswith(r'{"x": "\x9b"}')
    assert (first.split(), second) == (["request", "a"], "\tb\\x1b")


@pytest.mark.parametrize("cell", ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1"])
def test_csv_runs_no_formula(cell: str, capsys: pytest.CaptureFixture[str]) -> None:
    moment = datetime(2026, 3, 1, tzinfo=UTC)
    row = {"model": cell, "user": "a=b", "cost": -0.5, "calls": -1, "at": moment, "payload": {"a": cell}, "team": None}
    reports._print([row], Namespace(json=False, csv=True))
    _, (model, *others) = csv.reader(io.StringIO(capsys.readouterr().out, newline=""))
    assert model == f"'{cell}"
    assert others[:4] == ["a=b", "-0.5", "-1", str(moment)]
    assert others[4].startswith('{"a": ')


@pytest.mark.parametrize(("to_terminal", "shown"), [(True, _SHOWN), (False, _FORGED)])
def test_csv_commands_no_terminal_and_is_exact_elsewhere(
    to_terminal: bool, shown: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = io.StringIO(newline="")
    monkeypatch.setattr(output, "isatty", lambda: to_terminal)
    monkeypatch.setattr(reports.sys, "stdout", output)
    reports._print([{"model": _FORGED, "calls": 1}], Namespace(json=False, csv=True))
    assert list(csv.reader(io.StringIO(output.getvalue(), newline=""))) == [["model", "calls"], [shown, "1"]]


def test_reasons_of_dead_letters(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    letter = Letter("p\x1b-1", "re\x9bquest", "c", "p", _FORGED, Frame(Kind.REQUEST, 1, b"{}", b""))
    monkeypatch.setattr(cli, "read_letters", lambda directory, ids: [letter])
    settings: Any = Namespace(spool=Namespace(directory=None))
    cli._dead_letters(settings, Namespace(action="list", json=False, id=[]))
    assert capsys.readouterr().out == f"p\\x1b-1  re\\x9bquest  {_SHOWN}\n"


@pytest.mark.parametrize("value", ["0001-01-01", "9999-12-31T23:59:59", "9999999d", "99999999999999w", "1969-12-31"])
def test_a_moment_that_no_call_can_have(value: str) -> None:
    with pytest.raises(ArgumentTypeError, match=f"'{value}' is not in the years 1970 to 9998"):
        reports.moment(value)


@pytest.mark.parametrize(
    ("value", "moment"),
    [
        ("1970-01-01", datetime(1970, 1, 1, tzinfo=UTC)),
        ("9998-12-31T12:00", datetime(9998, 12, 31, 12, tzinfo=UTC)),
        ("2026-03-10T12:00:00+02:00", datetime(2026, 3, 10, 10, tzinfo=UTC)),
    ],
)
def test_a_moment_that_a_call_can_have(value: str, moment: datetime) -> None:
    assert reports.moment(value) == moment


@pytest.mark.parametrize(
    ("value", "ago"),
    [
        ("90m", timedelta(minutes=90)), ("24h", timedelta(hours=24)),
        ("0d", timedelta()), ("1d", timedelta()), ("7d", timedelta(days=6)), ("2w", timedelta(days=13)),
    ],
)  # fmt: skip
def test_a_time_ago(value: str, ago: timedelta) -> None:
    """Days and weeks are whole ones (UTC), today's included."""

    def then() -> datetime:
        now = datetime.now(UTC)
        return (now if value[-1] in "mh" else now.replace(hour=0, minute=0, second=0, microsecond=0)) - ago

    earliest = then()
    assert earliest <= reports.moment(value) <= then()
