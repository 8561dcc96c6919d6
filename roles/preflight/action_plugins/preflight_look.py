"""Look at a host with the preflight_facts module; a host that cannot be looked at is a result, not a failure.

So that one report can name every host, and the run stops once.
"""

from __future__ import annotations

import os
import sys
import time

from ansible.errors import AnsibleError
from ansible.plugins.action import ActionBase
from ansible.vars.clean import namespace_facts

# The checks are an ordinary package beside the role's tasks, so that unit tests can import them without Ansible.
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from preflight_checks import gather, network, values


class ActionModule(ActionBase):
    """Options: role_hosts, disk, names, timeout, use_network, roles_directory, playbook_directory (see the role)."""

    TRANSFERS_FILES = False
    _supports_check_mode = True

    def run(self, tmp: str | None = None, task_vars: dict | None = None) -> dict:
        """Return Ansible's facts, `facts`, `skew` (seconds that the host's clock is ahead); or `error`."""
        result = super().run(tmp, task_vars)
        variables = task_vars or {}
        try:
            # Here instead of gather_facts, which would end the play at a host that cannot be reached.
            gathered = self._call("ansible.legacy.setup", {}, variables)["ansible_facts"]
            facts = self._call("preflight_facts", self._what_to_look_at(variables, gathered), variables)["facts"]
        except AnsibleError as error:
            return {**result, "changed": False, "error": " ".join(str(error).split())}
        # The mark lets `gathering = smart` skip the next plays' gathering.
        gathered["_ansible_facts_gathered"] = True
        skew = facts["time"] - time.time()
        return {**result, "changed": False, "ansible_facts": gathered, "facts": facts, "skew": skew}

    def _call(self, module: str, arguments: dict, variables: dict) -> dict:
        """Return the module's answer, or raise with what it says."""
        answer: dict = self._execute_module(module, module_args=arguments, task_vars=variables)
        if answer.get("failed") or answer.get("unreachable"):
            message = answer.get("module_stderr") or answer.get("msg") or "the module returned nothing"
            raise AnsibleError(str(message).strip()[-300:])
        return answer

    def _what_to_look_at(self, variables: dict, gathered: dict) -> dict:
        """Return the module's arguments, from the host's variables as they evaluate with its facts."""
        arguments = self._task.args
        name = variables["inventory_hostname"]
        raw = {
            **variables["hostvars"].raw_get(name),
            **gathered,
            "ansible_facts": namespace_facts(gathered)["ansible_facts"],
        }
        templar = self._templar.copy_with_new_env(available_variables=raw)
        role_hosts = gather.plain(arguments["role_hosts"])
        host = gather.read_host(name, raw, lambda variable: templar.template(raw[variable]), role_hosts)
        run = gather.read_run([host], arguments)
        return {
            "paths": sorted({path for role in host.roles for path in arguments["disk"].get(role, {})}),
            "addresses": sorted({address for _, address in network.listen_addresses(run, host)}),
            "names": network.names_to_resolve(run, host, list(arguments["names"])),
            "urls": network.urls_to_fetch(run, host) if arguments["use_network"] else [],
            "endpoints": network.endpoints_to_reach(run, host) if arguments["use_network"] else [],
            "package_sources": arguments["use_network"],
            "calendars": sorted({time for _, time in values.schedules(run, host)}),
            "timeout": arguments["timeout"],
        }
