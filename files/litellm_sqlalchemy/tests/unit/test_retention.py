"""Delivered segments stay for a while, and a replay finds in them what a restored database has lost."""

import os
import time

import pytest

from litellm_sqlalchemy import retention
from litellm_sqlalchemy.consumer import Consumer
from litellm_sqlalchemy.frames import Kind
from litellm_sqlalchemy.producer import Producer
from litellm_sqlalchemy.retention import Retention, delivered_since, removed_until
from litellm_sqlalchemy.settings import SpoolSettings
from litellm_sqlalchemy.store import Delivery

CALLS = 40


def settings(directory, **more):
    return SpoolSettings(directory=directory, segment_size=4096, fsync="never", **more)


def append(producer):
    """Write requests of about 300 bytes; return their metadata."""
    written = [f'{{"id":"{number:032x}","filler":"{"x" * 250}"}}'.encode() for number in range(CALLS)]
    for metadata in written:
        assert producer.append(Kind.REQUEST, metadata)
    return written


def drain(spool):
    consumer = Consumer(spool.directory, Retention(spool))
    for batch in consumer.batches(1000):
        delivery = Delivery(inserted=len(batch.frames))
        consumer.account(batch, delivery)
        consumer.retire(batch, delivery)
    consumer.close()


def delivered(directory, **more):
    """Return a spool that is drained after its producer has ended, and what was in it."""
    spool = settings(directory, **more)
    producer = Producer(spool)
    written = append(producer)
    producer.close()
    drain(spool)
    return spool, written


def age(directory, place, seconds):
    """Make the segments of a place older."""
    for file in directory.glob(f"{place}/*/*.seg"):
        moment = file.stat().st_mtime - seconds
        os.utime(file, (moment, moment))


def after_a_minute(monkeypatch):
    usual = time.monotonic
    monkeypatch.setattr(time, "monotonic", lambda: usual() + 61)


def found(directory, since=0.0):
    return [frame.metadata for frame in delivered_since(directory, since)]


@pytest.mark.parametrize("alive", [True, False])
def test_what_was_delivered_is_found_again_in_its_order(tmp_path, alive):
    spool = settings(tmp_path)
    producer = Producer(spool)
    written = append(producer)
    if not alive:
        producer.close()
    drain(spool)
    assert list(tmp_path.glob("retired/*/*.seg"))
    assert found(tmp_path) == written
    if alive:
        producer.close()


@pytest.mark.parametrize("place", ["producers", "retired"])
def test_a_folder_that_cannot_be_read_is_not_passed_over(place, tmp_path):
    """It may hold what a user wants erased."""
    spool, _written = delivered(tmp_path)
    (tmp_path / place / "x").symlink_to("x")
    with pytest.raises(OSError, match="Too many levels of symbolic links"):
        found(spool.directory)


def test_a_segment_that_is_retired_as_it_is_looked_at_is_found(tmp_path, monkeypatch):
    producer = Producer(settings(tmp_path))
    written = append(producer)
    usual, left = retention.open_file, True

    def opened(file, *arguments, **keywords):
        nonlocal left
        if left and file.suffix == ".seg":
            left = False
            drain(settings(tmp_path))
        return usual(file, *arguments, **keywords)

    monkeypatch.setattr(retention, "open_file", opened)
    assert found(tmp_path) == written
    assert list(tmp_path.glob("retired/*/*.seg"))
    producer.close()


@pytest.mark.parametrize(("before", "is_found"), [(10, True), (-10, False)])
def test_the_time_counts_at_which_a_segment_was_retired(before, is_found, tmp_path):
    """Not the one at which its last frame was written: that may be from before an outage."""
    spool = settings(tmp_path)
    producer = Producer(spool)
    written = append(producer)
    producer.close()
    age(tmp_path, "producers", 1000)
    drain(spool)
    assert found(tmp_path, time.time() - before) == (written if is_found else [])


def test_segments_go_when_their_time_is_over(tmp_path):
    spool, written = delivered(tmp_path, retain=100)
    age(tmp_path, "retired", 90)
    Retention(spool).prune()
    assert found(tmp_path) == written
    age(tmp_path, "retired", 20)
    Retention(spool).prune()
    assert list(tmp_path.glob("retired/*/")) == []


def test_it_looks_for_them_once_a_minute(tmp_path, monkeypatch):
    spool, _ = delivered(tmp_path, retain=100)
    keeper = Retention(spool)
    keeper.prune()
    age(tmp_path, "retired", 110)
    keeper.prune()
    assert list(tmp_path.glob("retired/*/*.seg"))
    after_a_minute(monkeypatch)
    keeper.prune()
    assert list(tmp_path.glob("retired/*/*.seg")) == []


def test_what_was_removed_is_known_by_its_time(tmp_path):
    spool, _ = delivered(tmp_path, retain=100)
    assert removed_until(tmp_path) == 0
    age(tmp_path, "retired", 110)
    newest = max(file.stat().st_mtime for file in tmp_path.glob("retired/*/*.seg"))
    Retention(spool).prune()
    assert abs(removed_until(tmp_path) - newest) < 0.001


def test_what_was_removed_last_is_known_when_older_segments_go(tmp_path):
    spool, _ = delivered(tmp_path, retain=100)
    delivered(tmp_path, retain=0)
    before = removed_until(tmp_path)
    age(tmp_path, "retired", 110)
    Retention(spool).prune()
    assert list(tmp_path.glob("retired/*/*.seg")) == []
    assert removed_until(tmp_path) == before > 0


@pytest.mark.parametrize("is_first_oldest", [True, False])
def test_the_oldest_go_above_the_size(is_first_oldest, tmp_path):
    spool, written = delivered(tmp_path, retain_size=6000)
    now = time.time()
    for number, file in enumerate(sorted(tmp_path.glob("retired/*/*.seg"))):
        moment = now + (number if is_first_oldest else -number)
        os.utime(file, (moment, moment))
    Retention(spool).prune()
    assert 0 < sum(file.stat().st_size for file in tmp_path.glob("retired/*/*.seg")) <= 6000
    kept = found(tmp_path)
    assert kept == (written[-len(kept) :] if is_first_oldest else written[: len(kept)])


def test_nothing_is_kept_without_a_window(tmp_path):
    spool = settings(tmp_path, retain=0)
    producer = Producer(spool)
    append(producer)
    assert len(list(tmp_path.glob("producers/*/*.seg"))) > 1
    drain(spool)
    assert len(list(tmp_path.glob("producers/*/*.seg"))) == 1, "the one that grows"
    producer.close()
    drain(spool)
    assert list(tmp_path.glob("*/*/*.seg")) == []
    assert removed_until(tmp_path) > time.time() - 10, "a replay can tell"


def test_what_cannot_be_removed_keeps_no_others(tmp_path, monkeypatch):
    spool, _ = delivered(tmp_path, retain=100)
    odd = next(tmp_path.glob("retired/*/")) / "0000000000.seg"
    odd.mkdir()
    age(tmp_path, "retired", 110)
    os.utime(odd, (0, 0))  # the first to go
    retention = Retention(spool)
    retention.prune()
    assert retention.problem == f"{odd}: Is a directory"
    assert list(tmp_path.glob("retired/*/*.seg")) == [odd]
    odd.rmdir()
    after_a_minute(monkeypatch)
    retention.prune()
    assert retention.problem == ""
