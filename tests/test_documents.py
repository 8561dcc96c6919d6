"""Documents and alerts cannot lie: every command that they show is one that exists, and what runs it is named here."""

import functools
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
# The package's own README is checked by the package's tests.
DOCUMENTS = sorted(
    path
    for pattern in ("*.md", "docs/**/*.md", "roles/*/README.md", "inventories/*/README.md")
    for path in ROOT.glob(pattern)
    if path.name != "CHANGELOG.md"
)
PROGRAMS = [
    "ansible-playbook",
    "ansible-vault",
    "ansible-inventory",
    "ansible",
    "litellm-sqlalchemy",
    "uv",
    "pip",
    "python",
    "podman",
    "molecule",
    "openssl",
    "export",
    "curl",
    "git",
    "sudo",
    "apt",
    "cd",
    "psql",
    "ruff",
    "mypy",
    "yamllint",
    "ansible-lint",
    "pytest",
    "systemctl",
    "journalctl",
]
SHELLS = {"", "sh", "bash", "console", "shell"}

# Commands that need no playbook or script of ours: the pattern -> why the example is right, or what runs it.
COVERED = {
    r"systemctl (stop|start) postgresql-backup-snapshot\.timer": "molecule/backup runs it",
    r"sudo postgresql-backup (status|verify)": "molecule/backup runs it",
    r"(systemctl status|journalctl -u) [\w@*' .-]+": "molecule/default/tests/test_monitoring.py finds the units",
    r"\(umask 077 && openssl rand -base64 32 > [\w~./-]+\)": "writes a password file, as test_create_secrets.py does",
    r"export (ANSIBLE_VAULT_PASSWORD_FILE|DEMO_PORT)=\S+": "sets a variable that tests/test_create_secrets.py sets",
    r"ansible-vault (edit|view) inventories/\w+/group_vars/all/vault\.yml": "tests/test_create_secrets.py views one",
    r"sudo grep -h AUDIT /var/log/postgresql/17-main/\*\.json": "molecule/default/tests/test_postgresql.py runs it",
    r"git clone \S+( && cd \S+)?": "getting the repository",
    r"cd [\w./-]+": "changing the folder",
    r"molecule (test|converge|verify|destroy)( .*)?": "scripts/test runs molecule",
    r"(\.venv/bin/)?(uv )?(run )?(ruff|mypy|yamllint|ansible-lint|pytest)( .*)?": "scripts/test runs it",
    r"(\.venv/bin/)?uv (sync|lock|run pytest|build)( .*)?": "scripts/environment and scripts/test run uv",
    r"uv (--no-config )?pip compile .*": "makes a lock file; preflight's check gateway-lock reads the result",
    r"podman exec (-it )?litellm-demo .*": "scripts/demo runs litellm-sqlalchemy in this container",
}


def blocks(text: str):
    """Yield the shell blocks of a document: fenced ones with a shell's name or none, and indented ones."""
    for language, body in re.findall(r"^ *```(\w*)\n(.*?)^ *```", text, re.M | re.S):
        if language in SHELLS:
            yield body
    without = re.sub(r"^ *```.*?^ *```", "", text, flags=re.M | re.S)
    yield from re.findall(r"(?:^(?: {4,}|\t)\S.*\n?)+", without, re.M)


def commands(path: Path):
    """Yield each command line of a document's blocks, continuation lines joined; output is left out."""
    for body in blocks(path.read_text()):
        for line in body.replace("\\\n", " ").splitlines():
            line = re.sub(r"\s+#.*$", "", line.strip()).removeprefix("$ ")
            assignments = re.match(r"(?:[A-Z_]+=\S+ +)*", line).group()
            first = line[len(assignments) :].split(" ")[0].removeprefix(".venv/bin/")
            if first in PROGRAMS or first.startswith(("scripts/", "./", "(umask", ".ci/")):
                yield line[len(assignments) :]


def playbook_exists(words: list[str]) -> bool:
    """Return whether an ansible-playbook line names a playbook and an inventory that exist and parse."""
    inventory = words[words.index("-i") + 1] if "-i" in words else "inventories/local"
    playbook = next(word for word in words if word.endswith(".yml") and word != inventory)
    if "<" in inventory or "/your" in inventory:
        inventory = "inventories/staging"
    return parses(inventory, playbook)


@functools.cache
def parses(inventory: str, playbook: str) -> bool:
    command = ["ansible-playbook", "-i", inventory, playbook, "--syntax-check"]
    return subprocess.run(command, cwd=ROOT, capture_output=True).returncode == 0


def covered(command: str) -> bool:
    """Return whether a documented command is one that works, as far as can be told without hosts."""
    if any(re.fullmatch(pattern, command) for pattern in COVERED):
        return True
    words = [word for word in shlex.split(command) if word]
    program = words[0].removeprefix(".venv/bin/")
    if program == "ansible-playbook":
        return playbook_exists(words)
    if program.startswith(("scripts/", ".ci/", "./")):
        path = ROOT / program
        return path.is_file() and bool(path.stat().st_mode & 0o100)
    if program == "python":
        return (ROOT / words[1]).is_file()
    if program == "litellm-sqlalchemy":
        package = ROOT / "files/litellm_sqlalchemy/src/litellm_sqlalchemy"
        text = "".join((package / name).read_text() for name in ("cli.py", "reports.py"))
        return len(words) > 1 and re.search(rf'add\(\s*"{words[1]}"', text) is not None
    return False


ALERTS = {
    rule["alert"]: rule
    for group in yaml.safe_load((ROOT / "files/prometheus/alerts.yml").read_text())["groups"]
    for rule in group["rules"]
}
SHOWN = sorted({(str(path.relative_to(ROOT)), command) for path in DOCUMENTS for command in commands(path)})


@pytest.mark.parametrize(("document", "command"), SHOWN)
def test_a_documented_command_is_covered(document, command):
    assert covered(command), f"{document} shows `{command}`: nothing runs it. Correct it, or add it to COVERED."


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path):
    targets = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", path.read_text())
    assert [target for target in targets if "://" not in target and not (path.parent / target).exists()] == []


@pytest.mark.parametrize("alert", ALERTS)
def test_an_alert_says_what_to_do(alert):
    rule = ALERTS[alert]
    assert rule["labels"]["severity"] in ("critical", "warning")
    assert rule["for"]
    assert rule["annotations"].keys() == {"summary", "description"}
    description = rule["annotations"]["description"]
    shown = [text for text in re.findall(r"`(.*?)`", description) if " " in text]
    documents = re.findall(r"docs/[\w/.-]+\.md", description)
    assert shown or documents
    assert [command for command in shown if not covered(command)] == []
    assert [document for document in documents if not (ROOT / document).exists()] == []


def test_commands_are_found_in_documents():
    assert ("inventories/staging/README.md", "ansible-playbook -i inventories/staging site.yml") in SHOWN
