"""What a release consists of, and what is known against it."""

import importlib.util
import json
import subprocess
import sys
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
