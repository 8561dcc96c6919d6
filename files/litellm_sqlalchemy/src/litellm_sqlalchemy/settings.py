"""Settings: one YAML file for the callback, the writer and the command.

Every key has a default but `database.host`. A key that does not exist, a value of the wrong type and a missing file
are errors that name the file and the key. No secret is ever a setting: credentials are files of their own.
"""

import os
import re
import socket
import subprocess
import urllib.parse
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import orjson
import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    model_validator,
)
from pydantic_core import PydanticCustomError

from litellm_sqlalchemy.errors import SettingsError

#: Environment variable that names the settings file, and the file when it is unset.
SETTINGS_VARIABLE = "LITELLM_SQLALCHEMY_SETTINGS"
DEFAULT_SETTINGS_FILE = Path("/etc/litellm-sqlalchemy/settings.yml")

#: Seconds that the writer may wait for the database without a sign of life: its unit's watchdog ends it after 150.
_LONGEST_SILENCE = 140

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Size = Annotated[int, Field(gt=0)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class GatewaySettings(_Section):
    """What the callback calls the gateway process it runs in."""

    name: str = Field(default_factory=socket.gethostname)


class RoleSettings(_Section):
    """Group roles that `migrate` grants privileges to; null grants nothing to it."""

    owner: str | None = "litellm_owner"
    writer: str | None = "litellm_writer"
    reader: str | None = "litellm_reader"
    maintainer: str | None = "litellm_maintainer"
    monitor: str | None = "litellm_monitor"


class DatabaseSettings(_Section):
    """Where the tables are, and the pool of connections to them (SQLAlchemy's names)."""

    host: Annotated[str, Field(min_length=1)]
    port: Annotated[int, Field(ge=1, le=65535)] = 5432
    name: str = "litellm"
    sslmode: Literal["disable", "require", "verify-ca", "verify-full"] = "verify-full"
    sslrootcert: Path | None = Path("/etc/litellm-sqlalchemy/ca.crt")
    channel_binding: Literal["disable", "prefer", "require"] = "require"
    client_certificates: Path | None = None
    connect_timeout: Annotated[int, Field(ge=2)] = 30
    pool_size: Size = 5
    max_overflow: Annotated[int, Field(ge=0)] = 5
    pool_recycle: Size = 1800
    pool_pre_ping: bool = True
    credentials_directory: Path = Path("/etc/litellm-sqlalchemy/credentials")
    roles: RoleSettings = RoleSettings()


class SpoolSettings(_Section):
    """The files between callback and writer."""

    directory: Path = Path("/var/spool/litellm-sqlalchemy")
    fsync: Literal["always", "interval", "never"] = "interval"
    fsync_interval: Positive = 0.1
    segment_size: Annotated[int, Field(ge=4096)] = 8 * 1024 * 1024
    max_size: Size | None = None
    reserve: Annotated[float, Field(ge=0, lt=1)] = 0.05
    when_full: Literal["drop", "refuse"] = "drop"
    retain: Annotated[float, Field(ge=0)] = 86_400
    retain_size: Annotated[int, Field(ge=0)] = 1024**3


def _address(value: str) -> str:
    host, _, port = value.rpartition(":")
    if not (host and port.isdecimal() and 0 < int(port) < 65536):
        raise ValueError("it has to be host:port, with 0.0.0.0 or [::] as a host to listen everywhere")
    return value


class WriterSettings(_Section):
    """The process that drains the spool."""

    batch_size: Annotated[int, Field(ge=1, le=100_000)] = 1000
    batch_delay: Positive = 0.2
    statement_timeout: Positive = 60
    retry_delay_max: Positive = 5
    listen: Annotated[str, AfterValidator(_address)] | None = "127.0.0.1:9465"


Mode = Literal["full", "redacted", "metadata"]
#: A name, or with `*` at its end the beginning of names.
Pattern = Annotated[str, Field(pattern=r"^[^*]+\*?$")]


#: Headers that hold a credential, as clients send them to LiteLLM and it passes them on.
_CREDENTIAL_HEADERS = re.compile(r"authorization|cookie|(^|-)key$|token|secret|password|credential|x-litellm-api-key")


def _no_credential(name: str) -> str:
    if _CREDENTIAL_HEADERS.search(name):
        raise ValueError("a header that holds a credential is never kept")
    return name


def _no_key(name: str) -> str:
    if name.startswith("sk-"):
        raise ValueError
    return name


class PolicySettings(_Section):
    """Modes of their own, by key (alias or SHA-256), team and model: the key's counts first, then team, then model.

    Among names of one kind the exact one counts first, then the longest that ends in `*`.
    """

    keys: dict[Annotated[Pattern, AfterValidator(_no_key)], Mode] = {}
    teams: dict[Pattern, Mode] = {}
    models: dict[Pattern, Mode] = {}


class ContentSettings(_Section):
    """What is kept of a call, and how long."""

    mode: Mode = "full"
    policies: PolicySettings = PolicySettings()
    max_payload_size: Annotated[int, Field(ge=0, le=200_000_000)] = 1024 * 1024
    client_address: bool = True
    user_agent: bool = True
    headers: list[Annotated[str, StringConstraints(to_lower=True), AfterValidator(_no_credential)]] = []
    rejected_rate: Positive = 10
    event_timeout: Positive = 60
    retention_days: Annotated[int, Field(ge=2, le=36_500)] | None = None


class LoggingSettings(_Section):
    """Log lines of writer and command, on standard error."""

    level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    format: Literal["text", "json"] = "text"


def _url(value: str) -> str:
    parts = urllib.parse.urlsplit(value)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.port == 0:  # port: ValueError above 65535
        raise ValueError("it has to be http://host:port or https://host:port")
    return value


Url = Annotated[str, AfterValidator(_url)]


class ValidationSettings(_Section):
    """The test request of `validate`, and the front (https://...) that clients reach the gateway by."""

    gateway_urls: list[Url] = []
    gateway_key_file: Path | None = None
    model: str | None = None
    front_url: Url | None = None
    front_ca_file: Path | None = None


class Settings(_Section):
    """The whole settings file."""

    gateway: GatewaySettings = Field(default_factory=GatewaySettings)
    database: DatabaseSettings
    spool: SpoolSettings = SpoolSettings()
    writer: WriterSettings = WriterSettings()
    content: ContentSettings = ContentSettings()
    logging: LoggingSettings = LoggingSettings()
    validation: ValidationSettings = ValidationSettings()

    @model_validator(mode="after")
    def _leave_the_watchdog_alone(self) -> Self:
        seconds = self.database.connect_timeout + self.writer.statement_timeout
        if seconds > _LONGEST_SILENCE:
            raise PydanticCustomError(
                "silence",
                "`database.connect_timeout` and `writer.statement_timeout` are {seconds} s together: with more than "
                "{longest} the watchdog would end a writer that waits",
                {"seconds": f"{seconds:g}", "longest": _LONGEST_SILENCE},
            )
        return self


#: What libpq takes.
_Word = Annotated[str, Field(pattern=r"^[^\x00]+$")]


class Credential(_Section):
    """A database login: `{"user": ..., "password": ...}` in a file of its own."""

    user: _Word
    password: _Word = Field(repr=False)


def settings_file() -> Path:
    """Return the settings file that the environment names, or the default one."""
    return Path(os.environ.get(SETTINGS_VARIABLE) or DEFAULT_SETTINGS_FILE)


def load_settings(file: Path | None = None) -> Settings:
    """Read and check the settings file.

    Raises SettingsError with one line that names the file, the key and the value seen.
    """
    file = file or settings_file()
    try:
        content = yaml.safe_load(file.read_bytes())
    except FileNotFoundError:
        raise SettingsError(
            f"settings file {file} does not exist: write it, or name another with --settings or {SETTINGS_VARIABLE}"
        ) from None
    except OSError as error:
        raise SettingsError(f"settings file {file} cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, RecursionError) as error:
        where = str(error).replace("\n", " ")
        raise SettingsError(f"settings file {file} is not YAML: {where}") from None
    if not isinstance(content, dict):
        raise SettingsError(f"settings file {file} must hold a mapping with the key `database`, not {content!r:.60}")
    try:
        return Settings.model_validate(content)
    except ValidationError as error:
        raise SettingsError(f"settings file {file}: {_first_problem(error)}") from None


def load_credential(settings: DatabaseSettings, name: str) -> Credential:
    """Read the login `name` from systemd's credentials directory, or from `database.credentials_directory`.

    Read again at every new connection: the file is the truth, so that a rotated password needs no restart.
    Raises SettingsError that names the file, never its content.
    """
    candidates = [settings.credentials_directory / f"{name}.json"]
    if directory := os.environ.get("CREDENTIALS_DIRECTORY"):
        candidates.insert(0, Path(directory) / f"{name}.json")
    # Not by `Path.exists`, which raises where access is denied.
    file = next(filter(os.path.exists, candidates), candidates[-1])
    try:
        return Credential.model_validate(orjson.loads(file.read_bytes()))
    except OSError as error:
        raise SettingsError(f"credential file {file} cannot be read: {error.strerror}") from None
    except ValueError:  # no details: they would quote the content
        raise SettingsError(f'credential file {file} must hold {{"user": "...", "password": "..."}}') from None


def read_key(file: Path) -> str:
    """Return the key in a file; one that ends in `.cred` is decrypted with systemd-creds, which takes root's rights.

    Raises SettingsError, OSError.
    """
    if file.suffix != ".cred":
        try:
            return file.read_text("ascii").strip()
        except UnicodeDecodeError:
            raise SettingsError(f"key file {file} holds no key: not all of it is ASCII") from None
    command = ["systemd-creds", "decrypt", f"--name={file.stem}", str(file), "-"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        cause = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise SettingsError(f"key file {file} cannot be decrypted: {cause}")
    return done.stdout.strip()


def as_mapping(settings: Settings) -> dict[str, Any]:
    """Return the settings in force as plain values; there is no secret among them."""
    return settings.model_dump(mode="json")


def _first_problem(error: ValidationError) -> str:
    problems = error.errors(include_url=False)
    problem = next((one for one in problems if one["type"] == "extra_forbidden"), problems[0])  # a typo explains most
    key = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        return f"unknown key `{key}`"
    if not problem["loc"]:
        return str(problem["msg"])
    if problem["type"] == "missing":
        return f"the key `{key}` is missing"
    if problem["loc"][:3] == ("content", "policies", "keys"):  # somebody may have written the key itself there
        return "`content.policies.keys` takes a key's alias or SHA-256 and full, redacted or metadata; never the key"
    return f"`{key}` is {problem['input']!r:.80}: {problem['msg']}"
