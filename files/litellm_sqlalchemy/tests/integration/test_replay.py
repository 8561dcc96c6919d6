"""After the database went back in time, the spool's delivered segments bring back what it lost, exactly once."""

import time
from datetime import UTC, datetime

import pytest
from support.postgresql import Database
from support.processes import Deployment, WriterProcess
from support.records import Ledger
from support.waiting import wait_until

from litellm_sqlalchemy import cli
from litellm_sqlalchemy.errors import ExitCode
from litellm_sqlalchemy.replay import replay
from litellm_sqlalchemy.spool import Producer
from litellm_sqlalchemy.status import spool_status

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
    producer.close()


def test_a_time_without_a_zone_is_a_usage_error(deployment: Deployment) -> None:
    with pytest.raises(SystemExit) as ending:
        cli.main(["replay", "--settings", str(deployment.file), "--since", "2026-11-23T14:30:00"])
    assert ending.value.code == ExitCode.USAGE


def test_replay_says_that_the_window_is_shorter(
    deployment: Deployment, database: Database, capsys: pytest.CaptureFixture[str]
) -> None:
    since = datetime(2020, 1, 1, tzinfo=UTC).isoformat()
    assert cli.main(["replay", "--settings", str(deployment.file), "--since", since]) == ExitCode.OK
    shown = capsys.readouterr()
    assert "replayed 0 frames" in shown.out
    assert "spool.retain" in shown.err
