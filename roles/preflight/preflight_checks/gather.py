"""What the checks need, read from Ansible's variables and from the controller's files.

The one module here that knows Ansible's insides; the checks themselves see `model.Run`.
"""

from __future__ import annotations

import functools
import glob
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import yaml
from ansible.errors import AnsibleError
from ansible.parsing.vault import EncryptedString, is_encrypted
from ansible.release import __version__ as ansible_core
from ansible.utils.collection_loader import AnsibleCollectionConfig

from .model import Host, Run
from .services import CERTIFICATE_VARIABLES

try:  # private to ansible-core: where a value was written and whether it was encrypted; without them the report names
    # no file and does not know what is in clear
    from ansible._internal._datatag._tags import Origin, VaultedValue
except ImportError:
    Origin = VaultedValue = None

CONNECTION_VARIABLES = ("ansible_ssh_common_args", "ansible_ssh_extra_args", "ansible_ssh_args")
# The variables that become settings of the request log -> where they stand among these.
LOG_VARIABLES = {
    "litellm_logger_settings": (),
    "litellm_logger_retention_days": ("content", "retention_days"),
    "litellm_logger_front_url": ("validation", "front_url"),
}
SETTINGS_EXIT = 3  # litellm_sqlalchemy.errors.ExitCode
DECIDING_ROLES = ("litellm", "postgresql", "postgresql_backup")
NOT_INVENTORY = ("preflight_looked", "hostvars", "vars", "groups", "omit", "environment")


def plain(value: Any) -> Any:
    """Return the value as ordinary dicts, lists and scalars (this is what evaluates nested templates)."""
    if isinstance(value, Mapping):
        return {str(key): plain(value[key]) for key in value}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    for kind in (bool, int, float, str):
        if isinstance(value, kind):
            return kind(value)
    return value


def origin(value: Any) -> str:
    """Return file:line where a value was written, '' where that is not known."""
    tag = Origin.get_tag(value) if Origin else None
    if not tag or not tag.path:
        return ""
    return os.path.relpath(str(tag.path)) + (f":{tag.line_num}" if tag.line_num else "")


def in_clear(value: Any) -> bool:
    """Return whether a value, or one inside it, is a text that stands as it is in an inventory."""
    if isinstance(value, Mapping):
        return any(in_clear(item) for item in value.values())
    if not VaultedValue or not isinstance(value, str) or isinstance(value, EncryptedString):
        return False
    return bool(value) and not VaultedValue.is_tagged_on(value) and "{{" not in value and "{%" not in value


def read_yaml(path: str) -> Any:
    """Return a YAML file's content, {} where there is none."""
    try:
        with open(path, encoding="utf-8") as file:
            return yaml.safe_load(file) or {}
    except FileNotFoundError:
        return {}


def role_specs(directory: str) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, Any]]]:
    """Return the options and the defaults of all roles of a directory."""
    specs: dict[str, dict[str, Any]] = {}
    defaults: dict[str, dict[str, Any]] = {}
    for path in sorted(glob.glob(os.path.join(directory, "*", "meta", "argument_specs.yml"))):
        role = path.split(os.sep)[-3]
        entries = read_yaml(path).get("argument_specs", {})
        specs[role] = {name: spec for entry in entries.values() for name, spec in (entry.get("options") or {}).items()}
        defaults[role] = read_yaml(os.path.join(directory, role, "defaults", "main.yml"))
    return specs, defaults


def playbook_variables(directory: str) -> tuple[set[str], dict[str, str]]:
    """Return the variables that playbooks hand to roles, and those where the inventory has no say -> the playbook."""
    handed: set[str] = set()
    overridden: dict[str, str] = {}
    for path in sorted(glob.glob(os.path.join(directory, "*.yml"))):
        plays = read_yaml(path)
        for play in plays if isinstance(plays, list) else []:
            blocks = [play, *[role for role in play.get("roles") or [] if isinstance(role, dict)]]
            for name, value in [item for block in blocks for item in (block.get("vars") or {}).items()]:
                handed.add(name)
                if f".{name}" not in str(value):  # else the playbook starts from the inventory's value
                    overridden.setdefault(name, "playbooks/" + os.path.basename(path))
    return handed, overridden


def playbook_words(directory: str) -> set[str]:
    """Return every identifier in the playbooks: a variable that only a playbook reads is not an unknown one."""
    found: set[str] = set()
    for path in glob.glob(os.path.join(directory, "*.yml")):
        with open(path, encoding="utf-8") as file:
            found |= set(re.findall(r"[a-z_][a-z0-9_]+", file.read()))
    return found


def collections() -> dict[str, str]:
    """Return the installed collections -> version."""
    found: dict[str, str] = {}
    for base in AnsibleCollectionConfig.collection_paths:
        for path in glob.glob(os.path.join(base, "ansible_collections", "*", "*", "MANIFEST.json")):
            information = read_yaml(path)["collection_info"]
            found.setdefault(f"{information['namespace']}.{information['name']}", information["version"])
    return found


def clear_vaults(sources: Iterable[str]) -> list[str]:
    """Return the vault.yml files of the inventories that are not encrypted."""
    found = []
    for source in sources:
        base = source if os.path.isdir(source) else os.path.dirname(source)
        for path in sorted(glob.glob(os.path.join(base, "*_vars", "**", "vault.y*ml"), recursive=True)):
            with open(path, "rb") as file:
                content = file.read()
            if content.strip() and not is_encrypted(content) and b"!vault" not in content:
                found.append(os.path.relpath(path))
    return found


def read_host(
    name: str, raw: Mapping[str, Any], evaluate: Callable[[str], Any], role_hosts: Mapping[str, list[str]]
) -> Host:
    """Return a host with the variables that its inventory sets, each evaluated on its own."""
    host = Host(name, [role for role, names in role_hosts.items() if name in names])
    look = raw.get("preflight_looked") or {}
    host.facts, host.error, host.skew = look.get("facts"), look.get("error", ""), look.get("skew", 0.0)
    for variable, value in raw.items():
        if variable in NOT_INVENTORY or (variable.startswith("ansible_") and variable not in CONNECTION_VARIABLES):
            continue
        # Of a variable that two files set, the name is still the first one's.
        name_at, value_at = origin(variable), origin(value)
        where = value_at if value_at.partition(":")[0] != name_at.partition(":")[0] and value_at else name_at
        if where:
            host.origins[variable] = where
        if in_clear(value):
            host.clear.add(variable)
        try:
            host.values[variable] = plain(evaluate(variable))
        except AnsibleError as error:
            host.unset[variable] = " ".join(str(error).split())
    return host


def read_run(hosts: list[Host], arguments: Mapping[str, Any]) -> Run:
    """Return the hosts with the roles' specifications and what the playbook hands over."""
    specs, defaults = role_specs(arguments["roles_directory"])
    known = {name for options in specs.values() for name in options}
    handed, overridden = playbook_variables(arguments["playbook_directory"])
    return Run(
        hosts=hosts,
        specs=specs,
        defaults=defaults,
        handed=handed,
        overridden={name: book for name, book in overridden.items() if name in known},
        mentioned=playbook_words(arguments["playbook_directory"]),
        secrets=plain(arguments.get("secrets") or {}),
        role_hosts=plain(arguments["role_hosts"]),
        minimum=plain(arguments.get("minimum") or {}),
    )


def read_controller(run: Run, roles_directory: str, sources: Iterable[str], loader: Any) -> None:
    """Add what is on the controller: versions, the lock file, certificate files, vault files in clear."""
    default = os.path.join(roles_directory, "litellm", "files", "requirements.txt")
    locks = {host.name: str(run.value(host, "litellm_requirements_file") or default) for host in run.on("litellm")}
    # What the roles decide themselves stands there, as a name at least where the value is a template.
    own = {role: read_yaml(os.path.join(roles_directory, role, "vars", "main.yml")) for role in DECIDING_ROLES}
    # libraries are added to the role's
    fixed = own["postgresql"]["__postgresql_fixed_settings"].keys() - {"shared_preload_libraries"}
    refusals, unchecked = log_refusals(run, os.path.join(roles_directory, "..", "files", "litellm_sqlalchemy"))
    run.controller = {
        "litellm_minimum": own["litellm"]["__litellm_minimum_version"],
        "database_environment": own["litellm"]["__litellm_unset_environment"],
        "decided_settings": {
            **dict.fromkeys(own["postgresql_backup"]["__postgresql_backup_server_settings"], "postgresql_backup"),
            **dict.fromkeys(fixed, "postgresql"),
            **dict.fromkeys(own["postgresql"]["__postgresql_placed_settings"], "postgresql"),
        },
        "log_refusals": refusals,
        "log_unchecked": unchecked,
        "ansible_core": ansible_core,
        "collections": collections(),
        "lock_files": locks,
        "clear_vaults": clear_vaults(sources),
    }
    wanted = {str(run.value(host, name) or "") for host in run.hosts for name in CERTIFICATE_VARIABLES}
    run.files = {path: content(path, loader) for path in (wanted | set(locks.values())) - {""}}


def log_refusals(run: Run, default: str) -> tuple[dict[str, list[tuple[str, str]]], set[str]]:
    """Return host -> (variable, why the log refuses it), and why the log could not be asked, where it could not."""
    found: dict[str, list[tuple[str, str]]] = {}
    unchecked: set[str] = set()
    for host in run.on("litellm_logger"):
        source = str(run.value(host, "litellm_logger_source") or default)
        for variable, path in LOG_VARIABLES.items():
            settings = run.value(host, variable)
            if not settings:  # which the role leaves out
                continue
            for key in reversed(path):
                settings = {key: settings}
            if isinstance(settings, dict):
                status, reason = asked_log(source, json.dumps(with_host(settings), default=str))
                if status == SETTINGS_EXIT:
                    found.setdefault(host.name, []).append((variable, reason))
                elif status:
                    unchecked.add(reason)
    return found, unchecked


def with_host(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings with the one that has no default, which the playbook hands over."""
    database = settings.get("database", {})
    return {**settings, "database": {"host": "localhost", **database}} if isinstance(database, dict) else settings


@functools.cache
def asked_log(source: str, settings: str) -> tuple[int, str]:
    """Return exit status and last line of the command by which the role has the settings checked on the host."""
    command = [sys.executable, "-P", "-m", "litellm_sqlalchemy", "settings", "--settings", "/dev/stdin"]
    environment = {**os.environ, "PYTHONPATH": os.path.join(source, "src")}
    done = subprocess.run(command, input=settings, capture_output=True, text=True, env=environment, check=False)
    line = next(reversed(done.stderr.strip().splitlines()), "")
    return done.returncode, line.removeprefix("litellm-sqlalchemy: settings file /dev/stdin: ")


def content(path: str, loader: Any) -> bytes | None:
    """Return a controller file's content, decrypted if it is a vault; None when it cannot be read."""
    try:
        text: str = loader.get_text_file_contents(os.path.expanduser(path))
    except (AnsibleError, OSError, UnicodeError):
        return None
    return text.encode()
