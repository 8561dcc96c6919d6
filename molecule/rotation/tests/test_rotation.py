"""Everything that a deployment keeps secret changes under load, and no client notices.

The tests run in their order: each begins with what the one before left, and the load of `clients` goes on from the
first of them to `test_no_request_failed_and_no_event_is_lost_or_doubled`.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from host import (
    CONTAINER,
    INVENTORY,
    PROJECT,
    SCENARIO,
    VAULT,
    accepted,
    address,
    ask,
    certificate,
    edit_secrets,
    enabled,
    gateway,
    in_host,
    psql,
    read_until,
    rotate,
    run,
    running,
    secrets,
    session,
    until,
)
from load import DatabaseClients, HttpClient, Request
from podman_pipelined import inside

#: Seconds for a test, where much else runs at the same time.
pytestmark = pytest.mark.timeout(1800)
MINIMAL_REQUESTS, MINIMAL_ROTATIONS = 10_000, 20
#: Queries per second of each login; each query opens a connection.
RATES = {"reader": 5.0, "writer": 3.0, "monitor": 2.0, "migrator": 1.5, "backup": 1.5}
PROVIDER_KEYS = ("first-key-of-the-slow-upstream", "second-key-of-the-slow-upstream")
ALL = ("writer", "reader", "migrator", "monitor", "backup", "master_key", "server_certificate", "haproxy_certificate")
PASSWORDS = ALL[:5]

LEDGER: list[Request] = []
#: What was done, how many secrets it rotated, and when: Unix time.
PHASES: list[tuple[str, int, float, float]] = []
#: The key that clients send: that of the last rotation that has ended, or for a while the one before it. The first one
#: is accepted to the end, the second for `litellm_master_key_overlap` seconds.
KEY: dict[str, str] = {}
EMERGENCY: list[float] = []
#: Seconds that an emergency may take.
EMERGENCY_LIMIT = 60
#: Rotations of the control, its queries, and how many of them failed.
CONTROL: list[int] = []
#: Variables of a role, behind its name, for a certificate that has expired when it is made.
EXPIRED = {"days": 0, "new_key": True}


@contextlib.contextmanager
def phase(name: str, rotations: int) -> Iterator[None]:
    """Name what is done meanwhile; nothing that ends meanwhile may have failed."""
    began, before = time.time(), len(LEDGER)
    yield
    PHASES.append((name, rotations, began, time.time()))
    assert failures(LEDGER[before:]) == []


def failures(requests: list[Request]) -> list[str]:
    return [f"{time.ctime(one.began)} {one.client} {one.name}: {one.error}" for one in requests if one.error]


@pytest.fixture(scope="module")
def clients() -> Iterator[list[DatabaseClients | HttpClient]]:
    """Clients of the database and of the gateway, at work until a test stops them."""
    source = (SCENARIO / "tests/upstream.py").read_text()
    in_host("systemd-run", "--unit=slow-upstream", "--collect", "python3", "-c", source, *PROVIDER_KEYS)
    KEY["first"] = KEY["present"] = secrets()["vault_litellm_master_key"]

    def client():
        return gateway(KEY["present"])

    started: list[DatabaseClients | HttpClient] = [
        DatabaseClients(LEDGER, CONTAINER, RATES),
        HttpClient(LEDGER, client, "demo", pause=0.5, calls=1),
        HttpClient(LEDGER, client, "demo", pause=0.5, calls=10),
        HttpClient(LEDGER, client, "slow", pause=0.1, calls=1),
        HttpClient(LEDGER, client, "slow", pause=0.1, calls=1),
    ]
    yield started
    for one in started:
        if one.is_alive():
            one.stop()
    in_host("systemctl", "stop", "slow-upstream.service")


@pytest.fixture(autouse=True)
def at_work(request: pytest.FixtureRequest, clients: list[DatabaseClients | HttpClient]) -> None:
    """Have the clients at work before the first test begins."""
    until(lambda: len({entry.client for entry in LEDGER}) == len(RATES) + 3, 300, "each client has had an answer")


def changed(before: dict[str, Any]) -> set[str]:
    """Return the names of the secrets that have another value than before."""
    return {name for name, value in secrets().items() if value != before[name]}


def password(*logins: str) -> set[str]:
    return {f"vault_litellm_{login}_password" for login in logins}


def test_all_secrets_rotate_at_once() -> None:
    old, certificates = secrets(), (certificate(5432), certificate(443))
    with phase("all at once", len(ALL)):
        run("playbooks/rotate-secrets.yml", "-e", "litellm_master_key_overlap=7200")
    new = secrets()
    assert accepted(old, *PASSWORDS) == set()
    assert accepted(new, *PASSWORDS) == set(PASSWORDS)
    assert [len(enabled(login)) for login in PASSWORDS] == [1] * len(PASSWORDS)
    assert certificate(5432) != certificates[0]
    assert certificate(443) != certificates[1]
    # The clients keep the old master key for now: it is accepted beside the new one.
    assert ask(KEY["first"]).status_code == ask(new["vault_litellm_master_key"]).status_code == 200


def releases() -> list[str]:
    """Return the release that the link points to, and those that the instances run."""
    units = [f"litellm@{number}.service" for number in (1, 2)]
    processes = in_host("systemctl", "show", "--property=MainPID", "--value", *units).split()
    commands = [in_host("cat", f"/proc/{process}/cmdline").split("\0")[0] for process in processes]
    return [
        in_host("readlink", "-f", "/opt/litellm/current").strip(),
        *(name.removesuffix("/bin/python") for name in commands),
    ]


def release_built_ahead(directory: Path, purpose: str, lacks: str = "nothing") -> Path:
    """Return a lock whose release is on the host already: what takes its time to build is not what is tried here."""
    requirements = directory / "requirements.txt"
    requirements.write_text((PROJECT / "roles/litellm/files/requirements.txt").read_text() + f"# {purpose}\n")
    wheels = in_host("sh", "-c", "sha256sum /opt/litellm/current/sources/*.whl").split()[0]
    # as roles/python_service/tasks/release.yml names it, where \\n is two characters
    name = hashlib.sha256(rf"{requirements.read_text().rstrip()}\n{wheels}".encode()).hexdigest()[:12]
    program = """[ -e "releases/$0" ] || cp --archive --link "$(readlink -f current)" "releases/$0"
        rm -rf releases/"$0"/lib/python3*/site-packages/"$1" """
    in_host("sh", "-c", f"set -eu; cd /opt/litellm; {program}", name, lacks)
    return requirements


def provider_credentials() -> set[str]:
    return {name for name in in_host("ls", "/etc/litellm/credentials").split() if "MASTER_KEY" not in name}


def test_values_that_were_edited_rotate_by_running_the_site_again_and_a_release_goes_and_comes(tmp_path: Path) -> None:
    old, first = secrets(), releases()
    assert len(set(first)) == 1
    KEY["second"] = KEY["present"] = old["vault_litellm_master_key"]
    assert "key1 " in ask(KEY["present"], "slow").text
    new: dict[str, Any] = {
        "vault_litellm_writer_password": f"edited-{uuid.uuid4()}",
        "vault_litellm_reader_password": f"edited-{uuid.uuid4()}",
        "vault_litellm_master_key": f"sk-edited-{uuid.uuid4()}",
    }
    # one key of a provider gets another value, one comes in addition
    edit_secrets(
        new | {"vault_litellm_provider_keys": {"SLOW_API_KEY": PROVIDER_KEYS[1], "SPARE_API_KEY": PROVIDER_KEYS[0]}}
    )
    lock = release_built_ahead(tmp_path, "another release")
    # as client certificates leave them that are switched off
    folder = "/etc/litellm-sqlalchemy/certificates/litellm_writer_b"
    metric = f"tls_certificate{folder.replace('/', '_')}.prom"
    in_host("install", "-D", "/dev/null", f"{folder}/client.key")
    in_host("touch", f"/var/lib/prometheus/node-exporter/{metric}")
    with phase("edited, then site.yml; release", len(new) + 2):
        run("site.yml", "-e", f"litellm_requirements_file={lock}")
    assert "certificates" not in in_host("ls", "/etc/litellm-sqlalchemy").split()
    assert metric not in in_host("ls", "/var/lib/prometheus/node-exporter").split()
    assert accepted(old, "writer", "reader") == set()
    assert accepted(new, "writer", "reader") == {"writer", "reader"}
    for key in (KEY["first"], KEY["present"], new["vault_litellm_master_key"]):
        assert ask(key).status_code == 200
    KEY["present"] = new["vault_litellm_master_key"]
    assert "key2 " in ask(KEY["present"], "slow").text
    assert provider_credentials() == {"SLOW_API_KEY.cred", "SPARE_API_KEY.cred"}
    second = releases()
    assert len(set(second)) == 1
    assert first != second
    settings = "/etc/litellm-sqlalchemy/settings.yml"
    with phase("rollback-litellm.yml", 0):
        in_host("sed", "--in-place", "$ a later: {}", settings)
        refusal = run("playbooks/rollback-litellm.yml", succeeds=False)
        in_host("sed", "--in-place", "/^later:/ d", settings)
        assert f"settings file {settings}: unknown key `later`" in refusal
        assert releases() == second
        run("playbooks/rollback-litellm.yml")
    assert releases() == first


def test_tags_name_secrets_too_and_a_key_of_a_provider_goes_while_another_takes_its_place() -> None:
    edit_secrets({"vault_litellm_provider_keys": {"SPARE_API_KEY": PROVIDER_KEYS[0]}})
    old, named = secrets(), ("monitor", "migrator", "backup")
    with phase("--tags: logins, provider_keys", len(named) + 1):
        run("playbooks/rotate-secrets.yml", "--tags", ",".join([*named, "provider_keys"]))
    assert changed(old) == password(*named)
    assert accepted(old, *PASSWORDS) == {"writer", "reader"}
    assert accepted(secrets(), *PASSWORDS) == set(PASSWORDS)
    assert "key1 " in ask(KEY["present"], "slow").text
    assert provider_credentials() == {"SPARE_API_KEY.cred"}


def test_an_authority_rolls_over_while_both_are_trusted(tmp_path: Path) -> None:
    """Beside its steps certificates change; sessions and streams go on."""
    trusted, before = INVENTORY / "pki/ca.crt", (certificate(5432), certificate(443))
    old = shutil.copy(trusted, tmp_path / "old.crt")
    with session("monitor") as ask_it:
        backend = ask_it()
        with phase("ca: begin, server_certificate", 2):
            assert "The new authority is trusted beside the old one" in rotate("ca,server_certificate")
        assert ask_it() == backend
    both = shutil.copy(trusted, tmp_path / "both.crt")
    assert both.read_text().count("BEGIN CERTIFICATE") == 2
    assert (certificate(5432) != before[0], certificate(443)) == (True, before[1])
    before = certificate(5432), certificate(443)
    with phase("ca: switch", 1):
        assert "All certificates are of the new authority" in rotate("ca")
    switched = certificate(5432), certificate(443)
    assert set(switched) & set(before) == set()
    with gateway(KEY["present"], both) as client:
        assert client.get("/health/readiness").status_code == 200
    with phase("ca: finish, haproxy_certificate", 2):
        assert "Only the new authority is trusted now" in rotate("ca,haproxy_certificate")
    assert (certificate(5432), certificate(443) != switched[1]) == (switched[0], True)
    assert trusted.read_text().count("BEGIN CERTIFICATE") == 1
    assert trusted.read_text() not in old.read_text()
    assert in_host("cat", "/etc/litellm-sqlalchemy/ca.crt") == trusted.read_text()


#: Kills the task that tries new logins, and what it runs, as soon as it does.
KILL_THE_TRIAL = """
import os, signal, time
from pathlib import Path
sought = b"with each " + b"credential in CREDENTIALS_DIRECTORY"
while True:
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if sought in (folder / "cmdline").read_bytes():
                os.kill(int((folder / "stat").read_text().rpartition(")")[2].split()[1]), signal.SIGKILL)
                os.kill(int(folder.name), signal.SIGKILL)
                raise SystemExit
        except (FileNotFoundError, ProcessLookupError):
            continue
    time.sleep(0.005)
"""


def kill(process: subprocess.Popen[str]) -> None:
    os.killpg(process.pid, signal.SIGKILL)


def killed_after(task: str) -> str:
    """Kill a rotation of the writer when a task has ended: when the next one begins; return what it said before."""
    with running("playbooks/rotate-secrets.yml", "-e", "rotate_only=writer") as process:
        said = read_until(process, rf"^TASK .*{task}")
        read_until(process, r"^(TASK|PLAY)")
        kill(process)
    return said


def killed_while_the_login_is_tried(_: str) -> str:
    """Kill a rotation, and first its task on the host, when the new login is tried."""
    with (
        subprocess.Popen([*inside(CONTAINER), "python3", "-c", KILL_THE_TRIAL]) as killer,
        running("playbooks/rotate-secrets.yml", "-e", "rotate_only=writer") as process,
    ):
        said = read_until(process, "^TASK .*Credentials . Write the files")
        assert killer.wait(60) == 0
        kill(process)
    return said


def killed_while_it_waits(_: str) -> str:
    """Kill a rotation while it waits for the last session of the old login, which the test holds."""
    query = "SELECT 1 FROM pg_stat_activity WHERE application_name = 'ansible' AND query LIKE 'SELECT usename, count(%'"
    with running("playbooks/rotate-secrets.yml", "-e", "rotate_only=writer") as process:
        said = read_until(process, "^TASK .*retire_logins . Disable old logins")
        until(lambda: psql(query) == ["1"], 60, "the run waits for the session")
        kill(process)
    return said


def written(login: str) -> str:
    """Return the login that is in the clients' credentials."""
    name: str = json.loads(in_host("cat", f"/etc/litellm-sqlalchemy/credentials/{login}.json"))["user"]
    return name


#: By step of a rotation: how a run is killed there, after which task.
KILLS = {
    "lock taken": (killed_after, "deployment_lock : Take the lock"),
    "idle login found": (killed_after, "active_logins . Keep the answer"),
    "new value stored": (killed_after, "Generate and store them"),
    "verifier set": (killed_after, "access . Make roles, databases and privileges"),
    "login tried": (killed_while_the_login_is_tried, ""),
    "file swapped": (killed_after, "Credentials . Write the files"),
    "writer reloaded": (killed_after, "Restart unit . Restart litellm-log-writer.service"),
    "waiting for sessions": (killed_while_it_waits, ""),
    "old login disabled": (killed_after, "retire_logins . Disable old logins"),
}


def test_a_rotation_that_is_killed_at_each_step_in_turn_converges() -> None:
    """Each run but the first goes on where the one before was killed, and is killed a step later; the last one ends."""
    before, present = secrets(), written("writer")
    with contextlib.ExitStack() as held:
        held.enter_context(session("writer"))
        for number, (step, (how, task)) in enumerate(KILLS.items()):
            with phase(f"killed: {step}", 0):
                said = how(task)
                assert ("The run before this one was broken off" in said) is (number > 0)
                assert written("writer") in enabled("writer")
            if step == "idle login found":
                assert (changed(before), enabled("writer"), written("writer")) == (set(), [present], present)
            if step == "verifier set":
                output = run("playbooks/postgresql-retire-logins.yml", succeeds=False)
                assert f"in the credentials of clients still (gateway1: {present})" in output
                assert len(enabled("writer")) == 2
                stored = secrets()
            if step == "waiting for sessions":
                assert changed(stored) == set()  # a rotation that has reached the database keeps its value
                held.close()
    with phase("killed no more", 2):
        assert "The run before this one was broken off" in rotate("writer")
    assert changed(before) == password("writer")
    assert enabled("writer") == [written("writer")]
    assert accepted(before, "writer") == accepted(stored, "writer") == set()
    assert accepted(secrets(), "writer") == {"writer"}
    assert in_host("find", "/run", "-maxdepth", "1", "-name", "credential-trial-*") == ""


def test_ctrl_c_says_so_and_the_next_run_goes_on_and_keeps_a_third_out() -> None:
    arguments = ("playbooks/rotate-secrets.yml", "-e", "rotate_only=monitor")
    with phase("Ctrl-C, two runs", 1):
        with running(*arguments) as process:
            read_until(process, "^TASK .*access . Make roles, databases and privileges")
            read_until(process, "^(TASK|PLAY)")
            os.killpg(process.pid, signal.SIGINT)
            read_until(process, "User interrupted execution")
            assert process.wait(30) != 0
        with running(*arguments) as first:
            said = read_until(first, "^PLAY .Find out what is in use")
            assert "The run before this one was broken off" in said
            output = run("playbooks/rotate-secrets.yml", succeeds=False)
            held = rf"Another run is at work on this deployment: root@\S+, process {first.pid}, for \d+ s\."
            assert re.search(held, output)
            assert "Find out what is in use" not in output
            assert first.stdout is not None
            rest = " ".join(first.stdout.read().split())
            assert first.wait() == 0, rest
        assert "The last rotation of vault_litellm_monitor_password is unfinished: it is finished now" in rest
    assert len(enabled("monitor")) == 1


@pytest.mark.parametrize(
    ("lacks", "said"),
    [
        ("fastapi", "does not accept the configuration, or cannot be loaded: no instance was touched"),
        ("uvicorn", "did not become healthy and was rolled back: all instances run the release"),
    ],
)
def test_a_release_that_does_not_work_does_not_stay(tmp_path: Path, lacks: str, said: str) -> None:
    before = releases()
    lock = release_built_ahead(tmp_path, f"without {lacks}", lacks)
    with phase(f"release without {lacks}", 0):
        output = run("playbooks/litellm.yml", "-e", f"litellm_requirements_file={lock}", succeeds=False)
    assert said in output
    assert lacks in output
    assert releases() == before


def test_no_request_failed_and_no_event_is_lost_or_doubled(clients: list[DatabaseClients | HttpClient]) -> None:
    missing = MINIMAL_REQUESTS - len(LEDGER)
    until(lambda: len(LEDGER) >= MINIMAL_REQUESTS, max(missing, 1), f"{MINIMAL_REQUESTS} requests")
    for one in clients:
        one.stop()
    assert failures(LEDGER) == []
    calls = sorted(request.name for request in LEDGER if request.client.startswith("http"))
    query = """SELECT call_id FROM requests JOIN responses ON request_id = requests.id
        WHERE call_id LIKE 'rotation-%' AND status = 'success'"""
    until(lambda: len(psql(query)) >= len(calls), 60, "the writer has stored all calls")
    assert sorted(psql(query)) == calls
    assert psql("SELECT count(*) FROM requests WHERE call_id LIKE 'rotation-%'") == [str(len(calls))]
    # HAProxy tells LiteLLM who the client is; what a client says of itself is not believed.
    addresses = psql("SELECT DISTINCT host(client_address) FROM requests WHERE call_id LIKE 'rotation-%'")
    with socket.create_connection((address(), 443)) as connection:
        assert addresses == [connection.getsockname()[0]]
    in_host("litellm-sqlalchemy", "status")
    users = {request.name for request in LEDGER if request.client.startswith("database")}
    assert users == {f"litellm_{login}_{end}" for login in PASSWORDS for end in "ab"}


def test_an_old_master_key_is_refused_in_the_end() -> None:
    name, end = "LITELLM_MASTER_KEY_PREVIOUS", 0.0
    file = f"/etc/litellm/credentials/{name}.cred"
    for line in in_host("systemd-creds", "decrypt", f"--name={name}", file).splitlines():
        until_then, _, key = line.partition(" ")
        end = float(until_then) if key == KEY["second"] else end  # a run after the end removes it
    until(lambda: time.time() > end, max(end - time.time(), 0) + 10, "the overlap is over")
    assert ask(KEY["present"]).status_code == ask(KEY["first"]).status_code == 200
    assert ask(KEY["second"]).status_code in (400, 401)


def test_an_emergency_ends_sessions_and_keys_within_a_minute() -> None:
    with session("reader") as ask_it:
        began = time.monotonic()
        rotate("reader,master_key", "-e", "rotate_emergency=true")
        EMERGENCY.append(time.monotonic() - began)
        # the server's last word, unless the connection was reset before it was read
        assert re.search("terminating connection due to administrator command|closed unexpectedly", ask_it())
    for key in (KEY["present"], KEY["first"]):
        assert ask(key).status_code in (400, 401)
    KEY["present"] = secrets()["vault_litellm_master_key"]
    assert ask(KEY["present"]).status_code == 200
    assert EMERGENCY[0] <= EMERGENCY_LIMIT


def test_certificates_that_have_expired_are_named_and_renewed() -> None:
    expired = {f"{role}_tls_{name}": value for role in ("postgresql", "haproxy") for name, value in EXPIRED.items()}
    expired["postgresql_parts"] = ["certificate", "configuration"]
    run("playbooks/postgresql.yml", "playbooks/haproxy.yml", "-e", json.dumps(expired))
    with pytest.raises(httpx.ConnectError, match="certificate has expired"):
        ask(KEY["present"])
    done = subprocess.run([*inside(CONTAINER), "litellm-sqlalchemy", "validate"], capture_output=True, text=True)
    assert done.returncode != 0
    assert "server certificate has ended" in done.stdout
    assert "run `site.yml`" in done.stdout
    run("site.yml", "--tags", "postgresql,haproxy,validation")
    assert ask(KEY["present"]).status_code == 200


#: Rotates a database password as one does without a second login: the server first, then the file that clients read.
SINGLE_LOGIN = """
import json, secrets, subprocess, sys
from pathlib import Path

file = Path("/etc/litellm-sqlalchemy/credentials/reader.json")
credential = json.loads(file.read_text()) | {"password": sys.stdin.read() or secrets.token_hex(20)}
statement = f"ALTER ROLE {credential['user']} PASSWORD '{credential['password']}'"
psql = ["runuser", "-u", "postgres", "--", "psql", "-XAtq", "-v", "ON_ERROR_STOP=1", "-d", "litellm"]
subprocess.run(psql, input="SET log_statement = 'none'; " + statement, text=True, check=True)
aside = file.with_suffix(".aside")
aside.touch(0o600)
aside.write_text(json.dumps(credential))
aside.rename(file)
"""


def test_a_single_login_instead_of_the_pair_fails_requests() -> None:
    """The control: the same load, clients and file, rotated without the pair ten times, or on until one fails."""
    control: list[Request] = []
    client = DatabaseClients(control, CONTAINER, {"reader": 100.0})
    until(lambda: any(not request.error for request in control), 30, "the client is at work")
    rotations = 1  # the last one, below
    while rotations < 10 or (rotations < 100 and not any(request.error for request in control)):
        in_host("python3", "-c", SINGLE_LOGIN)
        rotations += 1
    in_host("python3", "-c", SINGLE_LOGIN, text=secrets()["vault_litellm_reader_password"])
    last = time.time()
    until(lambda: control[-1].began > last and not control[-1].error, 30, "the client has the last password")
    client.stop()
    failed = [request.error for request in control if request.error]
    CONTROL.extend([rotations, len(control), len(failed)])
    assert failed
    assert all("authentication failed" in error for error in failed)


def test_what_a_lost_vault_password_protected_is_made_anew(tmp_path: Path) -> None:
    """As docs/operations/rotation.md says: without the vault and the key of the authority, whose passphrase it has."""
    lost, calls = secrets(), int(psql("SELECT count(*) FROM requests")[0])
    for path in (VAULT, INVENTORY / "pki"):
        shutil.move(path, tmp_path)
    run("playbooks/create-secrets.yml")
    kept = re.search("^repo1-cipher-pass=(.+)$", in_host("cat", "/etc/pgbackrest.conf"), re.MULTILINE)
    assert kept
    edit_secrets(
        {
            "vault_litellm_provider_keys": lost["vault_litellm_provider_keys"],
            "vault_postgresql_backup_repository_passphrase": kept[1],
        }
    )
    run("site.yml")
    assert accepted(lost, *PASSWORDS) == set()
    assert accepted(secrets(), *PASSWORDS) == set(PASSWORDS)
    KEY["present"] = secrets()["vault_litellm_master_key"]
    assert "key1 " in ask(KEY["present"], "slow").text
    in_host("litellm-sqlalchemy", "status")
    assert int(psql("SELECT count(*) FROM requests")[0]) > calls
    run("playbooks/take-backup.yml")


def test_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    def row(name: str, rotations: int, seconds: float, requests: list[Request]) -> str:
        kinds = [sum(request.client.startswith(kind) for request in requests) for kind in ("database", "http")]
        failed = sum(bool(request.error) for request in requests)
        return f"{name:<30} {rotations:>9} {seconds:>8.0f} {kinds[0]:>9} {kinds[1]:>7} {failed:>7}"

    rest, lines = list(LEDGER), []
    for name, rotations, began, ended in PHASES:
        within = [request for request in rest if began <= request.began < ended]
        rest = [request for request in rest if not began <= request.began < ended]
        lines.append(row(name, rotations, ended - began, within))
    rotations = sum(one[1] for one in PHASES)
    seconds = max(request.began for request in LEDGER) - min(request.began for request in LEDGER)
    lines += [row("between them", 0, seconds - sum(one[3] - one[2] for one in PHASES), rest)]
    lines += [row("all", rotations, seconds, LEDGER)]
    with capsys.disabled():
        print(f"\n{'while':<30} {'rotations':>9} {'seconds':>8} {'queries':>9} {'calls':>7} {'failed':>7}")
        print("\n".join(lines))
        print(f"killed and made good: {sum('killed:' in one[0] for one in PHASES)} of {len(KILLS)}")
        print(f"emergency: {', '.join(f'{took:.0f} s' for took in EMERGENCY)} (at most {EMERGENCY_LIMIT})")
        print("control, {0} rotations of a single login: {2} of {1} queries failed".format(*CONTROL))
    assert rotations >= MINIMAL_ROTATIONS
    assert len(LEDGER) >= MINIMAL_REQUESTS
