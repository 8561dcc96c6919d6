"""Dead letters: frames that PostgreSQL refused for good, each a file in the spool's `dead` folder, and the way back.

What is requeued stands in a producer's folder of its own, with a list of the letters it was made of. The folder
appears at once, whole and durable; then the letters are removed, by `requeue` or, if that dies, by the writer. The
folder also says which gateway processes the calls came from: one that still lives may have the answer yet to write.
"""

import base64
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from litellm_sqlalchemy import frames
from litellm_sqlalchemy.errors import LogError, SpoolError
from litellm_sqlalchemy.frames import Frame
from litellm_sqlalchemy.identifiers import uuid7
from litellm_sqlalchemy.spool import Lock, make_directory, open_directory, open_file, replace_file, sync_directory

#: In a folder of requeued dead letters: the names of those it was made of, and the producer of each call.
REQUEUED_FILE = "requeued.json"
_ORIGINS_FILE = "origins.json"


@dataclass(frozen=True)
class Letter:
    """A dead letter: its name, the call it belongs to, the producer it came from, and why it was refused."""

    id: str
    kind: str
    call: str
    producer: str
    reason: str
    frame: Frame


def read_letters(directory: Path) -> list[Letter]:
    """Return the dead letters of a spool, requests first. Raises SpoolError."""
    folder = open_directory(directory) / "dead"
    try:
        letters = [_read(file) for file in folder.glob("*.json")]
    except OSError as error:
        raise SpoolError(f"{folder} cannot be read: {error.strerror}") from None
    return sorted(letters, key=lambda letter: (letter.frame.kind, letter.id))


def requeue(directory: Path, ids: list[str]) -> list[Letter]:
    """Put letters back into the spool, all without `ids`, each with the other half of its call; return them.

    Raises SpoolError, and LogError where one of them is not there.
    """
    for earlier in (open_directory(directory) / "producers").glob(f"[!.]*/{REQUEUED_FILE}"):
        remove_requeued(earlier.parent)  # a requeue that was killed half-way
    letters = read_letters(directory)
    if unknown := set(ids) - {letter.id for letter in letters}:
        raise LogError(f"no dead letter {min(unknown)}: see `litellm-sqlalchemy dead-letters list`")
    calls = {letter.call for letter in letters if not ids or letter.id in ids}
    chosen = [letter for letter in letters if letter.call in calls]
    if chosen:
        try:
            _write(directory / "producers", chosen)
        except OSError as error:
            raise SpoolError(f"spool directory {directory}: {error.strerror}") from None
    return chosen


def _read(file: Path) -> Letter:
    try:
        content = json.loads(file.read_bytes())
        [(frame, _)] = frames.decode(base64.b64decode(content["frame"]), complete=True)
        if not isinstance(frame, Frame):
            raise ValueError(frame.reason)
    except (ValueError, KeyError, TypeError) as error:
        raise SpoolError(f"dead letter {file} is damaged: {error}; move it away") from None
    producer = str(content.get("producer") or file.stem.rpartition("-")[0])
    return Letter(
        file.stem,
        str(content["kind"]),
        call_of(metadata_of(frame)) or file.stem,
        producer,
        str(content["reason"]),
        frame,
    )


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
    try:
        with open_file(folder / _ORIGINS_FILE) as file:
            origins: dict[str, str] = json.load(file)
    except FileNotFoundError:
        return {}
    return origins


def remove_requeued(folder: Path) -> None:
    """Remove the dead letters that a producer's folder was made of, now that it is durable."""
    file = folder / REQUEUED_FILE
    if file.exists():
        for name in json.loads(file.read_bytes()):
            (folder.parent.parent / "dead" / f"{name}.json").unlink(missing_ok=True)
        file.unlink()


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


def _write(producers: Path, letters: list[Letter]) -> None:
    name = str(uuid7())
    seed = frames.seed_of(name)
    hidden = producers / f".{name}"
    make_directory(hidden)
    lock = Lock(hidden / "lock")
    encoded = [
        frames.encode(letter.frame._replace(sequence=number), seed) for number, letter in enumerate(letters, start=1)
    ]
    replace_file(hidden / REQUEUED_FILE, json.dumps([letter.id for letter in letters]).encode())
    replace_file(hidden / _ORIGINS_FILE, json.dumps({letter.call: letter.producer for letter in letters}).encode())
    replace_file(hidden / "0000000001.seg", b"".join(encoded))
    os.rename(hidden, producers / name)
    sync_directory(producers)
    remove_requeued(producers / name)
    lock.release()
