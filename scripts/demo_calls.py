"""Send four calls through the demo's gateway and print what PostgreSQL holds of them.

Usage: demo_calls.py HOST PORT - the container's name, and the port on 127.0.0.1 where its gateway answers.
"""

import json
import ssl
import subprocess
import sys
import time
import uuid
from dataclasses import dataclass
from typing import Any

import httpx

CA_FILE = "inventories/local/pki/ca.crt"
MASTER_KEY_FILE = "/etc/litellm/credentials/LITELLM_MASTER_KEY.cred"
DEADLINE = 15  # seconds in which the rows must be there
ROWS = """
SELECT to_char(q.created_at, 'HH24:MI:SS') AS time, q.endpoint, q.model, q.stream,
       a.status, a.status_code AS http, a.total_tokens AS tokens, round(a.duration_ms) AS ms,
       left(coalesce(q.payload #>> '{messages,0,content}', q.payload ->> 'input'), 28) AS asked,
       left(coalesce(a.payload #>> '{choices,0,message,content}', a.payload #>> '{data,0,embedding}',
                     a.error_message), 32) AS answered
  FROM requests q JOIN responses a ON a.request_id = q.id
 WHERE q.call_id LIKE :'calls' ORDER BY q.created_at
"""


@dataclass(frozen=True)
class Call:
    """One call to the gateway and the HTTP status that it must end with."""

    what: str
    path: str
    body: dict[str, Any]
    status: int = 200


CALLS = (
    Call("chat", "/v1/chat/completions", {"model": "demo", "messages": [{"role": "user", "content": "Hello?"}]}),
    Call(
        "stream",
        "/v1/chat/completions",
        {"model": "demo", "stream": True, "messages": [{"role": "user", "content": "And as a stream?"}]},
    ),
    Call("embedding", "/v1/embeddings", {"model": "demo-embedding", "input": "Hello as numbers?"}),
    Call(
        "failure",
        "/v1/chat/completions",
        {"model": "demo-failing", "messages": [{"role": "user", "content": "Does it fail?"}]},
        status=500,
    ),
)


def in_host(host: str, *command: str, text: str = "") -> str:
    """Run a command in the container and return its output."""
    return subprocess.run(
        ["podman", "exec", "--interactive", host, *command], input=text, check=True, capture_output=True, text=True
    ).stdout


def answer_of(response: httpx.Response) -> str:
    """Return the part of an answer that a reader wants to see."""
    if response.headers["content-type"].startswith("text/event-stream"):
        events = [line[6:] for line in response.text.splitlines() if line.startswith("data: {")]
        return "".join(json.loads(event)["choices"][0]["delta"].get("content") or "" for event in events)
    answer = response.json()
    if "error" in answer:
        return str(answer["error"]["message"])
    return str(answer["data"][0]["embedding"] if "data" in answer else answer["choices"][0]["message"]["content"])


def send(client: httpx.Client, call: Call, call_id: str) -> None:
    """Send `call` under the id `call_id` and print what came back; another status ends the program."""
    response = client.post(call.path, json=call.body, headers={"x-litellm-call-id": call_id})
    print(f"{call.what:<10} {call.path:<22} {response.status_code}  {' '.join(answer_of(response).split())[:70]}")
    if response.status_code != call.status:
        sys.exit(f"{call.what}: HTTP {response.status_code} instead of {call.status}: {response.text[:500]}")


def rows(host: str, run: str) -> tuple[int, str]:
    """Return how many calls of `run` have their rows, and psql's table of them."""
    table = in_host(host, "runuser", "-u", "postgres", "--", "psql", "-d", "litellm", "-v", f"calls={run}-%", text=ROWS)
    return table.count("| success") + table.count("| failure"), table


def main(host: str, port: str) -> None:
    """Send the calls, wait for their rows, print them."""
    run = f"demo-{uuid.uuid4().hex[:8]}"
    key = in_host(host, "systemd-creds", "decrypt", "--name=LITELLM_MASTER_KEY", MASTER_KEY_FILE).strip()
    headers = {"Authorization": f"Bearer {key}"}
    trust = ssl.create_default_context(cafile=CA_FILE)
    with httpx.Client(
        base_url=f"https://127.0.0.1:{port}", headers=headers, verify=trust, timeout=60, trust_env=False
    ) as client:
        for call in CALLS:
            send(client, call, f"{run}-{call.what}")
    deadline = time.monotonic() + DEADLINE
    while (found := rows(host, run))[0] < len(CALLS) and time.monotonic() < deadline:
        time.sleep(0.5)
    print(f"\nTheir rows in PostgreSQL, tables requests and responses (call_id LIKE '{run}-%'):\n\n{found[1]}")
    if found[0] != len(CALLS):
        sys.exit(f"{found[0]} of {len(CALLS)} calls have rows: litellm-sqlalchemy status in the container says more")


if __name__ == "__main__":
    main(*sys.argv[1:])
