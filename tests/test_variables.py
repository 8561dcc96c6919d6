"""A variable lives in three places that cannot disagree: defaults, argument_specs, the generated reference."""

import re
import subprocess
from pathlib import Path

import generate_variables
import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
ROLES = sorted(path.name for path in (ROOT / "roles").iterdir() if (path / "tasks").is_dir())
SECRET_KEYS = {"type", "required", "no_log", "description"}


def specification(role: str) -> dict:
    """Return the options of all entry points of a role."""
    entries = yaml.safe_load((ROOT / "roles" / role / "meta/argument_specs.yml").read_text())["argument_specs"]
    return {name: option for entry in entries.values() for name, option in (entry.get("options") or {}).items()}


def defaults(role: str) -> tuple[dict, str]:
    """Return a role's defaults and their text."""
    path = ROOT / "roles" / role / "defaults/main.yml"
    text = path.read_text() if path.exists() else ""
    return yaml.safe_load(text) or {}, text


@pytest.mark.parametrize("role", ROLES)
def test_defaults_and_specification_agree(role):
    options, (values, text) = specification(role), defaults(role)
    assert values == {name: option["default"] for name, option in options.items() if "default" in option}
    without = {name for name, option in options.items() if "default" not in option}
    commented = set(re.findall(r"^# ?(\w+):", text, re.M))
    assert without <= commented, "variables without a default are shown commented out in defaults/main.yml"


@pytest.mark.parametrize("role", ROLES)
def test_public_variables_carry_their_roles_name(role):
    assert [name for name in specification(role) if not name.startswith(f"{role}_")] == []


@pytest.mark.parametrize("role", ROLES)
def test_every_option_has_a_type_and_a_description(role):
    lacking = [name for name, option in specification(role).items() if not {"type", "description"} <= option.keys()]
    assert lacking == []


def secrets(options: dict, prefix: str = ""):
    """Yield (name, option) of every secret, those inside of other options too."""
    for name, option in options.items():
        if option.get("no_log"):
            yield prefix + name, option
        yield from secrets(option.get("options") or {}, f"{prefix}{name}.")


@pytest.mark.parametrize("role", ROLES)
def test_a_secrets_specification_can_print_nothing(role):
    for name, option in secrets(specification(role)):
        more = option.keys() - SECRET_KEYS
        assert not more or (more == {"default"} and option["default"] in ({}, "")), f"{name} has {sorted(more)}"


def test_the_reference_is_up_to_date():
    assert generate_variables.TARGET.read_text() == generate_variables.reference(), generate_variables.main.__doc__


@pytest.mark.parametrize("role", ROLES)
def test_every_role_has_a_readme_of_one_screen(role):
    lines = (ROOT / "roles" / role / "README.md").read_text().splitlines()
    assert lines[:1] == [f"# {role}"]
    assert 10 <= len(lines) <= 60


def test_a_kernel_that_leaves_some_more_memory_does_not_restart_the_server(tmp_path):
    """MemTotal of a host with 4 GB under two kernels."""
    role = ROOT / "roles/postgresql"
    show = {
        "ansible.builtin.debug": {"msg": "shared_buffers={{ __postgresql_default_settings.shared_buffers }}"},
        "vars": {"ansible_facts": {"memtotal_mb": "{{ item }}"}},
        "loop": [3909, 3915],
    }
    files = [str(role / "defaults/main.yml"), str(role / "vars/main.yml")]
    play = {"hosts": "localhost", "gather_facts": False, "vars_files": files, "tasks": [show]}
    (tmp_path / "play.yml").write_text(yaml.safe_dump([play]))
    command = ["ansible-playbook", "-i", "localhost,", str(tmp_path / "play.yml")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert re.findall(r"shared_buffers=(\d+)MB", done.stdout) == ["960", "960"], done.stdout
