"""Storing pairs, side by side: raw COPY, the writer, the naive way; what they cost and what the rows take."""

import json
import shutil
import statistics
import subprocess
import sys
from typing import NamedTuple

from benchmarks.cluster import Cluster


class Run(NamedTuple):
    """One run of a way: pairs per second, CPU seconds per 10,000 pairs of both sides, client's peak of memory in MB."""

    pairs_per_second: float
    client_cpu: float
    server_cpu: float
    memory: float


def rounds(cluster: Cluster, pairs: int, naive_pairs: int, count: int) -> dict[str, list[Run]]:
    """Run all ways `count` times, in turn; every run starts from empty tables and ends with all rows there."""
    runs: dict[str, list[Run]] = {"fill": [], "copy": [], "writer": [], "naive": []}
    for _ in range(count):
        for way, number in (("copy", pairs), ("writer", pairs), ("naive", naive_pairs)):
            cluster.empty()
            shutil.rmtree(cluster.settings.spool.directory)
            cluster.settings.spool.directory.mkdir()
            filled = run(cluster, "fill", number)
            if way != "naive":
                runs["fill"].append(filled)
            runs[way].append(run(cluster, way, number))
            stored = cluster.query("SELECT (SELECT count(*) FROM requests), (SELECT count(*) FROM responses)")[0]
            if stored != (number, number):
                raise SystemExit(f"{way} stored {stored} of {number} pairs")
    return runs


def run(cluster: Cluster, way: str, pairs: int) -> Run:
    """Run one way in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.ways", way, str(cluster.directory / "settings.yml"), str(pairs)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdout.readline()
        before = cluster.cpu_seconds()
        process.stdin.write("\n")
        process.stdin.flush()
        result = json.loads(process.stdout.readline())
        server = cluster.cpu_seconds() - before
    scale = 10_000 / pairs
    return Run(pairs / result["seconds"], result["cpu"] * scale, server * scale, result["memory"])


def median(runs: list[Run]) -> Run:
    """Return the median of each figure."""
    return Run(*(statistics.median(values) for values in zip(*runs, strict=True)))


def median_ratio(runs: list[Run], base: list[Run], field: str) -> float:
    """Return the median over the rounds of a figure's ratio to that of `base` in the same round."""
    ratios = (getattr(one, field) / getattr(other, field) for one, other in zip(runs, base, strict=True))
    return float(statistics.median(ratios))


def storage(cluster: Cluster) -> dict[str, float]:
    """Return bytes per pair of the rows that are there: bodies as they came, heap with TOAST, indexes."""
    cluster.query("VACUUM ANALYZE requests, responses, daily_usage")
    ((pairs, bodies),) = cluster.query(
        "SELECT count(*), sum(q.payload_size + p.payload_size) FROM requests q JOIN responses p ON p.request_id = q.id"
    )
    ((tables, indexes),) = cluster.query(
        "SELECT sum(pg_table_size(oid)), sum(pg_indexes_size(oid)) FROM pg_class "
        "WHERE relname IN ('requests', 'responses', 'daily_usage') AND relkind = 'r'"
    )
    return {"bodies": float(bodies / pairs), "tables": float(tables / pairs), "indexes": float(indexes / pairs)}
