"""What is kept of a payload: all of it, its shape without its words, or nothing."""

from typing import Any

import orjson

#: Version of the rules below, stored with every row: raise it with every change of what they remove.
REDACTION_VERSION = 1
_REDACTED = "[redacted]"
#: Keys whose string values are no content: they stay readable in `redacted` mode.
_KEPT_KEYS = frozenset(
    {"model", "role", "type", "object", "id", "finish_reason", "stop_reason", "tool_choice", "name", "code", "created"}
)


def redact(payload: bytes) -> bytes:
    """Return a JSON payload with every string outside `_KEPT_KEYS` replaced; empty when it is not JSON."""
    try:
        content = orjson.loads(payload)
    except orjson.JSONDecodeError:
        return b""
    return orjson.dumps(_redacted(content))


def _redacted(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            key: item if key in _KEPT_KEYS and isinstance(item, str) else _redacted(item) for key, item in value.items()
        }
    if isinstance(value, list):
        return [_redacted(item) for item in value]
    return _REDACTED if isinstance(value, str) else value
