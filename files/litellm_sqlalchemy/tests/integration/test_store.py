"""Delivery into real tables: each frame once, whatever the connection does; what cannot be stored stands alone."""

import base64
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from typing import Any

import orjson
import psycopg2
import pytest
from faults.proxy import FaultProxy, Toxics, fault_proxy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import Engine, event
from support.postgresql import Database, Server
from support.processes import Deployment
from support.records import pairs, request, response
from support.waiting import wait_until

from litellm_sqlalchemy.database import ErrorClass, make_engine
from litellm_sqlalchemy.frames import Frame, Kind
from litellm_sqlalchemy.identifiers import uuid7
from litellm_sqlalchemy.models import Request, Response
from litellm_sqlalchemy.records import TABLES, encode_payload, encode_row
from litellm_sqlalchemy.store import DeadLetter, Delivery, Store, Unavailable


@pytest.fixture
def engine(deployment: Deployment) -> Iterator[Engine]:
    """The writer's engine."""
    engine = make_engine(deployment.load().database, "writer", "test", statement_timeout=20)
    yield engine
    engine.dispose()


@pytest.fixture
def store(engine: Engine) -> Store:
    """A store with the writer's privileges."""
    return Store(engine)


@pytest.fixture
def proxy(server: Server, deployment: Deployment) -> Iterator[FaultProxy]:
    """A proxy that the deployment's settings point at."""
    with fault_proxy(server.port) as proxy:
        deployment.update(database={"port": proxy.port})
        yield proxy


def _counts(database: Database) -> tuple[int, int]:
    return database.count("requests"), database.count("responses")


def test_a_batch_delivered_twice_is_stored_once(store: Store, database: Database) -> None:
    frames = pairs(50)
    first, second = store.deliver(frames), store.deliver(frames)
    assert (first.inserted, first.duplicates, first.dead) == (100, 0, [])
    assert (second.inserted, second.duplicates, second.dead) == (0, 100, [])
    assert _counts(database) == (50, 50)


def test_a_batch_half_delivered_is_completed(store: Store, database: Database) -> None:
    frames = pairs(50)
    store.deliver(frames[:33])
    delivery = store.deliver(frames)
    assert (delivery.inserted, delivery.duplicates) == (67, 33)
    assert _counts(database) == (50, 50)


def test_a_frame_that_stands_twice_in_a_batch_is_stored_once(store: Store, database: Database) -> None:
    """As after a failed fsync, when a producer writes again what may not have reached the disk."""
    frames = pairs(10)
    delivery = store.deliver(frames + frames[4:])
    assert (delivery.inserted, delivery.duplicates) == (20, 16)
    assert _counts(database) == (10, 10)


def _cut_at_commit(engine: Engine, proxy: FaultProxy) -> None:
    """Let COMMIT reach the server and its confirmation never come back, once."""
    armed = [False]

    def arm(_connection: object) -> None:
        armed[0] = True

    def swallow() -> bool:
        cut, armed[0] = armed[0], False
        return cut

    proxy.swallow_answers = swallow
    event.listen(engine, "commit", arm, once=True)


def test_connection_lost_after_commit_was_sent(proxy: FaultProxy, database: Database, store: Store) -> None:  # F09
    frames = pairs(20)
    _cut_at_commit(store.engine, proxy)
    with pytest.raises(Unavailable) as caught:
        store.deliver(frames)
    assert caught.value.cause is ErrorClass.RETRY
    assert _counts(database) == (20, 20), "the fault is what it says: the server did commit"
    assert store.deliver(frames).duplicates == 40
    assert _counts(database) == (20, 20)


def test_control_without_primary_keys_an_ambiguous_commit_doubles(
    proxy: FaultProxy, database: Database, store: Store
) -> None:
    database.execute(
        "ALTER TABLE responses DROP CONSTRAINT pk_responses CASCADE",
        "ALTER TABLE requests DROP CONSTRAINT pk_requests CASCADE",
    )
    frames = pairs(20)
    _cut_at_commit(store.engine, proxy)
    with pytest.raises(Unavailable):
        store.deliver(frames)
    store.deliver(frames)
    assert _counts(database) == (40, 40), "the test above can fail"


POISON: dict[str, Any] = {
    "NUL in text": {"model": "a\0b"},
    "int8 overflow": {"payload_size": 2**63},
    "timestamp out of range": {"created_at": 9_224_318_016_000_000_001},
    "no id": {"id": None},
    "not a UUID": {"id": "nobody"},
    "wrong type": {"model": 17},
    "wrong type in a list": {"tags": [1]},
    "no such origin": {"origin": "elsewhere"},
    "an index entry too long": {"user_id": os.urandom(9000).hex()},
    "no address": {"client_address": "localhost"},
}


@pytest.mark.parametrize("changes", POISON.values(), ids=POISON.keys())
def test_a_poison_row_dies_alone(changes: dict[str, Any], store: Store, database: Database) -> None:  # F52
    frames = pairs(8)
    poison = Frame(Kind.REQUEST, 99, request(uuid7().hex, **changes), b'{"kept":true}')
    delivery = store.deliver([*frames[:7], poison, *frames[7:]])
    assert [letter.frame for letter in delivery.dead] == [poison]
    assert delivery.dead[0].reason
    assert delivery.inserted == 16
    assert _counts(database) == (8, 8)


@pytest.mark.parametrize("metadata", [b"", b"[]", b"17", b"{", b'{"a":NaN}', b"\xff"])
def test_metadata_that_is_no_object_is_a_dead_letter(metadata: bytes, store: Store, database: Database) -> None:
    delivery = store.deliver([*pairs(1), Frame(Kind.REQUEST, 3, metadata, b"")])
    assert (delivery.inserted, len(delivery.dead)) == (2, 1)


def test_many_poison_rows(store: Store, database: Database) -> None:
    frames = pairs(100)
    poisoned = {frames[place].sequence for place in range(0, 200, 20)}
    batch = [f._replace(metadata=request(uuid7().hex, model="\0")) if f.sequence in poisoned else f for f in frames]
    delivery = store.deliver(batch)
    dead = {letter.frame.sequence for letter in delivery.dead}
    assert poisoned < dead, "a response dies with its request"
    assert len(dead) == 20
    assert _counts(database) == (90, 90)


def test_a_batch_of_poison_rows_can_be_left(engine: Engine, database: Database) -> None:
    """It takes many transactions: before each, the writer tells that it lives, and may be told to stop."""
    left = 60

    def before() -> None:
        nonlocal left
        left -= 1
        if left == 0:
            raise KeyboardInterrupt

    store = Store(engine, before=before)
    frames = [frame._replace(metadata=request(uuid7().hex, model="\0")) for frame in pairs(50)[::2]] + pairs(20)
    with pytest.raises(KeyboardInterrupt):
        store.deliver(frames)
    delivery = store.deliver(frames)
    assert (len(delivery.dead), delivery.inserted + delivery.duplicates) == (50, 40)
    assert left < -100
    assert _counts(database) == (20, 20)


def _tried(store: Store, frames: list[Frame]) -> Delivery | None:
    """Deliver; return None where the database was not there in time."""
    try:
        return store.deliver(frames)
    except Unavailable as error:
        if error.cause is not ErrorClass.RETRY:
            raise
        return None


def test_a_batch_that_takes_too_long_goes_in_parts(
    proxy: FaultProxy, deployment: Deployment, database: Database
) -> None:
    """At 100 kB/s and a timeout of 1 s no statement may have more than some 100 KB."""
    engine = make_engine(deployment.load().database, "writer", "test", statement_timeout=1)
    store, frames, tries = Store(engine, 1), pairs(60, b'"' + os.urandom(2500).hex().encode() + b'"'), 0
    proxy.toxics = Toxics(bandwidth=100_000, slice=8192)
    while (delivery := _tried(store, frames)) is None:
        tries += 1
        assert tries < 20
    assert delivery.inserted + delivery.duplicates == 120
    assert _counts(database) == (60, 60)
    proxy.toxics = Toxics()
    assert [store.deliver(pairs(60)).inserted for _ in range(3)] == [120] * 3
    engine.dispose()


def test_parts_grow_only_where_one_as_large_was_quick(deployment: Deployment, database: Database) -> None:
    """A part that took half of the timeout would fail when it is doubled; few frames tell nothing."""
    database.execute(
        "CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN PERFORM pg_sleep(0.05); RETURN NEW; END'",
        "CREATE TRIGGER slow BEFORE INSERT ON requests FOR EACH ROW EXECUTE FUNCTION slow()",
    )
    engine = make_engine(deployment.load().database, "writer", "test", statement_timeout=1)
    store, frames = Store(engine, 1), pairs(40)
    while _tried(store, frames) is None:
        pass
    for frames in (pairs(1), pairs(40), pairs(40)):
        assert _tried(store, frames) == Delivery(inserted=len(frames)), "no attempt is lost any more"
    engine.dispose()


def test_a_response_without_its_request_dies_alone(store: Store, database: Database) -> None:
    frames = pairs(3)
    delivery = store.deliver(frames[1:])
    assert [letter.frame for letter in delivery.dead] == [frames[1]]
    assert _counts(database) == (2, 2)


PAYLOADS: dict[str, tuple[bytes, str]] = {
    "JSON": (b'{"a": [1, 2.50, null, "\\u00e4"]}', "json"),
    "U+0000": (b'{"a": "\\u0000"}', "text"),
    "NUL byte": (b"a\0b", "base64"),
    "escaped surrogate": (b'{"a": "\\ud800"}', "text"),
    "surrogate pair": (b'{"a": "\\ud83d\\ude00"}', "json"),
    "not UTF-8": (b"\xff\xfe{}", "base64"),
    "not JSON": (b"<html>", "text"),
    "NaN": (b'{"a": NaN}', "text"),
    "a number of 200,000 digits": (b'{"a": ' + b"1" + b"0" * 200_000 + b"}", "text"),
    "an exponent out of range": (b'{"a": 1e200000}', "text"),
    "20,000 levels": (b"[" * 20_000 + b"]" * 20_000, "text"),
    "900 levels": (b"[" * 900 + b"]" * 900, "json"),
    "a key that stands twice": (b'{"a": 1, "a": 2}', "json"),
    "scalar": (b"17", "json"),
    "spaces and order": (b' { "b" : 1.50,\n"a":2e0 } ', "json"),
}


@pytest.mark.parametrize(("payload", "encoding"), PAYLOADS.values(), ids=PAYLOADS.keys())
def test_every_payload_is_kept_with_its_bytes(payload: bytes, encoding: str, store: Store, database: Database) -> None:
    identifier = uuid7().hex
    delivery = store.deliver([Frame(Kind.REQUEST, 1, request(identifier), payload)])
    assert delivery.dead == []
    [(seen, content)] = database.query("SELECT payload_encoding, payload::text FROM requests")
    assert _bytes_of(seen, content, payload) == payload
    assert seen in (encoding, "base64"), "marked as what it is"


def _bytes_of(encoding: str, content: str, payload: bytes) -> bytes:
    """Return the bytes that a stored payload stands for; of JSON, those of `payload` when it means the same."""
    if encoding == "base64":
        return base64.b64decode(orjson.loads(content))
    if encoding == "text":
        return str(orjson.loads(content)).encode()
    return payload if _exact(content.encode()) == _exact(payload) else content.encode()


def _exact(text: bytes) -> Any:
    return json.loads(text, parse_float=Decimal, parse_int=Decimal)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=10,
)
SHAPES = (
    JSON.map(orjson.dumps)
    | st.binary(max_size=40)
    | st.text(max_size=40).map(lambda text: text.encode(errors="replace"))
    | st.sampled_from([payload for payload, _ in PAYLOADS.values() if len(payload) < 3000])
    | st.tuples(JSON.map(orjson.dumps), st.binary(min_size=1, max_size=3), st.integers(0, 20)).map(
        lambda parts: parts[0][: parts[2]] + parts[1] + parts[0][parts[2] :]
    )
)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(payloads=st.lists(SHAPES, min_size=1, max_size=20))
def test_what_is_encoded_is_what_jsonb_reads(payloads: list[bytes], server: Server) -> None:
    """Everything that is called JSON or text is accepted by `jsonb`, or goes the Base64 way; nothing is changed."""
    encoded = [encode_payload(payload) for payload in payloads]
    with server.connection() as connection, connection.cursor() as cursor:
        for payload, (encoding, text) in zip(payloads, encoded, strict=True):
            try:
                cursor.execute("SELECT convert_from(%s, 'UTF8')::jsonb::text", (text,))
            except psycopg2.DataError:
                assert encoding == "json", "numbers beyond numeric; `Store` falls back to Base64"
                _, text = encode_payload(payload, opaque=True)
                assert base64.b64decode(orjson.loads(text)) == payload
                continue
            [(content,)] = cursor.fetchall()
            assert _bytes_of(encoding, content, payload) == payload


def test_columns_are_read_back_as_they_were_written(store: Store, database: Database) -> None:
    """Every encoder of binary COPY against PostgreSQL's own output, at the ends of its range."""
    samples: dict[str, list[tuple[Any, str | None]]] = {
        "created_at": [(0, "1970-01-01 00:00:00+00"), (1_700_000_000_123_456, "2023-11-14 22:13:20.123456+00")],
        "calls": [(1, "1"), (2**31 - 1, "2147483647")],
        "redaction_version": [(-(2**15), "-32768"), (2**15 - 1, "32767")],
        "payload_size": [(0, "0"), (2**63 - 1, str(2**63 - 1))],
        "stream": [(True, "true"), (False, "false")],
        "tags": [([], "{}"), (["a", "ä\U0001f600", "", "NULL", '"'], '{a,ä\U0001f600,"","NULL","\\""}'), (None, None)],
        "client_address": [("10.1.2.3", "10.1.2.3"), ("::1", "::1"), ("2001:db8::ff", "2001:db8::ff")],
        "payload_digest": [("00ff", "\\x00ff"), (None, None)],
        "headers": [({"a": "b", "ä": ""}, '{"a": "b", "ä": ""}'), (None, None)],
        "user_agent": [("", ""), ("ä\U0001f600\t\n\\.", "ä\U0001f600\t\n\\.")],
        "id": [("f" * 32, "ffffffff-ffff-ffff-ffff-ffffffffffff")],
    }
    for column, values in samples.items():
        for value, text in values:
            identifier = value if column == "id" else uuid7().hex
            assert store.deliver([Frame(Kind.REQUEST, 1, request(identifier, **{column: value}), b"")]).inserted == 1
            cast = f"CASE WHEN {column} IS NULL THEN NULL ELSE {column}::text END"
            with database.server.connection(database.name) as connection, connection.cursor() as cursor:
                cursor.execute("SET timezone TO UTC")
                cursor.execute(f"SELECT {'host(client_address)' if column == 'client_address' else cast} FROM requests "
                               "WHERE id = %s", (identifier,))  # fmt: skip
                assert cursor.fetchone() == (text,), column


@pytest.mark.parametrize(
    ("value", "text"), [(0.1, "0.1"), (1e300, "1e+300"), (5, "5"), (-0.0, "-0"), (1e-300, "1e-300")]
)
def test_floats_and_json_columns(value: float, text: str, store: Store, database: Database) -> None:
    call = uuid7().hex
    attempts = [{"deployment": "d", "duration_ms": value}]
    frames = [
        Frame(Kind.REQUEST, 1, request(call), b""),
        Frame(Kind.RESPONSE, 2, response(call, cost=value, attempts=attempts), b""),
    ]
    assert store.deliver(frames).inserted == 2
    [(cost, stored)] = database.query("SELECT cost::text, attempts FROM responses")
    assert (cost, float(stored[0]["duration_ms"])) == (text, value)


def test_texts_in_json_columns_that_jsonb_refuses(store: Store, database: Database) -> None:
    call = uuid7().hex
    reports = [{"quoted\0": "a\0\0b", "escaped": "\\u0000 \\\0"}]
    frames = [
        Frame(Kind.REQUEST, 1, request(call, headers={"x": "\0"}), b""),
        Frame(Kind.RESPONSE, 2, response(call, guardrails=reports), b""),
    ]
    assert store.deliver(frames).inserted == 2
    [(headers, guardrails)] = database.query(
        "SELECT headers, guardrails FROM requests JOIN responses ON id = request_id"
    )
    assert headers == {"x": "\ufffd"}
    assert guardrails == [{"quoted\ufffd": "a\ufffd\ufffdb", "escaped": "\\u0000 \\\ufffd"}]


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(reports=st.lists(JSON, min_size=1, max_size=8), payloads=st.lists(SHAPES, min_size=1, max_size=8))
def test_whatever_a_call_holds_is_stored(reports: list[Any], payloads: list[bytes], store: Store) -> None:
    """Guardrails' reports and payloads of any shape, in one batch with plain calls: none is refused."""
    frames = pairs(2)
    for report, payload in zip(reports, payloads, strict=False):
        call = uuid7().hex
        frames.append(Frame(Kind.REQUEST, len(frames) + 1, request(call), payload))
        frames.append(Frame(Kind.RESPONSE, len(frames) + 1, response(call, guardrails=[report]), payload))
    delivery = store.deliver(frames)
    assert (delivery.inserted, delivery.dead) == (len(frames), [])


def test_every_column_has_an_encoder() -> None:
    for model in (Request, Response):
        table = next(copy for copy in TABLES.values() if copy.table is model.__table__)
        assert table.columns == [column.name for column in model.__table__.columns]


def test_error_of_no_known_class_is_not_poison_at_once(store: Store, database: Database) -> None:
    database.execute(
        "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS "
        "$$BEGIN RAISE 'no' USING ERRCODE = 'ZZ001'; END$$",
        "CREATE TRIGGER refuse BEFORE INSERT ON requests FOR EACH ROW WHEN (NEW.model = 'odd') "
        "EXECUTE FUNCTION refuse()",
    )
    frames = pairs(4)
    batch = [*frames, Frame(Kind.REQUEST, 9, request(uuid7().hex, model="odd"), b"")]
    with pytest.raises(Unavailable) as caught:
        store.deliver(batch)
    assert caught.value.cause is ErrorClass.UNKNOWN
    delivery = store.deliver(batch, give_up_on_unknown=True)
    assert (delivery.inserted, len(delivery.dead)) == (8, 1)


def test_a_real_deadlock_is_tried_again(store: Store, database: Database) -> None:  # F14
    """The writer waits for sums that another transaction has locked, which then waits for the writer's table."""
    store.deliver(pairs(1))
    with database.server.connection(database.name) as other, ThreadPoolExecutor(1) as pool:
        cursor = other.cursor()
        cursor.execute("BEGIN; SET deadlock_timeout = '1min'; SELECT FROM daily_usage FOR UPDATE")
        delivering = pool.submit(store.deliver, pairs(1))
        waiting = "SELECT 1 FROM pg_stat_activity WHERE usename = 'litellm_writer_a' AND wait_event_type = 'Lock'"
        wait_until(lambda: database.query(waiting), "the writer waits for the other")
        cursor.execute("LOCK TABLE responses IN EXCLUSIVE MODE")  # until the writer finds the deadlock, after 1 s
        other.rollback()
        with pytest.raises(Unavailable) as caught:
            delivering.result(20)
    assert (caught.value.cause, "40P01" in str(caught.value)) == (ErrorClass.RETRY, True)
    assert store.deliver(pairs(1)).inserted == 2


def test_deadlock_or_serialization_failure_is_tried_again(store: Store, database: Database) -> None:  # F14
    for code in ("40P01", "40001", "55P03"):
        database.execute(
            "CREATE OR REPLACE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS "
            f"$$BEGIN RAISE 'no' USING ERRCODE = '{code}'; END$$",
            "CREATE OR REPLACE TRIGGER refuse BEFORE INSERT ON requests FOR EACH ROW EXECUTE FUNCTION refuse()",
        )
        with pytest.raises(Unavailable) as caught:
            store.deliver(pairs(2))
        assert caught.value.cause is ErrorClass.RETRY
    database.execute("DROP TRIGGER refuse ON requests")
    assert store.deliver(pairs(2)).inserted == 4


def test_an_error_of_our_own_code_costs_one_frame(  # F45
    store: Store, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a file that COPY reads, psycopg2 would tell PostgreSQL to cancel the query, as after a timeout."""
    frames = pairs(3)

    def encode(frame: Frame, *, opaque: bool = False) -> bytes:
        if frame == frames[5]:
            raise KeyError("odd")
        return encode_row(frame, opaque=opaque)

    monkeypatch.setattr("litellm_sqlalchemy.records.encode_row", encode)
    delivery = store.deliver(frames)
    assert (delivery.dead, delivery.inserted) == ([DeadLetter(frames[5], "KeyError: 'odd'")], 5)
    assert _counts(database) == (3, 2)
