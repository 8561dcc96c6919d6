"""The secrets of an inventory whose secret-store.yml names a store, as variables of all its hosts."""

from __future__ import annotations

import os
import sys
from typing import Any

from ansible.plugins.vars import BaseVarsPlugin

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import secret_stores

DOCUMENTATION = """
name: secret_store
short_description: read an inventory's secrets from HashiCorp Vault or AWS Secrets Manager
description:
  - Reads the document that secret-store.yml beside the inventory names, before the first task of a run and after
    the run has written it.
"""

#: Settings file and writes of this run so far -> what the store held then.
_read: dict[tuple[str, float], dict[str, Any]] = {}


class VarsModule(BaseVarsPlugin):
    """See DOCUMENTATION."""

    REQUIRES_ENABLED = False

    def get_vars(self, loader: Any, path: str, entities: Any) -> dict[str, Any]:
        """Return the secrets, of the group `all` of the inventory in the directory `path`."""
        super().get_vars(loader, path, entities)
        entities = entities if isinstance(entities, list) else [entities]
        file = secret_stores.settings_file(path) if any(entity.name == "all" for entity in entities) else None
        if file is None:
            return {}
        key = (file, secret_stores.writes())
        if key not in _read:
            _read[key] = secret_stores.Store(file).read()
        return _read[key]
