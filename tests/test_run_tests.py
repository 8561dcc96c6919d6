"""The summary of all stages: what it counts, and that it names what failed."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SPECIFICATION = importlib.util.spec_from_file_location("run_tests", ROOT / "scripts/run_tests.py")
assert SPECIFICATION
assert SPECIFICATION.loader
run_tests = importlib.util.module_from_spec(SPECIFICATION)
sys.modules["run_tests"] = run_tests  # its dataclass looks itself up there
SPECIFICATION.loader.exec_module(run_tests)

TESTS = """
import pytest

def test_good(): pass

@pytest.mark.skip(reason="not here")
def test_skipped(): pass

@pytest.mark.parametrize("value", ["a - b", "[c]"])
def test_bad(value): assert False, "it - is [bad]"

def test_broken(no_such_fixture): pass
"""


def test_all_outcomes_are_counted_and_failures_named(tmp_path):
    (tmp_path / "test_few.py").write_text(TESTS)
    command = ["pytest", "-p", "no:cacheprovider", f"--rootdir={tmp_path}", str(tmp_path)]
    job = run_tests.finish(run_tests.Job("unit", [command, ["false"]]))
    assert (job.passed, job.failed, job.skipped) == (1, 4, 1)
    names = [failure.rpartition("::")[2] for failure in job.failures]
    assert names == ["test_bad[a - b]", "test_bad[[c]]", "test_broken", "false"]


def test_jobs_run_at_once_and_their_lines_say_whose_they_are(monkeypatch, capfd, tmp_path):
    meet = f"touch {tmp_path}/$0; until [ -e {tmp_path}/a ] && [ -e {tmp_path}/b ]; do :; done; echo met"
    monkeypatch.setattr(run_tests.os, "cpu_count", lambda: 2)
    monkeypatch.setattr(
        run_tests, "jobs", lambda name, _: [run_tests.Job(name, [["timeout", "60", "sh", "-c", meet, name]])]
    )
    monkeypatch.setattr(run_tests, "STAGES", ("a", "b"))
    assert run_tests.main([]) == 0
    said = capfd.readouterr().out.splitlines()
    assert {"a           | met", "b           | met"} <= set(said)
    assert said[-1] == "2 passed, 0 failed, 0 skipped"


def test_several_stages_run_and_scenarios_follow_the_last(monkeypatch):
    asked = []
    monkeypatch.setattr(run_tests, "jobs", lambda stage, scenarios: asked.append((stage, scenarios)) or [])
    run_tests.main(["lint", "unit"])
    run_tests.main(["unit", "molecule", "backup", "rotation"])
    scenarios = ["backup", "rotation"]
    assert asked == [("lint", []), ("unit", []), ("unit", scenarios), ("molecule", scenarios)]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["lint", "uint"], "no stage is called uint"),
        (["molecule", "backups"], "no scenario is called backups in molecule/"),
    ],
)
def test_a_name_that_is_none_is_named_before_anything_runs(arguments, complaint):
    done = subprocess.run([ROOT / "scripts/test", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout.splitlines()[0] == complaint
