"""The writer against a database that fails in every way it can: it waits, says why, and delivers in the end."""

import os
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import psycopg2
import pytest
from faults.proxy import FaultProxy, Toxics, fault_proxy
from support.oracle import check
from support.postgresql import Database, Server
from support.processes import Deployment, WriterProcess
from support.records import BODY, Ledger
from support.waiting import wait_until

from litellm_sqlalchemy.frames import Kind
from litellm_sqlalchemy.spool import Producer
from litellm_sqlalchemy.status import spool_status


@pytest.fixture
def producer(deployment: Deployment) -> Iterator[Producer]:
    """A gateway process's end of the spool."""
    producer = Producer(deployment.load().spool)
    yield producer
    producer.close()


@pytest.fixture
def proxy(server: Server, deployment: Deployment) -> Iterator[FaultProxy]:
    """A proxy that the deployment's settings point at."""
    with fault_proxy(server.port) as proxy:
        deployment.update(database={"port": proxy.port})
        yield proxy


def _drained(deployment: Deployment, timeout: float = 30) -> None:
    wait_until(lambda: spool_status(deployment.spool).spooled == 0, "the spool is drained", timeout)


def _settled(ledger: Ledger, database: Database, deployment: Deployment, writer: WriterProcess) -> None:
    """Everything has arrived, once, and the writer says that all is well."""
    _drained(deployment)
    status = check(ledger, database, deployment.spool)
    assert (status.dead, status.damaged, status.dropped, status.spooled) == (0, 0, 0, 0)
    wait_until(lambda: writer.health() == {"status": "ok"}, "the writer is well again")


def _degraded(writer: WriterProcess, cause: str, text: str = "", timeout: float = 20) -> None:
    def seen() -> bool:
        health = writer.health()
        return health.get("cause") == cause and text in health["message"]

    wait_until(seen, f"the health names {cause} and {text!r}: {writer.health()}", timeout)


def test_server_restarts_under_load(
    server: Server, database: Database, deployment: Deployment, writer: WriterProcess, producer: Producer
) -> None:
    ledger = Ledger()
    writer.start()
    for _ in range(5):
        ledger.send(producer, 200)
        time.sleep(0.05)
    server.restart()
    back = time.monotonic()
    ledger.send(producer, 200)
    wait_until(lambda: spool_status(deployment.spool).spooled == 0, "delivered within 5 s after the restart", 5)
    assert time.monotonic() - back < 5
    _settled(ledger, database, deployment, writer)


def test_server_is_killed_under_load(
    server: Server, database: Database, deployment: Deployment, writer: WriterProcess, producer: Producer
) -> None:
    ledger = Ledger()
    writer.start()
    ledger.send(producer, 1000)
    wait_until(lambda: spool_status(deployment.spool).delivered_requests > 0, "some of it is delivered")
    server.kill()
    ledger.send(producer, 500)
    _degraded(writer, "retry")
    server.start()
    _settled(ledger, database, deployment, writer)


def test_server_is_down_when_the_writer_starts(
    server: Server, database: Database, deployment: Deployment, writer: WriterProcess, producer: Producer
) -> None:
    ledger = Ledger()
    server.stop()
    ledger.send(producer, 100)
    writer.start()
    _degraded(writer, "retry", "Connection refused")
    server.start()
    _settled(ledger, database, deployment, writer)


def test_no_connection_is_left(
    server: Server, database: Database, deployment: Deployment, writer: WriterProcess, producer: Producer
) -> None:
    ledger = Ledger()
    others = []
    try:
        while True:
            try:
                others.append(
                    psycopg2.connect(
                        host="127.0.0.1", port=server.port, dbname=database.name, user="litellm_reader_a",
                        password=server.passwords["reader"],
                    )
                )  # fmt: skip
            except psycopg2.OperationalError:
                break
        assert len(others) > 30
        assert server.query("SELECT 1") == [(1,)], "the reserved connections keep the administrator in"
        writer.start()
        ledger.send(producer, 50)
        _degraded(writer, "retry", "remaining connection slots are reserved")
    finally:
        for other in others:
            other.close()
    _settled(ledger, database, deployment, writer)


def test_database_is_read_only(
    server: Server, database: Database, deployment: Deployment, writer: WriterProcess, producer: Producer
) -> None:
    """As a demoted primary is: its connections must not be kept when another takes over."""
    ledger = Ledger()
    writer.start()
    ledger.send(producer, 50)
    _drained(deployment)
    [(before,)] = server.query("SELECT pid FROM pg_stat_activity WHERE application_name = 'litellm-sqlalchemy writer'")
    server.execute("ALTER SYSTEM SET default_transaction_read_only = on", "SELECT pg_reload_conf()")
    try:
        wait_until(lambda: _setting(database, "default_transaction_read_only") == "on", "the server is read-only")
        ledger.send(producer, 50)
        _degraded(writer, "read_only")
        assert not server.query("SELECT FROM pg_stat_activity WHERE pid = %s AND state <> 'idle'", before)
    finally:
        server.execute("ALTER SYSTEM RESET default_transaction_read_only", "SELECT pg_reload_conf()")
    _settled(ledger, database, deployment, writer)
    assert not server.query("SELECT FROM pg_stat_activity WHERE pid = %s", before), "the old connection is gone"


def _setting(database: Database, name: str) -> str:
    return str(database.value(f"SHOW {name}"))


def test_tables_are_missing_until_migrate_is_run(
    server: Server, database: Database, deployment: Deployment, writer: WriterProcess, producer: Producer
) -> None:
    ledger = Ledger()
    database.drop()
    server.create_database(database.name)
    writer.start()
    ledger.send(producer, 50)
    _degraded(writer, "schema", "run `litellm-sqlalchemy migrate`")
    assert deployment.run("migrate").returncode == 0
    _settled(ledger, database, deployment, writer)


def test_tables_of_another_version_condemn_no_row(
    database: Database, deployment: Deployment, writer: WriterProcess, producer: Producer
) -> None:
    """A newer schema wants a column that this version does not know: not the rows' fault."""
    ledger = Ledger()
    database.execute(
        "ALTER TABLE requests ADD COLUMN novel text NOT NULL",
        "UPDATE alembic_version SET version_num = 'ffff'",
    )
    [(head,)] = [("".join(path.name[:4] for path in _migrations()[-1:]),)]
    writer.start()
    ledger.send(producer, 50)
    _degraded(writer, "schema", "install a newer litellm-sqlalchemy")
    database.execute("ALTER TABLE requests DROP COLUMN novel", f"UPDATE alembic_version SET version_num = '{head}'")
    _settled(ledger, database, deployment, writer)


def _migrations() -> list[Path]:
    import litellm_sqlalchemy

    return sorted((Path(litellm_sqlalchemy.__file__).parent / "migrations" / "versions").glob("[0-9]*.py"))


def test_privilege_is_missing(
    database: Database, deployment: Deployment, writer: WriterProcess, producer: Producer
) -> None:
    ledger = Ledger()
    database.execute("REVOKE INSERT ON responses FROM litellm_writer")
    writer.start()
    ledger.send(producer, 50)
    _degraded(writer, "pause", "permission denied")
    assert deployment.run("migrate").returncode == 0, "migrate grants what is missing"
    _settled(ledger, database, deployment, writer)


def test_password_is_rotated(
    server: Server, database: Database, deployment: Deployment, writer: WriterProcess, producer: Producer
) -> None:
    ledger = Ledger()
    writer.start()
    assert writer.process is not None
    process = writer.process.pid
    ledger.send(producer, 20)
    _drained(deployment)
    try:
        server.execute(
            "ALTER ROLE litellm_writer_a PASSWORD 'another'",
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'litellm_writer_a'",
        )
        ledger.send(producer, 20)
        _degraded(writer, "credential", "password authentication failed")
        (deployment.directory / "credentials" / "writer.json").unlink()
        _degraded(writer, "credential", "cannot be read")
        deployment.write_credential("writer", "another")
        _settled(ledger, database, deployment, writer)
        assert writer.process.pid == process
        assert "another" not in writer.log.read_text()
    finally:
        server.execute(f"ALTER ROLE litellm_writer_a PASSWORD '{server.passwords['writer']}'")


@pytest.mark.parametrize(
    "toxics",
    [Toxics(latency=0.3), Toxics(bandwidth=50_000, slice=700), Toxics(slice=1)],
    ids=["latency", "50 kB/s in slices", "single bytes"],
)
def test_slow_network(
    toxics: Toxics, proxy: FaultProxy, database: Database, deployment: Deployment, writer: WriterProcess,
    producer: Producer,
) -> None:  # fmt: skip
    ledger = Ledger()
    proxy.toxics = toxics
    started = time.monotonic()
    ledger.send(producer, 100)
    assert time.monotonic() - started < 1, "the gateway's side does not wait"
    writer.start()
    _settled(ledger, database, deployment, writer)
    assert proxy.connections <= 2, "one connection, used again"


def test_connections_are_reset_again_and_again(
    proxy: FaultProxy, database: Database, deployment: Deployment, writer: WriterProcess, producer: Producer
) -> None:
    deployment.update(writer={"batch_size": 50})
    ledger = Ledger()
    writer.start()
    for _ in range(15):
        ledger.send(producer, 60)
        time.sleep(0.1)
        proxy.reset()
    _settled(ledger, database, deployment, writer)


def test_partition(
    proxy: FaultProxy, database: Database, deployment: Deployment, writer: WriterProcess, producer: Producer
) -> None:
    ledger = Ledger()
    deployment.update(database={"connect_timeout": 2})
    writer.start()
    ledger.send(producer, 20)
    _drained(deployment)
    proxy.toxics = Toxics(frozen=True)
    proxy.reset()
    ledger.send(producer, 200)
    _degraded(writer, "retry", "timeout expired")
    proxy.toxics = Toxics()
    _settled(ledger, database, deployment, writer)


def test_a_server_that_takes_all_and_answers_nothing(
    proxy: FaultProxy, database: Database, deployment: Deployment, writer: WriterProcess, producer: Producer
) -> None:
    """As behind a proxy, or a server that is stopped: TCP is well, so that no timeout of the network ends it."""
    ledger = Ledger()
    deployment.update(writer={"statement_timeout": 1}, database={"connect_timeout": 2})
    writer.start()
    ledger.send(producer, 20)
    _drained(deployment)
    proxy.toxics = Toxics(frozen=True)
    ledger.send(producer, 200)
    _degraded(writer, "retry")
    assert writer.stop(15) == 0
    writer.start()
    proxy.toxics = Toxics()
    _settled(ledger, database, deployment, writer)


def test_disk_of_the_database_is_full(
    server: Server, database: Database, deployment: Deployment, writer: WriterProcess, producer: Producer,
    small_disk: Path,
) -> None:  # fmt: skip
    ledger = Ledger()
    place = small_disk / "tablespace"
    place.mkdir()
    if os.geteuid() == 0:
        shutil.chown(place, "postgres", "postgres")
        small_disk.chmod(0o755)
    try:
        server.execute(f"CREATE TABLESPACE small LOCATION '{place}'")
        database.execute("ALTER TABLE responses SET TABLESPACE small", "ALTER TABLE requests SET TABLESPACE small")
        ballast = small_disk / "ballast"
        with ballast.open("wb") as file:
            while shutil.disk_usage(small_disk).free > 200 * 1024:
                file.write(bytes(64 * 1024))
                file.flush()
        writer.start()
        ledger.send(producer, 600, BODY + b" " * 100 + os.urandom(700).hex().encode())
        _degraded(writer, "pause", "No space left on device")
        ballast.unlink()
        _settled(ledger, database, deployment, writer)
    finally:
        writer.kill()
        database.drop()
        server.execute("DROP TABLESPACE small")


def test_stop_with_ten_thousand_queued(
    database: Database, deployment: Deployment, writer: WriterProcess, producer: Producer
) -> None:
    ledger = Ledger()
    ledger.send(producer, 5000)
    writer.start()
    wait_until(lambda: spool_status(deployment.spool).delivered_requests > 0, "some of it is delivered")
    started = time.monotonic()
    assert writer.stop() == 0
    assert time.monotonic() - started < 10
    check(ledger, database, deployment.spool)
    writer.start()
    _settled(ledger, database, deployment, writer)


def test_stop_while_the_database_is_down(
    server: Server, database: Database, deployment: Deployment, writer: WriterProcess, producer: Producer
) -> None:
    ledger = Ledger()
    writer.start()
    server.stop()
    ledger.send(producer, 10)
    _degraded(writer, "retry")
    started = time.monotonic()
    assert writer.stop() == 0
    assert time.monotonic() - started < 5
    server.start()
    assert check(ledger, database, deployment.spool).spooled == 20


def test_several_gateway_processes(database: Database, deployment: Deployment, writer: WriterProcess) -> None:
    spool = deployment.load().spool
    producers = [Producer(spool) for _ in range(4)]
    ledger = Ledger()
    writer.start()
    for _ in range(20):
        for producer in producers:
            ledger.send(producer, 5)
    for producer in producers:
        producer.close()
    _settled(ledger, database, deployment, writer)
    wait_until(lambda: not list((deployment.spool / "producers").iterdir()), "ended producers leave no folder")


def test_a_segment_that_is_delivered_twice(
    database: Database, deployment: Deployment, writer: WriterProcess, producer: Producer
) -> None:
    ledger = Ledger()
    ledger.send(producer, 100)
    copy = deployment.directory / "copy"
    shutil.copytree(deployment.spool, copy)
    writer.start()
    _drained(deployment)
    assert writer.stop() == 0
    shutil.rmtree(deployment.spool)
    copy.rename(deployment.spool)  # a spool restored from a snapshot, older than the tables
    writer.start()
    _drained(deployment)
    wait_until(lambda: spool_status(deployment.spool).duplicates >= 200, "delivered again")
    assert (database.count("requests"), database.count("responses")) == (100, 100)
    assert check(ledger, database, deployment.spool, killed=True).delivered_requests == 100


def test_a_burst_of_100_000_events_needs_bounded_memory(
    database: Database, deployment: Deployment, writer: WriterProcess, producer: Producer
) -> None:
    ledger = Ledger()
    ledger.send(producer, 50_000)
    started = time.monotonic()
    writer.start()
    peak = 0.0

    def drained() -> bool:
        nonlocal peak
        peak = max(peak, writer.resident_megabytes())
        return writer.metrics().get('litellm_sqlalchemy_frames{fate="delivered_responses"}', 0) >= 50_000

    wait_until(drained, "100,000 events are delivered", timeout=90, interval=0.2)
    print(f"{100_000 / (time.monotonic() - started):.0f} events/s, {peak:.0f} MB")
    assert peak < 100
    _settled(ledger, database, deployment, writer)


def test_large_payloads_need_bounded_memory(
    database: Database, deployment: Deployment, writer: WriterProcess, producer: Producer
) -> None:
    ledger = Ledger()
    ledger.send(producer, 60, b'"' + os.urandom(512 * 1024).hex().encode() + b'"')
    writer.start()
    peak = 0.0

    def drained() -> bool:
        nonlocal peak
        peak = max(peak, writer.resident_megabytes())
        return spool_status(deployment.spool).spooled == 0

    wait_until(drained, "all is delivered", timeout=60, interval=0.05)
    assert peak < 120
    _settled(ledger, database, deployment, writer)


def test_a_gateway_process_that_dies_leaves_interrupted_calls(
    database: Database, deployment: Deployment, writer: WriterProcess
) -> None:
    from support.records import request

    from litellm_sqlalchemy.identifiers import uuid7

    ledger = Ledger()
    producer = Producer(deployment.load().spool)
    ledger.send(producer, 3)
    for _ in range(2):
        call = uuid7().hex
        ledger.append(producer, Kind.REQUEST, call, request(call), BODY)
    writer.start()
    _drained(deployment)
    assert database.value("SELECT count(*) FROM responses WHERE status = 'interrupted'") == 0, "it still runs"
    producer.close()
    wait_until(lambda: spool_status(deployment.spool).interrupted == 2, "its end is noticed")
    _settled(ledger, database, deployment, writer)


def test_a_second_writer_is_refused(deployment: Deployment, writer: WriterProcess) -> None:
    writer.start()
    assert writer.process is not None
    done = deployment.run("write")
    assert done.returncode == 7
    assert done.stderr.count("\n") == 1
    assert f"held by process {writer.process.pid}" in done.stderr


def test_the_writer_survives_a_signal_to_itself_only_as_asked(deployment: Deployment, writer: WriterProcess) -> None:
    writer.start()
    assert writer.process is not None
    writer.process.send_signal(signal.SIGINT)
    assert writer.process.wait(10) == 0
