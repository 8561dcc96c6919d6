"""The view `calls`: what the readers select from the tables, for people who use SQL.

It is the very select that `queries` builds on. Migrations hold it as text, because a migration must not change when the
code does; a test compares the two.
"""

from typing import Any

from sqlalchemy import Connection, Label, MetaData, Select, event, func, select, text
from sqlalchemy.dialects import postgresql
from sqlalchemy.orm import InstrumentedAttribute

from litellm_sqlalchemy.models import Base, Request, Response

#: Columns of a call, without its payloads: those of the request, then those of the response.
_REQUEST = (
    Request.id, Request.created_at, Request.gateway, Request.origin, Request.calls, Request.call_id, Request.trace_id,
    Request.session_id, Request.method, Request.endpoint, Request.call_type, Request.model, Request.stream,
    Request.key_hash, Request.key_alias, Request.user_id, Request.team_id, Request.organization_id, Request.end_user,
    Request.tags, Request.client_address, Request.user_agent,
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


#: The views by name.
VIEWS = {"calls": calls_view}


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
