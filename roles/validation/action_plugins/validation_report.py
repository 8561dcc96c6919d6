"""Run the package's validation on the host, print one line per check, fail with what failed."""

from __future__ import annotations

import json

from ansible import constants
from ansible.plugins.action import ActionBase
from ansible.utils.display import Display

DISPLAY = Display()
CHECKS_RAN = (0, 1)  # every other exit code of the command says why it could not check


def lines(report: dict, host: str) -> list[tuple[str, bool]]:
    """Return (line, passed) of each check of a report."""
    checks = report["checks"]
    width = max((len(check["id"]) for check in checks), default=0)
    return [
        (
            f"{'OK' if check['ok'] else 'FAILED':6} [{host}] {check['id']:{width}}  {check['seen']}"
            + (f" Next: {check['remedy']}" if check.get("remedy") else ""),
            bool(check["ok"]),
        )
        for check in checks
    ]


class ActionModule(ActionBase):
    """Option: command, the path of litellm-sqlalchemy on the host."""

    TRANSFERS_FILES = False
    _supports_check_mode = True
    _VALID_ARGS = frozenset(("command",))

    def run(self, tmp: str | None = None, task_vars: dict | None = None) -> dict:
        """Print the report; return `report`."""
        result = super().run(tmp, task_vars)
        result["changed"] = False
        host, command = (task_vars or {})["inventory_hostname"], str(self._task.args["command"])
        if self._task.check_mode:
            reason = "validation sends a request through the gateway, which check mode must not"
            DISPLAY.display(f"SKIPPED [{host}] {reason}", color=constants.COLOR_SKIP)
            return {**result, "skipped": True, "skip_reason": reason}
        module_arguments = {"argv": [command, "validate", "--json"]}
        answer = self._execute_module("ansible.legacy.command", module_args=module_arguments, task_vars=task_vars)
        if answer.get("rc") not in CHECKS_RAN or not answer.get("stdout"):
            said = " ".join(str(answer.get("stderr") or answer.get("msg") or answer.get("module_stderr")).split())
            message = f"{command} validate could not check anything (exit code {answer.get('rc')}): {said.rstrip('.')}."
            if "stdout" not in answer or not answer.get("stderr"):
                message = f"{command} cannot be run on {host}: {said.rstrip('.')}. Run playbooks/litellm.yml first."
            return {**result, "failed": True, "msg": message}
        report = json.loads(answer["stdout"])
        for line, passed in lines(report, host):
            DISPLAY.display(line, color=constants.COLOR_OK if passed else constants.COLOR_ERROR)
        failed = [check["id"] for check in report["checks"] if not check["ok"]]
        if failed:
            result.update(failed=True, msg=f"Failed checks: {', '.join(failed)}. Each line above says what to do next.")
        else:
            result["report"] = report
        return result
