"""The settings of a test's deployment and the package's processes in it."""

import json
import os
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import yaml

import litellm_sqlalchemy
from litellm_sqlalchemy.settings import SETTINGS_VARIABLE, Settings, load_settings
from support.postgresql import LOGINS, Server, free_port
from support.waiting import wait_until

_SOURCE = str(Path(litellm_sqlalchemy.__file__).parents[1])
_TESTS = str(Path(__file__).parents[1])
#: A user that is not root: `nobody`.
OTHER = 65534
COMMAND = [sys.executable, "-m", "litellm_sqlalchemy"]


@dataclass
class Deployment:
    """A settings file, credential files and a spool in `directory`; `content` is what the file says."""

    directory: Path
    content: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def create(cls, directory: Path, server: Server, database: str) -> "Deployment":
        """Write settings, credentials and the spool's directory for a database of a server."""
        (directory / "spool").mkdir()
        (directory / "credentials").mkdir()
        deployment = cls(directory)
        for login in LOGINS:
            deployment.write_credential(login, server.passwords[login])
        deployment.update(
            gateway={"name": "test"},
            database={
                "host": server.address,
                "port": server.port,
                "name": database,
                "sslrootcert": str(server.certificate),
                "credentials_directory": str(directory / "credentials"),
                "connect_timeout": 5,
            },
            spool={"directory": str(directory / "spool")},
            writer={"listen": f"127.0.0.1:{free_port()}", "retry_delay_max": 0.5, "batch_delay": 0.05},
        )
        return deployment

    @property
    def file(self) -> Path:
        """The settings file."""
        return self.directory / "settings.yml"

    @property
    def spool(self) -> Path:
        """The spool's directory."""
        return Path(self.content["spool"]["directory"])

    @property
    def environment(self) -> dict[str, str]:
        """Environment of a process of this deployment."""
        return {**os.environ, SETTINGS_VARIABLE: str(self.file), "PYTHONPATH": _SOURCE}

    @property
    def test_environment(self) -> dict[str, str]:
        """The same for a program of `tests/support`."""
        return {**self.environment, "PYTHONPATH": f"{_SOURCE}:{_TESTS}", "PYTHONDONTWRITEBYTECODE": "1"}

    def update(self, **sections: dict[str, Any]) -> None:
        """Change keys of sections and write the file."""
        for name, section in sections.items():
            self.content.setdefault(name, {}).update(section)
        self.file.write_text(yaml.safe_dump(self.content))

    def load(self) -> Settings:
        """Return the settings as the package reads them."""
        return load_settings(self.file)

    def write_credential(self, login: str, password: str, user: str | None = None) -> None:
        """Put a credential file in place, atomically."""
        file = self.directory / "credentials" / f"{login}.json"
        temporary = file.with_suffix(".new")
        temporary.write_text(json.dumps({"user": user or LOGINS[login][0], "password": password}))
        temporary.replace(file)

    def give_to(self, user: int) -> None:
        """Let another user run what needs these files, which must lie where that user gets at."""
        for path in (self.directory, *self.directory.rglob("*")):
            os.chown(path, user, user)

    def run(self, *arguments: str, timeout: float = 180) -> subprocess.CompletedProcess[str]:
        """Run the command to its end."""
        return subprocess.run(
            [*COMMAND, *arguments],
            env=self.environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=timeout,
        )


class Resources(NamedTuple):
    """How many file descriptors and threads a process has."""

    descriptors: int
    threads: int

    def within(self, other: "Resources") -> bool:
        """Return whether there are no more of either than in `other`."""
        return self.descriptors <= other.descriptors and self.threads <= other.threads


def resources_of(process: int) -> Resources:
    """Return what a process holds."""
    place = Path(f"/proc/{process}")
    return Resources(len(list((place / "fd").iterdir())), len(list((place / "task").iterdir())))


class WriterProcess:
    """`litellm-sqlalchemy write` of a deployment; what it says goes to a log file."""

    def __init__(self, deployment: Deployment) -> None:
        """Start nothing yet."""
        self.deployment = deployment
        self.process: subprocess.Popen[bytes] | None = None
        self.log = deployment.directory / "writer.log"

    def start(self, prefix: Sequence[str] = (), *, ready: bool = True, user: int | None = None) -> "WriterProcess":
        """Start it, under a command (`strace ...`) or as a user where given; wait until its health endpoint answers."""
        environment = self.deployment.environment | ({"HOME": "/nonexistent"} if user else {})  # libpq looks there
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*prefix, *COMMAND, "write"], env=environment, stdout=log, stderr=log, cwd="/",
                user=user, group=user, extra_groups=None if user is None else [],
            )  # fmt: skip
        if ready:
            wait_until(lambda: self.health() or self.ended(), "the writer answers")
            assert self.process.poll() is None, self.log.read_text()
        return self

    def ended(self) -> bool:
        """Return whether the process has ended."""
        return self.process is not None and self.process.poll() is not None

    def stop(self, timeout: float = 30) -> int:
        """Send SIGTERM; return the exit code."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout)

    def kill(self) -> None:
        """Send SIGKILL to it, if it runs."""
        if self.process is not None:
            self.process.kill()
            self.process.wait(10)

    def health(self) -> dict[str, Any]:
        """Return what `/health` says; nothing when it does not answer."""
        try:
            answer: dict[str, Any] = json.loads(self._get("/health"))
        except (OSError, ValueError):
            return {}
        return answer

    def metrics(self) -> dict[str, float]:
        """Return the samples of `/metrics` by name with labels."""
        lines = (line.rpartition(" ") for line in self._get("/metrics").decode().splitlines() if line[:1] != "#")
        return {name: float(value) for name, _, value in lines}

    def resident_megabytes(self) -> float:
        """Return the memory that the process holds."""
        assert self.process is not None
        lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmRSS")).split()[1]) / 1024

    def resources(self) -> Resources:
        """Return what the process holds."""
        assert self.process is not None
        return resources_of(self.process.pid)

    def _get(self, path: str) -> bytes:
        address = self.deployment.content["writer"]["listen"]
        try:
            with urllib.request.urlopen(f"http://{address}{path}", timeout=5) as answer:
                return bytes(answer.read())
        except urllib.error.HTTPError as error:
            return error.read()
