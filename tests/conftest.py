"""The roles' own Python, importable without Ansible's plugin loading."""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BACKUP = ("roles/postgresql_backup/files", "roles/postgresql_backup/filter_plugins")
for path in (
    "plugins",
    "roles/preflight",
    "roles/preflight/library",
    "roles/validation/action_plugins",
    "playbooks/action_plugins",
    "docs",
    *BACKUP,
):
    sys.path.insert(0, str(ROOT / path))
# The tools beside this Python, also when pytest was started by its path.
os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
# A vault password of the user's shell is none of the tests' business.
os.environ.pop("ANSIBLE_VAULT_PASSWORD_FILE", None)
