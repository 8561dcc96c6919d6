"""Hold one session of a login, and query in it for each line of input; runs on the host under test.

Usage: database_session.py LOGIN. Answers the process id of the server's backend, or the error.
"""

import sys
from pathlib import Path

import psycopg2

from litellm_sqlalchemy.database import connection_arguments
from litellm_sqlalchemy.settings import load_settings

settings = load_settings(Path("/etc/litellm-sqlalchemy/settings.yml")).database
connection = psycopg2.connect(**connection_arguments(settings, sys.argv[1], "held session"))
connection.autocommit = True
for _ in sys.stdin:
    try:
        with connection.cursor() as cursor:
            cursor.execute("SELECT pg_backend_pid()")
            answer = str(cursor.fetchone()[0])
    except psycopg2.Error as error:
        answer = " ".join(str(error).split())
    print(answer, flush=True)
