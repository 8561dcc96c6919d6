"""The command: `python -m benchmarks`, with PostgreSQL 17's programs in /usr/lib/postgresql/17/bin or $PG_BINDIR.

It prints one table; every figure in it is a ratio of runs that took turns, or stands beside what it is measured by.
"""

import argparse
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "tests"))  # the fault proxy

from benchmarks import gateway, lookups, storing
from benchmarks.cluster import Cluster, running_cluster

#: Enough for the hash index not to stand half empty after it has doubled, and for a day's sums to be few.
_STORAGE_PAIRS = 50_000
PARTS = ("gateway", "storing", "lookups")


def main() -> None:
    """Run the parts asked for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)} (default: all)")
    parser.add_argument("--pairs", type=int, default=10_000, help="pairs to store per run (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds, medians count (default: %(default)s)")
    parser.add_argument("--calls", type=int, default=1000, help="calls to each gateway (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=10, help="of a throughput run (default: %(default)s)")
    parser.add_argument("--rows", type=int, default=200_000, help="pairs to look up in (default: %(default)s)")
    parser.add_argument("--days", type=int, default=30, help="days that these pairs are spread over (default: 30)")
    options = parser.parse_args()
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"unknown part {unknown.pop()!r}: choose from {', '.join(PARTS)}")
    with running_cluster() as cluster:
        for part in options.parts or PARTS:
            for name, value, limit in _REPORTS[part](cluster, options):
                print(f"{name:<58} {value:>12}  {limit}", flush=True)


def _storing(cluster: Cluster, options: argparse.Namespace) -> Iterator[tuple[str, str, str]]:
    runs = storing.rounds(cluster, options.pairs, max(options.pairs // 25, 100), options.rounds)
    copy, writer, naive = (storing.median(runs[way]) for way in ("copy", "writer", "naive"))
    yield "pairs/s, raw COPY of encoded rows", f"{copy.pairs_per_second:.0f}", "the limit"
    yield "pairs/s, writer, drain of a full spool", f"{writer.pairs_per_second:.0f}", ">= 5000"
    yield "pairs/s, naive: ORM and commit for each event", f"{naive.pairs_per_second:.0f}", ""
    ratio = storing.median_ratio(runs["writer"], runs["copy"], "pairs_per_second")
    yield "pairs/s, writer to raw COPY", f"{ratio:.2f}", ">= 0.5, aim 0.8"
    for name, way in (("raw COPY", copy), ("writer", writer), ("naive", naive)):
        cpu = f"{way.client_cpu:.2f} + {way.server_cpu:.2f}"
        yield f"CPU s per 10,000 pairs, client + server, {name}", cpu, ""
    ratio = storing.median_ratio(runs["writer"], runs["naive"], "client_cpu")
    yield "client CPU, writer to naive", f"{ratio:.3f}", "<= 0.25, aim 0.1"
    yield "memory of the writer, MB", f"{writer.memory:.0f}", "<= 80"
    fill = storing.median(runs["fill"])
    yield "callback, microseconds of CPU per call", f"{fill.client_cpu * 100:.0f}", "<= 100 (0.5 % of 20 ms)"
    cluster.empty()
    storing.run(cluster, "fill", _STORAGE_PAIRS)
    storing.run(cluster, "writer", _STORAGE_PAIRS)
    size = storing.storage(cluster)
    yield "bytes per pair: bodies", f"{size['bodies']:.0f}", ""
    yield "bytes per pair: tables + indexes", f"{size['tables']:.0f} + {size['indexes']:.0f}", ""
    yield "storage to bodies", f"{(size['tables'] + size['indexes']) / size['bodies']:.2f}", "<= 1"
    cluster.empty()


def _lookups(cluster: Cluster, options: argparse.Namespace) -> Iterator[tuple[str, str, str]]:
    lookups.fill_tables(cluster, options.rows, options.days)
    for found in lookups.look_ups(cluster):
        name = f"{found.name}, ms of {options.rows} pairs in {options.days} days"
        yield name, f"{found.milliseconds:.3f}", f"<= {found.limit:g}"
    cluster.empty()


def _gateway(cluster: Cluster, options: argparse.Namespace) -> Iterator[tuple[str, str, str]]:
    with gateway.running_bench(cluster) as bench:
        for state, toxics in gateway.STATES.items():
            bench.proxy.toxics = toxics
            bench.proxy.reset()
            # the naive way waits for a database that is slow, call after call
            kinds = gateway.KINDS if state != "slow" else gateway.KINDS[:3]
            seconds = bench.latencies(options.calls, kinds)
            for percent, limit in ((50, ""), (99, "<= 1")):
                base = gateway.percentile(seconds["without"], percent)
                yield f"database {state}: p{percent} of LiteLLM alone, ms", f"{base * 1000:.2f}", ""
                for kind in kinds[1:]:
                    added = (gateway.percentile(seconds[kind], percent) - base) * 1000
                    yield f"database {state}: ms added to p{percent}, {_NAMES[kind]}", f"{added:.2f}", ""
                added = gateway.percentile(seconds["with"], percent) - gateway.percentile(seconds["empty"], percent)
                yield f"database {state}: ms added to p{percent}, log to empty callback", f"{added * 1000:.2f}", limit
            loads: dict[str, list[gateway.Load]] = {kind: [] for kind in gateway.KINDS[:3]}
            for number in range(2 * options.rounds):
                for kind in gateway.KINDS[:3] if number % 2 else gateway.KINDS[2::-1]:
                    loads[kind].append(bench.throughput(kind, options.seconds))
            for name, kind, base_kind, limits in (
                ("log to empty callback", "with", "empty", (">= 0.98", "<= 0.5")),
                ("empty callback to none", "empty", "without", ("", "")),
            ):
                pairs = list(zip(loads[kind], loads[base_kind], strict=True))
                ratio = statistics.median(one.calls_per_second / other.calls_per_second for one, other in pairs)
                yield f"database {state}: throughput, {name}", f"{ratio:.3f}", limits[0]
                cpu = statistics.median(one.cpu_per_call / other.cpu_per_call - 1 for one, other in pairs)
                yield f"database {state}: CPU per call added, {name}, %", f"{cpu * 100:.2f}", limits[1]
        base_cpu = statistics.median(load.cpu_per_call for load in loads["without"])
        yield "wall time in the log's hooks per call, microseconds", f"{bench.callback_seconds() * 1e6:.0f}", ""
        yield "CPU per call of LiteLLM without a callback, ms", f"{base_cpu * 1000:.1f}", ""
        spent = storing.run(cluster, "fill", 2000).client_cpu / 10_000
        yield "CPU per call of the log alone, microseconds", f"{spent * 1e6:.0f}", ""
        yield "CPU of the log alone to LiteLLM's, %", f"{spent / base_cpu * 100:.2f}", "<= 0.5"
        added_memory = bench.gateways["with"].memory() - bench.gateways["without"].memory()
        yield "memory added to the gateway, MB", f"{added_memory:.0f}", "<= 20"


#: Kinds of gateways, as the table calls them.
_NAMES = {"empty": "empty callback", "with": "log", "naive": "naive way"}
_REPORTS = {"gateway": _gateway, "storing": _storing, "lookups": _lookups}

if __name__ == "__main__":
    main()
