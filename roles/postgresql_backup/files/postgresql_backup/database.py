"""Sessions with the live cluster and with spare ones, and what a snapshot's content is."""

import hashlib
import json
import threading
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from typing import Any

import psycopg2
from psycopg2 import sql
from psycopg2.extensions import connection as _connection

from postgresql_backup.errors import DatabaseError, LockedError
from postgresql_backup.settings import Settings, credential
from postgresql_backup.tools import Pace, acting_as, run

#: How long a dump waits for a table that somebody else has for himself.
LOCK_TIMEOUT = "30s"
#: Settings that a value's text depends on: the same everywhere, or digests could differ with the session.
_TEXT_FORM = (
    "-c datestyle=ISO -c intervalstyle=iso_8601 -c timezone=UTC -c bytea_output=hex -c extra_float_digits=1 "
    "-c search_path=pg_catalog -c max_parallel_workers_per_gather=0 -c statement_timeout=0 "
    f"-c lock_timeout={LOCK_TIMEOUT} -c transaction_timeout=0 -c idle_in_transaction_session_timeout=0 "
    "-c idle_session_timeout=0"
)
_TABLES = """
SELECT n.nspname, c.relname, c.oid
FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE c.relkind = 'r' AND c.relpersistence = 'p' AND n.nspname !~ '^pg_' AND n.nspname <> 'information_schema'
ORDER BY c.oid -- as pg_dump locks them; who writes into several begins with the oldest, too, or there are deadlocks
"""
#: Two seeds give 128 bits; a sum does not depend on the order of the rows.
_CONTENT = sql.SQL(
    "SELECT count(*), coalesce(sum(hashtextextended((t.*)::text, 0)), 0), "
    "coalesce(sum(hashtextextended((t.*)::text, 1)), 0) FROM ONLY {} AS t WHERE ctid >= {}::tid AND ctid < {}::tid"
)
#: Pages of a table that are looked at before a rest: 8 MB, and what their rows have elsewhere.
_PAGES = 1024

#: Seconds that others wait for a table that is read; less than the lock_timeout of those that log in.
_PATIENCE = 3
#: Ends sessions of this user in this database when one of them is in somebody's way.
_GIVE_WAY = """
WITH own AS (SELECT pid FROM pg_stat_activity WHERE usename = current_user AND datname = current_database()
    AND pid <> pg_backend_pid() AND (%(pids)s::int[] = '{}' OR pid = ANY(%(pids)s)))
SELECT pg_terminate_backend(pid) FROM own WHERE EXISTS (SELECT FROM pg_locks AS waiting WHERE NOT waiting.granted
    AND waiting.waitstart < clock_timestamp() - make_interval(secs => %(patience)s)
    AND waiting.pid NOT IN (SELECT pid FROM own) AND pg_blocking_pids(waiting.pid) && ARRAY(SELECT pid FROM own))
"""

Connection = _connection
Tables = dict[str, dict[str, Any]]


def login() -> dict[str, str]:
    """Return user and password of the backup role, from systemd's credentials. Raises SettingsError."""
    content = json.loads(credential("database.json"))
    return {"user": str(content["user"]), "password": str(content["password"])}


def libpq(settings: Settings, who: dict[str, str]) -> dict[str, str]:
    """Return the environment with which PostgreSQL's programs log in."""
    extra = {"PGHOST": settings.socket, "PGPORT": str(settings.port), "PGUSER": who["user"]}
    if "password" in who:
        extra["PGPASSWORD"] = who["password"]
    return {**extra, "PGOPTIONS": f"-c statement_timeout=0 -c lock_timeout={LOCK_TIMEOUT}"}


@contextmanager
def session(
    settings: Settings, database: str, who: dict[str, str] | None = None, *, socket: str = "", port: int = 0
) -> Iterator[Connection]:
    """Open an autocommit session over a socket; as the superuser unless `who` says otherwise. Raises DatabaseError."""
    login_arguments: dict[str, Any] = {**(who or {"user": "postgres"})}
    try:
        with acting_as("postgres"):
            opened = psycopg2.connect(
                host=socket or settings.socket,
                port=port or settings.port,
                dbname=database,
                application_name="postgresql-backup",
                options=_TEXT_FORM,
                connect_timeout=10,
                **login_arguments,
            )
        with closing(opened) as connection:
            connection.autocommit = True
            yield connection
    except (psycopg2.errors.LockNotAvailable, psycopg2.errors.DeadlockDetected) as error:
        raise LockedError(f"database {database}: somebody else has a table: {error.diag.message_primary}") from None
    except psycopg2.Error as error:
        reason = str(error.diag.message_primary or error).strip().splitlines()[0]
        raise DatabaseError(f"database {database}: {reason}") from None


def rows(connection: Connection, statement: str | sql.Composable, *parameters: Any) -> list[tuple[Any, ...]]:
    """Run a query with parameters (values, or one mapping) and return all its rows."""
    named = len(parameters) == 1 and isinstance(parameters[0], dict)
    with connection.cursor() as cursor:
        cursor.execute(statement, parameters[0] if named else parameters or None)
        return list(cursor.fetchall()) if cursor.description else []


def one(connection: Connection, statement: str, *parameters: Any) -> Any:
    """Return the only value of a query's only row."""
    return rows(connection, statement, *parameters)[0][0]


def lock_tables(connection: Connection, mode: str) -> None:
    """Lock all tables until the transaction ends. Raises LockedError, by its session, when that takes too long."""
    tables = [
        sql.SQL("ONLY {}").format(sql.Identifier(schema, table)) for schema, table, _ in rows(connection, _TABLES)
    ]
    if tables:
        rows(connection, sql.SQL("LOCK TABLE {} IN {} MODE").format(sql.SQL(", ").join(tables), sql.SQL(mode)))


def contents(connection: Connection, pace: Pace | None = None) -> Tables:
    """Return row count and content digest of each table, as this session's snapshot sees them."""
    found: Tables = {}
    for schema, table, oid in rows(connection, _TABLES):
        pages = one(connection, "SELECT pg_relation_size(%s::oid) / current_setting('block_size')::int", oid)
        count = first = second = 0
        for start in range(0, pages, _PAGES):
            ends = (sql.Literal(f"({page},0)") for page in (start, start + _PAGES))
            part = rows(connection, _CONTENT.format(sql.Identifier(schema, table), *ends))[0]
            count, first, second = count + part[0], first + int(part[1]), second + int(part[2])
            if pace:
                pace.rest()
        digest = f"{first % 2**64:016x}{second % 2**64:016x}"
        found[f"{schema}.{table}"] = {"rows": count, "digest": digest}
    return found


def schema_digest(settings: Settings, database: str, login_environment: dict[str, str], snapshot: str = "") -> str:
    """Return the SHA-256 of all definitions, owners and privileges in a database."""
    command = [f"{settings.bin}/pg_dump", "--schema-only", f"--lock-wait-timeout={LOCK_TIMEOUT}", "--no-password"]
    if snapshot:
        command.append(f"--snapshot={snapshot}")
    text = run([*command, f"--dbname={database}"], extra=login_environment)
    # Comments hold versions, \restrict a random word.
    lines = [line for line in text.splitlines() if line and not line.startswith(("--", "\\"))]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def differences(wanted: Tables, found: Tables) -> list[str]:
    """Say, for each table, how two contents differ."""
    result = [f"table {name} is missing" for name in sorted(wanted.keys() - found.keys())]
    result += [f"table {name} should not be there" for name in sorted(found.keys() - wanted.keys())]
    for name in sorted(wanted.keys() & found.keys()):
        if wanted[name]["rows"] != found[name]["rows"]:
            result.append(f"table {name} has {found[name]['rows']} rows instead of {wanted[name]['rows']}")
        elif wanted[name]["digest"] != found[name]["digest"]:
            result.append(f"table {name} has another content in its {found[name]['rows']} rows")
    return result


class GivingWay:
    """Ends sessions that read whole tables as soon as somebody has waited for its locks for some seconds.

    A dump holds every table until it is made; who wants one for himself, as a migration does, waits, and everybody else
    waits behind him. A dump can be taken again.
    """

    def __init__(
        self, settings: Settings, database: str, what: str, who: dict[str, str] | None = None, pids: Sequence[int] = ()
    ) -> None:
        """Take the name of the work, and its sessions: `pids`, or all that `who` has in the database."""
        self._settings, self._database, self._what, self._who, self._pids = settings, database, what, who, list(pids)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._gave_way = False

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._over.set()
        self._thread.join()
        if kind and self._gave_way:
            raise LockedError(
                f"{self._what} gave way to who waited {_PATIENCE} s for a table, as a migration does: take it again"
            ) from None

    def _watch(self) -> None:
        with suppress(DatabaseError), session(self._settings, self._database, self._who) as connection:
            while not self._over.wait(1):
                if rows(connection, _GIVE_WAY, {"patience": _PATIENCE, "pids": self._pids}):
                    self._gave_way = True
                    return
