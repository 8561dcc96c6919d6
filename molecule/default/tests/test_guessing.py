"""Guessing passwords over the network is slow, and clients with the right one still come in."""

import json
from typing import Any

from conftest import Run, Show

GUESSERS, SECONDS, DELAY = 10, 5, 0.5
# Runs on the host, which the firewall's rate limit does not slow (test_firewall.py): the server alone does.
GUESS = r"""
import json, sys, threading, time
import psycopg2
given = json.load(sys.stdin)
good, took, valid = given["login"], [], []
end = time.monotonic() + given["seconds"]
def attempt(times, **changes):
    started = time.monotonic()
    try:
        psycopg2.connect(**{**good, **changes}).close()
        succeeded = True
    except psycopg2.OperationalError:
        succeeded = False
    times.append((time.monotonic() - started, succeeded))
def guess():
    while time.monotonic() < end:
        attempt(took, password=f"guess-{time.monotonic()}")
threads = [threading.Thread(target=guess) for _ in range(given["guessers"])]
for thread in threads:
    thread.start()
while time.monotonic() < end:
    attempt(valid)
    time.sleep(0.1)
for thread in threads:
    thread.join()
print(json.dumps({"guesses": took, "valid": valid}))
"""


def test_guessing_is_slow_and_the_right_password_comes_in(
    run: Run, address: str, active: dict[str, str], secrets: dict[str, Any], show: Show
) -> None:
    login = active["litellm_reader"]
    certificate = f"/etc/litellm-sqlalchemy/certificates/{login}/client"
    parameters = {
        "host": address,
        "dbname": "litellm",
        "user": login,
        "password": secrets["vault_litellm_reader_password"],
        "sslmode": "verify-full",
        "sslrootcert": "/etc/postgresql/17/main/tls/ca.crt",
        "sslcert": f"{certificate}.crt",
        "sslkey": f"{certificate}.key",
    }
    given = {"login": parameters, "guessers": GUESSERS, "seconds": SECONDS}
    seen = json.loads(run("python3", "-c", GUESS, input=json.dumps(given)))
    guesses, valid = [time for time, _ in seen["guesses"]], [time for time, _ in seen["valid"]]
    right = sum(succeeded for _, succeeded in seen["valid"])
    rate = f"{len(guesses) / SECONDS:.1f}/s over {GUESSERS} connections"
    rows = [
        ["wrong passwords", rate, f"{min(guesses):.2f} s at least"],
        ["right password meanwhile", f"{right} of {len(valid)} logins", f"{max(valid):.2f} s at most"],
    ]
    show("Guessing", rows)
    assert not any(succeeded for _, succeeded in seen["guesses"])
    assert all(succeeded for _, succeeded in seen["valid"])
    assert min(guesses) >= DELAY
    assert len(valid) >= SECONDS
