"""One run at a time: who holds the lock, and what becomes of it when a run ends, however it ends."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
BROKEN_OFF = "The run before this one was broken off"


class Deployment:
    """A deployment whose lock lies on this machine."""

    def __init__(self, directory: Path) -> None:
        """Write its inventory and two playbooks that take the lock, do `work` and release it: a whole and a part.

        The whole imports the part, without its work, before it does its own.
        """
        self.directory, self.lock, self.working = directory, directory / "lock", directory / "working"
        here = {"connection": "local", "become": False, "python_interpreter": sys.executable}
        variables = {f"ansible_{name}": value for name, value in here.items()}
        variables["deployment_lock_path"] = str(self.lock)
        groups = {group: {"hosts": {host: None}} for group, host in (("postgresql", "db1"), ("litellm", "gateway1"))}
        hosts = {"all": {"vars": variables, "children": groups}}
        (directory / "hosts.yml").write_text(yaml.safe_dump(hosts))
        work = {"name": "Work", "ansible.builtin.shell": "{{ work }}", "changed_when": False}
        take, release = (
            {"name": verb, "import_playbook": str(ROOT / f"playbooks/{verb}-lock.yml")} for verb in ("take", "release")
        )
        work_play = {"name": "Work", "hosts": "postgresql:litellm", "gather_facts": False, "tasks": [work]}
        part = {"vars": {"deployment_lock_for": "part"}}
        plays = [take, take | part, release | part, work_play, release]
        (directory / "play.yml").write_text(yaml.safe_dump(plays))
        (directory / "part.yml").write_text(yaml.safe_dump([take | part, work_play, release | part]))

    def start(
        self, work: str = "true", *prefix: str, playbook: str = "play.yml", limit: str = "all"
    ) -> subprocess.Popen[str]:
        command = ["ansible-playbook", "-i", str(self.directory / "hosts.yml"), str(self.directory / playbook)]
        command += ["--limit", limit]
        return subprocess.Popen(
            [*prefix, *command, "-e", json.dumps({"work": work})],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )

    def at_work(self, *prefix: str) -> subprocess.Popen[str]:
        """Return a run that holds the lock until it is killed; its work goes on until the end of the test."""
        work = f"touch {self.working}; exec timeout 600 sh -c 'while [ -e {self.working} ]; do sleep 0.2; done'"
        run = self.start(work, *prefix)
        until(self.working.exists)
        return run

    def run(self, playbook: str = "play.yml") -> str:
        run = self.start(playbook=playbook)
        output = run.communicate(timeout=60)[0]
        assert run.returncode == 0, output
        return output

    def has_ended(self) -> bool:
        return bool(json.loads(self.lock.read_text()).get("ended"))


def test_each_part_of_the_site_that_changes_hosts_takes_the_lock_when_it_is_run_alone() -> None:
    whole = [Path(play["import_playbook"]).stem for play in yaml.safe_load((ROOT / "site.yml").read_text())]
    assert (whole[0], whole[-1]) == ("take-lock", "release-lock")
    for part in set(whole[1:-1]) - {"preflight", "validation"}:
        plays = yaml.safe_load((ROOT / f"playbooks/{part}.yml").read_text())
        assert [play.get("import_playbook") for play in (plays[0], plays[-1])] == ["take-lock.yml", "release-lock.yml"]
        assert [play["vars"]["deployment_lock_for"] for play in (plays[0], plays[-1])] == [part, part]


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture
def deployment(tmp_path: Path) -> Iterator[Deployment]:
    made = Deployment(tmp_path)
    yield made
    made.working.unlink(missing_ok=True)


@pytest.mark.parametrize("playbook", ["play.yml", "part.yml"])
def test_a_run_that_ends_well_leaves_no_lock(deployment: Deployment, playbook: str) -> None:
    assert BROKEN_OFF not in deployment.run(playbook)
    assert not deployment.lock.exists()
    assert BROKEN_OFF not in deployment.run(playbook)


def test_a_run_that_fails_frees_the_lock_for_every_other_machine(deployment: Deployment) -> None:
    run = deployment.start("exit 3")
    assert "non-zero return code" in run.communicate(timeout=60)[0]
    until(deployment.has_ended)
    # as it is seen from a machine that cannot know whether the process runs
    held = json.loads(deployment.lock.read_text()) | {"machine": "another", "who": "someone@elsewhere"}
    deployment.lock.write_text(json.dumps(held))
    assert f"{BROKEN_OFF}: someone@elsewhere, process {run.pid}, begun" in deployment.run()
    assert not deployment.lock.exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_run_that_is_ended_from_outside_frees_the_lock(deployment: Deployment, number: signal.Signals) -> None:
    run = deployment.at_work()
    os.killpg(run.pid, number)
    run.communicate(timeout=60)
    until(deployment.has_ended)
    assert BROKEN_OFF in deployment.run()


@pytest.mark.parametrize("limit", ["all", "gateway1"])
def test_a_second_run_stops_at_once_and_names_the_first(deployment: Deployment, limit: str) -> None:
    first = deployment.at_work()
    try:
        second = deployment.start(playbook="part.yml", limit=limit)
        output = " ".join(second.communicate(timeout=60)[0].split())
        assert second.returncode != 0
        assert f"process {first.pid}, for" in output
        assert "-e deployment_lock_break=true" in output
        assert "TASK [Work]" not in output
        assert not deployment.has_ended()
    finally:
        os.killpg(first.pid, signal.SIGKILL)
        first.communicate()


@pytest.mark.skipif(os.getuid() != 0, reason="a namespace of its own for processes takes root's rights")
def test_a_controller_in_a_container_is_not_taken_for_a_process_that_is_gone(deployment: Deployment) -> None:
    """Its process has a number that here means another process, or none."""
    first = deployment.at_work("unshare", "--fork", "--pid", "--mount-proc", "--kill-child")
    try:
        second = deployment.start()
        assert "Another run is at work on this deployment" in second.communicate(timeout=60)[0]
        assert second.returncode != 0
    finally:
        os.killpg(first.pid, signal.SIGKILL)
        first.communicate()


def test_a_process_number_that_was_used_again_holds_no_lock(deployment: Deployment) -> None:
    run = deployment.at_work()
    os.killpg(run.pid, signal.SIGKILL)
    run.communicate()
    until(deployment.has_ended)
    held = json.loads(deployment.lock.read_text()) | {"ended": False, "process": str(os.getpid())}
    deployment.lock.write_text(json.dumps(held))
    assert BROKEN_OFF in deployment.run()
