"""Generate the secrets that an inventory lacks, or new ones; values stay in memory and in the store.

The store is a vault file, encrypted by Ansible, unless secret-store.yml beside the inventory names another.

An action plugin, because a module would receive its arguments through a file or a pipe on a host, while
this runs in the controller's process, where Ansible already holds the vault passwords.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import string
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping
from typing import Protocol

import yaml
from ansible import constants
from ansible.errors import AnsibleActionFail, AnsibleError
from ansible.parsing.vault import VaultLib, VaultSecret, is_encrypted, match_encrypt_secret
from ansible.plugins.action import ActionBase
from pyrage.x25519 import Identity

sys.path.insert(
    0, os.path.join(os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))), "plugins")
)
import secret_stores

LETTERS = string.ascii_letters + string.digits
HEADER = "---\n# Made by playbooks/create-secrets.yml. Read it with: ansible-vault view {name}\n"


def random_text(length: int = 48) -> str:
    """Letters and digits from the operating system's generator; 48 of them hold 285 bits."""
    return "".join(secrets.choice(LETTERS) for _ in range(length))


KINDS: dict[str, Callable[[], object]] = {
    "password": random_text,
    "age_identity": lambda: str(Identity.generate()),
    "gateway_key": lambda: f"sk-{random_text()}",
    "empty_dict": dict,
}


class Store(Protocol):
    """Where an inventory keeps its secrets. `place`: what messages call it."""

    place: str

    def read(self) -> dict[str, object]:
        """Return all that it holds, by variable name; empty before the first write."""

    def write(self, created: Mapping[str, object], replaced: Mapping[str, object]) -> None:
        """Add new names and give others new values; what is not named stays as it is."""


class VaultFile:
    """The store that Ansible brings: vault.yml in the inventory's group_vars, encrypted as a whole."""

    def __init__(self, path: str, vault: VaultLib) -> None:
        """Take the file and the passwords."""
        self.place, self._vault = path, vault
        self._text, self._vault_id = read_vault(path, vault)

    def read(self) -> dict[str, object]:
        """See Store."""
        return parse(self._text, self.place)

    def write(self, created: Mapping[str, object], replaced: Mapping[str, object]) -> None:
        """See Store; comments and lines of others stay as they are."""
        text = replace_values(add_values(self._text, created, self.place), replaced, self.place)
        chosen, secret = match_encrypt_secret(
            self._vault.secrets, self._vault_id or constants.DEFAULT_VAULT_ENCRYPT_IDENTITY
        )
        keep_id = self._vault_id or (chosen if chosen != constants.DEFAULT_VAULT_IDENTITY else None)
        write_encrypted(self.place, text, self._vault, secret, keep_id)


def read_vault(path: str, vault: VaultLib) -> tuple[str, str | None]:
    """Return the decrypted text of `path` and its vault id; both empty when there is no such file."""
    try:
        with open(path, "rb") as file:
            content = file.read()
    except FileNotFoundError:
        return "", None
    if not content.strip():
        return "", None
    if not is_encrypted(content):
        raise AnsibleActionFail(
            f"{path} is not encrypted as a whole, so nothing was added to it. "
            f"Encrypt it first: ansible-vault encrypt {path}"
        )
    try:
        text = vault.decrypt(content).decode()
    except AnsibleError as error:
        raise AnsibleActionFail(
            f"{path} cannot be decrypted with the configured vault password. Name the file with the right "
            "password in ANSIBLE_VAULT_PASSWORD_FILE or --vault-password-file."
        ) from error
    header = content.splitlines()[0].decode().split(";")
    return text, header[3] if len(header) > 3 else None


def parse(text: str, path: str) -> dict[str, object]:
    """Return the variables that the decrypted `text` sets."""
    try:
        present = yaml.load(text, Loader=_Loader) or {}
    except yaml.YAMLError:
        # The parser's own message quotes the line, which may hold a secret.
        raise AnsibleActionFail(f"{path} is not valid YAML. Mend it with: ansible-vault edit {path}") from None
    if not isinstance(present, dict):
        raise AnsibleActionFail(f"{path} holds no `name: value` pairs. Mend it with: ansible-vault edit {path}")
    return present


def lacking(present: Mapping[str, object], names: Iterable[str], place: str) -> list[str]:
    """Return the names without a value; one that is there without a value is refused, never filled."""
    if empty := [name for name in names if name in present and present[name] in (None, "")]:
        raise AnsibleActionFail(
            f"{place} sets {', '.join(empty)} to nothing, and existing entries are never overwritten. "
            f"Fill them in or remove them (a vault file: ansible-vault edit {place}), then run this again."
        )
    return [name for name in names if name not in present]


def add_values(text: str, values: Mapping[str, object], path: str) -> str:
    """Return `text` with a line for each of the values.

    The text is appended to, never rewritten: comments, order and values of the user stay as they are.
    """
    if not values:
        return text
    text = text or HEADER.format(name=os.path.basename(path))
    if not text.endswith("\n"):
        text += "\n"
    return text + "".join(f"{name}: {json.dumps(value)}\n" for name, value in values.items())


def replace_values(text: str, values: Mapping[str, object], path: str) -> str:
    """Return `text` with other values for these names; only their lines change."""
    before = parse(text, path)
    for name, value in values.items():
        quoted = r"""(?:"[^"\\\n]*"|'[^'\n]*')[ \t]*(?:#[^\n]*)?"""
        pattern = rf"(?m)^{re.escape(name)}:[ \t]*(?:{quoted}|[^\s|>&*!{{\[\"'][^\n]*)$"
        text, count = re.subn(pattern, lambda _line, name=name, value=value: f"{name}: {json.dumps(value)}", text)
        if count != 1:
            raise AnsibleActionFail(
                f"{path} does not have {name} on one line of its own. Write it as `{name}: value` (ansible-vault edit)."
            )
    after = parse(text, path)
    if {name for name in after if after[name] != before.get(name)} != set(values) or before.keys() != after.keys():
        raise AnsibleActionFail(f"{path} could not be changed line by line; nothing was written.")
    return text


class _Loader(yaml.SafeLoader):
    """YAML as inventories have it: `!vault` and `!unsafe` values are kept as the text they are."""


for _tag in ("!vault", "!unsafe"):
    _Loader.add_constructor(_tag, lambda loader, node: loader.construct_scalar(node))


def write_encrypted(path: str, text: str, vault: VaultLib, secret: VaultSecret, vault_id: str | None) -> None:
    """Replace `path` in one step; only the encrypted form ever reaches the disk."""
    content = vault.encrypt(text, secret=secret, vault_id=vault_id)
    directory = os.path.dirname(path)
    os.makedirs(directory, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=".vault-", dir=directory)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def inventory_directory(sources: list[str]) -> str:
    """Return the directory of the one inventory in use, given Ansible's list of inventory sources."""
    paths = [source for source in sources if os.path.exists(source)]
    if len(paths) != 1:
        raise AnsibleActionFail(
            f"Name exactly one inventory: -i inventories/<environment> (seen: {', '.join(sources) or 'none'}), "
            "or a directory for the vault file: -e secrets_directory=<directory>."
        )
    return os.path.abspath(paths[0] if os.path.isdir(paths[0]) else os.path.dirname(paths[0]))


class ActionModule(ActionBase):
    """Options: `secrets` (dict of variable name -> kind, see KINDS), `directory` ('' = the inventory's).

    `rotate` lists names of `secrets` that get a new value though they have one.
    """

    TRANSFERS_FILES = False
    _supports_check_mode = True
    _requires_connection = False
    _VALID_ARGS = frozenset(("secrets", "directory", "rotate"))

    def run(self, tmp: str | None = None, task_vars: dict | None = None) -> dict:
        """Return `path`, `created` and `rotated` (names, never values)."""
        result = super().run(tmp, task_vars)
        variables = task_vars or {}
        kinds = dict(self._task.args["secrets"])
        unknown = sorted(set(kinds.values()) - KINDS.keys())
        if unknown:
            raise AnsibleActionFail(f"unknown kind of secret: {', '.join(unknown)}; known: {', '.join(KINDS)}")

        store = self._store(list(variables.get("ansible_inventory_sources") or []))
        present = store.read()
        if not self._task.args.get("directory"):
            # A value that another file of the inventory sets is the user's decision: leave it alone.
            kinds = {name: kind for name, kind in kinds.items() if name in present or name not in variables}
        created = {name: KINDS[kinds[name]]() for name in lacking(present, kinds, store.place)}
        rotate = [name for name in self._task.args.get("rotate") or [] if name not in created]
        if unfit := [name for name in rotate if not isinstance(present.get(name), str)]:
            raise AnsibleActionFail(
                f"{store.place} does not set {', '.join(unfit)} to a text, so it cannot be rotated there. "
                "Rotate a value that is set elsewhere by changing it there and running site.yml."
            )
        replaced = {name: KINDS[self._task.args["secrets"][name]]() for name in rotate}
        if (created or replaced) and not self._task.check_mode:
            store.write(created, replaced)
        result.update(changed=bool(created or replaced), path=store.place, created=list(created), rotated=rotate)
        return result

    def _store(self, sources: list[str]) -> Store:
        directory = self._task.args.get("directory")
        if directory:
            directory = os.path.abspath(os.path.expanduser(directory))
        else:
            base = inventory_directory(sources)
            if settings := secret_stores.settings_file(base):
                return secret_stores.Store(settings)
            directory = os.path.join(base, "group_vars", "all")
        return VaultFile(os.path.join(directory, "vault.yml"), VaultLib(self._vault_secrets()))

    def _vault_secrets(self) -> list[tuple[str, VaultSecret]]:
        found = list(getattr(self._loader, "_vault", VaultLib()).secrets or [])
        if not found:
            raise AnsibleActionFail(
                "No vault password is configured, so nothing can be encrypted. Create a file with a long random "
                "password that only you can read and name it in ANSIBLE_VAULT_PASSWORD_FILE: "
                "(umask 077 && openssl rand -base64 32 > ~/.litellm-gateway-vault) && "
                "export ANSIBLE_VAULT_PASSWORD_FILE=~/.litellm-gateway-vault"
            )
        return found
