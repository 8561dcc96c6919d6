"""Backups of a PostgreSQL cluster that are proven by restoring them: the command `postgresql-backup`."""

__version__ = "1"
