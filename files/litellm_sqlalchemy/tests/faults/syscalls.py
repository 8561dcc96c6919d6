"""System calls that fail, or kill the process, at the N-th time (strace's injection)."""

import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

#: What spool and writer call to change something on a disk.
DISK = "write,pwrite64,fsync,fdatasync,rename,renameat,renameat2,unlink,unlinkat,rmdir,mkdir,ftruncate,fallocate"


def strace(inject: str, calls: str, at: int | str, log: Path | None = None) -> list[str]:
    """Return the prefix of a command whose `at`-th call of `calls` (on a file of the spool) gets `inject`."""
    return [
        "strace", "-f", "-qq", "-o", str(log or "/dev/null"), "-e", f"trace={calls}", "-e", "signal=none",
        "-e", f"inject={calls}:{inject}:when={at}",
    ]  # fmt: skip


def count_calls(command: Sequence[str], calls: str, environment: Mapping[str, str], log: Path) -> dict[str, int]:
    """Run a command to its end and count its system calls by name."""
    prefix = ["strace", "-f", "-qq", "-o", str(log), "-e", f"trace={calls}", "-e", "signal=none"]
    subprocess.run([*prefix, *command], env=dict(environment), check=True, timeout=60, stdout=subprocess.DEVNULL)
    counts: dict[str, int] = {}
    for name in re.findall(r"^\d+ +(\w+)\(", log.read_text(), re.MULTILINE):
        counts[name] = counts.get(name, 0) + 1
    return counts


def python(program: str, *arguments: str) -> list[str]:
    """Return the command that runs a program of `tests/support`."""
    return [sys.executable, str(Path(__file__).parents[1] / "support" / program), *arguments]
