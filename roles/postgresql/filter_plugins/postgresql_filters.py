"""Filters of the postgresql role that must work on the controller: passwords never leave it."""

from __future__ import annotations

import base64
import hashlib
import hmac
import re
import secrets
import stringprep
import unicodedata

from ansible.errors import AnsibleFilterError

ITERATIONS = 4096  # PostgreSQL's default of scram_iterations
SALT_LENGTH = 16  # bytes, as PostgreSQL's own
_SALTED = re.compile(r"SCRAM-SHA-256\$(?P<iterations>\d+):(?P<salt>[A-Za-z0-9+/=]+)(\$|$)")
_PROHIBITED = (
    stringprep.in_table_a1,
    stringprep.in_table_c12,
    stringprep.in_table_c21_c22,
    stringprep.in_table_c3,
    stringprep.in_table_c4,
    stringprep.in_table_c5,
    stringprep.in_table_c6,
    stringprep.in_table_c7,
    stringprep.in_table_c8,
    stringprep.in_table_c9,
)


def saslprep(password: str) -> str:
    """Normalise as RFC 4013 says; what it prohibits is returned unchanged, as PostgreSQL does."""
    mapped = "".join(
        " " if stringprep.in_table_c12(character) else character
        for character in password
        if not stringprep.in_table_b1(character)
    )
    prepared = unicodedata.normalize("NFKC", mapped)
    if not prepared or any(check(character) for character in prepared for check in _PROHIBITED):
        return password
    right_to_left = [stringprep.in_table_d1(character) for character in prepared]
    if any(right_to_left):
        mixed = any(stringprep.in_table_d2(character) for character in prepared)
        if mixed or not (right_to_left[0] and right_to_left[-1]):
            return password
    return prepared


def scram_verifier(password: str, like: str | None = None, iterations: int = ITERATIONS) -> str:
    """Return the SCRAM-SHA-256 verifier of a password (RFC 5802, section 3; RFC 7677).

    With `like` (a verifier, or only its `SCRAM-SHA-256$<iterations>:<salt>`) its salt and iterations are taken,
    so that the result is equal to a stored verifier exactly when the password is; else the salt is random.
    """
    if not isinstance(password, str) or not password:
        raise AnsibleFilterError("A PostgreSQL password must be a text that is not empty.")
    salt = secrets.token_bytes(SALT_LENGTH)
    stored = _SALTED.match(like or "")
    if stored:
        salt, iterations = base64.b64decode(stored["salt"]), int(stored["iterations"])
    elif iterations < ITERATIONS:
        raise AnsibleFilterError(f"{iterations} SCRAM iterations are fewer than PostgreSQL's {ITERATIONS}.")
    salted = hashlib.pbkdf2_hmac("sha256", saslprep(password).encode(), salt, iterations)
    client_key = hmac.digest(salted, b"Client Key", "sha256")
    stored_key = hashlib.sha256(client_key).digest()
    server_key = hmac.digest(salted, b"Server Key", "sha256")
    salt64, stored64, server64 = (base64.b64encode(part).decode() for part in (salt, stored_key, server_key))
    return f"SCRAM-SHA-256${iterations}:{salt64}${stored64}:{server64}"


def login_verifiers(pairs: list[dict], salts: dict[str, str]) -> dict[str, dict[str, str]]:
    """Return, by login of the pairs, the verifiers `fresh` (new salt) and `stored` (salt that the server has)."""
    verifiers = {}
    for pair in pairs:
        fresh = scram_verifier(pair["password"])
        for login in (f"{pair['name']}_a", f"{pair['name']}_b"):
            verifiers[login] = {"fresh": fresh}
            if salts.get(login):
                verifiers[login]["stored"] = scram_verifier(pair["password"], salts[login])
    return verifiers


def without_passwords(pairs: list[dict]) -> list[dict]:
    """Return the pairs as they may travel to the host."""
    return [{key: value for key, value in pair.items() if key != "password"} for pair in pairs]


class FilterModule:
    """What Ansible loads."""

    def filters(self):
        return {
            "postgresql_scram_verifier": scram_verifier,
            "postgresql_login_verifiers": login_verifiers,
            "postgresql_without_passwords": without_passwords,
        }
