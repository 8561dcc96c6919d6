"""Migrations and models are one schema; privileges are exactly what they should be."""

import secrets
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import psycopg2
import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import text
from support.postgresql import Database, Server
from support.processes import Deployment
from support.waiting import wait_until

from litellm_sqlalchemy.database import connected
from litellm_sqlalchemy.migrate import PRIVILEGES, config, head, revisions
from litellm_sqlalchemy.models import Base
from litellm_sqlalchemy.queries import find_calls


def _difference(deployment: Deployment) -> list[object]:
    with connected(deployment.load().database, "reader", "test") as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True, "compare_server_default": True})
        return list(compare_metadata(context, Base.metadata))


def test_models_are_what_the_migrations_make(deployment: Deployment) -> None:
    assert _difference(deployment) == []


def test_control_a_column_too_many_is_seen(deployment: Deployment, database: Database) -> None:
    database.execute("ALTER TABLE requests ADD COLUMN stray text", "DROP INDEX ix_requests_call_id_hash_created_at")
    assert len(_difference(deployment)) == 2


def test_the_revisions_are_those_that_alembic_walks() -> None:
    scripts = ScriptDirectory.from_config(config())
    assert revisions() == [script.revision for script in scripts.walk_revisions()][::-1]
    assert head() == scripts.get_current_head()


def test_privileges_are_exact(database: Database) -> None:
    rows = database.query(
        "SELECT c.relname, replace(coalesce(g.rolname, 'PUBLIC'), 'litellm_', ''), a.privilege_type "
        "FROM pg_class c, aclexplode(c.relacl) a LEFT JOIN pg_roles g ON g.oid = a.grantee "
        "WHERE c.relnamespace = 'public'::regnamespace AND a.grantee <> c.relowner"
    )
    wanted = {
        (table, role, privilege)
        for role, tables in PRIVILEGES.items()
        for table, privileges in tables.items()
        for privilege in privileges
    }
    assert set(rows) == wanted
    assert {owner for (owner,) in database.query(
        "SELECT relowner::regrole::text FROM pg_class WHERE relnamespace = 'public'::regnamespace"
    )} == {"litellm_owner"}  # fmt: skip


def test_the_writer_can_insert_and_nothing_else(database: Database, server: Server, deployment: Deployment) -> None:
    with closing(
        psycopg2.connect(
            host="127.0.0.1", port=server.port, dbname=database.name, user="litellm_writer_a",
            password=server.passwords["writer"],
        )
    ) as connection:  # fmt: skip
        connection.autocommit = True
        for statement in (
            "SELECT id FROM requests", "UPDATE requests SET model = ''", "DELETE FROM requests", "TRUNCATE requests",
            "CREATE TABLE public.own (a int)", "DROP TABLE requests",
        ):  # fmt: skip
            with pytest.raises(psycopg2.errors.InsufficientPrivilege), connection.cursor() as cursor:
                cursor.execute(statement)


def test_migrate_repairs_privileges_and_says_so(database: Database, deployment: Deployment) -> None:
    database.execute("GRANT DELETE ON requests TO litellm_writer", "REVOKE SELECT ON responses FROM litellm_reader")
    assert deployment.run("migrate", "--check").returncode == 5
    done = deployment.run("migrate", "--json")
    assert (done.returncode, '"changed": true' in done.stdout) == (0, True)
    assert '"changed": false' in deployment.run("migrate", "--json").stdout
    assert deployment.run("migrate", "--check").returncode == 0
    test_privileges_are_exact(database)


def test_privileges_on_columns_are_taken_back(database: Database, deployment: Deployment) -> None:
    database.execute(
        'CREATE ROLE "a group"',
        "GRANT SELECT (payload) ON requests TO litellm_writer, PUBLIC",
        "REVOKE SELECT ON responses FROM litellm_reader; GRANT SELECT (status) ON responses TO litellm_reader",
        'GRANT SELECT ON requests TO "a group"',
    )
    try:
        assert deployment.run("migrate", "--check").returncode == 5
        done = deployment.run("migrate")
        assert done.returncode == 0, done.stderr
        assert deployment.run("migrate", "--check").returncode == 0
        test_privileges_are_exact(database)
        assert not database.value("SELECT has_column_privilege('litellm_writer', 'requests', 'payload', 'SELECT')")
    finally:
        database.execute('DROP OWNED BY "a group"', 'DROP ROLE "a group"')


def test_an_index_that_was_made_is_not_thrown_away_for_a_reader(database: Database, deployment: Deployment) -> None:
    with connected(deployment.load().database, "migrator", "test") as connection:
        connection.execute(text("SET ROLE litellm_owner"))
        command.downgrade(config(connection), "0006")
        connection.commit()
    database.execute(f"ALTER ROLE litellm_migrator_a IN DATABASE {database.name} SET lock_timeout = '200ms'")
    waited = (
        "SELECT 1 FROM pg_locks WHERE NOT granted AND mode = 'AccessExclusiveLock' "
        "AND database = %s::oid AND clock_timestamp() - waitstart > '1s'"
    )
    oid = database.value("SELECT oid FROM pg_database WHERE datname = current_database()")
    with database.server.connection(database.name) as reader, ThreadPoolExecutor(1) as pool:
        reader.cursor().execute("BEGIN; SELECT count(*) FROM requests")
        migrating = pool.submit(deployment.run, "migrate")
        wait_until(lambda: migrating.done() or database.query(waited, oid), "the migration waits for the reader")
        reader.cursor().execute("ROLLBACK")  # in autocommit mode psycopg2 knows of no transaction
        done = migrating.result(60)
    assert done.returncode == 0, done.stderr


def test_an_empty_database(server: Server, database: Database, deployment: Deployment) -> None:
    database.drop()
    server.create_database(database.name)
    done = deployment.run("migrate", "--check")
    assert done.returncode == 5
    assert "schema is empty" in done.stdout
    assert deployment.run("migrate").returncode == 0
    assert _difference(deployment) == []


def test_calls_of_an_older_schema_are_found(database: Database, deployment: Deployment) -> None:
    """Whatever their ids are: clients choose them, and they came in under another index."""
    with connected(deployment.load().database, "migrator", "test") as connection:
        connection.execute(text("SET ROLE litellm_owner"))
        command.downgrade(config(connection), "0006")
        connection.commit()
    identifiers = [
        "plain",
        "",
        " ",
        "x" * 512,
        "\N{GRINNING FACE}" * 512,
        "%s %% ' \\",
        "\x01",
        secrets.token_hex(50_000),
        None,
    ]
    for identifier in identifiers:
        database.query(
            "INSERT INTO requests (id, created_at, gateway, origin, calls, call_id, stream, content_mode, "
            "redaction_version, payload_size) "
            "VALUES (gen_random_uuid(), now(), '', 'client', 1, %s, false, 'full', 1, 0) RETURNING id",
            identifier,
        )
    assert deployment.run("migrate").stdout == f"schema went from 0006 to {head()}, privileges granted\n"
    assert _difference(deployment) == []
    test_privileges_are_exact(database)
    with connected(deployment.load().database, "reader", "test") as connection:
        for identifier in identifiers[:-1]:
            assert [row["call_id"] for row in find_calls(connection, str(identifier))] == [identifier]


def test_a_schema_that_is_newer(database: Database, deployment: Deployment) -> None:
    database.execute("UPDATE alembic_version SET version_num = 'ffff'")
    for arguments in (("migrate",), ("migrate", "--check")):
        done = deployment.run(*arguments)
        assert (done.returncode, done.stderr.count("\n")) == (5, 1)
        assert "revision ffff, which this version does not know: install a newer" in done.stderr
