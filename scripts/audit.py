"""Look every locked package up in the advisories that PyPI has (pip-audit); a known vulnerability is a failure.

pip-audit passes over packages that it finds nothing about, also where the index in use has no advisories at all: then
nothing was audited, and this says so instead of looking green.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

LOCKS = (
    "roles/litellm/files/requirements.txt",
    "roles/litellm_logger/files/requirements.txt",
    "roles/litellm_logger/files/build-requirements.txt",
    "scripts/uv-requirements.txt",
)
TOOLS = ["uv", "export", "--quiet", "--frozen", "--no-emit-project", "--no-emit-workspace", "--no-header"]


def verdict(report: dict[str, Any]) -> tuple[int, str]:
    """Return exit code and message for a report of pip-audit (`--format json`)."""
    found, packages = [], report["dependencies"]
    audited = [package for package in packages if "skip_reason" not in package]
    for package in audited:
        for vulnerability in package["vulns"]:
            fixes = " or ".join(vulnerability["fix_versions"]) or "none yet"
            found.append(f"{package['name']} {package['version']}: {vulnerability['id']} (mended in {fixes})")
    if found:
        return 1, "\n".join(sorted(found))
    if not audited:
        return 0, f"SKIPPED: the package index in use has no advisories: 0 of {len(packages)} packages were audited"
    passed_over = [package["name"] for package in packages if "skip_reason" in package]
    more = f"; not known to it: {', '.join(sorted(passed_over))}" if passed_over else ""
    return 0, f"{len(audited)} of {len(packages)} packages have no known vulnerability{more}"


def audit(lock: str) -> tuple[int, str]:
    """Return exit code and message for a lock file; the network being away is a skip, too."""
    command = ["pip-audit", "--require-hashes", "--disable-pip", "--progress-spinner=off", "--format=json", "-r", lock]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    try:
        report = json.loads(done.stdout)
    except ValueError:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        away = "ConnectionError" in reason or "Connection" in reason
        return (0 if away else 1), f"{'SKIPPED' if away else 'pip-audit failed'}: {reason[:300]}"
    return verdict(report)


def main() -> int:
    """Audit the lock files and the tools' own; return 1 when one has a known vulnerability."""
    with tempfile.TemporaryDirectory() as directory:
        tools = Path(directory) / "uv.lock"
        tools.write_text(subprocess.run(TOOLS, capture_output=True, text=True, check=True).stdout)
        worst = 0
        for name, lock in [*((lock, lock) for lock in LOCKS), ("uv.lock", str(tools))]:
            code, message = audit(lock)
            print(f"{name}: {message}", flush=True)
            worst = max(worst, code)
    return worst


if __name__ == "__main__":
    sys.exit(main())
