"""What the writer tells about itself: Prometheus metrics and a health endpoint with causes."""

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import orjson
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from sqlalchemy import Engine

from litellm_sqlalchemy.consumer import Consumer, producers
from litellm_sqlalchemy.database import ErrorClass
from litellm_sqlalchemy.errors import SettingsError
from litellm_sqlalchemy.settings import Settings
from litellm_sqlalchemy.spool import read_counters, segment_sizes
from litellm_sqlalchemy.store import Delivery


class Health:
    """Whether the writer delivers and, when not, why."""

    def __init__(self) -> None:
        """Start as healthy."""
        self.cause = ""
        self.message = ""

    def set(self, cause: str, message: str) -> None:
        """Say why nothing is delivered now."""
        self.cause, self.message = cause, message

    def clear(self) -> None:
        """Say that the last batch was delivered."""
        self.cause = self.message = ""


class Monitor:
    """Serves `/metrics` and `/health` on `writer.listen`, in a thread of its own."""

    def __init__(self, settings: Settings, consumer: Consumer, health: Health, engine: Engine) -> None:
        """Make the metrics; nothing listens before `start`."""
        self._settings = settings
        self._consumer = consumer
        self._health = health
        self._engine = engine
        self._server: ThreadingHTTPServer | None = None
        registry = self._registry = CollectorRegistry()
        prefix = "litellm_sqlalchemy_"
        self._frames = Gauge(
            f"{prefix}frames", "Frames since the spool was made, by what became of them", ["fate"], registry=registry
        )
        self._events = Gauge(
            f"{prefix}gateway_frames", "Frames of the living gateway processes", ["fate"], registry=registry
        )
        self._callback = Gauge(
            f"{prefix}callback_seconds", "Time that the hooks of the living gateway processes took", registry=registry
        )
        self._calls = Gauge(f"{prefix}callback_calls", "Calls that they took it for", registry=registry)
        self._letters = Gauge(f"{prefix}dead_letters", "Dead letters that wait to be requeued", registry=registry)
        self._spool_bytes = Gauge(f"{prefix}spool_bytes", "Size of the spool's segments", registry=registry)
        self._oldest = Gauge(
            f"{prefix}spool_oldest_timestamp_seconds",
            "Last change of the oldest segment with undelivered frames; 0 without one",
            registry=registry,
        )
        self._pool = Gauge(f"{prefix}pool_connections", "Connections in use", registry=registry)
        self._healthy = Gauge(f"{prefix}healthy", "1 when the last batch was delivered", registry=registry)
        self._batch_frames = Histogram(
            f"{prefix}batch_frames", "Frames of a batch", buckets=(1, 10, 100, 500, 1000, 5000), registry=registry
        )
        self._batch_seconds = Histogram(f"{prefix}batch_seconds", "Time to deliver a batch", registry=registry)
        self._retries = Counter(f"{prefix}retries", "Failed attempts at a batch", ["cause"], registry=registry)

    def start(self) -> None:
        """Listen. Raises SettingsError when the address cannot be used."""
        if self._settings.writer.listen is None:
            return
        host, _, port = self._settings.writer.listen.rpartition(":")
        handler = type("Handler", (_Handler,), {"monitor": self})
        try:
            self._server = ThreadingHTTPServer((host.strip("[]"), int(port)), handler)
        except (OSError, ValueError) as error:
            raise SettingsError(f"`writer.listen` is {self._settings.writer.listen!r}: {error}") from None
        threading.Thread(target=self._server.serve_forever, name="monitor", daemon=True).start()

    def stop(self) -> None:
        """Listen no more."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()

    def delivered(self, count: int, delivery: Delivery, seconds: float) -> None:
        """Count a delivered batch."""
        if count:
            self._batch_frames.observe(count)
            self._batch_seconds.observe(seconds)

    def retried(self, cause: ErrorClass) -> None:
        """Count a failed attempt."""
        self._retries.labels(cause.value).inc()

    def metrics(self) -> bytes:
        """Return the metrics in Prometheus' text format."""
        totals = self._consumer.totals
        for fate in ("delivered_requests", "delivered_responses", "duplicates", "dead", "damaged", "dropped"):
            self._frames.labels(fate).set(getattr(totals, fate))
        directory = self._consumer.directory
        counters = [read_counters(directory / "producers" / name) for name in producers(directory)]
        for fate in ("received", "dropped"):
            self._events.labels(fate).set(sum(counter.get(fate, 0) for counter in counters))
        self._callback.set(sum(counter.get("seconds", 0) for counter in counters))
        self._calls.set(sum(counter.get("calls", 0) for counter in counters))
        self._letters.set(sum(1 for _ in directory.glob("dead/*.json")))
        segments = list(segment_sizes(directory))
        self._spool_bytes.set(sum(size for _file, size in segments))
        self._oldest.set(min((file.stat().st_mtime for file, size in segments if size), default=0))
        self._pool.set(self._engine.pool.checkedout())  # type: ignore[attr-defined]
        self._healthy.set(not self._health.cause)
        return generate_latest(self._registry)

    def status(self) -> dict[str, str]:
        """Return the health as plain values."""
        if self._health.cause:
            return {"status": "degraded", "cause": self._health.cause, "message": self._health.message}
        return {"status": "ok"}


class _Handler(BaseHTTPRequestHandler):
    monitor: Monitor

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
