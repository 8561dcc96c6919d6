"""The preflight checks: pure functions over what was gathered, no input or output of their own.

`model` holds what a check sees and returns; the other modules hold the checks, by what they look at.
"""

from __future__ import annotations

from dataclasses import replace

from . import controller, firewall, hosts, network, secrets, services, values, variables
from .model import CHECKS, Finding, Host, Run

__all__ = ["CHECKS", "Finding", "Host", "Run", "check_all", "render"]

MODULES = (controller, firewall, hosts, network, secrets, services, values, variables)


def check_all(run: Run, accepted: frozenset[str] = frozenset()) -> list[Finding]:
    """Return every finding, errors first; the ids in `accepted` become warnings."""
    found = [finding for check in CHECKS.values() for finding in check.run(run)]
    eased = [finding.as_warning() if finding.check in accepted else finding for finding in found]
    hosts: dict[Finding, list[str]] = {}
    for finding in eased:  # what several hosts have in common is said once
        hosts.setdefault(replace(finding, host=""), []).append(finding.host)
    merged = [replace(finding, host=", ".join(dict.fromkeys(names))) for finding, names in hosts.items()]
    return sorted(merged, key=lambda finding: (finding.severity, finding.check, finding.host))


def render(findings: list[Finding], host_count: int) -> list[str]:
    """Return the lines of the report: one per finding, the sums last."""
    errors = sum(finding.severity == "error" for finding in findings)
    lines = [
        f"{finding.severity.upper():7} {finding.check}  [{finding.host}]  "
        f"{finding.seen.rstrip('.')}. Fix: {finding.fix}"
        for finding in findings
    ]
    summary = f"{len(CHECKS)} checks on {host_count} host{'s' if host_count != 1 else ''}: "
    summary += f"{errors} error{'s' if errors != 1 else ''}, "
    warnings = len(findings) - errors
    return [*lines, summary + f"{warnings} warning{'s' if warnings != 1 else ''}"]
