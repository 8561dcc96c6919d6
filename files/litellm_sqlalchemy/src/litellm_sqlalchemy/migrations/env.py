"""Alembic's environment: migrations run on the connection that `litellm_sqlalchemy.migrate` hands over."""

from alembic import context

from litellm_sqlalchemy.models import Base

connection = context.config.attributes["connection"]
context.configure(connection=connection, target_metadata=Base.metadata, compare_server_default=True)
with context.begin_transaction():
    context.run_migrations()
