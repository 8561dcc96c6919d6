"""Which units a run restarts, and in what order: one that serves comes after those that do not."""

import json
import os
import subprocess
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent
#: What systemctl says of units whose name tells their state. All but the young one were started at the boot, by a clock
#: that was years ahead.
SYSTEMCTL = """#!/bin/sh
case "$*" in
  *ActiveState*) echo "$*" | sed 's/.* //; s/@.*//' ;;
  *Monotonic*@young.service) python3 -c 'import time; print(time.monotonic_ns() // 1000)' ;;
  *Monotonic*) echo 1 ;;
  *ExecMainStartTimestamp*) echo 2199-01-01 00:00:00 UTC ;;
  is-enabled*) echo enabled ;;
esac
"""


def restarted(directory: Path, *units: str) -> list[str]:
    """Return what the role would do to units that are older than what they read."""
    (directory / "systemctl").write_text(SYSTEMCTL)
    (directory / "systemctl").chmod(0o755)
    role = {"name": "python_service", "tasks_from": "restart"}
    variables = {
        "ansible_python_interpreter": sys.executable,
        "python_service_units": [*units],
        "python_service_inputs": [str(directory)],
    }
    play = {
        "hosts": "localhost",
        "connection": "local",
        "gather_facts": False,
        "tasks": [{"ansible.builtin.include_role": role, "vars": variables | {"python_service_obsolete_units": ""}}],
    }
    (directory / "play.yml").write_text(yaml.safe_dump([play]))
    environment = os.environ | {
        "PATH": f"{directory}:{os.environ['PATH']}",
        "ANSIBLE_STDOUT_CALLBACK": "ansible.posix.json",
    }
    command = ["ansible-playbook", "--check", "-i", "localhost,", str(directory / "play.yml")]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    tasks = json.loads(done.stdout)["plays"][0]["tasks"]
    (message,) = (task["hosts"]["localhost"]["msg"] for task in tasks if "Say which" in task["task"]["name"])
    return list(message)


def test_an_instance_that_serves_is_restarted_last(tmp_path: Path) -> None:
    units = ("active@1.service", "failed@2.service", "active@3.service", "activating@4.service", "inactive@5.service")
    assert restarted(tmp_path, *units, "active@young.service") == [
        "restart failed@2.service",
        "restart activating@4.service",
        "start inactive@5.service",
        "restart active@1.service",
        "restart active@3.service",
    ]
