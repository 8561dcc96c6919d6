"""Run a checking program on the host, print its report, fail with what failed."""

from __future__ import annotations

import json
import os

from ansible import constants
from ansible.errors import AnsibleActionFail
from ansible.plugins.action import ActionBase
from ansible.utils.display import Display

DISPLAY = Display()
CHECKS_RAN = (0, 1)  # every other exit code of the program says why it could not check


def lines(report: dict, host: str) -> list[tuple[str, bool]]:
    """Return (line, passed) of each check of a report."""
    checks = report["checks"]
    width = max((len(check["id"]) for check in checks), default=0)
    return [
        (
            f"{'EXCEPT' if check.get('exception') else 'OK' if check['ok'] else 'FAILED':6} [{host}] "
            f"{check['id']:{width}}  "
            + (f"{check['title']}: " if check.get("title") else "")
            + check["seen"]
            + (f" ({check['exception']})" if check.get("exception") else "")
            + (f" Next: {check['remedy']}" if check.get("remedy") else ""),
            bool(check["ok"]),
        )
        for check in checks
    ]


def shortened(report: dict, title: str) -> dict:
    """Return the report with one check for all that passed."""
    checks = report["checks"]
    plain = [check for check in checks if check["ok"] and not check.get("exception")]
    rest = [check for check in checks if check not in plain]
    excepted = sum(bool(check.get("exception")) for check in checks)
    seen = f"{len(plain)} of {len(checks)} items hold, {excepted} have an exception"
    return {**report, "checks": [*rest, {"id": title, "ok": True, "seen": seen}]}


class ActionModule(ActionBase):
    """Options: command, a path on the host; or script, a Python file on the controller that is sent to the host.

    arguments: the program's; each that is a key of files stands for the copy of that file of the controller.
    summary: name under which all that passed is one line.
    """

    TRANSFERS_FILES = True
    _supports_check_mode = True
    _VALID_ARGS = frozenset(("command", "script", "arguments", "files", "summary"))

    def run(self, tmp: str | None = None, task_vars: dict | None = None) -> dict:
        """Print the report; return `report`."""
        result = super().run(tmp, task_vars)
        result["changed"] = False
        host = (task_vars or {})["inventory_hostname"]
        if self._task.check_mode:
            reason = "validation looks at what runs, and check mode has not changed it"
            DISPLAY.display(f"SKIPPED [{host}] {reason}", color=constants.COLOR_SKIP)
            return {**result, "skipped": True, "skip_reason": reason}
        argv = self.command_line()
        answer = self._execute_module(
            "ansible.legacy.command", module_args={"argv": [*argv, "--json"]}, task_vars=task_vars
        )
        self._remove_tmp_path(self._connection._shell.tmpdir)
        command = self._task.args.get("script") or argv[0]
        if answer.get("rc") not in CHECKS_RAN or not answer.get("stdout"):
            said = " ".join(str(answer.get("stderr") or answer.get("msg") or answer.get("module_stderr")).split())
            message = f"{command} could not check anything (exit code {answer.get('rc')}): {said.rstrip('.')}."
            if "stdout" not in answer or not answer.get("stderr"):
                message = f"{command} cannot be run on {host}: {said.rstrip('.')}. Run site.yml first."
            return {**result, "failed": True, "msg": message}
        report = json.loads(answer["stdout"])
        summary = self._task.args.get("summary")
        for line, passed in lines(shortened(report, summary) if summary else report, host):
            DISPLAY.display(line, color=constants.COLOR_OK if passed else constants.COLOR_ERROR)
        failed = [check["id"] for check in report["checks"] if not check["ok"]]
        if failed:
            result.update(failed=True, msg=f"Failed checks: {', '.join(failed)}. Each line above says what to do next.")
        else:
            result["report"] = report
        return result

    def command_line(self) -> list[str]:
        """Return the program's command line, after sending what it needs to the host."""
        args = self._task.args
        arguments = [str(argument) for argument in args.get("arguments") or []]
        if not args.get("script"):
            return [str(args["command"]), *arguments]
        directory = self._make_tmp_path()
        sent = {}
        for name, path in {"script": args["script"], **(args.get("files") or {})}.items():
            local = self._loader.path_dwim(os.path.expanduser(str(path)))
            if not os.path.exists(local):
                raise AnsibleActionFail(f"{path} is not there.")
            remote = self._connection._shell.join_path(directory, os.path.basename(local))
            self._transfer_file(local, remote)
            sent[name] = remote
        self._fixup_perms2((directory, *sent.values()))
        return ["/usr/bin/python3", "-I", sent["script"], *[sent.get(argument, argument) for argument in arguments]]
