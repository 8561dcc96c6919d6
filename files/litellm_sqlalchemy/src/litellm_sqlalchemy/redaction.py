"""What is kept of a payload: all of it, its shape without its words, or nothing."""

import re
from typing import Any

import orjson

#: Version of the rules below, stored with every row: raise it with every change of what they remove.
REDACTION_VERSION = 1
_REDACTED = "[redacted]"
#: Keys whose string values are no content: they stay readable in `redacted` mode.
_KEPT_KEYS = frozenset(
    {"model", "role", "type", "object", "id", "finish_reason", "stop_reason", "tool_choice", "name", "code", "created"}
)
#: A member of a JSON object whose value is a credential, as clients may send them to LiteLLM; and what each holds.
_SECRET = re.compile(
    rb'("[\w-]*(?:(?:api|private|secret)[_-]?key|access[_-]key(?:[_-]id)?|secret|[_-]token|password|credentials|'
    rb'authorization)"\s*:\s*)"(?:[^"\\]|\\.)*"',
    re.IGNORECASE,
)
_SECRET_HINTS = tuple(
    hint + b'"'
    for ending in (b"ey", b"ey_id", b"ey-id", b"ecret", b"oken", b"assword", b"redentials", b"uthorization")
    for hint in (ending, ending.upper())
)


def without_secrets(payload: bytes) -> bytes:
    """Return a JSON request with the values of credentials replaced, in every mode; other bytes stay as they are."""
    if not any(hint in payload for hint in _SECRET_HINTS):
        return payload
    return _SECRET.sub(rb'\1"[redacted]"', payload)


def redact(payload: bytes) -> bytes:
    """Return a JSON payload with every string outside `_KEPT_KEYS` replaced; empty when it is not JSON."""
    try:
        content = orjson.loads(payload)
    except orjson.JSONDecodeError:
        return b""
    try:
        return orjson.dumps(_redacted(content))
    except (RecursionError, orjson.JSONEncodeError):  # nested too deeply
        return b""


def _redacted(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            key: item if key in _KEPT_KEYS and isinstance(item, str) else _redacted(item) for key, item in value.items()
        }
    if isinstance(value, list):
        if value and all(isinstance(item, int | float) for item in value):
            return _REDACTED  # tokens or a vector: words in another form
        return [_redacted(item) for item in value]
    return _REDACTED if isinstance(value, str) else value
