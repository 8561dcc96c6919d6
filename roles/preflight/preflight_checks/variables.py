"""The names and types of the variables that the inventory sets, against the roles' argument_specs."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from typing import Any

from ansible.module_utils.common.arg_spec import ArgumentSpecValidator

from .model import Host, Run, Spec, check, hides
from .secrets import type_name

CONTAINERS = {"list": list, "dict": dict}
PLAIN = ("str", "path", "int", "float", "bool")


def known_names(run: Run) -> set[str]:
    """Return every variable that an inventory may set."""
    return {name for options in run.specs.values() for name in options} | set(run.secrets)


def where(host: Host, name: str) -> str:
    """Return ` (file:line)` where it is known, else nothing."""
    origin = host.origins.get(name)
    return f" ({origin})" if origin else ""


@check("unknown-variable", "Every variable with a role's prefix is one that the role has")
def unknown_variable(run: Run) -> Iterator[tuple[str, ...]]:
    known = known_names(run)
    prefixes = (*tuple(f"{role}_" for role in run.specs), "vault_litellm", "vault_postgresql")
    found: dict[str, list[Host]] = {}
    for host in run.hosts:
        for name in (host.values.keys() | host.unset.keys()) - known - run.mentioned:
            # Without a role's prefix the user's own names are free; only a near miss is suspicious.
            if name.startswith(prefixes) or difflib.get_close_matches(name, known, 1, 0.9):
                found.setdefault(name, []).append(host)
    for name, hosts in sorted(found.items()):
        near = difflib.get_close_matches(name, known, 1, 0.6)
        fix = f"rename it to {near[0]}." if near else "remove it, or give your own variable another prefix."
        names = ", ".join(host.name for host in hosts)
        yield names, f"{name}{where(hosts[0], name)} is set, but no role has such a variable.", fix


@check("undefined-variable", "Every variable can be evaluated")
def undefined_variable(run: Run) -> Iterator[tuple[str, ...]]:
    for host in run.hosts:
        # A template that stands in a secret is a part of it, and so is what is quoted of it, here and where it is used.
        secrets = [reason for name, reason in host.unset.items() if name in run.secrets]
        for name, reason in host.unset.items():
            if name in run.secrets:
                yield (
                    host.name,
                    f"{name}{where(host, name)} cannot be evaluated (value hidden).",
                    "write !unsafe before a quoted value whose {{ or {% stands for itself (ansible-vault edit), "
                    "or define what it refers to.",
                )
                continue
            missing_secret = any(secret in reason and not host.values.get(secret) for secret in run.secrets)
            if not missing_secret and not any(secret in reason for secret in secrets):  # it is said already
                yield host.name, f"{name}{where(host, name)} cannot be evaluated: {reason}", "define what it refers to."


@check("variable-overridden", "No variable is set that the playbooks set themselves")
def variable_overridden(run: Run) -> Iterator[tuple[str, ...]]:
    found: dict[str, list[Host]] = {}
    for host in run.hosts:
        for name in host.values.keys() & run.overridden.keys():
            found.setdefault(name, []).append(host)
    for name, hosts in sorted(found.items()):
        yield (
            ", ".join(host.name for host in hosts),
            f"{name}{where(hosts[0], name)} has no effect: {run.overridden[name]} sets it itself.",
            "remove it from the inventory.",
        )


@check("variable-missing", "Every required variable of the host's roles is set")
def variable_missing(run: Run) -> Iterator[tuple[str, ...]]:
    for host in run.hosts:
        for role in host.roles:
            for name, spec in run.specs.get(role, {}).items():
                set_elsewhere = name in run.handed or name in host.values or name in host.unset
                if spec.get("required") and not set_elsewhere:
                    yield (
                        host.name,
                        f"{name} is not set (role {role}).",
                        f"set it in the inventory: {first_sentence(spec)}",
                    )


@check("variable-type", "Every variable has the type that its role's specification names")
def variable_type(run: Run) -> Iterator[tuple[str, ...]]:
    for host in run.hosts:
        for role, options in run.specs.items():
            for name, spec in options.items():
                if name in host.values and role in host.roles:
                    for seen, fix in type_faults(name, spec, host.values[name]):
                        yield host.name, f"{name}{where(host, name)} {seen}", fix


def type_faults(name: str, spec: Spec, value: Any) -> Iterator[tuple[str, str]]:
    """Yield (what is wrong, what to do) of one value; secrets and what holds them are not quoted."""
    kind = spec.get("type", "str")
    shown = "value hidden" if hides(spec) else quoted(value)
    if value is None:
        yield f"is empty, not {article(kind)}.", f"give it {article(kind)}, or remove it to use the default."
        return
    container = CONTAINERS.get(kind)
    if (container and not isinstance(value, container)) or (kind in PLAIN and isinstance(value, (list, dict))):
        yield f"is {type_name(value)} ({shown}), not {article(kind)}.", f"give it {article(kind)}."
        return
    bare = {key: part for key, part in spec.items() if key not in ("required", "default")}
    result = ArgumentSpecValidator({name: bare}).validate({name: value})
    for message in result.error_messages:
        if kind in PLAIN and "convert" in message:
            yield f"is {type_name(value)} ({shown}), not {article(kind)}.", f"give it {article(kind)}."
        elif hides(spec):
            yield (
                f"does not match its specification (value hidden; expected {article(kind)}).",
                "see docs/variables.md.",
            )
        else:
            yield f"does not match its specification: {message.rstrip('.')} ({shown}).", "see docs/variables.md."


@check("connection-checks", "Connections verify the host they reach")
def connection_checks(run: Run) -> Iterator[tuple[str, ...]]:
    for host in run.hosts:
        for name in ("ansible_ssh_common_args", "ansible_ssh_extra_args", "ansible_ssh_args"):
            value = str(host.values.get(name, "")).replace(" ", "").replace("=", "").lower()
            if "stricthostkeycheckingno" in value or "userknownhostsfile/dev/null" in value:
                yield (
                    host.name,
                    f"{name}{where(host, name)} turns the check of ssh host keys off.",
                    "remove it and add the host's key to ~/.ssh/known_hosts (ssh-keyscan, compare the fingerprint).",
                )


def article(kind: str) -> str:
    """Return the specification's type as the report calls it."""
    names = {"str": "a text", "path": "a path", "int": "a whole number", "float": "a number", "bool": "true or false"}
    return {**names, "list": "a list", "dict": "a mapping"}.get(kind, kind)


def quoted(value: Any) -> str:
    """Return a value, cut short, for a message."""
    text = repr(value) if isinstance(value, (str, int, float)) else str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def first_sentence(spec: Mapping[str, Any]) -> str:
    """Return the beginning of an option's description."""
    text = spec.get("description", "")
    text = " ".join(text) if isinstance(text, list) else str(text)
    return text.split(". ")[0].rstrip(".") + "."
