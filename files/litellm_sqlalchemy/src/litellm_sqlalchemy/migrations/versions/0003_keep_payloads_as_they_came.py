"""Keep payloads as they came, sum usage up by day, make indexes and rows smaller.

Payloads become `json`, compressed by pglz: byte for byte what was sent, and 12 % smaller than `jsonb` with lz4. The
view `daily_usage` becomes a table that a trigger keeps: a day of 300,000 calls took seconds to sum up. Both tables are
rewritten and locked meanwhile; the spool keeps what comes in.
"""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

_ADD = """INSERT INTO daily_usage AS total (
        day, digest, gateway, endpoint, model, served_model, provider, key_hash, key_alias, user_id, team_id,
        responses, calls, failures, prompt_tokens, completion_tokens, total_tokens, cost
    )
    SELECT day, CAST(encode(substr(sha256(convert_to(CAST(ROW(
            gateway, endpoint, model, served_model, provider, key_hash, key_alias, user_id, team_id
        ) AS text), 'UTF8')), 1, 16), 'hex') AS uuid),
        gateway, endpoint, model, served_model, provider, key_hash, key_alias, user_id, team_id,
        sum(responses), sum(calls), sum(failures), sum(prompt_tokens), sum(completion_tokens), sum(total_tokens),
        sum(cost)
    FROM (
        SELECT CAST(timezone('UTC', q.created_at) AS date) AS day, q.gateway, q.endpoint, q.model,
            p.model AS served_model, p.provider, q.key_hash, q.key_alias, q.user_id, q.team_id, 1 AS responses, q.calls,
            CASE WHEN p.status IN ('failure', 'interrupted') THEN q.calls ELSE 0 END AS failures,
            coalesce(p.prompt_tokens, 0) AS prompt_tokens, coalesce(p.completion_tokens, 0) AS completion_tokens,
            coalesce(p.total_tokens, 0) AS total_tokens, CAST(coalesce(p.cost, 0) AS numeric) AS cost
        FROM {table} p JOIN requests q ON q.id = p.request_id
    ) AS part
    GROUP BY day, gateway, endpoint, model, served_model, provider, key_hash, key_alias, user_id, team_id
    ORDER BY 1, 2
    ON CONFLICT (day, digest) DO UPDATE SET
        responses = total.responses + excluded.responses,
        calls = total.calls + excluded.calls,
        failures = total.failures + excluded.failures,
        prompt_tokens = total.prompt_tokens + excluded.prompt_tokens,
        completion_tokens = total.completion_tokens + excluded.completion_tokens,
        total_tokens = total.total_tokens + excluded.total_tokens,
        cost = total.cost + excluded.cost"""
_FUNCTION = f"""CREATE FUNCTION add_to_daily_usage() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER
SET search_path = public, pg_temp SET enable_hashjoin = off SET enable_mergejoin = off AS $$
BEGIN
    {_ADD.format(table="inserted")};
    RETURN NULL;
END $$"""
_TRIGGER = """CREATE TRIGGER add_to_daily_usage AFTER INSERT ON responses REFERENCING NEW TABLE AS inserted
FOR EACH STATEMENT EXECUTE FUNCTION add_to_daily_usage()"""
_CALLS = """
CREATE VIEW calls AS
SELECT requests.id, requests.created_at, requests.gateway, requests.origin, requests.calls, requests.call_id,
    requests.trace_id, requests.session_id, requests.method, requests.endpoint, requests.call_type, requests.model,
    requests.stream, requests.key_hash, requests.key_alias, requests.user_id, requests.team_id,
    requests.organization_id, requests.end_user, requests.tags, requests.client_address, requests.user_agent,
    coalesce(responses.status, 'running') AS status, responses.created_at AS ended_at,
    responses.model AS served_model, responses.status_code, responses.error_type, responses.error_code,
    responses.error_message, responses.provider, responses.deployment, responses.api_base,
    responses.provider_response_id, responses.finish_reason, responses.cache_hit, responses.prompt_tokens,
    responses.completion_tokens, responses.total_tokens, responses.cached_tokens, responses.reasoning_tokens,
    responses.cost, responses.duration_ms, responses.time_to_first_token_ms, responses.overhead_ms,
    responses.attempt_count, responses.attempts, responses.guardrails, requests.content_mode,
    requests.payload_size AS request_size, responses.payload_size AS response_size
FROM requests LEFT JOIN responses ON responses.request_id = requests.id
"""
_OLD_DAILY_USAGE = """
CREATE VIEW daily_usage AS
SELECT CAST(timezone('UTC', requests.created_at) AS DATE) AS day, requests.model, requests.key_hash,
    requests.key_alias, requests.user_id, requests.team_id, sum(requests.calls) AS calls,
    sum(CASE WHEN responses.status IN ('failure', 'interrupted') THEN requests.calls ELSE 0 END) AS failures,
    sum(responses.prompt_tokens) AS prompt_tokens, sum(responses.completion_tokens) AS completion_tokens,
    sum(responses.total_tokens) AS total_tokens, sum(responses.cost) AS cost
FROM requests LEFT JOIN responses ON responses.request_id = requests.id
GROUP BY CAST(timezone('UTC', requests.created_at) AS DATE), requests.model, requests.key_hash, requests.key_alias,
    requests.user_id, requests.team_id
"""

_SUMS = ("responses", "calls", "failures", "prompt_tokens", "completion_tokens", "total_tokens")
_COMMENTS = {
    "day": "The day (UTC) that the calls came in",
    "digest": "Half the SHA-256 of the columns up to team_id",
    "model": "Model that the client asked for",
    "responses": "Rows of `responses` that were added",
    "calls": "Client calls that these rows stand for",
    "failures": "Calls that failed or were interrupted",
}


def upgrade() -> None:
    """Apply."""
    op.execute("DROP VIEW daily_usage")
    op.execute("DROP VIEW calls")
    payload = "ALTER COLUMN payload TYPE json USING CAST(CAST(payload AS text) AS json)"
    op.execute(f"ALTER TABLE requests {payload}, ALTER COLUMN payload SET COMPRESSION pglz")
    op.execute(
        f"ALTER TABLE responses {payload}, ALTER COLUMN payload SET COMPRESSION pglz, "
        "ALTER COLUMN duration_ms TYPE real, ALTER COLUMN time_to_first_token_ms TYPE real, "
        "ALTER COLUMN overhead_ms TYPE real, DROP COLUMN content_mode, DROP COLUMN redaction_version"
    )
    where = ", where payload is not all of it"
    op.execute(f"COMMENT ON COLUMN requests.payload_digest IS 'SHA-256 of the whole body{where}'")
    op.execute(f"COMMENT ON COLUMN responses.payload_digest IS 'SHA-256 of that body{where}; NULL for streams'")
    op.drop_index("ix_requests_team_id_created_at", "requests")
    op.drop_index("ix_requests_key_prefix_created_at", "requests")
    op.create_index("ix_requests_key_prefix_created_at", "requests", [sa.text("left(key_hash, 7)"), "created_at"])
    op.drop_index("ix_requests_model_created_at", "requests")
    op.create_index(
        "ix_requests_model_hash_created_at", "requests", [sa.text("hashtextextended(model, 0)"), "created_at"]
    )
    op.execute(_CALLS)
    op.create_table(
        "daily_usage",
        sa.Column("day", sa.Date(), nullable=False, comment=_COMMENTS["day"]),
        sa.Column("digest", sa.Uuid(), nullable=False, comment=_COMMENTS["digest"]),
        sa.Column("gateway", sa.Text(), nullable=False),
        *(
            sa.Column(name, sa.Text(), nullable=True, comment=_COMMENTS.get(name))
            for name in (
                "endpoint", "model", "served_model", "provider", "key_hash", "key_alias", "user_id", "team_id"
            )
        ),
        *(sa.Column(name, sa.BigInteger(), nullable=False, comment=_COMMENTS.get(name)) for name in _SUMS),
        sa.Column("cost", sa.Numeric(), nullable=False, comment="US dollars; no sum of it can overflow"),
        sa.PrimaryKeyConstraint("day", "digest", name="pk_daily_usage"),
    )  # fmt: skip
    op.execute(_ADD.format(table="responses"))
    op.execute(_FUNCTION)
    # it has the owner's rights: nobody else may put it on a table of his own
    op.execute("REVOKE EXECUTE ON FUNCTION add_to_daily_usage() FROM PUBLIC")
    op.execute(_TRIGGER)


def downgrade() -> None:
    """Take back; what daily_usage knew of calls that are gone is lost."""
    op.execute("DROP TRIGGER add_to_daily_usage ON responses")
    op.execute("DROP FUNCTION add_to_daily_usage")
    op.drop_table("daily_usage")
    op.execute("DROP VIEW calls")
    op.drop_index("ix_requests_key_prefix_created_at", "requests")
    op.create_index("ix_requests_key_prefix_created_at", "requests", [sa.text("left(key_hash, 12)"), "created_at"])
    op.drop_index("ix_requests_model_hash_created_at", "requests")
    op.create_index("ix_requests_model_created_at", "requests", ["model", "created_at"])
    op.create_index(
        "ix_requests_team_id_created_at", "requests", ["team_id", "created_at"],
        postgresql_where="team_id IS NOT NULL",
    )  # fmt: skip
    payload = "ALTER COLUMN payload TYPE jsonb USING CAST(payload AS jsonb)"
    op.execute(f"ALTER TABLE requests {payload}, ALTER COLUMN payload SET COMPRESSION lz4")
    op.execute(
        f"ALTER TABLE responses {payload}, ALTER COLUMN payload SET COMPRESSION lz4, "
        "ALTER COLUMN duration_ms TYPE double precision, ALTER COLUMN time_to_first_token_ms TYPE double precision, "
        "ALTER COLUMN overhead_ms TYPE double precision, ADD COLUMN content_mode text, "
        "ADD COLUMN redaction_version smallint"
    )
    op.execute(
        "UPDATE responses p SET content_mode = q.content_mode, redaction_version = q.redaction_version "
        "FROM requests q WHERE q.id = p.request_id"
    )
    op.execute(
        "ALTER TABLE responses ALTER COLUMN content_mode SET NOT NULL, ALTER COLUMN redaction_version SET NOT NULL"
    )
    op.execute(_CALLS)
    op.execute(_OLD_DAILY_USAGE)
