"""What is kept of a payload: all of it, its shape without its words, or nothing."""

import re
from typing import Any

import orjson
from ahocorasick_rs import BytesAhoCorasick, MatchKind

#: Version of the rules below, stored with every row: raise it with every change of what they remove.
REDACTION_VERSION = 4
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
_SECRET_KEY_ENDINGS = (b"ey", b"ey_id", b"ey-id", b"ecret", b"oken", b"sword", b"redentials", b"uthorization")
#: What is removed: texts that must be there in lower case, the whole shape, and what stands in its place. The first two
#: are values of keys, in JSON and in JSON within JSON, as the arguments of tools are: its quotes are escaped, by up to
#: 15 backslashes in the fourth. The others show by their shape; none of them reaches over the end of a JSON string.
#: Clients choose what is searched here, in the gateway's event loop: no shape may be looked for from many places of the
#: same run of characters (hence the lookbehinds, and `*+` and `++`, which give nothing back).
_SECRETS = tuple(
    (hints, re.compile(pattern), replacement)
    for hints, pattern, replacement in (
        (
            tuple(ending + b'"' for ending in _SECRET_KEY_ENDINGS),
            rb'(?is:("' + _SECRET_KEYS + rb'"\s*+:\s*+")(?:[^"\\]++|\\.)*+(?:"|\\?\Z))',
            rb'\1[redacted]"',
        ),
        (
            tuple(ending + b"\\" for ending in _SECRET_KEY_ENDINGS),
            rb'(?i:((?<!\\)(\\{1,15})"' + _SECRET_KEYS + rb'\2"\s*+:\s*+\2")[^"]{6,}?(\2"|\Z))',
            rb"\1[redacted]\3",
        ),
        # database URL; begins with a literal, which is looked for quickly: every response names its provider's URL
        ((b"://",), rb"""(://)[^\s/@"'\\:]{0,128}:[^\s/@"'\\]{1,256}(?=@)""", rb"\1[redacted]"),
        *(
            (hints, pattern, b"[redacted]")
            for hints, pattern in (
                ((b"sk-",), rb"\bsk-[\w-]{16,}"),  # LiteLLM, OpenAI, Anthropic and their like
                ((b"akia", b"asia"), rb"\bA[KS]IA[A-Z0-9]{16}\b"),  # Amazon
                ((b"ccess_",), rb"(?i:(?<=secret_access_key)[\s=:]{1,8})[\w+/=]{40}"),
                ((b"aiza",), rb"\bAIza[\w-]{30,}"),  # Google
                ((b"gsk_", b"hf_", b"xai-", b"pplx-", b"r8_"), rb"\b(?:gsk_|hf_|xai-|pplx-|r8_)[A-Za-z0-9]{20,}"),
                ((b"ghp_", b"gho_", b"ghs_", b"ghu_", b"github_pat_"), rb"\b(?:gh[posu]_|github_pat_)\w{20,}"),
                ((b"glpat-", b"xox", b"hvs."), rb"\b(?:glpat-|xox[a-z]-|hvs\.)[\w-]{16,}"),  # GitLab, Slack, Vault
                ((b"bearer ",), rb"(?i:(?<=bearer )[\w~+/.=-]{16,})"),
                ((b"eyj",), rb"(?<![\w-])(?>[\w-]*?eyJ)[\w-]{8,}+\.[\w-]{8,}+\.[\w-]{8,}"),  # JSON Web Token
                (
                    (b"begin ",),
                    rb'-----BEGIN [A-Z ]*PRIVATE KEY-----[^"]*?(?:-----END [A-Z ]*PRIVATE KEY-----|(?=")|\Z)',
                ),
                ((b"scram-sha-256$",), rb"SCRAM-SHA-256\$\d+:[\w+/=]+\$[\w+/=]+:[\w+/=]+"),  # PostgreSQL's verifier
                ((b"secret-key-1",), rb"AGE-SECRET-KEY-1[A-Z0-9]{30,}"),
            )
        ),
    )
)
#: Finds all hints in one pass; of each, the place of its secret in `_SECRETS`. Of hints that overlap only the first is
#: found: none begins with what another one ends with, unless it cannot be one then.
_HINTS = tuple((hint, place) for place, (hints, _, _) in enumerate(_SECRETS) for hint in hints)
#: What else must be there, where a hint is frequent: each response names its provider's URL, few a login in it.
_NEEDED = {b"://": b"@", b"begin ": b"-----BEGIN "}
_SEARCH = BytesAhoCorasick([hint for hint, _ in _HINTS], matchkind=MatchKind.LeftmostFirst)


def scrubbed(content: bytes) -> bytes:
    """Return JSON, or any text, without the secrets that show by their shape or, in JSON, by the name of their key."""
    return scrubbed_together(content)[0]


def scrubbed_together(*contents: bytes) -> list[bytes]:
    """Return the contents as `scrubbed` does, with one search, which lets other threads run and then waits for them."""
    found = _SEARCH.find_matches_as_indexes(b"\n".join(contents).lower())
    result = list(contents)
    for place in sorted({_HINTS[hint][1] for hint, *_ in found}):
        hints, shape, replacement = _SECRETS[place]
        needed = _NEEDED.get(hints[0], b"")
        result = [shape.sub(replacement, content) if needed in content else content for content in result]
    return result


def without_messages(metadata: dict[str, Any]) -> dict[str, Any]:
    """Return a record's metadata without texts that may quote content: of errors, and what guardrails found."""
    result = dict(metadata)
    if result.get("error_message"):
        result["error_message"] = _REDACTED
    if result.get("attempts"):
        result["attempts"] = [{**attempt, "error_message": _REDACTED} for attempt in result["attempts"]]
    if result.get("guardrails"):
        result["guardrails"] = [guardrail_summary(found) for found in result["guardrails"]]
    return result


def guardrail_summary(found: Any) -> dict[str, Any]:
    """Return of a guardrail's report who decided what, and in what time."""
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
