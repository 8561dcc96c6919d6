"""What the machines are: operating system, resources, clock, what is already installed."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from .model import Run, check

GIB = 1024**3
#: Part of what a role needs for its first installation that has to be free where it is installed already.
_AGAIN = 0.1


@check("host-access", "Every host can be reached, has Python, and its tasks run as root")
def host_access(run: Run) -> Iterator[tuple[str, ...]]:
    for host in run.hosts:
        if host.facts is None:
            yield (
                host.name,
                f"cannot be looked at: {host.error}",
                f"make `ansible -b -m ping {host.name}` work (address, ssh key, python3, sudo rights).",
            )
        elif host.facts["uid"] != 0:
            yield (
                host.name,
                f"tasks run with user id {host.facts['uid']}, not as root.",
                "let the ssh user become root with sudo (or give --ask-become-pass).",
            )


@check("os-version", "Debian 13")
def os_version(run: Run) -> Iterator[tuple[str, ...]]:
    for host, facts in run.looked_at():
        system = facts["os"]
        if (system.get("id"), system.get("version_id")) != ("debian", "13"):
            name = system.get("pretty_name") or system.get("id") or "an unknown system"
            yield host.name, f"runs {name}.", "use a host with Debian 13 (trixie)."


@check("architecture", "A processor that the locked packages are built for")
def architecture(run: Run) -> Iterator[tuple[str, ...]]:
    for host, facts in run.looked_at():
        if facts["architecture"] not in ("x86_64", "aarch64"):
            yield host.name, f"is {facts['architecture']}.", "use an x86_64 or aarch64 host."


@check("python-version", "The host's Python is new enough")
def python_version(run: Run) -> Iterator[tuple[str, ...]]:
    least = str(run.minimum["python"])
    for host, facts in run.looked_at():
        if tuple(facts["python"]) < version(least):
            seen = ".".join(map(str, facts["python"]))
            yield (
                host.name,
                f"Ansible uses Python {seen}, older than {least}.",
                "remove ansible_python_interpreter from the inventory, or point it at /usr/bin/python3.",
            )


@check("systemd-version", "systemd is PID 1 and new enough for the units' hardening")
def systemd_version(run: Run) -> Iterator[tuple[str, ...]]:
    for host, facts in run.looked_at():
        if facts["init"] != "systemd":
            yield host.name, f"PID 1 is {facts['init'] or 'unknown'}.", "use a host that boots with systemd."
        elif facts["systemd"] < run.minimum["systemd"]:
            yield (
                host.name,
                f"systemd is {facts['systemd']}, older than {run.minimum['systemd']}.",
                "upgrade the host (apt full-upgrade).",
            )


@check("memory", "Enough memory for the host's roles")
def memory(run: Run) -> Iterator[tuple[str, ...]]:
    for host, facts in run.looked_at():
        need = sum(run.minimum["memory"].get(role, 0) for role in host.roles)
        have = facts["memory"] / GIB
        if have < need:
            yield (
                host.name,
                f"has {have:.1f} GiB of memory; {', '.join(host.roles)} need {need:.1f} GiB.",
                "give the host more memory or move a role to another host.",
            )


@check("disk-space", "Enough free space and inodes under every path that is written to")
def disk_space(run: Run) -> Iterator[tuple[str, ...]]:
    for host, facts in run.looked_at():
        there = installed_roles(facts)
        for disk in facts["disks"]:
            needs = (
                run.minimum["disk"].get(role, {}).get(disk["path"], 0) * (_AGAIN if role in there else 1)
                for role in host.roles
            )
            need, have = sum(needs), disk["free"] / GIB
            if have < need:
                yield (
                    host.name,
                    f"{disk['path']} has {have:.1f} GiB free; {round(need, 2):g} GiB are needed.",
                    f"free or add space under {disk['path']}.",
                )
            if disk["inodes_free_percent"] < 5:
                yield (
                    host.name,
                    f"{disk['path']} has {disk['inodes_free_percent']} % of its inodes left.",
                    f"remove small files from the file system of {disk['path']}.",
                )


def installed_roles(facts: Mapping[str, Any]) -> set[str]:
    """Return the roles whose data or programs are on a host already."""
    releases = {"litellm": "/opt/litellm/current", "litellm_logger": "/opt/litellm-sqlalchemy/current"}
    found = {role for role, path in releases.items() if path in facts["installed"]}
    clusters = {(cluster["version"], cluster["name"]) for cluster in facts["clusters"]}
    return found | ({"postgresql"} if ("17", "main") in clusters else set())


@check("disk-mount", "Paths that are written to are writable, and programs under /opt may run")
def disk_mount(run: Run) -> Iterator[tuple[str, ...]]:
    for host, facts in run.looked_at():
        for disk in facts["disks"]:
            if disk["read_only"]:
                yield (
                    host.name,
                    f"{disk['path']} is on a read-only file system.",
                    f"mount it writable: mount -o remount,rw (see `findmnt -T {disk['path']}`).",
                )
            if disk["noexec"] and disk["path"].startswith("/opt"):
                yield (
                    host.name,
                    f"{disk['path']} is on a file system mounted noexec.",
                    "remove noexec from its line in /etc/fstab: the gateway's programs live there.",
                )


@check("clock-skew", "The host's clock agrees with the controller's")
def clock_skew(run: Run) -> Iterator[tuple[str, ...]]:
    limit = float(run.minimum["clock_skew"])
    for host, _ in run.looked_at():
        if abs(host.skew) > limit:
            direction = "ahead of" if host.skew > 0 else "behind"
            yield (
                host.name,
                f"its clock is {abs(host.skew):.0f} s {direction} the controller's (at most {limit:g} s).",
                "install systemd-timesyncd or chrony on the host; check the controller's clock too.",
            )


@check("clock-synchronised", "The host's clock is disciplined by a time service", "warning")
def clock_synchronised(run: Run) -> Iterator[tuple[str, ...]]:
    for host, facts in run.looked_at():
        if facts["clock_synchronised"] is False and not facts["container"]:
            yield (
                host.name,
                "its clock is not synchronised with a time server.",
                "apt install systemd-timesyncd (or chrony), then see `timedatectl`.",
            )


@check("package-state", "No package is left half installed")
def package_state(run: Run) -> Iterator[tuple[str, ...]]:
    for host, facts in run.looked_at():
        if facts["half_installed"]:
            yield (
                host.name,
                f"dpkg reports unfinished packages: {', '.join(facts['half_installed'][:5])}.",
                "run `dpkg --configure -a && apt-get -f install` on the host.",
            )


@check("cluster-version", "No PostgreSQL cluster of another major version")
def cluster_version(run: Run) -> Iterator[tuple[str, ...]]:
    for host, facts in run.looked_at("postgresql"):
        for cluster in facts["clusters"]:
            if cluster["version"] != "17":
                name = f"{cluster['version']}/{cluster['name']}"
                yield (
                    host.name,
                    f"has the PostgreSQL cluster {name} in {cluster['directory']}.",
                    f"move its data to 17 (pg_upgradecluster {cluster['version']} {cluster['name']}) or, "
                    f"if nobody needs it, drop it (pg_dropcluster {cluster['version']} {cluster['name']}).",
                )


@check("cluster-checksums", "An existing cluster has data checksums")
def cluster_checksums(run: Run) -> Iterator[tuple[str, ...]]:
    for host, facts in run.looked_at("postgresql"):
        for cluster in facts["clusters"]:
            if cluster["version"] == "17" and cluster["checksums"] is False:
                yield (
                    host.name,
                    f"the cluster 17/{cluster['name']} in {cluster['directory']} has no data checksums.",
                    f"stop it and run: sudo -u postgres /usr/lib/postgresql/17/bin/pg_checksums --enable "
                    f"-D {cluster['directory']}",
                )


def version(text: str) -> tuple[int, ...]:
    """Return the numbers of a version, for comparing."""
    return tuple(int(number) for number in re.findall(r"\d+", text)[:3])
