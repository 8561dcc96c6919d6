"""How exposed the units are that a deployment starts: systemd's own measure, from 0 (nothing) to 10 (everything)."""

import json
import subprocess
from pathlib import Path

import pytest
from conftest import PROJECT, Run, Show

MAXIMUM = 2.0
LOWER_MAXIMA = {"litellm@": 1.2, "litellm-log-writer": 1.2, "postgresql@": 1.5}
# Every loaded service that has been started since boot, or that a timer, socket or path may start, with its unit file.
STARTED = r"""
import json, subprocess
def show(unit):
    names = "FragmentPath,ExecMainStartTimestampMonotonic,TriggeredBy,LoadState"
    done = subprocess.run(["systemctl", "show", "--property", names, unit], capture_output=True, text=True, check=True)
    return dict(line.split("=", 1) for line in done.stdout.splitlines())
units = json.loads(subprocess.run(["systemctl", "list-units", "--all", "--type=service", "--output=json"],
                                  capture_output=True, check=True).stdout)
found = {}
for unit in (entry["unit"] for entry in units):
    seen = show(unit)
    started = seen["ExecMainStartTimestampMonotonic"] != "0" or seen["TriggeredBy"]
    if seen["LoadState"] == "loaded" and started and not seen["FragmentPath"].startswith("/run/"):
        found[unit] = seen["FragmentPath"]
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def units(run: Run) -> list[str]:
    """The services that the deployment has brought: those whose unit file a fresh machine does not have."""
    bare = subprocess.run(["molecule/shared/bake", "bare"], cwd=PROJECT, check=True, capture_output=True, text=True)
    image = bare.stdout.strip()
    mounted = subprocess.run(["podman", "image", "mount", image], check=True, capture_output=True, text=True)
    root = Path(mounted.stdout.strip())
    fresh = {f"/{path.relative_to(root)}" for path in root.glob("usr/lib/systemd/system/*")}
    subprocess.run(["podman", "image", "unmount", image], check=True, capture_output=True)
    started = json.loads(run("python3", "-c", STARTED))
    assert len(fresh) > 100
    return sorted(unit for unit, path in started.items() if path not in fresh)


def test_every_unit_that_the_deployment_starts_is_hardened(units: list[str], run: Run, show: Show) -> None:
    exposures = {}
    for unit in units:
        report = run("systemd-analyze", "security", "--no-pager", unit)
        exposures[unit] = float(report.rpartition("Overall exposure level for")[2].split(": ")[1].split()[0])
    lower = {unit: limit for unit in units for start, limit in LOWER_MAXIMA.items() if unit.startswith(start)}
    maxima = dict.fromkeys(units, MAXIMUM) | lower
    show("Exposure", [[unit, str(value), f"at most {maxima[unit]}"] for unit, value in exposures.items()])
    assert {unit: value for unit, value in exposures.items() if value > maxima[unit]} == {}
    # What must be among them, so that an empty list cannot pass.
    assert {
        "haproxy.service",
        "litellm@1.service",
        "litellm-log-writer.service",
        "litellm-gateway-firewall.service",
        "postgresql.service",
        "postgresql@17-main.service",
    } <= set(units)


def test_none_of_them_has_failed(units: list[str], run: Run) -> None:
    assert run("systemctl", "list-units", "--failed", "--no-legend", "--plain").split() == []
