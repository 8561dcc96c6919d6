"""Who the firewall lets in."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterator
from typing import Any

from .model import Host, Run, check
from .secrets import type_name
from .variables import quoted, where

HOST_NAME = re.compile(r"(?=.*[A-Za-z])[A-Za-z0-9_]([A-Za-z0-9._-]*[A-Za-z0-9])?\.?")


@check("firewall-sources", "The firewall's sources are addresses, networks or names")
def firewall_sources(run: Run) -> Iterator[tuple[str, ...]]:
    fix = "write a list of addresses (192.0.2.10), networks (192.0.2.0/24, 2001:db8::/64) and names of hosts."
    for host in filtered(run):
        for name, sources in source_lists(run, host):
            label = name + where(host, name.partition("[")[0])
            if not isinstance(sources, list):
                yield host.name, f"{label} is {type_name(sources)} ({quoted(sources)}), not a list.", fix
                continue
            for source in sources:
                if not (isinstance(source, str) and (is_network(source) or HOST_NAME.fullmatch(source))):
                    yield host.name, f"{label} has {quoted(source)}, which is no address, network or name.", fix


def filtered(run: Run) -> list[Host]:
    """Return the hosts with a firewall."""
    return [host for host in run.on("firewall") if run.value(host, "firewall_enabled", True) is not False]


def source_lists(run: Run, host: Host) -> Iterator[tuple[str, Any]]:
    """Yield (where it stands, sources) of what the inventory lets in."""
    own = run.value(host, "firewall_gateway_sources")
    if "litellm" in host.roles and own is not None:
        yield "firewall_gateway_sources", own
    rules = run.value(host, "firewall_rules")
    for index, rule in enumerate(rules if isinstance(rules, list) else []):
        if isinstance(rule, dict) and rule.get("sources") is not None:
            yield f"firewall_rules[{index}].sources", rule["sources"]


def source_names(run: Run, host: Host) -> set[str]:
    """Return the sources that the host has to resolve."""
    lists = [sources for _, sources in source_lists(run, host) if host in filtered(run) and isinstance(sources, list)]
    texts = {source for sources in lists for source in sources if isinstance(source, str)}
    return {text for text in texts if HOST_NAME.fullmatch(text) and not is_network(text)}


def is_network(text: str) -> bool:
    """Return whether nftables takes the text as an address or a network."""
    try:
        ipaddress.ip_network(text, strict=False)
    except ValueError:
        return False
    return "%" not in text and re.fullmatch(r"[^/]+(/\d+)?", text) is not None
