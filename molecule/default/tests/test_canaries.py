"""Secrets of many shapes go in wherever a gateway takes text, and are then looked for wherever a host keeps any.

Each value is random and stands for one shape at one entry, so that a find tells what came through where. A control that
nothing redacts is planted in the same places first: a search that could not find anything proves nothing.
"""

import base64
import json
import random
import string
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pytest
import yaml
from conftest import CONTAINER, EPHEMERAL, Psql, Run, ansible, wait_until
from podman_pipelined import inside

HERE = Path(__file__).parent
PORT = 9998
RANDOM = random.SystemRandom()
#: Where the gateway's callback, with its redaction turned off for one shape, puts that shape.
CONTROL_PROGRAM = """
import os, re, sys
from types import SimpleNamespace
from litellm_sqlalchemy import redaction
from litellm_sqlalchemy.calls import Call
from litellm_sqlalchemy.events import event_of
from litellm_sqlalchemy.recorder import Recorder
from litellm_sqlalchemy.settings import load_settings
never = re.compile(rb"(?!)")
secrets = redaction._SECRETS
redaction._SECRETS = tuple((has, never if b"A[KS]IA" in shape.pattern else shape, new) for has, shape, new in secrets)
os.umask(0o007)
settings = load_settings()
recorder = Recorder(settings)
for value in sys.stdin.read().split():
    call = Call(recorder, settings.gateway.name)
    call.request.add(b'{"said": "' + value.encode() + b'"}')
    call.response.add(b'{"heard": "' + value.encode() + b'"}')
    call.accept(SimpleNamespace(user_id="canary-control"), {"litellm_call_id": "canary-control"}, None)
    call.event = event_of({"status": "success"})
    call.status_code, call.ended_at = 200, call.started
    call.conclude()
recorder.producer.close()
"""


#: Part of every canary, so that a place without it need not be searched for each of them; fits all their alphabets.
MARK = "CZRY7X"


def text(length: int, alphabet: str = string.ascii_letters + string.digits) -> str:
    return MARK + "".join(RANDOM.choice(alphabet) for _ in range(length - len(MARK)))


def token() -> str:
    """Three parts of a JSON Web Token."""
    parts = (b'{"alg":"HS256"}', f'{{"sub":"{text(12)}"}}'.encode())
    return ".".join([*(base64.urlsafe_b64encode(part).decode().rstrip("=") for part in parts), text(43)])


#: Shape -> what holds the secret, and the secret itself, fresh at every call.
SHAPES: dict[str, Callable[[str], tuple[str, str]]] = {
    "OpenAI key": lambda s: (f"sk-proj-{s}", s),
    "Anthropic key": lambda s: (f"sk-ant-api03-{s}-AA", s),
    "gateway key": lambda s: (f"sk-{s}", s),
    "bearer token": lambda s: (f"Authorization: Bearer {s}", s),
    "database URL": lambda s: (f"postgresql://app:{s}@db1.example.net:5432/app", s),
    "PEM": lambda s: (f"-----BEGIN PRIVATE KEY-----\n{s}\n-----END PRIVATE KEY-----", s),
    "verifier": lambda s: (f"SCRAM-SHA-256$4096:{text(22)}==${s}=:{text(43)}=", s),
    "AWS key id": lambda _s: (lambda value: (value, value))("AKIA" + text(16, string.ascii_uppercase + string.digits)),
    "AWS secret": lambda s: (f"aws_secret_access_key = {s[:40]}", s[:40]),
    "web token": lambda _s: (lambda value: (value, value))(token()),
    "GitHub token": lambda s: (f"ghp_{s[:36]}", s[:36]),
    "GitLab token": lambda s: (f"glpat-{s[:20]}", s[:20]),
    "Slack token": lambda s: (f"xoxb-{s}", s),
    "Google key": lambda s: (f"AIza{s[:35]}", s[:35]),
    "Hugging Face token": lambda s: (f"hf_{s[:34]}", s[:34]),
    "Vault token": lambda s: (f"hvs.{s}", s),
    "age identity": lambda _s: (lambda value: (f"AGE-SECRET-KEY-1{value}", value))(
        text(58, "QPZRY9X8GF2TVDW0S3JN54KHCE6MUA7L")
    ),
    "password in JSON": lambda s: (json.dumps({"user": "app", "password": s}), s),
}


def shaped(shape: str) -> tuple[str, str]:
    return SHAPES[shape](text(48))


Send = Callable[[httpx.Client, str], httpx.Response]


def chat(client: httpx.Client, content: str, headers: dict[str, str] | None = None, **more: Any) -> httpx.Response:
    body = {"model": "echo", "messages": [{"role": "user", "content": content}], **more}
    return client.post("/v1/chat/completions", json=body, headers=headers)


def one_line(value: str) -> str:
    return value.replace("\n", " ")


TOOL = {"type": "function", "function": {"name": "say", "parameters": {"type": "object", "properties": {}}}}
#: Entry -> how a text gets in there.
ENTRIES: dict[str, Send] = {
    "body and answer": lambda c, t: chat(c, f"Here: {t}, thanks"),
    "stream": lambda c, t: chat(c, f"Here: {t}, thanks", stream=True),
    "tool call": lambda c, t: chat(c, t, tools=[TOOL]),
    "provider's error": lambda c, t: chat(c, f"FAIL {t}"),
    "metadata": lambda c, t: chat(c, "Hello", metadata={"note": t, "tags": [t], "session_id": t}, user=t),
    "headers": lambda c, t: chat(
        c,
        "Hello",
        {name: one_line(t) for name in ("x-note", "x-litellm-session-id", "x-litellm-tags", "user-agent")},
    ),
    "call id": lambda c, t: chat(c, "Hello", {"x-litellm-call-id": one_line(t)}),
    "model": lambda c, t: chat(c, "Hello", model=t),
    "query": lambda c, t: c.post("/v1/chat/completions", params={"key": t}, json={"model": "demo", "messages": []}),
    "key that is refused": lambda c, t: chat(c, "Hello", {"Authorization": f"Bearer {one_line(t)}"}),
    "client's provider key": lambda c, t: chat(c, "Hello", api_key=one_line(t)),
    "broken body": lambda c, t: c.post("/v1/chat/completions", content=f'{{"model": "echo", "note": {json.dumps(t)}'),
    "path": lambda c, t: c.post(
        f"/openai/deployments/{quote(one_line(t), safe='')}/chat/completions", json={"messages": []}
    ),
    "file name": lambda c, t: c.post(
        "/v1/audio/transcriptions", data={"model": "echo"}, files={"file": (f"{one_line(t)}.wav", b"RIFF", "audio/wav")}
    ),
    "pass-through": lambda c, t: c.post("/canary", json={"text": f"Here: {t}, thanks"}),
    "pass-through's error": lambda c, t: c.post("/canary", json={"text": f"FAIL {t}"}),
}


#: Entries whose calls fail, and those whose calls mostly do: a comma in a model asks several models.
REFUSED = {"provider's error", "key that is refused", "broken body", "pass-through's error"}
MOSTLY_REFUSED = {"model", "path"}


def search(run: Run, values: dict[str, str], *sinks: str, mark: str = MARK) -> dict[str, list[str]]:
    """Return the names of the values found in each sink of the host."""
    run("sh", "-c", "cat > /run/canary_sinks.py", input=(HERE / "canary_sinks.py").read_text())
    asked = json.dumps({"values": values, "mark": mark, "sinks": sinks})
    found: dict[str, list[str]] = json.loads(run("python3", "/run/canary_sinks.py", input=asked))
    return found


def drained(run: Run, psql: Psql) -> None:
    """Wait until every call has ended and stands in the tables."""
    running = "SELECT count(*) FROM requests q WHERE NOT EXISTS (SELECT FROM responses WHERE request_id = q.id)"

    def is_stored() -> bool:
        status = json.loads(run("litellm-sqlalchemy", "status", "--json", check=False))
        return not status["spooled"] and psql(running) == [["0"]]

    wait_until(is_stored, "all is stored", 120)


@pytest.fixture(scope="module")
def upstream(run: Run) -> Iterator[None]:
    """The provider that says back what it was told."""
    run("sh", "-c", "cat > /run/canary_upstream.py", input=(HERE / "canary_upstream.py").read_text())
    run("systemd-run", "--unit=canary-upstream", "--collect", "python3", "/run/canary_upstream.py", str(PORT))
    wait_until(lambda: f":{PORT} " in run("ss", "-ltnH"), "the provider listens")
    yield
    run("systemctl", "stop", "canary-upstream")


@pytest.fixture(scope="module")
def statements(psql: Psql) -> Iterator[None]:
    """The view of PostgreSQL's statistics of statements, which are those of all databases since the start."""
    psql("CREATE EXTENSION IF NOT EXISTS pg_stat_statements", "postgres")
    yield
    psql("DROP EXTENSION pg_stat_statements", "postgres")


@pytest.fixture(scope="module")
def canaries(gateway: httpx.Client, run: Run, psql: Psql, upstream: None, statements: None) -> dict[str, str]:
    """What has been sent, by shape and entry: every shape at every entry."""
    sent = {}
    refused = []
    for entry, send in ENTRIES.items():
        for shape in SHAPES:
            content, secret = shaped(shape)
            answer = send(gateway, content)
            sent[f"{shape} by {entry}"] = secret
            if entry not in MOSTLY_REFUSED and (answer.status_code == 200) == (entry in REFUSED):
                refused.append(f"{shape} by {entry}: {answer.status_code} {answer.text[:200]}")
    assert refused == []
    drained(run, psql)
    return sent


#: What no canary can be planted in: what it shows is a fixed set of numbers and names.
NUMBERS_ONLY = {"metrics", "the command's output"}


@pytest.fixture
def planted(run: Run, psql: Psql, statements: None) -> Iterator[str]:
    """A secret of a known shape in every sink: through the callback without that shape's redaction, or by hand."""
    control = shaped("AWS key id")[1]
    python = "/opt/litellm/current/bin/python"
    command = ["runuser", "-u", "litellm", "-G", "litellm-spool", "--", python, "-c", CONTROL_PROGRAM]
    run(*command, input=control)
    drained(run, psql)
    places = ["/var/log/canary", "/var/log/postgresql/canary", "/var/spool/litellm-sqlalchemy/dead/x-1.damaged"]
    places += ["/var/lib/systemd/coredump/canary", "/run/canary", "/etc/canary", "/tmp/canary", "/usr/local/canary"]
    places += ["/var/spool/litellm-sqlalchemy/producers/.canary", "/var/spool/litellm-sqlalchemy/retired/canary"]
    for place in places:
        run("sh", "-c", 'mkdir -p "$(dirname "$1")" && cat > "$1"', "sh", place, input=control)
    run("systemd-cat", "cat", input=control)
    psql(f"DO $$ BEGIN PERFORM '{control}'; END $$")
    program = ["sh", "-c", "sleep 600; true", control]
    run("systemd-run", "--unit=canary-control", "--collect", f"--setenv=CONTROL={control}", *program)
    command = [*inside(CONTAINER), "runuser", "-u", "postgres", "--", "psql", "-qd", "litellm"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, text=True) as session:
        assert session.stdin
        session.stdin.write(f"SELECT '{control}' AS x \\gset\n")
        session.stdin.flush()
        yield control
    run("systemctl", "stop", "canary-control")
    run("rm", *places)
    run("sh", "-c", "litellm-sqlalchemy erase --user canary-control")


def test_every_sink_is_really_looked_into(run: Run, planted: str) -> None:
    deadline = time.monotonic() + 60
    blind = {"all"}
    while blind and time.monotonic() < deadline:
        found = search(run, {"control": planted})
        blind = {sink for sink, names in found.items() if not names} - NUMBERS_ONLY
    assert blind == set(), "a secret that nothing redacts is not found there"


def test_an_erased_control_is_gone(run: Run, psql: Psql, planted: str) -> None:
    sinks = ("table requests", "table responses", "dump", "spool")
    before = search(run, {"control": planted}, *sinks)
    assert all(before.values())
    report = json.loads(run("litellm-sqlalchemy", "erase", "--user", "canary-control", "--json"))
    assert report["requests"] >= 1
    run("rm", "/var/spool/litellm-sqlalchemy/producers/.canary", "/var/spool/litellm-sqlalchemy/retired/canary")
    gone = search(run, {"control": planted}, *sinks, "retired segments")
    run("touch", "/var/spool/litellm-sqlalchemy/producers/.canary", "/var/spool/litellm-sqlalchemy/retired/canary")
    assert not any(gone.values()), gone


def test_no_canary_is_found_anywhere(run: Run, canaries: dict[str, str]) -> None:
    found = search(run, canaries)
    assert len(found) >= 14
    assert len(canaries) == len(SHAPES) * len(ENTRIES)
    assert {sink: names for sink, names in found.items() if names} == {}


def new_secrets(old: dict[str, Any]) -> dict[str, Any]:
    """Return other values for all secrets of the inventory but the one that opens the authority's key."""
    changed: dict[str, Any] = {}
    for name, value in old.items():
        if name == "vault_postgresql_ca_passphrase":
            continue
        changed[name] = value if not isinstance(value, str) else value[:3] + text(len(value) - 3)
    changed["vault_postgresql_backup_identity"] = shaped("age identity")[0]
    return changed


#: More than log_statement = ddl, and statistics of every statement.
LOUD = "log_statement = 'all'\nlog_min_duration_statement = 0\npg_stat_statements.track = 'all'\n"


@pytest.fixture
def loud(run: Run, psql: Psql) -> Iterator[None]:
    """PostgreSQL logs and counts every statement of every session that does not forbid it for itself."""
    path = "/etc/postgresql/17/main/conf.d/99-loud.conf"

    def reload(logs: str) -> None:
        psql("SELECT pg_reload_conf()")
        wait_until(lambda: psql("SHOW log_statement") == [[logs]], "the setting is in force")

    run("install", "--owner=postgres", "--group=postgres", "--mode=0640", "/dev/stdin", path, input=LOUD)
    reload("all")
    yield
    run("rm", path)
    reload("none")
    psql("SELECT pg_stat_statements_reset()", "postgres")


def test_logins_are_made_and_rotated_without_a_trace(
    run: Run, psql: Psql, statements: None, loud: None, tmp_path: Path
) -> None:
    passwords = [f"{text(24)}-{number}" for number in range(2)]
    tasks = [
        {
            "ansible.builtin.include_role": {"name": "postgresql", "tasks_from": "access"},
            "vars": {"postgresql_login_pairs": [{"name": "canary", "member_of": [], "password": password}]},
        }
        for password in passwords
    ]
    variables = {"postgresql_groups": [], "postgresql_databases": []}
    play = {"hosts": "postgresql", "become": True, "gather_facts": False, "vars": variables, "tasks": tasks}
    (tmp_path / "rotate.yml").write_text(json.dumps([play]))
    done = ansible(str(tmp_path / "rotate.yml"), "--diff", "-vvv")
    verifiers = [row[0] for row in psql("SELECT rolpassword FROM pg_authid WHERE rolname ~ '^canary_[ab]$'")]
    psql(f"ALTER ROLE canary_a PASSWORD '{(control := f'{text(24)}-9')}'")  # what shows without that care
    psql("DROP ROLE IF EXISTS canary_a; DROP ROLE IF EXISTS canary_b")
    assert done.returncode == 0, done.stdout[-3000:]
    assert len(verifiers) == 2
    keys = [part for verifier in verifiers for part in verifier.split("$")[2].split(":")]
    values = {value: value for value in [*passwords, *keys]}
    assert [value for value in values if value in done.stdout + done.stderr] == []
    sinks = ("PostgreSQL's log", "pg_stat_statements", "pg_stat_activity", "journal", "other logs", "command lines")
    found = search(run, {**values, "control": control}, *sinks, mark="")
    assert {sink: [name for name in names if name != "control"] for sink, names in found.items()} == {
        sink: [] for sink in sinks
    }
    assert "control" in found["PostgreSQL's log"]
    assert "control" in found["pg_stat_statements"]


def test_ansible_shows_no_secret(run: Run, secrets: dict[str, Any], tmp_path: Path) -> None:
    """All secrets differ from those on the host: every task that handles one has a difference to show."""
    changed = new_secrets(secrets)
    (tmp_path / "changed.yml").write_text(yaml.safe_dump(changed))
    kept = {
        "ANSIBLE_LOG_PATH": str(tmp_path / "ansible.log"),
        "ANSIBLE_CACHE_PLUGIN": "ansible.builtin.jsonfile",
        "ANSIBLE_CACHE_PLUGIN_CONNECTION": str(tmp_path / "facts"),
    }
    playbooks = [f"playbooks/{name}.yml" for name in ("postgresql", "litellm", "haproxy")]  # all that handle secrets
    done = ansible(*playbooks, "--check", "--diff", "-vvv", "-e", f"@{tmp_path}/changed.yml", **kept)
    assert done.returncode == 0, done.stdout[-3000:]
    assert "credential_files" in done.stdout + done.stderr
    everything = {**{f"deployed {name}": value for name, value in secrets.items()}, **changed}
    values = {name: value for name, value in everything.items() if isinstance(value, str)}
    shown = {
        "output": done.stdout + done.stderr,
        "log file": (tmp_path / "ansible.log").read_text(),
        "fact cache": "".join(path.read_text() for path in (tmp_path / "facts").iterdir()),
        "log of the deployment": (EPHEMERAL / "ansible.log").read_text()
        if (EPHEMERAL / "ansible.log").exists()
        else "",
    }
    assert all(shown[place] for place in ("output", "log file", "fact cache"))
    found = {place: [name for name, value in values.items() if value in content] for place, content in shown.items()}
    assert {place: names for place, names in found.items() if names} == {}
    on_host = search(run, values, mark="")
    on_host.pop("configuration")  # root's own files of database logins; see test_default.py
    assert {sink: names for sink, names in on_host.items() if names} == {}


def test_the_gateways_credentials_are_encrypted(run: Run, secrets: dict[str, Any]) -> None:
    directory = "/etc/litellm/credentials"
    assert run("ls", directory).split() == ["ECHO_API_KEY.cred", "LITELLM_MASTER_KEY.cred"]
    key = secrets["vault_litellm_master_key"]
    sealed = run("cat", f"{directory}/LITELLM_MASTER_KEY.cred")
    assert key not in sealed
    assert key.encode() not in base64.b64decode(sealed)
    opening = ["systemd-creds", "decrypt", "--name=LITELLM_MASTER_KEY", f"{directory}/LITELLM_MASTER_KEY.cred"]
    assert run(*opening) == key
    # Another host's key opens nothing.
    program = 'mount -t tmpfs none /var/lib/systemd && systemd-creds setup && exec "$@"'
    assert key not in run("unshare", "--mount", "sh", "-c", program, "sh", *opening, check=False)
