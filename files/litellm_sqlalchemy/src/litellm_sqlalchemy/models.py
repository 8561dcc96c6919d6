"""The tables: one row of `requests` for each client call, one row of `responses` for each finished call.

The request row is written when LiteLLM accepts a call, the response row when the call has ended: a request without
a response is a call that is still running. Both are keyed by a UUIDv7 made in the gateway: it orders by time, it
makes delivery idempotent, and a later range partitioning on it needs neither another key nor other queries.
LiteLLM's own ids are no keys: clients choose `x-litellm-call-id`, and provider ids repeat.
"""

import uuid
from datetime import date, datetime
from decimal import Decimal
from typing import Any

from sqlalchemy import (
    ARRAY,
    DDL,
    JSON,
    REAL,
    BigInteger,
    CheckConstraint,
    ColumnElement,
    Date,
    DateTime,
    Float,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Numeric,
    SmallInteger,
    Text,
    TextClause,
    Uuid,
    event,
    func,
    text,
)
from sqlalchemy.dialects.postgresql import INET, JSONB
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

#: What a payload column holds. `json`: the body as it was, byte for byte. `text`: a body that is not JSON, as a JSON
#: string. `base64`: bytes that no JSON text holds (U+0000, not UTF-8), encoded. `truncated`: the first bytes of a body
#: above `content.max_payload_size`, as a JSON string. NULL: not kept (policy, or there was no body).
PAYLOAD_ENCODINGS = ("json", "text", "base64", "truncated")
#: How a call ended. `interrupted`: its gateway process died before the call's end was recorded.
STATUSES = ("success", "failure", "client_disconnected", "interrupted")
#: Who made a call: a client, LiteLLM's own health check, or LiteLLM for whatever else it does by itself.
ORIGINS = ("client", "health_check", "internal")
#: Characters of `key_hash` that its index has: 28 bits tell keys apart. An entry is then no wider than two `bigint`, up
#: to which PostgreSQL splits the pages of an index where it grows (nbtsplitloc.c): 33 bytes, not 72. The index on
#: models has their hash for the same reason.
KEY_PREFIX_LENGTH = 7


def hashed(value: ColumnElement[str] | TextClause | str) -> ColumnElement[int]:
    """Return the hash of a text, for a B-tree and for who looks something up by it.

    A hash index (`USING hash`) would walk all entries of a value at each insert of it: clients choose call ids.
    """
    return func.hashtextextended(value, text("0"))


def _one_of(column: str, values: tuple[str, ...]) -> CheckConstraint:
    return CheckConstraint(f"{column} IN ({', '.join(repr(value) for value in values)})", name=column)


class Base(DeclarativeBase):
    """Declarative base of all tables; constraint names are fixed, so that migrations can name them."""

    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
            "fk": "fk_%(table_name)s_%(column_0_name)s_%(referred_table_name)s",
            "pk": "pk_%(table_name)s",
        }
    )
    type_annotation_map = {  # noqa: RUF012 - SQLAlchemy reads it from the class
        str: Text,
        int: Integer,
        float: Float(53),
        bytes: LargeBinary,
        datetime: DateTime(timezone=True),
        uuid.UUID: Uuid,
        list[str]: ARRAY(Text),
        dict[str, Any]: JSONB,
    }


class Request(Base):
    """A client's call, as it came in."""

    __tablename__ = "requests"
    __table_args__ = (
        _one_of("payload_encoding", PAYLOAD_ENCODINGS),
        _one_of("origin", ORIGINS),
        Index("ix_requests_call_id_hash_created_at", hashed(text("call_id")), "created_at"),
        Index(None, "created_at", postgresql_using="brin"),
        Index("ix_requests_model_hash_created_at", hashed(text("model")), "created_at"),
        Index("ix_requests_key_prefix_created_at", func.left(text("key_hash"), KEY_PREFIX_LENGTH), "created_at"),
        Index(None, "user_id", "created_at", postgresql_where="user_id IS NOT NULL"),
    )

    id: Mapped[uuid.UUID] = mapped_column(primary_key=True, comment="UUIDv7 made by the gateway")
    created_at: Mapped[datetime] = mapped_column(comment="When the call came in, by the gateway's clock")
    gateway: Mapped[str] = mapped_column(comment="Gateway process that took the call: name:port")
    origin: Mapped[str] = mapped_column(comment="client, or for LiteLLM's own calls health_check or internal")
    calls: Mapped[int] = mapped_column(
        comment="Client calls this row stands for; above 1 only for rejected calls over `content.rejected_rate`"
    )
    call_id: Mapped[str | None] = mapped_column(comment="LiteLLM's x-litellm-call-id; clients may choose it")
    trace_id: Mapped[str | None] = mapped_column(comment="LiteLLM's trace id")
    session_id: Mapped[str | None] = mapped_column(comment="The client's x-litellm-session-id")
    method: Mapped[str | None] = mapped_column(comment="HTTP method")
    endpoint: Mapped[str | None] = mapped_column(comment="Path of the URL, without the query string")
    call_type: Mapped[str | None] = mapped_column(comment="LiteLLM's name of the kind of call")
    model: Mapped[str | None] = mapped_column(comment="Model that the client asked for")
    stream: Mapped[bool] = mapped_column(comment="Whether the client asked for a stream")
    key_hash: Mapped[str | None] = mapped_column(comment="LiteLLM's SHA-256 of the key, or its name for the master key")
    key_alias: Mapped[str | None]
    user_id: Mapped[str | None] = mapped_column(comment="User that owns the key")
    team_id: Mapped[str | None]
    organization_id: Mapped[str | None]
    end_user: Mapped[str | None] = mapped_column(comment="The client's own user, OpenAI's `user` field")
    tags: Mapped[list[str] | None]
    client_address: Mapped[str | None] = mapped_column(INET, comment="By policy `content.client_address`")
    user_agent: Mapped[str | None] = mapped_column(comment="By policy `content.user_agent`")
    headers: Mapped[dict[str, Any] | None] = mapped_column(
        JSONB(none_as_null=True), comment="Headers of the request that `content.headers` lists, names in lower case"
    )
    content_mode: Mapped[str] = mapped_column(comment="Policy in force: full, redacted or metadata")
    redaction_version: Mapped[int] = mapped_column(SmallInteger, comment="Version of the redaction rules")
    payload_size: Mapped[int] = mapped_column(BigInteger, comment="Bytes of the whole body")
    payload_digest: Mapped[bytes | None] = mapped_column(
        comment="SHA-256 of the whole body, where payload is not all of it"
    )
    payload_encoding: Mapped[str | None] = mapped_column(comment="What payload holds: json, text, base64, truncated")
    payload: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True))


class Response(Base):
    """How a call ended."""

    __tablename__ = "responses"
    __table_args__ = (
        _one_of("payload_encoding", PAYLOAD_ENCODINGS),
        _one_of("status", STATUSES),
        Index(None, "status", "created_at", postgresql_where="status <> 'success'"),
    )

    request_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("requests.id", ondelete="CASCADE"), primary_key=True)
    created_at: Mapped[datetime] = mapped_column(comment="When the call ended, by the gateway's clock")
    status: Mapped[str] = mapped_column(comment="success, failure, client_disconnected or interrupted")
    status_code: Mapped[int | None] = mapped_column(SmallInteger, comment="HTTP status sent to the client")
    error_type: Mapped[str | None]
    error_code: Mapped[str | None]
    error_message: Mapped[str | None]
    model: Mapped[str | None] = mapped_column(comment="Model that served the call")
    provider: Mapped[str | None] = mapped_column(comment="LiteLLM's custom_llm_provider")
    deployment: Mapped[str | None] = mapped_column(comment="LiteLLM's model_id of the deployment")
    api_base: Mapped[str | None]
    provider_response_id: Mapped[str | None] = mapped_column(comment="The provider's id of the answer; not unique")
    finish_reason: Mapped[str | None]
    cache_hit: Mapped[bool | None]
    prompt_tokens: Mapped[int | None]
    completion_tokens: Mapped[int | None]
    total_tokens: Mapped[int | None]
    cached_tokens: Mapped[int | None] = mapped_column(comment="Prompt tokens that the provider had cached")
    reasoning_tokens: Mapped[int | None]
    cost: Mapped[float | None] = mapped_column(comment="US dollars, LiteLLM's price map")
    duration_ms: Mapped[float | None] = mapped_column(REAL, comment="From the first byte in to the last byte out")
    time_to_first_token_ms: Mapped[float | None] = mapped_column(
        REAL, comment="From the first byte in to the first out"
    )
    overhead_ms: Mapped[float | None] = mapped_column(
        REAL, comment="LiteLLM's own share of the duration, by its own count"
    )
    attempt_count: Mapped[int] = mapped_column(SmallInteger, comment="Attempts at a provider, the last one included")
    attempts: Mapped[list[dict[str, Any]] | None] = mapped_column(
        JSONB(none_as_null=True), comment="Failed attempts before the last: deployment, error, duration"
    )
    guardrails: Mapped[list[dict[str, Any]] | None] = mapped_column(JSONB(none_as_null=True))
    payload_size: Mapped[int] = mapped_column(BigInteger, comment="Bytes of the body sent to the client")
    payload_digest: Mapped[bytes | None] = mapped_column(
        comment="SHA-256 of that body, where payload is not all of it; NULL for streams"
    )
    payload_encoding: Mapped[str | None] = mapped_column(comment="What payload holds: json, text, base64, truncated")
    payload: Mapped[dict[str, Any] | None] = mapped_column(
        JSON(none_as_null=True), comment="The body; of a stream, the answer that LiteLLM assembled"
    )


class DailyUsage(Base):
    """Finished calls summed up by day and by what people ask totals for; kept when the calls themselves are removed.

    A trigger (`usage.py`) adds each response in the transaction that inserts it: the sums are exact, whatever inserts.
    `gateway` keeps the writers of several hosts out of each other's rows.
    """

    __tablename__ = "daily_usage"

    day: Mapped[date] = mapped_column(Date, primary_key=True, comment="The day (UTC) that the calls came in")
    digest: Mapped[uuid.UUID] = mapped_column(primary_key=True, comment="Half the SHA-256 of the columns up to team_id")
    gateway: Mapped[str]
    endpoint: Mapped[str | None]
    model: Mapped[str | None] = mapped_column(comment="Model that the client asked for")
    served_model: Mapped[str | None]
    provider: Mapped[str | None]
    key_hash: Mapped[str | None]
    key_alias: Mapped[str | None]
    user_id: Mapped[str | None]
    team_id: Mapped[str | None]
    responses: Mapped[int] = mapped_column(BigInteger, comment="Rows of `responses` that were added")
    calls: Mapped[int] = mapped_column(BigInteger, comment="Client calls that these rows stand for")
    failures: Mapped[int] = mapped_column(BigInteger, comment="Calls that failed or were interrupted")
    prompt_tokens: Mapped[int] = mapped_column(BigInteger)
    completion_tokens: Mapped[int] = mapped_column(BigInteger)
    total_tokens: Mapped[int] = mapped_column(BigInteger)
    cost: Mapped[Decimal] = mapped_column(Numeric, comment="US dollars; no sum of it can overflow")


#: PostgreSQL's own compression, whatever `default_toast_compression` says: 5 % smaller than lz4 for these payloads.
_COMPRESSION = DDL("ALTER TABLE %(table)s ALTER COLUMN payload SET COMPRESSION pglz")  # type: ignore[no-untyped-call]
for _model in (Request, Response):
    event.listen(_model.__table__, "after_create", _COMPRESSION)
