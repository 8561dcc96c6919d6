"""The command: `python -m benchmarks`, with PostgreSQL 17's programs in /usr/lib/postgresql/17/bin or $PG_BINDIR.

It prints one table; every figure in it is a ratio of runs that took turns, or stands beside what it is measured by. A
figure that has to be kept and is not is marked, and makes the exit code 1.
"""

import argparse
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

sys.path.append(str(Path(__file__).parents[1] / "tests"))  # the fault proxy

from benchmarks import gateway, lookups, storing
from benchmarks.cluster import Cluster, running_cluster

#: Enough for a day's sums to be few.
_STORAGE_PAIRS = 50_000
#: Pairs that the limits of look-ups are for.
_LOOKUP_PAIRS = 10_000_000
PARTS = ("gateway", "storing", "lookups")


class Figure(NamedTuple):
    """A line of the table: what it is, its value, what it has to be, in words what it should be, its standard error."""

    name: str
    value: float
    digits: int = 0
    least: float | None = None
    most: float | None = None
    aim: str = ""
    error: float | None = None

    @property
    def is_kept(self) -> bool:
        """Whether the value is what it has to be, as it is shown."""
        shown = round(self.value, self.digits)
        return (self.least is None or shown >= self.least) and (self.most is None or shown <= self.most)

    def __str__(self) -> str:
        """Return the line."""
        limits = [f"{sign} {limit:g}" for sign, limit in ((">=", self.least), ("<=", self.most)) if limit is not None]
        text = ", ".join(part for part in (*limits, self.aim) if part)
        error = "" if self.error is None else f"+-{self.error:.{self.digits}f}"
        line = f"{self.name:<66} {self.value:>12.{self.digits}f}{error:<9} {text}{'' if self.is_kept else '  MISSED'}"
        return line.rstrip()


def main() -> int:
    """Run the parts asked for; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)} (default: all)")
    parser.add_argument("--pairs", type=int, default=10_000, help="pairs to store per run (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds, medians count (default: %(default)s)")
    parser.add_argument("--calls", type=int, default=1000, help="calls to each gateway (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=60, help="of load on each kind (default: %(default)s)")
    parser.add_argument("--rows", type=int, default=_LOOKUP_PAIRS, help="pairs to look up in (default: %(default)s)")
    parser.add_argument("--days", type=int, default=30, help="days that these pairs are spread over (default: 30)")
    options = parser.parse_args()
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"unknown part {unknown.pop()!r}: choose from {', '.join(PARTS)}")
    missed = 0
    with running_cluster() as cluster:
        for part in options.parts or PARTS:
            for figure in _REPORTS[part](cluster, options):
                print(figure, flush=True)
                missed += not figure.is_kept
    return 1 if missed else 0


def _storing(cluster: Cluster, options: argparse.Namespace) -> Iterator[Figure]:
    runs = storing.rounds(cluster, options.pairs, max(options.pairs // 25, 100), options.rounds)
    copy, writer, naive = (storing.median(runs[way]) for way in ("copy", "writer", "naive"))
    yield Figure("pairs/s, raw COPY of encoded rows", copy.pairs_per_second, aim="the limit")
    yield Figure("pairs/s, writer, drain of a full spool", writer.pairs_per_second, least=5000)
    yield Figure("pairs/s, naive: ORM and commit for each event", naive.pairs_per_second)
    ratio = storing.median_ratio(runs["writer"], runs["copy"], "pairs_per_second")
    yield Figure("pairs/s, writer to raw COPY", ratio, 2, least=0.5, aim="aim 0.8")
    for name, way in (("raw COPY", copy), ("writer", writer), ("naive", naive)):
        yield Figure(f"client's CPU s per 10,000 pairs, {name}", way.client_cpu, 2)
        yield Figure(f"server's CPU s per 10,000 pairs, {name}", way.server_cpu, 2)
    ratio = storing.median_ratio(runs["writer"], runs["naive"], "client_cpu")
    yield Figure("client's CPU, writer to naive", ratio, 3, most=0.25, aim="aim 0.1")
    yield Figure("memory of the writer, MB", writer.memory, most=80)
    spent = {"": storing.median(runs["fill"]), ", redacted": storing.run(cluster, "fill-redacted", 2000),
             ", failed by the provider": storing.run(cluster, "fill-failed", 2000)}  # fmt: skip
    for name, way in spent.items():
        microseconds = way.client_cpu * 100
        yield Figure(f"callback, microseconds of CPU per call{name}", microseconds, most=100, aim="0.5 % of 20 ms")
    yield from _storage(cluster)


def _storage(cluster: Cluster) -> Iterator[Figure]:
    cluster.empty()
    storing.run(cluster, "fill", _STORAGE_PAIRS)
    storing.run(cluster, "writer", _STORAGE_PAIRS)
    size = storing.storage(cluster)
    for part in ("bodies", "tables", "indexes"):
        yield Figure(f"bytes per pair: {part}", size[part])
    yield Figure("storage to bodies", (size["tables"] + size["indexes"]) / size["bodies"], 2, most=1)
    cluster.empty()


def _lookups(cluster: Cluster, options: argparse.Namespace) -> Iterator[Figure]:
    lookups.fill_tables(cluster, options.rows, options.days)
    for found in lookups.look_ups(cluster):
        name = f"{found.name}, ms of {options.rows} pairs in {options.days} days"
        yield Figure(name, found.milliseconds, 3, most=found.limit if options.rows >= _LOOKUP_PAIRS else None)
        yield Figure(f"{found.name}, without planning", found.execution, 3)
        yield Figure(f"{found.name}, in a prepared statement", found.prepared, 3)
    cluster.empty()


def _gateway(cluster: Cluster, options: argparse.Namespace) -> Iterator[Figure]:
    with gateway.running_bench(cluster) as bench:
        for state, toxics in gateway.STATES.items():
            bench.proxy.toxics = toxics
            bench.proxy.reset()
            yield from _latencies(bench, state, options)
            yield from _throughput(bench, state, options)
        alone = statistics.median(load.cpu_per_call for load in bench.loads("without"))
        yield Figure("CPU of a call in LiteLLM without a callback, microseconds", alone * 1e6)
        hooks = bench.hook_seconds()
        yield Figure("time in the log's hooks per call, by its own count, microseconds", hooks * 1e6)
        yield Figure("time in the log's hooks to LiteLLM's CPU, %", hooks / alone * 100, 2, most=0.5, aim="aim 0.2")
        spent = storing.run(cluster, "fill", 2000).client_cpu / 10_000  # into the same spool
        yield Figure("CPU of a call in the log, one behind the other: all in the caches, microseconds", spent * 1e6)
        yield Figure("memory added to the gateway, MB", bench.memory_added(), most=20)
        bench.proxy.toxics = gateway.STATES["up"]
        connections, transactions = bench.connections()
        yield Figure("connections of the gateway's host", connections, most=2, aim="aim 1")
        yield Figure("transactions that used an open connection, %", 100 * transactions, 2, least=99.9)


def _latencies(bench: gateway.Bench, state: str, options: argparse.Namespace) -> Iterator[Figure]:
    # the naive way waits for a database that is slow, call after call
    kinds = gateway.KINDS if state != "slow" else gateway.KINDS[:3]
    turns = bench.latencies(options.calls, kinds)
    for percent in (50, 99):
        alone = gateway.percentile(turns["without"], percent)
        yield Figure(f"database {state}: p{percent} of LiteLLM alone, ms", alone * 1000, 2)
        for kind in kinds[1:]:
            value, error = (part * 1000 for part in gateway.added(turns[kind], turns["without"], percent))
            limit = 1.0 if (kind, percent) == ("with", 99) else None
            name = f"database {state}: ms added to p{percent}, {_NAMES[kind]}"
            yield Figure(name, value, 2, most=limit, error=error)


def _throughput(bench: gateway.Bench, state: str, options: argparse.Namespace) -> Iterator[Figure]:
    loads = bench.throughputs(options.seconds)
    speeds = {kind: [load.calls_per_second for load in found] for kind, found in loads.items()}
    costs = {kind: [load.cpu_per_call for load in found] for kind, found in loads.items()}
    for name, kind, base, least in (
        ("log to LiteLLM alone", "with", "without", 0.98),
        ("log to an empty callback", "with", "empty", None),
        ("an empty callback to LiteLLM alone", "empty", "without", None),
    ):
        value, error = gateway.ratio(speeds[kind], speeds[base])
        yield Figure(f"database {state}: throughput, {name}", value, 3, least=least, error=error)
        value, error = gateway.ratio(costs[kind], costs[base])
        yield Figure(f"database {state}: CPU per call added, {name}, %", (value - 1) * 100, 2, error=error * 100)


#: Kinds of gateways, as the table calls them.
_NAMES = {"empty": "empty callback", "with": "log", "naive": "naive way"}
_REPORTS = {"gateway": _gateway, "storing": _storing, "lookups": _lookups}

if __name__ == "__main__":
    sys.exit(main())
