"""A gateway process's end of the spool, as a program: send.py SETTINGS CALLS LEDGER [PAUSE].

The ledger gets a line before and after each frame, by a system call that no fault is injected into; with
`fsync: always` the second one when the frame is durable. PAUSE is the time between two calls in seconds.
"""

import asyncio
import os
import sys
import time
from pathlib import Path

from litellm_sqlalchemy.frames import Kind
from litellm_sqlalchemy.identifiers import uuid7
from litellm_sqlalchemy.producer import Producer
from litellm_sqlalchemy.settings import load_settings
from support.records import BODY, Ledger, request, response


def main(settings: str, calls: str, file: str, pause: str = "0") -> None:
    """Send the pairs of `calls` calls."""
    ledger = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    producer = Producer(load_settings(Path(settings)).spool)

    def send(kind: Kind, call: str, metadata: bytes) -> bool:
        os.writev(ledger, [f"try {kind.value} {call}\n".encode()])
        sent = producer.append(kind, metadata, BODY)
        asyncio.run(producer.synced())
        os.writev(ledger, [f"{'ok' if sent else 'no'} {kind.value} {call}\n".encode()])
        return sent

    for _ in range(int(calls)):
        call = uuid7().hex
        if send(Kind.REQUEST, call, request(call)):
            send(Kind.RESPONSE, call, response(call))
        time.sleep(float(pause))
    producer.close()


def read_ledger(file: Path) -> Ledger:
    """Return what a sender has noted, up to its end."""
    ledger = Ledger()
    for line in file.read_text().splitlines() if file.exists() else []:
        word, kind, call = line.split()
        record = (Kind(int(kind)), call)
        if word == "try":
            ledger.tried.add(record)
            ledger.received += 1
        elif word == "ok":
            ledger.acknowledged.add(record)
        else:
            ledger.dropped += 1
    return ledger


if __name__ == "__main__":
    main(*sys.argv[1:])
