"""Where an inventory keeps its secrets when it is not a vault file: HashiCorp Vault or OpenBao, AWS Secrets Manager.

`secret-store.yml` beside the inventory's hosts names the store, and one document in it that holds all secrets of the
inventory, variable name -> value. Reading and signing in are the work of the lookups of community.hashi_vault and
amazon.aws: their environment variables and files give the credentials, so that no secret stands in the inventory.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from typing import Any

import yaml
from ansible import constants
from ansible.errors import AnsibleError
from ansible.plugins.loader import lookup_loader

SETTINGS_FILE = "secret-store.yml"
#: Variables of other names could change how Ansible itself works.
PREFIX = "vault_"
#: Seconds in which Vault has to answer.
TIMEOUT = 10

#: Touched by every write of this run of Ansible: what was read before is out of date then.
WRITTEN = os.path.join(constants.DEFAULT_LOCAL_TMP, "secret-store-written")

Document = dict[str, Any]


class StoreError(AnsibleError):
    """The store cannot be used; the message says which, why and what to do, and quotes no value."""


class HashiVault:
    """One secret of a KV version 2 engine; `options`: path, url, and more of what the collection's lookups take."""

    OPTIONS = frozenset(
        ("url", "mount", "path", "auth_method", "mount_point", "namespace", "ca_cert", "proxies", "role_id", "username")
    )
    REQUIRED = ("url", "path")

    def __init__(self, options: Mapping[str, Any]) -> None:
        """Take the options of the settings file."""
        self._mount, self._path = options.get("mount", "secret"), options["path"]
        self._options = {name: value for name, value in options.items() if name not in ("mount", "path")}
        self.place = f"{self._mount}/{self._path} in the Vault at {options['url']}"
        self._version = 0

    def read(self) -> Document:
        """Return the latest version; nothing where there is none."""
        try:
            found = self._ask("vault_kv2_get", self._path, engine_mount_point=self._mount)
        except AnsibleError as error:
            if "Invalid or missing path" in str(error):
                return {}
            raise
        self._version = found["metadata"]["version"]
        return dict(found["secret"])

    def write(self, document: Document) -> None:
        """Make `document` the latest version, unless somebody else wrote one since `read`."""
        data = {"data": document, "options": {"cas": self._version}}
        self._ask("vault_write", f"{self._mount}/data/{self._path}", data=data)

    def _ask(self, lookup: str, term: str, **options: Any) -> Any:
        plugin = lookup_loader.get(f"community.hashi_vault.{lookup}")
        return plugin.run([term], {}, timeout=TIMEOUT, **self._options, **options)[0]


class SecretsManager:
    """One secret of AWS Secrets Manager; `options`: name, region, and more of what the collection's lookups take."""

    OPTIONS = frozenset(("name", "region", "profile", "endpoint_url"))
    REQUIRED = ("name", "region")

    def __init__(self, options: Mapping[str, Any]) -> None:
        """Take the options of the settings file."""
        self._name = options["name"]
        self._options = {name: value for name, value in options.items() if name != "name"}
        self.place = f"{self._name} in AWS Secrets Manager, {options['region']}"
        self._lookup = lookup_loader.get("amazon.aws.secretsmanager_secret")
        self._seen: str | None = None

    def read(self) -> Document:
        """Return the version that is current; nothing where there is none."""
        stage = {"version_stage": "AWSCURRENT", "on_missing": "skip"}
        found = self._lookup.run([self._name], {}, **stage, **self._options)
        self._seen = found[0] if found else None
        return _document(self._seen) if self._seen is not None else {}

    def write(self, document: Document) -> None:
        """Make `document` current, unless somebody else wrote since `read`; a new version is pending until it is read.

        Broken off in between, the old version stays current, and the next write takes the label AWSPENDING over.
        """
        client, text = self._lookup.client("secretsmanager"), json.dumps(document)
        if self._seen is None:
            client.create_secret(Name=self._name, SecretString=text)
            return
        before = client.get_secret_value(SecretId=self._name, VersionStage="AWSCURRENT")
        if before["SecretString"] != self._seen:
            raise StoreError("another run wrote it meanwhile: run this again")
        client.put_secret_value(SecretId=self._name, SecretString=text, VersionStages=["AWSPENDING"])
        after = client.get_secret_value(SecretId=self._name, VersionStage="AWSPENDING")
        if after["SecretString"] != text:
            raise StoreError("another run writes it at the same time: run this again")
        # It is refused when AWSCURRENT is at another version by now.
        stage = {"MoveToVersionId": after["VersionId"], "RemoveFromVersionId": before["VersionId"]}
        client.update_secret_version_stage(SecretId=self._name, VersionStage="AWSCURRENT", **stage)
        client.update_secret_version_stage(
            SecretId=self._name, VersionStage="AWSPENDING", RemoveFromVersionId=after["VersionId"]
        )


STORES: dict[str, type[HashiVault | SecretsManager]] = {"hashi_vault": HashiVault, "aws": SecretsManager}


class Store:
    """A store with its errors in one line. `place`: what messages call it."""

    def __init__(self, settings_file: str) -> None:
        """Read the settings. Raises StoreError."""
        options = _settings(settings_file)
        self._store = STORES[options.pop("store")](options)
        self.place = self._store.place

    def read(self) -> Document:
        """Return the secrets; empty before the first write. Raises StoreError."""
        document = self._try("read", self._store.read)
        if wrong := [name for name in document if not name.startswith(PREFIX)]:
            raise StoreError(f"{self.place} holds {', '.join(sorted(wrong))}: names must begin with {PREFIX}.")
        return document

    def write(self, created: Mapping[str, Any], replaced: Mapping[str, Any]) -> None:
        """Store what is new beside what is there. Raises StoreError; then nothing has changed."""
        self._try("written", lambda: self._store.write({**self._store.read(), **created, **replaced}))
        with open(WRITTEN, "w", encoding="utf-8"):
            pass

    def _try(self, what: str, action: Callable[[], Any]) -> Any:
        try:
            return action()
        except Exception as error:  # what the libraries raise has no common ancestor
            raise StoreError(f"The secrets cannot be {what}: {self.place}: {_cause(error)}") from None


def writes() -> float:
    """Return a number that grows with every write of this run, in whichever of Ansible's processes."""
    try:
        return os.stat(WRITTEN).st_mtime
    except FileNotFoundError:
        return 0


def settings_file(directory: str) -> str | None:
    """Return the settings file of the inventory in `directory`, None where it keeps its secrets in vault files."""
    path = os.path.join(directory, SETTINGS_FILE)
    return path if os.path.exists(path) else None


def _settings(path: str) -> dict[str, Any]:
    """Return the content of a settings file. Raises StoreError that names file and key."""
    try:
        with open(path, encoding="utf-8") as file:
            options = yaml.safe_load(file)
    except (yaml.YAMLError, OSError):
        raise StoreError(f"{path} cannot be read as YAML.") from None
    kind = options.get("store") if isinstance(options, dict) else None
    if kind not in STORES:
        raise StoreError(f"{path}: store is {kind!r:.40}; it takes {' or '.join(STORES)}.")
    store = STORES[kind]
    if unknown := sorted(set(options) - store.OPTIONS - {"store"}):
        raise StoreError(
            f"{path}: unknown key {', '.join(unknown)}; {kind} takes {', '.join(sorted(store.OPTIONS))}. "
            "What signs in (tokens, passwords) belongs into the environment."
        )
    if missing := [name for name in store.REQUIRED if not options.get(name)]:
        raise StoreError(f"{path}: {', '.join(missing)} is missing.")
    return dict(options)


def _document(text: str) -> Document:
    try:
        document = json.loads(text)
    except ValueError:
        document = None
    if not isinstance(document, dict):
        raise StoreError("it is not a JSON object of names and values")
    return document


#: What a library's message has in it -> what to say instead.
_CAUSES = (
    (r"permission denied|Permission Denied", "the token is refused: it has expired, or may not do this"),
    (r"AccessDenied", "access is denied: the identity that signs in may not do this"),
    (r"ExpiredToken", "the token that signs in has expired"),
    (r"UnrecognizedClient|InvalidClientTokenId|InvalidSignature|SignatureDoesNotMatch", "the access key is refused"),
    (r"No Vault Token|Unable to locate credentials|NoCredentials", "nothing signs in: set the store's variables"),
    (r"[Ss]ealed", "it is sealed"),
    (r"did not match the current version", "another run wrote it meanwhile: run this again"),
    (r"[Cc]ertificate|CERTIFICATE", "its certificate is not trusted"),
    (r"Name or service not known|NameResolution|getaddrinfo|Temporary failure in name", "its name cannot be resolved"),
    (r"refused|Could not connect|[Cc]onnection", "nothing answers there"),
    (r"[Tt]imed? ?out", f"it does not answer within {TIMEOUT} s"),
)


def _cause(error: BaseException) -> str:
    """Return a library's error in one line."""
    seen = " ".join(f"{type(error).__name__}: {error} {error.__cause__ or ''}".split())
    if isinstance(error, StoreError):
        return str(error.message)
    return next((said for pattern, said in _CAUSES if re.search(pattern, seen)), seen[:200]) + ". Nothing was changed."
