"""What people ask of the log: small functions over the models, for the reader's login.

Every function takes a connection and returns plain dicts. Time bounds stand on the ids of both tables as well as on
the time: ids are UUIDv7, so an index on the id finds the range, and partitions by id are pruned.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

from sqlalchemy import ColumnElement, Connection, Float, Select, case, cast, func, literal_column, select

from litellm_sqlalchemy.identifiers import first_id_at
from litellm_sqlalchemy.models import KEY_PREFIX_LENGTH, Request, Response
from litellm_sqlalchemy.views import DAY, calls_view, measures

Row = dict[str, Any]

#: How far the time in a call's id may be from its `created_at`: clocks are set, health checks are recorded afterwards.
_ID_TOLERANCE = timedelta(hours=1)
#: What totals can be grouped by.
DIMENSIONS: dict[str, ColumnElement[Any]] = {
    "day": DAY,
    "model": Request.model.expression,
    "served_model": Response.model.expression,
    "provider": Response.provider.expression,
    "key": func.coalesce(Request.key_alias, Request.key_hash),
    "user": Request.user_id.expression,
    "team": Request.team_id.expression,
    "endpoint": Request.endpoint.expression,
}
#: Percentiles of the times of answered calls, in milliseconds: name, column and fraction.
_PERCENTILES = [
    (f"{prefix}_p{percent}", column, percent / 100)
    for prefix, column in (("duration_ms", Response.duration_ms), ("first_token_ms", Response.time_to_first_token_ms))
    for percent in (50, 95, 99)
]
PERCENTILE_COLUMNS = tuple(name for name, _column, _fraction in _PERCENTILES)


@dataclass(frozen=True)
class Selection:
    """Which calls: `since` <= time < `until`, and equal in whatever else is given. `key` is a key's hash."""

    since: datetime | None = None
    until: datetime | None = None
    model: str | None = None
    key: str | None = None
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
        conditions = [
            column == value
            for column, value in (
                (Request.model, self.model),
                (Request.key_hash, self.key),
                (Request.user_id, self.user),
                (Request.team_id, self.team),
                (func.coalesce(Response.status, "running"), self.status),
            )
            if value is not None
        ]
        if self.key is not None:  # as the index has it
            conditions.append(
                func.left(Request.key_hash, literal_column(str(KEY_PREFIX_LENGTH))) == self.key[:KEY_PREFIX_LENGTH]
            )
        return conditions

    def join(self) -> ColumnElement[bool]:
        """Return the condition that joins the responses, their ids bounded like those of the requests."""
        condition = Response.request_id == Request.id
        if self.since is not None:
            condition &= Response.request_id >= first_id_at(self.since - _ID_TOLERANCE)
        if self.until is not None:
            condition &= Response.request_id < first_id_at(self.until + _ID_TOLERANCE)
        return condition


def find_calls(connection: Connection, identifier: str) -> list[Row]:
    """Return the calls with this id or this LiteLLM call id, payloads included, the latest first.

    Clients may choose the call id, so that there can be several.
    """
    query = calls_view().add_columns(
        Request.payload_encoding.label("request_encoding"),
        Request.payload.label("request"),
        Response.payload_encoding.label("response_encoding"),
        Response.payload.label("response"),
    )
    by_id = _as_uuid(identifier)
    if by_id is not None and (found := _rows(connection, query.where(Request.id == by_id))):
        return found
    return _rows(connection, query.where(Request.call_id == identifier).order_by(Request.created_at.desc()))


def last_calls(connection: Connection, selection: Selection, limit: int = 100) -> list[Row]:
    """Return the latest calls, the latest first, without payloads."""
    return _rows(connection, last_calls_query(selection, limit))


def last_calls_query(selection: Selection, limit: int) -> Select[Any]:
    """Return the query of `last_calls`."""
    indexed = (selection.model, selection.key, selection.user, selection.team)
    time = Request.created_at if any(indexed) else Request.id  # the order in which an index has them
    return selection.apply(calls_view()).order_by(time.desc()).limit(limit)


def totals(connection: Connection, by: Sequence[str], selection: Selection) -> list[Row]:
    """Return calls, failures, tokens, cost and error rate per combination of `by`, names of DIMENSIONS."""
    return _rows(connection, totals_query(by, selection))


def totals_query(by: Sequence[str], selection: Selection) -> Select[Any]:
    """Return the query of `totals`."""
    dimensions = [DIMENSIONS[name].label(name) for name in by]
    query = (
        select(*dimensions, *measures(), _error_rate())
        .select_from(Request)
        .outerjoin(Response, selection.join())
        .group_by(*dimensions)
        .order_by(*dimensions)
    )
    return selection.apply(query)


def latencies(connection: Connection, by: Sequence[str], selection: Selection) -> list[Row]:
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


def errors(connection: Connection, selection: Selection) -> list[Row]:
    """Return how often calls failed, by model, error type and code, the most frequent first."""
    dimensions: tuple[Any, ...] = (Request.model, Response.status, Response.error_type, Response.error_code)
    count = func.sum(Request.calls).label("calls")
    query = (
        select(*dimensions, count, func.max(Request.created_at).label("last_at"))
        .select_from(Request)
        .join(Response, selection.join())
        .where(Response.status != "success")
        .group_by(*dimensions)
        .order_by(count.desc(), *dimensions)
    )
    return _rows(connection, selection.apply(query))


def _error_rate() -> ColumnElement[float]:
    by_name = {measure.name: measure.element for measure in measures()}
    finished = func.sum(case((Response.status.is_not(None), Request.calls), else_=0))
    return (cast(by_name["failures"], Float(53)) / func.nullif(finished, 0)).label("error_rate")


def _rows(connection: Connection, query: Select[Any]) -> list[Row]:
    return [dict(row) for row in connection.execute(query).mappings()]


def _as_uuid(identifier: str) -> UUID | None:
    try:
        return UUID(identifier)
    except ValueError:
        return None
