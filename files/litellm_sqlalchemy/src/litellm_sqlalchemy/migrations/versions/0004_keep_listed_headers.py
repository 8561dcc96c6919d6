"""Keep the request headers that `content.headers` lists.

A column without a default: no row is rewritten, and one without headers takes no more space.
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the column."""
    comment = "Headers of the request that `content.headers` lists, names in lower case"
    op.add_column("requests", sa.Column("headers", postgresql.JSONB(), nullable=True, comment=comment))


def downgrade() -> None:
    """Remove it, and with it what was kept."""
    op.drop_column("requests", "headers")
