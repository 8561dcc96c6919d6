"""Everything that a deployment keeps secret changes under load, and no client notices.

The tests run in their order: each begins with what the one before left, and the load of `clients` goes on from the
first of them to `test_no_request_failed_and_no_event_is_lost_or_doubled`.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from host import (
    CONTAINER,
    INVENTORY,
    PROJECT,
    SCENARIO,
    VAULT,
    ask,
    certificate,
    edit_secrets,
    enabled,
    gateway,
    in_host,
    psql,
    read_until,
    refused,
    rotate,
    run,
    running,
    secrets,
    session,
    until,
)
from load import DatabaseClients, HttpClient, Request

#: Seconds for a test, where much else runs at the same time.
pytestmark = pytest.mark.timeout(1800)
MINIMAL_REQUESTS, MINIMAL_ROTATIONS = 10_000, 20
#: Queries per second of each login; each query opens a connection.
RATES = {"reader": 8.0, "writer": 4.0, "monitor": 4.0, "migrator": 2.0, "backup": 2.0}
PROVIDER_KEYS = ("first-key-of-the-slow-upstream", "second-key-of-the-slow-upstream")
ALL = ("writer", "reader", "migrator", "monitor", "backup", "master_key", "server_certificate", "haproxy_certificate")
PASSWORDS = ALL[:5]

LEDGER: list[Request] = []
#: What was done, how many secrets it rotated, and when: Unix time.
PHASES: list[tuple[str, int, float, float]] = []
#: The key that clients send: that of the last rotation that has ended, or for a while the one before it.
KEY: dict[str, str] = {}
EMERGENCY: list[float] = []


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


def test_all_secrets_rotate_at_once() -> None:
    old, certificates = secrets(), (certificate(5432), certificate(443))
    with phase("all at once", len(ALL)):
        run("playbooks/rotate-secrets.yml")
    new = secrets()
    for login in PASSWORDS:
        assert refused(login, old[f"vault_litellm_{login}_password"])
        assert not refused(login, new[f"vault_litellm_{login}_password"])
        assert len(enabled(login)) == 1
    assert certificate(5432) != certificates[0]
    assert certificate(443) != certificates[1]
    # The clients keep the old master key for now: it is accepted beside the new one.
    assert ask(KEY["first"]).status_code == ask(new["vault_litellm_master_key"]).status_code == 200


def test_values_that_were_edited_rotate_by_running_the_site_again() -> None:
    old = secrets()
    KEY["present"] = old["vault_litellm_master_key"]
    new = {
        "vault_litellm_writer_password": f"edited-{uuid.uuid4()}",
        "vault_litellm_reader_password": f"edited-{uuid.uuid4()}",
        "vault_litellm_master_key": f"sk-edited-{uuid.uuid4()}",
    }
    edit_secrets(new)
    with phase("edited, then site.yml", len(new)):
        run("site.yml")
    for login in ("writer", "reader"):
        assert refused(login, old[f"vault_litellm_{login}_password"])
        assert not refused(login, new[f"vault_litellm_{login}_password"])
    for key in (KEY["first"], KEY["present"], new["vault_litellm_master_key"]):
        assert ask(key).status_code == 200
    KEY["present"] = new["vault_litellm_master_key"]


def test_provider_keys_roll_out() -> None:
    assert "key1 " in ask(KEY["present"], "slow").text
    edit_secrets({"vault_litellm_provider_keys": {"SLOW_API_KEY": PROVIDER_KEYS[1]}})
    with phase("provider_keys", 1):
        rotate("provider_keys")
    assert "key2 " in ask(KEY["present"], "slow").text


@pytest.mark.parametrize("login", ["writer", "backup"])
def test_a_login_rotates_alone(login: str) -> None:
    old = secrets()
    with phase(login, 1):
        rotate(login)
    assert refused(login, old[f"vault_litellm_{login}_password"])
    assert [name for name, value in secrets().items() if value != old[name]] == [f"vault_litellm_{login}_password"]


def test_tags_name_secrets_too() -> None:
    old = secrets()
    with phase("--tags monitor,migrator", 2):
        run("playbooks/rotate-secrets.yml", "--tags", "monitor,migrator")
    new = secrets()
    for login in PASSWORDS:
        name = f"vault_litellm_{login}_password"
        assert (old[name] == new[name]) is (login not in ("monitor", "migrator"))
        assert refused(login, old[name]) is (login in ("monitor", "migrator"))


def test_sessions_and_streams_survive_new_certificates() -> None:
    before = certificate(5432), certificate(443)
    with session("monitor") as ask_it:
        backend = ask_it()
        with phase("server_certificate", 1):
            rotate("server_certificate")
        assert ask_it() == backend
    assert (certificate(5432) != before[0], certificate(443)) == (True, before[1])
    with phase("haproxy_certificate", 1):
        rotate("haproxy_certificate")
    assert certificate(443) != before[1]


def test_an_authority_rolls_over_while_both_are_trusted(tmp_path: Path) -> None:
    trusted, before = INVENTORY / "pki/ca.crt", (certificate(5432), certificate(443))
    old = shutil.copy(trusted, tmp_path / "old.crt")
    with phase("ca: begin", 1):
        assert "The new authority is trusted beside the old one" in rotate("ca")
    both = shutil.copy(trusted, tmp_path / "both.crt")
    assert both.read_text().count("BEGIN CERTIFICATE") == 2
    assert (certificate(5432), certificate(443)) == before
    with phase("ca: switch", 1):
        assert "All certificates are of the new authority" in rotate("ca")
    assert {certificate(5432), certificate(443)} & set(before) == set()
    with gateway(KEY["present"], both) as client:
        assert client.get("/health/readiness").status_code == 200
    with phase("ca: finish", 1):
        assert "Only the new authority is trusted now" in rotate("ca")
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


def killed_after(task: str) -> None:
    """Kill a rotation of the writer when a task has ended: when the next one begins."""
    with running("playbooks/rotate-secrets.yml", "-e", "rotate_only=writer") as process:
        read_until(process, rf"^TASK .*{task}")
        read_until(process, r"^(TASK|PLAY)")
        kill(process)


def killed_while_the_login_is_tried(_: str) -> None:
    """Kill a rotation, and first its task on the host, when the new login is tried."""
    command = ["podman", "exec", CONTAINER, "python3", "-c", KILL_THE_TRIAL]
    with (
        subprocess.Popen(command) as killer,
        running("playbooks/rotate-secrets.yml", "-e", "rotate_only=writer") as process,
    ):
        read_until(process, "^TASK .*Credentials . Write the files")
        assert killer.wait(60) == 0
        kill(process)


def killed_while_it_waits(_: str) -> None:
    """Kill a rotation while it waits for the last session of the old login."""
    query = "SELECT 1 FROM pg_stat_activity WHERE application_name = 'ansible' AND query LIKE 'SELECT usename, count(%'"
    with session("writer"), running("playbooks/rotate-secrets.yml", "-e", "rotate_only=writer") as process:
        read_until(process, "^TASK .*retire_logins . Disable old logins")
        until(lambda: psql(query) == ["1"], 60, "the run waits for the session")
        kill(process)


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


@pytest.mark.parametrize("step", KILLS)
def test_a_rotation_that_is_killed_is_made_good_by_the_next(step: str) -> None:
    how, task = KILLS[step]
    with phase(f"killed: {step}", 1):
        how(task)
        if step == "verifier set":
            output = run("playbooks/postgresql-retire-logins.yml", succeeds=False)
            assert f"in the credentials of clients still (gateway1: {written('writer')})" in output
            assert len(enabled("writer")) == 2
        assert "The run before this one was broken off" in rotate("writer")
    assert enabled("writer") == [written("writer")]
    assert not refused("writer", secrets()["vault_litellm_writer_password"])
    assert in_host("find", "/run", "-maxdepth", "1", "-name", "credential-trial-*") == ""


def written(login: str) -> str:
    """Return the login that is in the clients' credentials."""
    name: str = json.loads(in_host("cat", f"/etc/litellm-sqlalchemy/credentials/{login}.json"))["user"]
    return name


def test_ctrl_c_says_so_and_the_next_run_goes_on() -> None:
    with phase("Ctrl-C", 1):
        with running("playbooks/rotate-secrets.yml", "-e", "rotate_only=monitor") as process:
            read_until(process, "^TASK .*access . Make roles, databases and privileges")
            read_until(process, "^(TASK|PLAY)")
            os.killpg(process.pid, signal.SIGINT)
            read_until(process, "User interrupted execution")
            assert process.wait(30) != 0
        output = rotate("monitor")
    assert "The run before this one was broken off" in output
    assert "The last rotation of vault_litellm_monitor_password is unfinished: it is finished now" in output
    assert len(enabled("monitor")) == 1


def test_a_second_run_stops_at_once_and_names_the_first() -> None:
    with phase("two runs", 1), running("playbooks/rotate-secrets.yml", "-e", "rotate_only=monitor") as first:
        read_until(first, "^PLAY .Find out what is in use")
        output = run("playbooks/rotate-secrets.yml", succeeds=False)
        assert re.search(
            rf"Another run is at work on this deployment: root@\S+, process {first.pid}, for \d+ s\.", output
        )
        assert "Find out what is in use" not in output
        assert first.stdout is not None
        first.stdout.read()
        assert first.wait() == 0


def releases() -> list[str]:
    """Return the release that the link points to, and those that the instances run."""
    units = [f"litellm@{number}.service" for number in (1, 2)]
    processes = in_host("systemctl", "show", "--property=MainPID", "--value", *units).split()
    commands = [in_host("cat", f"/proc/{process}/cmdline").split("\0")[0] for process in processes]
    return [
        in_host("readlink", "-f", "/opt/litellm/current").strip(),
        *(name.removesuffix("/bin/python") for name in commands),
    ]


def deploy(requirements: Path, text: str, **how: bool) -> str:
    requirements.write_text(text)
    return run("site.yml", "--tags", "litellm", "-e", f"litellm_requirements_file={requirements}", **how)


def test_tags_of_the_site_prepare_and_complete_a_rotation_and_a_release(tmp_path: Path) -> None:
    first, old = releases(), secrets()["vault_litellm_reader_password"]
    assert len(set(first)) == 1
    edit_secrets({"vault_litellm_reader_password": f"edited-{uuid.uuid4()}"})
    with phase("--tags postgresql", 0):
        run("site.yml", "--tags", "postgresql")
    assert len(enabled("reader")) == 2
    lock = (PROJECT / "roles/litellm/files/requirements.txt").read_text()
    with phase("--tags litellm, release", 1):
        deploy(tmp_path / "requirements.txt", f"{lock}# another release\n")
    assert enabled("reader") == [written("reader")]
    assert refused("reader", old)
    second = releases()
    assert len(set(second)) == 1
    assert first != second
    with phase("rollback-litellm.yml", 0):
        run("playbooks/rollback-litellm.yml")
    assert releases() == first


def test_a_release_that_does_not_become_healthy_is_rolled_back(tmp_path: Path) -> None:
    before = releases()
    lock = (PROJECT / "roles/litellm/files/requirements.txt").read_text()
    alone = re.search(r"(?m)^litellm==.*\n(?:    .*\n)+", lock)
    assert alone, "the lock has LiteLLM"
    with phase("release that fails", 0):
        output = deploy(tmp_path / "requirements.txt", alone[0], succeeds=False)
    assert "did not become healthy and was rolled back: all instances run the release" in output
    assert "ModuleNotFoundError" in output
    assert releases() == before


def test_no_request_failed_and_no_event_is_lost_or_doubled(clients: list[DatabaseClients | HttpClient]) -> None:
    for one in clients:
        one.stop()
    assert failures(LEDGER) == []
    calls = sorted(request.name for request in LEDGER if request.client.startswith("http"))
    query = """SELECT call_id FROM requests JOIN responses ON request_id = requests.id
        WHERE call_id LIKE 'rotation-%' AND status = 'success'"""
    until(lambda: len(psql(query)) >= len(calls), 60, "the writer has stored all calls")
    assert sorted(psql(query)) == calls
    assert psql("SELECT count(*) FROM requests WHERE call_id LIKE 'rotation-%'") == [str(len(calls))]
    in_host("litellm-sqlalchemy", "status")
    users = {request.name for request in LEDGER if request.client.startswith("database")}
    assert users == {f"litellm_{login}_{end}" for login in PASSWORDS for end in "ab"}


def test_an_old_master_key_is_refused_in_the_end() -> None:
    name, folder, end = "LITELLM_MASTER_KEY_PREVIOUS", "/etc/litellm/credentials", time.time()
    if f"{name}.cred" in in_host("ls", folder).split():  # a run after the end removes it
        lines = in_host("systemd-creds", "decrypt", f"--name={name}", f"{folder}/{name}.cred").splitlines()
        end = max(float(line.split()[0]) for line in lines)
    until(lambda: time.time() > end, end - time.time() + 10, "the overlap is over")
    assert ask(KEY["present"]).status_code == 200
    assert ask(KEY["first"]).status_code in (400, 401)


def test_an_emergency_ends_sessions_and_keys_within_a_minute() -> None:
    with session("reader") as ask_it:
        began = time.monotonic()
        rotate("reader,master_key", "-e", "rotate_emergency=true")
        EMERGENCY.append(time.monotonic() - began)
        # the server's last word, unless the connection was reset before it was read
        assert re.search("terminating connection due to administrator command|closed unexpectedly", ask_it())
    assert ask(KEY["present"]).status_code in (400, 401)
    KEY["present"] = secrets()["vault_litellm_master_key"]
    assert ask(KEY["present"]).status_code == 200
    assert EMERGENCY[0] <= 60


def test_certificates_that_have_expired_are_named_and_renewed() -> None:
    run("playbooks/postgresql.yml", "-e", "postgresql_tls_days=0", "-e", "postgresql_tls_new_key=true")
    run("playbooks/haproxy.yml", "-e", "haproxy_tls_days=0", "-e", "haproxy_tls_new_key=true")
    with pytest.raises(httpx.ConnectError, match="certificate has expired"):
        ask(KEY["present"])
    done = subprocess.run(
        ["podman", "exec", CONTAINER, "litellm-sqlalchemy", "validate"], capture_output=True, text=True
    )
    assert done.returncode != 0
    assert "server certificate has ended" in done.stdout
    assert "run `site.yml`" in done.stdout
    run("site.yml", "--tags", "postgresql,haproxy,validation")
    assert ask(KEY["present"]).status_code == 200


def test_a_lost_vault_password_changes_nothing(tmp_path: Path) -> None:
    other = tmp_path / "password"
    other.write_text("not the password of this vault")
    before = secrets()
    for playbook in ("site.yml", "playbooks/rotate-secrets.yml"):
        output = run(playbook, succeeds=False, ANSIBLE_VAULT_PASSWORD_FILE=str(other))
        assert f"{VAULT} cannot be decrypted with the configured vault password; nothing was changed. Name" in output
    assert secrets() == before


def test_a_single_login_instead_of_the_pair_would_be_noticed() -> None:
    control: list[Request] = []
    client = DatabaseClients(control, CONTAINER, {"reader": 20.0})
    until(lambda: len(control) > 5, 30, "the client is at work")
    (login,) = enabled("reader")
    (before,) = psql(f"SELECT rolpassword FROM pg_authid WHERE rolname = '{login}'")
    psql(f"ALTER ROLE {login} PASSWORD 'the next one, on the login that is in use'")
    until(lambda: any(request.error for request in control), 30, "the client notices")
    psql(f"ALTER ROLE {login} PASSWORD '{before}'")
    client.stop()
    assert "authentication failed" in next(request.error for request in control if request.error)


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
        print(f"killed and made good: {sum('killed' in one[0] for one in PHASES)} of {len(KILLS)}")
        print(f"emergency: {', '.join(f'{took:.0f} s' for took in EMERGENCY)}")
    assert rotations >= MINIMAL_ROTATIONS
    assert len(LEDGER) >= MINIMAL_REQUESTS
