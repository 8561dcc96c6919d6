"""UUIDv7: in order within a process, and of the time they are made at."""

import threading
import time
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from litellm_sqlalchemy.identifiers import first_id_at, uuid7

MOMENTS = st.datetimes(datetime(1970, 1, 2), datetime(2200, 1, 1), timezones=st.just(UTC))


def test_ids_of_a_process_are_in_order() -> None:
    ids = [uuid7() for _ in range(5000)]
    assert ids == sorted(ids)
    assert {identifier.version for identifier in ids} == {7}
    assert len(set(ids)) == len(ids)


def test_ids_follow_the_clock_when_it_is_set_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that was a day ahead for a moment: readers look for calls by the time in their ids."""
    now = time.time_ns()
    seen = []
    for ahead in (0, 86_400, -0.5, 0, 0.001):
        monkeypatch.setattr(time, "time_ns", lambda ahead=ahead: now + int(ahead * 1e9))
        seen.append(uuid7())
    times = [(identifier.int >> 80) / 1000 for identifier in seen]
    assert abs(times[1] - now / 1e9 - 86_400) < 1
    assert max(abs(found - now / 1e9) for found in times[2:]) < 1
    assert seen[2:] == sorted(seen[2:]), "small steps back keep the order"


def test_ids_of_many_threads_are_distinct() -> None:
    ids: list[object] = []
    threads = [threading.Thread(target=lambda: ids.extend(uuid7() for _ in range(500))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(ids)) == 4000


@given(MOMENTS)
def test_the_time_of_an_id(moment: datetime) -> None:
    nanoseconds = int((moment - datetime(1970, 1, 1, tzinfo=UTC)) / timedelta(microseconds=1)) * 1000
    identifier = uuid7(nanoseconds)
    millisecond = timedelta(milliseconds=1)
    assert first_id_at(moment - millisecond) <= identifier < first_id_at(moment + 2 * millisecond)


@pytest.mark.parametrize("moment", [datetime(1969, 12, 31, 23, tzinfo=UTC), datetime(1, 1, 1, tzinfo=UTC)])
def test_a_moment_before_all_ids(moment: datetime) -> None:
    """Readers ask from an hour earlier than `--since`, which may be 1970-01-01."""
    assert first_id_at(moment) == first_id_at(datetime(1970, 1, 1, tzinfo=UTC)) < uuid7(0)
