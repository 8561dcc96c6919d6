"""What is kept of a payload: all of it, its shape without its words, or nothing."""

import re
from typing import Any

import orjson

#: Version of the rules below, stored with every row: raise it with every change of what they remove.
REDACTION_VERSION = 2
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


#: Secrets that show by their shape: text that must be there, cheap to look for, and the whole shape.
#: None of them reaches over the end of a JSON string.
_SHAPES = tuple(
    (hints, re.compile(pattern))
    for hints, pattern in (
        ((b"sk-",), rb"\bsk-[\w-]{16,}"),  # LiteLLM, OpenAI, Anthropic and their like
        ((b"AKIA", b"ASIA"), rb"\bA[KS]IA[A-Z0-9]{16}\b"),  # Amazon
        ((b"AIza",), rb"\bAIza[\w-]{30,}"),  # Google
        ((b"gsk_", b"hf_", b"xai-", b"pplx-", b"r8_"), rb"\b(?:gsk_|hf_|xai-|pplx-|r8_)[A-Za-z0-9]{20,}"),
        ((b"ghp_", b"gho_", b"ghs_", b"ghu_", b"github_pat_"), rb"\b(?:gh[posu]_|github_pat_)\w{20,}"),
        ((b"glpat-", b"xox", b"hvs."), rb"\b(?:glpat-|xox[a-z]-|hvs\.)[\w-]{16,}"),  # GitLab, Slack, Vault
        ((b"earer ", b"EARER "), rb"(?i:(?<=bearer )[\w~+/.=-]{16,})"),
        ((b"eyJ",), rb"\beyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]{8,}"),  # JSON Web Token
        ((b"://",), rb"""(?<=://)[^\s/@"'\\:]{0,128}:[^\s/@"'\\]{1,256}(?=@)"""),  # database URL
        ((b"PRIVATE KEY",), rb'-----BEGIN [A-Z ]*PRIVATE KEY-----[^"]*?(?:-----END [A-Z ]*PRIVATE KEY-----|(?="))'),
        ((b"SCRAM-SHA-256$",), rb"SCRAM-SHA-256\$\d+:[\w+/=]+\$[\w+/=]+:[\w+/=]+"),  # PostgreSQL's verifier
        ((b"AGE-SECRET-KEY-",), rb"AGE-SECRET-KEY-1[A-Z0-9]{30,}"),
    )
)


def scrubbed(content: bytes) -> bytes:
    """Return JSON, or any text, without the secrets that show by their shape."""
    for hints, shape in _SHAPES:
        if any(hint in content for hint in hints):
            content = shape.sub(b"[redacted]", content)
    return content


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
