"""A package that brings a file which Python runs at every start: it is found before any interpreter could run it."""

import base64
import hashlib
import json
import re
import subprocess
import zipfile
from pathlib import Path

import pytest
from conftest import CONTAINER, Run, ansible

MARK = "/run/poisoned"
POISON = f"import pathlib; pathlib.Path({MARK!r}).touch()\n"
WHEELS = "/run/poisoned-wheels"
TARGET = "/opt/poisoned"
PLAYBOOK = [
    {
        "hosts": "gateway1",
        "gather_facts": False,
        "tasks": [{"ansible.builtin.include_role": {"name": "python_service", "tasks_from": "release"}}],
    }
]


def wheel(directory: Path, name: str, files: dict[str, str]) -> Path:
    """Make a wheel that holds the named files."""
    path = directory / f"{name}-1-py3-none-any.whl"
    info = f"{name}-1.dist-info"
    contents = {
        **files,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    digests = {
        file: base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).decode().rstrip("=")
        for file, text in contents.items()
    }
    record = "".join(f"{file},sha256={digests[file]},{len(text)}\n" for file, text in contents.items())
    with zipfile.ZipFile(path, "w") as archive:
        for file, text in {**contents, f"{info}/RECORD": f"{record}{info}/RECORD,,\n"}.items():
            archive.writestr(file, text)
    return path


def there(run: Run, path: str) -> bool:
    return run("sh", "-c", '[ -e "$1" ] && echo yes || echo no', "sh", path).strip() == "yes"


@pytest.fixture
def site_packages(run: Run) -> str:
    """Where a file would have to be for the interpreter of the log's commands and writer to run it."""
    return run("sh", "-c", "readlink -f /opt/litellm-sqlalchemy/current/lib/python*/site-packages").strip()


def test_a_build_is_refused_before_python_starts_from_it(run: Run, tmp_path: Path) -> None:
    poisoned = wheel(tmp_path, "poisoned", {"poison.pth": POISON, "sitecustomize.py": POISON})
    harmless = wheel(tmp_path, "harmless", {"harmless.py": ""})
    digest = hashlib.sha256(poisoned.read_bytes()).hexdigest()
    lock, playbook = tmp_path / "requirements.txt", tmp_path / "playbook.yml"
    lock.write_text(f"poisoned==1 --hash=sha256:{digest}\n")
    playbook.write_text(json.dumps(PLAYBOOK))
    run("mkdir", "-p", WHEELS)
    subprocess.run(["podman", "cp", str(poisoned), f"{CONTAINER}:{WHEELS}/"], check=True)
    variables = {
        "python_service_directory": TARGET,
        "python_service_requirements": str(lock),
        "python_service_wheels": [str(harmless)],  # a second start of pip, with what came before installed
        "python_service_wheel_directories": [WHEELS],
        "python_service_index_url": "",
    }
    done = ansible(str(playbook), "-e", json.dumps(variables))
    releases = run("ls", f"{TARGET}/releases").split()
    run("rm", "-r", TARGET, WHEELS)
    assert done.returncode != 0
    said = " ".join(done.stdout.split())
    assert re.search(
        "/poison.pth, [^ ]*/sitecustomize.py at every start; nothing was started. The release was removed", said
    )
    assert not there(run, MARK)
    assert releases == []


def test_the_validation_finds_one_before_python_starts_from_it(run: Run, site_packages: str) -> None:
    run("sh", "-c", 'cat > "$1"', "sh", f"{site_packages}/poison.pth", input=POISON)
    done = ansible("playbooks/validation.yml")
    marked = there(run, MARK)
    run("/opt/litellm-sqlalchemy/current/bin/python", "-c", "")  # a control: it would have run
    mark_of_a_start = there(run, MARK)
    run("rm", f"{site_packages}/poison.pth", MARK)
    assert done.returncode != 0
    assert f"{site_packages}/poison.pth at every start; nothing was started" in " ".join(done.stdout.split())
    assert not marked
    assert mark_of_a_start
