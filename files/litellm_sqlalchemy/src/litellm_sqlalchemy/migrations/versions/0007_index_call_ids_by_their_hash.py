"""Find call ids by a B-tree on their hash.

Clients choose the ids, and a hash index walks the chain of all entries of one value at each insert of it. The table is
read once for the new index; the spool keeps what comes in meanwhile, and readers go on until the old one is removed.
"""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Make the new index first: to remove the old one locks readers out, too."""
    op.create_index("ix_requests_call_id_hash", "requests", [sa.text("hashtextextended(call_id, 0)")])
    op.drop_index("ix_requests_call_id", "requests")


def downgrade() -> None:
    """Have the hash index again."""
    op.create_index("ix_requests_call_id", "requests", ["call_id"], postgresql_using="hash")
    op.drop_index("ix_requests_call_id_hash", "requests")
