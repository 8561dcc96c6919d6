"""Time-ordered identifiers (UUID version 7, RFC 9562)."""

import os
import random
import threading
import time
import uuid
from datetime import datetime

#: In milliseconds with 12 fraction bits.
_SECOND = 1000 << 12
_lock = threading.Lock()
_last = 0
#: Seeded by the system, once: to ask it for each id takes longer than all else here.
_random = random.Random()
os.register_at_fork(after_in_child=_random.seed)


def uuid7(at_ns: int | None = None) -> uuid.UUID:
    """Return a new UUIDv7; ids of one process do not go back in time, unless the clock does by more than a second.

    `at_ns` is a Unix time in nanoseconds, default now. The 12 bits behind the milliseconds hold the fraction
    of the millisecond (RFC 9562, section 6.2, method 3), so that ids made within one millisecond keep order.
    """
    return uuid.UUID(int=_uuid7(at_ns))


def new_id() -> str:
    """Return a new UUIDv7 as 32 hexadecimal digits."""
    return f"{_uuid7():032x}"


def _uuid7(at_ns: int | None = None) -> int:
    global _last
    ticks = ((time.time_ns() if at_ns is None else at_ns) << 12) // 1_000_000  # milliseconds with 12 fraction bits
    if at_ns is None:
        with _lock:
            if _last - ticks < _SECOND:
                ticks = max(ticks, _last + 1)
            _last = ticks
    return (ticks >> 12) << 80 | 7 << 76 | (ticks & 0xFFF) << 64 | 0b10 << 62 | _random.getrandbits(62)


def first_id_at(moment: datetime) -> uuid.UUID:
    """Return the smallest UUIDv7 of a moment: `id >= first_id_at(t)` selects what came in at `t` or later.

    Before 1970 there are none: the smallest of all stands for such a moment.
    """
    milliseconds = max(int(moment.timestamp() * 1000), 0)
    return uuid.UUID(int=milliseconds << 80 | 7 << 76 | 0b10 << 62)
