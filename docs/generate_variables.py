"""Write docs/variables.md from the roles' argument_specs; with --check, only say whether it is up to date.

Example: python docs/generate_variables.py --check
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent
TARGET = ROOT / "docs" / "variables.md"
INTRODUCTION = """\
# Variables

Every variable of every role. Generated from the roles' `meta/argument_specs.yml` by `docs/generate_variables.py`; to
change a line here, change it there. Set variables in an inventory's `group_vars`. *required* means that there is no
default; *secret* means that the value belongs in `vault.yml`. What the playbooks hand over themselves need not be set;
`playbooks/preflight.yml` says so when it is.
"""


def cell(text: str) -> str:
    """Return text as it may stand in a table."""
    return " ".join(text.split()).replace("|", "\\|")


def shown(value: Any) -> str:
    """Return a default in YAML's flow style, on one line."""
    text = yaml.safe_dump(value, default_flow_style=True, width=10_000, sort_keys=False)
    return "`" + cell(text.removesuffix("\n").removesuffix("\n...")) + "`"


def described(option: dict[str, Any]) -> str:
    """Return an option's description and choices."""
    description = option.get("description", "")
    parts = description if isinstance(description, list) else [description]
    if option.get("choices"):
        parts = [*parts, "One of " + ", ".join(f"`{choice}`" for choice in option["choices"]) + "."]
    return cell(" ".join(parts))


def rows(options: dict[str, dict[str, Any]], prefix: str = "") -> Iterator[str]:
    """Yield a table row for each option and, below it, for the keys of its elements."""
    for name, option in options.items():
        kind = option.get("type", "str")
        if option.get("elements"):
            kind += f" of {option['elements']}"
        notes = [word for word, key in (("required", "required"), ("secret", "no_log")) if option.get(key)]
        default = shown(option["default"]) if "default" in option else ", ".join(f"*{note}*" for note in notes)
        if "default" in option and option.get("no_log"):
            default += " *secret*"
        yield f"| `{prefix}{name}` | {kind} | {default} | {described(option)} |"
        inner = f"{prefix}{name}{'[]' if option.get('type') == 'list' else ''}."
        yield from rows(option.get("options") or {}, inner)


def reference(roles: Path = ROOT / "roles") -> str:
    """Return the whole document."""
    sections = [INTRODUCTION]
    for path in sorted(roles.glob("*/meta/argument_specs.yml")):
        entries = yaml.safe_load(path.read_text(encoding="utf-8"))["argument_specs"]
        options: dict[str, dict[str, Any]] = {}
        for entry in entries.values():
            for name, option in (entry.get("options") or {}).items():
                options.setdefault(name, option)
        title = next(iter(entries.values()))["short_description"]
        head = f"## {path.parent.parent.name}\n\n{cell(title).rstrip('.')}.\n"
        table = ["| variable | type | default | what it is |", "|---|---|---|---|", *rows(options)]
        sections.append("\n".join([head, *table]) + "\n")
    return "\n".join(sections)


def main() -> int:
    """Write the document, or compare it; 1 when it is stale."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 when the document is stale")
    wanted = reference()
    if parser.parse_args().check:
        if not TARGET.exists() or TARGET.read_text(encoding="utf-8") != wanted:
            print("docs/variables.md is stale. Run: python docs/generate_variables.py", file=sys.stderr)
            return 1
        return 0
    TARGET.write_text(wanted, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
