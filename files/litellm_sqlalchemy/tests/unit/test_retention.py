"""Delivered segments stay for a while, and a replay finds in them what a restored database has lost."""

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


def test_segments_retired_before_the_time_are_left_out(tmp_path):
    delivered(tmp_path)
    assert found(tmp_path, time.time() + 10) == []


def test_segments_go_when_their_time_is_over(tmp_path):
    spool, _ = delivered(tmp_path, retain=100)
    Retention(spool).prune(now=time.time() + 90)
    assert found(tmp_path)
    Retention(spool).prune(now=time.time() + 110)
    assert list(tmp_path.glob("retired/*/")) == []


def test_what_was_removed_is_known_by_its_time(tmp_path):
    spool, _ = delivered(tmp_path, retain=100)
    assert removed_until(tmp_path) == 0
    newest = max(file.stat().st_mtime for file in tmp_path.glob("retired/*/*.seg"))
    Retention(spool).prune(now=time.time() + 110)
    assert abs(removed_until(tmp_path) - newest) < 0.001


def test_what_was_removed_last_is_known_when_older_segments_go(tmp_path):
    spool, _ = delivered(tmp_path, retain=100)
    delivered(tmp_path, retain=0)
    before = removed_until(tmp_path)
    Retention(spool).prune(now=time.time() + 110)
    assert list(tmp_path.glob("retired/*/*.seg")) == []
    assert removed_until(tmp_path) == before > 0


def test_the_oldest_go_above_the_size(tmp_path):
    spool, written = delivered(tmp_path, retain_size=6000)
    Retention(spool).prune(now=time.time())
    assert 0 < sum(file.stat().st_size for file in tmp_path.glob("retired/*/*.seg")) <= 6000
    assert set(found(tmp_path)) < set(written)


def test_nothing_is_kept_without_a_window(tmp_path):
    delivered(tmp_path, retain=0)
    assert list(tmp_path.glob("retired/*/*")) == []
    assert removed_until(tmp_path) > time.time() - 10, "a replay can tell"


def test_what_cannot_be_removed_keeps_no_others(tmp_path):
    spool, _ = delivered(tmp_path, retain=100)
    odd = next(tmp_path.glob("retired/*/")) / "0000000000.seg"
    odd.mkdir()
    retention = Retention(spool)
    retention.prune(now=time.time() + 110)
    assert retention.problem == f"{odd}: Is a directory"
    assert list(tmp_path.glob("retired/*/*.seg")) == [odd]
    odd.rmdir()
    retention.prune(now=time.time() + 110)
    assert retention.problem == ""
