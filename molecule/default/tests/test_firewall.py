"""The firewall: what is refused from outside, and that it neither locks ssh out nor touches rules of others."""

import http.client
import ipaddress
import json
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import EPHEMERAL, Psql, Run, Show, ansible, wait_until

Done = subprocess.CompletedProcess[str]
Playbook = Callable[..., Done]
TABLE = ("nft", "list", "table", "inet", "litellm_gateway")
OWN_TABLE = "table inet mine { chain input { type filter hook input priority 10; tcp dport 9 drop; }; }"
PROBE = 8099
RATE, BURST = 20, 100


def reaches(address: str, port: int, seconds: float = 1.5, source: str = "") -> bool:
    """Return whether this machine, which is outside of the host, gets a TCP connection."""
    try:
        socket.create_connection((address, port), timeout=seconds, source_address=(source, 0)).close()
    except TimeoutError:
        return False
    return True


@pytest.fixture(scope="module")
def playbook() -> Playbook:
    """`playbook(inventory, name=value)` runs playbooks/firewall.yml."""

    def run_playbook(inventory: Path = EPHEMERAL / "inventory", **variables: object) -> Done:
        return ansible("playbooks/firewall.yml", "-e", json.dumps(variables), inventory=inventory)

    return run_playbook


@pytest.fixture(scope="module")
def listener(run: Run, address: str) -> Iterator[int]:
    """A port on the host that anybody could reach if there were no firewall."""
    run("systemd-run", "--quiet", "--unit=probe", "python3", "-m", "http.server", str(PROBE), "--bind", address)
    wait_until(lambda: f":{PROBE} " in run("ss", "-Hltn"), "the probe listens")
    yield PROBE
    run("systemctl", "stop", "probe")


@pytest.fixture(scope="module", autouse=True)
def own_table(run: Run) -> Iterator[None]:
    """Rules of the host's owner, which stay as they are through all runs here."""
    run("nft", "--file", "-", input=OWN_TABLE)
    before = run("nft", "list", "table", "inet", "mine")
    yield
    assert run("nft", "list", "table", "inet", "mine") == before
    run("nft", "delete", "table", "inet", "mine")


def rules(run: Run) -> list[str]:
    """Return the rules in force, without what they have counted."""
    lines = run(*TABLE).splitlines()
    return [line for line in lines if "counter" not in line and "elements" not in line and "expires" not in line]


# The tests below go on from one another: other rules, rules that lock out, none, and at the end the deployment's again.


def test_only_the_gateway_is_reached_from_outside(run: Run, address: str, listener: int) -> None:
    inside = "import socket, sys; socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=5)"
    run("python3", "-c", inside, address, str(listener))
    run("python3", "-c", inside, address, "5432")
    assert {port: reaches(address, port) for port in (443, 5432, listener)} == {443: True, 5432: False, listener: False}


@contextmanager
def flood(address: str, port: int) -> Iterator[list[bool]]:
    """Ask for connections from 32 threads without a pause while the block runs; the list says which were had."""
    got: list[bool] = []
    over = threading.Event()

    def knock() -> None:
        while not over.is_set():
            got.append(reaches(address, port, 0.3))

    with ThreadPoolExecutor(32) as pool:
        knocking = [pool.submit(knock) for _ in range(32)]
        try:
            yield got
        finally:
            over.set()
    assert [one.result() for one in knocking] == [None] * 32


def too_many(run: Run) -> int:
    """Return how many packets the rate limit of the probe's rule has dropped."""
    (line,) = (line for line in run(*TABLE).splitlines() if "probe: too many" in line)
    return int(line.partition("counter packets ")[2].split()[0])


@pytest.fixture
def other(address: str) -> Iterator[str]:
    """Another address of this machine on the host's network: the last one, which podman gives to nobody."""
    (route,) = json.loads(subprocess.check_output(["ip", "-json", "route", "get", address]))
    (link,) = json.loads(subprocess.check_output(["ip", "-json", "-4", "address", "show", route["dev"]]))
    network = ipaddress.ip_interface(f"{route['prefsrc']}/{link['addr_info'][0]['prefixlen']}").network
    found = str(network.broadcast_address - 1)
    subprocess.run(["ip", "address", "add", f"{found}/32", "dev", route["dev"]], check=True)
    yield found
    subprocess.run(["ip", "address", "delete", f"{found}/32", "dev", route["dev"]], check=True)


def test_a_port_is_open_to_its_sources_up_to_its_rate(
    run: Run, address: str, listener: int, playbook: Playbook, psql: Psql, show: Show, other: str
) -> None:
    own = socket.create_connection((address, 443)).getsockname()[0]
    rule = {"name": "probe", "port": PROBE, "sources": [own, other], "rate": f"{RATE}/second", "burst": BURST}
    done = playbook(firewall_rules=[rule, {"name": "closed", "port": 5432, "sources": [other]}])
    assert done.returncode == 0, done.stdout
    assert reaches(address, listener)
    assert not reaches(address, 5432)
    assert not reaches(address, 443)  # no rule of this run names it

    established = http.client.HTTPConnection(address, listener, timeout=30)
    established.connect()
    began = time.monotonic()
    with flood(address, listener) as knocks:
        wait_until(lambda: too_many(run), "the flood is at its limit")
        wait_until(lambda: knocks.count(False) > knocks.count(True) >= BURST / 2, "most are refused")
        others = [reaches(address, listener, 1.5, other) for _ in range(5)]
        established.request("GET", "/")
        answered = established.getresponse().status
    took, got, refused = time.monotonic() - began, knocks.count(True), knocks.count(False)
    allowed = BURST + RATE * (took + 1)
    rows = [
        ["connections of one address", f"{got} of {got + refused} in {took:.1f} s", f"at most {allowed:.0f}"],
        ["another address meanwhile", f"{sum(others)} of {len(others)}", "all"],
        ["an established connection meanwhile", str(answered), "200"],
    ]
    show("Firewall's rate limit", rows)
    assert got <= allowed
    assert (others, answered) == ([True] * 5, 200)
    assert psql("SELECT 1") == [["1"]]


@pytest.fixture
def over_ssh(run: Run, address: str, tmp_path: Path) -> Iterator[Path]:
    """An inventory that reaches the host through ssh, as real ones do."""
    key = tmp_path / "key"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)], check=True)
    run("mkdir", "-p", "-m", "0700", "/root/.ssh")
    run("tee", "/root/.ssh/authorized_keys", input=key.with_suffix(".pub").read_text())
    run("systemctl", "start", "ssh")
    public = run("cat", "/etc/ssh/ssh_host_ed25519_key.pub").split()[:2]
    (tmp_path / "known_hosts").write_text(f"{address} {' '.join(public)}\n")
    host = {
        "ansible_host": address,
        "ansible_connection": "ssh",
        "ansible_user": "root",
        "ansible_ssh_private_key_file": str(key),
        "ansible_ssh_common_args": f"-o UserKnownHostsFile={tmp_path}/known_hosts -o ConnectTimeout=2",
        "ansible_ssh_retries": 0,
    }
    groups = {name: {"hosts": {"gateway1": None}} for name in ("postgresql", "litellm")}
    inventory = tmp_path / "hosts.json"
    inventory.write_text(json.dumps({"all": {"hosts": {"gateway1": host}, "children": groups}}))
    yield inventory
    run("systemctl", "kill", "--kill-whom=all", "ssh")  # a connection that Ansible keeps would keep the unit loaded
    run("systemctl", "stop", "ssh")
    run("rm", "/root/.ssh/authorized_keys")


def test_rules_that_lock_ssh_out_are_taken_back(run: Run, address: str, playbook: Playbook, over_ssh: Path) -> None:
    before = rules(run)
    done = playbook(over_ssh, firewall_ssh_ports=[2222], firewall_rollback_after=14)
    assert done.returncode != 0
    assert "let no new connection of Ansible in" in done.stdout
    wait_until(lambda: reaches(address, 22), "the host takes the rules back")
    assert rules(run) == before
    assert "2222" not in run("cat", "/etc/litellm-gateway.nft")


def test_switched_off_its_rules_are_gone(run: Run, address: str, listener: int, playbook: Playbook) -> None:
    done = playbook(firewall_enabled=False)
    assert done.returncode == 0, done.stdout
    assert reaches(address, listener)
    assert "litellm_gateway" not in run("nft", "list", "tables")


def test_the_next_run_puts_the_rules_in_force_again(run: Run, address: str, listener: int, playbook: Playbook) -> None:
    done = playbook()
    assert done.returncode == 0, done.stdout
    assert not reaches(address, listener)
    assert reaches(address, 443)


def test_a_run_repairs_a_flushed_table(run: Run, address: str, listener: int, playbook: Playbook) -> None:
    before = rules(run)
    run("nft", "delete", "table", "inet", "litellm_gateway")
    assert reaches(address, listener)
    done = playbook()
    assert done.returncode == 0, done.stdout
    assert rules(run) == before
