#!/usr/bin/python
"""Look at a host once and report everything that the preflight checks need; nothing is changed."""

from __future__ import annotations

import ctypes
import glob
import os
import platform
import re
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request

from ansible.module_utils.basic import AnsibleModule

DOCUMENTATION = r"""
module: preflight_facts
short_description: Gather what the preflight checks need in one round trip
description: Reads, resolves, binds and fetches; changes nothing. Every probe that fails is data, not an error.
options:
  paths: {type: list, elements: str, default: [], description: Where disk space is looked at.}
  addresses: {type: list, elements: str, default: [], description: Addresses that services are to listen on.}
  names: {type: list, elements: str, default: [], description: Names that must resolve.}
  urls: {type: list, elements: str, default: [], description: Fetched to see whether they can be reached.}
  endpoints: {type: list, elements: str, default: [], description: "`host:port` to open a connection to."}
  package_sources: {type: bool, default: true, description: Whether the host's apt sources are tried.}
  calendars: {type: list, elements: str, default: [], description: Times of timers.}
  timeout: {type: float, default: 6, description: Seconds that all network probes together may take.}
author: The project
"""
EXAMPLES = "- preflight_facts: {paths: [/var/lib], names: [db1.example.net]}"
RETURN = "facts: {type: dict, returned: always, description: What was seen.}"

STA_UNSYNC = 0x40  # linux/timex.h
LISTENING = "0A"  # net/tcp_states.h, as /proc/net/tcp prints it


def read(path):
    """Return the text of a file, '' when it cannot be read."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read()
    except OSError:
        return ""


def output(*command):
    """Return what a command prints, '' when it is missing, fails or hangs."""
    environment = dict(os.environ, LC_ALL="C.UTF-8")
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, env=environment, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout


def operating_system():
    """Return the fields of os-release, in lower case."""
    fields = {}
    for line in read("/etc/os-release").splitlines():
        name, _, value = line.partition("=")
        fields[name.lower()] = value.strip("\"'")
    return fields


def memory():
    """Return the memory in bytes: the kernel's, or the control group's limit where that is lower."""
    found = re.search(r"^MemTotal:\s+(\d+) kB", read("/proc/meminfo"), re.M)
    total = int(found.group(1)) * 1024 if found else 0
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        limit = read(path).strip()
        if limit.isdigit():
            total = min(total, int(limit))
    return total


def disk(path):
    """Return space and mount options of the file system that will hold `path`."""
    existing = path
    while not os.path.exists(existing):
        existing = os.path.dirname(existing) or "/"
    stat = os.statvfs(existing)
    return {
        "path": path,
        "free": stat.f_bavail * stat.f_frsize,
        "inodes_free_percent": 100 * stat.f_favail // stat.f_files if stat.f_files else 100,
        "read_only": bool(stat.f_flag & os.ST_RDONLY),
        "noexec": bool(stat.f_flag & os.ST_NOEXEC),
    }


def address_of(text):
    """Return the printable form of an address of /proc/net/tcp or tcp6 (words in the host's byte order)."""
    raw = b"".join(struct.pack("=I", int(text[i : i + 8], 16)) for i in range(0, len(text), 8))
    return socket.inet_ntop(socket.AF_INET if len(raw) == 4 else socket.AF_INET6, raw)


def owners():
    """Return socket inode -> (process name, systemd unit)."""
    found = {}
    for directory in glob.glob("/proc/[0-9]*/fd"):
        process = os.path.dirname(directory)
        try:
            links = [os.readlink(entry.path) for entry in os.scandir(directory)]
        except OSError:
            continue
        inodes = [link[8:-1] for link in links if link.startswith("socket:[")]
        if not inodes:
            continue
        units = re.findall(r"/([^/\n]+\.service)(?:/[^\n]*)?$", read(process + "/cgroup"), re.M)
        name = read(process + "/comm").strip()
        found.update((inode, (name, units[-1] if units else "")) for inode in inodes)
    return found


def listeners():
    """Return every listening TCP socket with its owner."""
    by_inode = owners()
    found = []
    for path in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in read(path).splitlines()[1:]:
            fields = line.split()
            if fields[3] != LISTENING:
                continue
            address, port = fields[1].split(":")
            process, unit = by_inode.get(fields[9], ("", ""))
            found.append({"address": address_of(address), "port": int(port, 16), "process": process, "unit": unit})
    return found


def can_bind(address):
    """Return '' when a socket can be bound to the address (any free port), else why not."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        try:
            probe.bind((address, 0))
        except OSError as error:
            return error.strerror or str(error)
    return ""


def clock_synchronised():
    """Return whether the kernel's clock is disciplined; None when that cannot be asked."""
    try:
        buffer = ctypes.create_string_buffer(512)  # struct timex, all zero: only read
        if ctypes.CDLL(None).adjtimex(buffer) < 0:
            return None
    except (OSError, AttributeError):
        return None
    # modes, offset, freq, maxerror, esterror, status: native alignment (adjtimex(2))
    return not struct.unpack_from("@illlli", buffer.raw)[5] & STA_UNSYNC


def resolve(name):
    """Return the addresses of a name as this host sees them. Raises OSError."""
    return {"addresses": sorted({str(entry[4][0]) for entry in socket.getaddrinfo(name, None)})}


def fetch(url, proxy):
    """Return '' when the server answered at all. Raises OSError, ValueError."""
    handlers = [urllib.request.ProxyHandler({"http": proxy, "https": proxy})] if proxy else []
    opener = urllib.request.build_opener(*handlers)
    try:
        opener.open(urllib.request.Request(url, method="HEAD"), timeout=5).close()
    except urllib.error.HTTPError as error:
        if error.code >= 500 or error.code in (404, 407):
            raise
    return ""


def connect(endpoint):
    """Return '' when `host:port` takes a connection. Raises OSError, ValueError."""
    host, _, port = endpoint.rpartition(":")
    socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
    return ""


def apt_sources():
    """Return the index that apt would fetch first from each of its sources, and apt's proxy."""
    uris = re.findall(r"^'(https?://[^']+/InRelease)'", output("apt-get", "update", "--print-uris"), re.M)
    proxy = re.search(r"'([^']*)'", output("apt-config", "shell", "x", "Acquire::http::Proxy"))
    return list(dict.fromkeys(uris)), proxy.group(1) if proxy else ""


def calendar_error(expression):
    """Return why systemd takes no timer at this time, '' when it does or cannot be asked."""
    command = ["systemd-analyze", "calendar", "--", expression]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stderr.strip() if done.returncode else ""


def clusters():
    """Return Debian's PostgreSQL clusters: version, name, data directory, whether pages have checksums."""
    found = []
    for configuration in sorted(glob.glob("/etc/postgresql/*/*/postgresql.conf")):
        version, name = configuration.split("/")[3:5]
        setting = re.search(r"^\s*data_directory\s*=\s*'([^']+)'", read(configuration), re.M)
        directory = setting.group(1) if setting else f"/var/lib/postgresql/{version}/{name}"
        control = output(f"/usr/lib/postgresql/{version}/bin/pg_controldata", "-D", directory)
        checksum = re.search(r"^Data page checksum version:\s*(\d+)", control, re.M)
        found.append(
            {
                "version": version,
                "name": name,
                "directory": directory,
                "checksums": None if checksum is None else checksum.group(1) != "0",
            }
        )
    return found


def network(module):
    """Return what names, URLs and package sources answered, all tried at once and within the time allowed."""
    sources, proxy = apt_sources() if module.params["package_sources"] else ([], "")
    jobs = [("names", name, resolve, (name,)) for name in module.params["names"]]
    jobs += [("urls", url, fetch, (url, "")) for url in module.params["urls"]]
    jobs += [("endpoints", endpoint, connect, (endpoint,)) for endpoint in module.params["endpoints"]]
    jobs += [("package_sources", uri, fetch, (uri, proxy)) for uri in sources]
    slow = "no answer within {:g} s".format(module.params["timeout"])
    found = {"names": {}, "urls": {}, "endpoints": {}, "package_sources": {}}
    threads = []
    deadline = time.monotonic() + module.params["timeout"]
    for kind, target, function, arguments in jobs:
        found[kind][target] = {"error": slow} if kind == "names" else slow
        job = (found[kind], target, function, arguments, deadline)
        # Daemons: a resolver that hangs must not hold up the end of this process.
        thread = threading.Thread(target=probe, args=job, daemon=True)
        thread.start()
        threads.append(thread)
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    return {kind: dict(answers) for kind, answers in found.items()}


def probe(answers, target, function, arguments, deadline):
    """Store under `target` what the function returns, or why it failed; try again what may be over in a moment."""
    while True:
        try:
            answers[target] = function(*arguments)
            return
        except (OSError, ValueError) as error:
            reason, passes = reason_of(error), may_pass(error)
            answers[target] = {"error": reason} if function is resolve else reason
        if not passes or time.monotonic() + 1 >= deadline:
            return
        time.sleep(0.5)


def reason_of(error):
    """Return what an error says, without the words around it."""
    if isinstance(error, urllib.error.HTTPError):
        return f"HTTP status {error.code}"
    return str(getattr(error, "reason", error))


def may_pass(error):
    """Return whether an error is one of a busy network: a lost packet, a resolver or server that is overloaded."""
    cause = getattr(error, "reason", error)
    if isinstance(error, urllib.error.HTTPError):
        return error.code >= 500
    return isinstance(cause, (TimeoutError, ConnectionResetError)) or (
        isinstance(cause, socket.gaierror) and cause.errno == socket.EAI_AGAIN
    )


def main():
    """Gather and return."""
    texts = {"type": "list", "elements": "str", "default": []}
    module = AnsibleModule(
        argument_spec={
            "paths": texts,
            "addresses": texts,
            "names": texts,
            "urls": texts,
            "endpoints": texts,
            "package_sources": {"type": "bool", "default": True},
            "calendars": texts,
            "timeout": {"type": "float", "default": 6},
        },
        supports_check_mode=True,
    )
    systemd = re.match(r"systemd (\d+)", output("systemctl", "--version"))
    facts = network(module)
    facts.update(
        os=operating_system(),
        architecture=platform.machine(),
        python=list(sys.version_info[:3]),
        systemd=int(systemd.group(1)) if systemd else 0,
        init=read("/proc/1/comm").strip(),
        uid=os.geteuid(),
        container=os.path.exists("/run/systemd/container") or os.path.exists("/run/.containerenv"),
        memory=memory(),
        disks=[disk(path) for path in module.params["paths"]],
        listeners=listeners(),
        bind_errors={address: can_bind(address) for address in module.params["addresses"]},
        own_addresses=re.findall(r"\binet6? ([0-9a-f.:]+)", output("ip", "-o", "addr")),
        clock_synchronised=clock_synchronised(),
        half_installed=re.findall(r"^ (\S+) ", output("dpkg", "--audit"), re.M),
        clusters=clusters(),
        calendars={time: calendar_error(time) for time in module.params["calendars"]},
        installed=[
            path for path in ("/opt/litellm/current", "/opt/litellm-sqlalchemy/current") if os.path.exists(path)
        ],
        time=time.time(),
    )
    module.exit_json(changed=False, facts=facts)


if __name__ == "__main__":
    main()
