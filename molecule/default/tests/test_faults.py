"""The writer's unit under faults that only systemd answers, with the sandbox and the limits that a host has."""

import json
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import CONTAINER, wait_until
from podman_pipelined import inside

Run = Callable[..., str]
Psql = Callable[..., list[list[str]]]
Send = Callable[..., tuple[set[str], int]]
Stored = Callable[[set[str]], int]

WRITER = "litellm-log-writer.service"
SPOOL = "/var/spool/litellm-sqlalchemy"
SETTINGS = "/etc/litellm-sqlalchemy/settings.yml"
RECORDS = Path(__file__).parents[3] / "files/litellm_sqlalchemy/tests/support/records.py"
#: Appends the pairs of calls to a spool, as a gateway's process does.
SEND = """
import sys
from litellm_sqlalchemy.settings import load_settings
settings, ledger = load_settings(), Ledger()
producer, payload = Producer(settings.spool), orjson.dumps("x" * int(sys.argv[2]))
for _ in range(int(sys.argv[1])):
    call = uuid7().hex
    sent = ledger.append(producer, Kind.REQUEST, call, request(call, gateway=settings.gateway.name), payload)
    if sent:
        ledger.append(producer, Kind.RESPONSE, call, response(call), payload)
producer.close()
ids = [call for kind, call in ledger.acknowledged if kind is Kind.RESPONSE]
print(orjson.dumps([ids, ledger.dropped]).decode())
"""
#: Starts a unit with less memory than Python needs. Where control groups are of version 1 and systemd has no say over
#: memory, its process is moved to a group with that limit; the next one has no limit.
START_WITHOUT_MEMORY = """
set -eu
group=/sys/fs/cgroup/memory/faults
if [ -e /sys/fs/cgroup/cgroup.controllers ]; then
    systemctl set-property --runtime "$1" MemoryMax=24M
    exec systemctl start --no-block "$1"
fi
mkdir -p $group
echo 24M > $group/memory.limit_in_bytes
systemctl start --no-block "$1"
until pid=$(systemctl show --value --property=MainPID "$1") && [ "$pid" != 0 ]; do :; done
echo "$pid" > $group/cgroup.procs
"""
KILLED_FOR_MEMORY = """
grep -s '^oom_kill [1-9]' /sys/fs/cgroup/memory/faults/memory.oom_control ||
    journalctl --unit="$1" --since=-2min --output=cat | grep "'oom-kill'"
"""


@pytest.fixture(autouse=True)
def nothing_is_lost(run: Run) -> Iterator[None]:
    """Ask `status`, which ends with 1 when anything is lost or doubled, after every test."""
    yield
    run("litellm-sqlalchemy", "status")


@pytest.fixture
def send(run: Run) -> Send:
    """`send(calls, size=100, settings=SETTINGS)` returns the calls in the spool, and the number of frames dropped."""

    def send_calls(calls: int, size: int = 100, settings: str = SETTINGS) -> tuple[set[str], int]:
        output = run(
            "systemd-run", "--quiet", "--pipe", "--wait", "--uid=litellm",
            "--property=SupplementaryGroups=litellm-spool", "--property=UMask=0007",
            f"--setenv=LITELLM_SQLALCHEMY_SETTINGS={settings}",
            "/opt/litellm-sqlalchemy/current/bin/python", "-", str(calls), str(size),
            input=RECORDS.read_text() + SEND,
        )  # fmt: skip
        ids, dropped = json.loads(output)
        return set(ids), int(dropped)

    return send_calls


@pytest.fixture
def stored(psql: Psql) -> Stored:
    """`stored(ids)` returns how many of the calls have both rows."""

    def count(ids: set[str]) -> int:
        listed = ",".join(f"'{identifier}'" for identifier in sorted(ids))  # too long for a command line
        statement = f"SELECT count(*) FROM requests JOIN responses ON request_id = id WHERE id IN ({listed})"
        return int(psql(statement)[0][0])

    return count


def show(run: Run, name: str) -> str:
    return run("systemctl", "show", "--value", f"--property={name}", WRITER).strip()


@contextmanager
def overridden(run: Run, *lines: str) -> Iterator[None]:
    """Restart the writer with other settings of its unit, and with its own at the end."""
    drop_in = f"/run/systemd/system/{WRITER}.d/faults.conf"
    run("install", "-D", "/dev/stdin", drop_in, input="\n".join(["[Service]", *lines]))
    run("systemctl", "daemon-reload")
    try:
        run("systemctl", "restart", WRITER)
        yield
    finally:
        run("rm", drop_in)
        run("systemctl", "daemon-reload")
        run("systemctl", "restart", WRITER)


@contextmanager
def responses_held() -> Iterator[None]:
    """Keep everybody from adding responses while the block runs."""
    command = [*inside(CONTAINER), "runuser", "-u", "postgres", "--", "psql", "-Atq", "litellm"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as session:
        assert session.stdin is not None
        assert session.stdout is not None
        session.stdin.write("BEGIN; LOCK TABLE responses IN EXCLUSIVE MODE; SELECT 'held';\n")
        session.stdin.flush()
        assert session.stdout.readline() == "held\n"
        yield


@pytest.mark.parametrize("name", ["TERM", "KILL"])
def test_a_signal_with_ten_thousand_queued(name: str, run: Run, psql: Psql, send: Send, stored: Stored) -> None:
    run("systemctl", "stop", WRITER)
    ids, _ = send(5000)
    assert len(ids) == 5000
    waiting = "SELECT pid FROM pg_locks WHERE relation = 'responses'::regclass AND NOT granted"
    with responses_held():
        run("systemctl", "start", WRITER)
        first = show(run, "MainPID")
        wait_until(lambda: psql(waiting), "the writer is in the middle of its first batch")
        started = time.monotonic()
        run("kill", f"-{name}", first)
        assert stored(ids) == 0
    wait_until(lambda: show(run, "MainPID") != first, "it ends")
    assert time.monotonic() - started < 30, "a third of TimeoutStopSec"
    wait_until(lambda: stored(ids) == 5000, "systemd starts another one, which delivers the rest, once")


def test_a_frozen_writer_is_restarted_by_the_watchdog(run: Run, send: Send, stored: Stored) -> None:
    with overridden(run, "WatchdogSec=5"):
        frozen = show(run, "MainPID")
        run("kill", "-STOP", frozen)
        ids, _ = send(50)
        wait_until(lambda: show(run, "MainPID") not in ("0", frozen), "systemd starts another one")
        wait_until(lambda: stored(ids) == 50, "the other one delivers")
        assert "Watchdog timeout" in run("journalctl", f"--unit={WRITER}", "--since=-2min", "--output=cat")


def test_a_writer_at_its_memory_limit_is_restarted(run: Run, send: Send, stored: Stored) -> None:
    usual, restarts = show(run, "MemoryMax"), int(show(run, "NRestarts"))
    run("systemctl", "stop", WRITER)
    ids, _ = send(500)
    run("sh", "-c", START_WITHOUT_MEMORY, "sh", WRITER)
    try:
        wait_until(lambda: int(show(run, "NRestarts")) > restarts, "it is killed and started again")
        assert run("sh", "-c", KILLED_FOR_MEMORY, "sh", WRITER)
    finally:
        run("systemctl", "set-property", "--runtime", WRITER, f"MemoryMax={usual}")
    wait_until(lambda: stored(ids) == 500, "the rest is delivered, once")


def test_a_full_disk_under_the_sandbox(run: Run, send: Send, stored: Stored) -> None:
    directory, settings = "/run/faults/spool", "/run/faults/settings.yml"
    run("install", "--directory", directory)
    run("mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", directory)
    try:
        run("chown", "litellm-logger:litellm-spool", directory)
        run("chmod", "2770", directory)
        # a name of its own: the counters of a spool are compared with the rows of its gateway
        run("sh", "-c", f"(sed 's,{SPOOL},{directory},' {SETTINGS}; echo 'gateway: {{name: faults}}') > {settings}")
        ids, dropped = send(100, size=20_000, settings=settings)
        assert dropped > 0
        with overridden(run, f"Environment=LITELLM_SQLALCHEMY_SETTINGS={settings}", f"ReadWritePaths={directory}"):
            wait_until(lambda: stored(ids) == len(ids), "the writer makes room on a disk without any")
            more, none = send(10, size=20_000, settings=settings)
            wait_until(lambda: stored(more) == len(more) == 10, "there is room again")
            seen = json.loads(run("litellm-sqlalchemy", "status", "--settings", settings, "--json", check=False))
            assert (none, seen["dropped"], seen["dead"], seen["damaged"]) == (0, dropped, 0, 0)
    finally:
        run("umount", "--lazy", directory)
        run("rm", "-r", "/run/faults")
