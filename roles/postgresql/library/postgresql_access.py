#!/usr/bin/python
"""Ansible module: roles, login pairs, databases and their privileges, as one exact description."""

from __future__ import annotations

import calendar
import time

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.postgresql_peer import UnreachableError, connect, describe, port_of, psycopg2, rows

DOCUMENTATION = r"""
module: postgresql_access
short_description: Make roles, login pairs, databases and privileges be exactly as described
description:
  - Every described role gets exactly the described attributes, settings and memberships; roles that are not described
    are left alone.
  - A login pair <name> is the logins <name>_a and <name>_b. The one whose stored verifier fits the password is active.
    When none does, the password goes to an idle login, which is enabled, and the other stays valid until it is retired
    (module postgresql_logins). An enabled login without a verifier, as a dump restores it, gets the password itself.
  - PUBLIC loses its privileges on every database and on the schema public of each.
options:
  port:
    description: Port, which names the socket.
    type: int
    required: true
  groups:
    description: Roles that cannot log in (name, member_of, settings).
    type: list
    elements: dict
    default: []
  login_pairs:
    description: Login pairs (name, member_of, connection_limit, settings).
    type: list
    elements: dict
    default: []
  verifiers:
    description: By login, the SCRAM verifiers of its password with a fresh salt and with the salt that is stored.
    type: dict
    default: {}
  databases:
    description: Databases (name, owner, grants, schema_grants).
    type: list
    elements: dict
    default: []
author: The litellm-gateway authors
"""

EXAMPLES = r"""
- postgresql_access:
    port: 5432
    groups: [{name: app_owner}, {name: app_writer}]
    databases:
      - name: app
        owner: app_owner
        grants: [{role: app_writer, privileges: [CONNECT]}]
        schema_grants: [{role: app_writer, privileges: [USAGE]}]
"""

RETURN = r"""
changes:
  description: What was (in check mode - would be) done, a sentence each and without secrets.
  type: list
  returned: always
"""

ROLES = """
SELECT r.rolname, r.rolcanlogin, r.rolconnlimit, r.rolpassword, coalesce(shobj_description(r.oid, 'pg_authid'), ''),
       r.rolsuper OR r.rolcreatedb OR r.rolcreaterole OR r.rolreplication OR r.rolbypassrls OR NOT r.rolinherit
         OR r.rolvaliduntil IS NOT NULL,
       coalesce((SELECT setconfig FROM pg_db_role_setting WHERE setrole = r.oid AND setdatabase = 0), '{}')
FROM pg_authid AS r
"""
MEMBERSHIPS = """
SELECT member.rolname, granted.rolname, m.inherit_option, m.set_option, m.admin_option
FROM pg_auth_members AS m
JOIN pg_roles AS member ON member.oid = m.member
JOIN pg_roles AS granted ON granted.oid = m.roleid
"""
DATABASES = """
SELECT d.datname, o.rolname, d.datallowconn,
       coalesce((SELECT json_agg(json_build_array(coalesce(g.rolname, 'public'), a.privilege_type))
                 FROM aclexplode(coalesce(d.datacl, acldefault('d', d.datdba))) AS a
                 LEFT JOIN pg_roles AS g ON g.oid = a.grantee WHERE a.grantee <> d.datdba), '[]')
FROM pg_database AS d JOIN pg_roles AS o ON o.oid = d.datdba
ORDER BY d.datname
"""
SCHEMA = """
SELECT coalesce(g.rolname, 'public'), a.privilege_type
FROM pg_namespace AS n, aclexplode(coalesce(n.nspacl, acldefault('n', n.nspowner))) AS a
LEFT JOIN pg_roles AS g ON g.oid = a.grantee
WHERE n.nspname = 'public' AND a.grantee <> n.nspowner
"""
PLAIN = "NOSUPERUSER NOCREATEDB NOCREATEROLE NOREPLICATION NOBYPASSRLS INHERIT VALID UNTIL 'infinity'"


def name_of(value: str) -> str:
    return "PUBLIC" if value == "public" else '"{}"'.format(value.replace('"', '""'))


TIME = "%Y-%m-%dT%H:%M:%SZ"


def now_after(comments: list[str]) -> str:
    """Return the time, or where the clock has been set back since, a second after the latest of the comments."""
    times = [calendar.timegm(time.strptime(item, f"enabled {TIME}")) + 1 for item in comments]
    return time.strftime(TIME, time.gmtime(max([time.time(), *times])))


class BlockedError(Exception):
    """A new password cannot be given without breaking a client; str() says why."""


class Access:
    """Compares the description with the catalogue and applies the difference."""

    def __init__(self, module: AnsibleModule) -> None:
        self.params, self.dry = module.params, module.check_mode
        self.changes: list[str] = []
        self.port = port_of(module)
        self.connection = connect(self.port)
        self.load()

    def load(self) -> None:
        columns = ("login", "limit", "verifier", "comment", "special", "settings")
        self.roles = {name: dict(zip(columns, values, strict=True)) for name, *values in rows(self.connection, ROLES)}
        self.memberships = {(member, role): tuple(how) for member, role, *how in rows(self.connection, MEMBERSHIPS)}

    def do(self, change: str, statement: str, *parameters, connection=None) -> None:
        """Note the change, and make it unless this is a dry run."""
        self.changes.append(change)
        if not self.dry:
            with (connection or self.connection).cursor() as cursor:
                cursor.execute(statement, parameters or None)

    def all(self) -> None:
        for group in self.params["groups"]:
            self.role(group["name"], {**group, "connection_limit": -1}, login=False)
        for pair in self.params["login_pairs"]:
            names = [f"{pair['name']}_{end}" for end in "ab"]
            for name in names:
                self.role(name, pair, login=None)
            self.pair(*names)
        for group in self.params["groups"]:
            self.membership(group["name"], group)
        for pair in self.params["login_pairs"]:
            for end in "ab":
                self.membership(f"{pair['name']}_{end}", pair)
        for database in self.params["databases"]:
            self.database(database)
        self.privileges()

    def role(self, name: str, wanted: dict, login: bool | None) -> None:
        """Make the role with its attributes; whether a login of a pair may log in is decided by pair()."""
        settings = {key: str(value) for key, value in (wanted.get("settings") or {}).items()}
        limit = wanted.get("connection_limit") or -1
        if name not in self.roles:
            # Comment and role in one transaction: a login without its comment would not be known as ours.
            comment = "group" if login is False else "idle"
            self.do(
                f"make role {name}",
                f"BEGIN; CREATE ROLE {name_of(name)} NOLOGIN INHERIT CONNECTION LIMIT {int(limit)};"
                f" COMMENT ON ROLE {name_of(name)} IS '{comment}'; COMMIT",
            )
            self.roles[name] = {"login": False, "limit": limit, "verifier": None, "comment": comment}
            self.roles[name].update(special=False, settings=[])
        role = self.roles[name]
        if role["special"]:
            self.do(f"take special attributes from {name}", f"ALTER ROLE {name_of(name)} {PLAIN}")
        if role["limit"] != limit:
            self.do(f"limit {name} to {limit} connections", f"ALTER ROLE {name_of(name)} CONNECTION LIMIT {int(limit)}")
        if login is False and (role["login"] or role["verifier"]):
            self.do(f"keep {name} from logging in", f"ALTER ROLE {name_of(name)} NOLOGIN PASSWORD NULL")
        present = dict(item.split("=", 1) for item in role["settings"])
        for key in sorted(present.keys() - settings.keys()):
            self.do(f"reset {key} of {name}", f"ALTER ROLE {name_of(name)} RESET {name_of(key)}")
        for key in sorted(key for key in settings if present.get(key) != settings[key]):
            self.do(
                f"set {key} = {settings[key]} for {name}",
                f"ALTER ROLE {name_of(name)} SET {name_of(key)} TO %s",
                settings[key],
            )

    def pair(self, a: str, b: str) -> None:
        """Have the password on the login of the pair that was enabled last."""
        verifiers, enabled = self.params["verifiers"], [name for name in (a, b) if self.roles[name]["login"]]
        enabled.sort(key=lambda name: self.roles[name]["comment"])
        for name in (name for name in (a, b) if name not in enabled and self.roles[name]["verifier"]):
            self.do(f"take the password of idle login {name}", f"ALTER ROLE {name_of(name)} PASSWORD NULL")
        held = {name: self.roles[name]["verifier"] for name in enabled}
        fitting = [name for name in enabled if held[name] and held[name] == verifiers[name].get("stored")]
        if fitting and fitting[-1] == enabled[-1]:
            return
        if fitting:
            # Back to the password of the login that was about to retire.
            self.enable(fitting[-1], None)
        elif enabled and not held[enabled[-1]]:
            # Restored of a dump, which holds no passwords: clients may still have its name.
            self.enable(enabled[-1], verifiers)
        elif len(enabled) == 2:
            self.enable(self.replaceable(enabled), verifiers)
        else:
            self.enable(next(name for name in (a, b) if name not in enabled), verifiers)

    def replaceable(self, enabled: list[str]) -> str:
        """Choose whose password a third one replaces while a rotation is unfinished: a login without sessions.

        When neither has one the newer goes, since clients that were never handed it still hold the older.
        """
        used = [name for (name,) in rows(self.connection, "SELECT DISTINCT usename FROM pg_stat_activity")]
        free = [name for name in enabled if name not in used]
        if not free:
            raise BlockedError(
                f"both {' and '.join(enabled)} have sessions and neither fits the password: "
                "finish the previous rotation with its own password before starting another"
            )
        return free[-1]

    def enable(self, name: str, verifiers: dict | None) -> None:
        pair = [self.roles[name[:-1] + end]["comment"] for end in "ab"]
        comment = f"enabled {now_after([item for item in pair if item.startswith('enabled')])}"
        if verifiers is None:
            self.do(f"prefer login {name} again", f"COMMENT ON ROLE {name_of(name)} IS %s", comment)
            return
        self.do(
            f"enable login {name} with the new password",
            f"BEGIN; ALTER ROLE {name_of(name)} LOGIN PASSWORD %s; COMMENT ON ROLE {name_of(name)} IS %s; COMMIT",
            verifiers[name]["fresh"],
            comment,
        )

    def membership(self, name: str, wanted: dict) -> None:
        """Make the role's memberships exactly the described ones, never with ADMIN."""
        described = {item["role"]: (item.get("inherit", True), item.get("set", False)) for item in wanted["member_of"]}
        for role, (inherit, can_set) in described.items():
            if self.memberships.get((name, role)) != (inherit, can_set, False):
                self.do(
                    f"make {name} a member of {role}",
                    f"GRANT {name_of(role)} TO {name_of(name)}"
                    f" WITH INHERIT {bool(inherit)}, SET {bool(can_set)}, ADMIN FALSE",
                )
        for member, role in self.memberships:
            if member == name and role not in described:
                self.do(f"end the membership of {name} in {role}", f"REVOKE {name_of(role)} FROM {name_of(name)}")

    def database(self, wanted: dict) -> None:
        owners = {name: owner for name, owner, *_rest in rows(self.connection, DATABASES)}
        name, owner = wanted["name"], wanted["owner"]
        if name not in owners:
            self.do(
                f"make database {name} of {owner}",
                f"CREATE DATABASE {name_of(name)} OWNER {name_of(owner)} TEMPLATE template0 ENCODING 'UTF8'",
            )
        elif owners[name] != owner:
            self.do(f"give database {name} to {owner}", f"ALTER DATABASE {name_of(name)} OWNER TO {name_of(owner)}")

    def privileges(self) -> None:
        described = {database["name"]: database for database in self.params["databases"]}
        found = rows(self.connection, DATABASES)
        for name, _owner, connectable, acl in found:
            on, wanted = f"DATABASE {name_of(name)}", described.get(name)
            present = {tuple(item) for item in acl}
            if wanted is None:
                self.exact(on, self.connection, present, {item for item in present if item[0] != "public"})
            else:
                # What the owner loses by a change of owner in a dry run is not predicted.
                self.exact(on, self.connection, present, pairs(wanted["grants"]))
            if connectable:
                with_schema = connect(self.port, name)
                present = set(rows(with_schema, SCHEMA))
                kept = {item for item in present if item[0] != "public"}
                schema_wanted = pairs(wanted["schema_grants"]) if wanted else kept
                self.exact("SCHEMA public", with_schema, present, schema_wanted, name)
                with_schema.close()
        for name in described.keys() - {row[0] for row in found}:
            self.changes.append(f"grant the privileges on database {name}")

    def exact(self, on: str, connection, present: set, wanted: set, database: str = "") -> None:
        where = f"{on} of {database}" if database else on
        for role, privilege in sorted(present - wanted):
            statement = f"REVOKE {privilege} ON {on} FROM {name_of(role)}"
            self.do(f"revoke {privilege} on {where} from {role}", statement, connection=connection)
        for role, privilege in sorted(wanted - present):
            statement = f"GRANT {privilege} ON {on} TO {name_of(role)}"
            self.do(f"grant {privilege} on {where} to {role}", statement, connection=connection)


def pairs(grants: list[dict]) -> set[tuple[str, str]]:
    return {(grant["role"], privilege.upper()) for grant in grants for privilege in grant["privileges"]}


def main() -> None:
    member_of = {
        "type": "list",
        "elements": "dict",
        "default": [],
        "options": {
            "role": {"type": "str", "required": True},
            "inherit": {"type": "bool", "default": True},
            "set": {"type": "bool", "default": False},
        },
    }
    grants = {
        "type": "list",
        "elements": "dict",
        "default": [],
        "options": {
            "role": {"type": "str", "required": True},
            "privileges": {"type": "list", "elements": "str", "required": True},
        },
    }
    role = {
        "name": {"type": "str", "required": True},
        "member_of": member_of,
        "settings": {"type": "dict", "default": {}},
    }
    database = {
        "name": {"type": "str", "required": True},
        "owner": {"type": "str", "required": True},
        "grants": grants,
        "schema_grants": grants,
    }
    login = {**role, "connection_limit": {"type": "int", "default": -1}}
    module = AnsibleModule(
        argument_spec={
            "port": {"type": "int", "required": True},
            "groups": {"type": "list", "elements": "dict", "options": role, "default": []},
            "login_pairs": {"type": "list", "elements": "dict", "options": login, "default": []},
            "verifiers": {"type": "dict", "no_log": True, "default": {}},
            "databases": {"type": "list", "elements": "dict", "options": database, "default": []},
        },
        supports_check_mode=True,
    )
    access = None
    try:
        access = Access(module)
        access.all()
    except UnreachableError as unreachable:
        if module.check_mode and access is None:
            module.exit_json(changed=True, changes=[f"make everything: {unreachable}"])
        module.fail_json(msg=f"The roles and databases cannot be made: {unreachable}.")
    except BlockedError as blocked:
        module.fail_json(msg=f"The roles and databases cannot be made: {blocked}.")
    except psycopg2.Error as error:
        doing = access.changes[-1] if access and access.changes else "reading the catalogue"
        module.fail_json(msg=f"PostgreSQL refused to {doing}: {describe(error)}.")
    diff = {"before": "", "after": "".join(f"{change}\n" for change in access.changes)}
    module.exit_json(changed=bool(access.changes), changes=access.changes, diff=diff)


if __name__ == "__main__":
    main()
