"""A soak: random faults at once, for as many events as the command line says, and the invariants at its end.

The events are driven at the callback, which takes thousands of calls a second where LiteLLM takes some ten. Beside them
clients make real calls to a real gateway with the same server.

pytest tests/integration/test_soak.py --events 1000000 --seed 7
"""

import contextlib
import random
import secrets
import subprocess
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from faults.disks import file_system
from faults.proxy import FaultProxy, Toxics, fault_proxy
from faults.syscalls import python
from support.gateway import Gateway
from support.keys import USER_KEY
from support.oracle import check
from support.postgresql import Database, Server
from support.processes import Deployment, WriterProcess
from support.records import Ledger, NotingProducer, make_calls
from support.send import read_ledger
from support.waiting import wait_until

from litellm_sqlalchemy.recorder import Recorder
from litellm_sqlalchemy.status import spool_status

_CALLS_AT_ONCE = 250
_CLIENTS = 8
_REAL_CALLS = 2000


@pytest.fixture
def proxy(server: Server, deployment: Deployment) -> Iterator[FaultProxy]:
    """A proxy that the deployment's settings point at; the spool is on a disk that can be filled."""
    with fault_proxy(server.port) as proxy, file_system(1024) as disk:
        deployment.update(database={"port": proxy.port, "connect_timeout": 2}, writer={"statement_timeout": 5})
        deployment.update(spool={"directory": str(disk), "segment_size": 1024 * 1024, "retain": 10, "reserve": 0})
        yield proxy


class Faults:
    """Breaks something, and mends it before the next."""

    def __init__(self, server: Server, deployment: Deployment, proxy: FaultProxy, writer: WriterProcess) -> None:
        self.server, self.deployment, self.proxy, self.writer = server, deployment, proxy, writer
        self.kinds: list[Callable[[], None]] = [
            self.reset, self.reset, self.reset, self.slow, self.mend, self.mend, self.partition,
            self.kill_writer, self.stop_writer, self.restart_server,
            self.kill_server, self.kill_gateway, self.kill_gateway, self.terminate_backends,
            self.fill_disk, self.rotate_password, self.requeue,
        ]  # fmt: skip
        self.dealt: list[Callable[[], None]] = []
        self.seen: dict[str, int] = {}
        self.senders: list[tuple[subprocess.Popen[bytes], Path]] = []
        self.ballast = deployment.spool / "ballast"

    def inject(self, source: random.Random) -> None:
        """Do one of them; each kind comes before any comes again."""
        if not self.dealt:
            self.dealt = source.sample(self.kinds, len(self.kinds))
        self.ballast.unlink(missing_ok=True)
        fault = self.dealt.pop()
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

    def fill_disk(self) -> None:
        with self.ballast.open("wb") as ballast, contextlib.suppress(OSError):
            while True:
                ballast.write(bytes(1024 * 1024))
                ballast.flush()

    def rotate_password(self) -> None:
        password = secrets.token_hex(8)
        self.server.execute(f"ALTER ROLE litellm_writer_a PASSWORD '{password}'")
        self.deployment.write_credential("writer", password)

    def requeue(self) -> None:
        assert self.deployment.run("dead-letters", "requeue").returncode in (0, 6), "6: nothing can be written now"

    def kill_gateway(self) -> None:
        """Kill the sender that runs, and start another one."""
        if self.senders:
            self.senders[-1][0].kill()
        file = self.deployment.directory / f"ledger-{len(self.senders)}"
        command = python("send.py", str(self.deployment.file), "2000", str(file))
        self.senders.append((subprocess.Popen(command, env=self.deployment.test_environment), file))
        wait_until(file.exists, "the sender sends")

    def end(self) -> list[Ledger]:
        """Mend all; return what the killed senders have noted."""
        self.mend()
        self.ballast.unlink(missing_ok=True)
        self.server.execute(f"ALTER ROLE litellm_writer_a PASSWORD '{self.server.passwords['writer']}'")
        self.deployment.write_credential("writer", self.server.passwords["writer"])
        for process, _ in self.senders:
            process.kill()
            process.wait(10)
        return [read_ledger(file) for _, file in self.senders]


class RealCalls:
    """Calls of several clients to a real gateway, from now until `end`."""

    def __init__(self, gateway: Gateway) -> None:
        """Take the gateway."""
        self.url = gateway.url
        self.ids: list[str] = []
        self.failed: list[str] = []
        self._end = threading.Event()
        self._pool = ThreadPoolExecutor(_CLIENTS)
        self._clients = [self._pool.submit(self._call) for _ in range(_CLIENTS)]

    def end(self, enough: int, seconds: float) -> None:
        """Return when `enough` calls are made, or after `seconds`."""
        until = time.monotonic() + seconds
        while len(self.ids) < enough and not self._end.wait(0.2) and time.monotonic() < until:
            pass
        self._end.set()
        for client in self._clients:
            client.result(60)
        self._pool.shutdown()

    def _call(self) -> None:
        headers = {"authorization": f"Bearer {USER_KEY}"}
        body = {"model": "ok", "messages": [{"role": "user", "content": "soak"}]}
        with httpx.Client(base_url=self.url, headers=headers, timeout=60) as http:
            while not self._end.is_set():
                call_id = f"soak-{uuid.uuid4()}"
                answer = http.post("/v1/chat/completions", json=body, headers={"x-litellm-call-id": call_id})
                (self.ids if answer.status_code == 200 else self.failed).append(call_id)


def _odd(database: Database, *, refused: bool) -> None:
    """Let the tables refuse calls of a model, or take them again."""
    change = "ADD CONSTRAINT no_odd CHECK (model <> 'odd')" if refused else "DROP CONSTRAINT no_odd"
    database.execute(f"ALTER TABLE requests {change}")


@pytest.mark.timeout(3600)
def test_soak(
    pytestconfig: pytest.Config, server: Server, database: Database, deployment: Deployment, proxy: FaultProxy,
    writer: WriterProcess, gateway: Gateway, gateway_database: Database,
) -> None:  # fmt: skip
    events, seed = pytestconfig.getoption("--events"), pytestconfig.getoption("--seed")
    source, ledger, settings = random.Random(seed), Ledger(), deployment.load()
    faults = Faults(server, deployment, proxy, writer)
    recorders = [Recorder(settings, NotingProducer(settings.spool, ledger)) for _ in range(3)]
    real = RealCalls(gateway)
    _odd(database, refused=True)
    writer.start()
    started, rounds, peak = time.monotonic(), 0, 0.0
    while ledger.received < events:
        for recorder in recorders:
            make_calls(recorder, _CALLS_AT_ONCE)
        make_calls(source.choice(recorders), 1, model="odd")
        rounds += 1
        peak = max(peak, writer.resident_megabytes())
        if rounds % 3 == 0:
            faults.inject(source)
        if source.random() < 0.05:
            recorders.pop(0).producer.close()
            recorders.append(Recorder(settings, NotingProducer(settings.spool, ledger)))
    for recorder in recorders:
        recorder.producer.close()
    ledger.merge(faults.end())
    real.end(enough=_REAL_CALLS, seconds=600)  # their threads would hold up the proxy's, which the drain goes through
    writer.kill()
    writer.start()
    healed = time.monotonic()
    wait_until(lambda: spool_status(deployment.spool).spooled == 0, "drained after healing", 60 + events / 2000, 0.5)
    drained = time.monotonic() - healed
    _odd(database, refused=False)
    dead = check(ledger, database, deployment.spool, killed=True).dead
    assert deployment.run("dead-letters", "requeue").stdout == f"{dead} dead letters requeued\n"
    wait_until(lambda: not list((deployment.spool / "producers").iterdir()), "ended producers leave nothing")
    status = check(ledger, database, deployment.spool, killed=True)
    assert real.failed == []
    assert len(real.ids) >= _REAL_CALLS
    found = "SELECT call_id FROM requests JOIN responses ON request_id = id WHERE call_id LIKE 'soak-%'"
    wait_until(lambda: len(gateway_database.query(found)) >= len(real.ids), "the real calls are stored", 60, 0.5)
    assert sorted(call for (call,) in gateway_database.query(found)) == sorted(real.ids)
    print(
        f"\n{status.received} events, {len(real.ids)} real calls, {healed - started:.0f} s, drained {drained:.0f} s "
        f"after, {status.duplicates} delivered again, {status.interrupted} interrupted, {dead} dead and requeued, "
        f"{status.dropped} dropped on a full disk, writer {peak:.0f} MB, faults {faults.seen}, seed {seed}"
    )
    assert faults.seen.keys() == {kind.__name__ for kind in faults.kinds}, "too few events for all faults"
    assert (status.spooled, status.dead, status.damaged) == (0, 0, 0), f"seed {seed}"
    assert 0 <= status.dropped - ledger.dropped <= len(faults.senders), "a killed sender may not have noted its last"
    assert peak <= 80
    assert dead > 0
