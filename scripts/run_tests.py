"""Run the test stages and sum them up; called by scripts/test.

A stage is a list of commands, and so is each scenario of the stage molecule. As many of them run at once as there are
cores: a deployment uses no more than one. pytest's own counts are summed; any other command counts as one test.
"""

import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

COUNTS = re.compile(r"(\d+) (passed|failed|errors?|skipped)\b")
PYTEST_SUMMARY = re.compile(r"^=*\s*((?:\d+ \w+(?:, )?)+) in [\d.]+s")
PYTEST_FAILURE = re.compile(r"^(?:FAILED|ERROR) (\S+::[^\s\[]+(?:\[.*?\](?= - |$))?)")
ESCAPES = re.compile(r"\x1b\[[0-9;]*m")
MOLECULE_ACTION = re.compile(r"\[(\S+ > (?:converge|idempotence))\] Executing$")
PLAYBOOK_TIME = re.compile(r"Playbook run took (\d+) days, (\d+) hours, (\d+) minutes, (\d+) seconds")
SITE_RUNS = {"converge": "first run of the playbook", "idempotence": "second run, nothing to change"}
#: In the order of their beginning: what tells most soon comes first, and the short integration tests fill up the end.
STAGES = ("lint", "unit", "audit", "molecule", "integration")
SCENARIO_SECONDS = 900  # alone on two quiet cores; slower machines may take longer, so that this is told and no failure


@dataclass
class Job:
    """What runs one after the other, and what it came to."""

    name: str
    commands: list[list[str]]
    prefix: str = ""
    seconds: float = 0
    passed: int = 0
    failed: int = 0
    skipped: int = 0
    notes: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def say(self, line: str) -> None:
        """Print a line, whole even when another job prints at the same time."""
        sys.stdout.write(f"{self.prefix}{line}\n")
        sys.stdout.flush()


def jobs(stage: str, scenarios: list[str]) -> list[Job]:
    """Return what a stage consists of; of the stage molecule the named scenarios, or all."""
    if stage == "lint":
        commands = [
            ["ruff", "check"],
            ["mypy", "--strict"],
            ["yamllint", "--strict", "."],
            ["ansible-lint", "--profile", "production", "--strict", "--offline", "--nocolor"],
        ]
    elif stage == "unit":
        commands = [
            ["pytest", "--rootdir=files/litellm_sqlalchemy", "files/litellm_sqlalchemy/tests/unit"],
            ["pytest", "tests"],
        ]
    elif stage == "audit":
        commands = [["python", "scripts/audit.py"]]
    elif stage == "integration":
        commands = [["molecule/shared/in-image", "pytest", "tests/integration"]]
    else:
        names = scenarios or sorted(path.parent.name for path in Path("molecule").glob("*/molecule.yml"))
        return [Job(name, [["molecule", "test", "--scenario-name", name]]) for name in names]
    return [Job(stage, commands)]


def run(command: list[str], job: Job) -> None:
    """Run one command, showing its output, and add it to what the job came to."""
    job.say(f"--> {' '.join(command)}")
    started, counts, action = time.monotonic(), dict.fromkeys(("passed", "failed", "skipped"), 0), ""
    failures: list[str] = []
    environment = os.environ | {"PYTHONUNBUFFERED": "1", "NO_COLOR": "1", "ANSIBLE_NOCOLOR": "1"}
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            job.say(line.rstrip("\n"))
            text = ESCAPES.sub("", line).strip(" │\n")
            if summary := PYTEST_SUMMARY.match(text):
                for number, what in COUNTS.findall(summary[1]):
                    counts[what if what in counts else "failed"] += int(number)
            elif failure := PYTEST_FAILURE.match(text):
                failures.append(failure[1])
            elif begun := MOLECULE_ACTION.search(text):
                action = begun[1]
            elif action and (took := PLAYBOOK_TIME.search(text)):
                days, hours, minutes, seconds = map(int, took.groups())
                total = ((days * 24 + hours) * 60 + minutes) * 60 + seconds
                job.notes.append(f"{SITE_RUNS[action.rpartition(' ')[2]]}: {total} s")
                action = ""
    took_in_all = time.monotonic() - started
    if process.returncode and not counts["failed"]:
        counts["failed"] = 1
        failures.append(" ".join(command))
    elif not process.returncode and not counts["passed"]:
        counts["passed"] = 1
    job.passed += counts["passed"]
    job.failed += counts["failed"]
    job.skipped += counts["skipped"]
    job.failures += failures
    if command[:2] == ["molecule", "test"]:
        slow = f"more than {SCENARIO_SECONDS} s" if took_in_all > SCENARIO_SECONDS and not job.prefix else ""
        job.notes += [slow] if slow else []
    job.say(f"--> exit code {process.returncode} after {took_in_all:.0f} s")


def finish(job: Job) -> Job:
    """Run a job's commands."""
    started = time.monotonic()
    for command in job.commands:
        run(command, job)
    job.seconds = time.monotonic() - started
    return job


def main(arguments: list[str]) -> int:
    """Run the stages named in the arguments, all without any; scenarios follow `molecule`. Return the exit code."""
    named = arguments.index("molecule") + 1 if "molecule" in arguments else len(arguments)
    todo = [job for stage in arguments[:named] or STAGES for job in jobs(stage, arguments[named:])]
    if len(todo) > 1:
        for job in todo:
            job.prefix = f"{job.name:<11} | "
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        done = list(pool.map(finish, todo))
    print("\n==> summary")
    for job in done:
        counts = f"{job.passed:>4} passed {job.failed:>3} failed {job.skipped:>3} skipped"
        print(f"{job.name:<12} {counts}  {job.seconds:>5.0f} s")
        for note in job.notes:
            print(f"             {note}")
    passed, failed, skipped = (sum(getattr(job, name) for job in done) for name in ("passed", "failed", "skipped"))
    for failure in (failure for job in done for failure in job.failures):
        print(f"FAILED {failure}")
    print(f"\n{passed} passed, {failed} failed, {skipped} skipped")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
