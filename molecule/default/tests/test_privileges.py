"""Who may do what in the database: exactly what privileges.txt says, which the catalogues are compared with."""

from pathlib import Path

from conftest import Psql

HERE = Path(__file__).parent
COMMITTED = HERE / "privileges.txt"


def catalogues(psql: Psql) -> list[str]:
    """Return every role, membership and privilege of every database, a line each."""
    databases = [name for (name,) in psql("SELECT datname FROM pg_database WHERE datallowconn ORDER BY datname")]
    script = ["\\set QUIET on", (HERE / "roles.sql").read_text()]
    for database in databases:
        script += [f"\\connect {database}", (HERE / "privileges.sql").read_text()]
    return [line for (line,) in psql("\n".join(script))]


def test_privileges_are_exactly_the_committed_ones(psql: Psql) -> None:
    found, committed = catalogues(psql), COMMITTED.read_text().splitlines()[2:]
    missing, added = (
        [line for line in committed if line not in found],
        [line for line in found if line not in committed],
    )
    assert (missing, added) == ([], [])
    assert found == committed


ADDED = {
    "GRANT UPDATE (gateway) ON requests TO litellm_reader": "litellm | column public.requests.gateway",
    "GRANT EXECUTE ON FUNCTION pg_read_file(text) TO litellm_reader": "litellm | system pg_read_file(text)",
    "GRANT SELECT ON pg_authid TO litellm_monitor": "litellm | system pg_authid | litellm_monitor | SELECT",
    "GRANT SET ON PARAMETER log_statement TO litellm_reader": "litellm | parameter log_statement | litellm_reader",
    "GRANT pg_signal_backend TO litellm_reader": "member | litellm_reader | pg_signal_backend",
    "ALTER DEFAULT PRIVILEGES FOR ROLE litellm_owner GRANT SELECT ON TABLES TO litellm_reader": "litellm | default",
    "CREATE FUNCTION added() RETURNS int LANGUAGE sql AS 'SELECT 1'": "litellm | function public.added() | PUBLIC",
    "CREATE TYPE added AS ENUM ()": "litellm | type public.added | PUBLIC | USAGE",
}


def undone(change: str) -> str:
    """Return the statement that takes a change back."""
    if change.startswith("CREATE"):
        return "DROP {} {}".format(*change.split()[1:3])
    return change.replace("GRANT ", "REVOKE ").replace(" TO ", " FROM ")


def test_another_privilege_of_any_kind_is_seen(psql: Psql) -> None:
    before = catalogues(psql)
    psql("; ".join(ADDED))
    after = catalogues(psql)
    psql("; ".join(map(undone, ADDED)))
    assert catalogues(psql) == before
    assert [change for change, line in ADDED.items() if not any(new.startswith(line) for new in after)] == []
