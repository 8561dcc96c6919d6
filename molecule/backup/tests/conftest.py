"""Hosts of the scenario, a gateway that writes all the while, the recovery key and the runbook's commands."""

import json
import os
import re
import shlex
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from podman_pipelined import inside

SCENARIO = Path(__file__).resolve().parents[1]
PROJECT = SCENARIO.parents[1]
HOSTS = yaml.safe_load((SCENARIO / "inventory/hosts.yml").read_text())["all"]["hosts"]
PYTHON = "/opt/litellm-sqlalchemy/current/bin/python"
SPOOL = "/var/spool/litellm-sqlalchemy"
INVENTORY = Path(os.environ.get("MOLECULE_INVENTORY_FILE", SCENARIO / "inventory/hosts.yml")).parent


class Secret(str):
    """A text that a failed test does not show."""

    __slots__ = ()

    def __repr__(self) -> str:
        """Return no part of it."""
        return "<secret>"


class Host:
    """Runs commands as root in a container."""

    def __init__(self, name: str) -> None:
        """Take the name in the inventory."""
        self.name, self.container = name, HOSTS[name]["ansible_host"]

    def try_run(self, command: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
        """Run a shell command; return how it ended."""
        command_line = [*inside(self.container), "bash", "-c", command]
        return subprocess.run(command_line, input=stdin, capture_output=True, text=True)

    def run(self, command: str, stdin: str = "") -> str:
        """Run a shell command that must succeed; return its output."""
        done = self.try_run(command, stdin)
        assert done.returncode == 0, f"{command}: {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stdout.strip()

    def sql(self, statement: str, port: int = 5432, database: str = "litellm") -> list[str]:
        """Run SQL as the superuser; return the lines."""
        command = f"runuser -u postgres -- psql -XAtq -v ON_ERROR_STOP=1 -p {port} {database}"
        return self.run(command, statement).splitlines()

    def drill(self, kind: str) -> dict:
        """Run a drill; return its report."""
        self.try_run(f"systemctl reset-failed; systemctl start postgresql-backup-drill@{kind}.service")
        self.run(f"systemctl start postgresql-backup-report@{kind}.service")  # its own start may not be over yet
        return json.loads(self.run(f"cat /var/lib/postgresql-drill/{kind}.json"))


@pytest.fixture(scope="session")
def db() -> Host:
    """The database host."""
    return Host("db1")


@pytest.fixture(scope="session")
def store() -> Host:
    """The host of the off-host copies."""
    return Host("store1")


PLAIN = {"ANSIBLE_NOCOLOR": "1", "ANSIBLE_FORCE_COLOR": "0"}  # molecule asks for colours
ENVIRONMENT = {**os.environ, **PLAIN, "ANSIBLE_VAULT_PASSWORD_FILE": str(PROJECT / "scripts/vault-password")}


def controller(command: str, check: bool = True, cwd: Path = PROJECT) -> str:
    """Run a shell command in the project's directory, as an operator does; return its output."""
    began = time.monotonic()
    environment = {**ENVIRONMENT, "ANSIBLE_CONFIG": str(cwd / "ansible.cfg")}
    done = subprocess.run(["bash", "-c", command], cwd=cwd, env=environment, capture_output=True, text=True)
    print(f"{time.monotonic() - began:.0f} s: {command}")
    assert not check or done.returncode == 0, done.stdout[-4000:] + done.stderr
    return done.stdout + done.stderr


def play(name: str, **variables: object) -> str:
    """Return the command that runs a playbook."""
    return shlex.join(["ansible-playbook", "-i", str(INVENTORY), f"playbooks/{name}", "-e", json.dumps(variables)])


def changes(output: str) -> list[str]:
    """Return the tasks of a playbook's output that changed something, with their hosts."""
    task, found = "", []
    for line in output.splitlines():
        if line.startswith("TASK"):
            task = line.strip(" *")
        elif line.startswith("changed:"):
            found.append(f"{task} {line}")
    return found


class Runbook:
    """The commands of docs/operations/disasters.md, and which of them were run."""

    #: What stands for a value of the deployment there.
    PLACES = ("2026-11-23T14:30:00+00:00", "20261123T140000Z", "20261122T050312Z", "public.requests")

    def __init__(self) -> None:
        """Read the page: every line of a code block is a command."""
        blocks = re.findall(r"^ *```\n(.*?)^ *```", (PROJECT / "docs/operations/disasters.md").read_text(), re.M | re.S)
        self.commands = {line.strip() for block in blocks for line in block.splitlines() if line.strip()}
        self.pending = set(self.commands)

    def run(
        self,
        words: str,
        *,
        values: tuple[str, ...] = (),
        on: Host | None = None,
        user: str = "root",
        inventory: Path = INVENTORY,
        variables: dict | None = None,
        **how: Any,
    ) -> str:
        """Run the shortest command that has these words, with `values` in the places of those of the page."""
        command = min((command for command in self.commands if words in command), key=len)
        self.pending.discard(command)
        places = [place for place in self.PLACES if place in command]
        for place, value in zip(places, values, strict=True):
            command = command.replace(place, value)
        if on:
            return on.run(command if user == "root" else f"runuser -u {user} -- sh -c {shlex.quote(command)}")
        command = command.replace("inventories/production", str(inventory))
        return controller(command + (f" -e {shlex.quote(json.dumps(variables))}" if variables else ""), **how)


@pytest.fixture(scope="session")
def runbook() -> Runbook:
    """The runbook."""
    return Runbook()


@pytest.fixture(scope="session")
def recovery_key() -> str:
    """The secret that opens the dumps; on no host."""
    file = SCENARIO / "inventory/group_vars/all/vault.yml"
    return Secret(yaml.safe_load(controller(f"ansible-vault view {file}"))["vault_postgresql_backup_identity"])


class Gateway(Host):
    """The host whose spool is written to."""

    def start(self) -> None:
        """Begin to write."""
        self.run("cat > /root/traffic.py && rm -f /tmp/stop", (SCENARIO / "tests/traffic.py").read_text())
        self.run("install -m 0644 /root/traffic.py /opt/traffic.py; : > /tmp/calls; chown litellm-logger /tmp/calls")
        self.run(
            f"runuser -u litellm-logger -- sh -c 'umask 7; nohup {PYTHON} /opt/traffic.py {SPOOL} /tmp/stop 20"
            " >> /tmp/calls 2> /tmp/traffic.log &' < /dev/null > /dev/null 2>&1"
        )

    def stop(self) -> None:
        """End writing, and wait until all is delivered."""
        self.run("touch /tmp/stop")
        self.wait_drained()

    def wait_drained(self) -> None:
        """Wait until the spool is empty."""
        end = time.monotonic() + 60
        while json.loads(self.try_run("litellm-sqlalchemy status --json").stdout)["spooled"]:
            assert time.monotonic() < end, self.run("journalctl -u litellm-log-writer -n 20 --no-pager")
            time.sleep(0.5)

    def calls(self) -> set[str]:
        """Return the calls written so far."""
        return set(self.run("cat /tmp/calls").split())


@pytest.fixture(scope="session")
def gateway() -> Iterator[Gateway]:
    """The gateway, writing."""
    gateway = Gateway("gateway1")
    gateway.start()
    yield gateway
    gateway.run("touch /tmp/stop")


def stored(db: Host, port: int = 5432) -> set[str]:
    """Return the calls that the database has, request and response."""
    query = "SELECT replace(r.id::text, '-', '') FROM requests r JOIN responses p ON p.request_id = r.id"
    return set(db.sql(query, port))
