"""What is kept of a payload."""

import json
import re
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import quote

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from litellm_sqlalchemy import redaction
from litellm_sqlalchemy.frames import Kind
from litellm_sqlalchemy.recorder import Recorder
from litellm_sqlalchemy.redaction import _CONTENT_KEYS, _KEPT_KEYS, _SECRETS, redact, scrubbed, scrubbed_together
from litellm_sqlalchemy.settings import Settings

NAMES = st.text() | st.sampled_from([*_KEPT_KEYS, *_CONTENT_KEYS])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text() | st.sampled_from(["John Smith", "gpt-5"]),
    lambda children: st.lists(children) | st.dictionaries(NAMES, children),
    max_leaves=30,
)


def words(value: Any, kept: frozenset[str] = _KEPT_KEYS, key: str = "") -> set[str]:
    """Return every string value that is not an identifier under a key that stays readable."""
    if isinstance(value, dict):
        return set().union(*(words(item, kept, key) for key, item in value.items()))
    if isinstance(value, list):
        return set().union(*(words(item, kept) for item in value))
    if not isinstance(value, str) or (key in kept and re.fullmatch(r"[A-Za-z0-9_.:/@-]{1,128}", value)):
        return set()
    return {value}


@given(JSON)
def test_no_word_is_left(content: Any) -> None:
    assert words(json.loads(redact(json.dumps(content).encode()))) <= {"[redacted]"}


@given(st.sampled_from(sorted(_CONTENT_KEYS)), st.dictionaries(NAMES, JSON))
def test_no_word_is_left_of_what_tools_are_called_with(key: str, content: dict[str, Any]) -> None:
    found = json.loads(redact(json.dumps([{"type": "tool_use", key: content}]).encode()))
    assert words(found, frozenset()) <= {"tool_use", "[redacted]"}


@pytest.mark.parametrize(
    ("content", "kept"),
    [
        ({"type": "code_interpreter_call", "code": "patient='John Smith'"}, {"type": "code_interpreter_call"}),
        ({"type": "tool_use", "name": "dial", "input": {"name": "Smith", "code": "0000"}},
         {"type": "tool_use", "name": "dial", "input": {}}),
        ({"input": {"list": [{"id": "Smith"}], "n": {"name": "Smith"}}}, {"input": {"list": [{}], "n": {}}}),
        ({"input": [{"role": "user", "content": "Smith"}]}, {"input": [{"role": "user"}]}),
        ({"model": "azure/gpt-4.1:eu@1", "id": "x" * 129}, {"model": "azure/gpt-4.1:eu@1"}),
        ({"error": {"code": "invalid_api_key", "type": "M\u00fcller"}}, {"error": {"code": "invalid_api_key"}}),
    ],
)  # fmt: skip
def test_what_is_an_identifier(content: Any, kept: Any) -> None:
    assert without_redacted(json.loads(redact(json.dumps(content).encode()))) == kept


def without_redacted(value: Any) -> Any:
    """Return a value without the items of its objects that were replaced."""
    if isinstance(value, dict):
        return {key: without_redacted(item) for key, item in value.items() if item != "[redacted]"}
    return [without_redacted(item) for item in value] if isinstance(value, list) else value


@given(st.dictionaries(st.text(), st.dictionaries(st.text(), st.none() | st.booleans() | st.text())))
def test_the_shape_is_left(content: dict[str, Any]) -> None:
    found = json.loads(redact(json.dumps(content).encode()))
    assert {key: set(value) for key, value in found.items()} == {key: set(value) for key, value in content.items()}


def test_what_stays_readable() -> None:
    payload = {"model": "m", "messages": [{"role": "user", "content": "secret"}], "n": 1, "stream": True}
    assert json.loads(redact(json.dumps(payload).encode())) == {
        "model": "m", "messages": [{"role": "user", "content": "[redacted]"}], "n": 1, "stream": True,
    }  # fmt: skip


@pytest.mark.parametrize("payload", [b"", b"no JSON", b"\xff", b'"\\ud800"', b"[" * 5000 + b"]" * 5000])
def test_what_is_no_json_is_not_kept(payload: bytes) -> None:
    assert redact(payload) == b""


def test_deep_nesting() -> None:
    payload = b'{"a":' * 900 + b'"word"' + b"}" * 900
    assert b"word" not in redact(payload)


def test_token_lists_are_words() -> None:
    assert json.loads(redact(b'{"input": [[15339, 1917], [0.5]]}')) == {"input": ["[redacted]", "[redacted]"]}


def test_contents_are_searched_together_and_kept_apart() -> None:
    key, url = SHAPES["master key"].encode(), SHAPES["database URL"].encode()
    found = scrubbed_together(b'{"a":"%b' % key, b'"}', b"", url)
    assert found == [b'{"a":"[redacted]', b'"}', b"", b"postgresql://[redacted]@db1/app"]


@pytest.mark.parametrize(
    "name",
    ["api_key", "api-key", "apiKey", "azure_api_key", "aws_secret_access_key", "aws_access_key_id", "private_key",
     "client_secret", "aws_session_token", "password", "vertex_credentials", "Authorization", "api_keys", "passwords",
     "secretAccessKey", "AccessKeyId", "sessionToken"],
)  # fmt: skip
def test_credentials_are_never_kept(name: str) -> None:
    for value in ('a "quoted" \\ value', "", ["a"], ['a "quoted" \\ value', "", "b"]):
        stored = ["[redacted]"] if isinstance(value, list) else "[redacted]"
        for indent in (None, 2):
            payload = json.dumps({"model": "m", "nested": {name: value}, "max_tokens": 5}, indent=indent).encode()
            assert json.loads(scrubbed(payload)) == {"model": "m", "nested": {name: stored}, "max_tokens": 5}


@pytest.mark.parametrize(
    "payload",
    [
        b'{"messages":[{"role":"user","content":"my \\"api_key\\": \\"x\\" is gone"}]}',
        b'{"tools":[{"parameters":{"properties":{"password":{"type":"string"}}}}]}',
        b'{"passwords":[],"secrets":[1,"word"],"stop_tokens":["word"],"password":[{"type":"string"},"word"]}',
        b'{"prompt_cache_key":"k","max_tokens":5,"token":"word"}',
        b"{no JSON",
    ],
)
def test_other_bytes_stay_as_they_are(payload: bytes) -> None:
    assert scrubbed(payload) == payload


def _php(value: Any) -> str:
    return json.dumps(value).replace("/", r"\/")


def _gson(value: Any) -> str:
    return re.sub("[&'<=>]", lambda found: rf"\u{ord(found[0]):04x}", json.dumps(value))


def _dotnet(value: Any) -> str:
    """Return JSON as System.Text.Json writes it where nobody told it otherwise."""
    escaped = re.sub(r"\\(.)", lambda found: r"\u0022" if found[1] == '"' else found[0], json.dumps(value))
    return re.sub("[&'+<>`]", lambda found: rf"\u{ord(found[0]):04X}", escaped)


def _orjson(value: Any) -> str:
    return orjson.dumps(value).decode()


#: Programs write the same JSON in several ways.
WRITERS: list[Callable[[Any], str]] = [json.dumps, _orjson, _php, _gson, _dotnet]
PASSWORDS = st.just("correct horse") | st.text('"\\\n\u00e9 a:,}/+[]', min_size=6)


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
@given(st.data())
def test_a_credential_in_json_within_json(depth: int, data: st.DataObject) -> None:
    """By whichever programs the layers of it are written."""
    password = data.draw(PASSWORDS | st.lists(PASSWORDS, min_size=1, max_size=3))
    writers = data.draw(st.lists(st.sampled_from(WRITERS), min_size=depth + 1, max_size=depth + 1))
    text = writers[0]({"name": "db1", "password": password, "max_tokens": 5})
    for write in writers[1:]:
        text = write({"arguments": text, "id": "call_1"})
    once = scrubbed(text.encode())
    assert scrubbed(once) == once
    stored = orjson.loads(once)
    for _ in range(depth):
        assert stored["id"] == "call_1"
        stored = orjson.loads(stored["arguments"])
    redacted = "[redacted]" if isinstance(password, str) else ["[redacted]"]
    assert stored == {"name": "db1", "password": redacted, "max_tokens": 5}


@pytest.mark.parametrize(
    ("body", "stored"),
    [
        (b'{"api_key": "sk-1", "mess', b'{"api_key": "[redacted]", "mess'),
        (b'{"api_key": "correct ho', b'{"api_key": "[redacted]"'),
        (b'{"api_key": "correct\\', b'{"api_key": "[redacted]"'),
        (b'{"arguments": "{\\"password\\": \\"correct ho', b'{"arguments": "{\\"password\\": \\"[redacted]'),
        (b'{"arguments": "{\\"password\\": \\"correct\\', b'{"arguments": "{\\"password\\": \\"[redacted]'),
        (b'{"content": "-----BEGIN PRIVATE KEY-----\\nMHcCAQE', b'{"content": "[redacted]'),
        (b'{"content": "-----BEGIN PRIVATE KEY-----\\nMHcCAQE\\', b'{"content": "[redacted]'),
    ],
    ids=[
        "broken behind it",
        "cut in it",
        "cut in an escape",
        "cut in JSON within JSON",
        "cut in an escape there",
        "cut in a private key",
        "cut in an escape there, too",
    ],
)
def test_a_credential_in_a_body_that_is_cut(body: bytes, stored: bytes) -> None:
    assert scrubbed(body) == stored


@pytest.mark.parametrize(
    ("text", "stored"),
    [
        ('-----BEGIN PRIVATE KEY-----"', "[redacted]"),
        ("-----BEGIN PRIVATE KEY-----\\", "[redacted]"),
        (
            'key = "-----BEGIN PRIVATE KEY-----\\n"\n"MHcC-_E\\n"\n"-----END PRIVATE KEY-----\\n"',
            'key = "[redacted]\\n"',
        ),
        ('{"password":"correct horse\\', '{"password":"[redacted]\\'),
        ('{"password":"correct \\"horse', '{"password":"[redacted]'),
        ("\neyJhbGciOiJI.eyJzdWIiOiIx.SflKxwRJSMeK", "\n[redacted]"),
        ("\r8_" + "Ab12" * 6, "\r8_" + "Ab12" * 6),
        ("\nr8_" + "Ab12" * 6, "\n[redacted]"),
    ],
)
def test_a_text_ends_where_it_did(text: str, stored: str) -> None:
    """What has the beginning of a secret, and a quote, a backslash or an escape's letter where it matters."""
    assert orjson.loads(scrubbed(orjson.dumps([text, "behind"]))) == [stored, "behind"]


SHAPES = {
    "master key": "sk-Zq9" + "a1B2" * 6,
    "Anthropic key": "sk-ant-api03-" + "x9Y8" * 8,
    "Amazon key": "AKIA" + "ABCD1234" * 2,
    "Amazon secret": "aws_secret_access_key = " + "wJalrXUt/+" * 4,
    "Google key": "AIza" + "Sy9_-" * 7,
    "Groq key": "gsk_" + "Ab12" * 6,
    "Hugging Face token": "hf_" + "Ab12" * 6,
    "GitHub token": "ghp_" + "Ab12" * 9,
    "GitLab token": "glpat-" + "Ab12" * 5,
    "Vault token": "hvs." + "Ab12" * 6,
    "bearer token": "Bearer " + "abc.DEF~123" * 3,
    "bearer token in Base64": "Bearer " + "a/B+" * 8 + "==",
    "web token": "eyJhbGciOiJI.eyJzdWIiOiIx.SflKxwRJSMeK",
    "database URL": "postgresql://app:pa55-w0rd!x@db1/app",
    "database URL with signs": "postgresql://app+a:pa&55+w0rd@db1/app",
    "private key": "-----BEGIN EC PRIVATE KEY-----\nMHcCAQEEIB\nqqq==\n-----END EC PRIVATE KEY-----",
    "verifier": "SCRAM-SHA-256$4096:c2FsdA==$c3RvcmVk+/=:c2VydmVy",
    "age identity": "AGE-SECRET-KEY-1" + "QPZRY9X8" * 7,
}


def secret_of(what: str) -> str:
    """Return of a shape what must not be stored."""
    return SHAPES[what].split("://")[-1].split("@")[0].removeprefix("Bearer ").split(" = ")[-1]


@pytest.mark.parametrize("what", SHAPES)
def test_a_secret_is_known_by_its_shape(what: str) -> None:
    text = f"Here it is: {SHAPES[what]}, what now?"
    stored = orjson.loads(scrubbed(orjson.dumps({"messages": [{"content": text}]})))["messages"][0]["content"]
    assert "[redacted]" in stored
    assert stored.startswith("Here it is: ")
    assert stored.endswith(", what now?") or what.startswith("database URL")
    assert secret_of(what) not in stored
    assert stored == orjson.loads(scrubbed(orjson.dumps(stored))), "a second time changes nothing"


@pytest.mark.parametrize("depth", range(4))
@pytest.mark.parametrize("what", SHAPES)
def test_a_secret_is_known_whatever_it_stands_behind(what: str, depth: int) -> None:
    """In a text, in JSON, in JSON within JSON and in that within JSON: `\\n` ends in a letter there."""
    colours = ("\x1b[31m", "\x1b[01;31m\x1b[K", "\x1b[0m\x1b[1m")
    for before in (" ", '"', "=", "\n", "\r\n", "\t", "\b\f", "\0", "\uff1a", "\U0001f511", *colours):
        for ascii_only in (False, True):
            text = f"Here:{before}{SHAPES[what]}"
            for _ in range(depth):
                text = json.dumps([text], ensure_ascii=ascii_only)
            stored = scrubbed(text.encode()).decode()
            for _ in range(depth):
                [stored] = json.loads(stored)
            assert stored.startswith(f"Here:{before}")
            assert "[redacted]" in stored
            assert secret_of(what) not in stored


@pytest.mark.parametrize("depth", range(3))
@pytest.mark.parametrize("what", SHAPES)
def test_a_secret_is_known_whoever_writes_it(what: str, depth: int) -> None:
    for write in WRITERS:
        text = f"Here: {SHAPES[what]}, what now?"
        for _ in range(depth + 1):
            text = write([text])
        stored = scrubbed(text.encode()).decode()
        for _ in range(depth + 1):
            [stored] = json.loads(stored)
        before, _redacted, behind = stored.partition("[redacted]")
        assert SHAPES[what].startswith(before.removeprefix("Here: "))
        assert behind == (", what now?" if "URL" not in what else "@db1/app, what now?")


@pytest.mark.parametrize("before", ["api_key=", "%20", "%0A", "%0a", "%EF%BC%9A"])
@pytest.mark.parametrize("what", [what for what in SHAPES if quote(SHAPES[what]) == SHAPES[what]])
def test_a_secret_that_is_the_same_in_a_form(what: str, before: str) -> None:
    assert secret_of(what).encode() not in scrubbed(f"a=b&c={before}{SHAPES[what]}&d=e".encode())


def shape_of(value: Any, key: str = "") -> Any:
    """Return a value without its words; those of a list of secrets become one."""
    if isinstance(value, dict):
        return {key: shape_of(item, key) for key, item in value.items()}
    if isinstance(value, list):
        return [shape_of(item) for item in value][: 1 if key == "password" and isinstance(value[0], str) else None]
    return "a text" if isinstance(value, str) else value


#: What texts are made of: secrets, whole and in parts, and what JSON escapes or stands around its texts.
SECRETS = [*SHAPES.values(), '"password": "correct horse', '"api_key":"', "password", "r8_" + "Ab12" * 6]
SECRETS += [
    "-----BEGIN PRIVATE KEY-----",
    "-----END PRIVATE KEY-----",
    "8_" + "Ab12" * 6,
    '"passwords": ["correct horse"',
]
SECRETS += [r"\u0022password\u0022:\u0022correct horse", r"\u0022", r"\u002B", r"\/"]
BETWEEN = ['"', '"', "\\", "\\", "\\\\", "\n", "\r", "\t", "\uff1a", "n", "u", " ", ":", ",", "@", "{", "}", "word"]
TEXTS = st.lists(st.sampled_from(BETWEEN) | st.sampled_from(SECRETS), max_size=8).map("".join)


@given(st.lists(TEXTS, min_size=1), st.lists(st.sampled_from(["content", "password", *WRITERS]), max_size=5))
def test_json_stays_json(texts: list[str], layers: list[Any]) -> None:
    value: Any = texts
    for layer in layers:
        value = {"before": 1, layer: value, "behind": ["word", None]} if isinstance(layer, str) else layer(value)
    for write in WRITERS:
        stored = scrubbed(write(value).encode())
        assert shape_of(orjson.loads(stored)) == shape_of(value)
        assert shape_of(orjson.loads(scrubbed(stored))) == shape_of(value)


def test_metadata_stays_json_whatever_a_shape_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def always(text: str) -> bool:
        return bool(text)

    monkeypatch.setattr(redaction, "_has_a_trace", always)
    monkeypatch.setattr(redaction, "_SECRETS", [(always, re.compile(rb'greedy[^"]*"?'), b"[redacted]")])
    written: list[bytes] = []
    producer: Any = SimpleNamespace(append=lambda _kind, text, _payload, **_: written.append(text))
    settings = Settings.model_validate({"database": {"host": "x"}, "spool": {"directory": tmp_path}})
    metadata = {"user_agent": "a greedy one", "tags": ["greedy", "b"], "calls": 1}
    Recorder(settings, producer).write(Kind.RESPONSE, "full", metadata, None, b"", accepted=True)
    [text] = written
    assert orjson.loads(text) == {"user_agent": "a [redacted]", "tags": ["[redacted]", "b"], "calls": 1}


#: A secret's key in JSON, in JSON within JSON, and in JSON within that, before a value and before a list.
KEYS = [
    f"{quote}password{quote}:{bracket}{quote}"
    for quote in ('"', '\\"', '\\\\\\"', "\\u0022", "\\\\u0022")
    for bracket in ("", "[")
]
#: Characters that shapes go over, and what goes on until there is an end to it.
RUNS = [b'","', b'\\",\\"', b"\\u0022,\\n\\u0022", b"\\\\u0022", b"\\u0022", b"\\u002B", b"\\/", b"[\\n"]
RUNS += [b"\\", b"\\\\\\\\", b"\\n", b" ", b"a", b"A", b"-", b'"', b"eyJ-", b"://a:", b"-----END A", b"-----BEGIN A"]
BEGUN = [b"-----BEGIN PRIVATE KEY-----", b"-----BEGIN ", b"://", *(f"{key}value".encode() for key in KEYS)]


def _beginnings() -> set[bytes]:
    """Return what a search may be tricked with: all beginnings of secrets and of keys of secrets, in every notation."""
    texts = [*KEYS, *(f"{key}v" for key in KEYS), '"password"   :   "', *SHAPES.values()]
    texts += [text for key in KEYS for text in (f"{key}value\\\\\\", f'{key}value\\\\"', f'{key}\\"', f"{key}\\n")]
    texts += [
        '-----BEGIN PRIVATE KEY-----\\"',
        "-----BEGIN PRIVATE KEY-----\\n-",
        "-----BEGIN PRIVATE KEY----------END A",
    ]
    texts += [escape + text for escape in ("\\n", "\\uff1a", "%20") for text in SHAPES.values()]
    return set(RUNS) | {text[:length].encode() for text in texts for length in range(1, min(len(text), 60) + 1)}


@pytest.mark.parametrize("what", [*SHAPES, *KEYS])
def test_every_secret_has_its_trace(what: str) -> None:
    """Also one that is as short as it may be, has a space in it or bytes that are no text."""
    secret = SHAPES.get(what, f"{what}secret").encode()
    places = range(len(secret) + 1)
    cut = {
        secret[:end] + between + secret[start:]
        for end in places
        for start in places[end:]
        for between in (b"", b" ", b"\xff", b"\\n", b"\\uff1a", b"%20")
    }
    found = [(text, has_trace) for text in cut for has_trace, shape, _ in _SECRETS if shape.search(text)]
    assert found
    assert [text for text, has_trace in found if not has_trace(text.decode(errors="replace"))] == []


@pytest.mark.parametrize("before", [b"", " ".join([*KEYS, *SHAPES.values()]).encode()], ids=["no trace", "all traces"])
def test_no_text_takes_long(before: bytes) -> None:
    """Clients choose the text, and the gateway's event loop searches it: the time must not grow with its square."""
    assert all(has_trace(before.decode()) == bool(before) for has_trace, _, _ in _SECRETS)
    size, slow = 32 * 1024, {}
    texts = {beginning: beginning * (size // len(beginning)) for beginning in _beginnings()}
    texts |= {begun + run: begun + run * (4 * size // len(run)) + b'"' for begun in BEGUN for run in RUNS}
    for beginning, repeated in texts.items():
        text = before + repeated
        started = time.process_time()
        scrubbed(text)
        if (seconds := time.process_time() - started) > 0.2:
            slow[beginning] = seconds
    assert slow == {}


@pytest.mark.parametrize(
    "begun", ["Bearer ", "SCRAM-SHA-256$4096:", '"password":["', '\\"password\\":[\\"secret', "://"]
)
def test_no_text_takes_much_memory(begun: str) -> None:
    for run in RUNS:
        text = begun.encode() + run * (256 * 1024 // len(run))
        tracemalloc.start()
        scrubbed(text)
        assert tracemalloc.get_traced_memory()[1] < 8 * len(text)
        tracemalloc.stop()


@pytest.mark.parametrize(
    "text",
    [
        "task-force and risk-free",
        "https://example.net:8443/a@b",
        "a bearer of news",
        "sk-",
        "task-0123456789abcdef0123",
    ],
)
def test_ordinary_words_stay(text: str) -> None:
    assert scrubbed(text.encode()) == text.encode()
