"""What is kept of a payload: all of it, its shape without its words, or nothing."""

import re
from collections.abc import Callable
from typing import Any

import orjson
from pydantic_core import SchemaValidator, core_schema

#: Version of the rules below, stored with every row: raise it with every change of what they remove.
REDACTION_VERSION = 6
_REDACTED = "[redacted]"
#: Keys whose string values are no content where they look like identifiers: these stay readable in `redacted` mode.
_KEPT_KEYS = frozenset(
    {"model", "role", "type", "object", "id", "finish_reason", "stop_reason", "tool_choice", "name", "code", "created"}
)
_is_identifier = re.compile(r"[A-Za-z0-9_.:/@-]{1,128}").fullmatch
#: Keys of objects that are all content, whatever they call its parts: what tools are called with, and clients' notes.
_CONTENT_KEYS = frozenset({"input", "arguments", "args", "parameters", "metadata"})
#: What is kept of a guardrail's report where content is not.
_GUARDRAIL_KEYS = ("guardrail_name", "guardrail_mode", "guardrail_status", "duration")
#: Keys of JSON objects whose values are credentials, as clients send them to LiteLLM.
_SECRET_KEYS = (
    r"(?:(?:api|private|secret)[_-]?keys?|access[_-]?key(?:[_-]?id)?|secrets?|[a-z_-]token|passwords?"
    r"|credentials|authorization)"
)

#: How JSON, also within JSON, and URLs write a character, and how a terminal's colour ends: the `n` of `\n` and the `m`
#: of `\u001b[31m` are no part of the word behind it.
_ESCAPES = (r"\\[bfnrt]", r"\\u[0-9A-Fa-f]{4}", "%[0-9A-Fa-f]{2}", r"[\[0-9;][mK]")
#: Characters of Base64: in JSON PHP writes `\/`, .NET `\u002B`, Gson `\u003d`, within JSON with more backslashes.
_SLASH = r"\\{0,7}/"
_BASE64 = rf"[\w+=]|{_SLASH}|\\{{1,8}}u00(?:2[Bb]|3[Dd])"
#: A character as JSON escapes it that is no quote.
_UNICODE = r"\\{1,8}u(?!002[27])[0-9A-Fa-f]{4}"


def _begun(*prefixes: str) -> str:
    """Return a pattern of prefixes, each of a fixed width, where a word begins.

    What stands before a prefix is looked at from behind it: Python leaps from one literal to the next.
    """
    begins = (
        rf"{prefix}(?:(?<!\w{prefix})|{'|'.join(f'(?<={escape}{prefix})' for escape in _ESCAPES)})"
        for prefix in prefixes
    )
    return f"(?:{'|'.join(begins)})"


def _finder(trace: str) -> Callable[[str], bool]:
    """Return a function that tells whether a text has a trace.

    Rust's regular expressions take linear time whatever the text is, and pydantic keeps Python's lock meanwhile: to let
    LiteLLM's other threads run and then wait for them takes ten times as long as to search.
    """
    return SchemaValidator(core_schema.str_schema(pattern=trace, regex_engine="rust-regex")).isinstance_python


def _of_key(quote: str, same: str, gap: str, text: str, once: str = "") -> str:
    """Return a pattern of a secret's key and its value, or values where they are a list; the first group is kept.

    `quote` is the pattern of a quote, and `same` that of the quotes behind it.
    """
    return (
        rf"({quote}[\w-]*(?i:{_SECRET_KEYS}){same}\s*+:\s*+(?P<list>\[{gap})?+{same}){once}"
        rf"{text}(?(list)(?:{same}{gap},{gap}{same}{text}|(?!))*+)"
    )


def _of_escaped_key(backslashes: int) -> str:
    """Return that pattern for JSON within JSON, a backslash of which is that many of the whole; a quote has fewer.

    The value ends before a quote: of the inner JSON, or of a string around it.
    """
    quote = rf'(?P<quote>\\(?<!\\\\)\\{{{backslashes // 2 - 1},{backslashes - 2}}}(?:"|u0022))'
    same, backslash = "(?P=quote)", r"\\" * backslashes
    gap = r"(?:\s|\\++[nrt]|(?!))*+"
    text = rf'(?:[^"\\]++|(?<!\\)\\++(?!"|u0022)|{backslash}(?:{backslash}|{same}|u0022)|(?!))*+'
    return _of_key(quote, same, gap, text, rf'(?![^"\\]{{0,5}}(?:{same}|"))')


#: What is removed: a trace that every text has which the shape is found in, the whole shape, and what stands in its
#: place. The first are values of keys, in JSON and in JSON within JSON, as the arguments of tools are: its quotes are
#: escaped, by up to 15 backslashes, and written `\u0022` by .NET. The others show by their shape. What was JSON is JSON
#: afterwards: no shape takes a part of an escape, or the quote behind a string.
#: Clients choose what is searched here, in the gateway's event loop: no shape may be looked for from many places of the
#: same run of characters (hence the lookbehinds, and `*+` and `++`, which give nothing back).
#: `(?!)`: before Python 3.11.5 a `(...)*+` goes on where its last try gave up (python/cpython#100061).
_TRACES = (
    (
        rf'(?i-u:{_SECRET_KEYS})"(?-u:\s)*:',
        _of_key('"', '"', r"\s*+", r'(?s:[^"\\]++|\\.)*+') + r'(?:"|\\?\Z)',
        rb'\1[redacted]"',
    ),
    *(
        (
            rf'(?i-u:{_SECRET_KEYS})\\{{1,15}}(?:"|u0022)(?-u:\s)*:',
            _of_escaped_key(backslashes),
            rb"\1[redacted]",
        )
        for backslashes in (2, 4, 8, 16)
    ),
    (  # database URL
        rf""":{_SLASH}{_SLASH}[^ \t\n\r\f\v/@"']*@""",
        rf"""(:{_SLASH}{_SLASH})(?:[^\s/@"'\\:]|{_UNICODE}){{0,128}}:(?:[^\s/@"'\\]|{_UNICODE}){{1,256}}(?=@)""",
        rb"\1[redacted]",
    ),
    (  # JSON Web Token, without the letters of an escape that it stands behind
        r"(?-u:eyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]{8})",
        r"(?<![\w-])((?>(?<=\\)(?:[bfnrt]|u[0-9A-Fa-f]{4})|(?<=[\[;])[0-9]*[mK]|))(?>[\w-]*?eyJ)[\w-]{8,}+\.[\w-]{8,}+\.[\w-]{8,}",
        rb"\1[redacted]",
    ),
    *(
        (trace, shape, b"[redacted]")
        for trace, shape in (
            (  # LiteLLM, OpenAI, Anthropic and their like; not `task-...`, which is no reason to look for any shape
                rf"(?:(?-u:\b)|{'|'.join(_ESCAPES)})(?-u:sk-[\w-]{{16}})",
                _begun("sk-") + r"[\w-]{16,}",
            ),
            (r"A[KS]IA[A-Z0-9]{16}", _begun("A[KS]IA") + r"[A-Z0-9]{16}\b"),  # Amazon
            (
                r"(?i-u:secret_access_key[\s=:\\])",
                rf"(?i:(?<=secret_access_key)(?:[\s=:]|\\{{1,8}}u003d){{1,8}})(?:{_BASE64}){{40}}",
            ),
            (r"(?-u:AIza[\w-]{30})", _begun("AIza") + r"[\w-]{30,}"),  # Google
            (  # `\r8_` is a carriage return and no token
                r"(?:gsk_|hf_|xai-|pplx-|r8_)[A-Za-z0-9]{20}",
                _begun("gsk_", "hf_", "xai-", "pplx-", r"(?<!\\)r8_") + "[A-Za-z0-9]{20,}",
            ),
            (r"(?-u:(?:gh[posu]_|github_pat_)\w{20})", _begun("gh[posu]_", "github_pat_") + r"\w{20,}"),
            (  # GitLab, Slack, Vault
                r"(?-u:(?:glpat-|xox[a-z]-|hvs\.)[\w-]{16})",
                _begun("glpat-", "xox[a-z]-", r"hvs\.") + r"[\w-]{16,}",
            ),
            (
                r"(?i-u:bearer [\w~+/.=\\-]{16})",
                rf"(?<=(?i:bearer) )(?:[~.-]|{_BASE64}){{16}}(?:[~.-]|{_BASE64}|(?!))*+",
            ),
            (
                r"-----BEGIN [A-Z ]*PRIVATE KEY-----",
                r'-----BEGIN [A-Z ]*PRIVATE KEY-----(?s:[^"\\-]++|\\.|-(?!----END [A-Z ]*PRIVATE KEY-----)|(?!))*+'
                r'(?:-----END [A-Z ]*PRIVATE KEY-----|(?=")|\\?\Z)',
            ),
            # PostgreSQL's verifier
            (
                r"SCRAM-SHA-256\$[0-9]+:",
                rf"SCRAM-SHA-256\$\d+:(?:{_BASE64}|(?!))++\$(?:{_BASE64}|(?!))++:(?:{_BASE64}|(?!))++",
            ),
            (r"AGE-SECRET-KEY-1[A-Z0-9]{30}", r"AGE-SECRET-KEY-1[A-Z0-9]{30,}"),
        )
    ),
)
_SECRETS = tuple((_finder(trace), re.compile(shape.encode()), replacement) for trace, shape, replacement in _TRACES)
_has_a_trace = _finder("|".join(dict.fromkeys(trace for trace, _, _ in _TRACES)))


def scrubbed(content: bytes) -> bytes:
    """Return JSON, or any text, without the secrets that show by their shape or, in JSON, by the name of their key."""
    return scrubbed_together(content)[0]


def scrubbed_together(*contents: bytes) -> list[bytes]:
    """Return the contents as `scrubbed` does, with one search."""
    result, text = list(contents), b"\n".join(contents).decode(errors="replace")
    if _has_a_trace(text):
        for has_trace, shape, replacement in _SECRETS:
            if has_trace(text):
                result = [shape.sub(replacement, content) for content in result]
    return result


def whole(scrubbed_text: bytes, text: bytes) -> bytes:
    """Return scrubbed JSON, and where a shape has broken it the JSON that it was made of, scrubbed string by string."""
    try:
        orjson.loads(scrubbed_text)
    except orjson.JSONDecodeError:
        return orjson.dumps(_with_scrubbed_strings(orjson.loads(text)))
    return scrubbed_text


def _with_scrubbed_strings(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _with_scrubbed_strings(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_with_scrubbed_strings(item) for item in value]
    return scrubbed(value.encode()).decode(errors="replace") if isinstance(value, str) else value


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
    """Return a JSON payload with its strings replaced, but identifiers of `_KEPT_KEYS`; empty when it is not JSON."""
    try:
        content = orjson.loads(payload)
    except orjson.JSONDecodeError:
        return b""
    try:
        return orjson.dumps(_redacted(content))
    except (RecursionError, orjson.JSONEncodeError):  # nested too deeply
        return b""


def _redacted(value: Any, kept: frozenset[str] = _KEPT_KEYS) -> Any:
    if isinstance(value, dict):
        return {
            key: (item if key in kept and _is_identifier(item) else _REDACTED)
            if isinstance(item, str)
            else _redacted(item, frozenset() if key in _CONTENT_KEYS and isinstance(item, dict) else kept)
            for key, item in value.items()
        }
    if isinstance(value, list):
        if value and all(isinstance(item, int | float) for item in value):
            return _REDACTED  # tokens or a vector: words in another form
        return [_redacted(item, kept) for item in value]
    return _REDACTED if isinstance(value, str) else value
