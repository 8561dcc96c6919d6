"""Settings: one JSON file that the role writes. No secret is in it."""

import json
import os
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from postgresql_backup.errors import SettingsError

SETTINGS_FILE = Path("/etc/postgresql-backup/settings.json")


@dataclass(frozen=True)
class Settings:
    """What the role decided; paths are absolute, durations are seconds.

    dump_share: part of the time that a dump works; it rests in between.
    """

    databases: list[str]
    recipients: list[str]
    retention: dict[str, int]
    version: str = "17"
    cluster: str = "main"
    port: int = 5432
    socket: str = "/var/run/postgresql"
    bookkeeping: str = "backup"
    bookkeeping_owner: str = "backup_owner"
    stanza: str = "main"
    repositories: list[int] = field(default_factory=lambda: [1])
    repository: str = "/var/lib/pgbackrest"
    dumps: str = "/var/backups/postgresql"
    run: str = "/run/postgresql-backup"
    state: str = "/var/lib/postgresql-backup"
    drill: str = "/var/lib/postgresql-drill"
    dump_share: float = 1
    drill_jobs: int = 2
    offsite: str = ""
    offsite_options: list[str] = field(default_factory=list)
    limits: dict[str, int] = field(default_factory=dict)

    @property
    def keys(self) -> Path:
        """Directory, in memory, of the keys with which drills open the newest dump; the dump's user writes there."""
        return Path(self.run) / "keys"

    @property
    def server(self) -> Path:
        """Directory, in memory, of what the server's user writes: the marker, the metrics."""
        return Path(self.run) / "server"

    @property
    def bin(self) -> str:
        """Directory of the server's programs."""
        return f"/usr/lib/postgresql/{self.version}/bin"

    @property
    def data(self) -> Path:
        """Data directory of the live cluster."""
        return Path(f"/var/lib/postgresql/{self.version}/{self.cluster}")

    def limit(self, name: str) -> int:
        """Return the age in seconds above which `name` is too old."""
        return self.limits[name]


def load_settings(file: Path = SETTINGS_FILE) -> Settings:
    """Read the settings. Raises SettingsError that names the file and the key."""
    try:
        content: dict[str, Any] = json.loads(file.read_bytes())
    except OSError as error:
        raise SettingsError(
            f"settings file {file} cannot be read: {error.strerror}; run playbooks/backup.yml"
        ) from None
    except ValueError as error:
        raise SettingsError(f"settings file {file} is not JSON ({error}); run playbooks/backup.yml") from None
    unknown = content.keys() - {item.name for item in fields(Settings)}
    if unknown:
        raise SettingsError(f"settings file {file}: unknown key {sorted(unknown)[0]}; run playbooks/backup.yml")
    try:
        settings = Settings(**content)
    except TypeError as error:
        raise SettingsError(f"settings file {file}: {error}; run playbooks/backup.yml") from None
    if not 0 < settings.dump_share <= 1:
        raise SettingsError(f"settings file {file}: dump_share is {settings.dump_share}, it is above 0 and at most 1")
    return settings


def credential(name: str) -> bytes:
    """Return the credential that systemd gave to this unit. Raises SettingsError."""
    directory = os.environ.get("CREDENTIALS_DIRECTORY")
    if not directory:
        raise SettingsError(f"the credential {name} is given by systemd only: start the unit, systemctl start <unit>")
    try:
        return (Path(directory) / name).read_bytes()
    except OSError as error:
        raise SettingsError(f"credential {name}: {error.strerror}") from None
