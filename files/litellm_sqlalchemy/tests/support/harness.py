"""A gateway's end of the spool, a writer and a database, and what has to hold between them."""

from dataclasses import dataclass, field
from functools import cached_property

from litellm_sqlalchemy.frames import Kind
from litellm_sqlalchemy.identifiers import uuid7
from litellm_sqlalchemy.producer import Producer
from litellm_sqlalchemy.status import SpoolStatus, spool_status
from support.oracle import check
from support.postgresql import Database, Server
from support.processes import Deployment, WriterProcess
from support.records import BODY, Ledger, request, response
from support.waiting import wait_until


@dataclass
class Harness:
    """All parts of a log, and the ledger of what was sent."""

    server: Server
    database: Database
    deployment: Deployment
    writer: WriterProcess
    ledger: Ledger = field(default_factory=Ledger)

    @cached_property
    def producer(self) -> Producer:
        """A gateway process's end of the spool, with the settings as they are when it is first used."""
        return Producer(self.deployment.load().spool)

    @property
    def status(self) -> SpoolStatus:
        """The spool's counters."""
        return spool_status(self.deployment.spool)

    def send(self, calls: int, payload: bytes = BODY) -> None:
        """Append the pairs of so many calls."""
        self.ledger.send(self.producer, calls, payload)

    def begin(self) -> str:
        """Append the request of a call that goes on; return its id."""
        call = uuid7().hex
        self.ledger.append(self.producer, Kind.REQUEST, call, request(call), BODY)
        return call

    def end(self, call: str) -> None:
        """Append the response of a call."""
        self.ledger.append(self.producer, Kind.RESPONSE, call, response(call), BODY)

    def drained(self) -> None:
        """Wait until nothing is left in the spool."""
        wait_until(lambda: self.status.spooled == 0, "the spool is drained")

    def degraded(self, cause: str, text: str = "") -> None:
        """Wait until the writer's health names a cause."""

        def seen() -> bool:
            health = self.writer.health()
            return health.get("cause") == cause and text in health["message"]

        wait_until(seen, f"the health names {cause} and {text!r}")

    def check(self, *, killed: bool = False) -> SpoolStatus:
        """Fail where anything is lost, doubled, made up or counted wrongly (`oracle.check`)."""
        return check(self.ledger, self.database, self.deployment.spool, killed=killed)

    def settled(self) -> None:
        """Everything has arrived, once, and the writer says that all is well."""
        self.drained()
        status = self.check()
        assert (status.dead, status.damaged, status.dropped, status.spooled) == (0, 0, 0, 0)
        wait_until(lambda: self.writer.health() == {"status": "ok"}, "the writer is well again")

    def close(self) -> None:
        """End what runs."""
        if "producer" in self.__dict__:
            self.producer.close()
        self.writer.kill()
