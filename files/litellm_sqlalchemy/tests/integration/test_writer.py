"""The writer against a database that fails in every way it can: it waits, says why, and delivers in the end."""

import json
import os
import shutil
import signal
import socket
import statistics
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import psycopg2
import pytest
from faults.proxy import FaultProxy, Toxics, fault_proxy
from support.harness import Harness
from support.postgresql import Database, Server
from support.processes import OTHER, Deployment, WriterProcess
from support.waiting import wait_until

from litellm_sqlalchemy.producer import Producer
from litellm_sqlalchemy.writer import Writer


@pytest.fixture
def proxy(server: Server, deployment: Deployment) -> Iterator[FaultProxy]:
    """A proxy that the deployment's settings point at."""
    with fault_proxy(server.port) as proxy:
        deployment.update(database={"port": proxy.port})
        yield proxy


def test_server_restarts_under_load(harness: Harness) -> None:  # F01
    harness.writer.start()
    for calls in range(200, 1001, 200):
        harness.send(200)
        wait_until(lambda calls=calls: harness.status.delivered_requests > calls - 200, "some of it is delivered")  # type: ignore[misc]
    harness.server.restart()
    harness.send(200)
    wait_until(lambda: harness.status.spooled == 0, "delivered within 5 s after the restart", 5)
    harness.settled()


def test_server_is_killed_under_load(harness: Harness) -> None:  # F02
    harness.writer.start()
    harness.send(1000)
    wait_until(lambda: harness.status.delivered_requests > 0, "some of it is delivered")
    harness.server.kill()
    harness.send(500)
    harness.degraded("retry")
    harness.server.start()
    harness.settled()


def test_outage_under_steady_load(harness: Harness) -> None:  # F04
    """The spool grows with what comes in; what came in during the outage is delivered in less time than that took."""
    harness.writer.start()
    end = threading.Event()

    def load() -> None:
        while not end.wait(0.05):
            harness.send(10)

    with ThreadPoolExecutor(1) as pool:
        sender = pool.submit(load)
        harness.server.stop()
        stopped, before = time.monotonic(), harness.status.spool_bytes
        grown = [before]
        for _ in range(6):
            end.wait(0.5)
            grown.append(harness.status.spool_bytes)
        harness.server.start()
        outage = time.monotonic() - stopped
        wait_until(lambda: harness.status.spooled < 100, "drained at twice the rate of arrival", outage)
        end.set()
        sender.result(10)
    steps = [after - before for before, after in pairwise(grown)]
    assert min(steps) > 0
    assert max(steps) < 3 * statistics.mean(steps)
    harness.settled()


def test_server_is_down_when_the_writer_starts(harness: Harness) -> None:
    harness.server.stop()
    harness.send(100)
    harness.writer.start()
    harness.degraded("retry", "Connection refused")
    harness.server.start()
    harness.settled()


def test_the_database_is_missed_before_there_is_anything_to_deliver(harness: Harness) -> None:
    """Who looks at the health after a start or at night shall not learn of an outage from the first call."""
    harness.server.stop()
    harness.writer.start()
    harness.degraded("retry", "Connection refused")
    harness.server.start()
    harness.settled()


def test_files_that_cannot_be_read_keep_no_others_back(
    others_deployment: Deployment, server: Server, database: Database
) -> None:
    deployment, writer = others_deployment, WriterProcess(others_deployment)
    harness = Harness(server, database, deployment, writer)
    other = Producer(deployment.load().spool)
    harness.ledger.send(other, 5)
    [segment] = deployment.spool.rglob("*.seg")
    segment.with_name("stray.seg").touch()
    segment.chmod(0)
    try:
        harness.send(20)
        writer.start(user=OTHER)
        harness.degraded("spool", f"{segment}: Permission denied")
        wait_until(lambda: harness.status.delivered_requests == 20, "the others' frames are delivered")
        harness.degraded("spool", str(segment))
        segment.chmod(0o600)
        harness.settled()
    finally:
        other.close()
        harness.close()


def test_no_connection_is_left(harness: Harness) -> None:  # F11
    others = []
    try:
        while True:
            try:
                others.append(
                    psycopg2.connect(
                        host=harness.server.address, port=harness.server.port, dbname=harness.database.name,
                        user="litellm_reader_a", password=harness.server.passwords["reader"],
                    )
                )  # fmt: skip
            except psycopg2.OperationalError:
                break
        assert len(others) > 30
        assert harness.server.query("SELECT 1") == [(1,)], "the reserved connections keep the administrator in"
        harness.writer.start()
        harness.send(50)
        harness.degraded("retry", "remaining connection slots are reserved")
    finally:
        for other in others:
            other.close()
    harness.settled()


def test_database_is_read_only(harness: Harness) -> None:  # F18
    """As a demoted primary is: its connections must not be kept when another takes over."""
    harness.writer.start()
    harness.send(50)
    harness.drained()
    mine = "SELECT pid FROM pg_stat_activity WHERE usename = 'litellm_writer_a' AND datname = %s"
    [(before,)] = harness.server.query(mine, harness.database.name)
    harness.server.execute("ALTER SYSTEM SET default_transaction_read_only = on", "SELECT pg_reload_conf()")
    try:
        wait_until(
            lambda: harness.database.value("SHOW default_transaction_read_only") == "on", "the server is read-only"
        )
        harness.send(50)
        harness.degraded("read_only")
        assert not harness.server.query("SELECT FROM pg_stat_activity WHERE pid = %s AND state <> 'idle'", before)
    finally:
        harness.server.execute("ALTER SYSTEM RESET default_transaction_read_only", "SELECT pg_reload_conf()")
    harness.settled()
    assert not harness.server.query("SELECT FROM pg_stat_activity WHERE pid = %s", before), "the old connection is gone"


def test_tables_are_missing_until_migrate_is_run(harness: Harness) -> None:  # F19
    harness.database.drop()
    harness.server.create_database(harness.database.name)
    harness.writer.start()
    harness.send(50)
    harness.degraded("schema", "run `litellm-sqlalchemy migrate`")
    assert harness.deployment.run("migrate").returncode == 0
    harness.settled()


def test_tables_of_another_version_condemn_no_row(harness: Harness) -> None:
    """A newer schema wants a column that this version does not know: not the rows' fault."""
    harness.database.execute(
        "ALTER TABLE requests ADD COLUMN novel text NOT NULL",
        "UPDATE alembic_version SET version_num = 'ffff'",
    )
    head = harness.database.value("SELECT version_num FROM alembic_version")
    harness.writer.start()
    harness.send(50)
    harness.degraded("schema", "install a newer litellm-sqlalchemy")
    harness.database.execute(
        "ALTER TABLE requests DROP COLUMN novel", f"UPDATE alembic_version SET version_num = '{head}'"
    )
    harness.settled()


def test_privilege_is_missing(harness: Harness) -> None:
    harness.database.execute("REVOKE INSERT ON responses FROM litellm_writer")
    harness.writer.start()
    harness.send(50)
    harness.degraded("pause", "permission denied")
    assert harness.deployment.run("migrate").returncode == 0, "migrate grants what is missing"
    harness.settled()


def test_password_is_rotated(harness: Harness) -> None:  # F55
    harness.writer.start()
    assert harness.writer.process is not None
    process = harness.writer.process.pid
    harness.send(20)
    harness.drained()
    try:
        harness.server.execute(
            "ALTER ROLE litellm_writer_a PASSWORD 'another'",
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'litellm_writer_a'",
        )
        harness.send(20)
        harness.degraded("credential", "password authentication failed")
        (harness.deployment.directory / "credentials" / "writer.json").unlink()
        harness.degraded("credential", "cannot be read")
        harness.deployment.write_credential("writer", "another")
        harness.settled()
        assert harness.writer.process.pid == process
        assert "another" not in harness.writer.log.read_text()
    finally:
        harness.server.execute(f"ALTER ROLE litellm_writer_a PASSWORD '{harness.server.passwords['writer']}'")


@pytest.mark.parametrize(
    ("certificate", "trusted", "seen"),
    [
        ({"begins": -9, "ends": -3}, True, "has ended"),
        ({"begins": 3, "ends": 9}, True, "begins"),
        ({}, False, "self-signed certificate"),
        ({"address": "127.0.0.2"}, True, "IP address mismatch"),
    ],
    ids=["expired", "not yet valid", "of another authority", "of another host"],
)
def test_certificate_is_refused(  # F57
    certificate: dict[str, Any], trusted: bool, seen: str, harness: Harness
) -> None:
    server = harness.server
    files = [server.certificate, server.directory / "server.key"]
    usual = [file.read_bytes() for file in files]
    old = harness.deployment.directory / "old.crt"
    old.write_bytes(usual[0])
    try:
        server.certify(**certificate)
        server.execute("SELECT pg_reload_conf()")
        if not trusted:
            harness.deployment.update(database={"sslrootcert": str(old)})
        harness.send(10)
        harness.writer.start()
        harness.degraded("retry", "tells about the certificate")
        done = harness.deployment.run("validate", "--json")
        assert (done.returncode, done.stderr) == (1, "")
        report = json.loads(done.stdout)
        [check] = [check for check in report["checks"] if check["id"] == "database.certificate"]
        assert not check["ok"]
        assert seen in check["seen"]
    finally:
        for file, content in zip(files, usual, strict=True):
            file.write_bytes(content)
        server.execute("SELECT pg_reload_conf()")
    harness.settled()


@pytest.mark.parametrize(
    "toxics",
    [Toxics(latency=0.3), Toxics(bandwidth=50_000, slice=700), Toxics(slice=1)],
    ids=["latency", "50 kB/s in slices", "single bytes"],
)
def test_slow_network(toxics: Toxics, proxy: FaultProxy, harness: Harness) -> None:  # F07, F08
    proxy.toxics = toxics
    started = time.monotonic()
    harness.send(100)
    assert time.monotonic() - started < 1, "the gateway's side does not wait"
    harness.writer.start()
    harness.settled()
    assert proxy.connections == 1, "one connection, used again"


def test_connections_are_reset_again_and_again(proxy: FaultProxy, harness: Harness) -> None:  # F09
    harness.deployment.update(writer={"batch_size": 50})
    harness.writer.start()
    harness.send(10)
    harness.drained()
    before = harness.writer.resources()
    host, port = harness.deployment.content["writer"]["listen"].split(":")
    with socket.create_connection((host, int(port))):
        wait_until(lambda: harness.writer.resources().descriptors > before.descriptors, "a connection is seen")
        wait_until(lambda: harness.writer.resources().threads > before.threads, "and the thread that serves it")
    for number in range(15):
        harness.send(60)
        wait_until(lambda number=number: harness.status.delivered_requests > 60 * number, "some of it is delivered")  # type: ignore[misc]
        proxy.reset()
    harness.settled()
    wait_until(lambda: harness.writer.resources().within(before), "no file descriptor and no thread is left over")


def test_session_is_ended_in_the_middle_of_a_batch(harness: Harness) -> None:
    """The health tells why, not that there was nothing left to roll back."""
    harness.writer.start()
    with harness.server.connection(harness.database.name) as holder, holder.cursor() as cursor:
        cursor.execute("BEGIN; LOCK TABLE responses IN EXCLUSIVE MODE")
        harness.send(50)
        waiting = (
            "SELECT pg_terminate_backend(pid) FROM pg_locks WHERE relation = 'responses'::regclass AND NOT granted"
        )
        wait_until(lambda: harness.database.query(waiting), "the writer waits for the table")
        harness.degraded("retry", "SSL connection has been closed unexpectedly")
    harness.settled()


def test_partition(proxy: FaultProxy, harness: Harness) -> None:  # F24
    harness.deployment.update(database={"connect_timeout": 2})
    harness.writer.start()
    harness.send(20)
    harness.drained()
    proxy.toxics = Toxics(frozen=True)
    proxy.reset()
    harness.send(200)
    harness.degraded("retry", "timeout expired")
    proxy.toxics = Toxics()
    harness.settled()


def test_a_server_that_takes_all_and_answers_nothing(proxy: FaultProxy, harness: Harness) -> None:
    """As behind a proxy, or a server that is stopped: TCP is well, so that no timeout of the network ends it."""
    harness.deployment.update(writer={"statement_timeout": 1}, database={"connect_timeout": 2})
    harness.writer.start()
    harness.send(20)
    harness.drained()
    proxy.toxics = Toxics(frozen=True)
    harness.send(200)
    harness.degraded("retry", "no answer within 6 s")
    assert harness.writer.stop(15) == 0
    harness.writer.start()
    proxy.toxics = Toxics()
    harness.settled()


def test_stop_with_ten_thousand_queued(harness: Harness) -> None:  # F37
    harness.send(5000)
    harness.writer.start()
    wait_until(lambda: harness.status.delivered_requests > 0, "some of it is delivered")
    started = time.monotonic()
    assert harness.writer.stop() == 0
    assert time.monotonic() - started < 10
    harness.check()
    harness.writer.start()
    harness.settled()


def test_stop_while_the_database_is_down(harness: Harness) -> None:
    harness.writer.start()
    harness.server.stop()
    harness.send(10)
    harness.degraded("retry")
    started = time.monotonic()
    assert harness.writer.stop() == 0
    assert time.monotonic() - started < 5
    harness.server.start()
    assert harness.check().spooled == 20


def test_several_gateway_processes(harness: Harness) -> None:  # F42
    spool = harness.deployment.load().spool
    producers = [Producer(spool) for _ in range(4)]
    harness.writer.start()
    for _ in range(20):
        for producer in producers:
            harness.ledger.send(producer, 5)
    for producer in producers:
        producer.close()
    harness.settled()
    wait_until(lambda: not list((harness.deployment.spool / "producers").iterdir()), "ended producers leave no folder")


def test_a_segment_that_is_delivered_twice(harness: Harness) -> None:  # F53
    harness.send(100)
    copy = harness.deployment.directory / "copy"
    shutil.copytree(harness.deployment.spool, copy)
    harness.writer.start()
    harness.drained()
    assert harness.writer.stop() == 0
    shutil.rmtree(harness.deployment.spool)
    copy.rename(harness.deployment.spool)  # a spool restored from a snapshot, older than the tables
    harness.writer.start()
    harness.drained()
    wait_until(lambda: harness.status.duplicates >= 200, "delivered again")
    assert (harness.database.count("requests"), harness.database.count("responses")) == (100, 100)
    assert harness.check(killed=True).delivered_requests == 100


def test_a_burst_of_100_000_events_needs_bounded_memory(harness: Harness) -> None:  # F54
    harness.send(50_000)
    started = time.monotonic()
    harness.writer.start()
    peak = 0.0

    def drained() -> bool:
        nonlocal peak
        peak = max(peak, harness.writer.resident_megabytes())
        return harness.writer.metrics().get('litellm_sqlalchemy_frames{fate="delivered_responses"}', 0) >= 50_000

    wait_until(drained, "100,000 events are delivered", timeout=90, interval=0.2)
    print(f"{100_000 / (time.monotonic() - started):.0f} events/s, {peak:.0f} MB")
    assert peak < 80
    harness.settled()


def test_large_payloads_need_bounded_memory(harness: Harness) -> None:
    harness.send(60, b'"' + os.urandom(512 * 1024).hex().encode() + b'"')
    harness.writer.start()
    peak = 0.0

    def drained() -> bool:
        nonlocal peak
        peak = max(peak, harness.writer.resident_megabytes())
        return harness.status.spooled == 0

    wait_until(drained, "all is delivered", timeout=60, interval=0.05)
    assert peak < 120
    harness.settled()


def test_a_gateway_process_that_dies_leaves_interrupted_calls(harness: Harness) -> None:
    harness.send(3)
    for _ in range(2):
        harness.begin()
    harness.writer.start()
    harness.drained()
    assert harness.database.value("SELECT count(*) FROM responses WHERE status = 'interrupted'") == 0, "it still runs"
    harness.producer.close()
    wait_until(lambda: harness.status.interrupted == 2, "its end is noticed")
    harness.settled()


@pytest.mark.parametrize("form", ["text", "json"])
def test_log_lines(form: str, harness: Harness) -> None:
    harness.deployment.update(logging={"format": form, "level": "WARNING"})
    harness.server.stop()
    harness.writer.start()
    harness.send(3, b'{"messages":[{"content":"a word of the client"}]}')
    harness.degraded("retry")
    harness.server.start()
    harness.settled()
    lines = harness.writer.log.read_text().splitlines()
    assert lines
    assert "a word" not in str(lines)
    if form == "json":
        records = [json.loads(line) for line in lines]
        assert {record["level"] for record in records} == {"WARNING"}
        assert set(records[0]) == {"time", "level", "logger", "message"}
        lines = [record["message"] for record in records]
    else:
        assert all(line.startswith("WARNING ") for line in lines)
    assert "cannot deliver (retry): " in lines[0]


def test_a_second_writer_is_refused(harness: Harness) -> None:
    harness.writer.start()
    assert harness.writer.process is not None
    done = harness.deployment.run("write")
    assert done.returncode == 7
    assert done.stderr.count("\n") == 1
    assert f"held by process {harness.writer.process.pid}" in done.stderr


def test_an_address_that_is_taken(harness: Harness) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        harness.deployment.update(writer={"listen": f"127.0.0.1:{taken.getsockname()[1]}"})
        done = harness.deployment.run("write")
    assert (done.returncode, done.stderr.count("`writer.listen` is '127.0.0.1:")) == (3, 1)
    assert "Address already in use" in done.stderr


def test_the_writer_survives_a_signal_to_itself_only_as_asked(harness: Harness) -> None:
    harness.writer.start()
    assert harness.writer.process is not None
    harness.writer.process.send_signal(signal.SIGINT)
    assert harness.writer.process.wait(10) == 0


def test_connections_in_use_are_counted_after_the_pool_was_replaced(harness: Harness) -> None:
    """As for a demoted primary, whose connections are all given up."""
    writer = Writer(harness.deployment.load())
    writer.engine.dispose()
    with writer.engine.connect():
        assert b"litellm_sqlalchemy_pool_connections 1.0" in writer._monitor.metrics()
    writer._consumer.close()
    writer.engine.dispose()


@pytest.mark.parametrize("alive", [False, True], ids=["gateway gone", "gateway alive"])
def test_a_folder_that_is_removed_while_its_batch_waits(alive: bool, harness: Harness) -> None:
    """Somebody made room by hand: the batch is delivered, and so is what others write."""
    removed = Producer(harness.deployment.load().spool)
    harness.ledger.send(removed, 5)
    if not alive:
        removed.close()
    harness.server.stop()
    harness.writer.start()
    harness.degraded("retry")
    shutil.rmtree(harness.deployment.spool / "producers" / removed._name)
    harness.send(5)
    harness.server.start()
    harness.settled()
    removed.close()
