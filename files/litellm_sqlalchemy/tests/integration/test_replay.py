"""After the database went back in time, the spool's delivered segments bring back what it lost, exactly once."""

import time
from datetime import UTC, datetime

import pytest
from support.oracle import check
from support.postgresql import Database, Server
from support.processes import Deployment, WriterProcess
from support.records import BODY, Ledger, request, response
from support.waiting import wait_until

from litellm_sqlalchemy import cli
from litellm_sqlalchemy.consumer import READ_SIZE
from litellm_sqlalchemy.errors import DatabaseError, ExitCode
from litellm_sqlalchemy.frames import Frame, Kind, body_size
from litellm_sqlalchemy.identifiers import uuid7
from litellm_sqlalchemy.producer import Producer
from litellm_sqlalchemy.replay import replay
from litellm_sqlalchemy.status import spool_status
from litellm_sqlalchemy.store import Delivery, Store

CALLS = 30


def _delivered(deployment: Deployment, producer: Producer, ledger: Ledger) -> None:
    ledger.send(producer, CALLS)
    wait_until(lambda: spool_status(deployment.spool).spooled == 0, "the spool is drained")


@pytest.mark.parametrize("alive", [True, False], ids=["gateway alive", "gateway gone"])
def test_lost_rows_come_back_once(
    deployment: Deployment, database: Database, writer: WriterProcess, alive: bool
) -> None:
    deployment.update(spool={"segment_size": 4096})
    writer.start()
    producer, ledger = Producer(deployment.load().spool), Ledger()
    _delivered(deployment, producer, ledger)
    since = time.time()
    _delivered(deployment, producer, ledger)
    if not alive:
        producer.close()
    before = spool_status(deployment.spool)
    database.execute(f"DELETE FROM requests WHERE created_at >= to_timestamp({since})")
    result = replay(deployment.load(), since)
    assert (result.restored, result.refused) == (2 * CALLS, 0)
    again = replay(deployment.load(), since)
    assert (again.restored, again.refused) == (0, 0)
    assert again.present >= 2 * CALLS
    assert spool_status(deployment.spool).received == before.received, "the counters know these calls already"
    known = f"CHECK (gateway = '' OR created_at < to_timestamp({since}))"  # without one: that of the store's own probe
    database.execute("TRUNCATE requests CASCADE", f"ALTER TABLE requests ADD CONSTRAINT known {known}")
    done = deployment.run("replay", "--since", "2026-01-01T00:00:00Z")
    half = 2 * CALLS
    expected = f"{half} were missing, 0 were there, {half} were refused (the last one: insert or update on table"
    assert (done.returncode, expected in done.stdout) == (ExitCode.FAILED, True)
    producer.close()


def test_a_time_without_a_zone_is_a_usage_error(deployment: Deployment) -> None:
    with pytest.raises(SystemExit) as ending:
        cli.main(["replay", "--settings", str(deployment.file), "--since", "2026-11-23T14:30:00"])
    assert ending.value.code == ExitCode.USAGE


def test_replay_says_that_the_window_is_shorter(deployment: Deployment, writer: WriterProcess) -> None:
    """What was removed by age or size may be missing, and only that."""
    deployment.update(spool={"segment_size": 4096, "retain_size": 0})
    since = datetime.now(UTC).isoformat()
    Producer(deployment.load().spool).close()
    assert deployment.run("replay", "--since", since).stderr == ""
    writer.start()
    producer = Producer(deployment.load().spool)
    _delivered(deployment, producer, Ledger())
    producer.close()
    wait_until(lambda: not list((deployment.spool / "producers").iterdir()), "the producer's folder is removed")
    assert writer.stop() == 0
    writer.start()  # which looks for what is too much
    wait_until(lambda: "spool.retain" in deployment.run("replay", "--since", since).stderr, "it says so")


def test_a_call_that_ran_while_the_database_went_back(
    deployment: Deployment, database: Database, writer: WriterProcess
) -> None:
    """Its request is gone when the response comes: replay brings back both and leaves no dead letter."""
    writer.start()
    producer, ledger, since = Producer(deployment.load().spool), Ledger(), time.time()
    ledger.send(producer, CALLS)
    call = uuid7().hex
    ledger.append(producer, Kind.REQUEST, call, request(call), BODY)
    wait_until(lambda: spool_status(deployment.spool).delivered_requests == CALLS + 1, "the request is delivered")
    database.execute("TRUNCATE requests, responses, daily_usage")
    ledger.append(producer, Kind.RESPONSE, call, response(call), BODY)
    wait_until(lambda: spool_status(deployment.spool).dead == 1, "the response is refused")
    moment = datetime.fromtimestamp(since, UTC).isoformat()
    done = deployment.run("replay", "--since", moment)
    assert (done.returncode, "1 dead letters have their request again" in done.stdout) == (0, True)
    wait_until(lambda: spool_status(deployment.spool).delivered_responses == CALLS + 1, "it is delivered again")
    wait_until(lambda: deployment.run("status").returncode == 0, "counters and tables agree")
    assert database.query("SELECT status FROM responses WHERE request_id = %s", call) == [("success",)]
    check(ledger, database, deployment.spool)
    producer.close()


def _noted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that is going to have the size of each batch that a store is given."""
    sizes: list[int] = []

    def deliver(store: Store, frames: list[Frame], *, give_up_on_unknown: bool = False) -> Delivery:
        sizes.append(sum(map(body_size, frames)))
        return delivering(store, frames, give_up_on_unknown=give_up_on_unknown)

    delivering = Store.deliver
    monkeypatch.setattr(Store, "deliver", deliver)
    return sizes


def test_batches_have_an_end_in_bytes(
    deployment: Deployment, database: Database, writer: WriterProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thousand frames of a megabyte each would be as much memory, and one transaction."""
    writer.start()
    producer, since = Producer(deployment.load().spool), time.time()
    Ledger().send(producer, 10, b'"' + bytes(500_000).hex().encode() + b'"')
    wait_until(lambda: spool_status(deployment.spool).spooled == 0, "the spool is drained")
    database.execute("TRUNCATE requests, responses, daily_usage")
    sizes = _noted(monkeypatch)
    assert replay(deployment.load(), since).restored == 20
    assert max(sizes) < 2 * READ_SIZE
    producer.close()


def test_a_slow_database_gets_smaller_batches(
    deployment: Deployment, database: Database, writer: WriterProcess
) -> None:
    writer.start()
    producer, ledger, since = Producer(deployment.load().spool), Ledger(), time.time()
    ledger.send(producer, 2 * CALLS)
    wait_until(lambda: spool_status(deployment.spool).spooled == 0, "the spool is drained")
    database.execute(
        "TRUNCATE requests, responses, daily_usage",
        "CREATE FUNCTION idle() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN PERFORM pg_sleep(0.05); RETURN NEW; END$$",
        "CREATE TRIGGER idle BEFORE INSERT ON requests FOR EACH ROW EXECUTE FUNCTION idle()",
    )
    deployment.update(writer={"statement_timeout": 1})  # 20 requests
    result = replay(deployment.load(), since)
    assert (result.seen, result.restored + result.present, result.refused) == (4 * CALLS, 4 * CALLS, 0)
    check(ledger, database, deployment.spool)
    producer.close()


def test_a_database_that_is_away_ends_the_replay(
    deployment: Deployment, server: Server, writer: WriterProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer.start()
    producer, since = Producer(deployment.load().spool), time.time()
    _delivered(deployment, producer, Ledger())
    producer.close()
    server.stop()
    deployment.update(writer={"retry_delay_max": 0.01})
    sizes = _noted(monkeypatch)
    with pytest.raises(DatabaseError, match=r"Connection refused.*; 0 frames were replayed before: run it again"):
        replay(deployment.load(), since)
    assert len(sizes) == 10
    server.start()
    assert replay(deployment.load(), since).present == 2 * CALLS


@pytest.mark.parametrize("lost", ["before the end", "after the end"])
def test_interrupted_calls_come_back(
    lost: str, deployment: Deployment, database: Database, writer: WriterProcess
) -> None:
    """What the writer made up is kept like what the gateway wrote, whether the database took it or not."""
    writer.start()
    producer, ledger, since = Producer(deployment.load().spool), Ledger(), time.time()
    ledger.send(producer, CALLS)
    for call in (uuid7().hex, uuid7().hex):
        ledger.append(producer, Kind.REQUEST, call, request(call), BODY)
    wait_until(lambda: spool_status(deployment.spool).delivered_requests == CALLS + 2, "the requests are delivered")
    if lost == "after the end":
        producer.close()
        wait_until(lambda: spool_status(deployment.spool).interrupted == 2, "their end is noticed")
    database.execute("TRUNCATE requests, responses, daily_usage")
    producer.close()
    wait_until(lambda: not list((deployment.spool / "producers").iterdir()), "the producer's folder is removed")
    done = deployment.run("status")
    assert (done.returncode, f"0 responses are stored of {CALLS + 2}" in done.stdout) == (1, True)
    result = replay(deployment.load(), since)
    assert (result.restored, result.refused) == (2 * CALLS + 4, 0)
    assert deployment.run("status").returncode == 0
    assert database.value("SELECT count(*) FROM responses WHERE status = 'interrupted'") == 2
    check(ledger, database, deployment.spool)
