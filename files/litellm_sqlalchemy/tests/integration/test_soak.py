"""A soak: random faults at once, for as many events as the command line says, and the invariants at its end.

pytest tests/integration/test_soak.py --events 1000000 --seed 7
"""

import random
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from faults.proxy import FaultProxy, Toxics, fault_proxy
from faults.syscalls import python
from support.oracle import check
from support.postgresql import Database, Server
from support.processes import Deployment, WriterProcess
from support.records import Ledger
from support.send import read_ledger
from support.waiting import wait_until

from litellm_sqlalchemy.spool import Producer
from litellm_sqlalchemy.status import spool_status

_CALLS_AT_ONCE = 250


@pytest.fixture
def proxy(server: Server, deployment: Deployment) -> Iterator[FaultProxy]:
    """A proxy that the deployment's settings point at."""
    with fault_proxy(server.port) as proxy:
        deployment.update(database={"port": proxy.port, "connect_timeout": 2}, spool={"segment_size": 1024 * 1024})
        deployment.update(writer={"statement_timeout": 5})
        yield proxy


class Faults:
    """Breaks something, and mends it before the next."""

    def __init__(self, server: Server, deployment: Deployment, proxy: FaultProxy, writer: WriterProcess) -> None:
        self.server, self.deployment, self.proxy, self.writer = server, deployment, proxy, writer
        self.seen: dict[str, int] = {}
        self.senders: list[tuple[subprocess.Popen[bytes], Path]] = []

    def inject(self, source: random.Random) -> None:
        """Do one of them."""
        faults: list[Callable[[], None]] = [
            self.reset, self.reset, self.reset, self.slow, self.mend, self.mend, self.partition,
            self.kill_writer, self.stop_writer, self.restart_server,
            self.kill_server, self.kill_gateway, self.kill_gateway, self.terminate_backends,
        ]  # fmt: skip
        fault = source.choice(faults)
        self.seen[fault.__name__] = self.seen.get(fault.__name__, 0) + 1
        fault()

    def reset(self) -> None:
        self.proxy.reset()

    def slow(self) -> None:
        self.proxy.toxics = Toxics(latency=0.01, slice=8192)

    def partition(self) -> None:
        self.proxy.toxics = Toxics(frozen=True)

    def mend(self) -> None:
        self.proxy.toxics = Toxics()

    def kill_writer(self) -> None:
        self.writer.kill()
        self.writer.start()

    def stop_writer(self) -> None:
        assert self.writer.stop() == 0
        self.writer.start()

    def restart_server(self) -> None:
        self.server.restart()

    def kill_server(self) -> None:
        self.server.kill()
        self.server.start()

    def terminate_backends(self) -> None:
        self.server.query("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'litellm_writer_a'")

    def kill_gateway(self) -> None:
        """Kill the sender that runs, and start another one."""
        if self.senders:
            self.senders[-1][0].kill()
        file = self.deployment.directory / f"ledger-{len(self.senders)}"
        tests = str(Path(__file__).parents[1])
        environment = self.deployment.environment
        environment["PYTHONPATH"] += f":{tests}"
        command = python("send.py", str(self.deployment.file), "2000", str(file))
        self.senders.append((subprocess.Popen(command, env=environment), file))
        wait_until(file.exists, "the sender sends")

    def end(self) -> list[Ledger]:
        """Mend all; return what the killed senders have noted."""
        self.mend()
        for process, _ in self.senders:
            process.kill()
            process.wait(10)
        return [read_ledger(file) for _, file in self.senders]


@pytest.mark.timeout(3600)
def test_soak(
    pytestconfig: pytest.Config, server: Server, database: Database, deployment: Deployment, proxy: FaultProxy,
    writer: WriterProcess,
) -> None:  # fmt: skip
    events, seed = pytestconfig.getoption("--events"), pytestconfig.getoption("--seed")
    source = random.Random(seed)
    faults = Faults(server, deployment, proxy, writer)
    producers = [Producer(deployment.load().spool) for _ in range(3)]
    ledger = Ledger()
    writer.start()
    started, rounds = time.monotonic(), 0
    while ledger.received < events:
        for producer in producers:
            ledger.send(producer, _CALLS_AT_ONCE)
        rounds += 1
        if rounds % 3 == 0:
            faults.inject(source)
        if source.random() < 0.05:
            producers.pop(0).close()
            producers.append(Producer(deployment.load().spool))
    for producer in producers:
        producer.close()
    ledger.merge(faults.end())
    writer.kill()
    writer.start()
    healed = time.monotonic()
    wait_until(lambda: spool_status(deployment.spool).spooled == 0, "drained after healing", 60 + events / 2000, 0.5)
    wait_until(lambda: not list((deployment.spool / "producers").iterdir()), "ended producers leave nothing", 60)
    status = check(ledger, database, deployment.spool, killed=True)
    print(
        f"\n{status.received} events in {healed - started:.0f} s, drained {time.monotonic() - healed:.0f} s after, "
        f"{status.duplicates} delivered again, {status.interrupted} interrupted, faults {faults.seen}, seed {seed}"
    )
    assert (status.spooled, status.dead, status.damaged) == (0, 0, 0), f"seed {seed}"
    assert status.dropped == ledger.dropped == 0
