"""Run the test stages one after the other and sum them up; called by scripts/test.

A stage is a list of commands. pytest's own counts are summed; any other command counts as one test.
"""

import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

COUNTS = re.compile(r"(\d+) (passed|failed|errors?)\b")
PYTEST_SUMMARY = re.compile(r"^=*\s*((?:\d+ \w+(?:, )?)+) in [\d.]+s")
ESCAPES = re.compile(r"\x1b\[[0-9;]*m")
MOLECULE_ACTION = re.compile(r"\[(\S+ > (?:converge|idempotence))\] Executing$")
PLAYBOOK_TIME = re.compile(r"Playbook run took (\d+) days, (\d+) hours, (\d+) minutes, (\d+) seconds")
SITE_RUNS = {"converge": "first run of the playbook", "idempotence": "second run, nothing to change"}
PYTHON_FILES = ["scripts", "molecule", "tests", "files", "roles", "playbooks"]


@dataclass
class Result:
    """What a stage came to."""

    name: str
    seconds: float = 0
    passed: int = 0
    failed: int = 0
    notes: list[str] = field(default_factory=list)


def scenarios() -> list[str]:
    """Return the names of the molecule scenarios, `default` first."""
    names = {path.parent.name for path in Path("molecule").glob("*/molecule.yml")}
    return sorted(names, key=lambda name: (name != "default", name))


def commands(stage: str, chosen: list[str]) -> list[list[str]]:
    """Return the command lines of a stage."""
    if stage == "lint":
        return [
            ["ruff", "check"],
            ["mypy", "--strict"],
            ["yamllint", "--strict", "."],
            ["ansible-lint", "--profile", "production", "--strict", "--offline", "--nocolor"],
        ]
    if stage == "unit":
        return [
            ["pytest", "--rootdir=files/litellm_sqlalchemy", "files/litellm_sqlalchemy/tests/unit"],
            ["pytest", "tests"],
        ]
    if stage == "audit":
        return [["python", "scripts/audit.py"]]
    if stage == "integration":
        return [["molecule/shared/in-image", "pytest", "tests/integration"]]
    return [["molecule", "test", "--scenario-name", name] for name in chosen or scenarios()]


def run(command: list[str], result: Result) -> None:
    """Run one command, showing its output, and add it to the result."""
    print(f"--> {' '.join(command)}", flush=True)
    started, passed, failed, action = time.monotonic(), 0, 0, ""
    environment = os.environ | {"PYTHONUNBUFFERED": "1", "NO_COLOR": "1", "ANSIBLE_NOCOLOR": "1"}
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            text = ESCAPES.sub("", line).strip(" │\n")
            if summary := PYTEST_SUMMARY.match(text):
                for number, what in COUNTS.findall(summary[1]):
                    passed += int(number) if what == "passed" else 0
                    failed += int(number) if what != "passed" else 0
            elif begun := MOLECULE_ACTION.search(text):
                action = begun[1]
            elif action and (took := PLAYBOOK_TIME.search(text)):
                days, hours, minutes, seconds = map(int, took.groups())
                scenario, _, what = action.partition(" > ")
                total = ((days * 24 + hours) * 60 + minutes) * 60 + seconds
                result.notes.append(f"{scenario}: {SITE_RUNS[what]}: {total} s")
                action = ""
    if process.returncode and not failed:
        failed = 1
    elif not process.returncode and not passed:
        passed = 1
    result.passed += passed
    result.failed += failed
    print(f"--> exit code {process.returncode} after {time.monotonic() - started:.0f} s", flush=True)


def main(arguments: list[str]) -> int:
    """Run the stages named in the arguments, all without any; return the exit code."""
    stages = arguments[:1] or ["lint", "unit", "audit", "integration", "molecule"]
    results = []
    for stage in stages:
        result = Result(stage)
        print(f"\n==> {stage}", flush=True)
        started = time.monotonic()
        for command in commands(stage, arguments[1:]):
            run(command, result)
        result.seconds = time.monotonic() - started
        results.append(result)
    print("\n==> summary")
    for result in results:
        print(f"{result.name:<12} {result.passed:>4} passed {result.failed:>3} failed  {result.seconds:>5.0f} s")
        for note in result.notes:
            print(f"             {note}")
    failed = sum(result.failed for result in results)
    print(f"\n{sum(result.passed for result in results)} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
