#!/usr/bin/python
"""Ansible module: the server's private key, made on the host it stays on, and a signing request for it."""

from __future__ import annotations

import os
import pwd

from ansible.module_utils.basic import AnsibleModule

DOCUMENTATION = r"""
module: postgresql_server_key
short_description: Make the server's TLS key on its host and a certificate signing request for it
description:
  - Makes the directory and an EC P-256 key in it when there is none, owned by postgres, mode 0700 and 0600.
  - Returns a signing request for the key and the certificate that is there now. The key itself never leaves the host.
options:
  directory:
    description: Directory of the TLS files.
    type: path
    required: true
  common_name:
    description: Subject of the signing request.
    type: str
    required: true
  subject_alt_names:
    description: Entries of the subjectAltName, such as DNS:db1.example.net.
    type: list
    elements: str
    required: true
author: The litellm-gateway authors
"""

EXAMPLES = r"""
- postgresql_server_key:
    directory: /etc/postgresql/17/main/tls
    common_name: db1.example.net
    subject_alt_names: ["DNS:db1.example.net"]
"""

RETURN = r"""
request:
  description: Signing request in PEM; empty when the key is not there yet (check mode).
  type: str
  returned: always
certificate:
  description: Certificate in PEM that is in the directory; empty when there is none.
  type: str
  returned: always
"""


def own(module: AnsibleModule, path: str, mode: int) -> bool:
    """Give the path to postgres with this mode; return whether something had to be changed."""
    postgres, now = pwd.getpwnam("postgres"), os.stat(path)
    if (now.st_uid, now.st_gid, now.st_mode & 0o7777) == (postgres.pw_uid, postgres.pw_gid, mode):
        return False
    if not module.check_mode:
        os.chown(path, postgres.pw_uid, postgres.pw_gid)
        os.chmod(path, mode)
    return True


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "directory": {"type": "path", "required": True},
            "common_name": {"type": "str", "required": True},
            "subject_alt_names": {"type": "list", "elements": "str", "required": True},
        },
        supports_check_mode=True,
    )
    os.umask(0o077)
    directory = module.params["directory"]
    key, certificate = os.path.join(directory, "server.key"), os.path.join(directory, "server.crt")
    new = not os.path.exists(key)
    if new and module.check_mode:
        module.exit_json(changed=True, request="", certificate="")
    changed = new
    if not os.path.isdir(directory):
        os.mkdir(directory, 0o700)
    if new:
        # Written aside and renamed: a run killed here leaves no half key behind.
        aside = f"{key}.new"
        command = ["openssl", "genpkey", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256", "-out", aside]
        module.run_command(command, check_rc=True)
        os.rename(aside, key)
    changed |= own(module, directory, 0o700)
    changed |= own(module, key, 0o600)
    names = ",".join(module.params["subject_alt_names"])
    extensions = []
    for extension in (
        f"subjectAltName={names}",
        "extendedKeyUsage=serverAuth",
        "keyUsage=critical,digitalSignature",
        "basicConstraints=critical,CA:FALSE",
    ):
        extensions += ["-addext", extension]
    request = module.run_command(
        ["openssl", "req", "-new", "-key", key, "-subj", f"/CN={module.params['common_name'][:64]}", *extensions],
        check_rc=True,
    )[1]
    present = ""
    if os.path.exists(certificate):
        with open(certificate, encoding="ascii", errors="replace") as file:
            present = file.read()
    module.exit_json(changed=changed, request=request, certificate=present)


if __name__ == "__main__":
    main()
