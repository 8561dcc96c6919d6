"""Addresses, names, ports and what has to be reachable."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterator
from typing import NamedTuple

from .firewall import source_names
from .model import Host, Run, check

ALL_ADDRESSES = ("0.0.0.0", "::", "*", "[::]", "0", "0.0.0.0/0")

LISTEN_VARIABLES = {
    "postgresql": ("postgresql_listen_addresses",),
    "litellm": ("litellm_bind_address",),
    "haproxy": ("haproxy_bind_address",),
}


class Port(NamedTuple):
    """A port that one of our services takes: `unit` matches the unit that may already hold it."""

    number: int
    variable: str
    addresses: tuple[str, ...]
    unit: str


def listen_addresses(run: Run, host: Host) -> Iterator[tuple[str, str]]:
    """Yield (variable, address) of every address that services of the host listen on."""
    for role, names in LISTEN_VARIABLES.items():
        if role not in host.roles:
            continue
        for name in names:
            value = run.value(host, name)
            for address in value if isinstance(value, list) else [value]:
                if isinstance(address, str):
                    yield name, address


def as_number(value: object) -> int | None:
    """Return a port or count given as a number or as digits; None for anything else (the type check says so)."""
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        return None
    return int(value) if str(value).isdigit() else None


def ports(run: Run, host: Host) -> Iterator[Port]:
    """Yield the ports that the host's roles take."""
    addresses: dict[str, tuple[str, ...]] = {}
    for name, address in listen_addresses(run, host):
        addresses[name] = (*addresses.get(name, ()), address)
    if "postgresql" in host.roles:
        number = as_number(run.value(host, "postgresql_port", 5432))
        if number is not None:
            where = addresses.get("postgresql_listen_addresses", ())
            yield Port(number, "postgresql_port", where, r"postgresql@17-main\.service")
    if "litellm" in host.roles:
        first = as_number(run.value(host, "litellm_port", 4000))
        count = as_number(run.value(host, "litellm_instances", 2))
        where = addresses.get("litellm_bind_address", ("127.0.0.1",))
        if first is not None and count is not None:
            for index in range(min(count, 100)):
                name = "litellm_port" + (f" + {index}" if index else "")
                yield Port(first + index, name, where, rf"litellm@{index + 1}\.service")
    if "haproxy" in host.roles:
        number = as_number(run.value(host, "haproxy_port", 443))
        if number is not None:
            yield Port(number, "haproxy_port", addresses.get("haproxy_bind_address", ()), r"haproxy\.service")
        if metrics := as_number(run.value(host, "haproxy_metrics_port", 8405)):
            yield Port(metrics, "haproxy_metrics_port", ("127.0.0.1",), r"haproxy\.service")
    if "litellm_logger" in host.roles:
        writer = run.mapping(host, "litellm_logger_settings").get("writer")
        listen = writer.get("listen", "127.0.0.1:9465") if isinstance(writer, dict) else "127.0.0.1:9465"
        if isinstance(listen, str) and listen.rpartition(":")[2].isdigit():
            address, _, number_text = listen.rpartition(":")
            name = "litellm_logger_settings.writer.listen"
            yield Port(int(number_text), name, (address,), r"litellm-log-writer\.service")


def names_to_resolve(run: Run, host: Host, names: list[str]) -> list[str]:
    """Return the names that the host must resolve; addresses need no resolving."""
    found = source_names(run, host)
    if "litellm_logger" in host.roles:
        found |= {name for name in [*names, run.value(host, "litellm_logger_database_host")] if isinstance(name, str)}
    return sorted(name for name in found if name and not is_address(name))


def urls_to_fetch(run: Run, host: Host) -> list[str]:
    """Return the package index, where the host installs Python packages."""
    index = run.value(host, "litellm_index_url") if "litellm" in host.roles else None
    return [index] if isinstance(index, str) and index.startswith(("http://", "https://")) else []


def endpoints_to_reach(run: Run, host: Host) -> list[str]:
    """Return `host:port` of the bucket that takes the off-host copies: pgBackRest would try for long to reach it."""
    bucket = run.mapping(host, "postgresql_backup_offsite_s3") if "postgresql_backup" in host.roles else {}
    if not isinstance(bucket.get("endpoint"), str):
        return []
    return [f"{bucket['endpoint']}:{bucket.get('port', 443)}"]


def is_address(text: str) -> bool:
    """Return whether the text is an IP address."""
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


@check("listen-all", "Nothing listens on every address")
def listen_all(run: Run) -> Iterator[tuple[str, ...]]:
    for host in run.hosts:
        for name, address in listen_addresses(run, host):
            if address.strip() in ALL_ADDRESSES:
                yield (
                    host.name,
                    f"{name} is {address}, which is every address of the host.",
                    "name the addresses that clients use, for example 127.0.0.1 and the private one.",
                )


@check("bind-address", "Addresses to listen on exist on the host")
def bind_address(run: Run) -> Iterator[tuple[str, ...]]:
    for host, facts in run.looked_at():
        for name, address in listen_addresses(run, host):
            reason = facts["bind_errors"].get(address)
            if reason and address.strip() not in ALL_ADDRESSES:
                own = ", ".join(item for item in facts["own_addresses"] if not item.startswith("fe80"))
                yield host.name, f"{name} is {address}: {reason}.", f"choose one that the host has: {own}."


@check("port-taken", "Ports are free, or held by our own services")
def port_taken(run: Run) -> Iterator[tuple[str, ...]]:
    for host, facts in run.looked_at():
        for port in ports(run, host):
            for listener in facts["listeners"]:
                if listener["port"] != port.number or not overlap(listener["address"], port.addresses):
                    continue
                if re.fullmatch(port.unit, listener["unit"]):
                    continue
                owner = listener["unit"] or listener["process"] or "an unknown process"
                yield (
                    host.name,
                    f"port {port.number} ({port.variable}) is taken by {owner} on {listener['address']}.",
                    f"stop {owner}, or choose another port: {port.variable.split(' ')[0]}.",
                )
                break


@check("port-duplicate", "No two services of a host share a port")
def port_duplicate(run: Run) -> Iterator[tuple[str, ...]]:
    for host in run.hosts:
        taken: list[Port] = []
        for port in ports(run, host):
            other = next((seen for seen in taken if seen.number == port.number), None)
            if other and any(overlap(address, other.addresses) for address in port.addresses or ("0.0.0.0",)):
                yield (
                    host.name,
                    f"port {port.number} is used by both {other.variable} and {port.variable}.",
                    f"change {port.variable.split(' ')[0]}.",
                )
            taken.append(port)


@check("port-range", "Ports are ports")
def port_range(run: Run) -> Iterator[tuple[str, ...]]:
    for host in run.hosts:
        for port in ports(run, host):
            # HAProxy alone may take a port below 1024.
            lowest = 1 if port.variable == "haproxy_port" else 1024
            if not lowest <= port.number <= 65535:
                yield (
                    host.name,
                    f"{port.variable} is {port.number}.",
                    f"choose a port from {lowest} to 65535: the services run without root's rights.",
                )


@check("name-resolution", "Hosts find the database host, and whom they let in, under the names they use")
def name_resolution(run: Run) -> Iterator[tuple[str, ...]]:
    servers = run.on("postgresql")
    for host, facts in run.looked_at():
        for name, answer in facts["names"].items():
            if answer.get("error"):
                yield (
                    host.name,
                    f"{name} does not resolve: {answer['error']}.",
                    f"add {name} to the DNS or to /etc/hosts of {host.name}.",
                )
            elif name in source_names(run, host):
                continue
            elif "postgresql" not in host.roles and servers and all(map(loopback, answer["addresses"])):
                yield (
                    host.name,
                    f"{name} resolves to {', '.join(answer['addresses'])}, the host itself, "
                    f"but the database is on {servers[0].name}.",
                    f"remove that line from /etc/hosts of {host.name}, or use a name that the DNS answers.",
                )


@check("package-sources", "The host's apt sources answer")
def package_sources(run: Run) -> Iterator[tuple[str, ...]]:
    for host, facts in run.looked_at():
        if not facts["package_sources"]:
            yield host.name, "apt has no http or https source.", "add Debian's to /etc/apt/sources.list.d/.", "warning"
        installed = bool(facts["clusters"] or facts["installed"])
        for uri, reason in facts["package_sources"].items():
            if reason:
                yield (
                    host.name,
                    f"{uri} cannot be fetched: {reason}.",
                    "mend the source, the proxy (Acquire::http::Proxy) or the firewall.",
                    "warning" if installed else "error",
                )


@check("package-index", "The Python package index answers")
def package_index(run: Run) -> Iterator[tuple[str, ...]]:
    for host, facts in run.looked_at():
        for url, reason in facts["urls"].items():
            if reason:
                yield (
                    host.name,
                    f"{url} cannot be fetched: {reason}.",
                    "open the firewall, or set litellm_index_url to an index that the host reaches.",
                    "warning" if facts["installed"] else "error",
                )


@check("backup-endpoint", "The bucket of the off-host copies takes connections")
def backup_endpoint(run: Run) -> Iterator[tuple[str, ...]]:
    for host, facts in run.looked_at():
        for endpoint, reason in facts["endpoints"].items():
            if reason:
                yield (
                    host.name,
                    f"{endpoint} of postgresql_backup_offsite_s3 cannot be reached: {reason}.",
                    "open the firewall between them, or correct endpoint and port.",
                )


def loopback(address: str) -> bool:
    """Return whether the address is the machine itself; False for what is no address."""
    return ipaddress.ip_address(address).is_loopback if is_address(address) else address == "localhost"


def overlap(address: str, others: tuple[str, ...]) -> bool:
    """Return whether a socket on `address` stands in the way of one on any of the others."""
    if not others or address in ALL_ADDRESSES or set(others) & set(ALL_ADDRESSES):
        return True
    return address in ["127.0.0.1" if other == "localhost" else other for other in others]
