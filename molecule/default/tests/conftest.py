"""What the tests of a deployed host share: the host, its secrets, the gateway, the database."""

import json
import os
import shlex
import ssl
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from podman_pipelined import inside
from testinfra.backend.base import CommandResult
from testinfra.backend.podman import PodmanBackend
from testinfra.host import Host

SCENARIO = Path(__file__).resolve().parents[1]
PROJECT = SCENARIO.parents[1]
EPHEMERAL = Path(os.environ.get("MOLECULE_EPHEMERAL_DIRECTORY", PROJECT / ".cache"))
CONTAINER = yaml.safe_load((SCENARIO / "inventory/hosts.yml").read_text())["all"]["hosts"]["gateway1"]["ansible_host"]

Run = Callable[..., str]
Show = Callable[[str, list[list[str]]], None]
TABLES = pytest.StashKey[list[str]]()
Psql = Callable[..., list[list[str]]]
Chat = Callable[..., httpx.Response]
StoredCall = Callable[..., list[dict[str, Any]]]


def wait_until(condition: Callable[[], object], what: str, seconds: float = 60) -> None:
    """Return once the condition holds; fail with `what` when it does not in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds:.0f} s: {what}"
        time.sleep(0.2)


def ansible(
    *arguments: str, inventory: Path = EPHEMERAL / "inventory", **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run `ansible-playbook` as an operator does, with the project's settings; molecule asks for colours."""
    settings = {
        "ANSIBLE_CONFIG": str(PROJECT / "ansible.cfg"),
        "ANSIBLE_ROLES_PATH": str(PROJECT / "roles"),  # for playbooks that tests write elsewhere
        "ANSIBLE_VAULT_PASSWORD_FILE": str(PROJECT / "scripts/vault-password"),
        "ANSIBLE_NOCOLOR": "1",
        "ANSIBLE_FORCE_COLOR": "0",
    }
    command = ["ansible-playbook", "-i", str(inventory), *arguments]
    variables = os.environ | settings | environment
    return subprocess.run(command, cwd=PROJECT, env=variables, capture_output=True, text=True)


class Inside(PodmanBackend):
    """Enters the container as tasks do: `podman exec` takes half a second for each command."""

    def run(self, command: str, *args: str, **_kwargs: Any) -> CommandResult:
        """Run a shell command."""
        command = self.get_command(command, *args)
        result = self.run_local(shlex.join([*inside(self.name), "/bin/sh", "-c", command]))
        result.command = self.encode(command)
        return result


@pytest.fixture(scope="session")
def host() -> Host:
    """The host under test; commands run as root."""
    backend = Inside(CONTAINER)
    host = Host(backend)
    backend.set_host(host)
    return host


@pytest.fixture(scope="session")
def run() -> Run:
    """`run("systemctl", "restart", "x", input="...")` returns the output; a failed command fails the test."""

    def run_in_host(*command: str, input: str | None = None, check: bool = True) -> str:
        done = subprocess.run([*inside(CONTAINER), *command], input=input or "", capture_output=True, text=True)
        assert not check or done.returncode == 0, f"{command} ended with {done.returncode}: {done.stderr}{done.stdout}"
        return done.stdout

    return run_in_host


@pytest.fixture(scope="session")
def psql(run: Run) -> Psql:
    """`psql("SELECT 1, 2")` returns the rows as lists of text, seen by the superuser; keywords are psql variables."""

    def query(statement: str, database: str = "litellm", **variables: str) -> list[list[str]]:
        settings = [word for name, value in variables.items() for word in ("-v", f"{name}={value}")]
        command = ["psql", "-X", "-A", "-t", "-F", "\x1f", "-v", "ON_ERROR_STOP=1", "-d", database, *settings]
        output = run("runuser", "-u", "postgres", "--", *command, input=statement)
        return [line.split("\x1f") for line in output.splitlines()]

    return query


@pytest.fixture(scope="session")
def address(run: Run) -> str:
    """The address of the host on its network, reachable from the controller."""
    return str(json.loads(run("ip", "-json", "-4", "address", "show", "eth0"))[0]["addr_info"][0]["local"])


@pytest.fixture(scope="session")
def secrets() -> dict[str, Any]:
    """The decrypted vault of the scenario."""
    command = ["ansible-vault", "view", str(SCENARIO / "inventory/group_vars/all/vault.yml")]
    environment = {"ANSIBLE_VAULT_PASSWORD_FILE": str(PROJECT / "scripts/vault-password")} | os.environ
    text = subprocess.run(command, check=True, capture_output=True, text=True, env=environment, cwd=PROJECT).stdout
    vault: dict[str, Any] = yaml.safe_load(text)
    return vault


@pytest.fixture(scope="session")
def ca_file() -> Path:
    """The certificate of the project's authority, on the controller."""
    return EPHEMERAL / "inventory/pki/ca.crt"


@pytest.fixture(scope="session")
def gateway(address: str, secrets: dict[str, Any], ca_file: Path) -> Iterator[httpx.Client]:
    """A client of the gateway, through HAProxy, that holds the master key."""
    headers = {"Authorization": f"Bearer {secrets['vault_litellm_master_key']}"}
    trust = ssl.create_default_context(cafile=str(ca_file))
    with httpx.Client(
        base_url=f"https://{address}", headers=headers, verify=trust, timeout=60, trust_env=False
    ) as client:
        yield client


@pytest.fixture(scope="session")
def chat(gateway: httpx.Client) -> Chat:
    """`chat("text", call_id, model="demo", stream=False)` sends a chat completion."""

    def send(text: str, call_id: str | None = None, **body: Any) -> httpx.Response:
        message = {"role": "user", "content": text}
        headers = {"x-litellm-call-id": call_id or f"test-{uuid.uuid4()}"}
        body = {"model": "demo", "messages": [message]} | body
        return gateway.post("/v1/chat/completions", json=body, headers=headers)

    return send


@pytest.fixture(scope="session")
def stored_call(psql: Psql) -> StoredCall:
    """`stored_call(call_id)` returns the finished calls with that id, waiting up to `seconds` for the first one."""

    statement = """
        SELECT row_to_json(q)::jsonb || jsonb_build_object('response', row_to_json(a))
          FROM requests q JOIN responses a ON a.request_id = q.id WHERE q.call_id = :'call_id'"""

    def find(call_id: str, seconds: float = 60) -> list[dict[str, Any]]:
        deadline = time.monotonic() + seconds
        while not (rows := psql(statement, call_id=call_id)) and time.monotonic() < deadline:
            time.sleep(0.3)
        return [json.loads(row[0]) for row in rows]

    return find


@pytest.fixture(scope="session")
def active(psql: Psql) -> dict[str, str]:
    """The active login of each pair, as the server knows it."""
    enabled = psql(
        "SELECT rolname FROM pg_roles WHERE rolcanlogin AND rolname LIKE 'litellm%'"
        " ORDER BY shobj_description(oid, 'pg_authid')"
    )
    return {name[:-2]: name for (name,) in enabled}


@pytest.fixture(scope="session")
def show(pytestconfig: pytest.Config) -> Show:
    """`show("Title", rows)` prints a table at the end of the tests."""

    def keep(title: str, rows: list[list[str]]) -> None:
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        pytestconfig.stash.setdefault(TABLES, []).extend(["", title, *lines])

    return keep


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Print the tables that tests have kept."""
    for line in config.stash.get(TABLES, []):
        terminalreporter.write_line(line)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """Put the host's journal since the start of a failed test into its report."""
    report = yield
    if report.failed:  # type: ignore[attr-defined]
        command = [*inside(CONTAINER), "journalctl", "--no-pager", "--lines=200", f"--since=@{call.start:.0f}"]
        report.sections.append(("Journal", subprocess.run(command, capture_output=True, text=True).stdout))  # type: ignore[attr-defined]
    return report
