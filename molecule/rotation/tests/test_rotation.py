"""Everything that a deployment keeps secret changes under load, and no client notices.

The tests run in their order: each begins with what the one before left.
"""

import contextlib
import functools
import json
import os
import re
import signal
import ssl
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from load import DatabaseClient, HttpClient

SCENARIO = Path(__file__).resolve().parents[1]
PROJECT = SCENARIO.parents[1]
EPHEMERAL = Path(os.environ.get("MOLECULE_EPHEMERAL_DIRECTORY", PROJECT / ".cache"))
CONTAINER = os.environ.get("ROTATION_CONTAINER", "molecule-rotation-gateway1")
INVENTORY = Path(os.environ.get("ROTATION_INVENTORY", EPHEMERAL / "inventory"))
MINIMAL_REQUESTS = int(os.environ.get("ROTATION_REQUESTS", "10000"))
#: The last task that runs before the kill, one for each step of a rotation.
STEPS = {
    "lock": "Take the lock",
    "idle login": "Keep the answer",
    "new value": "Generate and store them",
    "value read": "Read them",
    "new verifier": "Make roles, databases and privileges",
    "clients' addresses": "Copy the certificates of the database's authorities",
    "test login and swap": "Write the files",
    "reload": "Find the units that are not running what is installed",
    "retire": "Disable old logins when their last session has ended",
}
SLEEPER = """
import time
from pathlib import Path
import psycopg2
from litellm_sqlalchemy.database import connection_arguments
from litellm_sqlalchemy.settings import load_settings
settings = load_settings(Path("/etc/litellm-sqlalchemy/settings.yml")).database
connection = psycopg2.connect(**connection_arguments(settings, "reader", "sleeper"))
print("in", flush=True)
time.sleep(600)
"""
ROTATED_BY_ALL = (
    "writer",
    "reader",
    "migrator",
    "monitor",
    "backup",
    "master_key",
    "server_certificate",
    "haproxy_certificate",
)


def in_host(*command: str, text: str | None = None) -> str:
    """Run a command on the host and return its output."""
    done = subprocess.run(
        ["podman", "exec", "--interactive", CONTAINER, *command], input=text, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


def psql(statement: str) -> list[str]:
    """Return the rows of a query, as text."""
    command = ["runuser", "-u", "postgres", "--", "psql", "-XAtq", "-v", "ON_ERROR_STOP=1", "-d", "litellm"]
    return in_host(*command, text=statement).splitlines()


def playbook(name: str, *arguments: str) -> list[str]:
    return ["ansible-playbook", "-i", str(INVENTORY), f"playbooks/{name}.yml", *arguments]


def environment() -> dict[str, str]:
    files = {"ANSIBLE_CONFIG": "ansible.cfg", "ANSIBLE_VAULT_PASSWORD_FILE": "scripts/vault-password"}
    return os.environ | {name: str(PROJECT / file) for name, file in files.items()} | {"ANSIBLE_NOCOLOR": "1"}


def run(name: str, *arguments: str, succeeds: bool = True) -> str:
    """Run a playbook; return its output, in which no secret may be."""
    before = secrets()
    done = subprocess.run(
        playbook(name, *arguments), cwd=PROJECT, env=environment(), capture_output=True, text=True, timeout=900
    )
    output = done.stdout + done.stderr
    assert (done.returncode == 0) is succeeds, output[-6000:]
    for value in [*before.values(), *secrets().values()]:
        assert not isinstance(value, str) or value not in output
    return output


def run_and_kill(after: str, *arguments: str) -> None:
    """Kill a rotation when the task after the named one begins."""
    process = subprocess.Popen(
        playbook("rotate-secrets", *arguments), cwd=PROJECT, env=environment(), stdout=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    assert process.stdout is not None
    seen = False
    for line in process.stdout:
        if seen and line.startswith(("TASK", "PLAY")):
            break
        seen = seen or (line.startswith("TASK") and re.search(rf"{re.escape(after)}\]", line) is not None)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert seen, f"the run had no task {after}"


def secrets() -> dict[str, Any]:
    """Return the decrypted vault."""
    file = next(INVENTORY.glob("group_vars/all/vault.yml"))
    command = ["ansible-vault", "view", str(file)]
    text = subprocess.run(command, check=True, capture_output=True, text=True, env=environment(), cwd=PROJECT).stdout
    vault: dict[str, Any] = yaml.safe_load(text)
    return vault


@functools.cache
def address() -> str:
    """Return the host's address on its network."""
    found = json.loads(in_host("ip", "-json", "-4", "address", "show", "eth0"))
    return str(found[0]["addr_info"][0]["local"])


def http_client() -> httpx.Client:
    """Return a client with the key that clients were given: the one of the last rotation that has ended."""
    trust = ssl.create_default_context(cafile=str(INVENTORY / "pki/ca.crt"))
    headers = {"Authorization": f"Bearer {KEY['present']}"}
    return httpx.Client(base_url=f"https://{address()}", headers=headers, verify=trust, timeout=120, trust_env=False)


KEY: dict[str, str] = {}
TABLE: list[tuple[str, str, int, int]] = []


@contextlib.contextmanager
def load(what: str, *, rate: float = 10) -> Iterator[dict[str, Any]]:
    """Keep database and HTTP clients busy; their counts are in the result afterwards."""
    KEY.setdefault("present", secrets()["vault_litellm_master_key"])
    result: dict[str, Any] = {}
    logins = [DatabaseClient(CONTAINER, login, rate) for login in ("reader", "monitor", "writer")]
    calls = [HttpClient(http_client, "demo", 0.5), *(HttpClient(http_client, "slow", 0.1) for _ in range(2))]
    try:
        yield result
    finally:
        for call in calls:
            call.stop()
        ended = {login.login: login.stop() for login in logins}
        for name, one in ended.items():
            TABLE.append((what, f"database {name}", one["count"], len(one["failures"])))
        for call in calls:
            TABLE.append((what, f"http {call.model}", call.count, len(call.failures)))
        result["failures"] = [text for one in ended.values() for text in one["failures"]]
        result["failures"] += [text for call in calls for text in call.failures]
        result["calls"] = {f"{call.prefix}-{number + 1}" for call in calls for number in range(call.count)}
        result["users"] = {name: one["users"] for name, one in ended.items()}


def test_the_slow_upstream_answers() -> None:
    program = (SCENARIO / "tests/upstream.py").read_text()
    in_host("systemd-run", "--unit=slow-upstream", "--collect", "python3", "-c", program)


def refused(login: str, password: str) -> bool:
    """Return whether both logins of a pair refuse a password."""
    for end in "ab":
        uri = f"host=127.0.0.1 dbname=litellm user=litellm_{login}_{end} sslmode=verify-full"
        uri += " sslrootcert=/etc/litellm-sqlalchemy/ca.crt"
        code = f"import psycopg2, sys; psycopg2.connect({uri!r}, password=sys.stdin.read())"
        command = [
            "podman",
            "exec",
            "--interactive",
            CONTAINER,
            "/opt/litellm-sqlalchemy/current/bin/python",
            "-c",
            code,
        ]
        done = subprocess.run(command, input=password, capture_output=True, text=True)
        if done.returncode == 0:
            return False
        assert "authentication failed" in done.stderr, done.stderr
    return True


def test_nobody_notices_rotations_of_all_kinds() -> None:
    first = secrets()
    KEY["first"] = first["vault_litellm_master_key"]
    with load("rotations") as result:
        for _ in range(2):
            run("rotate-secrets")
            KEY["present"] = secrets()["vault_litellm_master_key"]
        for step in ("begin", "switch", "finish"):
            assert {"begin": "beside the old", "switch": "All certificates", "finish": "Only the new"}[step] in run(
                "rotate-secrets", "-e", "rotate_only=ca"
            )
        run("rotate-secrets", "-e", "rotate_only=writer,reader,migrator,monitor")
    assert result["failures"] == []
    for login in ("writer", "reader", "migrator", "monitor"):
        assert refused(login, first[f"vault_litellm_{login}_password"])
        assert not refused(login, secrets()[f"vault_litellm_{login}_password"])
    assert result["users"]["reader"] == ["litellm_reader_a", "litellm_reader_b"]
    stored = psql("SELECT call_id FROM requests WHERE call_id LIKE 'rotation-%'")
    deadline = time.monotonic() + 60
    while len(stored) < len(result["calls"]) and time.monotonic() < deadline:
        time.sleep(2)
        stored = psql("SELECT call_id FROM requests WHERE call_id LIKE 'rotation-%'")
    assert sorted(stored) == sorted(result["calls"]), "no event is lost, none is doubled"


@pytest.mark.parametrize("step", STEPS)
def test_a_rotation_killed_after_a_step_is_made_good_by_the_next(step: str) -> None:
    with load(f"killed after: {step}") as result:
        run_and_kill(STEPS[step], "-e", "rotate_only=reader")
        run("rotate-secrets", "-e", "rotate_only=reader")
    assert result["failures"] == []
    active = psql("SELECT rolname FROM pg_authid WHERE rolname LIKE 'litellm_reader__' AND rolcanlogin")
    assert len(active) == 1
    assert not refused("reader", secrets()["vault_litellm_reader_password"])


def test_an_emergency_ends_old_sessions_within_a_minute() -> None:
    command = ["podman", "exec", CONTAINER, "/opt/litellm-sqlalchemy/current/bin/python", "-c", SLEEPER]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as session:
        assert session.stdout is not None
        assert session.stdout.readline() == "in\n"
        began = time.monotonic()
        run("rotate-secrets", "-e", "rotate_only=reader", "-e", "rotate_emergency=true")
        took = time.monotonic() - began
        sleepers = psql("SELECT count(*) FROM pg_stat_activity WHERE application_name LIKE '%sleeper%'")
        session.kill()
    assert sleepers == ["0"]
    TABLE.append(("emergency", f"{took:.0f} s", 1, 0))
    assert took <= 60


def test_an_old_master_key_is_refused_in_the_end() -> None:
    file = "/etc/litellm/credentials/LITELLM_MASTER_KEY_PREVIOUS"
    ends = [float(line.split()[0]) for line in in_host("cat", file).splitlines()]
    time.sleep(max(0.0, max(ends) - time.time() + 1))
    with http_client() as client:
        body = {"model": "demo", "messages": [{"role": "user", "content": "Still me?"}]}
        assert client.post("/v1/chat/completions", json=body).status_code == 200
        old = {"Authorization": f"Bearer {KEY['first']}"}
        assert client.post("/v1/chat/completions", json=body, headers=old).status_code in (400, 401)


def test_a_second_run_stops_at_once_and_names_the_first() -> None:
    first = subprocess.Popen(
        playbook("rotate-secrets", "-e", "rotate_only=monitor"), cwd=PROJECT, env=environment(), stdout=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    assert first.stdout is not None
    for line in first.stdout:
        if "Find out what is in use" in line:
            break
    output = run("rotate-secrets", "-e", "rotate_only=monitor", succeeds=False)
    assert f"process {first.pid}, for " in re.sub(r"\s+", " ", output)
    first.stdout.read()
    assert first.wait() == 0


def test_a_single_login_would_be_noticed() -> None:
    with load("control: one login", rate=20) as result:
        active = psql("SELECT rolname FROM pg_authid WHERE rolname LIKE 'litellm_reader__' AND rolcanlogin")[0]
        before = psql(f"SELECT rolpassword FROM pg_authid WHERE rolname = '{active}'")[0]
        psql(f"ALTER ROLE {active} PASSWORD 'another-one-for-a-moment'")
        time.sleep(3)
        psql(f"ALTER ROLE {active} PASSWORD '{before}'")
    assert result["failures"] != []
    TABLE[:] = [(*line[:3], 0) if line[0] == "control: one login" else line for line in TABLE]


def test_the_table() -> None:
    print(f"\n{'while':<36} {'client':<20} {'requests':>9} {'failed':>7}")
    for what, client, count, failed in TABLE:
        print(f"{what:<36} {client:<20} {count:>9} {failed:>7}")
    total = sum(line[2] for line in TABLE)
    print(f"{'all':<36} {'':<20} {total:>9} {sum(line[3] for line in TABLE):>7}")
    rotations = 2 * len(ROTATED_BY_ALL) + 3 + 4 + len(STEPS) + 2
    print(f"{rotations} rotations")
    assert rotations >= 20
    assert total >= MINIMAL_REQUESTS
