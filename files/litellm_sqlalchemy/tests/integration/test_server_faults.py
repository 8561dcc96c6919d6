"""PostgreSQL on disks that fill up or rot, and behind a network that loses packets; each with a server of its own."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from faults.disks import file_system, full_disk
from faults.network import far_side
from faults.pages import damaged_page, last_page
from support.harness import Harness
from support.postgresql import Server
from support.processes import Deployment, WriterProcess
from support.waiting import wait_until

from litellm_sqlalchemy.migrate import migrate

#: 16 kB that no compression makes smaller.
_LARGE = b'"' + os.urandom(8000).hex().encode() + b'"'


@contextmanager
def _harness(server: Server, directory: Path) -> Iterator[Harness]:
    """Yield a harness around a server that was made for it, and stop both."""
    deployment = Deployment.create(directory, server, "log")
    try:
        harness = Harness(server, server.create_database("log"), deployment, WriterProcess(deployment))
        migrate(deployment.load())
        yield harness
        harness.close()
    finally:
        if server.is_running():
            server.stop("immediate")


@contextmanager
def _place() -> Iterator[Path]:
    """Yield a directory of PostgreSQL's user, in memory."""
    with tempfile.TemporaryDirectory(prefix="pg-", dir="/dev/shm", ignore_cleanup_errors=True) as directory:
        yield _owned(Path(directory))


def _owned(directory: Path) -> Path:
    directory.mkdir(exist_ok=True)
    shutil.chown(directory, "postgres", "postgres")
    return directory


def test_disk_of_the_tables_is_full(tmp_path: Path) -> None:  # F15
    with file_system(128) as disk, _place() as elsewhere:
        server = Server(disk / "server")
        server.create(f"--waldir={_owned(elsewhere / 'wal')}")
        with _harness(server, tmp_path) as harness:
            harness.writer.start()
            harness.send(10)
            harness.drained()
            with full_disk(disk, free=200 * 1024):
                harness.send(100, _LARGE)
                harness.degraded("pause", "No space left on device")
                assert server.is_running()
            harness.settled()


def test_disk_of_the_wal_is_full(tmp_path: Path) -> None:  # F16
    """PostgreSQL panics and may stop for good; it comes back when there is room and it is started."""
    with file_system(64) as disk, _place() as place:
        server = Server(place)
        settings = "min_wal_size = 2MB\nwal_recycle = off\n"
        server.create(f"--waldir={_owned(disk / 'wal')}", "--wal-segsize=1", configuration=settings)
        with _harness(server, tmp_path) as harness:
            harness.writer.start()
            harness.send(10)
            harness.drained()
            server.execute("CHECKPOINT")
            with full_disk(disk, free=100 * 1024):
                harness.send(400, _LARGE)
                harness.degraded("retry")
                wait_until(lambda: "PANIC" in _log(server), "PostgreSQL panics")
            wait_until(lambda: server.revived(), "PostgreSQL is back")
            harness.settled()


def _log(server: Server) -> str:
    return (server.directory / "server.log").read_text(errors="replace")


def test_archiving_fails(tmp_path: Path) -> None:  # F17
    """The log goes on; that segments pile up is for the database's own monitoring to see."""
    with _place() as place:
        server = Server(place)
        settings = "archive_mode = on\narchive_command = 'false'\n"
        server.create("--wal-segsize=1", configuration=settings)
        with _harness(server, tmp_path) as harness:
            harness.writer.start()
            harness.send(100, _LARGE)
            wait_until(lambda: server.query("SELECT FROM pg_stat_archiver WHERE failed_count > 0"), "archiving fails")
            harness.settled()
            server.execute("ALTER SYSTEM SET archive_command = 'true'", "SELECT pg_reload_conf()")
            wait_until(
                lambda: server.query("SELECT FROM pg_stat_archiver WHERE last_archived_time > last_failed_time"),
                "archiving goes on", timeout=70,
            )  # fmt: skip
            harness.settled()


def test_a_damaged_page_costs_the_calls_that_need_it_and_no_other(harness: Harness) -> None:  # F20
    harness.writer.start()
    call = harness.begin()
    harness.send(300)
    harness.drained()
    with damaged_page(harness.database, "requests", 0):
        harness.end(call)  # the foreign key looks at the request
        harness.send(100)
        harness.drained()
        assert (harness.status.dead, harness.status.delivered_responses) == (1, 400)
        [letter] = json.loads(harness.deployment.run("dead-letters", "list", "--json").stdout)
        assert letter["call"] == call
        assert "invalid page in block 0" in letter["reason"]
        done = harness.deployment.run("calls", "--last", "1000")
        assert (done.returncode, done.stderr.count("\n")) == (4, 1)
        assert "invalid page in block 0" in done.stderr
        report = json.loads(harness.deployment.run("validate", "--json").stdout)
        assert "database.checksums" in [check["id"] for check in report["checks"] if not check["ok"]]
    assert harness.deployment.run("dead-letters", "requeue").returncode == 0
    wait_until(lambda: harness.status.dead == 0 and harness.status.spooled == 0, "the call is complete")
    harness.settled()


def test_a_damaged_page_that_new_rows_need_condemns_none(harness: Harness) -> None:  # F20
    harness.writer.start()
    harness.send(100)
    harness.drained()
    with damaged_page(harness.database, "requests", last_page(harness.database, "requests")):
        harness.send(100)
        harness.degraded("pause", "invalid page in block")
        assert harness.status.dead == 0
    harness.settled()


@pytest.mark.timeout(900)
def test_network_loses_a_third_of_its_packets(tmp_path: Path) -> None:  # F26
    """Half of the round trips fail, and TCP waits twice as long each time: what often takes 10 s may take minutes."""
    with far_side() as far, _place() as place:
        server = Server(place, address=far.address, prefix=far.prefix)
        server.create()
        with _harness(server, tmp_path) as harness:
            harness.deployment.update(database={"connect_timeout": 30})
            far.lose(30)
            harness.writer.start()
            for _ in range(3):
                delivered = harness.status.delivered_requests
                harness.send(50)
                wait_until(
                    lambda before=delivered: harness.status.delivered_requests > before,  # type: ignore[misc]
                    "some arrive all the same", timeout=240,
                )  # fmt: skip
            assert far.heal() > 10, "packets were lost"
            harness.settled()
