"""Every error that this package raises on purpose.

LogError
├── UsageError        arguments of the command that do not go together
├── SettingsError     the settings file is missing or says something wrong
├── DatabaseError     the database cannot be reached or refuses the login
├── SchemaError       the tables are not at the revision that this package needs
├── SpoolError        the spool directory cannot be used
│   └── SpoolFull     the spool has reached its cap or the disk's reserve
└── LockedError       another process holds the lock
"""

from enum import IntEnum


class ExitCode(IntEnum):
    """Exit codes of the ``litellm-sqlalchemy`` command."""

    OK = 0
    FAILED = 1
    USAGE = 2
    SETTINGS = 3
    DATABASE = 4
    SCHEMA = 5
    SPOOL = 6
    LOCKED = 7


class LogError(Exception):
    """Something that the operator has to mend; the message says what and how."""

    exit_code = ExitCode.FAILED


class UsageError(LogError):
    """Arguments of the command that do not go together, or that nothing can be made of."""

    exit_code = ExitCode.USAGE


class SettingsError(LogError):
    """The settings file is missing, unreadable or says something wrong."""

    exit_code = ExitCode.SETTINGS


class DatabaseError(LogError):
    """The database cannot be reached or refuses the login."""

    exit_code = ExitCode.DATABASE


class SchemaError(LogError):
    """The tables are not at the revision that this package needs: run `litellm-sqlalchemy migrate`."""

    exit_code = ExitCode.SCHEMA


class SpoolError(LogError):
    """The spool directory cannot be used."""

    exit_code = ExitCode.SPOOL


class SpoolFull(SpoolError):
    """The spool has reached `spool.max_size` or `spool.reserve`: mend writer or database, or raise the limit."""


class LockedError(LogError):
    """Another process holds the lock."""

    exit_code = ExitCode.LOCKED
