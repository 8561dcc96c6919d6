"""Hosts of the scenario, a gateway that writes all the while, and the recovery key."""

import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

SCENARIO = Path(__file__).resolve().parents[1]
PROJECT = SCENARIO.parents[1]
HOSTS = yaml.safe_load((SCENARIO / "inventory/hosts.yml").read_text())["all"]["hosts"]
PYTHON = "/opt/litellm-sqlalchemy/current/bin/python"
SPOOL = "/var/spool/litellm-sqlalchemy"


class Host:
    """Runs commands as root in a container."""

    def __init__(self, name: str) -> None:
        """Take the name in the inventory."""
        self.name, self.container = name, HOSTS[name]["ansible_host"]

    def try_run(self, command: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
        """Run a shell command; return how it ended."""
        words = ["podman", "exec", "--interactive", self.container, "bash", "-c", command]
        return subprocess.run(words, input=stdin, capture_output=True, text=True)

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


@pytest.fixture(scope="session")
def playbook() -> Callable[..., str]:
    """`playbook("restore-backup.yml", restore_target="db1")` runs it as an operator does."""

    def run(name: str, check: bool = True, **variables: str) -> str:
        inventory = Path(os.environ.get("MOLECULE_INVENTORY_FILE", SCENARIO / "inventory/hosts.yml"))
        directory = inventory.parent if inventory.suffix else inventory
        command = ["ansible-playbook", "-i", str(directory), f"playbooks/{name}", "-e", json.dumps(variables)]
        environment = {**os.environ, "ANSIBLE_VAULT_PASSWORD_FILE": str(PROJECT / "scripts/vault-password")}
        done = subprocess.run(command, cwd=PROJECT, env=environment, capture_output=True, text=True)
        assert not check or done.returncode == 0, done.stdout[-4000:] + done.stderr
        return done.stdout + done.stderr

    return run


@pytest.fixture(scope="session")
def recovery_key() -> str:
    """The secret that opens the dumps; on no host."""
    file = SCENARIO / "inventory/group_vars/all/vault.yml"
    environment = {**os.environ, "ANSIBLE_VAULT_PASSWORD_FILE": str(PROJECT / "scripts/vault-password")}
    text = subprocess.run(["ansible-vault", "view", file], env=environment, capture_output=True, text=True, check=True)
    return str(yaml.safe_load(text.stdout)["vault_postgresql_backup_identity"])


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
