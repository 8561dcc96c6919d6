"""Frames come back as they were written; a damaged file yields every frame that is whole, and never another."""

import random
import time
from dataclasses import dataclass
from typing import cast
from zlib import crc32

import pytest
from hypothesis import given
from hypothesis import strategies as st

from litellm_sqlalchemy import frames
from litellm_sqlalchemy.frames import HEADER_SIZE, Damage, Frame, Kind

SEED = frames.seed_of("0197a3c4-5e6f-7000-8000-000000000001")
FRAMES = st.builds(
    Frame,
    st.sampled_from(Kind),
    st.integers(0, 2**63),
    st.binary(max_size=40),
    # its last byte is none that a header begins with: bytes removed at the right place would make another frame's
    # header complete the body, and that no reader can tell
    st.binary(max_size=60) | st.just(b"LS\x01\x01" * 5 + b"."),
)
LISTS = st.lists(FRAMES, min_size=1, max_size=6)


def _decoded(data: bytes, *, complete: bool = True, seed: int = SEED) -> list[Frame | Damage]:
    found, end = [], 0
    for item, behind in frames.decode(data, complete=complete, seed=seed):
        assert behind > end, "every step goes forward"
        end = behind
        found.append(item)
    assert end == len(data) or not complete, "nothing is left unsaid"
    return found


def _in_two_reads(data: bytes, cut: int) -> list[Frame | Damage]:
    """Read up to `cut` while more is being written, then the rest."""
    found, end = [], 0
    for item, behind in frames.decode(data[:cut], complete=False, seed=SEED):
        found.append(item)
        end = behind
    return found + _decoded(data[end:])


def _check(found: list[Frame | Damage], whole: list[Frame], written: list[Frame]) -> None:
    """Every whole frame is found and none that was not written; the damage may by chance leave a frame as it was."""
    read = [item for item in found if isinstance(item, Frame)]
    rest = iter(read)
    assert all(frame in rest for frame in whole), "in order, each once"
    rest = iter(written)
    assert all(frame in rest for frame in read)


@dataclass
class Segment:
    """Encoded frames, and where each stands."""

    frames: list[Frame]

    def __post_init__(self) -> None:
        encoded = [frames.encode(frame, SEED) for frame in self.frames]
        self.data = b"".join(encoded)
        ends = [sum(map(len, encoded[: number + 1])) for number in range(len(encoded))]
        self.spans = [(end - len(data), end) for end, data in zip(ends, encoded, strict=True)]

    def outside(self, start: int, end: int) -> list[Frame]:
        """Return the frames that no byte of [start, end) belongs to."""
        return [
            frame for frame, (first, last) in zip(self.frames, self.spans, strict=True) if last <= start or first >= end
        ]


@given(LISTS)
def test_round_trip(written: list[Frame]) -> None:
    assert _decoded(Segment(written).data) == written
    assert _decoded(Segment(written).data, complete=False) == written


@given(LISTS, st.data())
def test_cut_short(written: list[Frame], data: st.DataObject) -> None:
    segment = Segment(written)
    cut = data.draw(st.integers(0, len(segment.data)))
    whole = [frame for frame, (_, end) in zip(segment.frames, segment.spans, strict=True) if end <= cut]
    found = _decoded(segment.data[:cut])
    assert [item for item in found if isinstance(item, Frame)] == whole
    assert len(found) - len(whole) == (cut not in {0, *(end for _, end in segment.spans)})
    assert _decoded(segment.data[:cut], complete=False) == whole, "an unfinished frame is left for the next read"


@given(LISTS, st.data())
def test_one_bit_flipped(written: list[Frame], data: st.DataObject) -> None:
    segment = Segment(written)
    position = data.draw(st.integers(0, len(segment.data) - 1))
    damaged = bytearray(segment.data)
    damaged[position] ^= 1 << data.draw(st.integers(0, 7))
    found = _decoded(bytes(damaged))
    assert [item for item in found if isinstance(item, Frame)] == segment.outside(position, position + 1)
    assert sum(isinstance(item, Damage) for item in found) == 1


@given(LISTS, st.binary(min_size=1, max_size=80), st.data())
def test_garbage_inserted(written: list[Frame], garbage: bytes, data: st.DataObject) -> None:
    segment = Segment(written)
    position = data.draw(st.integers(0, len(segment.data)))
    damaged = segment.data[:position] + garbage + segment.data[position:]
    whole = [f for f, (start, end) in zip(segment.frames, segment.spans, strict=True) if not start < position < end]
    _check(_decoded(damaged), whole, written)
    starts = [first + len(garbage) * (first >= position) for first, _last in segment.spans]
    cut = data.draw(st.sampled_from(starts)) + data.draw(st.integers(0, HEADER_SIZE))
    _check(_in_two_reads(damaged, cut), whole, written)


@given(LISTS, st.data())
def test_bytes_removed(written: list[Frame], data: st.DataObject) -> None:
    segment = Segment(written)
    start = data.draw(st.integers(0, len(segment.data) - 1))
    end = data.draw(st.integers(start + 1, len(segment.data)))
    damaged, whole = segment.data[:start] + segment.data[end:], segment.outside(start, end)
    _check(_decoded(damaged), whole, written)
    ends = [last - max(0, min(last, end) - start) for _first, last in segment.spans]
    _check(_in_two_reads(damaged, data.draw(st.sampled_from(ends))), whole, written)


def test_as_many_bytes_removed_as_the_last_frame_has() -> None:
    """The frame before it then seems to end where that one does."""
    last = Frame(Kind.REQUEST, 2, b"{}", b"")
    first, size = frames.encode(Frame(Kind.REQUEST, 1, b"{}", bytes(60)), SEED), len(frames.encode(last, SEED))
    found = _decoded(first[:-size] + frames.encode(last, SEED))
    assert [type(item) for item in found] == [Damage, Frame]
    assert found[1] == last


@given(st.binary(max_size=300))
def test_noise_holds_no_frame(noise: bytes) -> None:
    assert not [item for item in _decoded(noise) if isinstance(item, Frame)]


@pytest.mark.parametrize("damage", ["first half missing", "bit flipped", "torn"])
def test_a_client_cannot_smuggle_a_frame_in(damage: str) -> None:
    """A payload that holds a frame, in a frame that is damaged so that readers have to search for the next one."""
    forged = frames.encode(Frame(Kind.RESPONSE, 7, b'{"request_id":"00"}', b"forged"))
    outer = frames.encode(Frame(Kind.REQUEST, 1, b"{}", forged * 3), SEED)
    after = Frame(Kind.REQUEST, 2, b"{}", b"after")
    body = {"first half missing": outer[: HEADER_SIZE + 2] + outer[HEADER_SIZE + 8 :], "torn": outer[:-4]}.get(
        damage, outer[:30] + bytes([outer[30] ^ 1]) + outer[31:]
    )
    found = _decoded(body + frames.encode(after, SEED))
    assert [item for item in found if isinstance(item, Frame)] == [after]
    without_seed = _decoded(body[HEADER_SIZE:], seed=0)
    assert any(isinstance(item, Frame) for item in without_seed), "the control: without the seed it would pass"


def test_the_bytes_of_a_frame_stay_the_same() -> None:
    """A spool may have been written by an older package."""
    data = bytes.fromhex("4c53 01 02 0000000000000007 00000007 8a4a8bd2 57d6c768 00000002 7b7d 78")
    assert frames.encode(Frame(Kind.RESPONSE, 7, b"{}", b"x"), SEED) == data


def test_what_a_later_version_writes_is_damage(monkeypatch: pytest.MonkeyPatch) -> None:
    kind = frames.encode(Frame(cast(Kind, 9), 1, b"{}", b""), SEED)
    with monkeypatch.context() as later:
        later.setattr(frames, "FORMAT_VERSION", 2)
        version = frames.encode(Frame(Kind.REQUEST, 2, b"{}", b""), SEED)
    assert [type(item) for data in (kind, version) for item in _decoded(data)] == [Damage, Damage]


@pytest.mark.parametrize("body", [b"", b"\0\0\0\x09{}"])
def test_a_body_that_no_producer_writes_is_damage(body: bytes) -> None:
    """A gateway that somebody has taken over can give it the right CRCs: it ends before its metadata do."""
    head = frames._HEAD.pack(frames.MAGIC, frames.FORMAT_VERSION, Kind.REQUEST, 1, len(body))
    data = head + frames._CRCS.pack(crc32(head, SEED), crc32(body, SEED)) + body
    assert [type(item) for item in _decoded(data)] == [Damage]


def test_a_large_segment_is_read_in_linear_time() -> None:
    """Damage must not make every later frame be searched for from the start."""
    small, large = _seconds_behind_noise(30_000), _seconds_behind_noise(120_000)
    assert large < 8 * small, f"four times the noise takes {large / small:.1f} times as long"


def _seconds_behind_noise(places: int) -> float:
    """Read a frame behind so many places where one might begin; return the shortest of three times."""
    source = random.Random(1)
    frame = Frame(Kind.REQUEST, 1, b"{}", b"x")
    data = b"".join(b"LS" + source.randbytes(30) for _ in range(places)) + frames.encode(frame, SEED)
    seconds = []
    for _ in range(3):
        began = time.process_time()
        found = _decoded(data)
        seconds.append(time.process_time() - began)
        assert [item for item in found if isinstance(item, Frame)] == [frame]
    return min(seconds)
