"""The controller: versions of Ansible and its collections, and the lock file of the gateway."""

from __future__ import annotations

import re
from collections.abc import Iterator

from .hosts import version
from .model import CONTROLLER, Run, check

UPDATE = "make the tool environment again from uv.lock (uv sync --frozen) and use its ansible-playbook."


@check("ansible-version", "ansible-core is new enough")
def ansible_version(run: Run) -> Iterator[tuple[str, ...]]:
    seen, least = run.controller["ansible_core"], str(run.minimum["ansible_core"])
    if version(seen) < version(least):
        yield CONTROLLER, f"ansible-core is {seen}, older than {least}.", UPDATE


@check("collection-version", "The collections that the roles use are there and new enough")
def collection_version(run: Run) -> Iterator[tuple[str, ...]]:
    for name, least in run.minimum["collections"].items():
        seen = run.controller["collections"].get(name)
        if seen is None:
            yield CONTROLLER, f"the collection {name} is missing.", UPDATE
        elif version(seen) < version(str(least)):
            yield CONTROLLER, f"the collection {name} is {seen}, older than {least}.", UPDATE


@check("gateway-lock", "The gateway's lock file holds a safe LiteLLM and a hash for every package")
def gateway_lock(run: Run) -> Iterator[tuple[str, ...]]:
    least = run.controller["litellm_minimum"]
    for host in run.on("litellm"):
        path = run.controller["lock_files"].get(host.name, "")
        content = run.files.get(path)
        if content is None:
            yield CONTROLLER, f"litellm_requirements_file: {path or 'nothing'} cannot be read.", "correct the path."
            continue
        text = content.decode(errors="replace").replace("\\\n", " ")
        pins = re.findall(r"^([A-Za-z0-9._-]+)(?:\[[^\]]*\])?==([^\s;]+)([^\n]*)", text, re.M)
        seen = {name.lower().replace("_", "-"): number for name, number, _ in pins}
        if "litellm" not in seen:
            yield CONTROLLER, f"{path} does not pin litellm.", "lock it with `uv pip compile --generate-hashes`."
        elif version(seen["litellm"]) < version(least):
            yield (
                CONTROLLER,
                f"{path} pins litellm {seen['litellm']}; versions below {least} have known vulnerabilities.",
                f"lock litellm {least} or newer.",
            )
        if option := re.search(
            r"^\s*(-[ief]|--(index-url|extra-index-url|find-links|trusted-host|editable))\b", text, re.M
        ):
            fix = "lock it without: litellm_index_url names the index."
            yield CONTROLLER, f"{path} has the option {option[1]}, which installs from elsewhere.", fix
        bare = [name for name, _, rest in pins if "--hash=" not in rest]
        if bare:
            yield CONTROLLER, f"{path} has no hash for {', '.join(bare[:5])}.", "lock it with --generate-hashes."
