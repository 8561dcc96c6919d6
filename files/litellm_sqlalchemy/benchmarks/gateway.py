"""What the log adds to a gateway: LiteLLM without a callback, with an empty one, with the log, with the naive way.

What LiteLLM does for any callback is no cost of the log: the log stands beside the empty callback, and that one beside
none. One process is all three in turn (`benchmarks.switched`); the naive way has its own.

Latency: one request at a time, some to each kind in turn, so that whatever else the machine does meets all of them.
Throughput: as many as go through at once, one kind at a time, in turn. Turns are short, because a machine's pace
changes within seconds; how far they differ tells how sure a figure is. The database is up, slow or down meanwhile: its
connections go through a proxy. The gateways have a core of their own, which clients, provider, writer and PostgreSQL
do not use: what these do is no part of a call.
"""

import http.client
import itertools
import json
import math
import os
import random
import statistics
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import yaml
from faults.proxy import FaultProxy, Toxics, fault_proxy
from support.waiting import wait_until

from benchmarks.cluster import Cluster, free_port
from benchmarks.data import samples
from benchmarks.processes import cpu_ticks, memory
from litellm_sqlalchemy.spool import read_counters

KINDS = ("without", "empty", "with", "naive")
#: States of the database: what the proxy does. Slow: 0.5 s a piece, some seconds a transaction.
STATES = {"up": Toxics(), "slow": Toxics(latency=0.5), "down": Toxics(refuse=True)}
#: Processes; the first one is only there for its memory.
_CALLBACKS = {"alone": [], "switched": ["benchmarks.switched.logger"], "naive": ["benchmarks.naive.logger"]}
#: The first is the gateways', the others are everybody else's; a machine with one core has no choice.
_CORES = sorted(os.sched_getaffinity(0))
_KEY = "sk-benchmark-of-the-gateway"
_AT_ONCE = 8
#: Calls to a kind, and seconds of load on it, before it is another one's turn.
_TURN_CALLS, _TURN_SECONDS = 10, 1.0
#: Calls at the begin of a turn that do not count: a gateway does not become another one in production.
_FIRST_CALLS = 3
#: Times that turns are drawn to tell how far a percentile would be another one with other turns.
_DRAWS = 200
_HERE = Path(__file__).parents[1]


class Load(NamedTuple):
    """What a gateway did: calls per second, CPU seconds of its process per call."""

    calls_per_second: float
    cpu_per_call: float


class Gateway:
    """One LiteLLM process with one worker, whose provider answers at once."""

    def __init__(self, kind: str, cluster: Cluster, settings: Path, upstream: int) -> None:
        """Start it; `upstream` is the provider's port."""
        self.kind = kind
        self._turned_to = ""
        self.port = free_port()
        directory = cluster.directory / f"gateway-{kind}"
        directory.mkdir()
        configuration = {
            "model_list": [
                {
                    "model_name": "mock",
                    "litellm_params": {
                        "model": "openai/mock",
                        "api_key": "none",
                        "api_base": f"http://127.0.0.1:{upstream}/v1",
                    },
                }
            ],
            "litellm_settings": {"callbacks": _CALLBACKS[kind], "global_disable_no_log_param": True},
            "general_settings": {"master_key": "os.environ/LITELLM_MASTER_KEY"},
        }
        (directory / "config.yaml").write_text(yaml.safe_dump(configuration))
        environment = {
            **os.environ, "PYTHONPATH": f"{_HERE}:{_HERE / 'src'}", "LITELLM_MASTER_KEY": _KEY,
            "LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_TELEMETRY_DISABLED": "true",
            "LITELLM_SQLALCHEMY_SETTINGS": str(settings),
        }  # fmt: skip
        command = [Path(sys.executable).with_name("litellm"), "--config", "config.yaml", "--host", "127.0.0.1"]
        self._log = directory / "log"
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(
                [*command, "--port", str(self.port)], cwd=directory, env=environment, stdout=log, stderr=log
            )
        os.sched_setaffinity(self.process.pid, _CORES[:1])

    def wait(self) -> None:
        """Return when it serves."""
        deadline = time.monotonic() + 180
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health/liveliness", timeout=2):
                    return
            except OSError:
                time.sleep(0.5)
        raise SystemExit(f"the gateway ({self.kind}) does not serve: {self._log.read_text()[-2000:]}")

    def turn_to(self, kind: str) -> None:
        """Make it a gateway of a kind."""
        if kind != self._turned_to:
            url = f"http://127.0.0.1:{self.port}/switch/{kind}"
            urllib.request.urlopen(urllib.request.Request(url, method="PUT"), timeout=30).close()
            self._turned_to = kind

    def connect(self) -> http.client.HTTPConnection:
        """Return a connection that is kept open."""
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)

    def cpu_seconds(self) -> float:
        """Return the CPU time of the process."""
        return float(sum(cpu_ticks(self.process.pid, (13, 14))) / os.sysconf("SC_CLK_TCK"))

    def memory(self) -> float:
        """Return the resident memory in megabytes."""
        return memory(self.process.pid, "VmRSS")

    def stop(self) -> None:
        """End the process."""
        self.process.terminate()
        self.process.wait(60)


def call(connection: http.client.HTTPConnection, body: bytes) -> float:
    """Make a call; return its seconds."""
    started = time.perf_counter()
    headers = {"Authorization": f"Bearer {_KEY}", "Content-Type": "application/json"}
    connection.request("POST", "/v1/chat/completions", body, headers)
    answer = connection.getresponse()
    content = answer.read()
    seconds = time.perf_counter() - started
    if answer.status != 200:
        raise SystemExit(f"the gateway answered {answer.status}: {content[:300]!r}")
    return seconds


class Bench:
    """The gateways and the writer, behind a proxy to the database."""

    def __init__(self, cluster: Cluster, proxy: FaultProxy) -> None:
        """Start all."""
        self.proxy = proxy
        self._cluster = cluster
        self._monitor = f"127.0.0.1:{free_port()}"
        settings = cluster.write_settings(
            "gateway.yml", database={"port": proxy.port, "connect_timeout": 2}, writer={"listen": self._monitor}
        )
        self.spool = cluster.settings.spool.directory
        port = free_port()
        self._upstream = subprocess.Popen([sys.executable, "-m", "benchmarks.upstream", str(port)], cwd=_HERE)
        self._gateways = {kind: Gateway(kind, cluster, settings, port) for kind in _CALLBACKS}
        for gateway in self._gateways.values():
            gateway.wait()
        environment = {**os.environ, "PYTHONPATH": str(_HERE / "src"), "LITELLM_SQLALCHEMY_SETTINGS": str(settings)}
        with (cluster.directory / "writer.log").open("ab") as log:
            self._writer = subprocess.Popen(
                [sys.executable, "-m", "litellm_sqlalchemy", "write"], env=environment, stdout=log, stderr=log
            )
        self._bodies = [
            json.dumps({**json.loads(sample.request), "model": "mock"}).encode() for sample in samples(200, 3)
        ]
        self._loads: dict[str, list[Load]] = {kind: [] for kind in KINDS}
        for kind in ("alone", *KINDS):  # what LiteLLM loads at its first calls
            self._throughput(kind, 3)

    def stop(self) -> None:
        """End all."""
        for gateway in self._gateways.values():
            gateway.stop()
        for process in (self._writer, self._upstream):
            process.terminate()
            process.wait(90)

    def latencies(self, calls: int, kinds: tuple[str, ...]) -> dict[str, list[list[float]]]:
        """Return the seconds of `calls` calls to each kind, which take turns, by turn."""
        turns: dict[str, list[list[float]]] = {kind: [] for kind in kinds}
        for first in range(0, calls, _TURN_CALLS):
            for kind in kinds if first // _TURN_CALLS % 2 else reversed(kinds):
                connection = self._gateway(kind).connect()
                for _ in range(_FIRST_CALLS):
                    call(connection, self._bodies[-1])
                numbers = range(first, min(first + _TURN_CALLS, calls))
                turns[kind].append([call(connection, self._bodies[number % len(self._bodies)]) for number in numbers])
                connection.close()
        return turns

    def throughputs(self, duration: float) -> dict[str, list[Load]]:
        """Keep each kind but the naive one busy for `duration` seconds in all, in turns."""
        kinds = KINDS[:3]
        found: dict[str, list[Load]] = {kind: [] for kind in kinds}
        for number in range(int(duration / _TURN_SECONDS)):
            for kind in kinds if number % 2 else reversed(kinds):
                found[kind].append(self._throughput(kind, _TURN_SECONDS))
                self._loads[kind].append(found[kind][-1])
        return found

    def memory_added(self) -> float:
        """Return by how many megabytes the process with the log is larger than the one without a callback."""
        return self._gateways["switched"].memory() - self._gateways["alone"].memory()

    def _gateway(self, kind: str) -> Gateway:
        """Return the process that is a gateway of this kind now."""
        if kind in KINDS[:3]:
            self._gateways["switched"].turn_to(kind)
            return self._gateways["switched"]
        return self._gateways[kind]

    def loads(self, kind: str) -> list[Load]:
        """Return what a gateway did so far."""
        return self._loads[kind]

    def _throughput(self, kind: str, duration: float) -> Load:
        """Keep `_AT_ONCE` calls at a gateway for `duration` seconds."""
        gateway, done, deadline = self._gateway(kind), [0] * _AT_ONCE, time.monotonic() + duration

        def client(place: int) -> None:
            connection = gateway.connect()
            while time.monotonic() < deadline:
                call(connection, self._bodies[done[place] % len(self._bodies)])
                done[place] += 1
            connection.close()

        started, cpu = time.monotonic(), gateway.cpu_seconds()
        threads = [threading.Thread(target=client, args=(place,)) for place in range(_AT_ONCE)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        calls = sum(done)
        return Load(calls / (time.monotonic() - started), (gateway.cpu_seconds() - cpu) / max(calls, 1))

    def hook_seconds(self) -> float:
        """Return the time per call that the log's hooks count themselves."""
        (folder,) = (self.spool / "producers").glob("[!.]*")
        hooks = read_counters(folder).hooks  # some seconds old
        return hooks.seconds / hooks.calls

    def connections(self) -> tuple[int, float]:
        """Return how many connections the writer has, once all is stored, and the part of commits without a new one."""
        self.proxy.reset()
        before = self._metrics()
        for _ in range(20):
            self._throughput("with", 1)
        wait_until(lambda: not self._metrics()["spool_oldest_timestamp_seconds"], "all is stored", 60)
        opened, commits = (
            self._metrics()[name] - before[name] for name in ("connections_total", "commit_seconds_count")
        )
        query = "SELECT count(*) FROM pg_stat_activity WHERE usename = 'litellm_writer_a'"
        ((connections,),) = self._cluster.query(query)
        return int(connections), 1 - max(opened - 1, 0) / commits  # one is the reset's

    def _metrics(self) -> dict[str, float]:
        with urllib.request.urlopen(f"http://{self._monitor}/metrics", timeout=10) as answer:
            lines = [line.rpartition(" ") for line in answer.read().decode().splitlines() if line[:1] != "#"]
        return {name.removeprefix("litellm_sqlalchemy_"): float(value) for name, _, value in lines}


@contextmanager
def running_bench(cluster: Cluster) -> Iterator[Bench]:
    """Yield gateways that are stopped in the end."""
    os.sched_setaffinity(0, _CORES[1:] or _CORES)
    for process in cluster.processes():
        os.sched_setaffinity(process, _CORES[1:] or _CORES)
    with fault_proxy(cluster.settings.database.port) as proxy:
        bench = Bench(cluster, proxy)
        try:
            yield bench
        finally:
            bench.stop()
            os.sched_setaffinity(0, _CORES)


class Estimate(NamedTuple):
    """A value, and its standard error."""

    value: float
    error: float


def percentile(turns: list[list[float]], percent: int) -> float:
    """Return a percentile of all that was measured in some turns."""
    return statistics.quantiles(itertools.chain.from_iterable(turns), n=100)[percent - 1]


def added(turns: list[list[float]], base: list[list[float]], percent: int) -> Estimate:
    """Return by how much a percentile is above that of `base`, whose turns were taken beside these."""
    value = percentile(turns, percent) - percentile(base, percent)
    pairs = list(zip(turns, base, strict=True))
    chance = random.Random(0)
    draws = (zip(*chance.choices(pairs, k=len(pairs)), strict=True) for _ in range(_DRAWS))
    differences = [percentile(list(ours), percent) - percentile(list(others), percent) for ours, others in draws]
    return Estimate(value, statistics.stdev(differences))


def ratio(values: Iterable[float], base: Iterable[float]) -> Estimate:
    """Return the mean ratio (geometric) of the values of turns to those that were taken beside them."""
    logarithms = [math.log(one / other) for one, other in zip(values, base, strict=True)]
    mean = math.exp(statistics.fmean(logarithms))
    return Estimate(mean, mean * statistics.stdev(logarithms) / math.sqrt(len(logarithms)))
