#!/usr/bin/python
"""Ansible module: the TLS files of a server or client on its host; the key is made there and never leaves it."""

from __future__ import annotations

import grp
import os
import pwd
import shutil
import stat
import tempfile

from ansible.module_utils.basic import AnsibleModule

DOCUMENTATION = r"""
module: tls_certificate_files
short_description: Make the TLS key of a server or client on its host, and install certificates for it
description:
  - Keeps server.key, server.crt (client.key, client.crt) and ca.crt in a directory. Used by the action tls_certificate.
  - Without certificate it makes what is missing and returns a signing request. A new key waits in server.key.new until
    the certificate for it is installed.
  - Key and certificate lie in a directory of their own, which the link C(pair) points to, and their names are links
    into it, so that both change at once. A run that is killed leaves the pair as it was, or the new one.
options:
  usage:
    description: What the certificate is for, which names the files.
    type: str
    choices: [server, client]
    default: server
  directory:
    description: Directory of the files; its parent must be there.
    type: path
    required: true
  owner:
    description: Owner of the files.
    type: str
    required: true
  group:
    description: Group of the files.
    type: str
    required: true
  group_reads_key:
    description: Whether the group may read the key.
    type: bool
    default: false
  common_name:
    description: Subject of the signing request.
    type: str
    default: ""
  new_key:
    description: Make a new key though there is one.
    type: bool
    default: false
  certificate:
    description: Certificate with its chain, in PEM, to install.
    type: str
    default: ""
  authorities:
    description: Certificates of the authorities that are trusted, in PEM, to install.
    type: str
    default: ""
  key:
    description: Key in PEM to install, where it was not made here.
    type: str
    default: ""
  metrics_file:
    description: File for the node exporter's textfile collector; its directory is made when it is missing.
    type: path
    default: ""
  metrics:
    description: What to write into it.
    type: str
    default: ""
author: The litellm-gateway authors
"""

EXAMPLES = r"""
- tls_certificate_files:
    directory: /etc/postgresql/17/main/tls
    owner: postgres
    group: postgres
    common_name: db1.example.net
"""

RETURN = r"""
request:
  description: Signing request in PEM; empty when the key is not there yet (check mode).
  type: str
  returned: always
pending:
  description: Whether the request is for a key that waits for its certificate.
  type: bool
  returned: always
certificate:
  description: Certificate in PEM that is in the directory; empty when there is none.
  type: str
  returned: always
"""


class Files:
    """The directory, its owner, and what has been changed in it."""

    def __init__(self, module):
        self.module = module
        self.directory = module.params["directory"]
        self.key, self.certificate = (f"{module.params['usage']}.{end}" for end in ("key", "crt"))
        self.changed = False
        try:
            self.owner = pwd.getpwnam(module.params["owner"]).pw_uid, grp.getgrnam(module.params["group"]).gr_gid
        except KeyError as error:
            if not module.check_mode:
                module.fail_json(msg=f"{self.directory} cannot be given to its owner: {error.args[0]}.")
            module.exit_json(changed=True, request="", pending=False, certificate="")
        self.key_mode = 0o640 if module.params["group_reads_key"] else 0o600

    def path(self, name):
        return os.path.join(self.directory, name)

    def read(self, name):
        try:
            with open(self.path(name), encoding="ascii", errors="replace") as file:
                return file.read()
        except FileNotFoundError:
            return ""

    def own(self, path, mode, owner=None):
        """Give the path to its owner with this mode."""
        now, owner = os.stat(path), owner or self.owner
        if (now.st_uid, now.st_gid, now.st_mode & 0o7777) != (*owner, mode):
            self.changed = True
            if not self.module.check_mode:
                os.chown(path, *owner)
                os.chmod(path, mode)

    def write(self, name, content, mode, owner=None):
        """Replace a file at once, when its content differs."""
        if not content:
            return
        if self.read(name) == content:
            self.own(self.path(name), mode, owner)
            return
        self.changed = True
        if self.module.check_mode:
            return
        handle, aside = tempfile.mkstemp(dir=os.path.dirname(self.path(name)), prefix=".new-")
        with os.fdopen(handle, "w") as file:
            file.write(content)
            os.fchown(file.fileno(), *(owner or self.owner))
            os.fchmod(file.fileno(), mode)
            file.flush()
            os.fsync(file.fileno())
        os.rename(aside, self.path(name))

    def check_metrics(self, path):
        """Fail where somebody else could put a link in the way of the metrics."""
        directory = os.path.dirname(path)
        if not os.path.lexists(directory):
            return
        status = os.lstat(directory)
        if not stat.S_ISDIR(status.st_mode) or status.st_uid not in (0, os.geteuid()) or status.st_mode & 0o022:
            seen = f"owner {status.st_uid}, mode {stat.filemode(status.st_mode)}"
            self.module.fail_json(
                msg=f"{directory} can be written by others ({seen}): give it to root with mode 0755, or name another "
                "tls_certificate_metrics_directory."
            )

    def publish(self, path, content):
        """Write metrics for everybody to read."""
        if not os.path.isdir(os.path.dirname(path)):
            self.changed = True
            if self.module.check_mode:
                return
            mask = os.umask(0o022)
            os.makedirs(os.path.dirname(path))
            os.umask(mask)
        self.write(path, content, 0o644, (os.geteuid(), os.getegid()))

    def link(self, target, name):
        """Point a name to a target at once; a file that has the name is replaced."""
        if os.path.islink(self.path(name)) and os.readlink(self.path(name)) == target:
            return
        aside = self.path(f".new-{name}")
        if os.path.lexists(aside):
            os.unlink(aside)
        os.symlink(target, aside)
        os.rename(aside, self.path(name))

    def write_pair(self, key, certificate):
        """Replace key and certificate by one rename, when one of them differs."""
        wanted = {self.key: (key, self.key_mode), self.certificate: (certificate, 0o644)}
        linked = all(os.path.islink(self.path(name)) for name in wanted)
        if linked and all(self.read(name) == content for name, (content, _mode) in wanted.items()):
            for name, (_content, mode) in wanted.items():
                self.own(self.path(name), mode)
            self.remove_other_pairs()
            return
        self.changed = True
        if self.module.check_mode:
            return
        if not linked and os.path.exists(self.path(self.certificate)):
            # Files from before there were pairs become one first, as they are.
            present = {name: (self.read(name), mode) for name, (_content, mode) in wanted.items()}
            self.point_to(self.new_pair(present), wanted)
        self.point_to(self.new_pair(wanted), wanted)

    def new_pair(self, files):
        """Return the name of a new directory with these files."""
        directory = tempfile.mkdtemp(dir=self.directory, prefix=".pair-")
        for name, (content, mode) in files.items():
            with open(os.path.join(directory, name), "w", encoding="ascii") as file:
                file.write(content)
                os.fchown(file.fileno(), *self.owner)
                os.fchmod(file.fileno(), mode)
                file.flush()
                os.fsync(file.fileno())
        os.chown(directory, *self.owner)
        os.chmod(directory, os.stat(self.directory).st_mode & 0o7777)
        return os.path.basename(directory)

    def point_to(self, pair, names):
        """Put a pair into place."""
        self.link(pair, "pair")
        for name in names:
            self.link(f"pair/{name}", name)
        self.remove_other_pairs()

    def remove_other_pairs(self):
        """Remove the pairs that were replaced, and what a run that was killed left."""
        for other in os.listdir(self.directory):
            if other.startswith(".pair-") and other != os.readlink(self.path("pair")) and not self.module.check_mode:
                shutil.rmtree(self.path(other))

    def make_key(self, name):
        """Make a key aside and rename it: a run killed here leaves no half key behind."""
        self.changed = True
        aside = self.path(f".{name}")
        command = ["openssl", "genpkey", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256", "-out", aside]
        self.module.run_command(command, check_rc=True)
        self.own(aside, self.key_mode)
        os.rename(aside, self.path(name))

    def public_key(self, arguments, data=None):
        """Return the public key that an openssl command prints, in PEM."""
        return self.module.run_command(["openssl", *arguments], data=data, check_rc=True)[1].strip()


def main():
    module = AnsibleModule(
        argument_spec={
            "usage": {"type": "str", "choices": ["server", "client"], "default": "server"},
            "directory": {"type": "path", "required": True},
            "owner": {"type": "str", "required": True},
            "group": {"type": "str", "required": True},
            "group_reads_key": {"type": "bool", "default": False},
            "common_name": {"type": "str", "default": ""},
            "new_key": {"type": "bool", "default": False, "no_log": False},
            "certificate": {"type": "str", "default": ""},
            "authorities": {"type": "str", "default": ""},
            "key": {"type": "str", "default": "", "no_log": True},
            "metrics_file": {"type": "path", "default": ""},
            "metrics": {"type": "str", "default": ""},
        },
        supports_check_mode=True,
    )
    os.umask(0o077)
    files, params = Files(module), module.params
    if params["metrics_file"]:
        files.check_metrics(params["metrics_file"])
    if not os.path.isdir(files.directory):
        if module.check_mode:
            module.exit_json(changed=True, request="", pending=False, certificate="")
        os.mkdir(files.directory, 0o700)
    files.own(files.directory, 0o750 if params["group_reads_key"] else 0o700)

    if params["certificate"]:
        install(files, params)
        module.exit_json(changed=files.changed, request="", pending=False, certificate=params["certificate"])

    present = os.path.exists(files.path(files.key))
    pending = os.path.exists(files.path(f"{files.key}.new"))
    if not module.check_mode:
        if (not present or params["new_key"]) and not pending:
            files.make_key(f"{files.key}.new")
            pending = True
    elif not present:
        module.exit_json(changed=True, request="", pending=False, certificate="")
    key = files.path(f"{files.key}.new" if pending else files.key)
    subject = f"/CN={params['common_name'][:64]}"
    request = module.run_command(["openssl", "req", "-new", "-key", key, "-subj", subject], check_rc=True)[1]
    module.exit_json(changed=files.changed, request=request, pending=pending, certificate=files.read(files.certificate))


def install(files, params):
    """Put authorities, key and certificate into place; the waiting key is taken when the certificate is for it."""
    files.write("ca.crt", params["authorities"], 0o644)
    key, waiting = params["key"] or files.read(files.key), files.path(f"{files.key}.new")
    if not params["key"] and os.path.exists(waiting) and not files.module.check_mode:
        wanted = files.public_key(["x509", "-noout", "-pubkey"], params["certificate"])
        if files.public_key(["pkey", "-in", waiting, "-pubout"]) == wanted:
            key = files.read(os.path.basename(waiting))
    files.write_pair(key, params["certificate"])
    if os.path.exists(waiting) and files.read(os.path.basename(waiting)) == key:
        os.unlink(waiting)
    if params["metrics_file"]:
        files.publish(params["metrics_file"], params["metrics"])


if __name__ == "__main__":
    main()
