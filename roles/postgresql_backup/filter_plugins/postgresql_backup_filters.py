"""Filters of the postgresql_backup role that must work on the controller: the recovery key never leaves it."""

from __future__ import annotations

from ansible.errors import AnsibleFilterError
from pyrage import IdentityError
from pyrage.x25519 import Identity


def recipient(identity: str) -> str:
    """Return the public key (age1...) of an age identity (AGE-SECRET-KEY-...)."""
    try:
        return str(Identity.from_str(str(identity).strip()).to_public())
    except IdentityError:
        # No details: they could quote the key.
        raise AnsibleFilterError(
            "The recovery key is no age identity (AGE-SECRET-KEY-...): make one with playbooks/create-secrets.yml."
        ) from None


class FilterModule:
    """What Ansible loads."""

    def filters(self):
        return {"postgresql_backup_recipient": recipient}
