"""From frames to rows: metadata and payload as PostgreSQL's binary COPY format wants them.

The models are the truth: columns, their order and their types come from them. A row is encoded by hand because that
costs a tenth of what an ORM flush costs, and the result goes through `COPY ... (FORMAT binary)` unchanged.
"""

import functools
import ipaddress
import re
import struct
from base64 import b64encode
from collections.abc import Callable, Iterator
from typing import Any

import orjson
from sqlalchemy import (
    ARRAY,
    JSON,
    REAL,
    BigInteger,
    Boolean,
    DateTime,
    Float,
    Integer,
    LargeBinary,
    SmallInteger,
    Table,
    Text,
    Uuid,
)
from sqlalchemy.dialects.postgresql import INET, JSONB
from sqlalchemy.types import TypeEngine

from litellm_sqlalchemy.frames import Frame, Kind
from litellm_sqlalchemy.models import Request, Response

#: PostgreSQL counts time from 2000-01-01 00:00 UTC; metadata has Unix time. Both in microseconds.
_EPOCH_2000 = 946_684_800_000_000
_TEXT_OID = 25
_COPY_HEADER = b"PGCOPY\n\xff\r\n\0" + bytes(8)
_COPY_TRAILER = b"\xff\xff"
_NULL = struct.pack(">i", -1)
_INT4 = struct.Struct(">i").pack
_LENGTHS = [_INT4(size) for size in range(256)]
#: Bytes that go to the server at once: four TLS records.
_PIECE_SIZE = 64 * 1024
#: U+0000 in JSON: an escape, unless its backslash is escaped itself.
_NUL = re.compile(rb"(?<!\\)((?:\\\\)*)\\u0000")
_UNFIT = (struct.error, AttributeError, ValueError, TypeError, OverflowError)

Metadata = dict[str, Any]


class RowError(Exception):
    """A frame whose content fits no row, whatever the database says."""


def _sized(data: bytes) -> bytes:
    """Return a field: its length, then itself."""
    size = len(data)
    return (_LENGTHS[size] if size < len(_LENGTHS) else _INT4(size)) + data


def _number(code: str) -> Callable[[Any], bytes]:
    packer = struct.Struct(f">i{code}")
    size = packer.size - 4
    return lambda value: packer.pack(size, value)


def _text(value: str) -> bytes:
    return _sized(str.encode(value))


def _json(value: bytes) -> bytes:
    return b"".join((_INT4(len(value)), value))


def _jsonb(value: Any) -> bytes:
    data = orjson.dumps(value)
    if b"\\u0000" in data:  # which `jsonb` refuses
        data = _NUL.sub(rb"\1\\ufffd", data)
    return b"".join((_INT4(len(data) + 1), b"\x01", data))


def _array(value: list[str]) -> bytes:
    items = [item.encode() for item in value]
    head = struct.pack(">iiIii", 1 if items else 0, 0, _TEXT_OID, len(items), 1)[: 20 if items else 12]
    return _sized(head + b"".join(map(_sized, items)))


@functools.lru_cache(maxsize=1024)
def _inet(value: str) -> bytes:
    address = ipaddress.ip_address(value)
    family, bits = (2, 32) if address.version == 4 else (3, 128)  # PGSQL_AF_INET, PGSQL_AF_INET6
    return _sized(bytes((family, bits, 0, bits // 8)) + address.packed)


_TIME = _number("q")
#: How a value of the metadata becomes a field of a binary row, by SQLAlchemy type; the first that fits counts.
_ENCODERS: tuple[tuple[type[TypeEngine[Any]], Callable[[Any], bytes]], ...] = (
    (Uuid, lambda value: _sized(bytes.fromhex(value))),
    (DateTime, lambda value: _TIME(value - _EPOCH_2000)),
    (JSONB, _jsonb),
    (JSON, _json),
    (ARRAY, _array),
    (INET, _inet),
    (LargeBinary, lambda value: _sized(bytes.fromhex(value))),
    (Boolean, lambda value: b"\0\0\0\1\1" if value else b"\0\0\0\1\0"),
    (BigInteger, _number("q")),
    (SmallInteger, _number("h")),
    (Integer, _number("i")),
    (REAL, _number("f")),
    (Float, _number("d")),
    (Text, _text),
)


class TableCopy:
    """Encodes rows of one table for binary COPY."""

    def __init__(self, table: Table) -> None:
        """Take columns and types from `table`."""
        self.table = table
        self.columns = [column.name for column in table.columns]
        self._fields = [(column.name, _encoder(column.type)) for column in table.columns]
        self._count = struct.pack(">h", len(self.columns))

    def row(self, metadata: Metadata) -> bytes:
        """Return one row. Raises RowError for values that no column can hold."""
        get = metadata.get
        try:
            fields = [_NULL if (value := get(name)) is None else encode(value) for name, encode in self._fields]
        except _UNFIT:
            raise RowError(self._misfit(metadata)) from None
        return self._count + b"".join(fields)

    def _misfit(self, metadata: Metadata) -> str:
        """Return the first column whose value does not fit, and why."""
        for name, encode in self._fields:
            try:
                if metadata.get(name) is not None:
                    encode(metadata[name])
            except _UNFIT as error:
                return f"{self.table.name}.{name}: {error}"
        raise AssertionError


class RowReader:
    """The file that COPY reads: rows, encoded while the server works on those before.

    A frame that fits no row is left out and stands in `misfits`, with the reason.
    """

    def __init__(self, frames: list[Frame], *, opaque: bool = False) -> None:
        """Take frames of one kind; `opaque` as in `encode_row`."""
        self.misfits: list[tuple[Frame, str]] = []
        self._frames = frames
        self._opaque = opaque
        self._pieces = self._encode()

    def read(self, _size: int) -> bytes:
        """Return a piece of the stream, of about 64 KB whatever was asked for; nothing at its end."""
        return next(self._pieces, b"")

    def _encode(self) -> Iterator[bytes]:
        rows, size = [_COPY_HEADER], 0
        for frame in self._frames:
            try:
                row = encode_row(frame, opaque=self._opaque)
            except RowError as error:
                self.misfits.append((frame, str(error)))
                continue
            except MemoryError:  # no fault of the frame
                raise
            except Exception as error:  # psycopg2 would make a cancelled query of it, which is tried again for ever
                self.misfits.append((frame, f"{type(error).__name__}: {error}"))
                continue
            rows.append(row)
            size += len(row)
            if size >= _PIECE_SIZE:
                yield b"".join(rows)
                rows, size = [], 0
        yield b"".join((*rows, _COPY_TRAILER))


def _encoder(column_type: TypeEngine[Any]) -> Callable[[Any], bytes]:
    return next(encode for kind, encode in _ENCODERS if isinstance(column_type, kind))


TABLES = {Kind.REQUEST: TableCopy(Request.__table__), Kind.RESPONSE: TableCopy(Response.__table__)}  # type: ignore[arg-type]
#: The id where the callback writes it: first in the metadata.
_IDENTIFIER = re.compile(rb'\{"(?:request_)?id":"([0-9a-f]{32})"')


def identifier(frame: Frame) -> str:
    """Return the id (hexadecimal) of the call that a frame belongs to."""
    if found := _IDENTIFIER.match(frame.metadata):
        return found[1].decode()
    metadata = orjson.loads(frame.metadata)
    return str(metadata["id" if frame.kind is Kind.REQUEST else "request_id"])


def encode_row(frame: Frame, *, opaque: bool = False) -> bytes:
    """Return the row of a frame for binary COPY. Raises RowError.

    `opaque` stores the payload as Base64, for one that PostgreSQL refused as JSON.
    """
    try:
        metadata = orjson.loads(frame.metadata)
    except orjson.JSONDecodeError as error:
        raise RowError(f"metadata is not JSON: {error}") from None
    if not isinstance(metadata, dict):
        raise RowError("metadata is no JSON object")
    if frame.payload:
        truncated = bool(metadata.get("payload_truncated"))
        metadata["payload_encoding"], metadata["payload"] = encode_payload(frame.payload, truncated, opaque)
    return TABLES[frame.kind].row(metadata)


def encode_payload(payload: bytes, truncated: bool = False, opaque: bool = False) -> tuple[str, bytes]:
    """Return the encoding (see `models.PAYLOAD_ENCODINGS`) and the JSON text that stands for a payload."""
    if truncated:
        return "truncated", orjson.dumps(payload.decode(errors="replace").replace("\0", "\N{REPLACEMENT CHARACTER}"))
    if not opaque and b"\\u0000" not in payload:  # which `json` takes and then fails to read
        try:
            orjson.loads(payload)
        except orjson.JSONDecodeError:
            pass
        else:
            return "json", payload
    if not opaque and b"\0" not in payload:
        try:
            return "text", orjson.dumps(payload.decode())
        except UnicodeDecodeError:
            pass
    return "base64", b'"' + b64encode(payload) + b'"'
