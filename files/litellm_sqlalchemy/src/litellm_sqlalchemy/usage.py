"""The table `daily_usage`: who keeps its sums, and how they are made of the calls.

A statement trigger on `responses` adds the rows that a statement has inserted, in its transaction: a response counts
when it is stored and not when it is refused as a duplicate, whatever way it takes. Totals of a day are then read from
some hundred rows instead of from all calls of that day. Migrations hold these statements as text, as with the view.
"""

from sqlalchemy import Connection, MetaData, event, text

from litellm_sqlalchemy.models import Base

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
    FROM ({source}) AS part
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
_OF_RESPONSES = """
        SELECT CAST(timezone('UTC', q.created_at) AS date) AS day, q.gateway, q.endpoint, q.model,
            p.model AS served_model, p.provider, q.key_hash, q.key_alias, q.user_id, q.team_id, 1 AS responses, q.calls,
            CASE WHEN p.status IN ('failure', 'interrupted') THEN q.calls ELSE 0 END AS failures,
            coalesce(p.prompt_tokens, 0) AS prompt_tokens, coalesce(p.completion_tokens, 0) AS completion_tokens,
            coalesce(p.total_tokens, 0) AS total_tokens, CAST(coalesce(p.cost, 0) AS numeric) AS cost
        FROM {table} p JOIN requests q ON q.id = p.request_id
    """
_OF_NOBODY = """
        SELECT day, gateway, endpoint, model, served_model, provider, CAST(NULL AS text) AS key_hash,
            CAST(NULL AS text) AS key_alias, CAST(NULL AS text) AS user_id, team_id,
            responses, calls, failures, prompt_tokens, completion_tokens, total_tokens, cost
        FROM removed
    """


def create_statements() -> list[str]:
    """Return the statements that make the trigger.

    It runs as the owner, since a writer may insert into two tables and do nothing else. New rows are few beside the
    requests that they belong to, whatever the planner was told last: it shall look each up by its id.
    """
    add = _ADD.format(source=_OF_RESPONSES.format(table="inserted"))
    return [
        "CREATE FUNCTION add_to_daily_usage() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER\n"
        "SET search_path = public, pg_temp "
        "SET enable_hashjoin = off SET enable_mergejoin = off SET enable_seqscan = off AS $$\n"
        f"BEGIN\n    {add};\n    RETURN NULL;\nEND $$",
        "CREATE TRIGGER add_to_daily_usage AFTER INSERT ON responses REFERENCING NEW TABLE AS inserted "
        "FOR EACH STATEMENT EXECUTE FUNCTION add_to_daily_usage()",
    ]


def forget_user(connection: Connection, user: str) -> None:
    """Add a user's sums to those of nobody and no key."""
    removed = "WITH removed AS (DELETE FROM daily_usage WHERE user_id = :user RETURNING *)\n"
    connection.execute(text(removed + _ADD.format(source=_OF_NOBODY)), {"user": user})


@event.listens_for(Base.metadata, "after_create")
def _create(_metadata: MetaData, connection: Connection, **_: object) -> None:
    for statement in create_statements():
        connection.execute(text(statement))
