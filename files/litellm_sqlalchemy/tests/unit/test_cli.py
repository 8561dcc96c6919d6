"""The command's exit codes, as far as no database is needed, and that it says one line where something is wrong."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.records import DEEP

import litellm_sqlalchemy
from litellm_sqlalchemy.cli import main
from litellm_sqlalchemy.dead_letters import REQUEUED_FILE, bury
from litellm_sqlalchemy.errors import ExitCode
from litellm_sqlalchemy.frames import Frame, Kind
from litellm_sqlalchemy.producer import Producer
from litellm_sqlalchemy.settings import SETTINGS_VARIABLE, SpoolSettings
from litellm_sqlalchemy.spool import Lock


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A settings file whose database nobody answers for."""
    (tmp_path / "spool").mkdir()
    (tmp_path / "writer.json").write_text('{"user": "w", "password": "p"}')
    (tmp_path / "migrator.json").write_text('{"user": "m", "password": "p"}')
    file = tmp_path / "settings.yml"
    content = {
        "database": {"host": "127.0.0.1", "port": 1, "credentials_directory": str(tmp_path), "connect_timeout": 2},
        "spool": {"directory": str(tmp_path / "spool")},
        "writer": {"listen": None},
    }
    file.write_text(yaml.safe_dump(content))
    monkeypatch.setenv(SETTINGS_VARIABLE, str(file))
    return file


def _fails(capsys: pytest.CaptureFixture[str], arguments: list[str], code: ExitCode, says: str) -> None:
    assert main(arguments) == code
    captured = capsys.readouterr()
    assert captured.err.startswith("litellm-sqlalchemy: ")
    assert captured.err.count("\n") == 1, captured.err
    assert says in captured.err


def test_the_numbers_are_what_scripts_rely_on() -> None:
    assert {code.name: code.value for code in ExitCode} == {
        "OK": 0, "FAILED": 1, "USAGE": 2, "SETTINGS": 3, "DATABASE": 4, "SCHEMA": 5, "SPOOL": 6, "LOCKED": 7,
    }  # fmt: skip


def test_ok(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["settings"]) == ExitCode.OK
    assert yaml.safe_load(capsys.readouterr().out)["database"]["host"] == "127.0.0.1"
    assert main(["status", "--spool-only"]) == ExitCode.OK


def test_failed(file: Path, tmp_path: Path) -> None:
    producer = Producer(SpoolSettings(directory=tmp_path / "spool"))
    producer.append(Kind.REQUEST, b"{}")
    producer.skip()
    assert main(["status", "--spool-only"]) == ExitCode.FAILED, "something was dropped"
    producer.close()


@pytest.mark.parametrize(
    "arguments",
    [
        [], ["nonsense"], ["settings", "--nonsense"], ["dead-letters", "burn"], ["erase", "--user", ""],
        ["calls", "--last", "-1"], ["top", "--last", "0"], ["calls", "--status", "succes"],
        ["erase", "--user", "\udcff"], ["call", "\udcff"], ["calls", "--model", "\udcff"],
    ],
)  # fmt: skip
def test_usage(file: Path, arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == ExitCode.USAGE


@pytest.mark.parametrize(
    "arguments", [["calls", "--since", "2026-11-02", "--until", "2026-11-02"], ["usage", "--until", "2026-01-01"]]
)
def test_times_that_nothing_is_between(arguments: list[str], file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _fails(capsys, arguments, ExitCode.USAGE, "selects nothing")


@pytest.mark.parametrize("time", ["yesterday", "2026-11-23T14:30:00"])
def test_a_time_says_how_it_is_written(time: str, file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["replay", "--since", time])
    assert "+00:00" in capsys.readouterr().err.splitlines()[-1]


def _start(*arguments: str, stdout: int = subprocess.PIPE, **environment: str) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONPATH": str(Path(litellm_sqlalchemy.__file__).parents[1]), **environment}
    command = [sys.executable, "-m", "litellm_sqlalchemy", *arguments]
    return subprocess.Popen(
        command,
        stdout=stdout,
        stderr=subprocess.PIPE,
        env=environment,
        # What was started in the background has it ignored, and hands that on.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


@pytest.mark.parametrize("arguments", [["settings"], ["--help"], ["calls", "--help"]])
def test_a_reader_that_has_seen_enough(arguments: list[str], file: Path) -> None:
    reads, writes = os.pipe()
    os.close(reads)
    with _start(*arguments, stdout=writes) as process:
        os.close(writes)
        assert process.communicate() == (None, b"")
    assert process.returncode == 141


def test_a_full_disk_behind_standard_output(file: Path) -> None:
    with Path("/dev/full").open("w") as full, _start("settings", stdout=full.fileno()) as process:
        assert process.communicate() == (None, b"litellm-sqlalchemy: [Errno 28] No space left on device\n")
    assert process.returncode == ExitCode.SPOOL


def test_a_standard_output_that_is_closed(file: Path) -> None:
    source = str(Path(litellm_sqlalchemy.__file__).parents[1])
    command = f"exec {sys.executable} -m litellm_sqlalchemy settings --json >&-"
    done = subprocess.run(
        ["sh", "-c", command], stderr=subprocess.PIPE, env={**os.environ, "PYTHONPATH": source}, check=False
    )
    assert (done.returncode, done.stderr) == (ExitCode.OK, b"")


def test_an_interrupt_ends_the_wait_for_a_server(file: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        content = yaml.safe_load(file.read_text())
        content["database"] |= {"port": silent.getsockname()[1], "connect_timeout": 75}
        file.write_text(yaml.safe_dump(content))
        with _start("migrate") as process, silent.accept()[0]:
            process.send_signal(signal.SIGINT)
            assert process.communicate(timeout=60) == (b"", b"")
        assert process.returncode == -signal.SIGINT


def _bury(spool: Path, number: int, call: str, reason: str) -> str:
    for name in ("dead", "producers"):
        (spool / name).mkdir(exist_ok=True)
    frame = Frame(Kind.REQUEST, number, f'{{"id":"{call}"}}'.encode(), b"")
    bury(spool, "gateway", frame, reason, {})
    return f"gateway-{number}"


def test_a_locale_that_lacks_a_character(file: Path, tmp_path: Path) -> None:
    _bury(tmp_path / "spool", 1, "a", "no 漢")
    with _start("dead-letters", PYTHONIOENCODING="ascii") as process:
        assert process.communicate() == (b"gateway-1  request   no \\u6f22\n", b"")
    assert process.returncode == ExitCode.OK


def test_dead_letters_by_their_ids(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spool = tmp_path / "spool"
    first, other, half = (_bury(spool, number, call, "refused") for number, call in enumerate("aba", start=1))
    assert main(["dead-letters", "list", first, "--json"]) == ExitCode.OK
    assert [letter["id"] for letter in json.loads(capsys.readouterr().out)] == [first, half]
    _fails(capsys, ["dead-letters", "list", "nobody"], ExitCode.FAILED, "no dead letter nobody")
    assert main(["dead-letters", "requeue", first]) == ExitCode.OK
    assert [one.stem for one in (spool / "dead").iterdir()] == [other]


@pytest.mark.parametrize("content", ["", "{}", "17", '[["gateway-1"]]', '["../format"]', DEEP, None])
def test_a_broken_list_of_requeued_letters(
    content: str | None, file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Somebody who has taken over a gateway may put it there."""
    spool = tmp_path / "spool"
    _bury(spool, 1, "a", "refused")
    (spool / "producers" / "x").mkdir()
    planted = spool / "producers" / "x" / REQUEUED_FILE
    if content is None:
        planted.symlink_to(tmp_path / "writer.json")
    else:
        planted.write_text(content)
    (spool / "format.json").touch()
    assert main(["dead-letters", "requeue"]) == ExitCode.OK
    assert capsys.readouterr().out == "1 dead letters requeued\n"
    assert (spool / "format.json").exists()


@pytest.mark.parametrize("change", [{"kind": None}, {"frame": 17}, {"frame": ""}, None])
def test_a_broken_dead_letter(
    change: dict[str, Any] | None, file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    letter = tmp_path / "spool" / "dead" / f"{_bury(tmp_path / 'spool', 1, 'a', 'refused')}.json"
    content = {**json.loads(letter.read_bytes()), **(change or {})}
    if content["kind"] is None:
        del content["kind"]
    letter.write_text(json.dumps(content) if change else DEEP)
    for verb in ("list", "requeue"):
        _fails(capsys, ["dead-letters", verb], ExitCode.SPOOL, "gateway-1.json is damaged")


def test_settings(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _fails(capsys, ["settings", "--settings", str(tmp_path / "none")], ExitCode.SETTINGS, "does not exist")
    file.write_text("databse: {}")
    _fails(capsys, ["status"], ExitCode.SETTINGS, "databse")


def test_database(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _fails(capsys, ["migrate"], ExitCode.DATABASE, "127.0.0.1:1")


def test_spool(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spool = tmp_path / "spool"
    (spool / "format").write_text("9")
    for verb in (["write"], ["status"], ["dead-letters"]):
        _fails(capsys, verb, ExitCode.SPOOL, "has format '9', this version reads '1'")
    (spool / "format").unlink()
    (spool / "producers").touch()
    (spool / "dead").touch()
    _fails(capsys, ["status"], ExitCode.SPOOL, f"Not a directory: '{spool}/producers'")
    (spool / "producers").unlink()
    _fails(capsys, ["status"], ExitCode.SPOOL, f"Not a directory: '{spool}/dead'")
    _fails(capsys, ["dead-letters"], ExitCode.SPOOL, f"{spool}/dead cannot be read: Not a directory")
    for content in ('{"tot', '{"totals":[],"producers":[]}', DEEP):
        (spool / "state.json").write_text(content)
        _fails(capsys, ["status"], ExitCode.SPOOL, "state.json is damaged")
    _fails(capsys, ["write"], ExitCode.SPOOL, "state.json is damaged")
    spool.rename(tmp_path / "elsewhere")
    for verb in (["write"], ["status"], ["dead-letters"]):
        _fails(capsys, verb, ExitCode.SPOOL, "does not exist: create it, or set `spool.directory`")


@pytest.mark.parametrize("content", ["{", "[1]", '{"damaged": null}', '{"damaged": "x"}', '{"lost": 1}', DEEP])
def test_broken_notes_of_what_is_known(
    content: str, file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "spool" / "acknowledged.json").write_text(content)
    assert main(["status", "--spool-only"]) == ExitCode.SPOOL
    assert "acknowledged.json cannot be read" in capsys.readouterr().err


def test_locked(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lock = Lock(tmp_path / "spool" / "writer.lock")
    _fails(capsys, ["write"], ExitCode.LOCKED, "is held by process ")
    lock.release()


def test_every_code_is_in_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    words = " ".join(capsys.readouterr().out.split())
    for code in ExitCode:
        assert f"{code.value} {code.name.lower()}" in words
    with pytest.raises(SystemExit):
        main(["--version"])
