"""Check what was gathered of all hosts, print one report, and fail once if it holds an error."""

from __future__ import annotations

import os
import sys

from ansible import constants
from ansible.plugins.action import ActionBase
from ansible.utils.display import Display

# The checks are an ordinary package beside the role's tasks, so that unit tests can import them without Ansible.
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import preflight_checks as checks
from preflight_checks import gather

DISPLAY = Display()
COLOURS = {"ERROR": constants.COLOR_ERROR, "WARNING": constants.COLOR_WARN}


class ActionModule(ActionBase):
    """Options: role_hosts, secrets, minimum, accepted, roles_directory, playbook_directory (see the role)."""

    TRANSFERS_FILES = False
    _supports_check_mode = True
    _requires_connection = False

    def run(self, tmp: str | None = None, task_vars: dict | None = None) -> dict:
        """Print the report; return `findings`."""
        result = super().run(tmp, task_vars)
        variables = task_vars or {}
        hostvars, role_hosts = variables["hostvars"], gather.plain(self._task.args["role_hosts"])
        hosts = [
            gather.read_host(name, hostvars.raw_get(name), hostvars[name].__getitem__, role_hosts)
            for name in variables["ansible_play_hosts_all"]
        ]
        run = gather.read_run(hosts, self._task.args)
        sources = variables.get("ansible_inventory_sources") or []
        gather.read_controller(run, self._task.args["roles_directory"], sources, self._loader)
        findings = checks.check_all(run, frozenset(self._task.args["accepted"]))
        for line in checks.render(findings, len(run.hosts)):
            DISPLAY.display(line, color=COLOURS.get(line.split(" ")[0], constants.COLOR_OK))
        result["changed"] = False
        errors = sum(finding.severity == "error" for finding in findings)
        if errors:
            result.update(failed=True, msg=f"{errors} of the findings above must be mended; nothing was changed.")
        else:
            result["findings"] = [vars(finding) for finding in findings]
        return result
