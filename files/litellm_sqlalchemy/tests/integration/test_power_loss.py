"""A power cut at every moment of a gateway process's life: what it loses is what the fsync policy says."""

import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from faults.disks import file_system
from faults.power import Disk, SystemCall, logging_calls, not_durable_in_time, read_calls
from faults.syscalls import python
from support.drain import drain
from support.oracle import Record, check, spooled
from support.postgresql import Database
from support.processes import COMMAND, Deployment
from support.records import Ledger

from litellm_sqlalchemy.frames import Kind
from litellm_sqlalchemy.producer import Producer
from litellm_sqlalchemy.status import spool_status

_INTERVAL = 0.4
#: Seconds that a sync may begin later than it should, on a machine that has other things to do.
_LATE = 0.3


@pytest.fixture
def deployment(deployment: Deployment) -> Iterator[Deployment]:
    """The test's deployment with its spool in memory: what else writes to the machine's disk delays no sync."""
    with file_system(64) as disk:
        deployment.update(spool={"directory": str(disk)})
        yield deployment


@dataclass
class Life:
    """A gateway process's life: its disk, and when each record was acknowledged."""

    disk: Disk
    tried: dict[Record, float]
    acknowledged: dict[Record, float]

    def worst_loss(self, directory: Path) -> float:
        """Return the age in seconds, at a power cut, of the oldest acknowledged record that it loses; 0 for none."""
        worst = 0.0
        for number, moment in enumerate(self.disk.moments()):
            place = directory / str(number)
            (place / "producers").mkdir(parents=True)
            self.disk.cut(moment, place, zeros=number % 2 == 1)
            kept = spooled(place)
            lost = [at for record, at in self.acknowledged.items() if at <= moment and record not in kept]
            worst = max([worst, *(moment - at for at in lost)])
        return worst


def _live(deployment: Deployment, fsync: str) -> Life:
    """Let a process send calls for a while."""
    deployment.update(spool={"fsync": fsync, "fsync_interval": _INTERVAL, "segment_size": 8192})
    log, ledger = deployment.directory / "calls", deployment.directory / "ledger"
    command = [*logging_calls(log), *python("send.py", str(deployment.file), "60", str(ledger), "0.02")]
    subprocess.run(command, env=deployment.test_environment, check=True, timeout=100)
    calls = read_calls(log)
    disk = Disk(deployment.spool, [call for call in calls if call.name != "writev"])
    life = Life(disk, _noted(calls, ledger, "try"), _noted(calls, ledger, "ok"))
    assert len(life.acknowledged) == 120
    return life


def _noted(calls: list[SystemCall], ledger: Path, word: str) -> dict[Record, float]:
    """Return when the process has noted each record in its ledger with a word."""
    notes = [call for call in calls if call.name == "writev" and call.files == (str(ledger),)]
    words = [(call, call.text.split('"')[1].removesuffix("\\n").split()) for call in notes]
    return {(Kind(int(kind)), identifier): call.ended for call, (said, kind, identifier) in words if said == word}


def test_always_loses_nothing(deployment: Deployment, database: Database, tmp_path: Path) -> None:  # F48
    life = _live(deployment, "always")
    assert life.worst_loss(tmp_path / "cuts") == 0
    moment = list(life.disk.moments())[-40]
    deployment.update(spool={"directory": str(tmp_path / "left")}, writer={"listen": None})
    deployment.spool.mkdir()
    life.disk.cut(moment, deployment.spool, zeros=True)
    drain(deployment.load())
    ledger = Ledger(*({record for record, at in notes.items() if at <= moment}
                      for notes in (life.tried, life.acknowledged)))  # fmt: skip
    ledger.received = len(ledger.tried)
    status = check(ledger, database, deployment.spool, killed=True, damaged=1)  # what was being written is zeros
    assert status.delivered_requests > 10
    assert status.spooled == status.dead == 0


def test_interval_loses_the_last_interval_at_most(deployment: Deployment, tmp_path: Path) -> None:  # F48
    worst = _live(deployment, "interval").worst_loss(tmp_path / "cuts")
    assert 0 < worst < _INTERVAL + _LATE


def test_control_never_loses_more(deployment: Deployment, tmp_path: Path) -> None:
    assert _live(deployment, "never").worst_loss(tmp_path / "cuts") > 1


def test_what_is_delivered_or_requeued_is_durable_before_the_frames_go(
    deployment: Deployment, database: Database, tmp_path: Path
) -> None:
    deployment.update(spool={"segment_size": 4096}, writer={"listen": None})
    producer = Producer(deployment.load().spool)
    Ledger().send(producer, 30)
    producer.append(Kind.RESPONSE, b'{"request_id": "00000000000000000000000000000000"}')  # of no call: a dead letter
    producer.close()
    places = set()
    for command in (python("drain.py", str(deployment.file)), [*COMMAND, "dead-letters", "requeue"]):
        assert spool_status(deployment.spool).dead == (command[-1] == "requeue")
        log = tmp_path / "calls"
        subprocess.run([*logging_calls(log), *command], env=deployment.test_environment, check=True, timeout=100)
        calls = read_calls(log)
        places |= {Path(call.files[-1]).parent.name for call in calls if call.name in ("rename", "unlink")}
        assert not_durable_in_time(calls, deployment.spool) == []
    assert places >= {deployment.spool.name, "dead", "producers"}, "state, dead letters and their way back"
