"""Writes calls into the spool of this host until a file appears, as LiteLLM's callback does; prints each call.

Usage: traffic.py SPOOL STOP-FILE CALLS-PER-SECOND
"""

import sys
import time
from pathlib import Path

import orjson

from litellm_sqlalchemy.frames import Kind
from litellm_sqlalchemy.identifiers import uuid7
from litellm_sqlalchemy.producer import Producer
from litellm_sqlalchemy.settings import SpoolSettings

BODY = b'{"model":"demo","messages":[{"role":"user","content":"%s"}]}' % (b"hello " * 40)


def record(**values: object) -> bytes:
    """Return the metadata of a record of now."""
    common = {"created_at": time.time_ns() // 1000, "content_mode": "full", "redaction_version": 1}
    return orjson.dumps({**common, "payload_size": len(BODY), **values})


producer = Producer(SpoolSettings(directory=Path(sys.argv[1]), segment_size=65536))
while not Path(sys.argv[2]).exists():
    call = uuid7().hex
    request = record(id=call, gateway="test:4000", origin="client", calls=1, call_id=call, model="demo", stream=False)
    producer.append(Kind.REQUEST, request, BODY)
    producer.append(Kind.RESPONSE, record(request_id=call, status="success", status_code=200, attempt_count=1), BODY)
    print(call, flush=True)
    time.sleep(1 / float(sys.argv[3]))
producer.close()
