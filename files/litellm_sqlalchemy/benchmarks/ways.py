"""Ways into the tables, each run in a process of its own: `python -m benchmarks.ways WAY SETTINGS COUNT`.

`copy` is the limit: rows that are encoded already, by COPY in transactions of 5,000 pairs. `writer` is the package's
writer, from the spool to the commit, exactly once. `naive` is what a callback without a spool does: an ORM object
and a commit for each event. `fill` puts the same calls into the spool and counts what that costs a gateway.
"""

import json
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from io import BytesIO
from pathlib import Path
from uuid import UUID

import orjson
from sqlalchemy.orm import Session

from benchmarks.processes import memory
from litellm_sqlalchemy.consumer import Consumer
from litellm_sqlalchemy.database import make_engine
from litellm_sqlalchemy.frames import Frame, Kind
from litellm_sqlalchemy.models import Request, Response
from litellm_sqlalchemy.records import TABLES, RowReader
from litellm_sqlalchemy.settings import Settings, load_settings
from litellm_sqlalchemy.store import Delivery
from litellm_sqlalchemy.writer import Writer

_COPY_PAIRS = 5000


def fill(settings: Settings, count: int, mode: str = "full", *, failed: bool = False) -> Callable[[], None]:
    """Prepare the calls of a gateway process; the work is to take them through the callback into the spool."""
    from benchmarks.data import record, samples  # its texts would count as the writer's memory
    from litellm_sqlalchemy.recorder import Recorder

    content = settings.content.model_copy(update={"mode": mode})
    recorder = Recorder(settings.model_copy(update={"content": content}))
    calls = list(samples(count))

    def work() -> None:
        for call in calls:
            record(recorder, call, failed=failed)
        recorder.producer.close()

    return work


def copy(settings: Settings, _count: int) -> Callable[[], None]:
    """Prepare encoded rows; the work is to COPY them."""
    frames = _spooled(settings)
    streams = []
    for first in range(0, len(frames), 2 * _COPY_PAIRS):
        chunk = frames[first : first + 2 * _COPY_PAIRS]
        for kind in Kind:
            rows = RowReader([frame for frame in chunk if frame.kind is kind])
            streams.append((kind, b"".join(iter(partial(rows.read, 0), b""))))
    engine = make_engine(settings.database, "writer", "benchmark")
    engine.connect().close()

    def work() -> None:
        for pair in zip(streams[::2], streams[1::2], strict=True):
            with engine.begin() as connection:
                for kind, stream in pair:
                    table = TABLES[kind]
                    connection.connection.cursor().copy_expert(
                        f"COPY {table.table.name} ({', '.join(table.columns)}) FROM STDIN (FORMAT binary)",
                        BytesIO(stream),
                        size=65536,
                    )

    return work


def writer(settings: Settings, _count: int) -> Callable[[], None]:
    """Prepare a writer; the work is to drain the spool."""
    process = Writer(settings)
    process.engine.connect().close()

    def work() -> None:
        while process.drain_once():
            pass

    return work


def naive(settings: Settings, _count: int) -> Callable[[], None]:
    """Prepare events; the work is to insert each by the ORM as it comes."""
    engine = make_engine(settings.database, "writer", "benchmark")
    engine.connect().close()
    events = [
        (Request if frame.kind is Kind.REQUEST else Response, orjson.loads(frame.metadata), frame.payload)
        for frame in _spooled(settings)
    ]

    def work() -> None:
        for model, metadata, payload in events:
            with Session(engine) as session:
                session.add(naive_row(model, metadata, orjson.loads(payload)))
                session.commit()

    return work


def naive_row(
    model: type[Request] | type[Response], metadata: dict[str, object], payload: object
) -> Request | Response:
    """Return the ORM object of a record, its times as Python's types."""

    values = {key: value for key, value in metadata.items() if key in model.__table__.columns}
    values["created_at"] = datetime.fromtimestamp(int(str(values["created_at"])) / 1e6, UTC)
    key = "id" if model is Request else "request_id"
    values[key] = UUID(str(values[key]))
    return model(**values, payload=payload, payload_encoding="json")


def _spooled(settings: Settings) -> list[Frame]:
    """Take all frames out of the spool."""
    consumer = Consumer(settings.spool.directory)
    frames: list[Frame] = []
    more = True
    while more:
        more = False
        for batch in consumer.batches(_COPY_PAIRS):
            frames += batch.frames
            more |= batch.full
            consumer.account(batch, Delivery())
            consumer.retire(batch, Delivery())
    consumer.close()
    return frames


WAYS = {
    "fill": fill,
    "fill-redacted": partial(fill, mode="redacted"),
    "fill-failed": partial(fill, failed=True),
    "copy": copy,
    "writer": writer,
    "naive": naive,
}


def main() -> None:
    """Run one way; print seconds, client CPU seconds and the process's peak of memory in megabytes."""
    way, file, count = sys.argv[1:]
    work = WAYS[way](load_settings(Path(file)), int(count))
    print("ready", flush=True)
    sys.stdin.readline()
    seconds, cpu = time.perf_counter(), time.process_time()
    work()
    result = {
        "seconds": time.perf_counter() - seconds,
        "cpu": time.process_time() - cpu,
        "memory": memory("self", "VmHWM"),  # getrusage would count that of what started the process, too
    }
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
