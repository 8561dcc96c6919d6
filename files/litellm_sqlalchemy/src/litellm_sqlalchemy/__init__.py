"""Log every LiteLLM request and response to PostgreSQL through SQLAlchemy.

The way of one call: :mod:`.callback` (inside LiteLLM) observes it, :mod:`.spool` keeps it on local disk,
:mod:`.writer` (a process of its own) drains the spool into the tables of :mod:`.models`.
"""

from importlib.metadata import version

__version__ = version("litellm-sqlalchemy")
