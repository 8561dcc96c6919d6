"""playbooks/create-secrets.yml, run as a user runs it."""

import os
import subprocess
from pathlib import Path

import pytest
import vault_secrets
import yaml
from ansible.errors import AnsibleActionFail
from preflight_checks import secrets

ROOT = Path(__file__).resolve().parent.parent
PASSWORD_KINDS = ("password", "gateway_key")


@pytest.fixture
def inventory(tmp_path):
    """An inventory with one host and a vault password file beside it."""
    base = tmp_path / "inventory"
    (base / "group_vars/all").mkdir(parents=True)
    (base / "hosts.yml").write_text("all: {hosts: {host1: {}}}\n")
    (tmp_path / "password").write_text("only for this test\n")
    return base


def run(
    inventory: Path, *more: str, password: bool = True, playbook: str = "playbooks/create-secrets.yml"
) -> subprocess.CompletedProcess:
    environment = {key: value for key, value in os.environ.items() if key != "ANSIBLE_VAULT_PASSWORD_FILE"}
    if password:
        environment["ANSIBLE_VAULT_PASSWORD_FILE"] = str(inventory.parent / "password")
    command = ["ansible-playbook", "-vvv", "-i", str(inventory), playbook, *more]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def view(inventory: Path) -> dict:
    environment = {**os.environ, "ANSIBLE_VAULT_PASSWORD_FILE": str(inventory.parent / "password")}
    command = ["ansible-vault", "view", str(inventory / "group_vars/all/vault.yml")]
    text = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    return yaml.safe_load(text)


def test_creates_once_and_shows_no_value(inventory):
    first = run(inventory)
    assert first.returncode == 0, first.stdout + first.stderr
    values = view(inventory)
    assert values.pop("vault_litellm_provider_keys") == {}
    assert len(values) == 9
    assert len(set(values.values())) == 9
    assert values["vault_litellm_master_key"].startswith("sk-")
    for value in values.values():
        assert len(value) >= 32
        assert secrets.bits(value) > 150
        assert not secrets.EXAMPLES.search(value)
        assert value not in first.stdout + first.stderr
    path = inventory / "group_vars/all/vault.yml"
    assert path.read_text().startswith("$ANSIBLE_VAULT;")
    assert path.stat().st_mode & 0o777 == 0o600

    before = path.read_bytes()
    second = run(inventory)
    assert "changed=0" in second.stdout
    assert path.read_bytes() == before


def test_without_a_vault_password_it_says_how_to_get_one(inventory):
    done = run(inventory, password=False)
    assert done.returncode != 0
    assert "ANSIBLE_VAULT_PASSWORD_FILE" in done.stdout + done.stderr
    assert not (inventory / "group_vars/all/vault.yml").exists()


@pytest.mark.parametrize("playbook", ["site.yml", "playbooks/rotate-secrets.yml"])
def test_a_lost_vault_password_ends_every_run_before_its_first_task(inventory, playbook):
    (inventory / "hosts.yml").write_text("all: {children: {postgresql: {hosts: {host1: {}}}}}\n")
    assert run(inventory).returncode == 0
    (inventory.parent / "password").write_text("not the password of this vault\n")
    vault = inventory / "group_vars/all/vault.yml"
    before = vault.read_bytes()
    for password in (True, False):
        done = run(inventory, playbook=playbook, password=password)
        assert done.returncode != 0
        assert "TASK" not in done.stdout
        said = " ".join(done.stderr.split())
        assert f"{vault} cannot be decrypted with the configured vault password; nothing was changed. Name" in said
        assert "docs/operations/rotation.md, 'Without the vault password'" in said
    assert vault.read_bytes() == before


def test_check_mode_writes_nothing(inventory):
    assert "changed=1" in run(inventory, "--check").stdout
    assert not (inventory / "group_vars/all/vault.yml").exists()


def test_a_directory_can_be_named(inventory, tmp_path):
    assert run(inventory, "-e", f"secrets_directory={tmp_path}/elsewhere").returncode == 0
    assert (tmp_path / "elsewhere/vault.yml").read_text().startswith("$ANSIBLE_VAULT;")


def test_a_clear_file_is_refused(inventory):
    path = inventory / "group_vars/all/vault.yml"
    path.write_text("other: 1\n")
    done = run(inventory)
    assert done.returncode != 0
    assert "ansible-vault encrypt" in done.stdout + done.stderr
    assert path.read_text() == "other: 1\n"


def test_what_is_there_stays_as_it_is():
    text = "# mine\nfirst: 'kept'  # why"
    assert vault_secrets.lacking(vault_secrets.parse(text, "vault.yml"), ["first", "second"], "vault.yml") == ["second"]
    result = vault_secrets.add_values(text, {"second": {}}, "vault.yml")
    assert result == "# mine\nfirst: 'kept'  # why\nsecond: {}\n"


@pytest.mark.parametrize("text", ["first:\n", "first: ''\n", "- a list\n", "first: 'open\n"])
def test_what_cannot_be_completed_is_refused_without_quoting_it(text):
    with pytest.raises(AnsibleActionFail) as refusal:
        vault_secrets.lacking(vault_secrets.parse(text, "vault.yml"), ["first"], "vault.yml")
    assert "ansible-vault edit vault.yml" in str(refusal.value)
    assert "open" not in str(refusal.value)
