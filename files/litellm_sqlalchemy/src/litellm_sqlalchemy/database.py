"""Engines: SQLAlchemy's pool over psycopg2, with TLS, SCRAM and credentials that may change at any time."""

import os
import socket
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from typing import Any

import psycopg2
from sqlalchemy import Connection, Engine, create_engine
from sqlalchemy.exc import DBAPIError

from litellm_sqlalchemy.errors import DatabaseError, SchemaError, SettingsError
from litellm_sqlalchemy.settings import DatabaseSettings, load_credential
from litellm_sqlalchemy.users import as_starter

#: Seconds of silence after which TCP asks whether the other side is there, and milliseconds until unanswered data
#: ends the connection (tcp(7)): a cut network is noticed in 20 s instead of the kernel's 15 minutes.
_KEEPALIVE = {"keepalives_idle": 10, "keepalives_interval": 5, "keepalives_count": 2, "tcp_user_timeout": 20_000}
#: The same for the server's side, as settings of the session: a transaction that was cut off would hold its rows for
#: minutes, and the next attempt to store them waits for it. A query whose client is gone ends, too (milliseconds).
_SERVER_KEEPALIVE = {f"tcp_{name.removeprefix('tcp_')}": value for name, value in _KEEPALIVE.items()} | {
    "client_connection_check_interval": 10_000
}


#: Connections of each engine.
_open: weakref.WeakKeyDictionary[Engine, weakref.WeakSet[Any]] = weakref.WeakKeyDictionary()


class ErrorClass(Enum):
    """What an error of the database asks for."""

    RETRY = "retry"
    PAUSE = "pause"
    CREDENTIAL = "credential"
    SCHEMA = "schema"
    READ_ONLY = "read_only"
    POISON = "poison"
    DUPLICATE = "duplicate"
    UNKNOWN = "unknown"


#: SQLSTATE codes, or the two characters of a whole class, and what they ask for (PostgreSQL 17, appendix A).
_CLASSES = {
    **dict.fromkeys(
        ("08", "57P01", "57P02", "57P03", "53200", "53300", "53400", "40001", "40P01", "55P03", "57014"),
        ErrorClass.RETRY,
    ),
    **dict.fromkeys(("53100", "42501", "3D000", "58"), ErrorClass.PAUSE),
    **dict.fromkeys(("42P01", "42703"), ErrorClass.SCHEMA),
    "25006": ErrorClass.READ_ONLY,
    "28": ErrorClass.CREDENTIAL,
    **dict.fromkeys(("22", "23503", "23514", "23502", "54000", "54001"), ErrorClass.POISON),
    "23505": ErrorClass.DUPLICATE,
}


def sqlstate(error: BaseException | None) -> str:
    """Return the SQLSTATE of an error of psycopg2 or SQLAlchemy, an empty text where it has none."""
    return getattr(error.orig if isinstance(error, DBAPIError) else error, "pgcode", None) or ""


def classify(error: BaseException) -> ErrorClass:
    """Return what to do about an error of psycopg2, SQLAlchemy or the credential file."""
    if isinstance(error, SettingsError):
        return ErrorClass.CREDENTIAL
    original = error.orig if isinstance(error, DBAPIError) else error
    code = sqlstate(error)
    for key in (code, code[:2]):
        if key in _CLASSES:
            return _CLASSES[key]
    if isinstance(original, psycopg2.OperationalError | psycopg2.InterfaceError | OSError):
        refused = "authentication failed" in str(original) or "is not permitted to log in" in str(original)
        return ErrorClass.CREDENTIAL if refused else ErrorClass.RETRY  # libpq gives no SQLSTATE while it connects
    if isinstance(original, psycopg2.DataError | UnicodeError | OverflowError):
        return ErrorClass.POISON
    return ErrorClass.UNKNOWN


def one_line(error: BaseException) -> str:
    """Return the message of a database error in one line, with its SQLSTATE."""
    original = error.orig if isinstance(error, DBAPIError) else error
    lines = str(original).strip().splitlines() or [type(original).__name__]
    code = sqlstate(error)
    message = f"{lines[0]} (SQLSTATE {code})" if code else " ".join(line.strip() for line in lines)
    if "certificate" in message:  # libpq tells neither dates nor what is wrong with it
        message += "; `litellm-sqlalchemy validate` tells about the certificate"
    return message


def connection_arguments(settings: DatabaseSettings, login: str, application: str) -> dict[str, Any]:
    """Return libpq's parameters for a login; the credential file is read now."""
    credential = load_credential(settings, login)
    arguments: dict[str, Any] = {
        "host": settings.host,
        "port": settings.port,
        "dbname": settings.name,
        "user": credential.user,
        "password": credential.password,
        "sslmode": settings.sslmode,
        "channel_binding": settings.channel_binding,
        "connect_timeout": settings.connect_timeout,
        "application_name": f"litellm-sqlalchemy {application}",
        "target_session_attrs": "any",
        **_KEEPALIVE,
    }
    if settings.sslrootcert is not None:
        arguments["sslrootcert"] = str(settings.sslrootcert)
    if settings.client_certificates is not None:
        directory = settings.client_certificates / credential.user
        arguments |= {"sslcert": str(directory / "client.crt"), "sslkey": str(directory / "client.key")}
    return arguments


def make_engine(
    settings: DatabaseSettings, login: str, application: str, *, statement_timeout: float | None = None
) -> Engine:
    """Return an engine that logs in as `login`, a name of a credential file, read at every new connection.

    `statement_timeout` is in seconds.
    """
    session = _SERVER_KEEPALIVE | ({"statement_timeout": int(statement_timeout * 1000)} if statement_timeout else {})
    options = " ".join(f"-c {name}={value}" for name, value in session.items())

    def connect() -> Any:
        with as_starter():  # only that user may read credentials and keys
            connection = psycopg2.connect(**connection_arguments(settings, login, application), options=options)
        _open[engine].add(connection)
        return connection

    engine = create_engine(
        "postgresql+psycopg2://",
        creator=connect,
        pool_size=settings.pool_size,
        max_overflow=settings.max_overflow,
        pool_recycle=settings.pool_recycle,
        pool_pre_ping=settings.pool_pre_ping,
    )
    _open[engine] = weakref.WeakSet()
    return engine


@contextmanager
def time_limit(engine: Engine, seconds: float) -> Iterator[None]:
    """Cut the engine's connections when what is done with them takes longer, and raise psycopg2.OperationalError.

    `statement_timeout` is the server's: one that is frozen, or stands behind a proxy that lost it, never answers.
    """
    is_over = threading.Event()

    def cut() -> None:
        is_over.set()
        for connection in list(_open[engine]):
            try:
                with socket.socket(fileno=os.dup(connection.fileno())) as sock:
                    sock.shutdown(socket.SHUT_RDWR)
            except (OSError, psycopg2.Error):  # closed meanwhile
                continue

    timer = threading.Timer(seconds, cut)
    timer.daemon = True
    timer.start()
    try:
        yield
    except (DBAPIError, psycopg2.Error) as error:
        if is_over.is_set():
            raise psycopg2.OperationalError(f"no answer within {seconds:g} s") from error
        raise
    finally:
        timer.cancel()


@contextmanager
def connected(settings: DatabaseSettings, login: str, application: str) -> Iterator[Connection]:
    """Yield one connection, for a verb that does one thing.

    Raises DatabaseError with the cause in one line, SchemaError where tables are not as this version has them.
    """
    engine = make_engine(settings, login, application)
    try:
        with engine.connect() as connection:
            yield connection
    except (DBAPIError, psycopg2.Error) as error:
        if classify(error) is ErrorClass.SCHEMA:
            from litellm_sqlalchemy.migrate import schema_problem  # which imports this module

            if problem := schema_problem(engine):
                raise SchemaError(problem) from None
        raise DatabaseError(
            f"database {settings.name} at {settings.host}:{settings.port} as {login}: {one_line(error)}"
        ) from None
    finally:
        engine.dispose()


@contextmanager
def maintaining(settings: DatabaseSettings, application: str) -> Iterator[Connection]:
    """Yield a connection of the role that may delete rows. Raises as `connected`, and SettingsError without a role."""
    if settings.roles.maintainer is None:
        raise SettingsError("`database.roles.maintainer` is null: name the role that may delete rows")
    with connected(settings, "migrator", application) as connection:
        role = connection.dialect.identifier_preparer.quote(settings.roles.maintainer)
        connection.exec_driver_sql(f"SET ROLE {role}")
        connection.commit()
        yield connection


def vacuum(connection: Connection, tables: str) -> None:
    """Commit, and free what was deleted from tables: until then it still stands in their files."""
    connection.commit()
    connection.execution_options(isolation_level="AUTOCOMMIT").exec_driver_sql(f"VACUUM {tables}")
