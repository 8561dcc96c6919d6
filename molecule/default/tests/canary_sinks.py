"""Look for values wherever a host could have put them; runs on the host, as root.

Reads {"values": {name: text}, "mark": "...", "sinks": [...]} from standard input, so that the values are in no process
list, and prints {sink: [names found]} for every sink that it has looked at. A mark is part of every value: where it is
not found, no value has to be looked for.
"""

import json
import os
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterable
from pathlib import Path


def output(*command: str) -> bytes:
    """Return what a command prints, errors included."""
    return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False).stdout


def files(*places: str) -> bytes:
    """Return the contents of all files below some places, without what pip and Python keep there."""
    found = []
    for place in places:
        for directory, below, names in os.walk(place):
            below[:] = [name for name in below if name not in ("site-packages", "pip", "__pycache__")]
            for name in names:
                path = Path(directory, name)
                if path.is_file() and not path.is_symlink():
                    try:
                        found.append(path.read_bytes())
                    except OSError:  # gone meanwhile
                        continue
    return b"\n".join(found)


def processes(name: str) -> bytes:
    """Return a file of every process."""
    found = []
    for path in Path("/proc").glob(f"[0-9]*/{name}"):
        try:
            found.append(path.read_bytes())
        except OSError:  # ended meanwhile
            continue
    return b"\n".join(found)


def rows(query: str, database: str = "litellm") -> bytes:
    """Return the rows of a query, seen by the superuser."""
    return output("runuser", "-u", "postgres", "--", "psql", "-XAt", "-d", database, "-c", query)


def page(url: str) -> bytes:
    """Return a page."""
    with urllib.request.urlopen(url, timeout=10) as answer:
        return bytes(answer.read())


def command(*arguments: str) -> bytes:
    """Return what the package's command prints."""
    return output("/usr/local/bin/litellm-sqlalchemy", *arguments)


SPOOL = "/var/spool/litellm-sqlalchemy"
SINKS: dict[str, Callable[[], bytes]] = {
    "table requests": lambda: rows("SELECT to_jsonb(t) FROM requests t"),
    "table responses": lambda: rows("SELECT to_jsonb(t) FROM responses t"),
    "spool": lambda: files(f"{SPOOL}/producers"),
    "retired segments": lambda: files(f"{SPOOL}/retired"),
    "dead letters": lambda: files(f"{SPOOL}/dead"),
    "journal": lambda: output("journalctl", "--no-pager", "--output=export"),
    "PostgreSQL's log": lambda: files("/var/log/postgresql"),
    "other logs": lambda: files("/var/log"),
    "pg_stat_statements": lambda: rows("SELECT query FROM pg_stat_statements", "postgres"),
    "pg_stat_activity": lambda: rows("SELECT query FROM pg_stat_activity WHERE pid <> pg_backend_pid()"),
    "PostgreSQL's files": lambda: files("/var/lib/postgresql"),
    "command lines": lambda: processes("cmdline"),
    "environments": lambda: processes("environ"),
    "units": lambda: output("systemctl", "show", "*.service"),
    "dump": lambda: output("runuser", "-u", "postgres", "--", "pg_dump", "litellm"),
    "metrics": lambda: page("http://127.0.0.1:9465/metrics"),
    "the command's output": lambda: b"".join(
        command(*words.split())
        for words in ("status --json", "calls --json --last 10000", "dead-letters --json", "settings", "validate")
    ),
    "core dumps": lambda: files("/var/lib/systemd/coredump", "/var/crash"),
    "run-time files": lambda: files(*(str(path) for path in Path("/run").iterdir() if path.name != "credentials")),
    "configuration": lambda: files("/etc"),
    "home and temporary files": lambda: files("/root", "/home", "/tmp", "/var/tmp", "/var/lib/litellm", "/var/cache"),
    "releases": lambda: files("/opt/litellm", "/opt/litellm-sqlalchemy", "/usr/local"),
}


def search(values: dict[str, str], mark: str, sinks: Iterable[str]) -> dict[str, list[str]]:
    """Return the names found in each sink."""
    found = {}
    for sink in sinks:
        content = SINKS[sink]()
        present = values if mark.encode() in content else {}
        found[sink] = [name for name, value in present.items() if value.encode() in content]
    return found


if __name__ == "__main__":
    asked = json.load(sys.stdin)
    print(json.dumps(search(asked["values"], asked["mark"], asked["sinks"] or SINKS)))
