"""Open a verified connection for each query, with the credential that is in its file then; runs on the host under test.

Usage: database_client.py LOGIN=QUERIES_PER_SECOND ...
Prints a line of JSON for each query: when it began, the login, the user that it was, the error. It ends with its input.
"""

import json
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psycopg2

from litellm_sqlalchemy.database import connection_arguments
from litellm_sqlalchemy.settings import load_settings

BACKUP = Path("/etc/postgresql-backup/database.json")
SETTINGS = load_settings(Path("/etc/litellm-sqlalchemy/settings.yml")).database
LONGEST = 30  # seconds that a query may take
ENDED = threading.Event()
PRINTING = threading.Lock()


def arguments(login: str) -> dict[str, Any]:
    """Return libpq's parameters; the backups' login comes over the socket, all others with TLS and channel binding."""
    if login == "backup":
        return {"host": "/var/run/postgresql", "dbname": "litellm"} | json.loads(BACKUP.read_text())
    return connection_arguments(SETTINGS, login, "rotation test")


def query(login: str) -> str:
    """Return who a new connection is."""
    connection = psycopg2.connect(**arguments(login))
    try:
        with connection.cursor() as cursor:
            cursor.execute("SELECT current_user, ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()")
            user, encrypted = cursor.fetchone()
    finally:
        connection.close()
    if not encrypted and login != "backup":
        raise RuntimeError("the connection is not encrypted")
    return str(user)


def work(login: str, rate: float) -> None:
    """Query until told to stop."""
    while not ENDED.is_set():
        began, user, error = time.time(), "", ""
        try:
            user = query(login)
            if (took := time.time() - began) > LONGEST:
                raise TimeoutError(f"answered after {took:.0f} s")
        except Exception as problem:  # whatever it is, it is what a client would have seen
            error = f"{type(problem).__name__}: {problem}"[:300]
        with PRINTING:
            print(json.dumps([began, f"database {login}", user, error]), flush=True)
        ENDED.wait(max(0.0, began + 1 / rate - time.time()))


for login, rate in (argument.split("=") for argument in sys.argv[1:]):
    threading.Thread(target=work, args=(login, float(rate))).start()
sys.stdin.read()
ENDED.set()
