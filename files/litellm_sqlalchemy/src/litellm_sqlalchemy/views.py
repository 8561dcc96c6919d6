"""The views: what the readers select from the tables, for people who use SQL.

They are the very selects that `queries` builds on. Migrations hold them as text, because a migration must not change
when the code does; a test compares the two.
"""

from typing import Any

from sqlalchemy import (
    BigInteger,
    ColumnElement,
    Connection,
    Date,
    Float,
    Label,
    MetaData,
    Select,
    cast,
    event,
    func,
    literal_column,
    select,
    text,
)
from sqlalchemy.dialects import postgresql
from sqlalchemy.orm import InstrumentedAttribute

from litellm_sqlalchemy.models import Base, DailyUsage, Request, Response

#: Columns of a call, without its payloads: those of the request, then those of the response.
_REQUEST = (
    Request.id, Request.created_at, Request.gateway, Request.origin, Request.calls, Request.call_id, Request.trace_id,
    Request.session_id, Request.method, Request.endpoint, Request.call_type, Request.model, Request.stream,
    Request.key_hash, Request.key_alias, Request.user_id, Request.team_id, Request.organization_id, Request.end_user,
    Request.tags, Request.client_address, Request.user_agent, Request.headers,
)  # fmt: skip
_RESPONSE = (
    Response.status_code, Response.error_type, Response.error_code, Response.error_message, Response.provider,
    Response.deployment, Response.api_base, Response.provider_response_id, Response.finish_reason, Response.cache_hit,
    Response.prompt_tokens, Response.completion_tokens, Response.total_tokens, Response.cached_tokens,
    Response.reasoning_tokens, Response.cost, Response.duration_ms, Response.time_to_first_token_ms,
    Response.overhead_ms, Response.attempt_count, Response.attempts, Response.guardrails,
)  # fmt: skip


def call_columns() -> list[InstrumentedAttribute[Any] | Label[Any]]:
    """Return the columns of the view `calls`; a call without a response is `running`."""
    return [
        *_REQUEST,
        func.coalesce(Response.status, "running").label("status"),
        Response.created_at.label("ended_at"),
        Response.model.label("served_model"),
        *_RESPONSE,
        Request.content_mode,
        Request.payload_size.label("request_size"),
        Response.payload_size.label("response_size"),
    ]


def calls_view() -> Select[Any]:
    """Return the definition of the view `calls`."""
    return select(*call_columns()).select_from(Request).outerjoin(Response, Response.request_id == Request.id)


def call_day() -> ColumnElement[Any]:
    """Return the day (UTC) that a call came in."""
    return cast(func.timezone(literal_column("'UTC'"), Request.created_at), Date)


def key_name(calls: type[Request] | type[DailyUsage]) -> ColumnElement[Any]:
    """Return what people know a key by: its alias, where it has one."""
    return func.coalesce(calls.key_alias, calls.key_hash)


def usage_view() -> Select[Any]:
    """Return the definition of the view `usage`: sums of finished calls, by all that they are kept by."""
    usage = DailyUsage
    return select(
        usage.day, usage.gateway, usage.endpoint, usage.model, usage.served_model, usage.provider,
        key_name(usage).label("key"), usage.user_id, usage.team_id, usage.calls, usage.failures, usage.prompt_tokens,
        usage.completion_tokens, usage.total_tokens, cast(usage.cost, Float(53)).label("cost"),
    )  # fmt: skip


#: What failures are counted by.
ERROR_DIMENSIONS = (Request.model, Response.status, Response.error_type, Response.error_code)


def count_errors(*dimensions: Any) -> Select[Any]:
    """Return how many calls have not succeeded, and when the last of them came in, by dimensions."""
    return (
        select(
            *dimensions,
            cast(func.sum(Request.calls), BigInteger).label("calls"),
            func.max(Request.created_at).label("last_at"),
        )
        .select_from(Response)
        .join(Request, Response.request_id == Request.id)
        .where(Response.status != "success")
        .group_by(*dimensions)
    )


def errors_view() -> Select[Any]:
    """Return the definition of the view `errors`."""
    return count_errors(call_day().label("day"), *ERROR_DIMENSIONS)


#: The views by name.
VIEWS = {"calls": calls_view, "usage": usage_view, "errors": errors_view}


def create_statements() -> list[str]:
    """Return the statements that make the views."""
    dialect = postgresql.dialect()  # type: ignore[no-untyped-call]
    return [
        f"CREATE VIEW {name} AS {definition().compile(dialect=dialect, compile_kwargs={'literal_binds': True})}"
        for name, definition in VIEWS.items()
    ]


@event.listens_for(Base.metadata, "after_create")
def _create(_metadata: MetaData, connection: Connection, **_: Any) -> None:
    for statement in create_statements():
        connection.execute(text(statement))
