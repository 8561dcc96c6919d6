"""The host as a whole: calls are stored with what was said, faults lose nothing, secrets stay where they belong."""

import json
import re
import threading
import time
import uuid
from typing import Any

import httpx
import pytest
from conftest import EPHEMERAL, Chat, Psql, Run, StoredCall, ansible, wait_until
from testinfra.host import Host

UNITS = ("litellm@1", "litellm@2", "litellm-log-writer")
GATEWAYS = ("127.0.0.1:4000", "127.0.0.1:4001")
# Where secrets are kept: the credentials that systemd hands to units, readable by root alone.
SECRET_FILES = {
    "/etc/litellm-sqlalchemy/credentials/writer.json": "root:root 600",
    "/etc/litellm-sqlalchemy/credentials/reader.json": "root:root 600",
    "/etc/litellm-sqlalchemy/credentials/migrator.json": "root:root 600",
    "/etc/litellm-sqlalchemy/credentials/monitor.json": "root:root 600",
    "/etc/postgresql-backup/database.json": "root:root 600",
    "/etc/postgresql-backup/drill-pgbackrest.conf": "root:root 600",
    "/etc/pgbackrest.conf": "root:postgres 640",
}
# Runs on the host; reads the secrets from stdin, so that they are in no process list. Prints {place: [names]}.
SCAN = r"""
import glob, json, os, subprocess, sys
secrets = {name: value.encode() for name, value in json.load(sys.stdin).items()}
found = {}
def look(place, content):
    names = [name for name, value in secrets.items() if value in content]
    if names:
        found[place] = names
look("journal", subprocess.run(["journalctl", "--no-pager", "--output=export"], capture_output=True).stdout)
for path in glob.glob("/proc/[0-9]*/cmdline") + glob.glob("/proc/[0-9]*/environ"):
    try:
        look(path, open(path, "rb").read())
    except OSError:
        pass
for top in ("/etc", "/home", "/opt/litellm", "/opt/litellm-sqlalchemy", "/root", "/tmp", "/usr/local", "/var"):
    for directory, _, files in os.walk(top):
        for name in files:
            path = os.path.join(directory, name)
            if os.path.isfile(path) and not os.path.islink(path) and not directory.startswith("/root/.cache/pip"):
                look(path, open(path, "rb").read())
print(json.dumps(found))
"""


def call_id() -> str:
    return f"test-{uuid.uuid4()}"


def strings(secrets: dict[str, Any]) -> dict[str, str]:
    return {name: value for name, value in secrets.items() if isinstance(value, str)}


def test_the_system_runs(host: Host) -> None:
    assert host.check_output("systemctl is-system-running --wait") == "running"


def test_exactly_these_sockets_listen(host: Host, address: str) -> None:
    listening = {tuple(line.split()[i] for i in (0, 4)) for line in host.check_output("ss -Hltun").splitlines()}
    addresses = (f"{address}:443", "127.0.0.1:5432", f"{address}:5432", *GATEWAYS, "127.0.0.1:8405", "127.0.0.1:9465")
    assert listening == {("tcp", name) for name in addresses}


def test_the_validation_report_is_green(run: Run) -> None:
    for command, checks in (("litellm-sqlalchemy", 17), ("postgresql-backup", 6)):
        report = json.loads(run(command, "validate", "--json"))
        assert [check for check in report["checks"] if not check["ok"]] == []
        assert len(report["checks"]) >= checks


def test_a_chat_is_stored_as_it_was_said(chat: Chat, stored_call: StoredCall) -> None:
    this = call_id()
    answer = chat('Grüße, \N{ROCKET} and "quotes"', this, temperature=0.5, user="someone")
    assert answer.status_code == 200
    (stored,) = stored_call(this)
    assert stored["payload"] == json.loads(answer.request.content)
    assert stored["response"]["payload"] == answer.json()
    assert (stored["model"], stored["stream"], stored["end_user"]) == ("demo", False, "someone")
    assert (stored["response"]["status"], stored["response"]["status_code"]) == ("success", 200)


def test_a_stream_is_stored_as_one_answer(chat: Chat, stored_call: StoredCall) -> None:
    this = call_id()
    answer = chat("As a stream?", this, stream=True)
    events = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]
    text = "".join(event["choices"][0]["delta"].get("content") or "" for event in events)
    (stored,) = stored_call(this)
    assert stored["stream"] is True
    assert stored["payload"] == json.loads(answer.request.content)
    assert stored["response"]["payload"]["choices"][0]["message"]["content"] == text == "Hello from the demo model."


def test_an_embedding_is_stored(gateway: httpx.Client, stored_call: StoredCall) -> None:
    this = call_id()
    body = {"model": "demo-embedding", "input": ["a", "b"]}
    answer = gateway.post("/v1/embeddings", json=body, headers={"x-litellm-call-id": this})
    assert answer.status_code == 200
    (stored,) = stored_call(this)
    assert stored["payload"] == body
    assert stored["response"]["payload"] == answer.json()


def test_a_failure_is_stored_with_its_error(chat: Chat, stored_call: StoredCall) -> None:
    this = call_id()
    answer = chat("Does it fail?", this, model="demo-failing")
    assert answer.status_code == 500
    (stored,) = stored_call(this)
    response = stored["response"]
    assert (response["status"], response["status_code"]) == ("failure", 500)
    assert "InternalServerError" in response["error_message"] + response["error_type"]


def test_a_wrong_key_is_refused_and_stored(gateway: httpx.Client, stored_call: StoredCall) -> None:
    this = call_id()
    body = {"model": "demo", "messages": [{"role": "user", "content": "Let me in"}]}
    headers = {"Authorization": "Bearer sk-wrong", "x-litellm-call-id": this}
    answer = gateway.post("/v1/chat/completions", json=body, headers=headers)
    assert answer.status_code in (400, 401)
    (stored,) = stored_call(this)
    assert stored["payload"] == body
    assert (stored["response"]["status"], stored["response"]["status_code"]) == ("failure", answer.status_code)


@pytest.mark.parametrize("unit", UNITS)
def test_a_killed_unit_comes_back_while_the_others_serve(
    unit: str, host: Host, run: Run, chat: Chat, stored_call: StoredCall
) -> None:
    def main_pids() -> dict[str, str]:
        return {name: host.check_output(f"systemctl show --value --property=MainPID {name}") for name in UNITS}

    before = main_pids()
    run("kill", "-KILL", before[unit])
    ready = "import sys, urllib.request; print(urllib.request.urlopen(sys.argv[1]).status)"
    for name, address in dict(zip(UNITS, GATEWAYS, strict=False)).items():
        assert name == unit or run("python3", "-c", ready, f"http://{address}/health/readiness").strip() == "200"

    def is_back() -> bool:
        state = host.check_output(f"systemctl show --property=MainPID,ActiveState {unit}").splitlines()
        return "ActiveState=active" in state and f"MainPID={before[unit]}" not in state

    wait_until(is_back, f"{unit} comes back", 150)
    assert [name for name, pid in main_pids().items() if pid != before[name]] == [unit]
    this = call_id()
    assert chat("Back again?", this).status_code == 200
    assert len(stored_call(this)) == 1


def test_a_stopped_database_loses_nothing_and_nobody_notices(chat: Chat, run: Run, psql: Psql) -> None:
    prefix = f"outage-{uuid.uuid4()}"
    answers: list[tuple[str, int]] = []
    end = threading.Event()

    def load(worker: int) -> None:
        number = 0
        while not end.is_set():
            this = f"{prefix}-{worker}-{number}"
            answers.append((this, chat("Is anybody there?", this).status_code))
            number += 1
            time.sleep(0.2)

    workers = [threading.Thread(target=load, args=(number,)) for number in range(2)]
    for worker in workers:
        worker.start()
    try:
        wait_until(lambda: answers, "a call is answered before")
        run("systemctl", "stop", "postgresql@17-main")
        before, began = len(answers), int(time.time())
        wait_until(lambda: len(answers) > before + 30, "calls are answered meanwhile")
        log = ("journalctl", "--unit=litellm-log-writer", f"--since=@{began}", "--output=cat")
        wait_until(lambda: "cannot deliver" in run(*log), "the writer has none to deliver to")
    finally:
        run("systemctl", "start", "postgresql@17-main")
        end.set()
        for worker in workers:
            worker.join()
    assert [answer for answer in answers if answer[1] != 200] == []
    statement = """
        SELECT q.call_id FROM requests q JOIN responses a ON a.request_id = q.id
         WHERE q.call_id LIKE :'prefix' AND a.status = 'success'"""
    wait_until(lambda: len(psql(statement, prefix=f"{prefix}-%")) >= len(answers), "all are stored")
    assert sorted(row[0] for row in psql(statement, prefix=f"{prefix}-%")) == sorted(answer[0] for answer in answers)


def test_another_run_predicts_no_change_and_shows_no_secret(secrets: dict[str, Any]) -> None:
    done = ansible("site.yml", "--check", "--diff", "-vvv")
    assert done.returncode == 0, done.stdout[-5000:]
    assert set(re.findall(r"changed=(\d+)", done.stdout)) == {"0"}, done.stdout[-20000:]
    output = done.stdout + done.stderr
    assert [name for name, value in strings(secrets).items() if value in output] == []


def test_another_port_of_the_database_is_predicted_by_what_its_present_one_says() -> None:
    done = ansible("playbooks/postgresql.yml", "--check", "-e", "postgresql_port=5433")
    assert done.returncode == 0, done.stdout[-5000:]
    changed = [task.partition("]")[0] for task in done.stdout.split("\nTASK [") if "\nchanged: " in task]
    assert changed == ["postgresql : configuration | Put settings and pg_hba.conf in force"]


def test_no_secret_is_in_the_output_of_the_deployment(secrets: dict[str, Any]) -> None:
    log = (EPHEMERAL / "ansible.log").read_text()
    assert "PLAY RECAP" in log
    assert [name for name, value in strings(secrets).items() if value in log] == []


def test_secrets_are_only_in_the_credentials(secrets: dict[str, Any], run: Run) -> None:
    found = json.loads(run("python3", "-c", SCAN, input=json.dumps(strings(secrets))))
    assert set(found) == SECRET_FILES.keys()
    kept_by_the_controller = {"vault_postgresql_ca_passphrase", "vault_postgresql_backup_identity"}
    assert not kept_by_the_controller & {name for names in found.values() for name in names}
    for file, access in SECRET_FILES.items():
        assert run("stat", "--format=%U:%G %a", file).strip() == access


def test_the_search_for_secrets_finds_what_is_there(run: Run) -> None:
    marker = uuid.uuid4().hex
    run("logger", f"marker {marker}")
    found = json.loads(run("python3", "-c", SCAN, input=json.dumps({"marker": marker})))
    assert "journal" in found
