"""Delivery of frames into the tables, each exactly once.

A batch goes by binary COPY straight into the tables, in one transaction. The primary keys are the gateway's own ids,
so a batch that was delivered before - a crash or a lost connection between COMMIT and its confirmation - is refused as
a whole (23505); then it goes again through staging tables with ON CONFLICT DO NOTHING. A batch with a row that
PostgreSQL cannot hold is halved until that row stands alone: its neighbours land, it becomes a dead letter. A batch
that takes longer than its time limit goes in smaller ones.
"""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import orjson
import psycopg2
from sqlalchemy import Engine, text
from sqlalchemy.dialects import postgresql
from sqlalchemy.exc import DBAPIError

from litellm_sqlalchemy.database import ErrorClass, classify, one_line, sqlstate, time_limit
from litellm_sqlalchemy.errors import SettingsError
from litellm_sqlalchemy.frames import Frame, Kind
from litellm_sqlalchemy.identifiers import uuid7
from litellm_sqlalchemy.migrate import schema_problem
from litellm_sqlalchemy.records import TABLES, RowReader, TableCopy
from litellm_sqlalchemy.redaction import REDACTION_VERSION

#: What a database, or the way to it, raises; SettingsError: the credential file is gone or being replaced.
_ERRORS = (DBAPIError, psycopg2.Error, SettingsError, OSError)
#: Seconds that the server's answer may take beyond `writer.statement_timeout`.
_ANSWER_TIME = 5.0
#: Seconds after the first attempt at a batch that failed; each further one is followed by twice as many.
_FIRST_DELAY = 0.1
_TIMEOUT = "57014"  # query_canceled: what `statement_timeout` ends with
_DIALECT = postgresql.dialect()  # type: ignore[no-untyped-call]


class Unavailable(Exception):
    """The database cannot take the batch now; nothing of it is lost, and to deliver it again stores nothing twice."""

    def __init__(self, cause: ErrorClass, message: str) -> None:
        """Keep the error's class and its message."""
        super().__init__(message)
        self.cause = cause


def retry_delay(attempt: int, limit: float) -> float:
    """Return how many seconds to wait after an attempt, the first of which is 1: `limit` at most."""
    return float(min(limit, _FIRST_DELAY * 2.0 ** min(attempt - 1, 16)))


class DeadLetter(NamedTuple):
    """A frame that cannot be stored, and PostgreSQL's or our reason."""

    frame: Frame
    reason: str


@dataclass
class Delivery:
    """What became of a batch: rows inserted, rows that were there already, and frames that cannot be stored."""

    inserted: int = 0
    duplicates: int = 0
    dead: list[DeadLetter] = field(default_factory=list)

    def __add__(self, other: "Delivery") -> "Delivery":
        """Return the sum of two parts of a batch."""
        return Delivery(self.inserted + other.inserted, self.duplicates + other.duplicates, self.dead + other.dead)


class Store:
    """Delivers frames through an engine."""

    def __init__(
        self,
        engine: Engine,
        statement_timeout: float = 60,
        before: Callable[[], None] = lambda: None,
        committed: Callable[[float], None] = lambda _seconds: None,
    ) -> None:
        """Take the engine whose login may insert, and the timeout in seconds that its statements have.

        `before` is called before each transaction and may raise, `committed` with the seconds of each COMMIT.
        """
        self.engine = engine
        self._statement_timeout = statement_timeout
        self._time_limit = statement_timeout + _ANSWER_TIME
        self._before = before
        self._committed = committed
        self._tables_checked = False
        self._at_once = sys.maxsize  # frames of a transaction, fewer after one that took too long

    def deliver(self, frames: list[Frame], *, give_up_on_unknown: bool = False) -> Delivery:
        """Store a batch; return when every frame is stored or known to be impossible. Raises Unavailable.

        `give_up_on_unknown` treats an error of no known class as the row's fault.
        """
        self._tables_checked = False
        result, place = Delivery(), 0
        while place < len(frames):
            part = frames[place : place + self._at_once]
            started = time.monotonic()
            try:
                result += self._deliver(part, give_up_on_unknown)
            except Unavailable as error:
                seconds = time.monotonic() - started
                if sqlstate(error.__cause__) == _TIMEOUT or seconds > self._time_limit / 2:
                    self._at_once = max(len(part) // 2, 1)
                raise
            place += len(part)
            if len(part) == self._at_once and time.monotonic() - started < self._statement_timeout / 4:
                self._at_once *= 2
        return result

    def check_connection(self) -> None:
        """Raise Unavailable when the database cannot be asked."""
        try:
            with time_limit(self.engine, self._time_limit), self.engine.connect() as connection:
                connection.execute(text("SELECT 1"))
        except _ERRORS as error:
            raise Unavailable(classify(error), one_line(error)) from error

    def schema_problem(self) -> str:
        """Return why the tables do not fit this version of the package, an empty text when they do or do not tell."""
        with time_limit(self.engine, self._time_limit):
            return schema_problem(self.engine)

    def _deliver(
        self, frames: list[Frame], give_up_on_unknown: bool, *, staged: bool = False, opaque: bool = False
    ) -> Delivery:
        if not frames:
            return Delivery()
        try:
            return self._transaction(frames, staged, opaque)
        except (*_ERRORS, OverflowError) as error:
            cause = classify(error)
            if cause is ErrorClass.DUPLICATE and not staged:
                return self._deliver(frames, give_up_on_unknown, staged=True, opaque=opaque)
            if cause is not ErrorClass.POISON and not (cause is ErrorClass.UNKNOWN and give_up_on_unknown):
                raise Unavailable(cause, one_line(error)) from error
            if len(frames) == 1:
                self._check_tables()
                if opaque or not frames[0].payload:
                    return Delivery(dead=[DeadLetter(frames[0], one_line(error))])
                return self._deliver(frames, give_up_on_unknown, opaque=True)  # maybe the payload alone is refused
            half = len(frames) // 2
            first = self._deliver(frames[:half], give_up_on_unknown, staged=staged)
            return first + self._deliver(frames[half:], give_up_on_unknown, staged=staged)

    def _check_tables(self) -> None:
        """Raise Unavailable where the tables take no row at all, which is no fault of the one that was refused."""
        if self._tables_checked:
            return
        if problem := self.schema_problem():
            raise Unavailable(ErrorClass.SCHEMA, problem)
        try:
            self._transaction(_plain_call(), staged=False, opaque=False, keep=False)
        except _ERRORS as error:
            cause = classify(error)
            if cause in (ErrorClass.POISON, ErrorClass.UNKNOWN):
                cause = ErrorClass.PAUSE
            raise Unavailable(cause, one_line(error)) from error
        self._tables_checked = True

    def _transaction(self, frames: list[Frame], staged: bool, opaque: bool, *, keep: bool = True) -> Delivery:
        """Insert the rows of the frames in one transaction, which is rolled back unless they are to be kept."""
        self._before()
        with time_limit(self.engine, self._time_limit), self.engine.connect() as connection:
            transaction = connection.begin()
            cursor = connection.connection.cursor()
            try:
                result = _insert(cursor, frames, staged, opaque)
            except psycopg2.Error as error:
                if cursor.connection.closed:  # a rollback would fail, too, and its error hide this one
                    connection.invalidate(error)
                raise
            if keep:
                started = time.perf_counter()
                transaction.commit()
                self._committed(time.perf_counter() - started)
        return result


def _plain_call() -> list[Frame]:
    """Return the frames of a call that the tables of every deployment can hold."""
    call = uuid7().hex
    common = {
        "created_at": time.time_ns() // 1000,
        "content_mode": "metadata",
        "redaction_version": REDACTION_VERSION,
        "payload_size": 0,
    }
    request = {"id": call, "gateway": "", "origin": "client", "calls": 1, "stream": False, **common}
    response = {"request_id": call, "status": "interrupted", "attempt_count": 0, **common}
    return [
        Frame(kind, 0, orjson.dumps(metadata), b"")
        for kind, metadata in ((Kind.REQUEST, request), (Kind.RESPONSE, response))
    ]


def _insert(cursor: Any, frames: list[Frame], staged: bool, opaque: bool) -> Delivery:
    result = Delivery()
    for kind in Kind:  # requests before the responses that refer to them
        of_kind = [frame for frame in frames if frame.kind is kind]
        if not of_kind:
            continue
        reader = RowReader(of_kind, opaque=opaque)
        inserted = (_insert_staged if staged else _copy)(cursor, TABLES[kind], reader)
        dead = [DeadLetter(*misfit) for misfit in reader.misfits]
        result += Delivery(inserted, len(of_kind) - len(dead) - inserted, dead)
    return result


def _copy(cursor: Any, table: TableCopy, rows: RowReader, into: str = "") -> int:
    columns = ", ".join(table.columns)
    cursor.copy_expert(f"COPY {into or table.table.name} ({columns}) FROM STDIN (FORMAT binary)", rows)
    return int(cursor.rowcount)


def _insert_staged(cursor: Any, table: TableCopy, rows: RowReader) -> int:
    types = ", ".join(f"{column.name} {column.type.compile(_DIALECT)}" for column in table.table.columns)
    columns = ", ".join(table.columns)
    cursor.execute(f"CREATE TEMPORARY TABLE staged_{table.table.name} ({types}) ON COMMIT DROP")
    _copy(cursor, table, rows, f"staged_{table.table.name}")
    cursor.execute(
        f"INSERT INTO {table.table.name} ({columns}) SELECT {columns} FROM staged_{table.table.name} "
        "ON CONFLICT DO NOTHING"  # to name the key would take the right to read it
    )
    return int(cursor.rowcount)
