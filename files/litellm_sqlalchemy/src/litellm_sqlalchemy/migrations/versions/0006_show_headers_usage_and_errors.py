"""Show headers in the view `calls`, and make the views `usage` and `errors` for what the command of that name tells."""

from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None

_CALLS = """
CREATE VIEW calls AS
SELECT requests.id, requests.created_at, requests.gateway, requests.origin, requests.calls, requests.call_id,
    requests.trace_id, requests.session_id, requests.method, requests.endpoint, requests.call_type, requests.model,
    requests.stream, requests.key_hash, requests.key_alias, requests.user_id, requests.team_id,
    requests.organization_id, requests.end_user, requests.tags, requests.client_address, requests.user_agent,{headers}
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
_USAGE = """
CREATE VIEW usage AS
SELECT day, gateway, endpoint, model, served_model, provider, coalesce(key_alias, key_hash) AS key, user_id, team_id,
    calls, failures, prompt_tokens, completion_tokens, total_tokens, CAST(cost AS double precision) AS cost
FROM daily_usage
"""
_ERRORS = """
CREATE VIEW errors AS
SELECT CAST(timezone('UTC', requests.created_at) AS date) AS day, requests.model, responses.status,
    responses.error_type, responses.error_code, CAST(sum(requests.calls) AS bigint) AS calls,
    max(requests.created_at) AS last_at
FROM responses JOIN requests ON responses.request_id = requests.id
WHERE responses.status <> 'success'
GROUP BY CAST(timezone('UTC', requests.created_at) AS date), requests.model, responses.status, responses.error_type,
    responses.error_code
"""


def upgrade() -> None:
    """Make the views; `migrate` grants the privileges on them."""
    op.execute("DROP VIEW calls")
    op.execute(_CALLS.format(headers="\n    requests.headers,"))
    op.execute(_USAGE)
    op.execute(_ERRORS)


def downgrade() -> None:
    """Leave them as they were."""
    for view in ("errors", "usage", "calls"):
        op.execute(f"DROP VIEW {view}")
    op.execute(_CALLS.format(headers=""))
