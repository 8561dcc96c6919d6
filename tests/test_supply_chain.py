"""What a release consists of, and what is known against it."""

import importlib.util
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

ROOT = Path(__file__).resolve().parent.parent


def load(path: str) -> ModuleType:
    """Import a program or plugin by its path."""
    specification = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    assert specification
    assert specification.loader
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


audit = load("scripts/audit.py")
filters = load("roles/python_service/filter_plugins/sbom_filters.py")


def test_the_bill_of_materials_of_this_environment_is_valid_and_complete():
    command = [sys.executable, "-I", str(ROOT / "roles/python_service/files/installed.py")]
    installed = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    text = filters.sbom(installed, "litellm", "0123456789ab")
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
    bill = json.loads(text)
    assert (bill["metadata"]["component"]["name"], bill["metadata"]["component"]["version"]) == (
        "litellm", "0123456789ab"
    )  # fmt: skip
    frozen = subprocess.run([sys.executable, "-m", "pip", "list", "--format=json"], capture_output=True, text=True)
    wanted = {(package["name"], package["version"]) for package in json.loads(frozen.stdout)}
    assert {(component["name"], component["version"]) for component in bill["components"]} == wanted
    by_name = {component["name"]: component for component in bill["components"]}
    assert by_name["pytest"]["licenses"] == [{"license": {"id": "MIT"}}]
    assert by_name["pytest"]["purl"].startswith("pkg:pypi/pytest@")


LOCKS = sorted(
    path.relative_to(ROOT).as_posix()
    for directory in ("roles", "scripts", "molecule")
    for path in (ROOT / directory).rglob("*requirements.txt")
)


def test_the_audit_knows_every_lock_that_is_installed_on_hosts_or_here():
    assert set(audit.LOCKS) == {lock for lock in LOCKS if not lock.startswith("molecule/")}


@pytest.mark.parametrize("lock", LOCKS)
def test_every_requirement_is_pinned_with_hashes(lock):
    text = "\n".join(line for line in (ROOT / lock).read_text().splitlines() if not line.lstrip().startswith("#"))
    requirements = [entry.split() for entry in text.replace("\\\n", " ").splitlines() if entry.strip()]
    assert requirements
    for pin, *rest in requirements:
        assert re.fullmatch(r"[\w.-]+(\[[\w,-]+\])?==[\w.!+]+", pin), pin
        hashes = [word for word in rest if word.startswith("--hash=")]
        assert hashes, pin
        assert [word for word in hashes if not re.fullmatch("--hash=sha256:[0-9a-f]{64}", word)] == []
        assert [word for word in rest if word.startswith("-") and word not in hashes] == [], "names an index"


def test_the_tools_lock_has_a_hash_of_every_file():
    packages = tomllib.loads((ROOT / "uv.lock").read_text())["package"]
    fetched = [package for package in packages if "registry" in package["source"]]
    assert len(fetched) > 100
    assert {tuple(one["source"]) for one in packages if one not in fetched} <= {("virtual",), ("editable",)}
    for package in fetched:
        files = [*package.get("wheels", []), *([package["sdist"]] if "sdist" in package else [])]
        assert files, package["name"]
        assert all(file["hash"].startswith("sha256:") for file in files), package["name"]


PLAYBOOK = """
- hosts: localhost
  gather_facts: false
  tasks: [{ansible.builtin.include_tasks: case.yml, loop: "{{ locks }}", loop_control: {loop_var: lock}}]
"""
CASE = """
- block:
    - ansible.builtin.include_role: {name: litellm, tasks_from: check}
      vars:
        litellm_requirements_file: "{{ lock }}"
        litellm_master_key: sk-0123456789abcdef
        litellm_models: []
        litellm_bind_address: 127.0.0.1
    - {ansible.builtin.debug: {msg: "VERDICT accepted"}}
  rescue:
    - {ansible.builtin.debug: {msg: "VERDICT {{ ansible_failed_result.msg }}"}}
"""
REFUSED = {
    "litellm==1.82.7 --hash=sha256:0": "pins LiteLLM 1.82.7: at least 1.83.9 is needed",  # held malware
    "litellm[proxy]==1.83.8 --hash=sha256:0": "pins LiteLLM 1.83.8: at least 1.83.9 is needed",
    "other==1 --hash=sha256:0": "pins LiteLLM 0: at least",
    "litellm==1.106.2": "must pin every package with its hashes",
    "--index-url https://example.org/simple\nlitellm==1.106.2 --hash=sha256:0": "name no index",
    "-e ./here\nlitellm==1.106.2 --hash=sha256:0": "name no index",
    "litellm[proxy]==1.106.2 --hash=sha256:0": "accepted",
}


def test_the_role_refuses_unsafe_versions_and_locks(tmp_path):
    locks = [tmp_path / f"{number}.txt" for number in range(len(REFUSED))]
    for path, lock in zip(locks, REFUSED, strict=True):
        path.write_text(f"{lock}\n")
    (tmp_path / "playbook.yml").write_text(PLAYBOOK)
    (tmp_path / "case.yml").write_text(CASE)
    variables = json.dumps({"locks": list(map(str, locks))})
    command = ["ansible-playbook", "-i", "localhost,", "-c", "local", "-e", variables, "playbook.yml"]
    environment = os.environ | {"ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"), "ANSIBLE_ROLES_PATH": str(ROOT / "roles")}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    verdicts = " ".join(done.stdout.split()).split("VERDICT ")[1:]
    assert len(verdicts) == len(REFUSED)
    assert [(says, said) for says, said in zip(REFUSED.values(), verdicts, strict=True) if says not in said] == []


CLEAN = {"name": "a", "version": "1", "vulns": []}
UNKNOWN = {"name": "b", "skip_reason": "Dependency not found on PyPI and could not be audited: b (1)"}
BAD = {"name": "c", "version": "1", "vulns": [{"id": "PYSEC-2026-1", "fix_versions": ["2"], "aliases": []}]}


@pytest.mark.parametrize(
    ("packages", "code", "says"),
    [
        ([CLEAN], 0, "1 of 1 packages have no known vulnerability"),
        ([CLEAN, UNKNOWN], 0, "1 of 2 packages have no known vulnerability; not known to it: b"),
        ([CLEAN, UNKNOWN, BAD], 1, "c 1: PYSEC-2026-1 (mended in 2)"),
        ([UNKNOWN, UNKNOWN], 0, "SKIPPED: the package index in use has no advisories: 0 of 2 packages were audited"),
    ],
)
def test_an_audit_of_nothing_does_not_look_green(packages, code, says):
    assert audit.verdict({"dependencies": packages}) == (code, says)
