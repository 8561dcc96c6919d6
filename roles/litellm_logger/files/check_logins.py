"""Log in to the database with each credential in CREDENTIALS_DIRECTORY; usage: check_logins.py SETTINGS."""

import os
import sys
from pathlib import Path

from litellm_sqlalchemy.database import connected
from litellm_sqlalchemy.errors import LogError
from litellm_sqlalchemy.settings import load_settings

database = load_settings(Path(sys.argv[1])).database.model_copy(update={"connect_timeout": 10})
for file in sorted(Path(os.environ["CREDENTIALS_DIRECTORY"]).glob("*.json")):
    try:
        with connected(database, file.stem, "check"):
            pass
    except LogError as error:
        sys.exit(str(error))
