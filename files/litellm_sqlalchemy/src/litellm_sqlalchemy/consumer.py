"""The writer's side of the spool: what has not been delivered yet, and the durable memory of what has.

`state.json` holds, for each producer, the cursor (segment and offset behind the last delivered frame), the last
sequence number and the calls that have a request but no response yet, and the counters of the whole spool. It is
replaced atomically after the database's commit: a crash in between delivers the batch again, which changes nothing.

When a producer is gone and its calls without a response are known, the writer makes up their responses, with the
sequence number 0, in a last segment of the producer's folder. It is delivered and kept like the others.
"""

import logging
import os
import shutil
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import orjson

from litellm_sqlalchemy import dead_letters, frames
from litellm_sqlalchemy.errors import SpoolError
from litellm_sqlalchemy.frames import Damage, Frame, Kind
from litellm_sqlalchemy.records import identifier
from litellm_sqlalchemy.retention import Retention
from litellm_sqlalchemy.spool import (
    STATE_FILE,
    HookTimes,
    Lock,
    has_ended,
    open_directory,
    open_file,
    producers,
    read_counters,
    read_file,
    replace_file,
    reserve_space,
    segments,
    sync_directory,
)
from litellm_sqlalchemy.store import Delivery

_log = logging.getLogger(__name__)

#: Bytes read from a segment at once; a longer frame doubles it. A batch ends when it holds as much.
READ_SIZE = 2 * 1024 * 1024
#: Fields of a cursor that stand apart from the others in the state.
_LOSSES = ("dropped", "undecided")


@dataclass
class Cursor:
    """How far a producer's frames are delivered.

    `sequence` is -1 while nothing is known of the frames before; `damaged` counts damages since the last whole frame.
    dropped: those of its frames that the totals have as dropped; undecided: frames missing beside damage, but for one
    for each damage, which the totals have as damaged until the producer's counters tell how many of them it dropped.
    """

    segment: int = 1
    offset: int = 0
    sequence: int = 0
    damaged: int = 0
    dropped: int = 0
    undecided: int = 0
    open: list[str] = field(default_factory=list)

    def losses(self, lost: int, dropped: int) -> tuple[int, int]:
        """Return how many frames are damaged and dropped beyond the totals; of damaged ones these may have too many.

        lost: frames behind the cursor that are nowhere; dropped: what the producer's counters say of all its frames.
        """
        left = max(dropped - self.dropped, 0)
        at_end = min(max(left - self.undecided, 0), lost)
        lost = max(lost, at_end + self.damaged)  # a killed producer may not have counted its last frames
        found = min(left, self.undecided + lost - self.damaged)
        return lost - found, found


@dataclass
class Totals:
    """Counters since the spool was made; `received` = all the others but duplicates + what is still spooled.

    delivered_*: frames that the database has committed; duplicates: deliveries that found the row there already;
    dead: frames refused for good; damaged: frames that the disk lost; dropped: frames that no space was left for;
    interrupted: responses made up for calls whose gateway process died, those included that were refused because a
    restore has lost the request, until a replay; hooks: of gateway processes that are gone.
    """

    delivered_requests: int = 0
    delivered_responses: int = 0
    duplicates: int = 0
    dead: int = 0
    damaged: int = 0
    dropped: int = 0
    interrupted: int = 0
    hooks: HookTimes = field(default_factory=HookTimes)

    @property
    def received(self) -> int:
        """Frames whose fate is known."""
        return self.delivered_requests + self.delivered_responses + self.dead + self.damaged + self.dropped


@dataclass
class Batch:
    """Frames of one producer, in order, and the cursor behind them."""

    producer: str
    frames: list[Frame]
    damages: list[Damage]
    cursor: Cursor
    places: list[int] = field(default_factory=list)
    """Of each damage, how many of the frames stand before it."""
    finished: bool = False
    """Whether the producer is gone and this is the last of it."""
    full: bool = False
    """Whether the producer has more to read."""
    size: int = 0
    """Bytes of the frames."""


class Consumer:
    """Reads the spool; only one at a time may have it."""

    def __init__(self, directory: Path, retention: Retention | None = None) -> None:
        """Take the writer's lock; delivered segments go to `retention`, if any. Raises SpoolError, LockedError."""
        self._retention = retention
        self.directory = open_directory(directory, create=True)
        self.problem = ""  # why a producer's files cannot be read, or its last segment not be written
        self.guard = threading.Lock()  # held while counters move from a producer's folder to the totals
        self._state = directory / STATE_FILE
        try:
            self._lock = Lock(directory / "writer.lock")
            self.totals, cursors = read_state(directory)
            self._cursors = {name: cursor for name, cursor in cursors.items() if name in producers(directory)}
            for leftover in (
                *directory.glob(".format.*"),
                *(directory / "dead").glob(".*.*"),
            ):  # of a writer that was killed
                leftover.unlink()
        except OSError as error:
            raise SpoolError(f"spool directory {directory} cannot be used: {error.strerror}") from None
        reserve_space(self._state)

    def cursors(self) -> dict[str, Cursor]:
        """Return how far each producer's frames are delivered; other threads may ask."""
        return self._cursors.copy()

    def close(self) -> None:
        """Let go of the lock."""
        self._lock.release()

    def batches(self, limit: int) -> Iterator[Batch]:
        """Yield one batch of at most `limit` frames of each producer that has any, or that has ended.

        A producer whose files cannot be read keeps none of the others back; `problem` tells of it.
        """
        self.problem = ""
        for producer in producers(self.directory):
            try:
                batch = self._read(producer, limit)
            except OSError as error:
                self._note(producer, error)
                continue
            before = self._cursors.get(producer, Cursor())
            if batch.frames or batch.damages or batch.finished or batch.cursor.segment > before.segment:
                yield batch

    def _note(self, producer: str, error: OSError) -> None:
        self.problem = f"{error.filename or self.directory / 'producers' / producer}: {error.strerror}"

    def account(self, batch: Batch, delivery: Delivery) -> None:
        """Count a delivered batch, once, and move its cursor's memory of open calls."""
        cursor, totals = batch.cursor, self.totals
        dead = {letter.frame.sequence for letter in delivery.dead}
        is_open = dict.fromkeys(cursor.open)
        damages = Counter(batch.places)
        if cursor.sequence < 0 and batch.frames:
            cursor.sequence = batch.frames[0].sequence - 1
        for place, frame in enumerate(batch.frames):
            cursor.damaged += damages[place]
            if not frame.sequence:
                totals.interrupted += 1
                is_open.pop(identifier(frame), None)
                continue
            if frame.sequence <= cursor.sequence:
                continue  # written again after a failed fsync
            gap = frame.sequence - cursor.sequence - 1
            cursor.sequence = frame.sequence
            if cursor.damaged:
                totals.damaged += gap
                cursor.undecided += max(gap - cursor.damaged, 0)
            else:
                totals.dropped += gap
                cursor.dropped += gap
            cursor.damaged = 0
            if frame.sequence in dead:
                totals.dead += 1
                is_open.pop(_call_of_response(frame), None)
                continue
            call = identifier(frame)
            if frame.kind is Kind.REQUEST:
                totals.delivered_requests += 1
                is_open[call] = None
            else:
                totals.delivered_responses += 1
                is_open.pop(call, None)
        cursor.damaged += damages[len(batch.frames)]
        if batch.finished or (cursor.undecided and not cursor.damaged):
            self._account_losses(batch)
        totals.duplicates += delivery.duplicates
        cursor.open = list(is_open)

    def _account_losses(self, batch: Batch) -> None:
        """Decide what frames beside damage were; count what a producer that is gone lost where no frame came after.

        A living one's counters do not tell while they are ahead of the cursor: it may have dropped later frames.
        """
        cursor = batch.cursor
        counters = read_counters(self.directory / "producers" / batch.producer)
        lost = max(counters.received - max(cursor.sequence, 0), 0)
        if lost and not batch.finished:
            return
        damaged, dropped = cursor.losses(lost, counters.dropped)
        self.totals.damaged += damaged
        self.totals.dropped += dropped
        cursor.sequence += lost
        cursor.dropped += dropped
        cursor.damaged = cursor.undecided = 0

    def retire(self, batch: Batch, delivery: Delivery) -> None:
        """Remember, durably, that an accounted batch is delivered; then remove what is no longer needed."""
        for number, damage in enumerate(batch.damages):
            name = f"{batch.producer}-{batch.cursor.segment}-{batch.cursor.offset}-{number}.damaged"
            replace_file(self.directory / "dead" / name, damage.content)
        folder = self.directory / "producers" / batch.producer
        origins = dead_letters.read_origins(folder) if delivery.dead else {}
        for letter in delivery.dead:
            if letter.frame.sequence:
                dead_letters.bury(self.directory, batch.producer, letter.frame, letter.reason, origins)
        self._cursors[batch.producer] = batch.cursor
        self._save()
        if batch.finished or not folder.is_dir():
            self._remove(folder)
            return
        for number, file in segments(folder):
            if number < batch.cursor.segment:
                self._discard(file)

    def hand_back(self, batch: Batch) -> None:
        """Leave calls of requeued requests to the gateway process that answers them, as far as it still lives."""
        origins = dead_letters.read_origins(self.directory / "producers" / batch.producer)
        for call in list(batch.cursor.open):
            cursor = self._cursors.get(origins.get(call, ""))
            if cursor is not None:
                batch.cursor.open.remove(call)
                cursor.open.append(call)

    def make_up(self, batch: Batch) -> None:
        """Write the responses of calls that a producer which is gone has left open: the batch is not its last, then.

        What the disk does not take now waits for the next time: to deliver the others' frames makes room.
        """
        batch.finished = False
        seed = frames.seed_of(batch.producer)
        content = b"".join(frames.encode(_interrupted(call), seed) for call in batch.cursor.open)
        folder = self.directory / "producers" / batch.producer
        try:
            replace_file(folder / f"{batch.cursor.segment + 1:010}.seg", content)
        except OSError as error:
            self._note(batch.producer, error)
        else:
            batch.full = True

    def _discard(self, segment: Path) -> None:
        if self._retention:
            self._retention.retire(segment)
        else:
            segment.unlink()

    def _remove(self, folder: Path) -> None:
        if folder.is_dir():  # no longer so where somebody removed it, or where only the last step failed before
            dead_letters.remove_requeued(folder)
            for _, file in segments(folder):
                self._discard(file)
            with self.guard:
                hooks = read_counters(folder).hooks
                shutil.rmtree(folder)
                self.totals.hooks += hooks
        sync_directory(folder.parent)
        del self._cursors[folder.name]  # not before: what is left of the folder must not be delivered again

    def _read(self, producer: str, limit: int) -> Batch:
        folder = self.directory / "producers" / producer
        ended = has_ended(folder)  # before the files are listed: what a dead producer left is all there is
        numbers = [number for number, _ in segments(folder)]
        known = self._cursors.get(producer)
        cursor = Cursor(**asdict(known)) if known else Cursor(sequence=-1 if numbers and numbers[0] > 1 else 0)
        batch = Batch(producer, [], [], cursor)
        for number in (number for number in numbers if number >= cursor.segment):
            if number > cursor.segment:
                cursor.segment, cursor.offset = number, 0
            last = number == numbers[-1]
            batch.full = not self._read_segment(folder, batch, limit, complete=ended or not last)
            if batch.full:
                return batch
        batch.finished = ended
        return batch

    @staticmethod
    def _read_segment(folder: Path, batch: Batch, limit: int, *, complete: bool) -> bool:
        """Add what a segment holds; return whether nothing is left in it that can be read now."""
        cursor = batch.cursor
        size = READ_SIZE
        seed = frames.seed_of(batch.producer)
        with open_file(folder / f"{cursor.segment:010}.seg") as file:
            end = os.fstat(file.fileno()).st_size
            while cursor.offset < end:
                data = os.pread(file.fileno(), size, cursor.offset)
                reaches_end = cursor.offset + len(data) >= end
                start = cursor.offset
                for found, behind in frames.decode(data, complete=complete and reaches_end, seed=seed):
                    batch.size += start + behind - cursor.offset
                    cursor.offset = start + behind
                    if isinstance(found, Damage):
                        batch.places.append(len(batch.frames))
                        batch.damages.append(found)
                    else:
                        batch.frames.append(found)
                    if len(batch.frames) >= limit or batch.size >= READ_SIZE:
                        return False
                if reaches_end:
                    return True
                if cursor.offset == start:
                    size *= 2
        return True

    def _save(self) -> None:
        cursors = {producer: asdict(cursor) for producer, cursor in self._cursors.items()}
        # Apart: an older package refuses a cursor with fields that it does not know; what stands here it forgets.
        losses = {producer: {name: cursor.pop(name) for name in _LOSSES} for producer, cursor in cursors.items()}
        content = {"totals": asdict(self.totals), "producers": cursors, "losses": losses}
        replace_file(self._state, orjson.dumps(content), reserved=True)
        reserve_space(self._state)


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


def _call_of_response(frame: Frame) -> str:
    """Return the call that a response which cannot be stored belongs to, an empty text where it does not say."""
    try:
        return identifier(frame) if frame.kind is Kind.RESPONSE else ""
    except (ValueError, KeyError, TypeError):
        return ""


def read_state(directory: Path) -> tuple[Totals, dict[str, Cursor]]:
    """Return the counters and cursors that the writer left. Raises SpoolError."""
    file = directory / STATE_FILE
    try:
        content: dict[str, Any] = orjson.loads(read_file(file))
        losses = content.get("losses", {})
        cursors = {name: Cursor(**cursor, **losses.get(name, {})) for name, cursor in content["producers"].items()}
        hooks = HookTimes(**content["totals"].pop("hooks", {}))
        return Totals(**content["totals"], hooks=hooks), cursors
    except FileNotFoundError:
        return Totals(), {}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise SpoolError(
            f"{file} is damaged ({error}): move it away; every frame is then delivered again, which adds no row twice"
        ) from None


def sequences(folder: Path, cursor: Cursor) -> Iterator[int]:
    """Yield the sequence numbers of the producer's own whole frames in its folder, from a cursor on."""
    seed = frames.seed_of(folder.name)
    for number, file in segments(folder):
        if number < cursor.segment:
            continue
        try:
            with open_file(file) as segment:
                segment.seek(cursor.offset if number == cursor.segment else 0)
                data = segment.read()
        except FileNotFoundError:  # delivered meanwhile
            continue
        for found, _behind in frames.decode(data, complete=False, seed=seed):
            if isinstance(found, Frame) and found.sequence:
                yield found.sequence


def oldest_waiting(folder: Path, cursor: Cursor) -> float | None:
    """Return the time (Unix) of the oldest record of a producer that is not delivered, None where all is."""
    for number, file in segments(folder):
        if number < cursor.segment:
            continue
        with open_file(file) as segment:
            segment.seek(cursor.offset if number == cursor.segment else 0)
            first = next(frames.decode(segment.read(), complete=False, seed=frames.seed_of(folder.name)), None)
        if first is not None and isinstance(first[0], Frame):
            return float(orjson.loads(first[0].metadata)["created_at"]) / 1e6
    return None
