"""Say which vault file the password does not open, and what to do; Ansible's own message says neither.

It stands before host_group_vars in ansible.cfg, which finds what was read here in the loader's cache.
"""

from __future__ import annotations

from pathlib import Path

from ansible.errors import AnsibleError
from ansible.parsing.dataloader import DataLoader
from ansible.parsing.vault import AnsibleVaultError
from ansible.plugins.vars import BaseVarsPlugin
from ansible.utils.path import basedir

DOCUMENTATION = """
name: vault_password
short_description: refuse a vault password that does not open the inventory's vault files
description: Reads group_vars/*/vault.yml of each inventory source; sets no variable.
"""

READ: set[str] = set()


class VarsModule(BaseVarsPlugin):  # type: ignore[misc]  # Ansible has no types
    """See DOCUMENTATION."""

    REQUIRES_ENABLED = True
    is_stateless = True

    def get_vars(self, loader: DataLoader, path: str, entities: object, cache: bool = True) -> dict[str, object]:
        """Return nothing; fail when a vault file cannot be decrypted."""
        folder = basedir(path)
        if folder not in READ:
            for file in sorted(Path(folder, "group_vars").glob("*/vault.yml")):
                try:
                    loader.load_from_file(str(file), cache="all", unsafe=True, trusted_as_template=True)
                except AnsibleVaultError as error:
                    raise AnsibleError(
                        f"{file} cannot be decrypted with the configured vault password; nothing was changed. Name "
                        "the file with the right password in ANSIBLE_VAULT_PASSWORD_FILE or --vault-password-file. "
                        "When it is lost for good: docs/operations/rotation.md, 'Without the vault password'."
                    ) from error
            READ.add(folder)
        return {}
