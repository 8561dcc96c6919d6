"""The command against a real database."""

import signal
import subprocess

from support.postgresql import Database, Server
from support.processes import COMMAND, Deployment, WriterProcess
from support.waiting import wait_until


def test_migrate_again_has_nothing_to_do(deployment: Deployment) -> None:
    done = deployment.run("migrate")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith(": nothing to do\n")


def test_write(writer: WriterProcess) -> None:
    writer.start()
    assert writer.health() == {"status": "ok"}
    assert writer.stop() == 0


def test_an_interrupt_ends_a_query_at_both_sides(deployment: Deployment, database: Database) -> None:
    waiting = "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
    with database.server.connection(database.name) as locking, locking.cursor() as cursor:
        locking.autocommit = False
        cursor.execute("LOCK requests IN ACCESS EXCLUSIVE MODE")
        with subprocess.Popen([*COMMAND, "calls"], env=deployment.environment, stderr=subprocess.PIPE) as process:
            wait_until(lambda: database.query(waiting), "the query is under way")
            process.send_signal(signal.SIGINT)
            assert process.communicate(timeout=30) == (None, b"")
        assert process.returncode == -signal.SIGINT
        wait_until(lambda: not database.query(waiting), "the query has ended")


def test_validate_tells_a_wrong_password_from_a_server_that_is_down(deployment: Deployment, server: Server) -> None:
    deployment.write_credential("reader", "wrong")
    lines = deployment.run("validate").stdout.splitlines()
    [reachable] = [line for line in lines if "database.reachable" in line]
    assert "password authentication failed" in reachable
    assert reachable.endswith("next: run `site.yml`: it puts stored passwords in force")
    server.stop()
    lines = deployment.run("validate").stdout.splitlines()
    [reachable] = [line for line in lines if "database.reachable" in line]
    assert reachable.endswith("next: systemctl status postgresql@17-main")
