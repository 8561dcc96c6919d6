"""The host under test, the deployment's secrets, and runs of its playbooks."""

import contextlib
import functools
import json
import os
import re
import signal
import ssl
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import yaml
from ansible.parsing.vault import VaultLib, VaultSecret
from load import PYTHON, program
from podman_pipelined import inside

SCENARIO = Path(__file__).resolve().parents[1]
PROJECT = SCENARIO.parents[1]
CONTAINER = "molecule-rotation-gateway1"
INVENTORY = Path(os.environ["MOLECULE_EPHEMERAL_DIRECTORY"]) / "inventory"
VAULT = INVENTORY / "group_vars/all/vault.yml"
PASSWORD_FILE = PROJECT / "scripts/vault-password"
#: The host stays what it is while these tests run: its facts are gathered once.
FACTS = tempfile.TemporaryDirectory(prefix="facts-")


def in_host(*command: str, text: str | None = None) -> str:
    """Run a command on the host and return its output."""
    done = subprocess.run([*inside(CONTAINER), *command], input=text or "", capture_output=True, text=True)
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


def psql(statement: str) -> list[str]:
    """Return the rows of a query, as text."""
    command = ["runuser", "-u", "postgres", "--", "psql", "-XAtq", "-v", "ON_ERROR_STOP=1", "-d", "litellm"]
    return in_host(*command, text=statement).splitlines()


def enabled(login: str) -> list[str]:
    """Return the logins of a pair that are enabled."""
    return psql(f"SELECT rolname FROM pg_authid WHERE rolname ~ '^litellm_{login}_[ab]$' AND rolcanlogin ORDER BY 1")


def environment() -> dict[str, str]:
    files = {"ANSIBLE_CONFIG": PROJECT / "ansible.cfg", "ANSIBLE_VAULT_PASSWORD_FILE": PASSWORD_FILE}
    facts = {"ANSIBLE_CACHE_PLUGIN": "jsonfile", "ANSIBLE_CACHE_PLUGIN_CONNECTION": FACTS.name}
    plain = {"ANSIBLE_NOCOLOR": "1", "ANSIBLE_FORCE_COLOR": "0"}  # molecule asks for colours
    return os.environ | {name: str(file) for name, file in files.items()} | facts | plain


def command_line(playbook: str, *arguments: str) -> list[str]:
    return ["ansible-playbook", "-i", str(INVENTORY), playbook, *arguments]


def run(playbook: str, *arguments: str, succeeds: bool = True) -> str:
    """Run a playbook; return its output, in which no secret may be, with all white space as one space."""
    before = secrets()
    done = subprocess.run(
        command_line(playbook, *arguments),
        cwd=PROJECT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=900,
    )
    output = done.stdout + done.stderr
    assert (done.returncode == 0) is succeeds, output[-6000:]
    for value in texts(before) | texts(secrets()):
        assert value not in output
    return " ".join(output.split())


def texts(vault: dict[str, Any]) -> set[str]:
    """Return all texts of a vault."""
    inner = (value.values() if isinstance(value, dict) else [value] for value in vault.values())
    return {text for values in inner for text in values}


def rotate(names: str, *arguments: str) -> str:
    """Rotate the secrets that are named, with commas between them."""
    return run("playbooks/rotate-secrets.yml", "-e", f"rotate_only={names}", *arguments)


@contextlib.contextmanager
def running(playbook: str, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """Run a playbook whose output the test reads while it runs; it is gone afterwards."""
    process = subprocess.Popen(
        command_line(playbook, *arguments),
        cwd=PROJECT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        # What was started in the background has it ignored, and hands that on.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def read_until(process: subprocess.Popen[str], pattern: str) -> str:
    """Return the output of a run up to a line that the pattern is found in."""
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if re.search(pattern, line):
            return "".join(lines)
    raise AssertionError(f"no line has {pattern}: {''.join(lines)[-3000:]}")


def until(condition: Callable[[], bool], seconds: float, what: str) -> None:
    """Wait for a condition."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.2)


@functools.cache
def vault_library() -> VaultLib:
    password = subprocess.run([PASSWORD_FILE], check=True, capture_output=True).stdout.strip()
    return VaultLib([("default", VaultSecret(password))])


def secrets() -> dict[str, Any]:
    """Return the decrypted vault, which may be lost."""
    if not VAULT.exists():
        return {}
    vault: dict[str, Any] = yaml.safe_load(vault_library().decrypt(VAULT.read_bytes()))
    return vault


def edit_secrets(values: dict[str, Any]) -> None:
    """Set values in the vault, as an operator does with ansible-vault edit."""
    VAULT.write_bytes(vault_library().encrypt(yaml.safe_dump(secrets() | values)))


@functools.cache
def address() -> str:
    """Return the host's address on its network."""
    found = json.loads(in_host("ip", "-json", "-4", "address", "show", "eth0"))
    return str(found[0]["addr_info"][0]["local"])


def gateway(key: str, authorities: Path | None = None) -> httpx.Client:
    """Return a client of the gateway that trusts what clients were given last."""
    trust = ssl.create_default_context(cafile=str(authorities or INVENTORY / "pki/ca.crt"))
    headers = {"Authorization": f"Bearer {key}"}
    return httpx.Client(base_url=f"https://{address()}", headers=headers, verify=trust, timeout=120, trust_env=False)


def ask(key: str, model: str = "demo") -> httpx.Response:
    """Send one call with a master key."""
    body = {"model": model, "messages": [{"role": "user", "content": "Still me?"}], "stream": model == "slow"}
    with gateway(key) as client:
        return client.post("/v1/chat/completions", json=body)


def certificate(port: int) -> str:
    """Return the serial number and the issuer's key of the certificate that a port of the host serves."""
    start = ["-starttls", "postgres"] if port == 5432 else []
    served = in_host("openssl", "s_client", "-connect", f"{address()}:{port}", *start, text="")
    read = in_host("openssl", "x509", "-noout", "-serial", "-ext", "authorityKeyIdentifier", text=served)
    return " ".join(read.split())


def accepted(vault: dict[str, Any], *logins: str) -> set[str]:
    """Return for which of the logins the database takes the password of a vault, over the network as clients come."""
    passwords = {login: vault[f"vault_litellm_{login}_password"] for login in logins}
    code = """
import json, psycopg2, sys
from concurrent.futures import ThreadPoolExecutor

def is_accepted(login, end, password):
    server = "host=127.0.0.1 sslmode=verify-full sslrootcert=/etc/litellm-sqlalchemy/ca.crt"
    if login == "backup":
        server = "host=/var/run/postgresql"
    try:
        psycopg2.connect(f"{server} dbname=litellm user=litellm_{login}_{end}", password=password)
    except psycopg2.OperationalError as error:
        assert "authentication failed" in str(error), error
        return ""
    return login

tried = [(login, end, password) for login, password in json.load(sys.stdin).items() for end in "ab"]
with ThreadPoolExecutor(len(tried)) as pool:
    print(*pool.map(lambda one: is_accepted(*one), tried))
"""
    return set(in_host(PYTHON, "-I", "-c", code, text=json.dumps(passwords)).split())


@contextlib.contextmanager
def session(login: str) -> Iterator[Callable[[], str]]:
    """Hold a session of a login; what it gives asks in it for its backend and returns the answer, or the error."""
    process = program(CONTAINER, "database_session.py", login)
    assert process.stdin is not None
    assert process.stdout is not None

    def ask_it() -> str:
        process.stdin.write("\n")
        process.stdin.flush()
        return str(process.stdout.readline()).strip()

    try:
        assert ask_it().isdigit()
        yield ask_it
    finally:
        process.stdin.close()
        process.wait(30)
