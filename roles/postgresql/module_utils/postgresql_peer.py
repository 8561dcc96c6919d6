"""Connection of the postgres superuser over the local socket, shared by this role's modules."""

from __future__ import annotations

import contextlib
import os
import pwd
import re

try:
    import psycopg2
except ImportError:
    psycopg2 = None

SOCKET_DIRECTORY = "/var/run/postgresql"

# Statements of these sessions can carry SCRAM verifiers: nothing of them may reach a log or a statistics view. pgaudit
# goes on recording them; it writes <REDACTED> in place of a password.
SILENT = " ".join(
    f"-c {setting}"
    for setting in (
        "log_statement=none",
        "log_min_duration_statement=-1",
        "log_min_duration_sample=-1",
        "log_transaction_sample_rate=0",
        "log_min_error_statement=panic",
        "log_duration=off",
        "debug_print_parse=off",
        "debug_print_rewritten=off",
        "debug_print_plan=off",
        "pg_stat_statements.track=none",
        "pg_stat_statements.track_utility=off",
        "search_path=pg_catalog",
        "statement_timeout=60s",
        "lock_timeout=30s",
    )
)


class UnreachableError(Exception):
    """The server cannot be reached over its socket; str() says why."""


@contextlib.contextmanager
def effective_user(name: str):
    """Be this user for a while: peer authentication looks at the effective user of the moment of connecting."""
    before, user = os.geteuid(), pwd.getpwnam(name)
    os.seteuid(user.pw_uid)
    try:
        yield
    finally:
        os.seteuid(before)


def port_of(module) -> int:
    """Return the module's port, or in check mode, which changes no port, the one where the server still is."""
    port = module.params["port"]
    if not module.check_mode or not os.path.isdir(SOCKET_DIRECTORY):
        return port
    found = [int(name[9:]) for name in os.listdir(SOCKET_DIRECTORY) if re.fullmatch(r"\.s\.PGSQL\.\d+", name)]
    return found[0] if len(found) == 1 else port


def connect(port: int, database: str = "postgres"):
    """Return an autocommit connection of the superuser, or raise UnreachableError."""
    if psycopg2 is None:
        raise UnreachableError("python3-psycopg2 is not installed")
    try:
        with effective_user("postgres"):
            connection = psycopg2.connect(
                host=SOCKET_DIRECTORY,
                port=port,
                user="postgres",
                dbname=database,
                options=SILENT,
                application_name="ansible",
                connect_timeout=10,
            )
    except KeyError:
        raise UnreachableError("there is no user postgres") from None
    except PermissionError:
        raise UnreachableError("only root can be postgres on its socket: run the play with become") from None
    except psycopg2.OperationalError as error:
        raise UnreachableError(str(error).strip()) from None
    connection.autocommit = True
    return connection


def rows(connection, statement: str, *parameters) -> list[tuple]:
    """Run a query and return all its rows."""
    with connection.cursor() as cursor:
        cursor.execute(statement, parameters or None)
        return cursor.fetchall()


def describe(error) -> str:
    """Say what the server answered, without the statement: that could hold a verifier."""
    return f"{error.diag.message_primary or type(error).__name__} (SQLSTATE {error.pgcode})"
