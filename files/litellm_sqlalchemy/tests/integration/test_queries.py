"""What the readers ask, by function, by view and by verb, against a real database."""

import csv
import io
import json
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import orjson
import pytest
from sqlalchemy import Connection, text
from sqlalchemy.dialects import postgresql
from support.postgresql import Database, Server
from support.processes import Deployment

from litellm_sqlalchemy import queries, usage, views
from litellm_sqlalchemy.database import connected, make_engine
from litellm_sqlalchemy.frames import Frame, Kind
from litellm_sqlalchemy.identifiers import uuid7
from litellm_sqlalchemy.models import Base
from litellm_sqlalchemy.queries import Selection
from litellm_sqlalchemy.store import Store
from litellm_sqlalchemy.views import VIEWS

_NOON = datetime(2026, 3, 10, 12, tzinfo=UTC)
_KEY = "a" * 64
_OTHER_KEY = "a" * 7 + "b" * 57  # the same as far as the index looks


def _call(moment: datetime, **values: Any) -> Iterator[Frame]:
    """Yield the frames of a call; `status=None` is one that is still running."""
    identifier = uuid7(int(moment.timestamp() * 1e9)).hex
    common = {"content_mode": "full", "redaction_version": 1, "payload_size": 12}
    request = {
        "id": identifier,
        "created_at": int(moment.timestamp() * 1e6),
        "gateway": "test:4000",
        "origin": "client",
        "calls": values.pop("calls", 1),
        "stream": False,
        "model": values.pop("model", "small"),
        "key_hash": values.pop("key", _KEY),
        **{name: values.pop(name) for name in ("call_id", "key_alias", "user_id", "team_id") if name in values},
        **common,
    }
    yield Frame(Kind.REQUEST, 0, orjson.dumps(request), b'{"ask": "\xc3\xa9"}')
    response = {
        "status": "success",
        "attempt_count": 1,
        "cost": 0.5,
        "total_tokens": 30,
        "duration_ms": 100.0,
        **values,
    }
    response |= {"request_id": identifier, "created_at": int(moment.timestamp() * 1e6) + 100_000, **common}
    if response["status"]:
        yield Frame(Kind.RESPONSE, 0, orjson.dumps(response), b'{"answer": 42}')


def _at(hours: float) -> datetime:
    return _NOON + timedelta(hours=hours)


@pytest.fixture
def filled(deployment: Deployment) -> Deployment:
    """A deployment with ten calls of three days."""
    calls = [
        _call(_at(-24), call_id="first", user_id="ann", cost=2.0),
        _call(_at(-12.001), model="large"),  # one second and more before midnight
        _call(_at(-12), model="large", user_id="ann", team_id="red"),
        _call(_at(0), call_id="twice", key=_OTHER_KEY, key_alias="other"),
        _call(_at(1), call_id="twice", user_id="bob", duration_ms=300.0),
        _call(_at(2), status="failure", error_type="RateLimitError", error_code="429", cost=None, total_tokens=None),
        _call(_at(3), status="failure", error_type="BadKey", calls=5, cost=None, total_tokens=None),
        _call(_at(4), status="client_disconnected"),
        _call(_at(5), status=None),
        _call(_at(12), model="large"),
    ]
    engine = make_engine(deployment.load().database, "writer", "test")
    delivery = Store(engine).deliver([frame for call in calls for frame in call])
    engine.dispose()
    assert (delivery.inserted, delivery.dead) == (19, [])
    return deployment


@pytest.fixture
def reader(filled: Deployment) -> Iterator[Connection]:
    """A connection of the reader's login to the filled tables."""
    with connected(filled.load().database, "reader", "test") as connection:
        yield connection


_DAY = Selection(since=_at(-12), until=_at(12))


def test_find_by_id_and_by_call_id(reader: Connection) -> None:
    (by_call_id,) = queries.find_calls(reader, "first")
    (by_id,) = queries.find_calls(reader, str(by_call_id["id"]))
    assert by_id == by_call_id
    assert (by_id["request"], by_id["response"], by_id["cost"]) == ({"ask": "é"}, {"answer": 42}, 2.0)


def test_a_call_id_can_be_chosen_twice(reader: Connection) -> None:
    assert [row["created_at"] for row in queries.find_calls(reader, "twice")] == [_at(1), _at(0)]


@pytest.mark.parametrize(
    ("selection", "hours"),
    [
        (Selection(), [12, 5, 4, 3, 2, 1, 0, -12, -12.001, -24]),
        (Selection(model="large"), [12, -12, -12.001]),
        (Selection(keys=[_OTHER_KEY]), [0]),
        (Selection(keys=[_OTHER_KEY, _KEY], since=_at(5)), [12, 5]),
        (Selection(keys=[]), []),
        (Selection(user="ann"), [-12, -24]),
        (Selection(team="red"), [-12]),
        (Selection(status="running"), [5]),
        (Selection(status="failure"), [3, 2]),
        (Selection(since=_at(-12), until=_at(1)), [0, -12]),
        (Selection(since=_at(4)), [12, 5, 4]),
        (Selection(model="nobody's"), []),
    ],
)
def test_last_calls(reader: Connection, selection: Selection, hours: list[float]) -> None:
    found = [row["created_at"] for row in queries.last_calls(reader, selection)]
    assert found == [_at(hour) for hour in hours]
    assert [row["created_at"] for row in queries.last_calls(reader, selection, 2)] == found[:2]


def test_totals_of_a_day(reader: Connection) -> None:
    small, large = sorted(queries.totals(reader, ["day", "model"], _DAY), key=lambda row: row["calls"], reverse=True)
    assert (small["day"].isoformat(), small["model"], large["model"]) == ("2026-03-10", "small", "large")
    assert (small["calls"], small["failures"], small["total_tokens"], small["cost"]) == (9, 6, 90, 1.5)
    assert small["error_rate"] == pytest.approx(6 / 9)
    assert (large["calls"], large["failures"], large["error_rate"]) == (1, 0, 0)


@pytest.mark.parametrize("name", queries.DIMENSIONS)
def test_every_dimension_sums_up_to_the_same(reader: Connection, name: str) -> None:
    rows = queries.totals(reader, [name], Selection())
    assert (sum(row["calls"] for row in rows), sum(row["failures"] for row in rows)) == (13, 6)


@pytest.mark.parametrize("values", [{}, {"model": "small"}, {"keys": [_OTHER_KEY]}, {"user": "ann"}, {"team": "red"}])
@pytest.mark.parametrize("by", [["day", "model"], ["key", "team"], []])
def test_days_and_calls_give_the_same_totals(reader: Connection, values: dict[str, str], by: list[str]) -> None:
    days = Selection(since=_at(-36), until=_at(36), **values)  # type: ignore[arg-type]
    calls = Selection(since=_at(-35.999), until=_at(35.999), **values)  # type: ignore[arg-type]
    assert (days.is_of_days(), calls.is_of_days()) == (True, False)
    assert queries.totals(reader, by, days) == queries.totals(reader, by, calls) != []


def test_a_day_is_counted_once(filled: Deployment, database: Database) -> None:
    """A refused batch, the same again by way of the staging tables, and the rows' removal."""
    before = database.query("SELECT * FROM daily_usage ORDER BY digest")
    call = list(_call(_at(0), model="new"))
    engine = make_engine(filled.load().database, "writer", "test")
    store = Store(engine)
    assert (store.deliver(call).inserted, store.deliver([*call, *_call(_at(0), model="newer")]).inserted) == (2, 2)
    engine.dispose()
    added = database.query("SELECT model, responses, calls FROM daily_usage WHERE model LIKE 'new%' ORDER BY model")
    assert added == [("new", 1, 1), ("newer", 1, 1)]
    database.execute("DELETE FROM requests")
    assert database.query("SELECT * FROM daily_usage WHERE model NOT LIKE 'new%' ORDER BY digest") == before


def test_latencies_are_those_of_answers(reader: Connection) -> None:
    (large, small) = queries.latencies(reader, ["model"], Selection(since=_at(-12), until=_at(1.5)))
    assert (large["answers"], small["answers"]) == (1, 2)
    assert (small["duration_ms_p50"], small["duration_ms_p99"]) == (200, pytest.approx(298))
    assert small["first_token_ms_p50"] is None


def test_errors(reader: Connection) -> None:
    rows = queries.errors(reader, _DAY)
    assert [(row["error_type"], row["calls"]) for row in rows] == [
        ("BadKey", 5), (None, 1), ("RateLimitError", 1)
    ]  # fmt: skip


def test_views_equal_queries(reader: Connection) -> None:
    def rows(statement: str) -> list[dict[str, Any]]:
        return [dict(row) for row in reader.execute(text(statement)).mappings()]

    assert rows("SELECT * FROM calls ORDER BY id DESC") == queries.last_calls(reader, Selection())
    sums = "sum(calls) AS calls, sum(failures) AS failures, sum(total_tokens) AS total_tokens, sum(cost) AS cost"
    found = rows(f"SELECT day, model, key, {sums} FROM usage GROUP BY day, model, key ORDER BY day, model, key")
    expected = queries.totals(reader, ["day", "model", "key"], Selection())
    assert found == [{name: row[name] for name in found[0]} for row in expected]
    found = rows("SELECT error_type, sum(calls) AS calls FROM errors GROUP BY 1 ORDER BY 1")
    by_type: dict[str | None, int] = {}
    for row in queries.errors(reader, Selection()):
        by_type[row["error_type"]] = by_type.get(row["error_type"], 0) + row["calls"]
    assert {row["error_type"]: row["calls"] for row in found} == by_type


def test_verb_errors(filled: Deployment) -> None:
    day = ("--since", "2026-03-10", "--until", "2026-03-11")
    assert _json(filled, "errors", *day)[0].items() >= {"error_type": "BadKey", "calls": 5}.items()
    header, first, *_ = filled.run("errors", *day).stdout.splitlines()
    assert header.split() == ["model", "status", "error_type", "error_code", "calls", "last_at"]
    assert "BadKey" in first


def test_readers_of_another_schema(filled: Deployment, database: Database) -> None:
    """One line that says what to do, whoever is newer."""
    database.execute("ALTER TABLE daily_usage RENAME TO other", "ALTER TABLE requests RENAME COLUMN model TO other")
    for revision, remedy in (("0003", "run `litellm-sqlalchemy migrate`"), ("ffff", "install a newer")):
        database.execute(f"UPDATE alembic_version SET version_num = '{revision}'")
        for arguments in (["calls"], ["call", "first"], ["usage"], ["status"]):
            done = filled.run(*arguments)
            assert (done.returncode, done.stderr.count("\n")) == (5, 1), (arguments, done.stderr)
            assert remedy in done.stderr


_CATALOGUE = """
SELECT c.relname, a.attname, format_type(a.atttypid, a.atttypmod), a.attnotnull, a.attcompression,
    pg_get_expr(d.adbin, d.adrelid)
FROM pg_class c JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0
LEFT JOIN pg_attrdef d ON d.adrelid = c.oid AND d.adnum = a.attnum
WHERE c.relnamespace = 'public'::regnamespace AND c.relkind IN ('r', 'v') AND c.relname <> 'alembic_version'
    AND NOT a.attisdropped
UNION ALL
SELECT relname, array_to_string(reloptions, ','), CASE relkind WHEN 'i' THEN pg_get_indexdef(oid)
    WHEN 'v' THEN pg_get_viewdef(oid) ELSE obj_description(oid) END, NULL, NULL, NULL
FROM pg_class WHERE relnamespace = 'public'::regnamespace AND relname NOT LIKE 'alembic%'
UNION ALL
SELECT tgname, pg_get_triggerdef(t.oid), pg_get_functiondef(tgfoid), NULL, NULL, NULL
FROM pg_trigger t JOIN pg_class c ON c.oid = tgrelid WHERE relnamespace = 'public'::regnamespace AND NOT tgisinternal
UNION ALL
SELECT conname, pg_get_constraintdef(oid), NULL, NULL, NULL, NULL
FROM pg_constraint WHERE connamespace = 'public'::regnamespace AND conname NOT LIKE 'alembic%'
ORDER BY 1, 2, 3
"""


def test_models_and_migrations_make_the_same_schema(server: Server, database: Database, deployment: Deployment) -> None:
    from_models = server.create_database("from_models")
    deployment.update(database={"name": "from_models"})
    try:
        with connected(deployment.load().database, "migrator", "test") as connection:
            connection.execute(text("SET ROLE litellm_owner"))
            Base.metadata.create_all(connection)
            connection.commit()
        catalogue = from_models.query(_CATALOGUE)
        assert {row[0] for row in catalogue} >= {"requests", "responses", *VIEWS}
        assert database.query(_CATALOGUE) == catalogue
    finally:
        from_models.drop()


@pytest.mark.parametrize(
    ("statement", "old", "new"),
    [(views.create_statements()[0], "'running'", "'open'"), (usage.create_statements()[0], "'interrupted'", "'gone'")],
    ids=["view", "trigger"],
)
def test_a_change_would_be_noticed(database: Database, statement: str, old: str, new: str) -> None:
    before = database.query(_CATALOGUE)
    database.execute(statement.replace("CREATE", "CREATE OR REPLACE", 1))
    assert database.query(_CATALOGUE) == before
    database.execute(statement.replace("CREATE", "CREATE OR REPLACE", 1).replace(old, new))
    assert database.query(_CATALOGUE) != before


def test_indexes_are_used_without_their_names(reader: Connection) -> None:
    reader.execute(text("SET enable_seqscan = off"))
    plans = [
        reader.execute(text(f"EXPLAIN {statement}")).scalars().all()
        for statement in (
            _literal(queries.last_calls_query(Selection(keys=[_KEY]), 10)),
            _literal(queries.last_calls_query(Selection(model="small"), 10)),
            _literal(views.calls_view().where(*queries.has_call_id("first"))),
            _literal(queries.last_calls_query(Selection(team="large"), 10)),
        )
    ]
    assert "ix_requests_key_prefix_created_at" in str(plans[0])
    assert "ix_requests_model_hash_created_at" in str(plans[1])
    assert "ix_requests_call_id_hash_created_at" in str(plans[2])
    assert "pk_requests" in str(plans[3])
    assert "Sort" not in str(plans[3]), "a team has no index: its calls are met on the way back in time"


_INSERT = (
    "INSERT INTO requests (id, created_at, gateway, origin, calls, stream, content_mode, redaction_version, "
    "payload_size, call_id) SELECT gen_random_uuid(), clock_timestamp(), '', 'client', 1, false, 'full', 1, 0, "
)


def _pages(database: Database, statement: str) -> int:
    """Return how many pages a statement reads, wherever they are."""
    (((plan,),),) = database.query(f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) {statement}")
    return int(plan["Plan"]["Shared Hit Blocks"] + plan["Plan"]["Shared Read Blocks"])


def test_a_call_id_that_a_client_always_sends(reader: Connection, database: Database) -> None:
    """To insert it once more, and to look up its latest calls, reads few pages; another one is found by the index."""
    for call_id in ("'always'", "number::text"):
        database.execute(f"{_INSERT} {call_id} FROM generate_series(1, 20000) AS number")
    assert _pages(database, f"{_INSERT} 'always'") < _pages(database, f"{_INSERT} 'new'") + 20
    for statement in ("SELECT 1", "ANALYZE requests"):  # without statistics, and with them
        database.execute(statement)
        reader.rollback()
        assert [row["call_id"] for row in queries.find_calls(reader, "first")] == ["first"]
        index = "'ix_requests_call_id_hash_created_at'::regclass"
        assert reader.scalar(text(f"SELECT pg_stat_get_xact_numscans({index})"))
    assert len(queries.find_calls(reader, "always")) == 100
    assert _pages(database, _literal(queries.find_calls_query("always", 100))) < 250


def test_a_response_is_counted_by_its_requests_id(database: Database) -> None:
    """Also where the plan was made when the planner took the table for empty."""
    database.execute("TRUNCATE requests CASCADE", "ANALYZE requests")
    ids = "SELECT lpad(number::text, 32, '0')::uuid, now()"
    with database.server.connection(database.name) as connection, connection.cursor() as cursor:
        cursor.execute("BEGIN")
        for numbers in ("1, 1", "2, 2000"):
            rows = f"FROM generate_series({numbers}) AS number"
            cursor.execute(_INSERT.replace("SELECT gen_random_uuid(), clock_timestamp()", ids) + f"NULL {rows}")
            cursor.execute(
                "INSERT INTO responses (request_id, created_at, status, attempt_count, payload_size) "
                f"{ids}, 'success', 1, 0 {rows}"
            )
        cursor.execute("SELECT pg_stat_get_xact_tuples_returned('requests'::regclass)")  # those of sequential scans
        assert cursor.fetchone()[0] < 100


@pytest.mark.parametrize("mode", ["force_custom_plan", "force_generic_plan"])
def test_a_prepared_statement_finds_a_call_id_by_its_index(reader: Connection, mode: str) -> None:
    reader.execute(text(f"SET enable_seqscan = off; SET plan_cache_mode = {mode}"))
    same = "hashtextextended(call_id, 0) = hashtextextended($1, 0) AND call_id = $1"
    reader.execute(text(f"PREPARE find(text) AS SELECT call_id FROM calls WHERE {same}"))
    assert "ix_requests_call_id_hash_created_at" in str(reader.execute(text("EXPLAIN EXECUTE find('first')")).all())
    assert reader.execute(text("EXECUTE find('first')")).all() == [("first",)]


def _literal(query: Any) -> str:
    return str(query.compile(dialect=postgresql.dialect(), compile_kwargs={"literal_binds": True}))  # type: ignore[no-untyped-call]


def _json(deployment: Deployment, *arguments: str) -> Any:
    done = deployment.run(*arguments, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    return json.loads(done.stdout)


def test_verb_calls(filled: Deployment) -> None:
    rows = _json(filled, "calls", "--user", "ann")
    assert [row["created_at"] for row in rows] == [str(_at(-12)), str(_at(-24))]
    table = filled.run("calls", "--user", "ann").stdout.splitlines()
    assert table[0].split()[:3] == ["created_at", "id", "status"]
    assert table[1].startswith("2026-03-10 00:00:00  ")
    (header, *lines) = csv.reader(io.StringIO(filled.run("calls", "--last", "3", "--csv").stdout))
    assert (len(lines), lines[1][header.index("status")]) == (3, "running")
    assert len(_json(filled, "calls", "--last", "9" * 20)) == 10


def test_verb_calls_without_any(filled: Deployment) -> None:
    assert filled.run("calls", "--model", "none").stdout == "no calls\n"
    assert _json(filled, "calls", "--model", "none") == []


@pytest.mark.parametrize(
    "verb", [("calls",), ("top", "--by", "key"), ("usage", "--by", "model,day,model"), ("errors",)]
)
def test_csv_has_the_same_columns_with_and_without_rows(verb: tuple[str, ...], filled: Deployment) -> None:
    since = ("--since", "2026-03-01", "--csv")
    header, *lines = csv.reader(io.StringIO(filled.run(*verb, *since).stdout))
    assert {len(line) for line in lines} == {len(header)}
    assert list(csv.reader(io.StringIO(filled.run(*verb, *since, "--model", "none").stdout))) == [header]


def test_verb_call(filled: Deployment) -> None:
    assert [row["response"] for row in _json(filled, "call", "twice")] == [{"answer": 42}] * 2
    lines = dict(line.split(maxsplit=1) for line in filled.run("call", "first").stdout.splitlines() if line)
    assert (lines["call_id"], lines["request"]) == ("first", '{"ask": "é"}')


@pytest.mark.parametrize("identifier", ["unknown", "0195a1b2-0000-7000-8000-000000000000", "x' OR '1'='1"])
def test_an_unknown_call_is_one_line_and_exit_code_1(filled: Deployment, identifier: str) -> None:
    done = filled.run("call", identifier)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        f"litellm-sqlalchemy: no call has the id or LiteLLM call id {identifier!r}: see `litellm-sqlalchemy calls`\n"
    )


def test_verb_top(filled: Deployment) -> None:
    (first, second) = _json(filled, "top", "--since", "2026-03-01", "--order", "cost")
    assert (first["model"], first["cost"], second["model"]) == ("small", 3.5, "large")
    assert first["duration_ms_p50"] == 100.0
    assert filled.run("top", "--since", "2026-03-01", "--last", "1").stdout.count("\n") == 2


def test_verb_usage(filled: Deployment) -> None:
    rows = _json(filled, "usage", "--since", "2026-03-09", "--until", "2026-03-11", "--by", "day,team")
    assert [(row["day"], row["team"], row["calls"]) for row in rows] == [
        ("2026-03-09", None, 2), ("2026-03-10", "red", 1), ("2026-03-10", None, 9)
    ]  # fmt: skip
    assert [row["calls"] for row in _json(filled, "usage", "--since", "2026-03-09", "--status", "failure")] == [6]


@pytest.mark.parametrize("arguments", [["--since", "yesterday"], ["--by", "colour"], ["--until", "3y"]])
def test_bad_arguments_are_usage_errors(filled: Deployment, arguments: list[str]) -> None:
    done = filled.run("usage", *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert repr(arguments[1]) in done.stderr


@pytest.mark.parametrize("key", ["other", _OTHER_KEY])
def test_a_key_by_its_alias_or_its_hash(filled: Deployment, key: str) -> None:
    assert [row["call_id"] for row in _json(filled, "calls", "--key", key)] == ["twice"]
    (row,) = _json(filled, "usage", "--since", "2026-03-01", "--by", "key", "--key", key)
    assert (row["key"], row["calls"]) == ("other", 1)
    assert _json(filled, "calls", "--key", "unknown") == []


def test_a_key_itself_is_not_taken_nor_told(filled: Deployment) -> None:
    done = filled.run("calls", "--key", "sk-secret-of-a-client")
    assert (done.returncode, done.stdout) == (2, "")
    assert "--key: this is a key itself: give its alias or its hash" in done.stderr
    assert "secret-of-a-client" not in done.stderr


def test_reader_login_cannot_write(reader: Connection) -> None:
    for table in ("requests", "calls"):
        with pytest.raises(Exception, match=r"permission denied|cannot delete from view"):
            reader.execute(text(f"DELETE FROM {table}"))
        reader.rollback()


def test_verbs_print_no_escape_sequences(filled: Deployment) -> None:
    """A client chooses the model: it shall neither command the terminal nor forge a row."""
    model = "\x1b]0;pwned\x07\x1b[2J\n2026-03-10 forged"
    engine = make_engine(filled.load().database, "writer", "test")
    Store(engine).deliver(list(_call(_at(0), model=model, call_id="\x9b", status="failure")))
    engine.dispose()
    days = ("--since", "2026-03-10", "--until", "2026-03-11")
    reports = [(verb, *days) for verb in ("calls", "top", "errors")]
    for verb in (*reports, ("usage", "--by", "model", *days), ("call", "\x9b")):
        lines = filled.run(*verb).stdout.splitlines()
        assert [line for line in lines if not line.isprintable()] == []
        assert sum(r"\x1b]0;pwned\x07\x1b[2J\n2026-03-10 forged" in line for line in lines) == 1, verb
    assert _json(filled, "call", "\x9b")[0]["model"] == model


def test_a_payload_as_deep_as_any_that_is_stored_as_json(filled: Deployment) -> None:
    """Who calls decides, with a key or without."""
    payload = b"[" * 1024 + b"]" * 1024
    request, _response = _call(_at(0), call_id="deep")
    engine = make_engine(filled.load().database, "writer", "test")
    Store(engine).deliver([request._replace(payload=payload)])
    engine.dispose()
    done = filled.run("call", "deep", "--json")
    assert (done.returncode, done.stderr, done.stdout.count("[")) == (0, "", 1025)
    for form in ((), ("--csv",)):
        done = filled.run("call", "deep", *form)
        assert (done.returncode, done.stderr, payload.decode() in done.stdout) == (0, "", True)


def test_a_call_id_that_many_calls_have(filled: Deployment, reader: Connection) -> None:
    """A client may choose one for all of its calls: the latest are shown, and that there are more."""
    engine = make_engine(filled.load().database, "writer", "test")
    store = Store(engine)
    store.deliver([frame for minute in range(100) for frame in _call(_at(minute / 60), call_id="many")])
    done = filled.run("call", "many", "--json")
    assert (len(json.loads(done.stdout)), done.stderr) == (100, "")
    store.deliver(list(_call(_at(2), call_id="many")))
    engine.dispose()
    done = filled.run("call", "many", "--json")
    found = json.loads(done.stdout)
    assert (done.returncode, len(found), found[0]["created_at"]) == (0, 100, str(_at(2)))
    assert done.stderr.startswith("more than 100 calls have this LiteLLM call id")
    assert len(queries.find_calls(reader, "many", 3)) == 3
