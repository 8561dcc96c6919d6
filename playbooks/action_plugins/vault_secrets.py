"""Generate the secrets that a vault file lacks; values stay in memory and in the encrypted file.

An action plugin, because a module would receive its arguments through a file or a pipe on a host, while
this runs in the controller's process, where Ansible already holds the vault passwords.
"""

from __future__ import annotations

import os
import re
import secrets
import string
import tempfile
from collections.abc import Callable, Mapping

import yaml
from ansible import constants
from ansible.errors import AnsibleActionFail, AnsibleError
from ansible.parsing.vault import VaultLib, VaultSecret, is_encrypted, match_encrypt_secret
from ansible.plugins.action import ActionBase

LETTERS = string.ascii_letters + string.digits
HEADER = "---\n# Made by playbooks/create-secrets.yml. Read it with: ansible-vault view {name}\n"


def random_text(length: int = 48) -> str:
    """Letters and digits from the operating system's generator; 48 of them hold 285 bits."""
    return "".join(secrets.choice(LETTERS) for _ in range(length))


def age_identity() -> str:
    """Return a private key for age (https://age-encryption.org/v1, X25519), in Bech32 (BIP 173)."""
    prefix, charset = "age-secret-key-", "qpzry9x8gf2tvdw0s3jn54khce6mua7l"
    bits = f"{secrets.randbits(256):0256b}" + "0000"
    values = [int(bits[start : start + 5], 2) for start in range(0, 260, 5)]
    check = 1
    expanded = [ord(character) >> 5 for character in prefix] + [0] + [ord(character) & 31 for character in prefix]
    for value in [*expanded, *values, *[0] * 6]:
        top, check = check >> 25, (check & 0x1FFFFFF) << 5 ^ value
        for bit, generator in enumerate((0x3B6A57B2, 0x26508E6D, 0x1EA119FA, 0x3D4233DD, 0x2A1462B3)):
            check ^= generator if top >> bit & 1 else 0
    values += [(check ^ 1) >> 5 * (5 - place) & 31 for place in range(6)]
    return (prefix + "1" + "".join(charset[value] for value in values)).upper()


KINDS: dict[str, Callable[[], str]] = {
    "password": lambda: f'"{random_text()}"',
    "age_identity": lambda: f'"{age_identity()}"',
    "gateway_key": lambda: f'"sk-{random_text()}"',
    "empty_dict": lambda: "{}",
}


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


def add_missing(text: str, kinds: Mapping[str, str], path: str) -> tuple[str, list[str]]:
    """Return `text` with a generated value for each name of `kinds` that it lacks, and the names added.

    The text is appended to, never rewritten: comments, order and values of the user stay as they are.
    """
    present = parse(text, path)
    empty = [name for name in kinds if name in present and present[name] in (None, "")]
    if empty:
        raise AnsibleActionFail(
            f"{path} sets {', '.join(empty)} to nothing, and existing entries are never overwritten. "
            f"Fill them in or remove the lines (ansible-vault edit {path}), then run this again."
        )
    missing = [name for name in kinds if name not in present]
    if not missing:
        return text, []
    text = text or HEADER.format(name=os.path.basename(path))
    if not text.endswith("\n"):
        text += "\n"
    return text + "".join(f"{name}: {KINDS[kinds[name]]()}\n" for name in missing), missing


def replace_values(text: str, kinds: Mapping[str, str], path: str) -> str:
    """Return `text` with a new value for each name of `kinds`; only the lines of these names change."""
    before = parse(text, path)
    for name, kind in kinds.items():
        if not isinstance(before.get(name), str):
            raise AnsibleActionFail(
                f"{path} does not set {name} to a text, so it cannot be rotated there. "
                "Rotate a value that is set elsewhere by changing it there and running site.yml."
            )
        quoted = r"""(?:"[^"\\\n]*"|'[^'\n]*')[ \t]*(?:#[^\n]*)?"""
        pattern = rf"(?m)^{re.escape(name)}:[ \t]*(?:{quoted}|[^\s|>&*!{{\[\"'][^\n]*)$"
        text, count = re.subn(pattern, f"{name}: {KINDS[kind]()}", text)
        if count != 1:
            raise AnsibleActionFail(
                f"{path} does not have {name} on one line of its own. Write it as `{name}: value` (ansible-vault edit)."
            )
    after = parse(text, path)
    if {name for name in after if after[name] != before.get(name)} != set(kinds) or before.keys() != after.keys():
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


def default_directory(sources: list[str]) -> str:
    """Return group_vars/all of the one inventory in use, given Ansible's list of inventory sources."""
    paths = [source for source in sources if os.path.exists(source)]
    if len(paths) != 1:
        raise AnsibleActionFail(
            f"Name exactly one inventory: -i inventories/<environment> (seen: {', '.join(sources) or 'none'}), "
            "or a directory for the vault file: -e secrets_directory=<directory>."
        )
    base = paths[0] if os.path.isdir(paths[0]) else os.path.dirname(paths[0])
    return os.path.join(os.path.abspath(base), "group_vars", "all")


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

        directory = self._task.args.get("directory")
        if directory:
            directory = os.path.abspath(os.path.expanduser(directory))
        else:
            directory = default_directory(list(variables.get("ansible_inventory_sources") or []))
        path = os.path.join(directory, "vault.yml")

        vault = VaultLib(self._vault_secrets())
        text, vault_id = read_vault(path, vault)
        if not self._task.args.get("directory"):
            # A value that another file of the inventory sets is the user's decision: leave it alone.
            in_file = parse(text, path)
            kinds = {name: kind for name, kind in kinds.items() if name in in_file or name not in variables}
        text, created = add_missing(text, kinds, path)
        rotate = {name: self._task.args["secrets"][name] for name in self._task.args.get("rotate") or []}
        rotate = {name: kind for name, kind in rotate.items() if name not in created}
        text = replace_values(text, rotate, path)
        if (created or rotate) and not self._task.check_mode:
            chosen, secret = match_encrypt_secret(vault.secrets, vault_id or constants.DEFAULT_VAULT_ENCRYPT_IDENTITY)
            keep_id = vault_id or (chosen if chosen != constants.DEFAULT_VAULT_IDENTITY else None)
            write_encrypted(path, text, vault, secret, keep_id)
        result.update(changed=bool(created or rotate), path=path, created=created, rotated=list(rotate))
        return result

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
