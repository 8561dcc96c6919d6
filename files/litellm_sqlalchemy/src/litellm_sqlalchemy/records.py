"""From frames to rows: metadata and payload as PostgreSQL's binary COPY format wants them.

The models are the truth: columns, their order and their types come from them. A row is encoded by hand because that
costs a tenth of what an ORM flush costs, and the result goes through `COPY ... (FORMAT binary)` unchanged.
"""

import ipaddress
import struct
from base64 import b64encode
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import orjson
from sqlalchemy import (
    ARRAY,
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
_INT2, _INT4, _INT8, _FLOAT8 = (struct.Struct(">" + code).pack for code in "hiqd")

Metadata = dict[str, Any]


class RowError(Exception):
    """A frame whose content fits no row, whatever the database says."""


def _array(value: list[str]) -> bytes:
    items = [item.encode() for item in value]
    head = struct.pack(">iiIii", 1 if items else 0, 0, _TEXT_OID, len(items), 1)[: 20 if items else 12]
    return head + b"".join(_INT4(len(item)) + item for item in items)


def _inet(value: str) -> bytes:
    address = ipaddress.ip_address(value)
    family, bits = (2, 32) if address.version == 4 else (3, 128)  # PGSQL_AF_INET, PGSQL_AF_INET6
    return bytes((family, bits, 0, bits // 8)) + address.packed


#: How a value of the metadata becomes the binary form of a column, by SQLAlchemy type; the first that fits counts.
_ENCODERS: tuple[tuple[type[TypeEngine[Any]], Callable[[Any], bytes]], ...] = (
    (Uuid, bytes.fromhex),
    (DateTime, lambda value: _INT8(value - _EPOCH_2000)),
    (JSONB, lambda value: b"\x01" + (value if isinstance(value, bytes) else orjson.dumps(value))),
    (ARRAY, _array),
    (INET, _inet),
    (LargeBinary, bytes.fromhex),
    (Boolean, lambda value: b"\x01" if value else b"\x00"),
    (BigInteger, _INT8),
    (SmallInteger, _INT2),
    (Integer, _INT4),
    (Float, _FLOAT8),
    (Text, str.encode),
)


class Rows(NamedTuple):
    """Encoded rows of a batch, and the frames they were made of."""

    frames: list[Frame]
    encoded: list[tuple[Kind, bytes]]


class TableCopy:
    """Encodes rows of one table for binary COPY."""

    def __init__(self, table: Table) -> None:
        """Take columns and types from `table`."""
        self.table = table
        self.columns = [column.name for column in table.columns]
        self._encoders = [(column.name, _encoder(column.type)) for column in table.columns]
        self._count = _INT2(len(self.columns))

    def row(self, metadata: Metadata) -> bytes:
        """Return one row. Raises RowError for values that no column can hold."""
        parts = [self._count]
        name = ""
        try:
            for name, encoder in self._encoders:
                value = metadata.get(name)
                if value is None:
                    parts.append(_NULL)
                else:
                    data = encoder(value)
                    parts += (_INT4(len(data)), data)
        except (struct.error, ValueError, TypeError, OverflowError) as error:
            raise RowError(f"{self.table.name}.{name}: {error}") from None
        return b"".join(parts)

    @staticmethod
    def stream(rows: Iterable[bytes]) -> bytes:
        """Return what `COPY FROM STDIN (FORMAT binary)` reads."""
        return b"".join((_COPY_HEADER, *rows, _COPY_TRAILER))


def _encoder(column_type: TypeEngine[Any]) -> Callable[[Any], bytes]:
    return next(encode for kind, encode in _ENCODERS if isinstance(column_type, kind))


TABLES = {Kind.REQUEST: TableCopy(Request.__table__), Kind.RESPONSE: TableCopy(Response.__table__)}  # type: ignore[arg-type]


def identifier(frame: Frame) -> str:
    """Return the id (hexadecimal) of the call that a frame belongs to."""
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
    if frame.payload:
        truncated = bool(metadata.get("payload_truncated"))
        metadata["payload_encoding"], metadata["payload"] = encode_payload(frame.payload, truncated, opaque)
    return TABLES[frame.kind].row(metadata)


def encode_payload(payload: bytes, truncated: bool = False, opaque: bool = False) -> tuple[str, bytes]:
    """Return the encoding (see `models.PAYLOAD_ENCODINGS`) and the JSON text that `jsonb` accepts for a payload."""
    if truncated:
        return "truncated", orjson.dumps(payload.decode(errors="replace").replace("\0", "\N{REPLACEMENT CHARACTER}"))
    if not opaque and b"\\u0000" not in payload:
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
