"""Open a verified connection for each query, with the credential that is in its file then; runs on the host under test.

Usage: database_client.py LOGIN QUERIES_PER_SECOND. Ends when its standard input does, and prints what it counted.
"""

import json
import sys
import threading
import time
from pathlib import Path

import psycopg2

from litellm_sqlalchemy.database import connection_arguments
from litellm_sqlalchemy.settings import load_settings

login, rate = sys.argv[1], float(sys.argv[2])
settings = load_settings(Path("/etc/litellm-sqlalchemy/settings.yml")).database
ended = threading.Event()
threading.Thread(target=lambda: (sys.stdin.read(), ended.set()), daemon=True).start()
count, failures, users = 0, [], set()
while not ended.is_set():
    began = time.monotonic()
    count += 1
    try:
        arguments = connection_arguments(settings, login, "rotation test")
        connection = psycopg2.connect(**arguments)
        with connection.cursor() as cursor:
            cursor.execute("SELECT current_user, ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()")
            user, encrypted = cursor.fetchone()
            assert encrypted
            users.add(user)
        connection.close()
    except Exception as error:
        failures.append(f"{time.strftime('%H:%M:%S')} {type(error).__name__}: {error}"[:300])
    ended.wait(max(0.0, 1 / rate - (time.monotonic() - began)))
print(json.dumps({"count": count, "failures": failures, "users": sorted(users)}))
