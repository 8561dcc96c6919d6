"""Producers and a writer that die at any place: every frame is stored once, and the counters say so.

A state machine does what it likes - append, fill up, kill, drain, die between two steps, damage files - and the judge
of the integration tests looks at every state that has settled.
"""

import errno
import json
import os
import random
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from support.fakes import POISON, CrashError, FakeStore, crashing, kill
from support.oracle import judge, tampered
from support.records import BODY, Ledger, request, response

from litellm_sqlalchemy import frames
from litellm_sqlalchemy.consumer import READ_SIZE, Consumer, Cursor, producers, read_state
from litellm_sqlalchemy.frames import Damage, Frame, Kind
from litellm_sqlalchemy.identifiers import uuid7
from litellm_sqlalchemy.producer import Producer
from litellm_sqlalchemy.settings import Settings, SpoolSettings
from litellm_sqlalchemy.spool import replace_file
from litellm_sqlalchemy.status import spool_status
from litellm_sqlalchemy.writer import Writer

#: Thousands of fsyncs are cheap in memory only.
MEMORY = "/dev/shm" if Path("/dev/shm").is_dir() else None
PICKS = st.integers(0, 5)
STEPS = (
    "after the commit",
    "before responses are made up",
    "after responses are made up",
    "before the state is saved",
    "after the state is saved",
    "before the folder is removed",
)


class Delivery(RuleBasedStateMachine):
    """Any number of producers, one writer at a time, one store."""

    def __init__(self) -> None:
        super().__init__()
        self.descriptors = os.listdir("/proc/self/fd")
        self.directory = Path(tempfile.mkdtemp(prefix="spool-", dir=MEMORY))
        self.store = FakeStore()
        self.ledger = Ledger()
        self.damaged = 0
        self.producers: dict[Producer, list[str]] = {}
        self.unnoted = False  # rows may be there that the writer had no time to count

    def teardown(self) -> None:
        for producer in self.producers:
            kill(producer)
        self.producers.clear()
        self._drain()
        status = judge(self.ledger, self.store.rows, self.directory, damaged=self.damaged)
        assert status.spooled == 0
        assert not producers(self.directory), "folders of producers that are gone are removed"
        shutil.rmtree(self.directory)
        assert len(os.listdir("/proc/self/fd")) == len(self.descriptors), "no file is left open"

    @initialize()
    def first(self) -> None:
        self.start_producer(None, 4096)

    @rule(cap=st.sampled_from([None, 6_000]), segment=st.sampled_from([4096, 8 * 1024 * 1024]))
    def start_producer(self, cap: int | None, segment: int) -> None:
        if len(self.producers) < 3:
            spool = SpoolSettings(directory=self.directory, max_size=cap, segment_size=segment)
            self.producers[Producer(spool)] = []

    @rule(pick=PICKS, count=st.integers(1, 6), poison=st.sampled_from([False, False, True]))
    def begin_calls(self, pick: int, count: int, poison: bool) -> None:
        producer = self._producer(pick)
        for _ in range(count):
            call = uuid7().hex
            payload = POISON if poison else BODY
            if self.ledger.append(producer, Kind.REQUEST, call, request(call), payload):
                self.producers[producer].append(call)
            else:
                producer.skip()
                self.ledger.received += 1
                self.ledger.dropped += 1

    @rule(pick=PICKS)
    def drop_a_frame(self, pick: int) -> None:
        """Of a producer that has a folder: who is killed before that leaves no counters."""
        producer = self._producer(pick)
        if producer._folder is not None:
            producer.skip()
            self.ledger.received += 1
            self.ledger.dropped += 1

    @rule(pick=PICKS)
    def end_calls(self, pick: int) -> None:
        producer = self._producer(pick)
        for call in self.producers[producer]:
            self.ledger.append(producer, Kind.RESPONSE, call, response(call), BODY)
        self.producers[producer].clear()

    @rule(pick=PICKS)
    def kill_producer(self, pick: int) -> None:
        producer = self._producer(pick)
        del self.producers[producer]
        kill(producer)

    @rule(pick=PICKS)
    def close_producer(self, pick: int) -> None:
        producer = self._producer(pick)
        del self.producers[producer]
        producer.close()

    @rule(pick=PICKS, cut=st.integers(1, 60))
    def kill_producer_in_a_write(self, pick: int, cut: int) -> None:
        """The last frame reaches the disk in part, as a power cut may leave it."""
        producer = self._producer(pick)
        call = uuid7().hex
        frame = frames.encode(
            Frame(Kind.REQUEST, producer.received + 1, request(call), b""), frames.seed_of(producer._name)
        )
        del self.producers[producer]
        kill(producer)
        segments = sorted((self.directory / "producers" / producer._name).glob("*.seg"))
        if segments:
            with segments[-1].open("ab") as file:
                file.write(frame[:cut])
            self.ledger.received += 1
            self.damaged += 1

    @rule(place=st.integers(0, len(BODY) - 1))
    def damage(self, place: int) -> None:
        """One byte of a payload changes, of a frame that is nowhere else yet.

        Never of the last one: with the part of another behind it, it would be one damage, and nobody could count two.
        """
        if self.unnoted:
            return
        for name in producers(self.directory):
            cursor = read_state(self.directory)[1].get(name, Cursor())
            for file in sorted((self.directory / "producers" / name).glob("*.seg")):
                content = bytearray(file.read_bytes())
                start = cursor.offset if int(file.stem) == cursor.segment else 0
                position = content.find(BODY, start)
                is_last = content.find(BODY, position + len(BODY)) < 0
                if int(file.stem) >= cursor.segment and position >= 0 and not is_last:
                    content[position + place] ^= 1
                    file.write_bytes(content)
                    self.damaged += 1
                    return

    @rule()
    def drain(self) -> None:
        self._drain()
        judge(self.ledger, self.store.rows, self.directory, damaged=self.damaged)

    @rule(step=st.sampled_from(STEPS), limit=st.integers(1, 5))
    def drain_and_die(self, step: str, limit: int) -> None:
        writer = self._writer(limit)
        consumer: Any = writer._consumer
        if step == "after the commit":
            consumer.account = crashing(consumer.account, before=True)
        elif step == "before the folder is removed":
            consumer._remove = crashing(consumer._remove, before=True)
        elif step.endswith("made up"):
            consumer.make_up = crashing(consumer.make_up, before=step.startswith("before"))
        else:
            consumer._save = crashing(consumer._save, before=step.startswith("before"))
        try:
            while writer.drain_once():
                pass
        except CrashError:
            self.unnoted = True
        finally:
            consumer.close()

    @invariant()
    def nothing_is_doubled_or_made_up(self) -> None:
        records = [record for record, _ in self.store.rows]
        assert len(records) == len(set(records))
        assert {record for record, status in self.store.rows if status != "interrupted"} <= self.ledger.tried

    def _producer(self, pick: int) -> Producer:
        if not self.producers:
            self.start_producer(None, 4096)
        return list(self.producers)[pick % len(self.producers)]

    def _writer(self, limit: int) -> Writer:
        writer = Writer(
            Settings.model_validate(
                {
                    "database": {"host": "nowhere"},
                    "spool": {"directory": str(self.directory)},
                    "writer": {"batch_size": limit, "listen": None},
                }
            )
        )
        writer._store = self.store  # type: ignore[assignment]
        return writer

    def _drain(self) -> None:
        writer = self._writer(1000)
        try:
            while writer.drain_once():
                pass
            assert not list(writer._consumer.batches(1000)), "a writer with nothing to do writes nothing"
        finally:
            writer._consumer.close()
        self.unnoted = False


TestDelivery = Delivery.TestCase
TestDelivery.settings = settings(max_examples=25, stateful_step_count=25, phases=[Phase.explicit, Phase.generate])


@given(
    fates=st.text("wxyd", max_size=12).filter(lambda fates: set(fates) & set("wxy")),
    limit=st.integers(1, 4),
    segment=st.sampled_from([4096, 8 * 1024 * 1024]),
    read=st.sampled_from([100, READ_SIZE]),
)
@example(fates="wxxdwdw", limit=1, segment=4096, read=100)
@settings(max_examples=50, deadline=None)
def test_dropped_and_damaged_frames_are_told_apart_at_any_time(fates: str, limit: int, segment: int, read: int) -> None:
    """Also where a frame, or a damage, is larger than what is read at once."""
    machine = Delivery()
    producer = Producer(SpoolSettings(directory=machine.directory, segment_size=segment))
    _write(machine, producer, fates)
    producer.close()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("litellm_sqlalchemy.consumer.READ_SIZE", read)
        while producers(machine.directory):
            writer = machine._writer(limit)
            writer.drain_once()
            writer._consumer.close()
            judge(machine.ledger, machine.store.rows, machine.directory, damaged=machine.damaged)
        machine.teardown()


def _delivery_in(directory: Path) -> Delivery:
    """Return a machine whose spool is in a directory of the test's."""
    machine = Delivery()
    shutil.rmtree(machine.directory)
    machine.directory = directory
    return machine


def _write(machine: Delivery, producer: Any, fates: str) -> None:
    """Have a producer's frames written (w), lost with their neighbours in one damage (x), alone (y) or dropped (d)."""
    for fate in fates:
        call = uuid7().hex
        frame = Frame(Kind.REQUEST, 0, request(call), BODY)
        if fate == "d":
            producer.skip()
            machine.ledger.received += 1
            machine.ledger.dropped += 1
        else:
            machine.ledger.append(producer, Kind.REQUEST, call, frame.metadata, BODY)
        if fate in "xy":
            size = frames.body_size(frame) + (frames.HEADER_SIZE if fate == "x" else 0)
            with (producer._folder / f"{producer._number:010}.seg").open("r+b") as file:
                file.seek(producer._segment.size - size)
                file.write(bytes(size))
            machine.damaged += 1


def test_the_totals_of_a_living_process_tell_too_once_its_counters_do(tmp_path: Path) -> None:
    machine = _delivery_in(tmp_path)
    producer = Producer(SpoolSettings(directory=tmp_path))
    for fates, damaged, dropped in (
        ("wxdxwd", 3, 0),  # the last frame that is counted is none that was delivered: what was dropped may be behind
        ("w", 2, 2),
        ("xxw", 4, 2),
        ("xdxwy", 7, 2),  # the last damage is part of a gap that has no end yet
        ("w", 7, 3),
    ):
        _write(machine, producer, fates)
        machine.drain()
        totals, _ = read_state(tmp_path)
        assert (totals.damaged, totals.dropped) == (damaged, dropped), fates
    producer.close()


@pytest.mark.parametrize("fates", ["wd", "wxwd"])
def test_a_frame_that_is_torn_behind_a_dropped_one_is_one_more(fates: str, tmp_path: Path) -> None:
    machine = _delivery_in(tmp_path)
    producer = Producer(SpoolSettings(directory=tmp_path))
    machine.producers[producer] = []
    _write(machine, producer, fates)
    machine.kill_producer_in_a_write(0, 30)
    written = next(tmp_path.glob("producers/*/*.seg")).read_bytes()
    machine._drain()
    assert judge(machine.ledger, machine.store.rows, tmp_path, damaged=machine.damaged).damaged == machine.damaged
    kept = [file.read_bytes() for file in tmp_path.glob("dead/*.damaged")]
    assert len(kept) == machine.damaged
    assert written[-30:] in kept


def test_the_state_is_an_older_packages_too(tmp_path: Path) -> None:
    """It knows this format, and these fields of a cursor, and leaves out the rest of the state when it writes."""
    known = {"segment", "offset", "sequence", "damaged", "open"}
    machine = _delivery_in(tmp_path)
    producer = Producer(SpoolSettings(directory=tmp_path))
    _write(machine, producer, "wdwxdwd")
    machine._drain()
    assert (tmp_path / "format").read_bytes() == b"1"
    content = json.loads((tmp_path / "state.json").read_bytes())
    assert [cursor.keys() for cursor in content["producers"].values()] == [known]
    (tmp_path / "state.json").write_text(json.dumps({name: content[name] for name in ("totals", "producers")}))
    producer.close()
    machine._drain()
    status = spool_status(tmp_path)
    assert (status.received, status.damaged, status.dropped) == (7, 2, 2), "a gap beside damage, as that one counts it"


def test_a_writer_without_its_memory_finds_nothing_but_damage(tmp_path: Path) -> None:
    machine = _delivery_in(tmp_path)
    producer = Producer(SpoolSettings(directory=tmp_path))
    _write(machine, producer, "y")
    producer.close()
    [segment] = tmp_path.glob("producers/*/*.seg")
    segment.rename(segment.with_name("0000000002.seg"))
    machine._drain()
    assert judge(machine.ledger, [], tmp_path, damaged=1).damaged == 1
    assert not producers(tmp_path)


def test_a_frame_that_a_killed_process_was_to_write_is_lost_by_no_disk(tmp_path: Path) -> None:
    """The first one: the folder has counters before it has a segment."""
    machine = _delivery_in(tmp_path)
    producer: Any = Producer(SpoolSettings(directory=tmp_path))
    producer._enter = crashing(producer._enter, before=False)
    with pytest.raises(CrashError):
        producer.append(Kind.REQUEST, request(uuid7().hex))
    kill(producer)
    assert judge(machine.ledger, [], tmp_path).received == 0
    machine._drain()
    assert judge(machine.ledger, [], tmp_path).received == 0
    assert not producers(tmp_path)


def _delivered_twice(directory: Path, *, idempotent: bool) -> tuple[Ledger, FakeStore]:
    """Deliver, die before that is noted, deliver again."""
    machine = _delivery_in(directory)
    machine.store.idempotent = idempotent
    producer = Producer(SpoolSettings(directory=directory))
    machine.ledger.send(producer, 10)
    producer.close()
    machine.drain_and_die("after the commit", 1000)
    machine._drain()
    return machine.ledger, machine.store


def test_delivered_twice_is_stored_once(tmp_path: Path) -> None:
    ledger, store = _delivered_twice(tmp_path, idempotent=True)
    assert judge(ledger, store.rows, tmp_path).duplicates == 20


def test_control_without_idempotency_the_judge_objects(tmp_path: Path) -> None:
    ledger, store = _delivered_twice(tmp_path, idempotent=False)
    with pytest.raises(AssertionError, match="a row is doubled"):
        judge(ledger, store.rows, tmp_path)


def test_control_whole_frames_that_are_called_damaged_are_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The counters of a reader that does so agree with each other."""
    decode = frames.decode

    def forgetful(*arguments: Any, **keywords: Any) -> Iterator[tuple[Frame | Damage, int]]:
        for number, (found, behind) in enumerate(decode(*arguments, **keywords), 1):
            yield (found if number % 4 else Damage(b"")), behind

    with monkeypatch.context() as broken:
        broken.setattr(frames, "decode", forgetful)
        ledger, store = _delivered_twice(tmp_path, idempotent=True)
    assert spool_status(tmp_path).damaged == 6, "of 20 frames, and of the 5 that the writer made up"
    with pytest.raises(AssertionError, match="lost: 5"):
        judge(ledger, store.rows, tmp_path)


def test_control_the_judge_sees_every_wrong_counter_and_every_missing_row(tmp_path: Path) -> None:
    ledger, store = _delivered_twice(tmp_path, idempotent=True)
    for status in tampered(spool_status(tmp_path)):
        with pytest.raises(AssertionError):
            judge(ledger, store.rows, tmp_path, status=status)
    rows = store.rows.copy()
    del rows[random.Random(1).randrange(len(rows))]
    with pytest.raises(AssertionError, match="lost: 1"):
        judge(ledger, rows, tmp_path)
    with pytest.raises(AssertionError, match="never sent"):
        judge(ledger, [*store.rows, ((Kind.REQUEST, uuid7().hex), "")], tmp_path)


def test_a_removed_folder_whose_directory_cannot_be_synced_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_directory: Path) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    producer = Producer(SpoolSettings(directory=tmp_path))
    Ledger().send(producer, 3)
    producer.close()
    consumer = Consumer(tmp_path)
    [batch] = consumer.batches(1000)
    delivery = FakeStore().deliver(batch.frames)
    consumer.account(batch, delivery)
    with monkeypatch.context() as patch:
        patch.setattr("litellm_sqlalchemy.consumer.sync_directory", fail)
        with pytest.raises(OSError, match="Input/output error"):
            consumer.retire(batch, delivery)
    assert list(consumer.cursors()) == [batch.producer], "what a crash may bring back is known"
    consumer.retire(batch, delivery)
    assert consumer.cursors() == {}
    consumer.close()


def test_made_up_responses_wait_for_room_and_keep_no_others_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fill_up(file: Path, content: bytes, *, reserved: bool = False) -> None:
        if file.suffix == ".seg":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace_file(file, content, reserved=reserved)

    machine = _delivery_in(tmp_path)
    gone, other = (Producer(SpoolSettings(directory=tmp_path)) for _ in range(2))
    call = uuid7().hex
    machine.ledger.append(gone, Kind.REQUEST, call, request(call), BODY)
    machine.ledger.send(other, 3)
    gone.close()
    with monkeypatch.context() as patch:
        patch.setattr("litellm_sqlalchemy.consumer.replace_file", fill_up)
        writer = machine._writer(1000)
        for _ in range(2):
            assert not writer.drain_once(), "it does not try without a pause"
            assert "No space left on device" in writer.health.problem()[1]
        writer._consumer.close()
    assert judge(machine.ledger, machine.store.rows, tmp_path).interrupted == 0
    other.close()
    machine._drain()
    assert judge(machine.ledger, machine.store.rows, tmp_path).interrupted == 1
    assert not producers(tmp_path)


def test_a_process_may_leave_more_calls_open_than_a_batch_holds(tmp_path: Path) -> None:
    machine = _delivery_in(tmp_path)
    producer = Producer(SpoolSettings(directory=tmp_path))
    for _ in range(10):
        call = uuid7().hex
        machine.ledger.append(producer, Kind.REQUEST, call, request(call), BODY)
    producer.close()
    for step in STEPS:
        machine.drain_and_die(step, 3)
    machine._drain()
    assert judge(machine.ledger, machine.store.rows, tmp_path).interrupted == 10
    assert not producers(tmp_path)
