#!/usr/bin/python
"""Ansible module: what the server knows of its login pairs, and the end of a rotation."""

from __future__ import annotations

import re
import time

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.postgresql_peer import UnreachableError, connect, describe, port_of, psycopg2, rows

DOCUMENTATION = r"""
module: postgresql_logins
short_description: Ask the server which login of each pair is active, or retire the other one
description:
  - A pair <name> is the logins <name>_a and <name>_b; the one that was enabled last is the active one, which the
    comment of the role says (enabled <time>).
  - With state C(retired) every enabled login that is not the active one is set NOLOGIN PASSWORD NULL once it has no
    session left.
options:
  port:
    description: Port, which names the socket.
    type: int
    required: true
  state:
    description: Only read, or retire.
    type: str
    choices: [read, retired]
    default: read
  timeout:
    description: Seconds to wait for the sessions of logins that retire.
    type: int
    default: 300
  terminate:
    description: End the sessions of logins that retire instead of waiting for them, whoever holds them.
    type: bool
    default: false
  holders:
    description: By host, the logins in its clients' credentials; C(*) where that is not known. These do not retire.
    type: dict
    default: {}
author: The litellm-gateway authors
"""

EXAMPLES = r"""
- postgresql_logins:
    port: 5432
    state: retired
    timeout: 60
"""

RETURN = r"""
active:
  description: Active login by pair.
  type: dict
  returned: always
salts:
  description: Iterations and salt of the stored verifiers by login, in the form SCRAM-SHA-256$<iterations>:<salt>.
  type: dict
  returned: always
pending:
  description: Pairs of which both logins are enabled, so that a rotation is unfinished.
  type: list
  returned: always
retired:
  description: Logins that were disabled.
  type: list
  returned: always
"""

LOGINS = """
SELECT rolname,
       regexp_substr(rolpassword, '^SCRAM-SHA-256[$][0-9]+:[A-Za-z0-9+/=]+'),
       rolcanlogin,
       coalesce(shobj_description(oid, 'pg_authid'), '')
FROM pg_authid
WHERE rolname ~ '_[ab]$' AND shobj_description(oid, 'pg_authid') ~ '^(enabled|disabled|idle)'
ORDER BY rolname
"""
SESSIONS = "SELECT usename, count(*), min(host(client_addr)) FROM pg_stat_activity WHERE usename = ANY(%s) GROUP BY 1"


def active_by_pair(logins: list[tuple]) -> dict[str, str]:
    """Return the enabled login of each pair whose comment has the latest time."""
    enabled = sorted((comment, name) for name, _salt, can_login, comment in logins if can_login)
    return {re.sub("_[ab]$", "", name): name for _comment, name in enabled}


def old_logins(logins: list[tuple]) -> list[str]:
    """Return the enabled logins that are not the active ones of their pairs."""
    active = active_by_pair(logins).values()
    return [name for name, _salt, can_login, _comment in logins if can_login and name not in active]


def refuse_held(module: AnsibleModule, names: list[str]) -> None:
    """Fail while a client would lose the login that it has; one that connects for each query has no session now."""
    holders = module.params["holders"].items()
    held = {host: [name for name in names if {name, "*"} & set(logins)] for host, logins in holders}
    if module.params["terminate"] or not any(held.values()):
        return
    seen = "; ".join(f"{host}: {', '.join(logins)}" for host, logins in sorted(held.items()) if logins)
    module.fail_json(
        msg=f"Logins that should retire are, or may be, in the credentials of clients still ({seen}). They stay valid: "
        "run site.yml on all hosts, which hands the new ones over first."
    )


def retire(module: AnsibleModule, connection, names: list[str]) -> None:
    """Disable the logins when nobody uses them any more; fail, with both still valid, when somebody does."""
    if module.params["terminate"]:
        for name in names:
            disable(connection, name)
        rows(connection, "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = ANY(%s)", names)
        return
    end = time.monotonic() + module.params["timeout"]
    # Asked again each time: a killed run leaves this waiting here, while a later one may have put a login to use.
    while waiting := [name for name in old_logins(rows(connection, LOGINS)) if name in names]:
        used = {name: (count, address) for name, count, address in rows(connection, SESSIONS, waiting)}
        for name in [name for name in waiting if name not in used]:
            disable(connection, name)
        if used and time.monotonic() > end:
            seen = ", ".join(f"{name}: {count} from {address}" for name, (count, address) in sorted(used.items()))
            module.fail_json(
                msg=f"Logins that should retire still have sessions after {module.params['timeout']} s ({seen}). "
                "They stay valid: have these clients load the new credential, and run this again."
            )
        if used:
            time.sleep(1)


def disable(connection, name: str) -> None:
    """Disable the login in one transaction, and say when in its comment."""
    moment = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    with connection.cursor() as cursor:
        cursor.execute(
            f'BEGIN; ALTER ROLE "{name}" NOLOGIN PASSWORD NULL; COMMENT ON ROLE "{name}" IS %s; COMMIT',
            (f"disabled {moment}",),
        )


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "port": {"type": "int", "required": True},
            "state": {"type": "str", "choices": ["read", "retired"], "default": "read"},
            "timeout": {"type": "int", "default": 300},
            "terminate": {"type": "bool", "default": False},
            "holders": {"type": "dict", "default": {}},
        },
        supports_check_mode=True,
    )
    try:
        connection = connect(port_of(module))
    except UnreachableError as unreachable:
        if module.check_mode:
            module.exit_json(
                changed=False, active={}, salts={}, pending=[], retired=[], msg=f"Not there yet: {unreachable}"
            )
        module.fail_json(msg=f"PostgreSQL cannot be asked about its logins: {unreachable}.")
    logins = rows(connection, LOGINS)
    old = old_logins(logins)
    result = {
        "pending": sorted(re.sub("_[ab]$", "", name) for name in old),
        "active": active_by_pair(logins),
        "salts": {name: salt or "" for name, salt, *_rest in logins},
        "retired": [],
    }
    if module.params["state"] == "read" or not old:
        module.exit_json(changed=False, **result)
    if not module.check_mode:
        refuse_held(module, old)
        try:
            retire(module, connection, old)
        except psycopg2.Error as error:
            module.fail_json(msg=f"PostgreSQL refused to retire a login: {describe(error)}.")
    module.exit_json(changed=True, **dict(result, retired=old))


if __name__ == "__main__":
    main()
