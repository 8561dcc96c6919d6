"""What people ask of the log: small functions over the models, for the reader's login.

Every function takes a connection and returns plain dicts. Time bounds stand on the ids of both tables as well as on
the time: ids are UUIDv7, so an index on the id finds the range, and partitions by id are pruned.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

from sqlalchemy import (
    BigInteger,
    ColumnElement,
    Connection,
    CursorResult,
    Float,
    Select,
    case,
    cast,
    func,
    literal_column,
    select,
)

from litellm_sqlalchemy.identifiers import first_id_at
from litellm_sqlalchemy.models import KEY_PREFIX_LENGTH, DailyUsage, Request, Response, hashed
from litellm_sqlalchemy.values import KEY_HASH
from litellm_sqlalchemy.views import ERROR_DIMENSIONS, call_day, calls_view, count_errors, key_name

Row = dict[str, Any]


class Rows(list[Row]):
    """The rows of a query, and the names of its columns, which it has without rows, too."""

    def __init__(self, result: CursorResult[Any]) -> None:
        """Fetch all of a result."""
        self.columns = list(result.keys())
        super().__init__(map(dict, result.mappings()))


#: How far the time in a call's id may be from its `created_at`: clocks are set, health checks are recorded afterwards.
_ID_TOLERANCE = timedelta(hours=1)


def _dimensions(
    calls: type[Request] | type[DailyUsage],
    day: ColumnElement[Any],
    served_model: ColumnElement[Any],
    provider: ColumnElement[Any],
) -> dict[str, ColumnElement[Any]]:
    return {
        "day": day,
        "model": calls.model.expression,
        "served_model": served_model,
        "provider": provider,
        "key": key_name(calls),
        "user": calls.user_id.expression,
        "team": calls.team_id.expression,
        "endpoint": calls.endpoint.expression,
    }


#: What totals can be grouped by, and the same columns of `daily_usage`.
DIMENSIONS = _dimensions(
    Request,
    call_day(),
    Response.model.expression,
    Response.provider.expression,
)
_DAILY_DIMENSIONS = _dimensions(
    DailyUsage, DailyUsage.day.expression, DailyUsage.served_model.expression, DailyUsage.provider.expression
)
#: What is summed up over finished calls. `failures` has what failed or was interrupted, not what a client left.
_SUMS: dict[str, ColumnElement[Any]] = {
    "calls": Request.calls.expression,
    "failures": case((Response.status.in_(("failure", "interrupted")), Request.calls), else_=0),
    "prompt_tokens": Response.prompt_tokens.expression,
    "completion_tokens": Response.completion_tokens.expression,
    "total_tokens": Response.total_tokens.expression,
    "cost": Response.cost.expression,
}
_DAILY_SUMS: dict[str, ColumnElement[Any]] = {name: DailyUsage.__table__.columns[name] for name in _SUMS}
#: Percentiles of the times of answered calls, in milliseconds: name, column and fraction.
_PERCENTILES = [
    (f"{prefix}_p{percent}", column, percent / 100)
    for prefix, column in (("duration_ms", Response.duration_ms), ("first_token_ms", Response.time_to_first_token_ms))
    for percent in (50, 95, 99)
]
PERCENTILE_COLUMNS = tuple(name for name, _column, _fraction in _PERCENTILES)


@dataclass(frozen=True)
class Selection:
    """Which calls: `since` <= time < `until`, and equal in whatever else is given.

    `keys` are hashes of keys, any of them; see `keys_named`.
    """

    since: datetime | None = None
    until: datetime | None = None
    model: str | None = None
    keys: Collection[str] | None = None
    user: str | None = None
    team: str | None = None
    status: str | None = None

    def apply(self, query: Select[Any]) -> Select[Any]:
        """Return a query on both tables, limited to these calls."""
        return query.where(*self._time(), *self._equalities())

    def _time(self) -> list[ColumnElement[bool]]:
        conditions = []
        if self.since is not None:
            first = first_id_at(self.since - _ID_TOLERANCE)
            conditions += [Request.created_at >= self.since, Request.id >= first]
        if self.until is not None:
            conditions += [Request.created_at < self.until, Request.id < first_id_at(self.until + _ID_TOLERANCE)]
        return conditions

    def _equalities(self) -> list[ColumnElement[bool]]:
        conditions = self._callers(Request)
        if self.status is not None:
            conditions.append(func.coalesce(Response.status, "running") == self.status)
        if self.model is not None:  # as the index has it
            conditions.append(_same_hash(Request.model.expression, self.model))
        if self.keys is not None:
            prefix = func.left(Request.key_hash, literal_column(str(KEY_PREFIX_LENGTH)))
            conditions.append(prefix.in_({key[:KEY_PREFIX_LENGTH] for key in self.keys}))
        return conditions

    def _callers(self, calls: type[Request] | type[DailyUsage]) -> list[ColumnElement[bool]]:
        """Return what holds for the calls of either table."""
        keys = [] if self.keys is None else [calls.key_hash.in_(self.keys)]
        return keys + [
            column == value
            for column, value in (
                (calls.model, self.model),
                (calls.user_id, self.user),
                (calls.team_id, self.team),
            )
            if value is not None
        ]

    def is_of_days(self) -> bool:
        """Return whether `daily_usage` can tell: whole days (UTC), whatever the status."""
        times = [time.astimezone(UTC) for time in (self.since, self.until) if time is not None]
        return self.status is None and all(time.time() == datetime.min.time() for time in times)

    def apply_to_days(self, query: Select[Any]) -> Select[Any]:
        """Return a query on `daily_usage`, limited to these calls."""
        conditions = self._callers(DailyUsage)
        if self.since is not None:
            conditions.append(DailyUsage.day >= self.since.astimezone(UTC).date())
        if self.until is not None:
            conditions.append(DailyUsage.day < self.until.astimezone(UTC).date())
        return query.where(*conditions)

    def join(self) -> ColumnElement[bool]:
        """Return the condition that joins the responses, their ids bounded like those of the requests."""
        condition = Response.request_id == Request.id
        if self.since is not None:
            condition &= Response.request_id >= first_id_at(self.since - _ID_TOLERANCE)
        if self.until is not None:
            condition &= Response.request_id < first_id_at(self.until + _ID_TOLERANCE)
        return condition


def find_calls(connection: Connection, identifier: str, limit: int = 100) -> Rows:
    """Return the latest calls with this id or this LiteLLM call id, payloads included, the latest first.

    Clients may choose the call id, so that there can be any number of them.
    """
    by_id = _as_uuid(identifier)
    if by_id is not None and (found := _rows(connection, _whole_calls().where(Request.id == by_id))):
        return found
    return _rows(connection, find_calls_query(identifier, limit))


def find_calls_query(identifier: str, limit: int) -> Select[Any]:
    """Return the query of `find_calls` for a LiteLLM call id."""
    return _whole_calls().where(*has_call_id(identifier)).order_by(Request.created_at.desc()).limit(limit)


def _whole_calls() -> Select[Any]:
    return calls_view().add_columns(
        Request.payload_encoding.label("request_encoding"),
        Request.payload.label("request"),
        Response.payload_encoding.label("response_encoding"),
        Response.payload.label("response"),
    )


def has_call_id(identifier: str) -> tuple[ColumnElement[bool], ColumnElement[bool]]:
    """Return what holds for the calls with a LiteLLM call id, by its index."""
    return _same_hash(Request.call_id.expression, identifier), Request.call_id == identifier


def last_calls(connection: Connection, selection: Selection, limit: int = 100) -> Rows:
    """Return the latest calls, the latest first, without payloads."""
    return _rows(connection, last_calls_query(selection, limit))


def last_calls_query(selection: Selection, limit: int) -> Select[Any]:
    """Return the query of `last_calls`."""
    indexed = (selection.model, selection.keys, selection.user)
    time = Request.created_at if any(indexed) else Request.id  # the order in which an index has them
    return selection.apply(calls_view()).order_by(time.desc()).limit(limit)


def keys_named(connection: Connection, name: str) -> tuple[str, ...]:
    """Return the hashes of the keys that have had this alias in a finished call, or the hash that the name is."""
    if KEY_HASH.fullmatch(name):
        return (name,)
    of_name = DailyUsage.key_alias == name, DailyUsage.key_hash.is_not(None)
    return tuple(connection.scalars(select(DailyUsage.key_hash).where(*of_name).distinct()))


def totals(connection: Connection, by: Sequence[str], selection: Selection) -> Rows:
    """Return finished calls, failures, tokens, cost and error rate per combination of `by`, names of DIMENSIONS.

    Whole days (UTC) are read from `daily_usage`, where a day of any size is some hundred rows; other times, and a
    `status`, from the calls themselves.
    """
    return _rows(connection, totals_query(by, selection))


def totals_query(by: Sequence[str], selection: Selection) -> Select[Any]:
    """Return the query of `totals`."""
    if selection.is_of_days():
        dimensions, sums = _DAILY_DIMENSIONS, _DAILY_SUMS
        source = selection.apply_to_days(select().select_from(DailyUsage))
    else:
        dimensions, sums = DIMENSIONS, _SUMS
        source = selection.apply(select().select_from(Request).join(Response, selection.join()))
    groups = [dimensions[name].label(name) for name in by]
    summed = {  # sums of integers are numeric
        name: cast(func.coalesce(func.sum(column), 0), Float(53) if name == "cost" else BigInteger).label(name)
        for name, column in sums.items()
    }
    rate = cast(summed["failures"].element, Float(53)) / func.nullif(summed["calls"].element, 0)
    columns = (*groups, *summed.values(), rate.label("error_rate"))
    return source.add_columns(*columns).group_by(*groups).order_by(*groups)


def latencies(connection: Connection, by: Sequence[str], selection: Selection) -> Rows:
    """Return percentiles of duration and time to first token (milliseconds) of answered calls per combination."""
    dimensions = [DIMENSIONS[name].label(name) for name in by]
    percentiles = [
        func.percentile_cont(fraction).within_group(column).label(name) for name, column, fraction in _PERCENTILES
    ]
    query = (
        select(*dimensions, func.count().label("answers"), *percentiles)
        .select_from(Request)
        .join(Response, selection.join())
        .where(Response.status == "success")
        .group_by(*dimensions)
        .order_by(*dimensions)
    )
    return _rows(connection, selection.apply(query))


def errors(connection: Connection, selection: Selection) -> Rows:
    """Return how often calls failed, by model, error type and code, the most frequent first."""
    query = count_errors(*ERROR_DIMENSIONS).order_by(literal_column("calls").desc(), *ERROR_DIMENSIONS)
    return _rows(connection, selection.apply(query.where(selection.join())))


def _same_hash(column: ColumnElement[Any], value: str) -> ColumnElement[bool]:
    """Return what an index on a column's hash finds: all that is equal, and what has the same hash by chance."""
    return hashed(column) == hashed(value)


def _rows(connection: Connection, query: Select[Any]) -> Rows:
    return Rows(connection.execute(query))


def _as_uuid(identifier: str) -> UUID | None:
    try:
        return UUID(identifier)
    except ValueError:
        return None
