"""Removal of old calls. Their sums stay in `daily_usage`."""

from datetime import UTC, datetime, timedelta
from uuid import UUID

from sqlalchemy import delete, func, select

from litellm_sqlalchemy.database import maintaining, vacuum
from litellm_sqlalchemy.errors import UsageError
from litellm_sqlalchemy.identifiers import first_id_at
from litellm_sqlalchemy.models import Request, Response
from litellm_sqlalchemy.settings import Settings

#: Calls of a transaction: what others wait for is over in a second.
_BATCH = 10_000
#: No call takes longer; the response of one that still runs would find no request.
_YOUNGEST = timedelta(days=1)


def prune(settings: Settings, before: datetime, *, dry_run: bool = False) -> int:
    """Remove the calls that came in before a moment, the oldest first; return how many rows of `requests` they were.

    It may be broken off anywhere and repeated. Raises UsageError for a moment of the last day, DatabaseError,
    SettingsError.
    """
    if before > datetime.now(UTC) - _YOUNGEST:
        raise UsageError(f"--before {before.isoformat(timespec='seconds')} is not a day ago: calls may still run")
    limit = first_id_at(before)
    with maintaining(settings.database, "prune") as connection:
        if dry_run:
            return connection.execute(select(func.count()).where(Request.id < limit)).scalar_one()
        removed, last = 0, UUID(int=0)
        batch = select(Request.id).order_by(Request.id).limit(_BATCH)
        while found := connection.scalars(batch.where(Request.id > last, Request.id < limit)).all():
            first, last = found[0], found[-1]
            connection.execute(delete(Response).where(Response.request_id.between(first, last)))
            removed += connection.execute(delete(Request).where(Request.id.between(first, last))).rowcount
            connection.commit()
        if removed:
            vacuum(connection, "requests, responses")
        return removed
