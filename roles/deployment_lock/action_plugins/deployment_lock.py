"""One run at a time: take the deployment's lock for this run of ansible-playbook, or say who holds it."""

from __future__ import annotations

import contextlib
import getpass
import os
import platform
import select
import signal
import socket
from pathlib import Path

from ansible import constants
from ansible.errors import AnsibleActionFail, AnsibleConnectionFailure
from ansible.plugins.action import ActionBase
from ansible.utils.display import Display

DISPLAY = Display()


def started(process: int) -> str:
    """Return when a process of this machine started, in clock ticks; empty when it does not run."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""


def machine() -> str:
    """Return what names this machine until it boots again; a container counts its processes by itself."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + " " + os.readlink("/proc/self/ns/pid")
    except OSError:
        return platform.node()


def this_run() -> dict[str, str]:
    """Return who runs: a task's process is a child of ansible-playbook."""
    process = os.getppid()
    return {
        "who": f"{getpass.getuser()}@{platform.node()}",
        "machine": machine(),
        "process": str(process),
        "started": started(process),
    }


def is_gone(holder: dict[str, str]) -> bool:
    """Return whether the holder was a process of this machine that does not run any more."""
    if holder.get("machine") != machine():
        return False
    return started(int(holder["process"])) != holder["started"]


def ear(holder: dict[str, str]) -> str:
    """Return the address, in Linux's abstract namespace, at which a run's watcher hears that the lock was released."""
    return f"\0litellm-gateway-lock-{holder['process']}-{holder['started']}"


def leave_the_run() -> None:
    """Hold nothing of ansible-playbook, which may be waited for, and outlive what ends it."""
    os.setsid()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    for file in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            if os.readlink(f"/proc/self/fd/{file}").startswith(("pipe:", "socket:")):
                os.close(int(file))
    DISPLAY._final_q = None


class ActionModule(ActionBase):
    """Options: `state` (taken or released), `path`, `break` (take it whoever holds it)."""

    TRANSFERS_FILES = False
    _supports_check_mode = True
    _VALID_ARGS = frozenset(("state", "path", "break"))

    def run(self, tmp: str | None = None, task_vars: dict | None = None) -> dict:
        """Return nothing but success; fail when another run holds the lock."""
        result = super().run(tmp, task_vars)
        self.variables = task_vars or {}
        state, mine = self._task.args["state"], this_run()
        try:
            answer = self.module(state, mine)
            holder = answer.get("holder", mine)
            over = answer.get("ended") or self._task.args.get("break")
            if state == "taken" and holder != mine and (over or is_gone(holder)):
                before, age = holder, answer["age"]
                answer = self.module("replaced", mine, holder)
                holder = answer.get("holder", mine)
                if holder == mine:
                    DISPLAY.display(
                        f"The run before this one was broken off: {before['who']}, process {before['process']}, begun "
                        f"{age} s ago. This run goes on from where it stopped.",
                        color=constants.COLOR_CHANGED,
                    )
        except AnsibleConnectionFailure:
            return dict(result, changed=False, msg="The host cannot be reached; preflight will say why.")
        if state == "taken" and holder != mine:
            raise AnsibleActionFail(
                f"Another run is at work on this deployment: {holder['who']}, process {holder['process']}, for "
                f"{answer['age']} s. Wait until it has ended, then run this again. If that machine is surely gone, "
                "take the lock over with -e deployment_lock_break=true."
            )
        if not self._task.check_mode and not answer.get("failed"):
            if state == "taken":
                self.watch(mine)
            else:
                with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as mouth, contextlib.suppress(OSError):
                    mouth.sendto(b"released", ear(mine))
        return dict(result, changed=False)

    def watch(self, mine: dict[str, str]) -> None:
        """Leave a process that notes it in the lock when this run fails, is interrupted or is killed.

        Where the system cannot watch a process, the next run from this machine still sees that the holder is gone.
        """
        try:
            run = os.pidfd_open(int(mine["process"]))
        except (AttributeError, OSError):
            return
        if os.fork():
            os.close(run)
            return
        try:
            leave_the_run()
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as heard:
                heard.bind(ear(mine))  # fails where this run has a watcher already
                ready, _, _ = select.select([run, heard], [], [])
                if heard not in ready:
                    self.module("abandoned", mine)
        finally:
            os._exit(0)

    def module(self, state: str, holder: dict[str, str], expected: dict[str, str] | None = None) -> dict:
        """Run deployment_lock_file on the host; a host that cannot run modules yet is left to the preflight."""
        arguments = {"path": self._task.args["path"], "state": state, "holder": holder, "expected": expected or {}}
        return self._execute_module(module_name="deployment_lock_file", module_args=arguments, task_vars=self.variables)
