"""A network namespace at the other end of a cable that loses packets."""

import json
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

_TABLE = "table inet faults { %s; }"
_CHAIN = "chain %s { type filter hook %s priority 0; numgen random mod 100 < %d counter drop; }"


@dataclass(frozen=True)
class FarSide:
    """The namespace: commands run in it with `prefix`, and it is reached at `address`."""

    name: str
    address: str

    @property
    def prefix(self) -> tuple[str, ...]:
        """What runs a command over there."""
        return ("ip", "netns", "exec", self.name)

    def lose(self, percent: int) -> None:
        """Drop so many packets of a hundred, in each direction."""
        chains = "; ".join(_CHAIN % (hook, hook, percent) for hook in ("input", "output"))
        self._nft(_TABLE % chains)

    def heal(self) -> int:
        """Lose nothing any more; return how many packets were lost."""
        rules = json.loads(self._nft("--json", "list", "table", "inet", "faults"))["nftables"]
        counters = [part["counter"]["packets"] for item in rules for part in item.get("rule", {}).get("expr", [])
                    if "counter" in part]  # fmt: skip
        self._nft("delete table inet faults")
        return sum(counters)

    def _nft(self, *arguments: str) -> str:
        done = subprocess.run([*self.prefix, "nft", *arguments], check=True, capture_output=True, text=True)
        return done.stdout


@contextmanager
def far_side(name: str = "faults", network: str = "10.213.7") -> Iterator[FarSide]:
    """Make a namespace, joined to this one by a cable with an address at each end (documented in veth(4))."""
    far = FarSide(name, f"{network}.2")
    _ip("netns", "add", name)
    try:
        _ip("link", "add", f"{name}-near", "type", "veth", "peer", "name", f"{name}-far", "netns", name)
        _ip("address", "add", f"{network}.1/24", "dev", f"{name}-near")
        _ip("link", "set", f"{name}-near", "up")
        _ip("-netns", name, "address", "add", f"{far.address}/24", "dev", f"{name}-far")
        _ip("-netns", name, "link", "set", f"{name}-far", "up")
        _ip("-netns", name, "link", "set", "lo", "up")
        yield far
    finally:
        _ip("netns", "delete", name)  # and the cable with it


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)
