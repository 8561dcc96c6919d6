#!/usr/bin/python
"""Ansible module: the lock file of a deployment, on one of its hosts."""

from __future__ import annotations

import fcntl
import json
import os
import time

from ansible.module_utils.basic import AnsibleModule

DOCUMENTATION = r"""
module: deployment_lock_file
short_description: Take or release the lock of a deployment
description:
  - Used by the action deployment_lock, which knows who is running.
options:
  path:
    description: File of the lock, in a directory that a boot empties.
    type: path
    required: true
  state:
    description: Take the lock, replace what C(expected) holds, release it, or note that its holder has ended.
    type: str
    choices: [taken, replaced, released, abandoned]
    required: true
  holder:
    description: Who takes the lock.
    type: dict
    required: true
  expected:
    description: Holder that is replaced.
    type: dict
    default: {}
author: The litellm-gateway authors
"""

EXAMPLES = r"""
- deployment_lock_file:
    path: /run/litellm-gateway.lock
    state: taken
    holder: {who: admin@controller, process: "1234"}
"""

RETURN = r"""
holder:
  description: Who holds the lock now; empty when nobody does.
  type: dict
  returned: always
age:
  description: Seconds since it was taken.
  type: int
  returned: always
ended:
  description: Whether its holder is known to have ended without releasing it.
  type: bool
  returned: always
"""


def read(path):
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except (FileNotFoundError, ValueError):
        return {}


def write(path, content):
    with open(f"{path}.new", "w", encoding="utf-8") as file:
        json.dump(content, file)
    os.rename(f"{path}.new", path)


def main():
    module = AnsibleModule(
        argument_spec={
            "path": {"type": "path", "required": True},
            "state": {"type": "str", "choices": ["taken", "replaced", "released", "abandoned"], "required": True},
            "holder": {"type": "dict", "required": True},
            "expected": {"type": "dict", "default": {}},
        },
        supports_check_mode=True,
    )
    path, state, holder = (module.params[name] for name in ("path", "state", "holder"))
    with open(f"{path}.guard", "w", encoding="utf-8") as guard:
        fcntl.flock(guard, fcntl.LOCK_EX)
        present = read(path)
        since, ended = present.pop("since", time.time()), present.pop("ended", False)
        mine = present == holder
        if state == "released":
            if mine and not module.check_mode:
                os.unlink(path)
            module.exit_json(changed=False, holder={} if mine else present, age=0, ended=False)
        if state == "abandoned":
            if mine:
                write(path, dict(holder, since=since, ended=True))
        elif not present or mine or (state == "replaced" and present == module.params["expected"]):
            if not module.check_mode and not mine:
                write(path, dict(holder, since=time.time()))
            module.exit_json(changed=False, holder=holder, age=0, ended=False)
    module.exit_json(changed=False, holder=present, age=int(time.time() - since), ended=ended)


if __name__ == "__main__":
    main()
