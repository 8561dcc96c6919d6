"""`erase` leaves nothing of a user in tables, spool and dead letters, and nothing of anybody else is touched."""

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.postgresql import Database
from support.processes import Deployment, WriterProcess
from support.records import BODY, request, response
from support.waiting import wait_until

from litellm_sqlalchemy.dead_letters import bury
from litellm_sqlalchemy.erase import erase
from litellm_sqlalchemy.frames import Frame, Kind
from litellm_sqlalchemy.identifiers import uuid7
from litellm_sqlalchemy.producer import Producer
from litellm_sqlalchemy.replay import replay
from litellm_sqlalchemy.status import spool_status

#: A text that only the user's own records hold.
MARK = b"only-alice-says-this"


def _send(producer: Producer, ended: bool = True, **caller: str) -> str:
    """Append one call."""
    call = uuid7().hex
    body = json.dumps({"content": MARK.decode()}).encode() if "alice" in caller.values() else BODY
    producer.append(Kind.REQUEST, request(call, **caller), body)
    if ended:
        producer.append(Kind.RESPONSE, response(call, total_tokens=10, cost=0.25), body)
    return call


def _drained(deployment: Deployment) -> None:
    wait_until(lambda: spool_status(deployment.spool).spooled == 0, "the spool is drained")


def _holding(directory: Path) -> list[Path]:
    """Return the files below a directory that still hold something of the user."""
    return [file for file in directory.rglob("*") if file.is_file() and MARK in file.read_bytes()]


@pytest.fixture
def producer(deployment: Deployment) -> Iterator[Producer]:
    """A gateway process, with segments so small that some are retired."""
    deployment.update(spool={"segment_size": 4096})
    result = Producer(deployment.load().spool)
    yield result
    result.close()


def _traffic(producer: Producer) -> None:
    """40 calls: 10 with alice's keys, 10 that name her, 20 of others."""
    for _ in range(10):
        _send(producer, user_id="alice")
        _send(producer, user_id="bob")
        _send(producer, user_id="bob", end_user="alice")
        _send(producer, user_id="alice2")


def test_nothing_of_the_user_is_left(
    deployment: Deployment, database: Database, writer: WriterProcess, producer: Producer
) -> None:
    writer.start()
    since = time.time()
    _traffic(producer)
    _drained(deployment)
    database.execute("ALTER TABLE requests ADD CONSTRAINT no_odd CHECK (model <> 'odd')")
    dead = uuid7().hex
    producer.append(Kind.REQUEST, request(dead, model="odd", user_id="alice"), MARK)
    producer.append(Kind.RESPONSE, response(dead), MARK)
    _drained(deployment)
    assert spool_status(deployment.spool).dead == 2
    assert {file.parent.parent.name for file in _holding(deployment.spool)} >= {"producers", "retired"}

    counted = json.loads(deployment.run("erase", "--user", "alice", "--dry-run", "--json").stdout)
    assert database.count("requests") == 40
    done = deployment.run("erase", "--user", "alice", "--json")
    assert done.returncode == 0, done.stderr
    erased = json.loads(done.stdout)
    assert erased == counted
    [month] = erased.pop("months")
    assert erased == {
        "requests": 20, "responses": 20, "frames": 42, "dead_letters": 2, "spooled": 0, "running": 0
    }  # fmt: skip
    assert (month["calls"], month["total_tokens"], month["cost"]) == (20, 200, 5.0)

    assert _holding(deployment.spool) == []
    assert database.query("SELECT DISTINCT user_id, end_user FROM requests ORDER BY 1") == [
        ("alice2", None), ("bob", None)
    ]  # fmt: skip
    assert (database.count("requests"), database.count("responses")) == (20, 20)
    assert database.query("SELECT user_id, sum(calls), sum(cost) FROM daily_usage GROUP BY 1 ORDER BY 1") == [
        ("alice2", 10, 2.5), ("bob", 20, 5), (None, 10, 2.5)
    ]  # fmt: skip
    database.execute("DELETE FROM requests")
    assert replay(deployment.load(), since).restored == 40, "of the others all comes back, of the user nothing"
    assert database.value("SELECT count(*) FROM requests WHERE 'alice' IN (user_id, end_user)") == 0
    again = json.loads(deployment.run("erase", "--user", "alice", "--json").stdout)
    assert not any(again.values())
    vacuumed = "SELECT relname, vacuum_count FROM pg_stat_user_tables WHERE vacuum_count > 0 ORDER BY 1"
    assert database.query(vacuumed) == [("daily_usage", 2), ("requests", 2), ("responses", 2)], "the repetition, too"


def test_the_writer_and_the_counters_do_not_notice(
    deployment: Deployment, database: Database, writer: WriterProcess, producer: Producer
) -> None:
    writer.start()
    _traffic(producer)
    _drained(deployment)
    before = spool_status(deployment.spool)
    assert erase(deployment.load(), "alice").complete
    writer.stop()
    writer.start()
    _traffic(producer)
    _drained(deployment)
    after = spool_status(deployment.spool)
    assert (after.damaged, after.dead, after.dropped) == (0, 0, 0)
    assert after.received == 2 * before.received
    assert database.count("requests") == 20 + 40


def test_what_is_under_way_is_reported_and_erased_later(
    deployment: Deployment, database: Database, writer: WriterProcess, producer: Producer
) -> None:
    writer.start()
    running = _send(producer, ended=False, user_id="alice")
    _drained(deployment)
    writer.stop()
    _send(producer, user_id="alice")
    result = erase(deployment.load(), "alice", wait=0)
    assert (result.requests, result.frames, result.spooled, result.running) == (0, 0, 2, 1)
    assert not result.complete
    done = deployment.run("erase", "--user", "alice", "--dry-run")
    assert done.returncode == 1
    assert "2 frames are not delivered yet and 1 calls have not ended: run it again" in done.stderr
    producer.append(Kind.RESPONSE, response(running), MARK)
    producer.close()
    writer.start()
    wait_until(lambda: not list((deployment.spool / "producers").iterdir()), "the producer's folder is removed")
    another = Producer(deployment.load().spool)
    _send(another, user_id="bob")
    _drained(deployment)
    another.close()
    result = erase(deployment.load(), "alice")
    assert (result.requests, result.responses, result.frames, result.complete) == (2, 2, 4, True)
    assert database.query("SELECT user_id FROM requests") == [("bob",)]
    assert _holding(deployment.spool) == []


def test_dead_letters_that_name_the_user_are_removed(deployment: Deployment) -> None:
    """Also where nothing else is left of the call, and where they are damaged."""
    Producer(deployment.load().spool).close()
    (deployment.spool / "dead").mkdir(exist_ok=True)
    for number, user in enumerate(('o"hara', "o"), start=1):
        metadata = request(uuid7().hex, user_id=user)
        bury(deployment.spool, "gateway", Frame(Kind.REQUEST, number, metadata, b""), "", {})
        (deployment.spool / "dead" / f"{number}.damaged").write_bytes(b"LS" + metadata[:-1])
    assert erase(deployment.load(), 'o"hara').dead_letters == 2
    assert {file.name for file in deployment.spool.glob("dead/*")} == {"2.damaged", "gateway-2.json"}


def test_only_the_maintainers_role_deletes(deployment: Deployment, database: Database) -> None:
    Producer(deployment.load().spool).close()
    database.server.execute("REVOKE litellm_maintainer FROM litellm_migrator_a")
    try:
        done = deployment.run("erase", "--user", "alice")
    finally:
        database.server.execute("GRANT litellm_maintainer TO litellm_migrator_a WITH INHERIT FALSE, SET TRUE")
    assert (done.returncode, done.stderr.count("\n")) == (4, 1)
    assert "42501" in done.stderr
