"""The verbs that read the log: `calls`, `call`, `top`, `errors` and `usage`, as tables, JSON or CSV."""

import argparse
import csv
import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from datetime import UTC, datetime, timedelta
from operator import itemgetter
from typing import Any

from sqlalchemy import Connection

from litellm_sqlalchemy import queries
from litellm_sqlalchemy.database import connected
from litellm_sqlalchemy.errors import ExitCode, LogError, UsageError
from litellm_sqlalchemy.models import STATUSES
from litellm_sqlalchemy.queries import Row, Selection
from litellm_sqlalchemy.settings import Settings

AddVerb = Callable[[str, Callable[[Settings, argparse.Namespace], int], str], argparse.ArgumentParser]

_UNITS = {"m": "minutes", "h": "hours", "d": "days", "w": "weeks"}
_AGO = re.compile(r"(\d+)([mhdw])")
#: What a UUIDv7 can be made of, and what is an hour before or after it.
_YEARS = (1970, 9998)
#: Columns of `calls` that a table for people has room for.
_CALL_COLUMNS = (
    "created_at", "id", "status", "status_code", "model", "key_alias", "user_id", "total_tokens", "cost", "duration_ms"
)  # fmt: skip
_ORDERS = ("calls", "failures", "total_tokens", "cost")
#: Calls that `call` shows: a client may choose one id for any number of them, each with its payloads.
_MOST_CALLS = 100
#: Depth of a payload, and more: orjson, which says what is stored as JSON, takes 1,024 levels, and printed with an
#: indent each of them takes a call.
_RECURSION = 5000
#: Columns of `call` that may have several lines.
_PAYLOADS = ("request", "response")
_BREAKS = "\n\t"
#: Beginnings of a cell that spreadsheets run as a formula.
_FORMULAS = ("=", "+", "-", "@", "\t", "\r")


def add_verbs(add: AddVerb) -> None:
    """Add the verbs to the command."""
    calls = _with_selection(add("calls", _calls, "List the latest calls."), since=None)
    calls.add_argument("--last", type=_count, default=20, metavar="N", help="how many (default: %(default)s)")
    call = _with_csv(add("call", _call, "Show one call whole, by its id or LiteLLM's call id."))
    call.add_argument("identifier", metavar="ID", help="id, or x-litellm-call-id")
    top = _with_selection(add("top", _top, "Rank models, keys or users by what they use, with latencies."), since="24h")
    top.add_argument("--by", choices=sorted(queries.DIMENSIONS), default="model", help="default: %(default)s")
    top.add_argument("--order", choices=_ORDERS, default="calls", help="default: %(default)s")
    top.add_argument("--last", type=_count, default=20, metavar="N", help="how many (default: %(default)s)")
    _with_selection(add("errors", _errors, "Count failures by model, error type and code."), since="24h")
    usage = _with_selection(add("usage", _usage, "Sum up calls, failures, tokens and cost."), since="7d")
    usage.add_argument("--by", type=_dimensions, default=["day"], metavar="A,B", help="e.g. day,model (default: day)")


def _with_csv(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    parser.add_argument("--csv", action="store_true", help="print CSV")
    return parser


def _with_selection(parser: argparse.ArgumentParser, since: str | None) -> argparse.ArgumentParser:
    time = "24h, 7d (whole days) or ISO time"
    default = f" (default: {since})" if since else ""
    parser.add_argument("--since", type=moment, default=since, metavar="TIME", help=f"{time}{default}")
    parser.add_argument("--until", type=moment, metavar="TIME", help=f"{time} (default: now)")
    for name, what in (("model", "asked for"), ("user", "id"), ("team", "id")):
        parser.add_argument(f"--{name}", metavar=name.upper(), help=f"only this {name} {what}")
    parser.add_argument("--key", type=_key, metavar="KEY", help="only this key's alias or hash")
    statuses = ("running", *STATUSES)
    parser.add_argument("--status", choices=statuses, metavar="STATUS", help=f"only {', '.join(statuses)}")
    return _with_csv(parser)


def moment(value: str) -> datetime:
    """Return the moment that `24h` ago, `7d` or an ISO date or time means; times without an offset are UTC.

    Days and weeks are whole ones (UTC), today's included: `1d` is since midnight.
    """
    try:
        result = _ago(int(match[1]), match[2]) if (match := _AGO.fullmatch(value)) else datetime.fromisoformat(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{value!r} is neither like 24h or 7d nor an ISO date or time") from None
    except OverflowError:
        result = datetime.min
    if not _YEARS[0] <= result.year <= _YEARS[1]:
        raise argparse.ArgumentTypeError(f"{value!r} is not in the years {_YEARS[0]} to {_YEARS[1]}")
    return result if result.tzinfo else result.replace(tzinfo=UTC)


def _ago(count: int, unit: str) -> datetime:
    """Raise OverflowError where no date is that far away."""
    now, ago = datetime.now(UTC), timedelta(**{_UNITS[unit]: count})
    if unit in "mh":
        return now - ago
    return now.replace(hour=0, minute=0, second=0, microsecond=0) - max(ago - timedelta(days=1), timedelta())


def _key(value: str) -> str:
    if value.startswith("sk-"):  # not told again: it is a secret
        raise argparse.ArgumentTypeError("this is a key itself: give its alias or its hash")
    return value


def _count(value: str) -> int:
    if not value.isdecimal() or not int(value):
        raise argparse.ArgumentTypeError(f"{value!r} is no number from 1 on")
    return min(int(value), sys.maxsize)  # as much as LIMIT takes


def _dimensions(value: str) -> list[str]:
    names = list(dict.fromkeys(value.split(",")))
    if unknown := [name for name in names if name not in queries.DIMENSIONS]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(sorted(queries.DIMENSIONS))}")
    return names


@contextmanager
def _selected(settings: Settings, options: argparse.Namespace) -> Iterator[tuple[Connection, Selection]]:
    """Yield a reader's connection and what is selected."""
    since, until = options.since, options.until
    if since and until and since >= until:
        times = f"--since {since.isoformat(timespec='seconds')} --until {until.isoformat(timespec='seconds')}"
        raise UsageError(f"{times} selects nothing: the first has to be the earlier one")
    with _reader(settings) as connection:
        keys = queries.keys_named(connection, options.key) if options.key else None
        yield connection, Selection(since, until, options.model, keys, options.user, options.team, options.status)


def _calls(settings: Settings, options: argparse.Namespace) -> int:
    with _selected(settings, options) as (connection, selection):
        rows = queries.last_calls(connection, selection, options.last)
    _print(rows, options, rows.columns, _CALL_COLUMNS)
    return ExitCode.OK


def _call(settings: Settings, options: argparse.Namespace) -> int:
    sys.setrecursionlimit(_RECURSION)
    with _reader(settings) as connection:
        rows = queries.find_calls(connection, options.identifier, _MOST_CALLS + 1)
    if len(rows) > _MOST_CALLS:
        rows.pop()
        what = f"more than {_MOST_CALLS} calls have this LiteLLM call id: the latest are shown"
        print(f"{what}, `litellm-sqlalchemy calls` lists the ids of others", file=sys.stderr)
    if not rows:
        raise LogError(
            f"no call has the id or LiteLLM call id {options.identifier!r:.80}: see `litellm-sqlalchemy calls`"
        )
    if options.json or options.csv:
        _print(rows, options)
        return ExitCode.OK
    for row in rows:
        width = max(map(len, row))
        for name, value in row.items():
            if value is not None:
                print(f"{name:<{width}}  {printable(_text(value), keep=_BREAKS if name in _PAYLOADS else '')}")
        print()
    return ExitCode.OK


def _top(settings: Settings, options: argparse.Namespace) -> int:
    with _selected(settings, options) as (connection, selection):
        totals = queries.totals(connection, [options.by], selection)
        latencies = {row[options.by]: row for row in queries.latencies(connection, [options.by], selection)}
    best = sorted(totals, key=itemgetter(options.order), reverse=True)[: options.last]
    none = dict.fromkeys(queries.PERCENTILE_COLUMNS)
    rows = [
        {**row, **{name: latencies.get(row[options.by], none)[name] for name in queries.PERCENTILE_COLUMNS}}
        for row in best
    ]
    _print(rows, options, [*totals.columns, *queries.PERCENTILE_COLUMNS])
    return ExitCode.OK


def _usage(settings: Settings, options: argparse.Namespace) -> int:
    with _selected(settings, options) as (connection, selection):
        rows = queries.totals(connection, options.by, selection)
    _print(rows, options, rows.columns)
    return ExitCode.OK


def _errors(settings: Settings, options: argparse.Namespace) -> int:
    with _selected(settings, options) as (connection, selection):
        rows = queries.errors(connection, selection)
    _print(rows, options, rows.columns)
    return ExitCode.OK


def _reader(settings: Settings) -> AbstractContextManager[Connection]:
    return connected(settings.database, "reader", "reader")


def _print(
    rows: Sequence[Row], options: argparse.Namespace, columns: Sequence[str] = (), shown: Sequence[str] = ()
) -> None:
    """Print rows, of which there has to be one where `columns` does not name theirs; people see those in `shown`."""
    columns = columns or list(rows[0])
    if options.json:
        json.dump(rows, sys.stdout, indent=2, default=str)
        print()
    elif options.csv:
        writer = csv.writer(sys.stdout)
        writer.writerow(columns)
        as_shown = printable if sys.stdout.isatty() else str  # programs get every character
        writer.writerows([as_shown(_cell(value)) for value in row.values()] for row in rows)
    else:
        names = list(shown or columns)
        _print_table([[row[name] for name in names] for row in rows], names)


def _print_table(rows: list[list[Any]], names: list[str]) -> None:
    if not rows:
        print("no calls")
        return
    cells = [names, *([_short(value) for value in row] for row in rows)]
    widths = [max(len(line[index]) for line in cells) for index in range(len(names))]
    right = [all(isinstance(row[index], int | float | None) for row in rows) for index in range(len(names))]
    for line in cells:
        parts = (
            cell.rjust(width) if to_right else cell.ljust(width)
            for cell, width, to_right in zip(line, widths, right, strict=True)
        )
        print("  ".join(parts).rstrip())


def _short(value: Any) -> str:
    """Return a value as a table for people shows it: times to the second, numbers to four digits."""
    if isinstance(value, datetime):
        return value.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S")
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:.0f}"
    return "-" if value is None else printable(str(value))


def _cell(value: Any) -> str:
    """Return a value as CSV has it: clients choose texts, and a spreadsheet shall not run them."""
    return f"'{value}" if isinstance(value, str) and value.startswith(_FORMULAS) else _text(value)


def printable(text: str, keep: str = "") -> str:
    """Return a text that a terminal only shows: clients choose what is logged, escape sequences too."""
    if text.isprintable():
        return text
    shown = (
        character if character.isprintable() or character in keep else character.encode("unicode_escape").decode()
        for character in text
    )
    return "".join(shown)


def _text(value: Any) -> str:
    if value is None:
        return ""
    return json.dumps(value, ensure_ascii=False) if isinstance(value, dict | list) else str(value)
