"""Tell what else LiteLLM does by itself from its health checks.

To check the rows that are there takes seconds for each ten million; the spool keeps what comes in meanwhile.
"""

from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

_COMMENT = "client, or for LiteLLM's own calls health_check or internal"
_COMMENT_BEFORE = "client, or health_check for LiteLLM's own"


def upgrade() -> None:
    """Allow the origin `internal`."""
    _allow("'client', 'health_check', 'internal'")
    op.alter_column("requests", "origin", comment=_COMMENT, existing_comment=_COMMENT_BEFORE)


def downgrade() -> None:
    """Call them health checks again."""
    op.execute("UPDATE requests SET origin = 'health_check' WHERE origin = 'internal'")
    _allow("'client', 'health_check'")
    op.alter_column("requests", "origin", comment=_COMMENT_BEFORE, existing_comment=_COMMENT)


def _allow(origins: str) -> None:
    op.execute("ALTER TABLE requests DROP CONSTRAINT ck_requests_origin")
    op.execute(f"ALTER TABLE requests ADD CONSTRAINT ck_requests_origin CHECK (origin IN ({origins}))")
