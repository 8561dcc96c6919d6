"""The spool on a disk that fails, fills up or loses its process at any system call."""

import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest
from faults.disks import read_only
from faults.syscalls import DISK, count_calls, python, strace
from support.drain import drain
from support.oracle import check
from support.postgresql import Database
from support.processes import Deployment, WriterProcess
from support.records import BODY, Ledger, request
from support.send import read_ledger
from support.waiting import wait_until

from litellm_sqlalchemy.errors import SpoolError, SpoolFull
from litellm_sqlalchemy.frames import Kind
from litellm_sqlalchemy.identifiers import uuid7
from litellm_sqlalchemy.settings import SpoolSettings
from litellm_sqlalchemy.spool import Producer, read_counters
from litellm_sqlalchemy.status import spool_status

#: Times that a process is killed in each kind of system call, spread over its run; `--every-call` kills in all of them.
_EACH = 5


def _places(counts: dict[str, int], config: pytest.Config) -> list[tuple[str, int]]:
    step = {name: 1 if config.getoption("--every-call") else -(-count // _EACH) for name, count in counts.items()}
    return [(name, place) for name, count in counts.items() for place in range(count, 0, -step[name])]


@pytest.mark.timeout(1200)
def test_a_gateway_process_killed_at_every_system_call(  # F36
    deployment: Deployment, database: Database, pytestconfig: pytest.Config
) -> None:
    """What was acknowledged is delivered, whatever call the process died in."""
    deployment.update(spool={"segment_size": 4096}, writer={"listen": None})
    environment, total, killed = deployment.test_environment, Ledger(), 0
    file = deployment.directory / "ledger"
    command = python("send.py", str(deployment.file), "8", str(file))
    counts = count_calls(command, DISK, environment, deployment.directory / "trace")
    total.merge([read_ledger(file)])
    for name, place in _places(counts, pytestconfig):
        file.unlink(missing_ok=True)
        done = subprocess.run([*strace("signal=KILL", name, place), *command], env=environment, check=False, timeout=60)
        killed += done.returncode != 0
        total.merge([read_ledger(file)])
    drain(deployment.load())
    status = check(total, database, deployment.spool, killed=True)
    print(f"killed {killed} times in {counts}")
    assert killed >= 10
    assert status.spooled == status.dead == 0
    assert not [path for path in (deployment.spool / "producers").iterdir() if path.name[0] != "."]


@pytest.mark.timeout(1200)
def test_a_writer_killed_at_every_system_call(  # F36
    deployment: Deployment, database: Database, pytestconfig: pytest.Config
) -> None:
    """A writer that dies in any call leaves what another one completes, each row once."""
    deployment.update(spool={"segment_size": 4096}, writer={"listen": None, "batch_size": 7})
    ledger = Ledger()
    for _ in range(2):
        producer = Producer(deployment.load().spool)
        ledger.send(producer, 6)
        call = uuid7().hex
        ledger.append(producer, Kind.REQUEST, call, request(call), BODY)
        producer.close()
    full = deployment.directory / "full"
    shutil.copytree(deployment.spool, full)
    environment, killed = deployment.test_environment, 0
    command = python("drain.py", str(deployment.file))
    counts = count_calls(command, DISK, environment, deployment.directory / "trace")
    check(ledger, database, deployment.spool)
    for name, place in _places(counts, pytestconfig):
        shutil.rmtree(deployment.spool)
        shutil.copytree(full, deployment.spool)
        database.execute("TRUNCATE requests CASCADE")
        done = subprocess.run([*strace("signal=KILL", name, place), *command], env=environment, check=False, timeout=60)
        killed += done.returncode != 0
        drain(deployment.load())
        status = check(ledger, database, deployment.spool)
        assert (status.spooled, status.interrupted) == (0, 2), (name, place)
        assert not list((deployment.spool / "producers").iterdir()), (name, place)
    print(f"killed {killed} times in {counts}")
    assert killed >= 15


@pytest.mark.parametrize("error", ["ENOSPC", "EIO", "EROFS"])
@pytest.mark.parametrize(("call", "place"), [("write", 4), ("write", 7), ("fdatasync", 1), ("fdatasync", 2)])
def test_a_call_that_fails_costs_what_was_counted(  # F47
    error: str, call: str, place: int, deployment: Deployment, database: Database
) -> None:
    """A failed write is a dropped frame; a failed fsync costs nothing while the machine lives."""
    deployment.update(writer={"listen": None})
    environment = deployment.test_environment
    file = deployment.directory / "ledger"
    command = [*strace(f"error={error}", call, place), *python("send.py", str(deployment.file), "8", str(file))]
    subprocess.run(command, env=environment, check=True, timeout=60, capture_output=True)
    ledger = read_ledger(file)
    drain(deployment.load())
    status = check(ledger, database, deployment.spool)
    if call != "write":
        assert status.dropped == 0
    assert status.delivered_requests + status.dropped >= 8


def test_a_full_disk_drops_and_counts_and_recovers_by_itself(  # F46
    small_disk: Path, deployment: Deployment, database: Database, writer: WriterProcess
) -> None:
    deployment.update(spool={"directory": str(small_disk), "segment_size": 256 * 1024})
    producer, ledger = Producer(deployment.load().spool), Ledger()
    large = BODY + bytes(10_000).hex().encode()
    ledger.send(producer, 400, large)
    assert producer.dropped == ledger.dropped > 0
    assert read_counters(next((small_disk / "producers").iterdir()))["dropped"] == ledger.dropped
    files = len(list(small_disk.rglob("*.seg")))
    assert files < 30, "no file for every frame that is dropped"
    check(ledger, database, deployment.spool)
    writer.start()
    wait_until(lambda: spool_status(small_disk).spooled == 0, "the writer makes room on a disk without any", 40)
    time.sleep(1.1)  # the producer looks again after a second
    dropped = ledger.dropped
    for _ in range(10):
        ledger.send(producer, 5, large)
        wait_until(lambda: _free_part(small_disk) > 0.1, "delivered segments are not kept on a full disk", 40)
    assert ledger.dropped == dropped
    producer.close()
    wait_until(lambda: not list((small_disk / "producers").iterdir()), "all is delivered")
    assert check(ledger, database, deployment.spool).dropped == dropped
    assert writer.stop() == 0


def _free_part(disk: Path) -> float:
    usage = shutil.disk_usage(disk)
    return usage.free / usage.total


def test_a_read_only_file_system_drops_and_counts_and_recovers_by_itself(
    small_disk: Path, deployment: Deployment, database: Database
) -> None:
    """Files that are open for writing keep it writable, so that it is remounted before the first frame."""
    deployment.update(spool={"directory": str(small_disk), "segment_size": 65536}, writer={"listen": None})
    spool = deployment.load().spool
    producer, ledger = Producer(spool), Ledger()
    refusing = Producer(spool.model_copy(update={"when_full": "refuse"}))
    with read_only(small_disk):
        ledger.send(producer, 5)
        assert producer.dropped == ledger.dropped == 10
        assert "not writable" in producer.last_error
        with pytest.raises(SpoolError, match="not writable"):
            refusing.check_space()
        done = deployment.run("write")
        assert (done.returncode, done.stderr.count("\n")) == (6, 1)
        assert f"{small_disk} is not writable" in done.stderr
    wait_until(lambda: _takes(refusing), "the producers look again")
    ledger.send(producer, 5)
    assert ledger.dropped == 10
    producer.close()
    refusing.close()
    drain(deployment.load())
    status = check(ledger, database, deployment.spool)
    assert (status.delivered_requests, status.dropped) == (5, 10)


def _takes(producer: Producer) -> bool:
    """Return whether a producer that refuses what it cannot log accepts a call."""
    try:
        producer.check_space()
    except SpoolError:
        return False
    return True


@pytest.mark.parametrize("processes", [1, 3])
def test_the_cap_is_kept_and_what_it_costs_is_counted(processes: int, tmp_path: Path) -> None:
    cap = 300_000
    settings = SpoolSettings(directory=tmp_path, max_size=cap, segment_size=20_000)
    producers = [Producer(settings) for _ in range(processes)]
    ledgers = [Ledger() for _ in producers]
    for producer, ledger in zip(producers, ledgers, strict=True):
        ledger.send(producer, 1)  # all are there before the first fills it
        producer._look_around()
    for _ in range(40):
        for producer, ledger in zip(producers, ledgers, strict=True):
            ledger.send(producer, 20, BODY * 10)
    size = sum(file.stat().st_size for file in tmp_path.rglob("*.seg"))
    assert cap * 0.8 < size <= cap
    for producer, ledger in zip(producers, ledgers, strict=True):
        assert (producer.received, producer.dropped) == (ledger.received, ledger.dropped)
        assert ledger.dropped > 0
    total = Ledger().merge(ledgers)
    status = spool_status(tmp_path)
    assert (status.received, status.dropped, status.spooled) == (
        total.received, total.dropped, total.received - total.dropped,
    )  # fmt: skip
    for producer in producers:
        producer.close()


def test_a_spool_at_its_cap_takes_frames_again_when_it_is_delivered(deployment: Deployment, database: Database) -> None:
    """The cap is below the size of a segment: the segment must be left although it is not full."""
    deployment.update(spool={"max_size": 100_000}, writer={"listen": None})
    producer, ledger = Producer(deployment.load().spool), Ledger()
    for _ in range(3):
        ledger.send(producer, 200)
        assert ledger.dropped
        drain(deployment.load())
        drain(deployment.load())
        check(ledger, database, deployment.spool)
        time.sleep(0.11)  # between two looks at a full spool
        dropped = ledger.dropped
        ledger.send(producer, 5)
        assert ledger.dropped == dropped, "there is room again"
    producer.close()


def test_refuse_at_the_cap_drops_nothing_that_was_accepted(tmp_path: Path) -> None:
    settings = SpoolSettings(directory=tmp_path, max_size=400_000, when_full="refuse")
    producer, ledger, refusals = Producer(settings), Ledger(), []
    for _ in range(1000):
        try:
            producer.check_space()
        except SpoolFull as error:
            refusals.append(str(error))
            continue
        ledger.send(producer, 1)
    assert refusals
    assert all("spool.max_size" in refusal for refusal in refusals)
    assert (ledger.dropped, producer.dropped) == (0, 0)
    assert sum(file.stat().st_size for file in tmp_path.rglob("*.seg")) <= 400_000
    producer.close()


def test_refuse_on_a_full_disk(small_disk: Path) -> None:
    settings = SpoolSettings(directory=small_disk, when_full="refuse", segment_size=256 * 1024)
    producer, ledger = Producer(settings), Ledger()

    def fill() -> None:
        for _ in range(2000):
            producer.check_space()
            ledger.send(producer, 1, BODY * 100)

    with pytest.raises(SpoolError, match=r"spool\.segment_size"):
        fill()
    assert producer.dropped == 0
    producer.close()


def test_drop_is_the_default_and_never_refuses(tmp_path: Path) -> None:
    producer = Producer(SpoolSettings(directory=tmp_path / "missing"))
    producer.check_space()
    assert producer.append(Kind.REQUEST, b"{}") is False
    assert (producer.received, producer.dropped) == (1, 1)
    assert "does not exist" in producer.last_error
    producer.close()


@pytest.mark.parametrize("state", ["missing", "a file", "of another version"])
def test_a_spool_that_cannot_be_used_is_used_once_it_can(state: str, tmp_path: Path) -> None:
    place = tmp_path / "spool"
    if state == "a file":
        place.touch()
    elif state == "of another version":
        place.mkdir()
        (place / "format").write_text("0")
    producer, ledger = Producer(SpoolSettings(directory=place)), Ledger()
    ledger.send(producer, 3)
    assert (ledger.dropped, ledger.received) == (6, 6)
    if place.is_file():
        place.unlink()
    place.mkdir(exist_ok=True)
    (place / "format").unlink(missing_ok=True)
    time.sleep(1.1)  # the producer looks again after a second
    ledger.send(producer, 3)
    producer.close()
    status = spool_status(place)
    assert (status.received, status.dropped, status.spooled) == (12, 6, 6)


def test_a_spool_that_is_not_writable(tmp_path: Path) -> None:
    """Nobody but root may pass a mode of 0500, so that another user tries."""
    place = tmp_path / "spool"
    place.mkdir(mode=0o500)
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere; the unit tests run as a user too")
    producer = Producer(SpoolSettings(directory=place))
    assert producer.append(Kind.REQUEST, b"{}") is False
    assert "not writable" in producer.last_error
    producer.close()


def test_a_spool_that_is_taken_away_is_made_anew(tmp_path: Path) -> None:
    place = tmp_path / "spool"
    place.mkdir()
    producer, ledger = Producer(SpoolSettings(directory=place)), Ledger()
    ledger.send(producer, 2)
    shutil.rmtree(place)
    place.mkdir()
    producer._look_around()
    before = ledger.dropped
    ledger.send(producer, 2)
    assert ledger.dropped == before
    producer.close()
    assert spool_status(place).spooled == 4


def test_a_folder_that_could_not_be_made_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    producer, ledger = Producer(SpoolSettings(directory=tmp_path)), Ledger()

    def fail(_self: Path, _target: Path) -> Path:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as broken:
        broken.setattr(Path, "rename", fail)
        ledger.send(producer, 2)
    time.sleep(1.1)  # the producer looks again after a second
    ledger.send(producer, 2)
    producer.close()
    status = spool_status(tmp_path)
    assert (status.received, status.dropped, status.spooled) == (8, 4, 4)
