"""Find call ids by a B-tree on their hash; look each request up by its id when its response is counted.

Clients choose the ids: a hash index walks the chain of all entries of one value at each insert of it, and has them in
no order. The table is read once for the new index; the spool keeps what comes in meanwhile, and readers go on until
the old one is removed. The trigger's plan read all of `requests` where it was made while the planner took that for
small.
"""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None

_INDEX = "ix_requests_call_id_hash_created_at"


def upgrade() -> None:
    """Make the new index first: to remove the old one locks readers out, too.

    It waits longer than a reader's statement may take (60 s): the migrator's own 10 s would throw the new index away.
    """
    op.create_index(_INDEX, "requests", [sa.text("hashtextextended(call_id, 0)"), "created_at"])
    op.execute("SET LOCAL lock_timeout = '70s'")
    op.drop_index("ix_requests_call_id", "requests")
    op.execute("ALTER FUNCTION add_to_daily_usage() SET enable_seqscan = off")


def downgrade() -> None:
    """Have the hash index again."""
    op.execute("ALTER FUNCTION add_to_daily_usage() RESET enable_seqscan")
    op.create_index("ix_requests_call_id", "requests", ["call_id"], postgresql_using="hash")
    op.drop_index(_INDEX, "requests")
