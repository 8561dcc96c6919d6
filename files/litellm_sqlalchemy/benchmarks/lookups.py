"""Look-ups in large tables: the server's time for what the readers ask, and where it goes.

The rows are made inside PostgreSQL: ids and times spread evenly over the days, everything else copied from samples.
"""

import statistics
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple

from sqlalchemy import Select
from sqlalchemy.dialects.postgresql import asyncpg

from benchmarks.cluster import Cluster
from benchmarks.data import MODELS, fill_spool
from litellm_sqlalchemy.models import Request, Response
from litellm_sqlalchemy.queries import Selection, has_call_id, last_calls_query, totals_query
from litellm_sqlalchemy.views import calls_view
from litellm_sqlalchemy.writer import Writer

_SAMPLES = 1000
_CHUNK = 100_000
#: The moment at which the generated calls end, so that every run asks for the same day.
_END = datetime(2026, 6, 30, tzinfo=UTC)
_MOMENT = "timestamptz '{end}' - ({pairs} - number) * interval '{seconds} seconds'"
_ID = (
    "(lpad(to_hex((extract(epoch FROM {moment}) * 1000)::bigint), 12, '0') || '7' || substr(md5(number::text), 1, 3) "
    "|| '8' || substr(md5(number::text), 4, 15))::uuid"
)


class LookUp(NamedTuple):
    """A question, the server's median times for it, planning included, and what is allowed; milliseconds.

    `prepared` is the time of a prepared statement, whose plan most drivers keep; psycopg2 prepares none.
    """

    name: str
    milliseconds: float
    execution: float
    prepared: float
    limit: float


def fill_tables(cluster: Cluster, pairs: int, days: int) -> None:
    """Fill the empty tables with `pairs` calls of the last `days` days before `_END`."""
    fill_spool(cluster.settings, _SAMPLES)
    writer = Writer(cluster.settings)
    while writer.drain_once():
        pass
    writer.engine.dispose()
    for table, key in (("requests", "id"), ("responses", "request_id")):
        cluster.query(f"CREATE TABLE sample_{table} AS SELECT row_number() OVER (ORDER BY {key}) AS nr, * FROM {table}")
        cluster.query(f"CREATE UNIQUE INDEX ON sample_{table} (nr)")
    cluster.empty()
    moment = _MOMENT.format(end=_END.isoformat(), pairs=pairs, seconds=days * 86400 / pairs)
    replaced = {"id": _ID.format(moment=moment), "request_id": _ID.format(moment=moment), "created_at": moment,
                "call_id": "md5(number::text)::uuid::text", "payload": "s.payload::text::json"}  # fmt: skip
    for model in (Request, Response):
        name = model.__tablename__
        columns = [column.name for column in model.__table__.columns]
        values = ", ".join(replaced.get(column, f"s.{column}") for column in columns)
        for first in range(1, pairs + 1, _CHUNK):
            cluster.query(
                f"INSERT INTO {name} ({', '.join(columns)}) SELECT {values} "
                f"FROM generate_series({first}::bigint, {min(first + _CHUNK - 1, pairs)}) AS number "
                f"JOIN sample_{name} s ON s.nr = 1 + number * 7919 % {_SAMPLES}"
            )
    cluster.query("VACUUM (FREEZE, ANALYZE) requests, responses")


def look_ups(cluster: Cluster, repeats: int = 100) -> Iterator[LookUp]:
    """Yield the server's times, medians of `repeats` after as many in the same session.

    The client does nothing in between: it shares caches with the server here, and what it takes of them is no part of a
    look-up.
    """
    ((identifier, call_id, key, user, team),) = cluster.query(
        "SELECT id, call_id, key_hash, user_id, team_id FROM requests ORDER BY id OFFSET 100 LIMIT 1"
    )
    day = Selection(since=_END - timedelta(days=2), until=_END - timedelta(days=1))
    calls = calls_view()
    questions: list[tuple[str, Select[Any], float]] = [
        ("a call by its id", calls.where(Request.id == identifier), 0.1),
        ("a call by LiteLLM's call id", calls.where(*has_call_id(call_id)), 0.1),
        ("last 100", last_calls_query(Selection(), 100), 5),
        ("last 100 of a model", last_calls_query(Selection(model=MODELS[0]), 100), 5),
        ("last 100 of a rare model", last_calls_query(Selection(model=MODELS[-1]), 100), 5),
        ("last 100 of a key", last_calls_query(Selection(keys=[key]), 100), 5),
        ("last 100 of a user", last_calls_query(Selection(user=user), 100), 5),
        ("last 100 of a team", last_calls_query(Selection(team=team), 100), 5),
        ("totals of a day by model", totals_query(["model"], day), 300),
        ("totals of a day by key", totals_query(["key"], day), 300),
    ]
    for name, query, limit in questions:
        statement = query.compile(dialect=asyncpg.dialect())  # type: ignore[no-untyped-call]
        values = [str(statement.params[parameter]) for parameter in statement.positiontup or ()]
        literals = query.compile(dialect=asyncpg.dialect(), compile_kwargs={"literal_binds": True})  # type: ignore[no-untyped-call]
        cluster.query(f"PREPARE look_up AS {statement}")
        times = _medians(cluster, str(literals), [], repeats)
        prepared = _medians(cluster, f"EXECUTE look_up({', '.join(['%s'] * len(values))})", values, repeats)
        cluster.query("DEALLOCATE look_up")
        yield LookUp(name, sum(times), times[1], sum(prepared), limit)


def _medians(cluster: Cluster, statement: str, values: list[str], repeats: int) -> tuple[float, float]:
    """Return the median milliseconds that the server plans a statement and executes it."""
    explain = f"EXPLAIN (ANALYZE, TIMING OFF, FORMAT JSON) {statement}"
    plans = [cluster.query(explain, values or None)[0][0][0] for _ in range(2 * repeats)][repeats:]
    planning, execution = (
        statistics.median(plan[f"{phase} Time"] for plan in plans) for phase in ("Planning", "Execution")
    )
    return planning, execution
