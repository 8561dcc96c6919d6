"""The judge: whatever happened, nothing is lost, doubled or made up, and our own counters say so."""

import base64
import json
from dataclasses import replace
from pathlib import Path

import orjson

from litellm_sqlalchemy import frames
from litellm_sqlalchemy.consumer import Cursor, read_state
from litellm_sqlalchemy.frames import Frame, Kind
from litellm_sqlalchemy.records import identifier
from litellm_sqlalchemy.spool import producers, segments
from litellm_sqlalchemy.status import SpoolStatus, spool_status
from support.postgresql import Database
from support.records import Ledger

Record = tuple[Kind, str]


def check(ledger: Ledger, database: Database, spool: Path, *, killed: bool = False, damaged: int = 0) -> SpoolStatus:
    """Fail where what was sent and what is in tables, dead letters and spool differ; return the spool's status.

    `killed` says that a producer was killed: the frame it was at may be there without having been acknowledged.
    `damaged` is how many frames the test has damaged: no more may be lost, whatever the counters say.
    """
    return judge(ledger, stored(database), spool, killed=killed, damaged=damaged)


def judge(
    ledger: Ledger,
    rows: list[tuple[Record, str]],
    spool: Path,
    *,
    killed: bool = False,
    damaged: int = 0,
    status: SpoolStatus | None = None,
) -> SpoolStatus:
    """The same for rows that were read already: record and status (of a response, otherwise empty)."""
    status = status or spool_status(spool)
    records = [record for record, _ in rows]
    real = {record for record, outcome in rows if outcome != "interrupted"}
    made_up = [record for record, outcome in rows if outcome == "interrupted"]
    letters, waiting = dead(spool), spooled(spool)
    known = real | letters | waiting

    assert len(records) == len(set(records)), "a row is doubled"
    assert known <= ledger.tried, f"never sent: {list(known - ledger.tried)[:3]}"
    lost = ledger.acknowledged - known
    assert len(lost) <= status.damaged <= damaged, f"lost: {len(lost)}, {sorted(lost)[:3]}; damaged: {status.damaged}"
    assert {(Kind.REQUEST, call) for _, call in made_up} <= set(records), "an interrupted call without its request"
    assert len(made_up) == status.interrupted
    assert status.dead == len(letters)
    assert status.spooled == len(waiting)
    assert status.delivered_requests == sum(kind is Kind.REQUEST for kind, _ in real)
    assert status.delivered_responses == sum(kind is Kind.RESPONSE for kind, _ in real)
    kept = status.delivered_requests + status.delivered_responses + status.dead + status.spooled
    assert kept == len(known), f"a frame has two fates: {kept} are counted, {len(known)} are there"
    if killed:
        assert len(ledger.acknowledged) + ledger.dropped <= status.received <= ledger.received
    else:
        assert known <= ledger.acknowledged, f"told to be dropped: {list(known - ledger.acknowledged)[:3]}"
        assert (status.received, status.dropped) == (ledger.received, ledger.dropped)
    return status


def stored(database: Database) -> list[tuple[Record, str]]:
    """Return every row of the tables."""
    requests = database.query("SELECT replace(id::text, '-', '') FROM requests")
    responses = database.query("SELECT replace(request_id::text, '-', ''), status FROM responses")
    return [((Kind.REQUEST, call), "") for (call,) in requests] + [
        ((Kind.RESPONSE, call), status) for call, status in responses
    ]


def dead(spool: Path) -> set[Record]:
    """Return the records in the dead letters, from the frames that they keep."""
    result = set()
    for file in spool.glob("dead/*.json"):
        data = base64.b64decode(json.loads(file.read_text())["frame"])
        [(frame, _)] = frames.decode(data, complete=True)
        assert isinstance(frame, Frame), f"{file} holds no frame"
        result.add(
            (frame.kind, str(orjson.loads(frame.metadata).get("id") or orjson.loads(frame.metadata)["request_id"]))
        )
    return result


def spooled(spool: Path) -> set[Record]:
    """Return the records of producers in the spool's segments behind the writer's cursor."""
    result = set()
    _, cursors = read_state(spool)
    for producer in producers(spool):
        cursor = cursors.get(producer, Cursor())
        for number, file in segments(spool / "producers" / producer):
            if number < cursor.segment:
                continue
            data = file.read_bytes()[cursor.offset if number == cursor.segment else 0 :]
            for frame, _ in frames.decode(data, complete=False, seed=frames.seed_of(producer)):
                if isinstance(frame, Frame) and frame.sequence:
                    result.add((frame.kind, identifier(frame)))
    return result


def tampered(status: SpoolStatus) -> list[SpoolStatus]:
    """Return statuses that are wrong by one in one counter: the judge has to refuse each."""
    names = (
        "received", "delivered_requests", "delivered_responses", "dead", "damaged", "dropped", "interrupted", "spooled",
    )  # fmt: skip
    return [replace(status, **{name: getattr(status, name) + 1}) for name in names]
