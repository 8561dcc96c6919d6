#!/usr/bin/python
"""Keep a folder of credential files: each written atomically, root's alone, none but the listed ones."""

import glob
import json
import os
import re
import shutil
import subprocess
import tempfile
import time

from ansible.module_utils.basic import AnsibleModule

DOCUMENTATION = r"""
module: credential_files
short_description: Keep a folder of credential files for systemd's LoadCredential
description:
  - Writes each credential to a file of its own, atomically, and removes files that are not listed.
  - Folder and files belong to root and can be read by nobody else. Contents are never shown.
  - Encrypted, they have C(.cred) behind their names and are of use on this host only.
options:
  directory:
    description: Folder of the files; made when it is not there.
    type: path
    required: true
  credentials:
    description: File name and content; a mapping as content is written as JSON.
    type: dict
    required: true
  overlap:
    description:
      - Seconds that the old value of a credential stays valid when it changes, by name. It is kept in the file
        C(<name>_PREVIOUS), a line of end (Unix time) and value for each; what is over is removed. With 0 none is kept.
    type: dict
    default: {}
  encrypt:
    description:
      - Whether the files are encrypted for LoadCredentialEncrypted, with the host's key and, where it has one, its TPM.
    type: bool
    default: false
  prune:
    description:
      - Whether files that are not listed are removed. Without, they stay for what was started with them until a later
        call removes them; what C(overlap) has ended is removed in any case.
    type: bool
    default: true
  validate:
    description:
      - Command that must accept what is new before any file is replaced. It finds these files in the folder that
        CREDENTIALS_DIRECTORY names, with the names of the files.
    type: list
    elements: str
    default: []
author: [litellm-gateway]
"""

EXAMPLES = r"""
- credential_files:
    directory: /etc/example/credentials
    credentials:
      API_KEY: "{{ vault_api_key }}"
      writer.json: {user: writer, password: "{{ vault_writer_password }}"}
"""

RETURN = r"""
written:
  description: Names of the files that were (in check mode, would be) written.
  type: list
  returned: always
removed:
  description: Names of the files that were (in check mode, would be) removed.
  type: list
  returned: always
"""

PREVIOUS = "_PREVIOUS"
#: Where new credentials are tried: in memory, and gone after a boot.
TRIALS = "/run/credential-trial-"
#: Behind the names of encrypted files.
ENCRYPTED = ".cred"
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")


def content_of(value):
    """Return the bytes of a credential; a mapping becomes one line of JSON with sorted keys."""
    return (json.dumps(value, sort_keys=True) if isinstance(value, dict) else str(value)).encode()


class Folder:
    """The folder of the files, in clear or encrypted."""

    def __init__(self, module, directory, encrypt):
        self.module, self.directory, self.encrypt = module, directory, encrypt

    def path(self, name):
        return os.path.join(self.directory, self.file(name))

    def file(self, name):
        return name + (ENCRYPTED if self.encrypt else "")

    def read(self, name):
        """Return the content of a credential; None when it is not there or was encrypted by another host."""
        try:
            with open(self.path(name), "rb") as file:
                content = file.read()
        except FileNotFoundError:
            return None
        if not self.encrypt:
            return content
        # Without the module's own run_command, which would turn bytes into text and log the command. The name is that
        # of no file: what carries a name, from before units took the whole folder, is not opened but written anew.
        command = ["systemd-creds", "decrypt", "--name=none", "-", "-"]
        opened = subprocess.run(command, input=content, capture_output=True, check=False)
        return opened.stdout if opened.returncode == 0 else None

    def is_current(self, name, content):
        """Tell whether the file holds this content and is root's alone."""
        if self.read(name) != content:
            return False
        status = os.lstat(self.path(name))
        return (status.st_mode & 0o7777, status.st_uid, status.st_gid) == (0o600, 0, 0)

    def write(self, name, content):
        """Replace a credential at once."""
        if self.encrypt:
            # Bound to the TPM, not to what it has measured: an update of the firmware must not lock the gateway out.
            # Without a name in it: a unit that takes the whole folder knows it by another one.
            command = ["systemd-creds", "encrypt", "--with-key=auto", "--tpm2-pcrs=", "--name=", "-", "-"]
            sealed = subprocess.run(command, input=content, capture_output=True, check=False)
            if sealed.returncode:
                said = sealed.stderr.decode(errors="replace").strip()
                self.module.fail_json(msg=f"{name} cannot be encrypted, nothing replaces the old value: {said}")
            content = sealed.stdout
        write(self.directory, self.file(name), content)


def write(directory, name, content):
    """Replace a file at once, so that a reader sees the old or the new content and a crash leaves one of them."""
    descriptor, temporary = tempfile.mkstemp(dir=directory, prefix=".new-")  # mode 0600
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.rename(temporary, os.path.join(directory, name))


def previous_values(folder, name, value, seconds):
    """Return the lines of values that stay valid beside the new one; a value that comes back is none of them."""
    now = int(time.time())
    old, before = ((folder.read(n) or b"").decode().strip() for n in (name, name + PREVIOUS))
    lines = [line.split(" ", 1) for line in before.splitlines()]
    kept = {text: int(end) for end, text in lines if int(end) > now}
    if old and old != value:
        kept[old] = now + seconds
    kept.pop(value, None)
    return "\n".join(f"{end} {text}" for text, end in sorted(kept.items(), key=lambda item: item[1])) if seconds else ""


def refuse_invalid(module, credentials):
    """Fail unless the command accepts the new credentials, in a folder of their own that only root can read."""
    for left in glob.glob(f"{TRIALS}*"):
        shutil.rmtree(left)  # of a run that was killed here
    directory = tempfile.mkdtemp(dir=os.path.dirname(TRIALS), prefix=os.path.basename(TRIALS))
    try:
        for name, value in credentials.items():
            write(directory, name, content_of(value))
        environment = {"CREDENTIALS_DIRECTORY": directory}
        code, output, errors = module.run_command(module.params["validate"], environ_update=environment)
    finally:
        shutil.rmtree(directory)
    if code:
        names = ", ".join(sorted(credentials))
        module.fail_json(msg=f"New credentials ({names}) were refused, the old ones stay: {(errors or output).strip()}")


def main():
    module = AnsibleModule(
        argument_spec={
            "directory": {"type": "path", "required": True},
            "credentials": {"type": "dict", "required": True, "no_log": True},
            "overlap": {"type": "dict", "default": {}},
            "encrypt": {"type": "bool", "default": False},
            "prune": {"type": "bool", "default": True},
            "validate": {"type": "list", "elements": "str", "default": []},
        },
        supports_check_mode=True,
    )
    directory, credentials = module.params["directory"], dict(module.params["credentials"])
    folder = Folder(module, directory, module.params["encrypt"])
    for name, seconds in module.params["overlap"].items():
        # It is written first: a run killed after that has the value in both files, and the next one goes on.
        if kept := previous_values(folder, name, content_of(credentials[name]).decode(), int(seconds)):
            credentials[name + PREVIOUS] = kept
    for name, value in credentials.items():
        if not NAME.fullmatch(name):
            module.fail_json(msg=f"{name!r} cannot be the name of a credential: use letters, digits and _ . -")
        if value is None or not content_of(value).strip():
            module.fail_json(msg=f"the credential {name} is empty: give it a value or take it out of the list")

    present = set(os.listdir(directory)) if os.path.isdir(directory) else set()
    unlisted = present - set(map(folder.file, credentials))
    ended = {name for name in module.params["overlap"] if folder.file(name + PREVIOUS) in unlisted}
    # Without an overlap nothing may go on with the old value: a new file tells who read the one before.
    written = {name for name in ended if not int(module.params["overlap"][name])}
    written |= {name for name, value in credentials.items() if not folder.is_current(name, content_of(value))}
    removed = sorted(unlisted if module.params["prune"] else {folder.file(name + PREVIOUS) for name in ended})
    status = os.stat(directory) if os.path.isdir(directory) else None
    wrong_directory = status is None or (status.st_mode & 0o7777, status.st_uid) != (0o700, 0)
    if not module.check_mode:
        if wrong_directory:
            os.makedirs(directory, exist_ok=True)
            os.chmod(directory, 0o700)
            os.chown(directory, 0, 0)
        if written and module.params["validate"]:
            refuse_invalid(module, {name: credentials[name] for name in written})
        for name in sorted(written, key=lambda name: (not name.endswith(PREVIOUS), name)):
            folder.write(name, content_of(credentials[name]))
        for name in removed:
            os.remove(os.path.join(directory, name))
    module.exit_json(changed=bool(written or removed or wrong_directory), written=sorted(written), removed=removed)


if __name__ == "__main__":
    main()
