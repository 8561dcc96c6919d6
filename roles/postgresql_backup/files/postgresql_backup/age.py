"""Encryption with age: to public keys, and back with an identity that never touches a disk."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from postgresql_backup.errors import DamagedError, ToolError
from postgresql_backup.tools import Hashed, Pace, pump, run, running


def new_identity() -> tuple[str, str]:
    """Return a fresh identity and its recipient."""
    text = run(["age-keygen"])
    recipient = next(line.split(": ")[1] for line in text.splitlines() if line.startswith("# public key: "))
    return next(line for line in text.splitlines() if line.startswith("AGE-SECRET-KEY-")), recipient


def encrypt(source: IO[bytes], target: Path, recipients: list[str], pace: Pace | None = None) -> Hashed:
    """Encrypt a stream into a new file, durably; return size and SHA-256 of what was encrypted. Raises ToolError."""
    plain = Hashed()
    command = ["age", "--encrypt", *(word for recipient in recipients for word in ("--recipient", recipient))]
    with target.open("xb") as file:
        with running(command, f"age could not write {target.name}", stdin=subprocess.PIPE, stdout=file) as process:
            assert process.stdin is not None
            with suppress(BrokenPipeError), process.stdin:  # an age that has ended says why itself
                pump(source, plain, process.stdin, pace=pace)
        os.fsync(file.fileno())
    return plain


@contextmanager
def decrypted(file: Path, identity: str) -> Iterator[IO[bytes]]:
    """Open the plain content of a file. Raises DamagedError at the end when not all of it was authentic."""
    descriptor = os.memfd_create("identity")
    with os.fdopen(descriptor, "wb") as key:
        key.write(identity.strip().encode() + b"\n")
        key.flush()
        command = ["age", "--decrypt", "--identity", f"/proc/self/fd/{descriptor}", str(file)]
        what = f"{file.parent.name}/{file.name} cannot be decrypted"
        try:
            with running(command, what, stdout=subprocess.PIPE, pass_fds=[descriptor]) as process:
                assert process.stdout is not None
                with process.stdout:
                    yield process.stdout
        except ToolError as error:
            raise DamagedError(str(error)) from None
