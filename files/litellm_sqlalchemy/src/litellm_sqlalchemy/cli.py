"""The command `litellm-sqlalchemy`."""

import argparse
import contextlib
import io
import json
import logging
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from litellm_sqlalchemy import __version__, validate
from litellm_sqlalchemy.dead_letters import read_letters, requeue
from litellm_sqlalchemy.erase import erase
from litellm_sqlalchemy.errors import ExitCode, LogError, UsageError
from litellm_sqlalchemy.migrate import migrate
from litellm_sqlalchemy.prune import prune
from litellm_sqlalchemy.replay import replay
from litellm_sqlalchemy.reports import add_verbs, moment, printable
from litellm_sqlalchemy.retention import removed_until
from litellm_sqlalchemy.settings import SETTINGS_VARIABLE, LoggingSettings, Settings, as_mapping, load_settings
from litellm_sqlalchemy.status import Known, acknowledge, read_known, spool_status, tables_status
from litellm_sqlalchemy.users import as_owner
from litellm_sqlalchemy.writer import run_writer

_EXIT_CODES = "exit codes: " + ", ".join(f"{code.value} {code.name.lower()}" for code in ExitCode)


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    try:
        try:
            return _run(arguments)
        finally:
            print(end="", flush=True)  # not at Python's end, where what is wrong with it would be told in Python's way
    except LogError as error:
        print(f"litellm-sqlalchemy: {printable(str(error))}", file=sys.stderr)
        return int(error.exit_code)
    except OSError as error:
        with contextlib.suppress(OSError):  # Python flushes once more at its end
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):  # who reads has seen enough, as `head` does
            return 141
        print(f"litellm-sqlalchemy: {printable(str(error))}", file=sys.stderr)  # of a file in the spool, which it names
        return ExitCode.SPOOL


def _run(arguments: list[str] | None) -> int:
    if sys.stdout is None:  # closed by who started this
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - until the end
    if isinstance(sys.stdout, io.TextIOWrapper):  # what a locale has no character for, as standard error shows it
        sys.stdout.reconfigure(errors="backslashreplace")
    if arguments is None:
        arguments = sys.argv[1:]
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            # libpq would wait on, for an answer or a connection; every verb may be broken off anywhere
            signal.signal(signal.SIGINT, signal.SIG_DFL)
    parser = _parser()
    for argument in arguments:
        try:
            argument.encode()
        except UnicodeEncodeError:  # which neither the log nor the database could hold
            parser.error(f"{argument!r} is not {sys.getfilesystemencoding().upper()}")
    options = parser.parse_args(arguments)
    settings = load_settings(options.settings)
    if options.settings:
        os.environ[SETTINGS_VARIABLE] = str(options.settings)
    _configure_logging(settings.logging)
    with as_owner(settings.spool.directory):
        return int(options.verb(settings, options))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="litellm-sqlalchemy",
        description="Log of a LiteLLM gateway's requests and responses in PostgreSQL.",
        epilog=f"example: litellm-sqlalchemy validate --json; {_EXIT_CODES}",
    )
    parser.add_argument("--version", action="version", version=f"litellm-sqlalchemy {__version__}")
    verbs = parser.add_subparsers(required=True, metavar="VERB")

    def add(name: str, verb: Callable[[Settings, argparse.Namespace], int], summary: str) -> argparse.ArgumentParser:
        verb_parser = verbs.add_parser(name, help=summary, description=summary, epilog=_EXIT_CODES)
        verb_parser.add_argument(
            "--settings", type=Path, metavar="FILE", help=f"settings file (default: ${SETTINGS_VARIABLE})"
        )
        verb_parser.add_argument("--json", action="store_true", help="print JSON")
        verb_parser.set_defaults(verb=verb)
        return verb_parser

    add("validate", _validate, "Prove the deployment, a real call through the gateway included.")
    migrating = add("migrate", _migrate, "Bring tables and privileges up to date.")
    migrating.add_argument("--check", action="store_true", help="change nothing; exit 5 when there is something to do")
    add("write", _write, "Deliver the spool to PostgreSQL until stopped.")
    counting = add("status", _status, "Count what became of every event; exit 1 when any was lost or is not stored.")
    counting.add_argument("--spool-only", action="store_true", help="do not compare with the tables")
    counting.add_argument(
        "--acknowledge", action="store_true", help="take note of what is lost by now: only what comes on top fails"
    )
    letters = add("dead-letters", _dead_letters, "List what PostgreSQL refused for good, or give it another chance.")
    letters.add_argument("action", nargs="?", choices=("list", "requeue"), default="list", help="default: list")
    letters.add_argument("id", nargs="*", help="letters, each with the other half of its call; default: all")
    replaying = add("replay", _replay, "Store again what was delivered since a time, after a restore of the database.")
    replaying.add_argument("--since", type=_moment, required=True, metavar="TIME", help="2026-11-23T14:30:00+00:00")
    erasing = add("erase", _erase, "Erase what is stored of a user; exit 1 when something of it is still under way.")
    erasing.add_argument(
        "--user", type=_user, required=True, metavar="ID", help="owner of keys, or the `user` that clients name"
    )
    erasing.add_argument("--dry-run", action="store_true", help="only count")
    pruning = add("prune", _prune, "Remove calls by age; `usage` keeps their sums.")
    pruning.add_argument(
        "--before", type=moment, metavar="TIME", help="90d (whole days) or ISO time; default: content.retention_days"
    )
    pruning.add_argument("--dry-run", action="store_true", help="only count")
    add("settings", _settings, "Print the settings in force.")
    add_verbs(add)
    return parser


def _validate(settings: Settings, options: argparse.Namespace) -> int:
    results = []
    for result in validate.Validation(settings).run():
        results.append(result)
        if not options.json:
            remedy = f"; next: {result.remedy}" if result.remedy else ""
            print(f"{'OK    ' if result.ok else 'FAILED'} {result.id:<32} {result.seen}{remedy}", flush=True)
    if options.json:
        _print(validate.as_mapping(results))
    return ExitCode.OK if all(result.ok for result in results) else ExitCode.FAILED


def _migrate(settings: Settings, options: argparse.Namespace) -> int:
    changed, message = migrate(settings, check=options.check)
    if options.json:
        _print({"changed": changed, "message": message})
    else:
        print(message)
    return ExitCode.SCHEMA if options.check and changed else ExitCode.OK


def _write(settings: Settings, options: argparse.Namespace) -> int:
    run_writer(settings)
    return ExitCode.OK


def _status(settings: Settings, options: argparse.Namespace) -> int:
    directory = settings.spool.directory
    status = spool_status(directory)
    if not options.json:
        print(status, flush=True)
    tables = None if options.spool_only else tables_status(settings)
    if tables and not options.json:
        print(tables)
    known = acknowledge(directory, status, tables) if options.acknowledge else read_known(directory)
    if options.json:
        content = {**asdict(status), "tables": asdict(tables) if tables else None, "acknowledged": asdict(known)}
        _print(content)
    elif known != Known():
        print(known)
    return ExitCode.OK if status.is_well(known) and (tables is None or tables.agree(known)) else ExitCode.FAILED


def _dead_letters(settings: Settings, options: argparse.Namespace) -> int:
    directory = settings.spool.directory
    letters = (requeue if options.action == "requeue" else read_letters)(directory, options.id)
    if options.json:
        _print([{"id": one.id, "kind": one.kind, "call": one.call, "reason": one.reason} for one in letters])
    elif options.action == "requeue":
        print(f"{len(letters)} dead letters requeued")
    else:
        for letter in letters:
            print(printable(f"{letter.id}  {letter.kind:<8}  {letter.reason}"))  # whatever stands in the spool
        if not letters:
            print("no dead letters")
    return ExitCode.OK


def _replay(settings: Settings, options: argparse.Namespace) -> int:
    result = replay(settings, options.since.timestamp())
    if options.json:
        _print(asdict(result))
    else:
        print(result)
    removed = removed_until(settings.spool.directory)
    if options.since.timestamp() < removed:
        kept = f"{datetime.fromtimestamp(removed, UTC):%Y-%m-%dT%H:%M:%S+00:00}"
        print(
            f"the spool has not all that was delivered before {kept} (`spool.retain`, `retain_size`)", file=sys.stderr
        )
    return ExitCode.FAILED if result.refused else ExitCode.OK


def _erase(settings: Settings, options: argparse.Namespace) -> int:
    result = erase(settings, options.user, dry_run=options.dry_run)
    if options.json:
        _print(asdict(result))
    else:
        print(f"{'would erase' if options.dry_run else 'erased'}: {result}")
    if not result.complete:
        left = f"{result.spooled} frames are not delivered yet and {result.running} calls have not ended"
        print(f"{left}: run it again later", file=sys.stderr)
    return ExitCode.OK if result.complete else ExitCode.FAILED


def _prune(settings: Settings, options: argparse.Namespace) -> int:
    before, days = options.before, settings.content.retention_days
    if before is None and days is None:
        raise UsageError("nothing says which calls are old: name --before, or set `content.retention_days`")
    before = before or moment(f"{days}d")
    calls = prune(settings, before, dry_run=options.dry_run)
    if options.json:
        _print({"before": before.isoformat(), "calls": calls})
    else:
        verb = "would remove" if options.dry_run else "removed"
        print(f"{verb} the rows of {calls} calls from before {before.isoformat(timespec='seconds')}")
    return ExitCode.OK


def _moment(text: str) -> datetime:
    try:
        found = datetime.fromisoformat(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no ISO time: write it like 2026-11-23T14:30:00+00:00") from None
    if found.tzinfo is None:
        raise argparse.ArgumentTypeError(f"{text} has no time zone: write {text}+00:00 for UTC")
    return found


def _user(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("it is empty: name a user")
    return text


def _settings(settings: Settings, options: argparse.Namespace) -> int:
    if options.json:
        _print(as_mapping(settings))
    else:
        print(yaml.safe_dump(as_mapping(settings), sort_keys=False), end="")
    return ExitCode.OK


def _print(content: Any) -> None:
    print(json.dumps(content, indent=2))


class _JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        """Return one JSON object."""
        content = {
            "time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S%z"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            content["exception"] = self.formatException(record.exc_info)
        return json.dumps(content)


def _configure_logging(settings: LoggingSettings) -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(
        _JsonFormatter() if settings.format == "json" else logging.Formatter("%(levelname)s %(message)s")
    )
    logging.basicConfig(level=settings.level, handlers=[handler])
    logging.getLogger("alembic").setLevel(logging.WARNING)
