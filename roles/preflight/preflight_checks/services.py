"""Whether the values fit each other: models and their keys, certificates, topology."""

from __future__ import annotations

import datetime
import re
from collections.abc import Iterator
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key

from .model import CONTROLLER, Host, Run, check
from .network import listen_addresses, loopback
from .secrets import type_name

OWN_ENVIRONMENT = {"LITELLM_MASTER_KEY"}
ENVIRONMENT_VARIABLES = ("litellm_environment", "litellm_provider_keys")
CERTIFICATE_VARIABLES = ("postgresql_tls_certificate_file", "postgresql_tls_key_file", "postgresql_tls_ca_file")


@check("topology", "The hosts of the roles fit together")
def topology(run: Run) -> Iterator[tuple[str, ...]]:
    for role, what in (("postgresql", "database"), ("litellm", "gateway")):
        if role in run.role_hosts and not run.role_hosts[role]:
            yield (
                CONTROLLER,
                f"the inventory has no {what} host (group {role} is empty).",
                f"add a host to the group {role} in the inventory.",
            )
    if len(run.role_hosts.get("postgresql", [])) > 1:
        yield (
            CONTROLLER,
            f"the inventory has several database hosts: {', '.join(run.role_hosts['postgresql'])}.",
            "keep one in the group postgresql.",
        )
    for host in run.on("litellm"):
        count = run.value(host, "litellm_instances", 2)
        if re.fullmatch(r"0+|-\d+", str(count)):
            yield host.name, f"litellm_instances is {count}.", "set it to 1 or more."


@check("database-unreachable", "The database listens where the gateway connects to")
def database_unreachable(run: Run) -> Iterator[tuple[str, ...]]:
    apart = [host for host in run.on("litellm") if "postgresql" not in host.roles]
    for server in run.on("postgresql"):
        addresses = [address for name, address in listen_addresses(run, server) if name.startswith("postgresql_")]
        if apart and addresses and all(map(loopback, addresses)):
            yield (
                server.name,
                f"postgresql_listen_addresses is {', '.join(addresses)}; {apart[0].name} connects over the network.",
                f"add the address of {server.name} that {apart[0].name} reaches.",
            )
    for host in apart:
        target = run.value(host, "litellm_logger_database_host")
        if isinstance(target, str) and loopback(target):
            yield (
                host.name,
                f"litellm_logger_database_host is {target}, but the database is on another host.",
                "set it to the name of the database host.",
            )


@check("backup-offsite", "Backups leave the host where the inventory wants that, and to one place")
def backup_offsite(run: Run) -> Iterator[tuple[str, ...]]:
    for host in run.on("postgresql_backup"):
        stores = ", ".join(run.role_hosts.get("postgresql_backup_store", []))
        named = run.value(host, "postgresql_backup_offsite_host")
        places = {
            f"group backup: {stores}": stores and not named,
            "postgresql_backup_offsite_host": named,
            "postgresql_backup_offsite_s3": run.value(host, "postgresql_backup_offsite_s3"),
        }
        chosen = [place for place, there in places.items() if there]
        if len(chosen) > 1:
            yield host.name, f"off-host copies have two places: {'; '.join(chosen)}.", "keep one of them."
        if not chosen and run.value(host, "postgresql_backup_offsite_required"):
            yield (
                host.name,
                "postgresql_backup_offsite_required is true, and there is no off-host copy of the backups.",
                "put a host into the group backup, or set postgresql_backup_offsite_s3.",
            )
        own = {
            "localhost",
            host.name,
            run.value(host, "ansible_host"),
            *(host.facts or {}).get("own_addresses", []),
        } - {None}
        there = {*run.role_hosts.get("postgresql_backup_store", [])} if not named else {str(named.get("host"))}
        there |= {str(run.mapping(host, "postgresql_backup_offsite_s3").get("endpoint"))}
        if there & own and run.value(host, "postgresql_backup_offsite_required"):
            yield (
                host.name,
                f"postgresql_backup_offsite_required is true, and {min(there & own)} is the database host itself: its "
                "loss would take the copies with it.",
                "put another host into the group backup, or use a bucket elsewhere.",
            )


@check("model-list", "Every model has a name and says which provider's model it is")
def model_list(run: Run) -> Iterator[tuple[str, ...]]:
    for host in run.on("litellm"):
        models = run.value(host, "litellm_models")
        if models == []:
            yield host.name, "litellm_models is empty.", "add a model: the gateway would answer nothing.", "warning"
        for index, model in enumerate(models if isinstance(models, list) else []):
            yield from ((host.name, f"litellm_models[{index}] {seen}", fix) for seen, fix in model_faults(model))


def model_faults(model: Any) -> Iterator[tuple[str, str]]:
    """Yield (what is wrong, what to do) for one entry of the model list."""
    if not isinstance(model, dict):
        yield f"is {type_name(model)}, not a mapping.", "write model_name: and litellm_params: under one dash."
        return
    if not isinstance(model.get("model_name"), str) or not model["model_name"]:
        yield "has no model_name.", "add model_name: <the name that clients use>."
    name = f"({model.get('model_name')})"
    parameters = model.get("litellm_params")
    if not isinstance(parameters, dict) or not isinstance(parameters.get("model"), str) or not parameters["model"]:
        yield f"{name} has no litellm_params.model.", "add litellm_params: {model: <provider>/<model>}."
        return
    for key, value in parameters.items():
        secret = re.search(r"(key|secret|password|token)$", str(key)) and isinstance(value, str)
        # Short values are placeholders for models that need no key, such as `none`.
        if secret and not value.startswith("os.environ/") and (value.startswith("sk-") or len(value) >= 16):
            yield (
                f"{name} holds litellm_params.{key} in clear (value hidden).",
                "move it to vault_litellm_provider_keys and write os.environ/<NAME> here.",
            )


@check("provider-keys", "Every key that the configuration refers to is there")
def provider_keys(run: Run) -> Iterator[tuple[str, ...]]:
    settings = ("litellm_models", "litellm_settings", "litellm_general_settings", "litellm_router_settings")
    for host in run.on("litellm"):
        known = set(OWN_ENVIRONMENT)
        for name in ENVIRONMENT_VARIABLES:
            known |= set(run.mapping(host, name))
        if "litellm_provider_keys" in host.unset:
            continue
        for name in settings:
            for reference in sorted(references(run.value(host, name)) - known):
                yield (
                    host.name,
                    f"{name} refers to os.environ/{reference}, which is not set.",
                    f"add {reference} to vault_litellm_provider_keys (ansible-vault edit).",
                )


def references(value: Any) -> set[str]:
    """Return the names behind `os.environ/` anywhere in a value."""
    return {text.removeprefix("os.environ/") for text in texts_in(value) if text.startswith("os.environ/")}


def texts_in(value: Any) -> set[str]:
    """Return every text anywhere in a value."""
    if isinstance(value, dict):
        return set().union(*map(texts_in, value.values()))
    if isinstance(value, list):
        return set().union(*map(texts_in, value))
    return {value} if isinstance(value, str) else set()


@check("setting-in-clear", "LiteLLM's settings hold no key")
def setting_in_clear(run: Run) -> Iterator[tuple[str, ...]]:
    for host in run.on("litellm"):
        for name in ("litellm_settings", "litellm_general_settings", "litellm_router_settings"):
            # the master key there is said by gateway-database
            for key, value in run.mapping(host, name).items():
                if key != "master_key" and any(text.startswith("sk-") for text in texts_in(value)):
                    yield (
                        host.name,
                        f"{name}.{key} holds a key that begins with sk- in clear (value hidden).",
                        "move it to vault_litellm_provider_keys and write os.environ/<NAME> here.",
                    )


@check("gateway-database", "The gateway has no database of its own")
def gateway_database(run: Run) -> Iterator[tuple[str, ...]]:
    for host in run.on("litellm"):
        general = run.mapping(host, "litellm_general_settings")
        for variable in ENVIRONMENT_VARIABLES:
            for name in sorted({*run.controller["database_environment"]} & {*run.mapping(host, variable)}):
                yield (
                    host.name,
                    f"{variable} sets {name}.",
                    "remove it: requests are logged through the spool, LiteLLM's own database stays off.",
                )
        for name in ("database_url", "store_model_in_db", "master_key"):
            if general.get(name):
                yield (
                    host.name,
                    f"litellm_general_settings sets {name} (value hidden).",
                    "remove it; the master key belongs in litellm_master_key."
                    if name == "master_key"
                    else "remove it: LiteLLM's own database stays off.",
                )


@check("certificate-files", "Certificate files that you bring exist, match and are valid")
def certificate_files(run: Run) -> Iterator[tuple[str, ...]]:
    for host in run.on("postgresql"):
        paths = {name: run.value(host, name) or "" for name in CERTIFICATE_VARIABLES}
        given = [name for name, path in paths.items() if path]
        if not given:
            continue
        if run.value(host, "postgresql_client_certificates") in (True, "true", "yes"):
            yield (
                host.name,
                f"postgresql_client_certificates is true, and so is set {given[0]}: the project's authority signs the "
                "clients' certificates, which a server with one of your own does not trust.",
                "set one of the two.",
            )
        if len(given) < len(paths):
            lacking = ", ".join(name for name in paths if name not in given)
            yield host.name, f"{', '.join(given)} set, but not {lacking}.", "set all three, or none."
            continue
        absent = [name for name in given if run.files.get(str(paths[name])) is None]
        for name in absent:
            yield host.name, f"{name}: {paths[name]} cannot be read on the controller.", "correct the path."
        if not absent:
            certificate, key, authority = (run.files[str(paths[name])] or b"" for name in CERTIFICATE_VARIABLES)
            now = datetime.datetime.now(datetime.UTC)
            yield from (
                (host.name, seen, fix)
                for seen, fix in certificate_faults(certificate, key, authority, names(run, host), now)
            )


def names(run: Run, host: Host) -> list[str]:
    """Return the names and addresses under which clients of this run verify the server."""
    listen = [address for name, address in listen_addresses(run, host) if name.startswith("postgresql_")]
    reachable = [address for address in listen if not loopback(address)]
    used = {
        run.value(client, "litellm_logger_database_host") or next(iter(listen if client is host else reachable), None)
        for client in run.on("litellm_logger")
    }
    return sorted(name for name in used if isinstance(name, str))


def certificate_faults(
    certificate: bytes, key: bytes, authority: bytes, names: list[str], now: datetime.datetime
) -> Iterator[tuple[str, str]]:
    """Yield (what is wrong, what to do) of a server certificate, its key and its CA certificate, all PEM."""
    try:
        server = x509.load_pem_x509_certificate(certificate)
        issuers = x509.load_pem_x509_certificates(authority)
        private = load_pem_private_key(key, None)
    except (ValueError, TypeError) as error:
        yield f"a certificate file is not usable PEM ({type(error).__name__}).", "give PEM files, the key unencrypted."
        return
    public = (Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    if private.public_key().public_bytes(*public) != server.public_key().public_bytes(*public):
        yield "postgresql_tls_key_file does not belong to postgresql_tls_certificate_file.", "bring the matching pair."
    if server.not_valid_after_utc < now:
        yield f"the certificate expired on {server.not_valid_after_utc:%Y-%m-%d}.", "renew it."
    if server.not_valid_before_utc > now:
        yield f"the certificate is valid only from {server.not_valid_before_utc:%Y-%m-%d}.", "check the clock."
    extra = x509.load_pem_x509_certificates(certificate)[1:]
    if not any(issuer.subject == signed.issuer for issuer in issuers for signed in [server, *extra]):
        yield (
            f"postgresql_tls_ca_file does not hold the certificate's issuer ({server.issuer.rfc4514_string()}).",
            "give the CA that signed the certificate.",
        )
    covered = covered_names(server)
    for name in names:
        if not any(matches(pattern, name) for pattern in covered):
            yield (
                f"the certificate does not name {name} (it names {', '.join(covered) or 'nothing'}).",
                f"have it issued with {name} among its subject alternative names.",
            )


def covered_names(certificate: x509.Certificate) -> list[str]:
    """Return the DNS names and addresses of the subject alternative names."""
    try:
        found = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return []
    return [*found.get_values_for_type(x509.DNSName), *map(str, found.get_values_for_type(x509.IPAddress))]


def matches(pattern: str, name: str) -> bool:
    """Return whether a name of a certificate covers a host name (RFC 6125: `*` stands for the first label only)."""
    if pattern.startswith("*."):
        return name.partition(".")[2].lower() == pattern[2:].lower()
    return pattern.lower() == name.lower()
