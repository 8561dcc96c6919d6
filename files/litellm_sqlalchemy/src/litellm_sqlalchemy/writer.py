"""The writer: one process per spool that delivers its frames to PostgreSQL."""

import contextlib
import ctypes
import logging
import os
import random
import signal
import socket
import threading
import time

from sqlalchemy import event

from litellm_sqlalchemy.consumer import Batch, Consumer
from litellm_sqlalchemy.database import ErrorClass, make_engine
from litellm_sqlalchemy.frames import Frame
from litellm_sqlalchemy.monitoring import Health, Monitor
from litellm_sqlalchemy.retention import Retention
from litellm_sqlalchemy.settings import Settings
from litellm_sqlalchemy.store import Delivery, Store, Unavailable, retry_delay

_log = logging.getLogger(__name__)

#: Attempts at a batch that fails with an error of no known class, before its rows are tried one by one.
_UNKNOWN_ATTEMPTS = 5
#: Seconds between attempts where somebody has to mend something first.
_PAUSE = 5.0
#: Seconds without anything to deliver after which the database is asked whether it would take it.
_IDLE = 30.0
#: Seconds between two signs of life while it waits: its unit has a watchdog.
_PING = 30.0
_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class _Stopping(Exception):
    """The writer was told to stop in the middle of a batch."""


class Writer:
    """Drains the spool until it is told to stop."""

    def __init__(self, settings: Settings) -> None:
        """Open the spool; the database may be down. Raises SpoolError, LockedError."""
        self._settings = settings.writer
        self._stop = threading.Event()
        self.engine = make_engine(
            settings.database, "writer", "writer", statement_timeout=settings.writer.statement_timeout
        )
        self._retention = Retention(settings.spool)
        self._consumer = Consumer(settings.spool.directory, self._retention)
        self.health = Health()
        self._monitor = Monitor(settings, self._consumer, self.health, self.engine)
        self._store = Store(self.engine, settings.writer.statement_timeout, self._go_on, self._monitor.committed)
        event.listen(self.engine, "connect", lambda *_: self._monitor.connected())
        self._asked_at = 0.0

    def stop(self) -> None:
        """Ask the writer to end after the transaction it is at; what is not delivered stays in the spool."""
        self._stop.set()

    def run(self) -> None:
        """Deliver until `stop` is called."""
        self._monitor.start()
        notify("READY=1")
        _log.info("delivering from %s", self._consumer.directory)
        try:
            while not self._stop.is_set():
                if self.drain_once():
                    self._prune()
                elif self._wait(self._settings.batch_delay):
                    self._ask()
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
        if self.health.spool(self._consumer.problem) and self._consumer.problem:
            _log.error("cannot go on with %s; the others' frames are delivered", self._consumer.problem)
        return more

    def _ask(self) -> None:
        """Ask the database, where nothing was delivered for a while, whether it would take something."""
        wait = _IDLE if self.health.problem() is None else self._settings.retry_delay_max
        if time.monotonic() < self._asked_at + wait:
            return
        self._asked_at = time.monotonic()
        try:
            self._store.check_connection()
        except Unavailable as error:
            self._report(error, str(error))
        else:
            self.health.database(None)

    def _go_on(self) -> None:
        """Tell systemd that the writer works; end where it shall stop."""
        notify("WATCHDOG=1")
        if self._stop.is_set():
            raise _Stopping

    def _deliver(self, batch: Batch) -> bool:
        """Deliver a batch, however long it takes; return False when told to stop before that."""
        started = time.perf_counter()
        delivery = self._persist(batch.frames)
        if delivery is None:
            return False
        self._consumer.account(batch, delivery)
        if batch.finished:
            self._consumer.hand_back(batch)
        if batch.finished and batch.cursor.open:
            self._consumer.make_up(batch)
        if not self._retire(batch, delivery):
            return False
        self._monitor.delivered(len(batch.frames), time.perf_counter() - started)
        for letter in delivery.dead:
            what = "dead letter" if letter.frame.sequence else "response to an interrupted call"
            _log.error("%s %s-%d: %s", what, batch.producer, letter.frame.sequence, letter.reason)
        return True

    def _retire(self, batch: Batch, delivery: Delivery) -> bool:
        """Retire a batch, again and again until the disk takes it; return False when told to stop before that."""
        while True:
            try:
                self._consumer.retire(batch, delivery)
            except OSError as error:
                message = f"{error.filename or self._consumer.directory}: {error.strerror}"
                if self.health.spool(message):
                    _log.error("cannot note what is delivered: %s", message)
                if not self._wait(self._settings.retry_delay_max):
                    return False
            else:
                return True

    def _persist(self, frames: list[Frame]) -> Delivery | None:
        """Store frames, again and again until the database takes them; return None when told to stop before that."""
        if not frames:
            return Delivery()  # which tells nothing about the database
        attempt = unknown = 0
        while True:
            try:
                delivery = self._store.deliver(frames, give_up_on_unknown=unknown >= _UNKNOWN_ATTEMPTS)
            except _Stopping:
                return None
            except Unavailable as error:
                attempt += 1
                unknown += error.cause is ErrorClass.UNKNOWN
                self._monitor.retried(error.cause)
                self._report(error, self._message_of(error))
                if not self._wait(self._delay(error, attempt)):
                    return None
            else:
                if attempt:
                    _log.info("delivering again after %d failed attempts", attempt)
                self.health.database(None)
                self._asked_at = time.monotonic()
                return delivery

    def _message_of(self, error: Unavailable) -> str:
        if error.cause is ErrorClass.READ_ONLY:
            self.engine.dispose()  # a demoted primary: no pooled connection may go on talking to it
        if error.cause is ErrorClass.SCHEMA:
            return self._store.schema_problem() or str(error)
        return str(error)

    def _report(self, error: Unavailable, message: str) -> None:
        if self.health.database(error.cause, message):
            _log.warning("cannot deliver (%s): %s; the spool keeps all", error.cause.value, message)

    def _delay(self, error: Unavailable, attempt: int) -> float:
        limit = self._settings.retry_delay_max
        if error.cause in (ErrorClass.PAUSE, ErrorClass.SCHEMA):
            limit = max(limit, _PAUSE)
        return retry_delay(attempt, limit) * random.uniform(0.5, 1)

    def _wait(self, seconds: float) -> bool:
        """Wait; return False when the writer shall stop."""
        until = time.monotonic() + seconds
        while True:
            notify("WATCHDOG=1")
            self._prune()  # in an outage, too: it is then that the disk gets full
            left = until - time.monotonic()
            if self._stop.wait(min(left, _PING)) or left <= _PING:
                return not self._stop.is_set()

    def _prune(self) -> None:
        """Remove delivered segments that are kept for too long, or that the live spool needs the room of."""
        self._retention.prune()
        if self.health.retired(self._retention.problem) and self._retention.problem:
            _log.error("cannot remove a delivered segment: %s; the others are removed", self._retention.problem)


def notify(state: str) -> None:
    """Tell systemd (sd_notify(3)); without systemd, nothing."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        sock.connect("\0" + address[1:] if address.startswith("@") else address)
        sock.sendall(state.encode())


def _give_memory_back() -> None:
    """Have glibc return what batches took: by itself it keeps some 15 MB of it, to be faster the next time.

    M_TRIM_THRESHOLD and M_MMAP_THRESHOLD (malloc.h, mallopt(3)); another C library may not know them.
    """
    with contextlib.suppress(AttributeError, OSError):
        mallopt = ctypes.CDLL(None).mallopt
        for parameter in (-1, -3):
            mallopt(parameter, 64 * 1024)


def run_writer(settings: Settings) -> None:
    """Run the writer until SIGTERM or SIGINT. Raises LogError, and OSError of a spool that breaks under it."""
    _give_memory_back()
    # Not by handlers: these run in the midst of what the main thread does, and where that is `Event.wait`, `Event.set`
    # would wait for ever for the lock that it holds.
    signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)
    writer = Writer(settings)
    threading.Thread(target=_stop_on_signal, args=(writer,), name="signals", daemon=True).start()
    writer.run()


def _stop_on_signal(writer: Writer) -> None:
    signal.sigwait(_STOP_SIGNALS)
    writer.stop()
