"""The writer: one process per spool that delivers its frames to PostgreSQL."""

import logging
import os
import random
import signal
import socket
import threading
import time

import orjson

from litellm_sqlalchemy.consumer import Batch, Consumer
from litellm_sqlalchemy.database import ErrorClass, make_engine
from litellm_sqlalchemy.errors import LogError
from litellm_sqlalchemy.frames import Frame, Kind
from litellm_sqlalchemy.migrate import schema_problem
from litellm_sqlalchemy.monitoring import Health, Monitor
from litellm_sqlalchemy.retention import Retention
from litellm_sqlalchemy.settings import Settings
from litellm_sqlalchemy.store import Delivery, Store, Unavailable

_log = logging.getLogger(__name__)

#: Attempts at a batch that fails with an error of no known class, before its rows are tried one by one.
_UNKNOWN_ATTEMPTS = 5
_FIRST_DELAY = 0.1
#: Seconds between attempts where somebody has to mend something first.
_PAUSE = 5.0


#: Seconds that the server's answer may take beyond `writer.statement_timeout`.
_ANSWER_TIME = 5.0


class Writer:
    """Drains the spool until it is told to stop."""

    def __init__(self, settings: Settings) -> None:
        """Open the spool; the database may be down. Raises SpoolError, LockedError."""
        self._settings = settings.writer
        self._stop = threading.Event()
        self.engine = make_engine(
            settings.database, "writer", "writer", statement_timeout=settings.writer.statement_timeout
        )
        self._store = Store(self.engine, settings.writer.statement_timeout + _ANSWER_TIME)
        self._consumer = Consumer(settings.spool.directory, Retention(settings.spool))
        self.health = Health()
        self._monitor = Monitor(settings, self._consumer, self.health, self.engine)

    def stop(self) -> None:
        """Ask the writer to end after the batch it is at; what is not delivered stays in the spool."""
        self._stop.set()

    def run(self) -> None:
        """Deliver until `stop` is called."""
        self._monitor.start()
        notify("READY=1")
        _log.info("delivering from %s", self._consumer.directory)
        try:
            while not self._stop.is_set():
                if not self.drain_once():
                    self._wait(self._settings.batch_delay)
        finally:
            notify("STOPPING=1")
            self._monitor.stop()
            self._consumer.close()
            self.engine.dispose()

    def drain_once(self) -> bool:
        """Deliver one batch of each producer; return whether any was full, so that more is waiting."""
        more = False
        for batch in self._consumer.batches(self._settings.batch_size):
            if not self._deliver(batch):
                return False
            more |= batch.full
        return more

    def _deliver(self, batch: Batch) -> bool:
        """Deliver a batch, however long it takes; return False when told to stop before that."""
        started = time.perf_counter()
        delivery = self._persist(batch.frames)
        if delivery is None:
            return False
        self._consumer.account(batch, delivery)
        if batch.finished and batch.cursor.open:
            made_up = self._persist([_interrupted(call) for call in batch.cursor.open])
            if made_up is None:
                return False
            self._consumer.totals.interrupted += made_up.inserted + made_up.duplicates  # again after a crash
            batch.cursor.open = []
        if not self._retire(batch, delivery):
            return False
        self._monitor.delivered(len(batch.frames), delivery, time.perf_counter() - started)
        for letter in delivery.dead:
            _log.error("dead letter %s-%d: %s", batch.producer, letter.frame.sequence, letter.reason)
        return True

    def _retire(self, batch: Batch, delivery: Delivery) -> bool:
        """Retire a batch, again and again until the disk takes it; return False when told to stop before that."""
        while True:
            try:
                self._consumer.retire(batch, delivery)
            except OSError as error:
                message = f"spool directory {self._consumer.directory}: {error.strerror}"
                if message != self.health.message:
                    _log.error("cannot note what is delivered: %s", message)
                self.health.set("spool", message)
                if not self._wait(self._settings.retry_delay_max):
                    return False
            else:
                self.health.clear()
                return True

    def _persist(self, frames: list[Frame]) -> Delivery | None:
        """Store frames, again and again until the database takes them; return None when told to stop before that."""
        attempt = unknown = 0
        while True:
            notify("WATCHDOG=1")
            try:
                delivery = self._store.deliver(frames, give_up_on_unknown=unknown >= _UNKNOWN_ATTEMPTS)
            except Unavailable as error:
                attempt += 1
                unknown += error.cause is ErrorClass.UNKNOWN
                self._report(error, attempt)
                if not self._wait(self._delay(error, attempt)):
                    return None
            else:
                if attempt:
                    _log.info("delivering again after %d failed attempts", attempt)
                self.health.clear()
                return delivery

    def _report(self, error: Unavailable, attempt: int) -> None:
        self._monitor.retried(error.cause)
        cause = error.cause
        if cause is ErrorClass.READ_ONLY:
            self.engine.dispose()  # a demoted primary: no pooled connection may go on talking to it
        message = str(error)
        if cause is ErrorClass.SCHEMA:
            message = schema_problem(self.engine) or message
        if message != self.health.message or attempt == 1:
            _log.warning("cannot deliver (%s): %s; the spool keeps all", cause.value, message)
        self.health.set(cause.value, message)

    def _delay(self, error: Unavailable, attempt: int) -> float:
        limit = self._settings.retry_delay_max
        if error.cause in (ErrorClass.PAUSE, ErrorClass.SCHEMA):
            limit = max(limit, _PAUSE)
        return float(min(limit, _FIRST_DELAY * 2.0 ** min(attempt - 1, 16))) * random.uniform(0.5, 1)

    def _wait(self, seconds: float) -> bool:
        """Wait; return False when the writer shall stop."""
        notify("WATCHDOG=1")
        return not self._stop.wait(seconds)


def _interrupted(call: str) -> Frame:
    """Return the response of a call whose gateway process died before its end."""
    metadata = {
        "request_id": call,
        "created_at": time.time_ns() // 1000,
        "status": "interrupted",
        "attempt_count": 0,
        "payload_size": 0,
    }
    return Frame(Kind.RESPONSE, 0, orjson.dumps(metadata), b"")


def notify(state: str) -> None:
    """Tell systemd (sd_notify(3)); without systemd, nothing."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        sock.connect("\0" + address[1:] if address.startswith("@") else address)
        sock.sendall(state.encode())


def run_writer(settings: Settings) -> None:
    """Run the writer until SIGTERM or SIGINT. Raises LogError before it starts."""
    writer = Writer(settings)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda _number, _frame: writer.stop())
    try:
        writer.run()
    except OSError as error:
        raise LogError(f"spool directory {settings.spool.directory}: {error.strerror}") from error
