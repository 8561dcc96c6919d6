"""`status` compares the writer's counters with the tables, and the metrics tell the same."""

import json
import time
from typing import Any

from support.postgresql import Database, Server
from support.processes import Deployment, WriterProcess
from support.records import BODY, Ledger, request
from support.waiting import wait_until

from litellm_sqlalchemy.database import ErrorClass
from litellm_sqlalchemy.frames import Kind
from litellm_sqlalchemy.identifiers import uuid7
from litellm_sqlalchemy.producer import Producer
from litellm_sqlalchemy.status import spool_status


def _status(deployment: Deployment) -> tuple[int, dict[str, Any]]:
    done = deployment.run("status", "--json")
    return done.returncode, json.loads(done.stdout)["tables"]


def test_rows_that_are_gone_are_noticed(deployment: Deployment, database: Database, writer: WriterProcess) -> None:
    since = time.time()
    writer.start()
    producer = Producer(deployment.load().spool)
    Ledger().send(producer, 20)
    producer.append(Kind.REQUEST, request(uuid7().hex), BODY)  # a call that still runs
    wait_until(lambda: spool_status(deployment.spool).delivered_requests == 21, "all is delivered")
    assert _status(deployment) == (0, {"responses": 20, "stored": 20, "open": 1, "missing": 0})
    lines = deployment.run("status").stdout.splitlines()
    assert lines[1] == "tables: all 20 responses are stored, and the requests of 1 open calls"

    database.execute("DELETE FROM requests WHERE id IN (SELECT request_id FROM responses LIMIT 5)")
    assert _status(deployment)[0] == 0, "what is removed on purpose is not lost"

    database.execute("DELETE FROM requests WHERE id NOT IN (SELECT request_id FROM responses)")
    assert _status(deployment) == (1, {"responses": 20, "stored": 20, "open": 1, "missing": 1})
    assert "the requests of 1 open calls are missing" in deployment.run("status").stdout

    database.execute("TRUNCATE requests, responses, daily_usage")  # as a restore to an earlier time
    assert _status(deployment) == (1, {"responses": 20, "stored": 0, "open": 1, "missing": 1})
    assert "run `litellm-sqlalchemy replay`" in deployment.run("status").stdout
    moment = time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime(since))
    assert deployment.run("replay", "--since", moment).returncode == 0
    assert _status(deployment) == (0, {"responses": 20, "stored": 20, "open": 1, "missing": 0})

    database.execute("UPDATE daily_usage SET responses = responses + 2")
    assert _status(deployment)[0] == 1, "nor may there be more than was counted"
    producer.close()


def test_nothing_seems_lost_while_it_is_delivered(deployment: Deployment, writer: WriterProcess) -> None:
    """The writer delivers and removes segments while they are looked at."""
    deployment.update(spool={"segment_size": 4096, "retain": 0}, writer={"batch_size": 50})
    producer = Producer(deployment.load().spool)
    Ledger().send(producer, 5000)
    writer.start()
    seen = []
    while not seen or seen[-1].spooled:
        seen.append(spool_status(deployment.spool))
    assert len({status.spooled for status in seen}) > 3, "it was looked at while it was delivered"
    assert {(status.received, status.damaged, status.dropped) for status in seen} == {(10_000, 0, 0)}
    producer.close()


def test_losses_are_told_until_they_are_acknowledged(
    deployment: Deployment, database: Database, writer: WriterProcess
) -> None:
    writer.start()
    producer = Producer(deployment.load().spool)
    for expected in (True, False):
        producer.skip()
        Ledger().send(producer, 1)
        wait_until(lambda: not spool_status(deployment.spool).spooled, "all is delivered")
        done = deployment.run("status")
        assert (done.returncode, "acknowledged" in done.stdout) == (1, not expected)
        done = deployment.run("status", "--acknowledge")
        assert done.returncode == 0
        assert deployment.run("status").returncode == 0
    assert done.stdout.splitlines()[-1] == "acknowledged: damaged 0, dropped 2, 0 responses not stored"
    database.execute("UPDATE daily_usage SET responses = responses - 1")
    assert deployment.run("status").returncode == 1
    assert deployment.run("status", "--acknowledge", "--json").returncode == 0
    assert deployment.run("status", "--acknowledge", "--spool-only").returncode == 0
    assert deployment.run("status").returncode == 0, "what was known of the tables stays known"
    database.execute("UPDATE daily_usage SET responses = responses - 1")
    assert deployment.run("status").returncode == 1, "more than is known"
    producer.close()


#: Samples of `/metrics` by name and labels, without those of the histograms' buckets.
METRICS = {
    *(f'frames{{fate="{fate}"}}' for fate in (
        "received", "spooled", "delivered_requests", "delivered_responses", "duplicates", "dead", "damaged", "dropped",
        "interrupted",
    )),
    *(f'retries_total{{cause="{cause.value}"}}' for cause in ErrorClass),
    *(f'retries_created{{cause="{cause.value}"}}' for cause in ErrorClass),
    *(f"{name}_{sample}" for name in ("batch_frames", "batch_seconds", "commit_seconds")
      for sample in ("count", "sum", "created")),
    "hook_seconds_count", "hook_seconds_sum", "calls_total", "hook_failures_total", "dead_letters", "lost_frames",
    "spool_bytes", "spool_oldest_timestamp_seconds", "gateway_dropped_frames", "gateway_unsynced_calls",
    "pool_connections", "connections_total", "connections_created", "healthy",
}  # fmt: skip


def test_metrics(deployment: Deployment, database: Database, writer: WriterProcess, server: Server) -> None:
    def metrics() -> dict[str, float]:
        found = {name.removeprefix("litellm_sqlalchemy_"): value for name, value in writer.metrics().items()}
        return {name: value for name, value in found.items() if "_bucket{" not in name}

    writer.start()
    producer = Producer(deployment.load().spool)
    hooks = producer.counters.hooks
    for seconds in (0.00005, 0.0004, 0.5):
        hooks.add(seconds)
    hooks.calls, hooks.failures, producer.counters.unsynced = 2, 1, 1
    Ledger().send(producer, 3)
    producer.append(Kind.RESPONSE, b"{}")
    producer.skip()
    wait_until(lambda: spool_status(deployment.spool).dead == 1, "one is refused")
    wait_until(lambda: metrics()["calls_total"] == 2, "the counters are written")
    found = metrics()
    assert set(found) == METRICS
    fates = {name.split('"')[1]: value for name, value in found.items() if name.startswith("frames{")}
    assert fates == {
        "received": 8, "spooled": 1, "delivered_requests": 3, "delivered_responses": 3, "dead": 1, "duplicates": 0,
        "damaged": 0, "dropped": 0, "interrupted": 0,
    }, "what was dropped last is known when a frame comes after it"  # fmt: skip
    assert found["gateway_dropped_frames"] == found["dead_letters"] == found["gateway_unsynced_calls"] == 1
    assert found["lost_frames"] == 1
    deployment.run("status", "--acknowledge")
    assert metrics()["lost_frames"] == 0
    assert (found["hook_failures_total"], found["hook_seconds_count"]) == (1, 3)
    assert abs(found["hook_seconds_sum"] - 0.50045) < 1e-6
    assert writer.metrics()['litellm_sqlalchemy_hook_seconds_bucket{le="0.0005"}'] == 2
    assert (found["spool_oldest_timestamp_seconds"], found["healthy"], found["pool_connections"]) == (0, 1, 0)
    assert found["spool_bytes"] > 0
    assert 0 < found["commit_seconds_sum"] < found["batch_seconds_sum"]
    assert found["batch_frames_sum"] == 7
    assert found["connections_total"] == 1, "one connection, used again"

    server.stop()
    try:
        began = time.time()
        Ledger().send(producer, 2)
        wait_until(lambda: metrics()["healthy"] == 0, "the outage is noticed")
        assert began <= metrics()["spool_oldest_timestamp_seconds"] <= time.time()
        assert metrics()['retries_total{cause="retry"}'] > 0
    finally:
        server.start()
    wait_until(lambda: metrics()["spool_oldest_timestamp_seconds"] == 0, "all is delivered")
    producer.close()
    wait_until(lambda: not list((deployment.spool / "producers").iterdir()), "the gateway process is gone")
    found = metrics()
    assert found["hook_seconds_count"] == 3, "what its hooks did is not forgotten"
    assert (found['frames{fate="dropped"}'], found["lost_frames"]) == (1, 0), "it is still known"
    assert found['frames{fate="received"}'] == 12
