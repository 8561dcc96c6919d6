"""Filters of the postgresql_backup role that must work on the controller: the recovery key never leaves it."""

from __future__ import annotations

from ansible.errors import AnsibleFilterError
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

CHARSET = "qpzry9x8gf2tvdw0s3jn54khce6mua7l"
_GENERATOR = (0x3B6A57B2, 0x26508E6D, 0x1EA119FA, 0x3D4233DD, 0x2A1462B3)


def checksum_of(values: list[int]) -> int:
    """Return Bech32's checksum (BIP 173) over 5-bit values."""
    result = 1
    for value in values:
        top = result >> 25
        result = (result & 0x1FFFFFF) << 5 ^ value
        for bit in range(5):
            result ^= _GENERATOR[bit] if (top >> bit) & 1 else 0
    return result


def expand(prefix: str) -> list[int]:
    """Return a prefix as values of the checksum."""
    return [ord(character) >> 5 for character in prefix] + [0] + [ord(character) & 31 for character in prefix]


def regroup(values: list[int], size: int, new_size: int, *, pad: bool) -> list[int]:
    """Return values of `size` bits as values of `new_size` bits."""
    bits = "".join(f"{value:0{size}b}" for value in values)
    if pad:
        bits += "0" * (-len(bits) % new_size)
    return [int(bits[start : start + new_size], 2) for start in range(0, len(bits) - new_size + 1, new_size)]


def bech32_encode(prefix: str, data: bytes) -> str:
    """Return data as Bech32, in lower case."""
    values = regroup(list(data), 8, 5, pad=True)
    check = checksum_of(expand(prefix) + values + [0] * 6) ^ 1
    values += [(check >> 5 * (5 - place)) & 31 for place in range(6)]
    return prefix + "1" + "".join(CHARSET[value] for value in values)


def bech32_decode(prefix: str, text: str) -> bytes:
    """Return what a Bech32 text of lower case holds; raise ValueError."""
    head, _, tail = text.rpartition("1")
    values = [CHARSET.index(character) for character in tail]
    if head != prefix or checksum_of(expand(prefix) + values) != 1:
        raise ValueError("prefix or checksum")
    return bytes(regroup(values[:-6], 5, 8, pad=False))


def recipient(identity: str) -> str:
    """Return the public key (age1...) of an age identity (AGE-SECRET-KEY-...)."""
    try:
        secret = bech32_decode("age-secret-key-", identity.strip().lower())
        public = X25519PrivateKey.from_private_bytes(secret).public_key()
    except (ValueError, AttributeError):
        # No details: they could quote the key.
        raise AnsibleFilterError(
            "The recovery key is no age identity (AGE-SECRET-KEY-...): make one with playbooks/create-secrets.yml."
        ) from None
    return bech32_encode("age", public.public_bytes(Encoding.Raw, PublicFormat.Raw))


class FilterModule:
    """What Ansible loads."""

    def filters(self):
        return {"postgresql_backup_recipient": recipient}
