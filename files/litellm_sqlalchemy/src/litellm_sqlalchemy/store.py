"""Delivery of frames into the tables, each exactly once.

A batch goes by binary COPY straight into the tables, in one transaction. The primary keys are the gateway's own ids,
so a batch that was delivered before - a crash or a lost connection between COMMIT and its confirmation - is refused as
a whole (23505); then it goes again through staging tables with ON CONFLICT DO NOTHING. A batch with a row that
PostgreSQL cannot hold is halved until that row stands alone: its neighbours land, it becomes a dead letter.
"""

from dataclasses import dataclass, field
from io import BytesIO
from typing import Any, NamedTuple

import psycopg2
from sqlalchemy import Engine, text
from sqlalchemy.dialects import postgresql
from sqlalchemy.exc import DBAPIError

from litellm_sqlalchemy.database import ErrorClass, classify, one_line
from litellm_sqlalchemy.errors import SettingsError
from litellm_sqlalchemy.frames import Frame, Kind
from litellm_sqlalchemy.migrate import current, problem_of
from litellm_sqlalchemy.records import TABLES, RowError, TableCopy, encode_row

_DIALECT = postgresql.dialect()  # type: ignore[no-untyped-call]


class Unavailable(Exception):
    """The database cannot take the batch now; nothing of it is lost, nothing of it is stored."""

    def __init__(self, cause: ErrorClass, message: str) -> None:
        """Keep the error's class and its message."""
        super().__init__(message)
        self.cause = cause


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


class _Row(NamedTuple):
    frame: Frame
    encoded: bytes
    opaque: bool


class Store:
    """Delivers frames through an engine."""

    def __init__(self, engine: Engine) -> None:
        """Take the engine whose login may insert."""
        self.engine = engine
        self._schema_checked = False

    def deliver(self, frames: list[Frame], *, give_up_on_unknown: bool = False) -> Delivery:
        """Store a batch; return when every frame is stored or known to be impossible. Raises Unavailable.

        `give_up_on_unknown` treats an error of no known class as the row's fault.
        """
        rows = []
        dead = []
        self._schema_checked = False
        for frame in frames:
            try:
                rows.append(_Row(frame, encode_row(frame), False))
            except RowError as error:
                dead.append(DeadLetter(frame, str(error)))
        return Delivery(dead=dead) + self._deliver(rows, give_up_on_unknown)

    def check_connection(self) -> None:
        """Raise Unavailable when the database cannot be asked."""
        try:
            with self.engine.connect() as connection:
                connection.execute(text("SELECT 1"))
        except (DBAPIError, psycopg2.Error, OSError) as error:
            raise Unavailable(classify(error), one_line(error)) from error

    def _deliver(self, rows: list[_Row], give_up_on_unknown: bool, staged: bool = False) -> Delivery:
        if not rows:
            return Delivery()
        try:
            inserted = self._transaction(rows, staged)
        except SettingsError as error:  # the credential file is gone or being replaced
            raise Unavailable(ErrorClass.CREDENTIAL, str(error)) from error
        except (DBAPIError, psycopg2.Error, OSError, OverflowError) as error:
            cause = classify(error)
            if cause is ErrorClass.DUPLICATE and not staged:
                return self._deliver(rows, give_up_on_unknown, staged=True)
            if cause is not ErrorClass.POISON and not (cause is ErrorClass.UNKNOWN and give_up_on_unknown):
                raise Unavailable(cause, one_line(error)) from error
            if len(rows) == 1:
                self._check_schema()
                return self._last_resort(rows[0], one_line(error), give_up_on_unknown)
            half = len(rows) // 2
            first = self._deliver(rows[:half], give_up_on_unknown, staged)
            return first + self._deliver(rows[half:], give_up_on_unknown, staged)
        return Delivery(inserted=inserted, duplicates=len(rows) - inserted)

    def _check_schema(self) -> None:
        """Raise Unavailable where it is the tables that do not fit, which is no fault of any row."""
        if self._schema_checked:
            return
        try:
            with self.engine.connect() as connection:
                problem = problem_of(current(connection))
        except (DBAPIError, psycopg2.Error, SettingsError, OSError) as error:
            raise Unavailable(classify(error), one_line(error)) from error
        if problem:
            raise Unavailable(ErrorClass.SCHEMA, problem)
        self._schema_checked = True

    def _last_resort(self, row: _Row, reason: str, give_up_on_unknown: bool) -> Delivery:
        """Store the payload as Base64 where it was the payload that PostgreSQL refused."""
        if row.opaque or not row.frame.payload:
            return Delivery(dead=[DeadLetter(row.frame, reason)])
        return self._deliver([_Row(row.frame, encode_row(row.frame, opaque=True), True)], give_up_on_unknown)

    def _transaction(self, rows: list[_Row], staged: bool) -> int:
        """Insert the rows in one transaction; return how many were new."""
        inserted = 0
        with self.engine.begin() as connection:
            cursor = connection.connection.cursor()
            for kind in Kind:  # requests before the responses that refer to them
                encoded = [row.encoded for row in rows if row.frame.kind is kind]
                if encoded:
                    inserted += (_insert_staged if staged else _copy)(cursor, TABLES[kind], encoded)
        return inserted


def _copy(cursor: Any, table: TableCopy, rows: list[bytes], into: str = "") -> int:
    columns = ", ".join(table.columns)
    cursor.copy_expert(
        f"COPY {into or table.table.name} ({columns}) FROM STDIN (FORMAT binary)", BytesIO(table.stream(rows))
    )
    return len(rows)


def _insert_staged(cursor: Any, table: TableCopy, rows: list[bytes]) -> int:
    types = ", ".join(f"{column.name} {column.type.compile(_DIALECT)}" for column in table.table.columns)
    columns = ", ".join(table.columns)
    cursor.execute(f"CREATE TEMPORARY TABLE staged_{table.table.name} ({types}) ON COMMIT DROP")
    _copy(cursor, table, rows, f"staged_{table.table.name}")
    cursor.execute(
        f"INSERT INTO {table.table.name} ({columns}) SELECT {columns} FROM staged_{table.table.name} "
        "ON CONFLICT DO NOTHING"
    )
    return int(cursor.rowcount)
