#!/usr/bin/python
"""Ansible module: many small files in one step, each in place atomically."""

from __future__ import annotations

import grp
import os
import pwd

from ansible.module_utils.basic import AnsibleModule

DOCUMENTATION = r"""
module: postgresql_backup_files
short_description: Write files with given content, owner, group and mode, and remove others
description:
  - One call for all, because each task costs a connection. A file is replaced in one step, and only when it differs.
options:
  files:
    description: The files (path, content, and optionally owner, group, mode).
    type: list
    elements: dict
    required: true
  absent:
    description: Paths of files that are removed, after the others were written.
    type: list
    elements: str
    default: []
author: The litellm-gateway authors
"""

EXAMPLES = r"""
- postgresql_backup_files:
    files:
      - {path: /etc/example.conf, content: "a = 1\n", owner: root, group: root, mode: "0644"}
"""

RETURN = r"""
written:
  description: Paths that were written, or would be in check mode.
  type: list
  returned: always
removed:
  description: Paths that were removed, or would be in check mode.
  type: list
  returned: always
"""


def present(path: str) -> tuple[str, tuple[str, str, int]]:
    """Return content and (owner, group, mode) of a file; empty when there is none."""
    try:
        with open(path, encoding="utf-8") as file:
            status = os.fstat(file.fileno())
            return file.read(), (name_of_user(status.st_uid), name_of_group(status.st_gid), status.st_mode & 0o7777)
    except FileNotFoundError:
        return "", ("", "", 0)


def name_of_user(number: int) -> str:
    """Return a user's name, or the number of one that is gone."""
    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:
        return str(number)


def name_of_group(number: int) -> str:
    """Return a group's name, or the number of one that is gone."""
    try:
        return grp.getgrgid(number).gr_name
    except KeyError:
        return str(number)


def write(path: str, content: str, owner: str, group: str, mode: int) -> None:
    """Put a file into its place."""
    os.makedirs(os.path.dirname(path), mode=0o755, exist_ok=True)
    temporary = f"{path}.new"
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(content)
        os.fchown(file.fileno(), pwd.getpwnam(owner).pw_uid, grp.getgrnam(group).gr_gid)
        os.fchmod(file.fileno(), mode)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "files": {"type": "list", "elements": "dict", "required": True},
            "absent": {"type": "list", "elements": "str", "default": []},
        },
        supports_check_mode=True,
    )
    os.umask(0o022)  # a hardened host's 027 would keep the directories from the users of the backups
    written, diff = [], []
    for file in module.params["files"]:
        wanted = (file.get("owner", "root"), file.get("group", "root"), int(file.get("mode", "0644"), 8))
        content, found = present(file["path"])
        if (content, found) == (file["content"], wanted):
            continue
        written.append(file["path"])
        header = {"before_header": file["path"], "after_header": file["path"]}
        diff.append({**header, "before": content, "after": file["content"]})
        if found != wanted and content:
            before, after = (f"owner, group, mode: {key[0]} {key[1]} {key[2]:o}\n" for key in (found, wanted))
            diff.append({**header, "before": before, "after": after})
        if not module.check_mode:
            try:
                write(file["path"], file["content"], *wanted)
            except (OSError, KeyError) as error:
                module.fail_json(msg=f"{file['path']} cannot be written: {error}")
    removed = [path for path in module.params["absent"] if os.path.lexists(path)]
    for path in removed if not module.check_mode else ():
        try:
            os.unlink(path)
        except OSError as error:
            module.fail_json(msg=f"{path} cannot be removed: {error}")
    module.exit_json(changed=bool(written or removed), written=written, removed=removed, diff=diff)


if __name__ == "__main__":
    main()
