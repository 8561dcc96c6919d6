"""The spool on a disk that fails, fills up or loses its process at any system call."""

import asyncio
import contextlib
import ctypes
import errno
import gc
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from faults.disks import full_disk, read_only
from faults.syscalls import DISK, count_calls, python, strace
from support.drain import drain
from support.oracle import check, spooled
from support.postgresql import Database, free_port
from support.processes import COMMAND, OTHER, Deployment, WriterProcess
from support.records import BODY, Ledger, request
from support.send import read_ledger
from support.waiting import wait_until

from litellm_sqlalchemy.errors import SpoolError, SpoolFull
from litellm_sqlalchemy.frames import Kind
from litellm_sqlalchemy.identifiers import uuid7
from litellm_sqlalchemy.producer import Producer
from litellm_sqlalchemy.settings import SpoolSettings
from litellm_sqlalchemy.spool import read_counters
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
    for _ in range(2):  # the first one makes the spool
        file.unlink(missing_ok=True)
        counts = count_calls(command, DISK, environment, deployment.directory / "trace")
        total.merge([read_ledger(file)])
    places = _places(counts, pytestconfig)
    for name, place in places:
        file.unlink(missing_ok=True)
        done = subprocess.run([*strace("signal=KILL", name, place), *command], env=environment, check=False, timeout=60)
        killed += done.returncode != 0
        total.merge([read_ledger(file)])
    drain(deployment.load())
    status = check(total, database, deployment.spool, killed=True)
    print(f"killed {killed} times in {counts}")
    assert killed > 0.9 * len(places) > 10
    assert status.spooled == status.dead == 0
    assert not [path for path in (deployment.spool / "producers").iterdir() if path.name[0] != "."]


def test_a_gateway_process_killed_while_it_makes_the_spool(deployment: Deployment) -> None:
    environment, file, spool = deployment.test_environment, deployment.directory / "ledger", deployment.spool
    command = python("send.py", str(deployment.file), "1", str(file))
    making = "mkdir,fallocate,rename,fsync"
    counts = count_calls(command, making, environment, deployment.directory / "trace")
    for name, place in [(name, place) for name, count in counts.items() for place in range(1, count + 1)]:
        shutil.rmtree(spool)
        spool.mkdir()
        total = Ledger()
        for prefix, code in ((strace("signal=KILL", name, place), -signal.SIGKILL), ([], 0)):
            file.unlink(missing_ok=True)
            done = subprocess.run([*prefix, *command], env=environment, check=False, timeout=60)
            assert done.returncode == code, (name, place)
            total.merge([read_ledger(file)])
        kept = spooled(spool)
        assert total.acknowledged <= kept <= total.tried, (name, place)
        assert len(total.acknowledged) >= 2


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
    places = _places(counts, pytestconfig)
    for name, place in places:
        shutil.rmtree(deployment.spool)
        shutil.copytree(full, deployment.spool)
        database.execute("TRUNCATE requests CASCADE")
        done = subprocess.run([*strace("signal=KILL", name, place), *command], env=environment, check=False, timeout=60)
        killed += done.returncode != 0
        drain(deployment.load())
        status = check(ledger, database, deployment.spool)
        assert (status.spooled, status.dead, status.interrupted) == (0, 0, 2), (name, place)
        assert not list((deployment.spool / "producers").iterdir()), (name, place)
    print(f"killed {killed} times in {counts}")
    assert killed > 0.9 * len(places) > 15


@pytest.mark.parametrize("error", ["ENOSPC", "EIO", "EROFS"])
@pytest.mark.parametrize(
    ("call", "place"),
    [("write", 4), ("write", 7), ("rename", 1), ("rename", 2), ("fsync", 2), ("fdatasync", 1), ("fdatasync", 2)],
)
def test_a_call_that_fails_costs_what_was_counted(  # F47
    error: str, call: str, place: int, deployment: Deployment, database: Database
) -> None:
    """A failed write is a dropped frame; a failed fsync costs nothing while the machine lives."""
    deployment.update(spool={"fsync_interval": 0.03}, writer={"listen": None})
    file, log = deployment.directory / "ledger", deployment.directory / "trace"
    prefix = strace(f"error={error}", call, place, log, "openat,close,fdatasync")
    command = [*prefix, *python("send.py", str(deployment.file), "8", str(file), "0.2")]
    subprocess.run(command, env=deployment.test_environment, check=True, timeout=60, capture_output=True)
    calls = log.read_text()
    assert "(INJECTED)" in calls, "the fault is there"
    ledger, segments = read_ledger(file), len(list(deployment.spool.rglob("*.seg")))
    drain(deployment.load())
    status = check(ledger, database, deployment.spool)
    assert status.dropped == ledger.dropped
    assert (status.dropped == 0) == (call == "fdatasync")
    if call == "fdatasync":
        assert _synced_again(calls) == [], "a second fsync could tell of a success that is none"
        assert segments >= 2, "what may be lost is written again"
        assert status.duplicates > 0


def _synced_again(calls: str) -> list[str]:
    """Return the calls that sync a descriptor after a sync of it has failed, until it is another file's."""
    failed: set[str] = set()
    again = []
    for line in calls.splitlines():
        if not (match := re.search(r"\b(fdatasync|close|openat)\((?:(\d+)\)|.*) += (-?\d+)", line)):
            continue
        name, descriptor, result = match.groups()
        if name == "fdatasync":
            again += [line] * (descriptor in failed)
            failed |= {descriptor} if "INJECTED" in line else set()
        elif name == "close":
            failed.discard(descriptor)
        else:
            failed.discard(result)
    return again


def test_a_full_disk_drops_and_counts_and_recovers_by_itself(  # F46
    small_disk: Path, deployment: Deployment, database: Database, writer: WriterProcess
) -> None:
    deployment.update(spool={"directory": str(small_disk), "segment_size": 256 * 1024, "reserve": 0})
    producer, ledger = Producer(deployment.load().spool), Ledger()
    large = BODY + bytes(10_000).hex().encode()
    ledger.send(producer, 400, large)
    assert producer.dropped == ledger.dropped > 0
    assert read_counters(next((small_disk / "producers").iterdir())).dropped == ledger.dropped
    files = len(list(small_disk.rglob("*.seg")))
    assert files < 30, "no file for every frame that is dropped"
    check(ledger, database, deployment.spool)
    writer.start()
    wait_until(lambda: spool_status(small_disk).spooled == 0, "the writer makes room on a disk without any")
    wait_until(lambda: _takes(producer, ledger, large), "the producer looks again")
    dropped = ledger.dropped
    for _ in range(10):
        ledger.send(producer, 5, large)
        wait_until(lambda: _free_part(small_disk) > 0.1, "delivered segments are not kept on a full disk")
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
    wait_until(lambda: _accepts(refusing), "the producers look again")
    wait_until(lambda: _takes(producer, ledger), "the producers look again")
    dropped = ledger.dropped
    ledger.send(producer, 5)
    assert ledger.dropped == dropped
    producer.close()
    refusing.close()
    drain(deployment.load())
    status = check(ledger, database, deployment.spool)
    assert (status.delivered_requests, status.dropped) == (6, dropped)


def _accepts(producer: Producer) -> bool:
    """Return whether a producer that refuses what it cannot log accepts a call."""
    try:
        producer.check_space()
    except SpoolError:
        return False
    return True


def _takes(producer: Producer, ledger: Ledger, payload: bytes = BODY) -> bool:
    """Send a call; return whether the producer has taken it."""
    before = ledger.dropped
    ledger.send(producer, 1, payload)
    return ledger.dropped == before


@pytest.mark.parametrize("processes", [1, 3])
def test_the_cap_is_kept_and_what_it_costs_is_counted(processes: int, tmp_path: Path) -> None:
    cap = 300_000
    settings = SpoolSettings(directory=tmp_path, max_size=cap, segment_size=20_000)
    producers = [Producer(settings) for _ in range(processes)]
    ledgers = [Ledger() for _ in producers]
    for producer, ledger in zip(producers, ledgers, strict=True):
        ledger.send(producer, 1)  # all are there before the first fills it
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
        wait_until(lambda: _takes(producer, ledger), "there is room again")
        dropped = ledger.dropped
        ledger.send(producer, 5)
        assert ledger.dropped == dropped
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


@pytest.mark.parametrize("reserve", [0.0, 0.5])
def test_refuse_on_a_full_disk(reserve: float, small_disk: Path) -> None:
    settings = SpoolSettings(directory=small_disk, when_full="refuse", segment_size=256 * 1024, reserve=reserve)
    producer, ledger = Producer(settings), Ledger()

    def fill() -> None:
        for _ in range(2000):
            producer.check_space()
            ledger.send(producer, 1, BODY * 100)

    with pytest.raises(SpoolFull, match=r"spool\.reserve"):
        fill()
    assert producer.dropped == 0
    assert abs(_free_part(small_disk) - reserve) < 0.05
    producer.close()


def test_the_reserve_is_left_to_others(small_disk: Path, deployment: Deployment, database: Database) -> None:
    """Whatever fills up in an outage, it is not the file system."""
    deployment.update(
        spool={"directory": str(small_disk), "segment_size": 64 * 1024, "reserve": 0.3}, writer={"listen": None}
    )
    producer, ledger = Producer(deployment.load().spool), Ledger()
    ledger.send(producer, 2000, BODY * 50)
    assert "`spool.reserve` leaves 30% of the file system" in producer.last_error
    assert 0.3 <= _free_part(small_disk) < 0.36
    drain(deployment.load())
    wait_until(lambda: _takes(producer, ledger), "there is room again")
    producer.close()
    drain(deployment.load())
    assert check(ledger, database, deployment.spool).dropped == ledger.dropped > 0


def test_why_nothing_is_taken_does_not_change_while_the_spool_is_measured(tmp_path: Path) -> None:
    """The producer's thread looks at the disk first, then at the cap."""
    producer, ledger = Producer(SpoolSettings(directory=tmp_path, max_size=2_000_000)), Ledger()
    ledger.send(producer, 1)
    other = tmp_path / "producers" / "another"
    other.mkdir()
    for number in range(500):
        (other / f"{number:010}.seg").write_bytes(bytes(4000))
    wait_until(lambda: ledger.send(producer, 1) or producer.dropped, "the cap is reached")
    reasons, deadline = set(), time.monotonic() + 2
    while time.monotonic() < deadline:
        ledger.send(producer, 1)
        reasons.add(producer.last_error)
    assert reasons == {"the spool has reached `spool.max_size` of 2000000 bytes"}
    producer.close()


def test_a_spool_of_many_files_is_not_measured_in_the_request_path(tmp_path: Path) -> None:
    """As in an outage with a cap: to look through all segments takes longer than a call may wait."""
    producer, ledger = Producer(SpoolSettings(directory=tmp_path, max_size=2_000_000, segment_size=4096)), Ledger()
    ledger.send(producer, 1)
    other = tmp_path / "producers" / "another"
    other.mkdir()
    for number in range(5000):
        (other / f"{number:010}.seg").write_bytes(bytes(400))
    wait_until(lambda: not _takes(producer, ledger, BODY * 20), "the cap is reached")
    seconds = []
    until = time.monotonic() + 1.5  # several times the interval between two looks at a full spool
    gc.disable()  # a collection takes longer than all else
    while time.monotonic() < until:
        began = time.thread_time()
        ledger.send(producer, 1)
        seconds.append(time.thread_time() - began)
    gc.enable()
    assert max(seconds) < 0.01, "one measurement takes longer"
    assert statistics.quantiles(seconds, n=100)[-1] < 0.001
    shutil.rmtree(other)
    wait_until(lambda: _takes(producer, ledger), "there is room again")
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
    wait_until(lambda: _takes(producer, ledger), "the producer looks again")
    producer.close()
    status = spool_status(place)
    assert (status.received, status.dropped, status.spooled) == (ledger.received, ledger.received - 2, 2)


def test_a_spool_of_another_user(others_deployment: Deployment) -> None:
    """Nobody but root may pass a mode of 0500, so that another user tries."""
    others_deployment.spool.chmod(0o500)
    program = (
        "from litellm_sqlalchemy.producer import Producer; from litellm_sqlalchemy.settings import load_settings; "
        "from litellm_sqlalchemy.frames import Kind; producer = Producer(load_settings().spool); "
        "print(producer.append(Kind.REQUEST, b'{}'), producer.dropped, producer.last_error); producer.close()"
    )
    as_other: dict[str, Any] = {"user": OTHER, "group": OTHER, "extra_groups": [], "env": others_deployment.environment}
    as_other |= {"cwd": "/", "capture_output": True, "text": True}
    done = subprocess.run([sys.executable, "-c", program], check=True, **as_other)
    assert done.stdout == (
        f"False 1 spool directory {others_deployment.spool} is not writable for uid {OTHER}: check owner and mode\n"
    )
    done = subprocess.run([*COMMAND, "write"], check=False, **as_other)
    assert (done.returncode, done.stderr.count("\n")) == (6, 1)
    assert "is not writable" in done.stderr


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
    wait_until(lambda: _takes(producer, ledger), "the producer looks again")
    producer.close()
    status = spool_status(tmp_path)
    assert (status.received, status.dropped, status.spooled) == (ledger.received, ledger.received - 2, 2)


def test_a_disk_that_hangs_stops_no_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With `fsync: always` a call waits for the disk, but not for ever."""
    producer = Producer(SpoolSettings(directory=tmp_path, fsync="always"))
    hangs = threading.Event()
    monkeypatch.setattr("litellm_sqlalchemy.producer._SYNC_LIMIT", 0.2)
    monkeypatch.setattr(os, "fdatasync", lambda _descriptor: hangs.wait(20))
    producer.append(Kind.REQUEST, request(uuid7().hex), BODY)
    asyncio.run(producer.synced())
    assert producer.counters.unsynced == 1
    hangs.set()
    asyncio.run(producer.synced())
    assert producer.counters.unsynced == 1
    producer.close()


def test_the_thread_of_a_producer_outlives_what_it_did_not_expect(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    producer = Producer(SpoolSettings(directory=tmp_path, fsync="always"))

    def fail() -> None:
        raise RuntimeError("broken by the test")

    with monkeypatch.context() as broken:
        broken.setattr(producer, "_sync_all", fail)
        producer.append(Kind.REQUEST, request(uuid7().hex), BODY)
        wait_until(lambda: producer.counters.hooks.failures, "it fails")
    producer.append(Kind.REQUEST, request(uuid7().hex), BODY)
    asyncio.run(producer.synced())
    assert producer.counters.unsynced == 0
    producer.close()


def test_delivered_segments_make_room_in_an_outage(
    small_disk: Path, deployment: Deployment, writer: WriterProcess, database: Database
) -> None:
    """The live spool comes first also while the writer waits for the database; what cannot be removed stops nothing."""
    deployment.update(spool={"directory": str(small_disk), "segment_size": 4096})
    producer, ledger = Producer(deployment.load().spool), Ledger()
    ledger.send(producer, 40)
    drain(deployment.load())
    retired = list(small_disk.glob("retired/*/*.seg"))
    assert retired
    odd = retired[0].with_name("0000000000.seg")
    odd.mkdir()
    ledger.send(producer, 1)
    usual = deployment.content["database"]["port"]
    deployment.update(database={"port": free_port()})
    writer.start()
    wait_until(lambda: "Connection refused" in writer.health()["message"], "the writer waits for the database")
    assert set(small_disk.glob("retired/*/*.seg")) == {odd, *retired}
    with full_disk(small_disk, 300_000):
        wait_until(lambda: list(small_disk.glob("retired/*/*.seg")) == [odd], "delivered segments are removed")
        message = f"cannot remove a delivered segment: {odd}: Is a directory"
        wait_until(lambda: message in writer.log.read_text(), "the log tells what could not be")
        assert not writer.ended()
    deployment.update(database={"port": usual})
    assert writer.stop() == 0
    writer.start()
    producer.close()
    wait_until(lambda: spool_status(small_disk).spooled == 0, "all is delivered")
    assert check(ledger, database, deployment.spool).dropped == 0


def test_an_fsync_that_keeps_failing_does_not_fill_the_spool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What may be lost is written again at once, and then ever more rarely; never is a file synced again."""
    monkeypatch.setattr("litellm_sqlalchemy.producer._SYNC_LIMIT", 0.01)
    monkeypatch.setattr("litellm_sqlalchemy.producer._RETRY_INTERVAL", 0.5)
    files, times = [], []

    def fail(descriptor: int) -> None:
        times.append(time.monotonic())
        files.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        raise OSError(5, "Input/output error")

    producer, ledger = Producer(SpoolSettings(directory=tmp_path, fsync="always")), Ledger()
    with monkeypatch.context() as broken:
        broken.setattr(os, "fdatasync", fail)
        ledger.send(producer, 10)
        wait_until(lambda: ledger.send(producer, 1) or asyncio.run(producer.synced()) or len(times) >= 4, "it is tried")
    waits = [after - before for before, after in pairwise(times)]
    assert waits[0] < 0.5
    assert waits[1] >= 0.5
    assert waits[2] >= 1
    assert len(files) == len(set(files)), "a second fsync could tell of a success that is none"
    assert len(list(tmp_path.rglob("*.seg"))) <= len(files) + 1
    assert producer.counters.unsynced > 0
    wait_until(lambda: not producer._sync_pause, "the disk is mended")
    unsynced = producer.counters.unsynced
    monkeypatch.setattr("litellm_sqlalchemy.producer._SYNC_LIMIT", 5)
    asyncio.run(producer.synced())
    assert producer.counters.unsynced == unsynced
    assert producer._room._taken == sum(file.stat().st_size for file in tmp_path.rglob("*.seg"))
    producer.close()
    status = spool_status(tmp_path)
    assert (status.spooled, status.dropped) == (ledger.received, 0)


def test_a_record_that_cannot_be_written_again_is_not_called_durable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> int:
        raise OSError(5, "Input/output error")

    producer, ledger = Producer(SpoolSettings(directory=tmp_path, fsync="always")), Ledger()
    ledger.send(producer, 1)
    asyncio.run(producer.synced())
    with monkeypatch.context() as broken:
        broken.setattr(os, "fdatasync", fail)
        broken.setattr("litellm_sqlalchemy.producer.make_file", fail)
        ledger.send(producer, 1)
        started = time.monotonic()
        asyncio.run(producer.synced())
        assert time.monotonic() - started < 3, "nobody waits for what nobody writes"
        assert producer.counters.unsynced == 1
    ledger.send(producer, 1)
    wait_until(lambda: asyncio.run(producer.synced()) or producer._segment is not None, "it is written again")
    assert producer.counters.unsynced == 1
    producer.close()
    status = spool_status(tmp_path)
    assert (status.received, status.spooled, status.dropped) == (ledger.received, 6, 0)
    assert len(list(tmp_path.rglob("*.seg"))) == 2


@pytest.mark.parametrize("step", ["os.open", "litellm_sqlalchemy.spool._share"])
def test_frames_before_the_first_segment_could_be_opened_are_counted(
    step: str, deployment: Deployment, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As without a file descriptor left; the writer must not take the spool for one that it has forgotten."""
    deployment.update(writer={"listen": None})
    producer, ledger = Producer(deployment.load().spool), Ledger()
    with producer._guard:
        producer._enter()

    def fail(*_: object) -> int:
        raise OSError(24, "Too many open files")

    with monkeypatch.context() as broken:
        broken.setattr(step, fail)
        ledger.send(producer, 5)
    assert (ledger.dropped, producer.last_error) == (10, "Too many open files")
    wait_until(lambda: _takes(producer, ledger), "the producer looks again")
    assert [file.name for file in deployment.spool.rglob("*.seg")] == ["0000000001.seg"]
    assert spool_status(deployment.spool).dropped == ledger.dropped
    drain(deployment.load())
    assert check(ledger, database, deployment.spool).dropped == ledger.dropped
    producer.close()


def test_a_call_that_cannot_be_logged_is_refused_with_the_reason_each_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Between two attempts, too; the log is told once for each time that it fails."""
    monkeypatch.setattr("litellm_sqlalchemy.producer._WELL_AFTER", 0)
    producer, ledger = Producer(SpoolSettings(directory=tmp_path, when_full="refuse", segment_size=4096)), Ledger()

    def fail(*_: object) -> int:
        raise OSError(24, "Too many open files")

    for times in (1, 2):
        with monkeypatch.context() as broken:
            broken.setattr("litellm_sqlalchemy.producer.make_file", fail)
            for _ in range(20):
                with contextlib.suppress(SpoolError):
                    producer.check_space()
                    ledger.send(producer, 1)
            for _ in range(2):
                with pytest.raises(SpoolError, match="Too many open files"):
                    producer.check_space()
        assert producer.last_error == "Too many open files"
        assert caplog.text.count("request log: Too many open files") == times
        wait_until(lambda: _accepts(producer), "the producer looks again")
        ledger.send(producer, 1)
    producer.close()


@pytest.mark.parametrize(("well_after", "lines"), [(0, 2), (5, 1)])
def test_the_log_is_told_of_each_outage_once(
    well_after: int, lines: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One outage does not end with a frame that happens to be written."""
    monkeypatch.setattr("litellm_sqlalchemy.producer._WELL_AFTER", well_after)
    monkeypatch.setattr("litellm_sqlalchemy.producer._RETRY_INTERVAL", 0)
    producer, ledger = Producer(SpoolSettings(directory=tmp_path)), Ledger()
    ledger.send(producer, 1)

    def fail(*_: object) -> int:
        ctypes.set_errno(errno.EIO)
        return -1

    for _ in range(2):
        with monkeypatch.context() as broken:
            broken.setattr("litellm_sqlalchemy.producer._write", fail)
            ledger.send(producer, 3)
        assert _takes(producer, ledger)
    assert ledger.dropped == producer.dropped == 12
    assert caplog.text.count("events are dropped and counted until it is mended") == lines
    producer.close()


def test_processes_that_are_gone_take_no_room(tmp_path: Path) -> None:
    """Each restart in an outage of the database leaves a folder, which may be almost empty."""
    settings, ledger = SpoolSettings(directory=tmp_path, max_size=400_000), Ledger()
    for _ in range(40):
        producer = Producer(settings)
        ledger.send(producer, 1)
        producer.close()
    living = [Producer(settings) for _ in range(3)]
    for producer in living:
        ledger.send(producer, 1)
    assert ledger.dropped == 0
    while not ledger.dropped:
        for producer in living:
            ledger.send(producer, 5)
    size = sum(file.stat().st_size for file in tmp_path.rglob("*.seg"))
    assert 300_000 < size <= 400_000, "the parts of those that live are left to them"
    for producer in living:
        producer.close()


@pytest.mark.parametrize("limit", ["the cap", "the disk"])
def test_calls_that_were_not_accepted_leave_room_for_those_that_were(limit: str, small_disk: Path) -> None:
    """With `when_full: refuse`: who has no key must not be able to fill the spool up."""
    cap = {"max_size": 1_000_000} if limit == "the cap" else {"reserve": 0}
    settings = SpoolSettings(directory=small_disk, when_full="refuse", **cap)
    producer, ledger = Producer(settings), Ledger()
    producer.check_space()
    ledger.send(producer, 1)
    rejected = dropped = 0
    while dropped < 5000:
        rejected += 1
        dropped += not producer.append(Kind.REQUEST, request(uuid7().hex), BODY, accepted=False)
    size = sum(file.stat().st_size for file in small_disk.rglob("*.seg"))
    assert size > 900_000
    assert limit == "the disk" or size <= 1_000_000
    ledger.send(producer, 10)
    assert ledger.dropped == 0, "what was accepted before is still written"
    assert (producer.received, producer.dropped) == (ledger.received + rejected, dropped)
    producer.close()
