"""Encryption with age: to public keys, and back with an identity that never touches a disk."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO

from postgresql_backup.errors import DamagedError, ToolError
from postgresql_backup.tools import Hashed, environment, last_words, pump, run


def new_identity() -> tuple[str, str]:
    """Return a fresh identity and its recipient."""
    text = run(["age-keygen"])
    recipient = next(line.split(": ")[1] for line in text.splitlines() if line.startswith("# public key: "))
    return next(line for line in text.splitlines() if line.startswith("AGE-SECRET-KEY-")), recipient


def encrypt(source: IO[bytes], target: Path, recipients: list[str]) -> Hashed:
    """Encrypt a stream into a new file, durably; return size and SHA-256 of what was encrypted. Raises ToolError."""
    plain = Hashed()
    command = ["age", "--encrypt", *(word for recipient in recipients for word in ("--recipient", recipient))]
    with TemporaryFile() as errors, target.open("xb") as file:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=file, stderr=errors, env=environment())
        assert process.stdin is not None
        try:
            with process.stdin as sink:
                pump(source, plain, sink)
        except BrokenPipeError:
            pass  # age has ended: its own words follow
        except BaseException:
            process.kill()
            raise
        finally:
            code = process.wait()
        if code:
            errors.seek(0)
            raise ToolError(f"age could not write {target.name}: {last_words(errors.read(), None, code)}")
        os.fsync(file.fileno())
    return plain


@contextmanager
def decrypted(file: Path, identity: str) -> Iterator[IO[bytes]]:
    """Open the plain content of a file. Raises DamagedError at the end when not all of it was authentic."""
    descriptor = os.memfd_create("identity")
    with os.fdopen(descriptor, "wb") as key, TemporaryFile() as errors:
        key.write(identity.strip().encode() + b"\n")
        key.flush()
        process = subprocess.Popen(
            ["age", "--decrypt", "--identity", f"/proc/self/fd/{descriptor}", str(file)],
            stdout=subprocess.PIPE,
            stderr=errors,
            pass_fds=[descriptor],
            env=environment(),
        )
        assert process.stdout is not None
        try:
            with process.stdout as stream:
                yield stream
        except BaseException:
            process.kill()
            raise
        finally:
            code = process.wait()
        if code:
            errors.seek(0)
            reason = last_words(errors.read(), None, code).removeprefix("age: error: ")
            raise DamagedError(f"{file.parent.name}/{file.name} cannot be decrypted: {reason}")
