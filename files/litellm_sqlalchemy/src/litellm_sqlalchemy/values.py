"""Values as the tables can hold them: what LiteLLM and clients hand over is neither checked nor limited."""

import math
import re
from typing import Any

import orjson

#: Characters kept of a text that is indexed (a btree entry holds 2,704 bytes) and of any other one.
_INDEXED_LENGTH = 512
TEXT_LENGTH = 8192
_INT4_MAX = 2**31 - 1
#: What LiteLLM calls a key by: its SHA-256, or the master key's name.
KEY_HASH = re.compile(r"[0-9a-f]{64}|litellm_proxy_master_key")


def text(value: object, length: int = _INDEXED_LENGTH) -> str | None:
    """Return a value as text that PostgreSQL can hold, None where there is none."""
    if value is None or value == "":
        return None
    result = value if type(value) is str else str(value)
    if len(result) > length:
        result = result[:length]
    if not result.isascii():
        result = result.encode(errors="replace").decode()
    return result.replace("\0", "\N{REPLACEMENT CHARACTER}") if "\0" in result else result


def number(value: object) -> int | None:
    """Return a token count as it fits the column, None where there is none."""
    if type(value) is int:
        return min(value, _INT4_MAX) if value >= 0 else None
    found = real(value)
    return None if found is None or found < 0 else min(int(found), _INT4_MAX)


def real(value: object) -> float | None:
    """Return a finite number, None where it is none."""
    return float(value) if isinstance(value, (float, int)) and math.isfinite(value) else None


def milliseconds(value: object) -> float | None:
    """Return a duration, None where it is none."""
    found = real(value)
    return None if found is None else round(found, 3)


def encoded(content: Any) -> bytes:
    """Return JSON, without what JSON cannot hold."""
    try:
        return orjson.dumps(content)
    except (TypeError, orjson.JSONEncodeError):
        return orjson.dumps(_plain(content))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {_plain(str(key)): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, bool | float) or (isinstance(value, int) and abs(value) < 2**63):
        return value
    return str(value).encode(errors="replace").decode()
