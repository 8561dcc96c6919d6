"""Dead letters: frames that PostgreSQL refused for good, each a file in the spool's `dead` folder, and the way back.

What is requeued stands in a producer's folder of its own, with a list of the letters it was made of. The folder
appears at once, whole and durable; then the letters are removed, by `requeue` or, if that dies, by the writer. The
folder also says which gateway processes the calls came from: one that still lives may have the answer yet to write.
"""

import base64
import errno
import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from litellm_sqlalchemy import frames
from litellm_sqlalchemy.errors import LogError, SpoolError
from litellm_sqlalchemy.frames import Frame
from litellm_sqlalchemy.identifiers import uuid7
from litellm_sqlalchemy.spool import (
    Lock,
    dead_letters,
    make_directory,
    open_directory,
    producers,
    read_file,
    replace_file,
    sync_directory,
)

_log = logging.getLogger(__name__)

#: In a folder of requeued dead letters: the names of those it was made of, and the producer of each call.
REQUEUED_FILE = "requeued.json"
_ORIGINS_FILE = "origins.json"
#: Errors of a file that `requeue` did not make: a link, a pipe, one of another user, or beside something else.
_NOT_OURS = (errno.ELOOP, errno.EINVAL, errno.EACCES, errno.ENOTDIR)


@dataclass(frozen=True)
class Letter:
    """A dead letter: its name, the call it belongs to, the producer it came from, and why it was refused."""

    id: str
    kind: str
    call: str
    producer: str
    reason: str
    frame: Frame


def read_letters(directory: Path, ids: Sequence[str] = ()) -> list[Letter]:
    """Return the dead letters of a spool, requests first: all, or those of `ids`, each with the other half of its call.

    Raises SpoolError, and LogError where one of them is not there.
    """
    try:
        letters = [_read(file) for file in dead_letters(open_directory(directory))]
    except OSError as error:
        raise SpoolError(f"{error.filename or directory} cannot be read: {error.strerror}") from None
    letters.sort(key=lambda letter: (letter.frame.kind, letter.id))
    if unknown := set(ids) - {letter.id for letter in letters}:
        raise LogError(f"no dead letter {min(unknown)}: see `litellm-sqlalchemy dead-letters list`")
    calls = {letter.call for letter in letters if not ids or letter.id in ids}
    return [letter for letter in letters if letter.call in calls]


def requeue(directory: Path, ids: Sequence[str]) -> list[Letter]:
    """Put the letters that `read_letters` returns back into the spool; return them. Raises like it."""
    for earlier in producers(open_directory(directory)):
        remove_requeued(directory / "producers" / earlier)  # a requeue that was killed half-way
    letters = read_letters(directory, ids)
    if letters:
        try:
            _write(directory / "producers", letters)
        except OSError as error:
            raise SpoolError(f"spool directory {directory}: {error.strerror}") from None
    return letters


def _load(file: Path) -> Any:
    """Return the JSON in a file. Raises OSError, ValueError."""
    try:
        return json.loads(read_file(file))
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def _read(file: Path) -> Letter:
    try:
        content = _load(file)
        [(frame, _)] = frames.decode(base64.b64decode(content["frame"]), complete=True)
        if not isinstance(frame, Frame):
            raise ValueError("it holds no whole frame")
        return Letter(
            file.stem,
            str(content["kind"]),
            call_of(metadata_of(frame)) or file.stem,
            str(content.get("producer") or file.stem.rpartition("-")[0]),
            str(content["reason"]),
            frame,
        )
    except (ValueError, KeyError, TypeError) as error:
        raise SpoolError(f"dead letter {file} is damaged: {error}; move it away") from None


def bury(directory: Path, producer: str, frame: Frame, reason: str, origins: dict[str, str]) -> None:
    """Write a dead letter of a spool; `origins` as in `read_origins`. Raises OSError."""
    content = {
        "reason": reason,
        "kind": frame.kind.name.lower(),
        "producer": origins.get(call_of(metadata_of(frame)), producer),
        "metadata": frame.metadata.decode(errors="backslashreplace"),
        "frame": base64.b64encode(frames.encode(frame)).decode(),
    }
    replace_file(directory / "dead" / f"{producer}-{frame.sequence}.json", json.dumps(content).encode())


def read_origins(folder: Path) -> dict[str, str]:
    """Return the producer that each requeued call of a producer's folder came from; nothing for other folders."""
    return {call: str(producer) for call, producer in _content(folder / _ORIGINS_FILE, dict).items()}


def remove_requeued(folder: Path) -> None:
    """Remove the dead letters that a producer's folder was made of, now that it is durable. Raises OSError."""
    file = folder / REQUEUED_FILE
    if names := set(map(str, _content(file, list))):
        for letter in dead_letters(folder.parent.parent):
            if letter.stem in names:
                letter.unlink(missing_ok=True)
        file.unlink()


def _content(file: Path, kind: type[Any]) -> Any:
    """Return what a file in a folder of requeued letters holds; nothing where there is none, or none of ours.

    Only `requeue` writes them, but a gateway could put one there, and must not stop the delivery by it. Raises OSError
    where it may be another time.
    """
    try:
        content = _load(file)
        if not isinstance(content, kind):
            raise ValueError(f"it holds no {kind.__name__}")
    except FileNotFoundError:
        return kind()
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno not in _NOT_OURS:
            raise
        _log.error("%r is damaged, and passed over: %s", str(file), error)
        return kind()
    return content


def metadata_of(frame: Frame) -> dict[str, Any]:
    """Return the metadata of a frame, nothing where it is no JSON object."""
    try:
        content = orjson.loads(frame.metadata)
    except orjson.JSONDecodeError:
        return {}
    return content if isinstance(content, dict) else {}


def call_of(metadata: dict[str, Any]) -> str:
    """Return the id of the call that metadata belong to, an empty text where they do not say."""
    return str(metadata.get("id") or metadata.get("request_id") or "")


def _write(place: Path, letters: list[Letter]) -> None:
    name = str(uuid7())
    seed = frames.seed_of(name)
    hidden = place / f".{name}"
    make_directory(hidden)
    lock = Lock(hidden / "lock")
    encoded = [
        frames.encode(letter.frame._replace(sequence=number), seed) for number, letter in enumerate(letters, start=1)
    ]
    replace_file(hidden / REQUEUED_FILE, json.dumps([letter.id for letter in letters]).encode())
    replace_file(hidden / _ORIGINS_FILE, json.dumps({letter.call: letter.producer for letter in letters}).encode())
    replace_file(hidden / "0000000001.seg", b"".join(encoded))
    os.rename(hidden, place / name)
    sync_directory(place)
    remove_requeued(place / name)
    lock.release()
