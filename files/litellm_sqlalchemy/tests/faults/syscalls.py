"""System calls that fail, or kill the process, at the N-th time (strace's injection)."""

import re
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

#: What spool and writer call to change something on a disk.
DISK = "write,pwrite64,fsync,fdatasync,rename,renameat,renameat2,unlink,unlinkat,rmdir,mkdir,ftruncate,fallocate"


def strace(inject: str, calls: str, at: int | str, log: Path | None = None, also: str = "") -> list[str]:
    """Return the prefix of a command where the `at`-th call of `calls` in a thread gets `inject`.

    With `log`, the calls, and those of `also`, are written there.
    """
    return [
        "strace", "-f", "-qq", "-o", str(log or "/dev/null"), "-e", f"trace={calls}{also and ','}{also}",
        "-e", "signal=none", "-e", f"inject={calls}:{inject}:when={at}",
    ]  # fmt: skip


def count_calls(command: Sequence[str], calls: str, environment: Mapping[str, str], log: Path) -> dict[str, int]:
    """Run a command to its end; return how often the thread that makes each system call most makes it."""
    prefix = ["strace", "-f", "-qq", "-o", str(log), "-e", f"trace={calls}", "-e", "signal=none"]
    subprocess.run([*prefix, *command], env=dict(environment), check=True, timeout=60, stdout=subprocess.DEVNULL)
    counts = Counter(re.findall(r"^(\d+) +(\w+)\(", log.read_text(), re.MULTILINE))
    return {name: max(counts[call] for call in counts if call[1] == name) for _, name in counts}


def python(program: str, *arguments: str) -> list[str]:
    """Return the command that runs a program of `tests/support`."""
    return [sys.executable, str(Path(__file__).parents[1] / "support" / program), *arguments]
