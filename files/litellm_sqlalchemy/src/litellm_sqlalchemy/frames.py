"""Frames: what stands in a spool segment, one record each.

A frame is a header and a body. The header (24 bytes, big-endian): magic `LS`, format version, kind, sequence number of
the frame within its producer (8 bytes), body length (4), CRC-32 of the header up to here (4), CRC-32 of the body (4).
The body is the length of the metadata (4 bytes), the metadata as a JSON object, and the payload's bytes as they came.

Sequence numbers count what the producer wanted to write: a gap is what it had to drop, and 0 what the writer made up.
The header's own CRC lets a reader trust a length before it has read the body, so that a damaged body costs one frame
and no more.

Both CRCs start from a seed that only the spool knows (the name of the producer's folder). A payload is what a client
sent: bytes in it that look like a frame are none, however the file around them was damaged.
"""

import struct
from collections.abc import Iterator
from enum import IntEnum
from typing import NamedTuple
from zlib import crc32

FORMAT_VERSION = 1
MAGIC = b"LS"
_HEAD = struct.Struct(">2sBBQI")
_CRCS = struct.Struct(">II")
_LENGTH = struct.Struct(">I")
HEADER_SIZE = _HEAD.size + _CRCS.size


class Kind(IntEnum):
    """What a frame's metadata describes."""

    REQUEST = 1
    RESPONSE = 2


_KINDS = frozenset(Kind)


class Frame(NamedTuple):
    """One record: its kind, its sequence number in its producer, metadata (JSON) and payload as bytes."""

    kind: Kind
    sequence: int
    metadata: bytes
    payload: bytes


class Damage(NamedTuple):
    """Bytes that hold no valid frame."""

    content: bytes


def seed_of(producer: str) -> int:
    """Return the seed of the CRCs in a producer's segments."""
    return crc32(producer.encode())


def body_size(frame: Frame) -> int:
    """Return the size of a frame's body in bytes."""
    return _LENGTH.size + len(frame.metadata) + len(frame.payload)


def encode(frame: Frame, seed: int = 0) -> bytes:
    """Return the bytes of a frame."""
    head = _HEAD.pack(MAGIC, FORMAT_VERSION, frame.kind, frame.sequence, body_size(frame))
    length = _LENGTH.pack(len(frame.metadata))
    crc = crc32(frame.payload, crc32(frame.metadata, crc32(length, seed)))
    return b"".join((head, _CRCS.pack(crc32(head, seed), crc), length, frame.metadata, frame.payload))


def decode(data: bytes, *, complete: bool, seed: int = 0) -> Iterator[tuple[Frame | Damage, int]]:
    """Yield what stands in `data`, each with the offset behind it.

    `complete` says that nothing will be appended any more: what is cut short at the end is then damage, otherwise it
    is left for the next read.
    """
    size, offset = len(data), 0
    while offset < size:
        start = offset
        body = _body_length(data, offset, seed)
        if body is None:
            offset = _next_header(data, offset + 1, seed)
            if offset == size and not complete:
                return  # the rest may be a header that is still being written
            yield Damage(data[start:offset]), offset
            continue
        offset += HEADER_SIZE + body
        if offset > size and not complete:
            return
        frame = _frame(data, start, offset, seed) if offset <= size else None
        if frame is not None:
            yield frame, offset
        else:
            if _body_length(data, offset, seed) is None:  # bytes are missing, or too many
                behind = _next_header(data, start + 1, seed)
                if offset < size == behind and not complete:
                    return  # as above
                offset = behind
            yield Damage(data[start:offset]), offset


def _body_length(data: bytes, offset: int, seed: int) -> int | None:
    """Return the body length of the valid header at `offset`, None where there is none."""
    if len(data) - offset < HEADER_SIZE:
        return None
    head = data[offset : offset + _HEAD.size]
    magic, version, _kind, _sequence, length = _HEAD.unpack(head)
    if magic != MAGIC or version != FORMAT_VERSION:
        return None
    return int(length) if _CRCS.unpack_from(data, offset + _HEAD.size)[0] == crc32(head, seed) else None


def _next_header(data: bytes, offset: int, seed: int) -> int:
    """Return the offset of the next valid header, or the size of the data."""
    while (offset := data.find(MAGIC, offset)) >= 0:
        if _body_length(data, offset, seed) is not None:
            return offset
        offset += 1
    return len(data)


def _frame(data: bytes, start: int, end: int, seed: int) -> Frame | None:
    """Return the frame between `start` and `end`, None where its body is not what was written."""
    _magic, _version, kind, sequence, length = _HEAD.unpack_from(data, start)
    body = start + HEADER_SIZE
    if length < _LENGTH.size or _CRCS.unpack_from(data, start + _HEAD.size)[1] != crc32(data[body:end], seed):
        return None
    (metadata_length,) = _LENGTH.unpack_from(data, body)
    payload = body + _LENGTH.size + metadata_length
    if kind not in _KINDS or payload > end:
        return None
    return Frame(Kind(kind), sequence, data[body + _LENGTH.size : payload], data[payload:end])
