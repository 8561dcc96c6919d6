"""What a check sees (Run, Host) and what it returns (Finding)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

Spec = Mapping[str, Any]
"""One option of a role's argument_specs."""

CONTROLLER = "controller"


@dataclass(frozen=True)
class Finding:
    """One thing to mend: `seen` and `fix` are sentences; a secret is never part of them."""

    check: str
    host: str
    seen: str
    fix: str
    severity: str = "error"

    def as_warning(self) -> Finding:
        """Return the same finding, no longer stopping the run."""
        return replace(self, severity="warning")


@dataclass
class Host:
    """One host of the run.

    `values`: what the inventory sets, templated. `unset`: variable -> why it cannot be templated.
    `origins`: variable -> file:line where known. `clear`: those whose text is written as it is, neither encrypted nor
    taken from elsewhere. `facts`: the preflight_facts module's, None without them.
    """

    name: str
    roles: list[str] = field(default_factory=list)
    values: dict[str, Any] = field(default_factory=dict)
    unset: dict[str, str] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)
    clear: set[str] = field(default_factory=set)
    facts: dict[str, Any] | None = None
    error: str = ""
    skew: float = 0.0


@dataclass
class Run:
    """Everything that the checks look at.

    `specs`: role -> option -> spec. `defaults`: role -> variable -> value. `handed`: variables that a playbook sets.
    `overridden`: those where the inventory's value has no effect -> the playbook. `mentioned`: the playbooks'
    identifiers. `secrets`: the names of the vault variables -> kind (see secrets.py).
    `files`: path on the controller -> content, None where it is missing. `minimum`: the thresholds.
    """

    hosts: list[Host]
    specs: Mapping[str, Mapping[str, Spec]] = field(default_factory=dict)
    defaults: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    handed: set[str] = field(default_factory=set)
    overridden: Mapping[str, str] = field(default_factory=dict)
    mentioned: set[str] = field(default_factory=set)
    secrets: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, bytes | None] = field(default_factory=dict)
    role_hosts: Mapping[str, list[str]] = field(default_factory=dict)
    minimum: Mapping[str, Any] = field(default_factory=dict)
    controller: Mapping[str, Any] = field(default_factory=dict)

    def on(self, role: str) -> list[Host]:
        """Return the hosts that the role will run on."""
        return [host for host in self.hosts if role in host.roles]

    def looked_at(self, *roles: str) -> Iterator[tuple[Host, dict[str, Any]]]:
        """Yield the hosts (of these roles) that could be looked at, with their facts."""
        for host in self.hosts:
            if host.facts is not None and (not roles or set(roles) & set(host.roles)):
                yield host, host.facts

    def value(self, host: Host, name: str, otherwise: Any = None) -> Any:
        """Return what the inventory sets, else the role's default where it is a plain value, else `otherwise`."""
        if name in host.values:
            return host.values[name]
        for role in host.roles:
            default = self.defaults.get(role, {}).get(name)
            if default is not None and not _templated(default):
                return default
        return otherwise

    def mapping(self, host: Host, name: str) -> dict[str, Any]:
        """Return the value where it is a mapping, else an empty one: that it is none is the types' check to say."""
        value = self.value(host, name)
        return value if isinstance(value, dict) else {}

    def secret_names(self) -> set[str]:
        """Return every variable whose value must not be shown."""
        names = {name for options in self.specs.values() for name, spec in options.items() if hides(spec)}
        return names | set(self.secrets)


def hides(spec: Spec) -> bool:
    """Return whether the option, or one inside it, holds a secret."""
    return bool(spec.get("no_log")) or any(hides(option) for option in (spec.get("options") or {}).values())


def _templated(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(_templated(item) for item in value.values())
    if isinstance(value, list):
        return any(_templated(item) for item in value)
    return isinstance(value, str) and ("{{" in value or "{%" in value)


@dataclass(frozen=True)
class Check:
    """A function that yields (host, seen, fix) or (host, seen, fix, severity)."""

    id: str
    title: str
    function: Callable[[Run], Iterable[tuple[str, ...]]]
    severity: str

    def run(self, run: Run) -> list[Finding]:
        """Return what the check found."""
        return [
            Finding(self.id, host, seen, fix, rest[0] if rest else self.severity)
            for host, seen, fix, *rest in self.function(run)
        ]


CHECKS: dict[str, Check] = {}

CheckFunction = Callable[[Run], Iterable[tuple[str, ...]]]


def check(id_: str, title: str, severity: str = "error") -> Callable[[CheckFunction], CheckFunction]:
    """Register a check under a stable id."""

    def register(function: CheckFunction) -> CheckFunction:
        CHECKS[id_] = Check(id_, title, function, severity)
        return function

    return register
