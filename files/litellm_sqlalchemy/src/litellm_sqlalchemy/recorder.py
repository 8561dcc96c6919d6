"""The records of calls on their way to the spool: by policy, without secrets, and not more than they are worth."""

import hashlib
import logging
import time
from asyncio import TimerHandle, get_running_loop
from typing import TYPE_CHECKING, Any

from litellm_sqlalchemy.frames import Kind
from litellm_sqlalchemy.policy import Policy
from litellm_sqlalchemy.producer import Producer
from litellm_sqlalchemy.redaction import REDACTION_VERSION, redact, scrubbed_together, whole, without_messages
from litellm_sqlalchemy.settings import Mode, Settings
from litellm_sqlalchemy.spool import HookTimes
from litellm_sqlalchemy.values import encoded

if TYPE_CHECKING:
    from litellm_sqlalchemy.calls import Call

_log = logging.getLogger(__name__)


class Body:
    """Bytes that pass by: their count, up to a limit themselves, and beyond it their digest."""

    __slots__ = ("_chunks", "_digest", "_kept", "_limit", "size")

    def __init__(self, limit: int) -> None:
        self.size = 0
        self._kept = 0
        self._limit = limit
        self._chunks: list[bytes] = []
        self._digest: Any = None  # of all bytes, once there are more than are kept

    def add(self, chunk: bytes) -> None:
        """Take note of a chunk."""
        self.size += len(chunk)
        if self._digest is not None:
            self._digest.update(chunk)
        elif self.size > self._limit:
            self._digest = hashlib.sha256(self.content())
            self._digest.update(chunk)
        if self._kept < self._limit:
            kept = chunk[: self._limit - self._kept]
            self._kept += len(kept)
            self._chunks.append(kept)

    def forget(self) -> None:
        """Keep no more than the count and the digest."""
        self._digest = self._digest or hashlib.sha256(self.content())
        self._kept, self._limit, self._chunks = 0, 0, []

    def content(self) -> bytes:
        """Return what is kept."""
        if len(self._chunks) != 1:
            self._chunks = [b"".join(self._chunks)]
        return self._chunks[0]

    @property
    def truncated(self) -> bool:
        """Whether there was more than what is kept."""
        return self.size > self._kept

    def digest(self) -> str | None:
        """Return the SHA-256 of all of it, hexadecimal."""
        if not self.size:
            return None
        return str((self._digest or hashlib.sha256(self.content())).hexdigest())


class Recorder:
    """Writes the records of calls to the spool; one per gateway process."""

    def __init__(self, settings: Settings, producer: Producer | None = None) -> None:
        """Take the policy; the spool, that of the settings or `producer`, is opened by the first record."""
        self.settings = settings
        self.content = settings.content
        self.policy = Policy(settings.content)
        self.kept_size = settings.content.max_payload_size if self.policy.keeps_content else 0
        self.headers = frozenset(name.encode() for name in settings.content.headers)
        self.producer = producer or Producer(settings.spool)
        self.rejections = _Rejections(settings.content.rejected_rate)

    def write(
        self,
        kind: Kind,
        mode: Mode,
        metadata: dict[str, Any],
        body: Body | None,
        payload: bytes,
        truncated: bool = False,
        *,
        accepted: bool,
    ) -> bool:
        """Append a record, its content by `mode`; return whether it stands in the spool.

        `truncated` says that the payload is only the beginning of what there was. The digest of `body` goes with it
        where the payload, as it is written, is not that body. `accepted` says whether LiteLLM has accepted the call.
        """
        truncated = truncated or len(payload) > self.content.max_payload_size
        payload = payload[: self.content.max_payload_size]  # now: what is not kept is not searched for secrets, either
        if kind is Kind.REQUEST:
            metadata["content_mode"] = mode
            metadata["redaction_version"] = REDACTION_VERSION
        if mode != "full":
            payload = redact(payload) if mode == "redacted" and not truncated else b""
            metadata = without_messages(metadata)
        plain = encoded(metadata)
        text, payload = scrubbed_together(plain, payload)
        if text != plain:
            text = whole(text, plain)  # what is no JSON cannot be stored
        of_payload: dict[str, Any] = {}
        if truncated and payload:
            of_payload["payload_truncated"] = True
            payload = payload[: self.content.max_payload_size]
        if body is not None and (body.truncated or payload != body.content()):
            of_payload["payload_digest"] = body.digest()
        if of_payload:
            text = text[:-1] + b"," + encoded(of_payload)[1:]  # one JSON object
        return self.producer.append(kind, text, payload, accepted=accepted)

    @property
    def hooks(self) -> HookTimes:
        """What the hooks did, for the counters."""
        return self.producer.counters.hooks

    def spent(self, since: float) -> None:
        """Count the time that a hook took, since its `time.perf_counter()`."""
        self.hooks.add(time.perf_counter() - since)

    def fail(self, what: str) -> None:
        """Count and log the exception at hand; the client's call goes on."""
        self.hooks.failures += 1
        _log.exception("request log: %s failed; the call goes on", what)


class _Rejections:
    """Writes calls that LiteLLM has rejected: at most `rate` a second, after a burst of ten seconds' worth.

    Calls above that are counted, and the last of them is written for all as soon as the rate allows.
    """

    def __init__(self, rate: float) -> None:
        self._rate = rate
        self._tokens = self._capacity = rate * 10
        self._at = time.monotonic()
        self._held = 0
        self._last: Call | None = None
        self._timer: TimerHandle | None = None

    def add(self, call: "Call") -> None:
        self._held += 1
        self._last = call
        if self._timer is not None:
            return
        now = time.monotonic()
        self._tokens = min(self._capacity, self._tokens + (now - self._at) * self._rate)
        self._at = now
        if self._tokens >= 1:
            self._write()
        else:
            self._timer = get_running_loop().call_later((1 - self._tokens) / self._rate, self._write)

    def _write(self) -> None:
        self._timer = None
        self._tokens -= 1
        call, calls = self._last, self._held
        self._last, self._held = None, 0
        if call is not None:
            call.write(calls)
