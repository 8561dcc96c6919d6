"""What the system tells of a process; imports nothing, as what measures its own memory does, too."""

from pathlib import Path


def cpu_ticks(pid: int, fields: tuple[int, ...]) -> list[int]:
    """Return fields of /proc/PID/stat (proc(5), counted from 0), nothing for a process that is gone."""
    try:
        content = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return []
    parts = content[content.rindex(")") + 2 :].split()
    return [int(parts[field - 2]) for field in fields]


def memory(pid: int | str, field: str) -> float:
    """Return the memory of a process in megabytes: VmRSS now, VmHWM at most so far (proc(5))."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) / 1024
