"""`status` compares the writer's counters with the tables, and the metrics tell the same."""

import json
import time
from typing import Any

from support.postgresql import Database
from support.processes import Deployment, WriterProcess
from support.records import BODY, Ledger, request
from support.waiting import wait_until

from litellm_sqlalchemy.frames import Kind
from litellm_sqlalchemy.identifiers import uuid7
from litellm_sqlalchemy.spool import Producer
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

    database.execute("TRUNCATE requests, responses, daily_usage")  # as a restore to an earlier time
    assert _status(deployment) == (1, {"responses": 20, "stored": 0, "open": 1, "missing": 1})
    assert "run `litellm-sqlalchemy replay`" in deployment.run("status").stdout
    moment = time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime(since))
    assert deployment.run("replay", "--since", moment).returncode == 0
    assert _status(deployment) == (0, {"responses": 20, "stored": 20, "open": 1, "missing": 0})

    database.execute("UPDATE daily_usage SET responses = responses + 2")
    assert _status(deployment)[0] == 1, "nor may there be more than was counted"
    producer.close()


def test_metrics(deployment: Deployment, database: Database, writer: WriterProcess) -> None:
    writer.start()
    producer = Producer(deployment.load().spool)
    producer.calls, producer.seconds = 3, 0.25
    Ledger().send(producer, 3)
    producer.append(Kind.RESPONSE, b"{}")
    wait_until(lambda: spool_status(deployment.spool).dead == 1, "one is refused")
    prefix = "litellm_sqlalchemy_"
    wait_until(lambda: writer.metrics()[f'{prefix}gateway_frames{{fate="received"}}'] == 7, "the counters are written")
    metrics = writer.metrics()
    assert metrics[f'{prefix}frames{{fate="delivered_requests"}}'] == 3
    assert metrics[f'{prefix}frames{{fate="delivered_responses"}}'] == 3
    assert (metrics[f"{prefix}callback_calls"], metrics[f"{prefix}callback_seconds"]) == (3, 0.25)
    assert (metrics[f"{prefix}dead_letters"], metrics[f"{prefix}healthy"]) == (1, 1)
    producer.close()
