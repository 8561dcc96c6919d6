"""Every error that this package raises on purpose.

BackupError
├── SettingsError      the settings or a credential are missing or wrong
├── DatabaseError      the database cannot be reached or refuses
├── LockedError        another run of the same kind is going on
├── DamagedError       a backup is not what its manifest says
├── RefusedError       what was asked would lose something, or cannot be done
└── ToolError          a program that does the work failed
"""

from enum import IntEnum


class ExitCode(IntEnum):
    """Exit codes of the command."""

    OK = 0
    FAILED = 1
    USAGE = 2
    SETTINGS = 3
    DATABASE = 4
    LOCKED = 5
    DAMAGED = 6
    REFUSED = 7
    TOOL = 8


class BackupError(Exception):
    """Something that the operator has to mend; the message says what was seen and what to do, in one line."""

    exit_code = ExitCode.FAILED


class SettingsError(BackupError):
    """The settings or a credential are missing or wrong."""

    exit_code = ExitCode.SETTINGS


class DatabaseError(BackupError):
    """The database cannot be reached or refuses."""

    exit_code = ExitCode.DATABASE


class LockedError(BackupError):
    """Another run of the same kind is going on."""

    exit_code = ExitCode.LOCKED


class DamagedError(BackupError):
    """A backup is not what its manifest says."""

    exit_code = ExitCode.DAMAGED


class RefusedError(BackupError):
    """What was asked would lose something, or cannot be done."""

    exit_code = ExitCode.REFUSED


class ToolError(BackupError):
    """A program that does the work failed; the message holds its own last words."""

    exit_code = ExitCode.TOOL
