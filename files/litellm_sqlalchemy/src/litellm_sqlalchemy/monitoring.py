"""What the writer tells about itself: Prometheus metrics and a health endpoint with causes."""

import contextlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import accumulate
from socket import AF_INET, AF_INET6

import orjson
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.registry import Collector
from sqlalchemy import Engine

from litellm_sqlalchemy.consumer import Consumer, Cursor, oldest_waiting
from litellm_sqlalchemy.database import ErrorClass
from litellm_sqlalchemy.errors import SettingsError, SpoolError
from litellm_sqlalchemy.settings import Settings
from litellm_sqlalchemy.spool import HOOK_SECONDS, Counters, HookTimes, producers, read_counters, spool_size
from litellm_sqlalchemy.status import Known, read_known

_PREFIX = "litellm_sqlalchemy_"


class Health:
    """Whether the writer delivers and, when not, why."""

    def __init__(self) -> None:
        """Start as healthy."""
        self._database = self._spool = self._retired = ("", "")

    def database(self, cause: ErrorClass | None, message: str = "") -> bool:
        """Say why the database takes nothing, or that it does; return whether that is news."""
        known, self._database = self._database, (cause.value if cause else "", message)
        return known != self._database

    def spool(self, message: str) -> bool:
        """Say which file cannot be read or written, an empty text where all can; return whether that is news."""
        known, self._spool = self._spool, ("spool" if message else "", message)
        return known != self._spool

    def retired(self, message: str) -> bool:
        """Say which delivered segment cannot be removed, likewise; what else is wrong with the spool counts more."""
        known, self._retired = self._retired, ("spool" if message else "", message)
        return known != self._retired

    def problem(self) -> tuple[str, str] | None:
        """Return a cause and its message, None where all is well."""
        return next((problem for problem in (self._database, self._spool, self._retired) if problem[0]), None)


class Monitor:
    """Serves `/metrics` and `/health` on `writer.listen`, in a thread of its own."""

    def __init__(self, settings: Settings, consumer: Consumer, health: Health, engine: Engine) -> None:
        """Make the metrics; nothing listens before `start`."""
        self._settings = settings
        self._health = health
        self._server: ThreadingHTTPServer | None = None
        registry = self._registry = CollectorRegistry()
        registry.register(_SpoolCollector(consumer))
        pool = Gauge(f"{_PREFIX}pool_connections", "Connections in use", registry=registry)
        pool.set_function(lambda: engine.pool.checkedout())  # type: ignore[attr-defined] # each dispose() makes a new pool
        healthy = Gauge(f"{_PREFIX}healthy", "1 when nothing keeps the writer from its work", registry=registry)
        healthy.set_function(lambda: health.problem() is None)
        self._connections = Counter(f"{_PREFIX}connections", "Connections opened", registry=registry)
        self._batch_frames = Histogram(
            f"{_PREFIX}batch_frames", "Frames of a batch", buckets=(1, 10, 100, 500, 1000, 5000), registry=registry
        )
        self._batch_seconds = Histogram(
            f"{_PREFIX}batch_seconds", "Time to deliver a batch, failed attempts included", registry=registry
        )
        self._commit_seconds = Histogram(f"{_PREFIX}commit_seconds", "Time of a COMMIT", registry=registry)
        self._retries = Counter(f"{_PREFIX}retries", "Failed attempts at a batch", ["cause"], registry=registry)
        for cause in ErrorClass:
            self._retries.labels(cause.value)

    def start(self) -> None:
        """Listen. Raises SettingsError when the address cannot be used."""
        if self._settings.writer.listen is None:
            return
        host, _, port = self._settings.writer.listen.rpartition(":")
        server = type("Server", (ThreadingHTTPServer,), {"address_family": AF_INET6 if ":" in host else AF_INET})
        handler = type("Handler", (_Handler,), {"monitor": self})
        try:
            self._server = server((host.strip("[]"), int(port)), handler)
        except (OSError, ValueError) as error:  # ValueError: no host can have that name
            raise SettingsError(f"`writer.listen` is {self._settings.writer.listen!r}: {error}") from None
        threading.Thread(target=self._server.serve_forever, name="monitor", daemon=True).start()

    def stop(self) -> None:
        """Listen no more."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()

    def delivered(self, count: int, seconds: float) -> None:
        """Count a delivered batch."""
        if count:
            self._batch_frames.observe(count)
            self._batch_seconds.observe(seconds)

    def committed(self, seconds: float) -> None:
        """Count a COMMIT."""
        self._commit_seconds.observe(seconds)

    def connected(self) -> None:
        """Count a new connection."""
        self._connections.inc()

    def retried(self, cause: ErrorClass) -> None:
        """Count a failed attempt."""
        self._retries.labels(cause.value).inc()

    def metrics(self) -> bytes:
        """Return the metrics in Prometheus' text format."""
        return generate_latest(self._registry)

    def status(self) -> dict[str, str]:
        """Return the health as plain values."""
        if problem := self._health.problem():
            return {"status": "degraded", "cause": problem[0], "message": problem[1]}
        return {"status": "ok"}


class _SpoolCollector(Collector):
    """Reads the spool at every scrape."""

    def __init__(self, consumer: Consumer) -> None:
        self._consumer = consumer

    def collect(self) -> Iterator[Metric]:
        """Yield what the writer, the gateway processes and the files tell."""
        consumer, directory = self._consumer, self._consumer.directory
        with consumer.guard:
            living = {name: read_counters(directory / "producers" / name) for name in producers(directory)}
            hooks = HookTimes()
            for times in (consumer.totals.hooks, *(counters.hooks for counters in living.values())):
                hooks += times
        yield self._frames(living)
        yield from _of_hooks(hooks)
        for name, what, value in (
            ("dead_letters", "Dead letters that wait to be requeued", sum(1 for _ in directory.glob("dead/*.json"))),
            ("lost_frames", "Frames damaged or dropped that `status --acknowledge` does not know", self._lost(living)),
            ("spool_bytes", "Size of the spool's segments", spool_size(directory)),
            ("spool_oldest_timestamp_seconds", "Time of the oldest record that waits; 0 without one", self._oldest()),
            ("gateway_dropped_frames", "Frames that living gateway processes had no space for",
             sum(counters.dropped for counters in living.values())),
            ("gateway_unsynced_calls", "Calls of living gateway processes that went on before their record was durable",
             sum(counters.unsynced for counters in living.values())),
        ):  # fmt: skip
            yield GaugeMetricFamily(f"{_PREFIX}{name}", what, value)

    def _frames(self, living: dict[str, Counters]) -> Metric:
        """Return frames by fate: received = all the others but duplicates and interrupted.

        What the gateway processes have received is as old as their counters, some seconds.
        """
        totals, cursors = self._consumer.totals, self._consumer.cursors()
        passed = {name: max(cursors[name].sequence, 0) if name in cursors else 0 for name in living}
        spooled = sum(max(counters.received - passed[name], 0) for name, counters in living.items())
        result = GaugeMetricFamily(f"{_PREFIX}frames", "Frames since the spool was made, by fate", labels=["fate"])
        result.add_metric(["received"], totals.received + spooled)
        result.add_metric(["spooled"], spooled)
        for fate in ("delivered_requests", "delivered_responses", "duplicates", "dead", "damaged", "dropped",
                     "interrupted"):  # fmt: skip
            result.add_metric([fate], getattr(totals, fate))
        return result

    def _lost(self, living: dict[str, Counters]) -> int:
        """Return what is lost, what living gateway processes have dropped since their last delivered frame included."""
        totals, cursors = self._consumer.totals, self._consumer.cursors()
        dropped = totals.dropped
        for name, counters in living.items():
            cursor = cursors.get(name, Cursor())
            dropped += max(counters.dropped - cursor.dropped - cursor.undecided, 0)
        known = Known()
        with contextlib.suppress(SpoolError):  # it cannot be read: `status` says what to do
            known = read_known(self._consumer.directory)
        return max(totals.damaged - known.damaged, 0) + max(dropped - known.dropped, 0)

    def _oldest(self) -> float:
        directory, cursors = self._consumer.directory, self._consumer.cursors()
        found = []
        for name in producers(directory):
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # delivered meanwhile, or damaged
                found.append(oldest_waiting(directory / "producers" / name, cursors.get(name, Cursor())))
        return min((time for time in found if time is not None), default=0)


def _of_hooks(hooks: HookTimes) -> Iterator[Metric]:
    buckets = zip(map(str, (*HOOK_SECONDS, "+Inf")), accumulate(hooks.counts), strict=True)
    yield HistogramMetricFamily(
        f"{_PREFIX}hook_seconds", "Time of the callback's hooks in the gateway", list(buckets), hooks.seconds
    )
    yield CounterMetricFamily(f"{_PREFIX}calls", "Calls that have ended", hooks.calls)
    yield CounterMetricFamily(f"{_PREFIX}hook_failures", "Hooks that failed; their calls went on", hooks.failures)


class _Handler(BaseHTTPRequestHandler):
    monitor: Monitor
    timeout = 5  # seconds without a word; whoever says nothing, or is gone, would hold a thread for ever

    def do_GET(self) -> None:
        """Answer `/metrics` and `/health`."""
        if self.path == "/metrics":
            self._answer(200, CONTENT_TYPE_LATEST, self.monitor.metrics())
        elif self.path == "/health":
            status = self.monitor.status()
            self._answer(200 if status["status"] == "ok" else 503, "application/json", orjson.dumps(status))
        else:
            self._answer(404, "text/plain", b"/metrics or /health\n")

    def _answer(self, code: int, content_type: str, body: bytes) -> None:
        self.send_response(code)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Write no access log."""
