"""The secrets: there, strong, not an example, encrypted at rest. Values are measured, never shown."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator

from .model import CONTROLLER, Host, Run, check, hides

# Words of six letters and more only: a random value of 48 letters and digits holds a given one by chance
# less often than once in a million. An age identity begins with AGE-SECRET-KEY.
EXAMPLES = re.compile(
    r"change[-_ ]?me|change[-_ ]?this|example|placeholder|password|passwort|(?<!AGE-)secret|replace[-_ ]|your[-_ ]|"
    r"insert[-_ ]|fill[-_ ]?in|^<.*>$|^sk-1234|^sk-\.\.\.|^test|^dummy|^todo|^x+$",
    re.I,
)
CREATE = "run playbooks/create-secrets.yml with the same -i"
REPLACE = "remove its line (ansible-vault edit), then " + CREATE + "."


def bits(value: str) -> float:
    """Return an estimate of a text's entropy: length times Shannon's entropy per character."""
    counts = Counter(value)
    return sum(count * math.log2(len(value) / count) for count in counts.values())


def texts(run: Run) -> Iterator[tuple[Host, str, str, str]]:
    """Yield (host, variable, kind, value) of each secret once, though many hosts share it."""
    seen: set[tuple[str, str]] = set()
    for host in run.hosts:
        for name, kind in run.secrets.items():
            value = host.values.get(name)
            pairs = value.items() if isinstance(value, dict) else [("", value)]
            for key, text in pairs:
                label = f"{name}.{key}" if key else name
                if isinstance(text, str) and text and (label, text) not in seen:
                    seen.add((label, text))
                    yield host, label, kind, text


def direct(run: Run) -> Iterator[tuple[Host, str, str]]:
    """Yield (host, variable, value) of each secret that stands on a role's own variable, not on one of the vault's."""
    for host in run.hosts:
        known = {text for _, _, _, text in texts(run)}
        for role in host.roles:
            for name, spec in run.specs.get(role, {}).items():
                value = host.values.get(name)
                if not hides(spec) or name in run.secrets:
                    continue
                for key, text in value.items() if isinstance(value, dict) else [("", value)]:
                    if isinstance(text, str) and text and text not in known:
                        yield host, f"{name}.{key}" if key else name, text


@check("secret-missing", "Every secret is set")
def missing(run: Run) -> Iterator[tuple[str, ...]]:
    absent: dict[str, list[str]] = {}
    for host in run.hosts:
        names = [name for name in run.secrets if host.values.get(name) in (None, "") and name not in host.unset]
        if names:
            absent.setdefault(", ".join(names), []).append(host.name)
        for name, value in host.values.items():
            if name in run.secrets and isinstance(value, dict):
                for key in (key for key, text in value.items() if text in (None, "")):
                    yield host.name, f"{name}.{key} is empty.", "fill it in or remove the entry (ansible-vault edit)."
    for names_text, hosts in absent.items():
        yield ", ".join(hosts), f"not set or empty: {names_text}.", CREATE + "."


@check("secret-type", "Every secret has the right shape")
def shape(run: Run) -> Iterator[tuple[str, ...]]:
    for host in run.hosts:
        for name, kind in run.secrets.items():
            value = host.values.get(name)
            wanted = dict if kind == "keys" else str
            if value is not None and not isinstance(value, wanted):
                what = "a mapping of names to keys" if wanted is dict else "a text"
                yield (
                    host.name,
                    f"{name} is {type_name(value)}, not {what} (value hidden).",
                    "quote the value."
                    if wanted is str
                    else f"write `{name}: {{OPENAI_API_KEY: ...}}`, or {{}} for none.",
                )
            for key, item in value.items() if wanted is dict and isinstance(value, dict) else ():
                if not isinstance(item, str) and item is not None:
                    yield (
                        host.name,
                        f"{name}.{key} is {type_name(item)}, not a text (value hidden).",
                        "quote the value.",
                    )
    for host, name, kind, text in texts(run):
        if kind == "gateway_key" and not text.startswith("sk-"):
            yield host.name, f"{name} does not start with sk- (value hidden).", REPLACE
        if not text.isascii() or not text.isprintable() or text != text.strip():
            yield (
                host.name,
                f"{name} holds spaces at its ends, control or non-ASCII characters (value hidden).",
                REPLACE if kind != "keys" else "set it again without them.",
            )


@check("secret-example", "No secret is still an example value")
def example(run: Run) -> Iterator[tuple[str, ...]]:
    for host, name, kind, text in texts(run):
        if EXAMPLES.search(text):
            fix = REPLACE if kind != "keys" else "put the provider's key there, or remove the entry."
            yield host.name, f"{name} is still an example value ({len(text)} characters, hidden).", fix
    for host, name, text in direct(run):
        if EXAMPLES.search(text):
            fix = f"remove it, so that the vault's variable is used, or set a real one there (variable {name})."
            yield host.name, f"{name} is an example value ({len(text)} characters, hidden).", fix


@check("secret-weak", "Every generated secret is long and random")
def weak(run: Run) -> Iterator[tuple[str, ...]]:
    length, entropy = int(run.minimum["secret_length"]), float(run.minimum["secret_bits"])
    for host, name, kind, text in texts(run):
        if kind == "keys" or EXAMPLES.search(text):
            continue
        if len(text) < length or bits(text) < entropy:
            yield (
                host.name,
                f"{name} has {len(text)} characters and about {bits(text):.0f} bits "
                f"(at least {length} characters and {entropy:g} bits; value hidden).",
                REPLACE,
            )


@check("secret-reused", "No two secrets are the same")
def reused(run: Run) -> Iterator[tuple[str, ...]]:
    by_value: dict[str, dict[str, str]] = {}
    for host, name, _, text in texts(run):
        by_value.setdefault(text, {})[name] = host.name
    for names in by_value.values():
        if len(names) > 1:
            yield next(iter(names.values())), f"{' and '.join(names)} have the same value (hidden).", REPLACE


@check("secret-in-clear", "Secrets are encrypted in the inventory")
def in_clear(run: Run) -> Iterator[tuple[str, ...]]:
    for path in run.controller.get("clear_vaults", []):
        yield (
            CONTROLLER,
            f"{path} is not encrypted.",
            f"ansible-vault encrypt {path}; where it was committed or shared, replace the secrets as well.",
        )
    for host, name, _ in direct(run):
        if (variable := name.split(".")[0]) in host.clear:
            where = f" ({host.origins[variable]})" if variable in host.origins else ""
            yield (
                host.name,
                f"{name}{where} holds a secret in clear (value hidden).",
                "put it into the encrypted vault.yml and refer to it from here; where it was shared, replace it.",
            )


def type_name(value: object) -> str:
    """Return how YAML calls the type."""
    names = {bool: "a boolean", int: "a number", float: "a number", str: "a text", list: "a list", dict: "a mapping"}
    return next((name for kind, name in names.items() if isinstance(value, kind)), type(value).__name__)
