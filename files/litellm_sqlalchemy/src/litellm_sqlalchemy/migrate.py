"""The schema: Alembic's migrations, the privileges on what they make, and whether both are in force.

Alembic is imported where it migrates: what revision the database is at, the writer asks too, which saves 12 MB.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import psycopg2
from sqlalchemy import Connection, Engine, inspect, text
from sqlalchemy.exc import DBAPIError

from litellm_sqlalchemy.database import connected
from litellm_sqlalchemy.errors import SchemaError, SettingsError
from litellm_sqlalchemy.settings import RoleSettings, Settings

if TYPE_CHECKING:
    from alembic.config import Config

_MIGRATIONS = Path(__file__).parent / "migrations"
#: Privileges on the tables by the name of the role's setting; nobody has any other. The writer cannot read a body
#: back, change or delete it.
PRIVILEGES: dict[str, dict[str, tuple[str, ...]]] = {
    "writer": {"requests": ("INSERT",), "responses": ("INSERT",), "alembic_version": ("SELECT",)},
    "reader": {
        "requests": ("SELECT",),
        "responses": ("SELECT",),
        "calls": ("SELECT",),
        "usage": ("SELECT",),
        "errors": ("SELECT",),
        "daily_usage": ("SELECT",),
        "alembic_version": ("SELECT",),
    },
    "maintainer": {
        "requests": ("SELECT", "DELETE", "MAINTAIN"),
        "responses": ("SELECT", "DELETE", "MAINTAIN"),
        "daily_usage": ("SELECT", "INSERT", "UPDATE", "DELETE", "MAINTAIN"),
        "alembic_version": ("SELECT",),
    },
    "monitor": {"alembic_version": ("SELECT",)},
}
#: A table, a role and a privilege.
_Entry = tuple[str, str, str]


def config(connection: Connection | None = None) -> Config:
    """Return Alembic's configuration of the packaged migrations."""
    from alembic.config import Config

    result = Config()
    result.set_main_option("script_location", str(_MIGRATIONS))
    result.attributes["connection"] = connection
    return result


def revisions() -> list[str]:
    """Return the revisions that this version of the package knows, oldest first, by the names of their files."""
    return sorted(file.name.partition("_")[0] for file in (_MIGRATIONS / "versions").glob("[0-9]*.py"))


def head() -> str:
    """Return the revision that this version of the package needs."""
    return revisions()[-1]


def current(connection: Connection) -> str | None:
    """Return the revision that the database is at, None before the first."""
    if not inspect(connection).has_table("alembic_version"):
        return None
    return connection.execute(text("SELECT version_num FROM alembic_version")).scalar()


def schema_problem(engine: Engine) -> str:
    """Return why the tables do not fit this version of the package, an empty text when they do or cannot be asked."""
    try:
        with engine.connect() as connection:
            return problem_of(current(connection))
    except (DBAPIError, psycopg2.Error, SettingsError):
        return ""


def problem_of(revision: str | None) -> str:
    """Return what is wrong with a revision of the database, an empty text when it is the one needed."""
    if revision == head():
        return ""
    if revision is None or revision in revisions():
        seen = f"at revision {revision}" if revision else "empty"
        return f"schema is {seen}, this version needs {head()}: run `litellm-sqlalchemy migrate`"
    return f"schema is at revision {revision}, which this version does not know: install a newer litellm-sqlalchemy"


def migrate(settings: Settings, *, check: bool = False) -> tuple[bool, str]:
    """Bring tables and privileges up to date as the owner; return whether anything changed and one line about it.

    `check` changes nothing. Raises DatabaseError, and SchemaError when the schema is newer than this version.
    """
    from alembic import command

    with connected(settings.database, "migrator", "migrate") as connection:
        roles = settings.database.roles
        connection.execute(text("SELECT pg_advisory_lock(hashtext('litellm-sqlalchemy migrate'))"))
        if roles.owner:
            connection.execute(text(f"SET ROLE {_quoted(connection, roles.owner)}"))
        before = current(connection)
        problem = problem_of(before)
        if problem and "newer" in problem:
            raise SchemaError(problem)
        if not problem and not missing_privileges(connection, roles):
            return False, f"schema is at head {head()}: nothing to do"
        if check:
            return True, problem or "privileges on the tables are missing: run `litellm-sqlalchemy migrate`"
        if problem:
            command.upgrade(config(connection), "head")
        _grant(connection, roles)
        connection.commit()
    return True, f"schema went from {before or 'empty'} to {head()}, privileges granted"


def missing_privileges(connection: Connection, roles: RoleSettings) -> list[str]:
    """Return the differences between the privileges on the tables and `PRIVILEGES`: `+` too many, `-` missing."""
    extra, missing = _differences(connection, roles)
    return sorted([f"+{' '.join(entry)}" for entry in extra] + [f"-{' '.join(entry)}" for entry in missing])


def _differences(connection: Connection, roles: RoleSettings) -> tuple[set[_Entry], set[_Entry]]:
    """Return what is granted too much, and what is missing."""
    rows = connection.execute(
        text(
            "SELECT p.whole, CAST(c.relname AS text), CAST(coalesce(g.rolname, 'PUBLIC') AS text), a.privilege_type "
            "FROM pg_class c CROSS JOIN LATERAL ("
            "SELECT c.relacl, true UNION ALL SELECT attacl, false FROM pg_attribute WHERE attrelid = c.oid"
            ") p (acl, whole) CROSS JOIN aclexplode(p.acl) a LEFT JOIN pg_roles g ON g.oid = a.grantee "
            "WHERE c.relnamespace = current_schema()::regnamespace AND c.relkind IN ('r', 'p', 'v') "
            "AND a.grantee <> c.relowner"
        )
    ).all()
    wanted = {
        (table, role, privilege)
        for name, tables in PRIVILEGES.items()
        if (role := getattr(roles, name))
        for table, privileges in tables.items()
        for privilege in privileges
    }
    managed = {table for tables in PRIVILEGES.values() for table in tables}
    # A column's are never wanted; to revoke them on the table revokes them on its columns.
    extra = {(table, role, privilege) for _, table, role, privilege in rows if table in managed} - wanted
    return extra, wanted - {(table, role, privilege) for whole, table, role, privilege in rows if whole}


def _grant(connection: Connection, roles: RoleSettings) -> None:
    extra, missing = _differences(connection, roles)
    for entries, verb, word in ((extra, "REVOKE", "FROM"), (missing, "GRANT", "TO")):
        for table, role, privilege in sorted(entries):
            grantee = "PUBLIC" if role == "PUBLIC" else _quoted(connection, role)
            connection.execute(text(f"{verb} {privilege} ON {table} {word} {grantee}"))


def _quoted(connection: Connection, name: str) -> str:
    return str(connection.dialect.identifier_preparer.quote(name))
