"""What is kept of a payload: all of it, its shape without its words, or nothing."""

import re
from typing import Any

import orjson
from ahocorasick_rs import BytesAhoCorasick

#: Version of the rules below, stored with every row: raise it with every change of what they remove.
REDACTION_VERSION = 3
_REDACTED = "[redacted]"
#: Keys whose string values are no content: they stay readable in `redacted` mode.
_KEPT_KEYS = frozenset(
    {"model", "role", "type", "object", "id", "finish_reason", "stop_reason", "tool_choice", "name", "code", "created"}
)
#: What is kept of a guardrail's report where content is not.
_GUARDRAIL_KEYS = ("guardrail_name", "guardrail_mode", "guardrail_status", "duration")
#: Keys of JSON objects whose values are credentials, as clients send them to LiteLLM.
_SECRET_KEYS = (
    rb"[\w-]*(?:(?:api|private|secret)[_-]?key|access[_-]key(?:[_-]id)?|secret|[_-]token|password|credentials|"
    rb"authorization)"
)
_SECRET_KEY_ENDINGS = (b"ey", b"ey_id", b"ey-id", b"ecret", b"oken", b"assword", b"redentials", b"uthorization")
#: What is removed: texts that must be there in lower case, the whole shape, and what stands in its place. The first two
#: are values of keys, in JSON and in JSON within JSON, as the arguments of tools are: its quotes are escaped. The
#: others show by their shape; none of them reaches over the end of a JSON string.
_SECRETS = tuple(
    (hints, re.compile(pattern), replacement)
    for hints, pattern, replacement in (
        (
            tuple(ending + b'"' for ending in _SECRET_KEY_ENDINGS),
            rb'(?i:("' + _SECRET_KEYS + rb'"\s*:\s*")(?:[^"\\]|\\.)*")',
            rb'\1[redacted]"',
        ),
        (
            tuple(ending + b"\\" for ending in _SECRET_KEY_ENDINGS),
            rb'(?i:((\\+)"' + _SECRET_KEYS + rb'\2"\s*:\s*\2")[^"]{6,}?(\2"))',
            rb"\1[redacted]\3",
        ),
        *(
            (hints, pattern, b"[redacted]")
            for hints, pattern in (
                ((b"sk-",), rb"\bsk-[\w-]{16,}"),  # LiteLLM, OpenAI, Anthropic and their like
                ((b"akia", b"asia"), rb"\bA[KS]IA[A-Z0-9]{16}\b"),  # Amazon
                ((b"ccess_key",), rb"(?i:(?<=secret_access_key)[\s=:]{1,8})[\w+/=]{40}"),
                ((b"aiza",), rb"\bAIza[\w-]{30,}"),  # Google
                ((b"gsk_", b"hf_", b"xai-", b"pplx-", b"r8_"), rb"\b(?:gsk_|hf_|xai-|pplx-|r8_)[A-Za-z0-9]{20,}"),
                ((b"ghp_", b"gho_", b"ghs_", b"ghu_", b"github_pat_"), rb"\b(?:gh[posu]_|github_pat_)\w{20,}"),
                ((b"glpat-", b"xox", b"hvs."), rb"\b(?:glpat-|xox[a-z]-|hvs\.)[\w-]{16,}"),  # GitLab, Slack, Vault
                ((b"bearer ",), rb"(?i:(?<=bearer )[\w~+/.=-]{16,})"),
                ((b"eyj",), rb"\beyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]{8,}"),  # JSON Web Token
                ((b"://",), rb"""(?<=://)[^\s/@"'\\:]{0,128}:[^\s/@"'\\]{1,256}(?=@)"""),  # database URL
                (
                    (b"private key",),
                    rb'-----BEGIN [A-Z ]*PRIVATE KEY-----[^"]*?(?:-----END [A-Z ]*PRIVATE KEY-----|(?="))',
                ),
                ((b"scram-sha-256$",), rb"SCRAM-SHA-256\$\d+:[\w+/=]+\$[\w+/=]+:[\w+/=]+"),  # PostgreSQL's verifier
                ((b"age-secret-key-",), rb"AGE-SECRET-KEY-1[A-Z0-9]{30,}"),
            )
        ),
    )
)
#: Finds all hints in one pass; of each, the place of its secret in `_SECRETS`.
_HINTS = tuple((hint, place) for place, (hints, _, _) in enumerate(_SECRETS) for hint in hints)
_SEARCH = BytesAhoCorasick([hint for hint, _ in _HINTS])


def scrubbed(content: bytes) -> bytes:
    """Return JSON, or any text, without the secrets that show by their shape or, in JSON, by the name of their key."""
    for place in sorted({_HINTS[hint][1] for hint, *_ in _SEARCH.find_matches_as_indexes(content.lower(), True)}):
        _, shape, replacement = _SECRETS[place]
        content = shape.sub(replacement, content)
    return content


def without_messages(metadata: dict[str, Any]) -> dict[str, Any]:
    """Return a record's metadata without texts that may quote content: of errors, and what guardrails found."""
    result = dict(metadata)
    if result.get("error_message"):
        result["error_message"] = _REDACTED
    if result.get("attempts"):
        result["attempts"] = [{**attempt, "error_message": _REDACTED} for attempt in result["attempts"]]
    if result.get("guardrails"):
        result["guardrails"] = [_guardrail(found) for found in result["guardrails"]]
    return result


def _guardrail(found: Any) -> dict[str, Any]:
    return {key: found[key] for key in _GUARDRAIL_KEYS if key in found} if isinstance(found, dict) else {}


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
