#!/usr/bin/python
"""Ansible module: the drop-in and pg_hba.conf of a Debian cluster, tried aside before they are put in force."""

from __future__ import annotations

import ipaddress
import json
import os
import pwd
import re
import shutil
import subprocess
import tempfile
import time

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.postgresql_peer import UnreachableError, connect, port_of, rows

DOCUMENTATION = r"""
module: postgresql_configuration
short_description: Put settings and pg_hba.conf of a Debian PostgreSQL cluster in force
description:
  - Renders conf.d/50-managed.conf and pg_hba.conf, and when one of them differs has PostgreSQL itself read both in a
    throw-away data directory. Only what it accepts (settings, and every line of pg_hba_file_rules) is installed.
  - Reloads when a file is newer than the configuration that the server has loaded, so a run that was killed between the
    two is made good by the next one.
  - Returns why a restart is needed instead of doing it.
options:
  version:
    description: Major version.
    type: str
    required: true
  minimum_version:
    description: Oldest minor version that is accepted, such as 17.11.
    type: str
    required: true
  cluster:
    description: Name of the cluster.
    type: str
    default: main
  port:
    description: Port, which names the socket.
    type: int
    required: true
  settings:
    description: All settings of the drop-in.
    type: dict
    required: true
  hba:
    description: Entries of pg_hba.conf in their order (type, databases, users, addresses, method, options).
    type: list
    elements: dict
    required: true
  reload_after:
    description: Other files that the server reads on reload (its certificate).
    type: list
    elements: path
    default: []
  restart_after:
    description: Files that only a restart puts in force (unit drop-ins).
    type: list
    elements: path
    default: []
author: The litellm-gateway authors
"""

EXAMPLES = r"""
- postgresql_configuration:
    version: "17"
    minimum_version: "17.11"
    port: 5432
    settings: {shared_buffers: 1GB}
    hba:
      - {type: local, databases: [all], users: [postgres], method: peer}
"""

RETURN = r"""
restart_reasons:
  description: Settings and files that wait for a restart.
  type: list
  returned: always
reloaded:
  description: Whether the server was told to load the files.
  type: bool
  returned: always
"""

HEADER = "# Ansible managed: the role postgresql writes this whole file; changes made here are lost.\n"
PLAIN = re.compile(r"^[+]?[A-Za-z_][A-Za-z0-9_$]*$")


class RefusedError(Exception):
    """PostgreSQL does not accept a candidate file; str() quotes the entry and gives PostgreSQL's reason."""


def setting_line(name: str, value) -> str:
    """Render one setting; every value may be quoted in postgresql.conf."""
    if isinstance(value, bool):
        value = "on" if value else "off"
    elif isinstance(value, list):
        value = ", ".join(str(item) for item in value)
    return "{} = '{}'\n".format(name, str(value).replace("'", "''"))


def word(value: str) -> str:
    """Quote a name of pg_hba.conf unless it is plain, a regular expression or already quoted."""
    return value if PLAIN.match(value) or value.startswith('"') else '"{}"'.format(value.replace('"', '""'))


def with_prefix(address: str) -> str:
    """Give a bare address the prefix of a single host; names and keywords stay."""
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return address
    return f"{ip}/{ip.max_prefixlen}"


def hba_lines(entry: dict) -> list[str]:
    """Render one entry: a line for each address (one line for a local entry)."""
    fields = [entry["type"], *(",".join(word(item) for item in entry[key]) for key in ("databases", "users"))]
    end = [entry["method"], *(f'{key}="{value}"' for key, value in (entry.get("options") or {}).items())]
    addresses = [] if entry["type"] == "local" else [[with_prefix(item)] for item in entry.get("addresses") or []]
    return ["  ".join(fields + address + end) + "\n" for address in addresses or [[]]]


class Cluster:
    """Paths and state of one Debian cluster."""

    def __init__(self, module: AnsibleModule) -> None:
        self.module, self.params = module, module.params
        version, name = self.params["version"], self.params["cluster"]
        self.etc = f"/etc/postgresql/{version}/{name}"
        self.data = f"/var/lib/postgresql/{version}/{name}"
        self.bin = f"/usr/lib/postgresql/{version}/bin"
        self.files = {
            f"{self.etc}/conf.d/50-managed.conf": HEADER
            + "".join(setting_line(name, value) for name, value in sorted(self.params["settings"].items())),
            f"{self.etc}/pg_hba.conf": HEADER
            + "# TYPE  DATABASE  USER  ADDRESS  METHOD; what matches no line is refused\n"
            + "".join(line for entry in self.params["hba"] for line in hba_lines(entry)),
        }

    def check(self) -> None:
        """Refuse a server or cluster that the role cannot make right by configuration."""
        reported = self.module.run_command([f"{self.bin}/postgres", "--version"], check_rc=True)[1]
        found = re.search(r"\d+\.\d+", reported)[0]
        wanted = self.params["minimum_version"]
        if [int(part) for part in found.split(".")] < [int(part) for part in wanted.split(".")]:
            self.module.fail_json(
                msg=f"PostgreSQL is {found}, and at least {wanted} is required: "
                "give the host the package sources of Debian 13 with its security updates and run again."
            )
        control = self.module.run_command(
            [f"{self.bin}/pg_controldata", self.data], check_rc=True, environ_update={"LC_ALL": "C"}
        )[1]
        if re.search(r"^Data page checksum version:\s+0$", control, re.MULTILINE):
            self.module.fail_json(
                msg=f"The cluster in {self.data} has no data checksums. Stop it, run as postgres: "
                f"{self.bin}/pg_checksums --enable --progress -D {self.data}, start it and run this again."
            )
        with open(f"{self.etc}/postgresql.conf", encoding="utf-8") as file:
            if not re.search(r"^\s*include_dir\s*=?\s*'conf\.d'", file.read(), re.MULTILINE):
                self.module.fail_json(
                    msg=f"{self.etc}/postgresql.conf does not include conf.d: add the line include_dir = 'conf.d'."
                )

    def outdated(self) -> list[str]:
        """Return the files whose content differs."""
        return [path for path, content in self.files.items() if read(path) != content]

    def install(self, paths: list[str]) -> None:
        postgres = pwd.getpwnam("postgres")
        for path in paths:
            with open(f"{path}.new", "w", encoding="utf-8") as file:
                os.fchmod(file.fileno(), 0o640)
                os.fchown(file.fileno(), postgres.pw_uid, postgres.pw_gid)
                file.write(self.files[path])
                file.flush()
                os.fsync(file.fileno())
            os.rename(f"{path}.new", path)

    def try_out(self) -> None:
        """Let PostgreSQL read the candidates in a throw-away data directory; raise RefusedError if it refuses them."""
        aside = tempfile.mkdtemp(prefix="postgresql-candidate-")
        try:
            shutil.chown(aside, "postgres", "postgres")
            conf, hba, result = (f"{aside}/{name}" for name in ("postgresql.conf", "pg_hba.conf", "rules.json"))
            for source, target in zip(self.files.values(), (conf, hba), strict=True):
                with open(target, "w", encoding="utf-8") as file:
                    file.write(source)
                shutil.chown(target, "postgres", "postgres")
            self.as_postgres([f"{self.bin}/initdb", "--no-sync", "--no-instructions", "-A", "peer", f"{aside}/data"])
            # Small memory and no archiver, whatever the settings say; everything else is read as it would be.
            overrides = {
                "hba_file": hba,
                "ident_file": f"{self.etc}/pg_ident.conf",
                "shared_buffers": "1MB",
                "huge_pages": "off",
                "logging_collector": "off",
                "log_destination": "stderr",
                "log_error_verbosity": "default",
                "log_min_messages": "warning",
                "exit_on_error": "on",
            }
            options = [item for name, value in overrides.items() for item in ("-c", f"{name}={value}")]
            options = ["-D", f"{aside}/data", "-c", f"config_file={conf}", *options]
            query = f"COPY (SELECT row_to_json(r) FROM pg_hba_file_rules AS r) TO '{result}'\n"
            self.as_postgres([f"{self.bin}/postgres", "--single", *options, "postgres"], query, conf)
            for rule in map(json.loads, read(result).replace("\\\\", "\\").splitlines()):
                if rule["error"]:
                    line = self.files[f"{self.etc}/pg_hba.conf"].splitlines()[rule["line_number"] - 1]
                    raise RefusedError(
                        f"PostgreSQL refuses the entry «{line}» of postgresql_hba_entries: {rule['error']}."
                    )
        finally:
            shutil.rmtree(aside, ignore_errors=True)

    def as_postgres(self, command: list[str], text: str | None = None, conf: str = "") -> None:
        done = subprocess.run(
            ["/usr/sbin/runuser", "-u", "postgres", "--", *command],
            input=text,
            capture_output=True,
            text=True,
            check=False,
            cwd="/",
            env={"PATH": "/usr/bin:/bin", "LC_ALL": "C.UTF-8"},
        )
        if done.returncode == 0:
            return
        lines = re.findall(r"(?:FATAL|ERROR|LOG|WARNING|PANIC|HINT):\s+(.*)", done.stderr) or [done.stderr.strip()]
        quoted = ""
        for number in re.findall(rf"{re.escape(conf)}\S* line (\d+)", done.stderr) if conf else []:
            quoted = f" «{next(iter(self.files.values())).splitlines()[int(number) - 1]}»"
        reason = "; ".join(lines).replace(conf or "\0", "the drop-in")
        raise RefusedError(f"PostgreSQL refuses the settings{quoted}: {reason}.")


def read(path: str) -> str:
    """Return the file's text; empty when there is no file."""
    try:
        with open(path, encoding="utf-8") as file:
            return file.read()
    except FileNotFoundError:
        return ""


def newer(paths: list[str], moment: float) -> list[str]:
    """Return the files changed after the moment."""
    return [path for path in paths if os.path.exists(path) and os.stat(path).st_mtime > moment]


def unread(paths: list[str], loaded: float) -> bool:
    """Tell whether the server has to load the files; a load in the future, by a clock that was set back, is none."""
    return loaded > time.time() or bool(newer(paths, loaded))


def load_time(connection) -> float:
    return float(rows(connection, "SELECT extract(epoch FROM pg_conf_load_time())")[0][0])


def reload(connection) -> None:
    """Have the server load its files; return when it has, or raise UnreachableError after 10 s."""
    before = load_time(connection)
    rows(connection, "SELECT pg_reload_conf()")
    for _attempt in range(100):
        if load_time(connection) != before:
            return
        time.sleep(0.1)
    raise UnreachableError("it did not load its configuration within 10 s")


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "version": {"type": "str", "required": True},
            "minimum_version": {"type": "str", "required": True},
            "cluster": {"type": "str", "default": "main"},
            "port": {"type": "int", "required": True},
            "settings": {"type": "dict", "required": True},
            "hba": {"type": "list", "elements": "dict", "required": True},
            "reload_after": {"type": "list", "elements": "path", "default": []},
            "restart_after": {"type": "list", "elements": "path", "default": []},
        },
        supports_check_mode=True,
    )
    cluster = Cluster(module)
    there = os.path.isdir(cluster.etc)
    if not there and not module.check_mode:
        module.fail_json(msg=f"There is no cluster in {cluster.etc}: make it with pg_createcluster and run again.")
    if there:
        cluster.check()
    outdated = cluster.outdated()
    diff = [
        {"before_header": path, "after_header": path, "before": read(path), "after": cluster.files[path]}
        for path in outdated
    ]
    if outdated and there:
        try:
            cluster.try_out()
        except RefusedError as refused:
            module.fail_json(msg=f"{refused} The files in force are unchanged.")
        if not module.check_mode:
            cluster.install(outdated)
    result = {"changed": bool(outdated), "diff": diff, "reloaded": False, "restart_reasons": []}
    if not there:
        module.exit_json(**result)
    watched = [*cluster.files, *module.params["reload_after"]]
    try:
        connection = connect(port_of(module))
    except UnreachableError as unreachable:
        # Not running (or on another port until a restart): the next start reads everything.
        module.exit_json(**dict(result, restart_reasons=[] if module.check_mode else [str(unreachable)]))
    started = float(rows(connection, "SELECT extract(epoch FROM pg_postmaster_start_time())")[0][0])
    if unread(watched, load_time(connection)):
        result.update(changed=True, reloaded=True)
        if not module.check_mode:
            try:
                reload(connection)
            except UnreachableError as unreachable:
                module.fail_json(msg=f"PostgreSQL was told to reload, and {unreachable}; look at its log.")
    pending = [name for (name,) in rows(connection, "SELECT name FROM pg_settings WHERE pending_restart ORDER BY 1")]
    result["restart_reasons"] = pending + newer(module.params["restart_after"], started)
    module.exit_json(**result)


if __name__ == "__main__":
    main()
