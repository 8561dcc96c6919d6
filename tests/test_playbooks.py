"""Playbooks explain themselves, and site.yml only imports them."""

import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
PLAYBOOKS = sorted((ROOT / "playbooks").glob("*.yml"))


def opening(path: Path) -> list[str]:
    """Return the comment lines at the top."""
    lines = path.read_text().removeprefix("---\n").splitlines()
    end = next(index for index, line in enumerate(lines) if not line.startswith("#"))
    return lines[:end]


@pytest.mark.parametrize("path", PLAYBOOKS, ids=lambda path: path.name)
def test_a_playbook_opens_with_what_when_how_and_what_it_refuses(path):
    words = [line.split()[1] for line in opening(path) if line.split()[1].endswith(":")]
    assert [word for word in words if word in ("What:", "When:", "How:", "Refuses:")] == [
        "What:",
        "When:",
        "How:",
        "Refuses:",
    ]
    if "-" in path.stem:
        assert len(opening(path)) >= 5


@pytest.mark.parametrize("path", PLAYBOOKS, ids=lambda path: path.name)
def test_the_documented_command_line_names_the_playbook(path):
    assert f"playbooks/{path.name}" in " ".join(opening(path))


def test_site_only_imports_playbooks_in_order():
    names = ["take-lock", "preflight", "postgresql", "litellm", "haproxy", "postgresql-retire-logins"]
    names += ["validation", "release-lock"]
    imports = yaml.safe_load((ROOT / "site.yml").read_text())
    assert [entry["import_playbook"] for entry in imports] == [f"playbooks/{name}.yml" for name in names]
    assert all(entry.keys() == {"name", "import_playbook"} for entry in imports)


@pytest.mark.parametrize("environment", ["staging", "production"])
def test_the_example_inventories_fit_site(environment):
    command = ["ansible-playbook", "-i", f"inventories/{environment}", "site.yml", "--syntax-check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("environment", ["staging", "production"])
def test_an_example_inventory_holds_no_vault_and_no_real_address(environment):
    base = ROOT / "inventories" / environment
    hosts = (base / "hosts.yml").read_text()
    assert not list(base.rglob("vault.yml"))
    assert "192.0.2." in hosts
    assert "example.net" in hosts
    assert "host_key_checking" not in "".join(path.read_text() for path in base.rglob("*.yml"))
