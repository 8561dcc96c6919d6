"""File systems that are small, full or read-only; mounting one takes the privileges of a test container."""

import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_PIECE = 16 * 1024


@contextmanager
def file_system(megabytes: int) -> Iterator[Path]:
    """Mount a file system of that size that every user can reach."""
    place = Path(tempfile.mkdtemp(prefix="small-disk-"))
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={megabytes}m,mode=0755", "tmpfs", str(place)], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)
        place.rmdir()


@contextmanager
def full_disk(place: Path, free: int) -> Iterator[None]:
    """Fill a file system until `free` bytes are left; make room again at the end."""
    ballast = place / "ballast"
    try:
        with ballast.open("wb", buffering=0) as file:
            while (left := shutil.disk_usage(place).free - free) > 0:
                file.write(bytes(max(min(left, 64 * _PIECE), _PIECE)))
        yield
    finally:
        ballast.unlink()


@contextmanager
def read_only(place: Path) -> Iterator[None]:
    """Mount a file system read-only that nobody has open for writing, and writable again at the end."""
    subprocess.run(["mount", "-o", "remount,ro", str(place)], check=True)
    try:
        yield
    finally:
        subprocess.run(["mount", "-o", "remount,rw", str(place)], check=True)
