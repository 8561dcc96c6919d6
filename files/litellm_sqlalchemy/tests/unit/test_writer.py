"""The writer in an outage of its database, where it listens, and how it ends."""

import json
import os
import resource
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.fakes import FakeStore
from support.records import BODY, DEEP, Ledger, request

import litellm_sqlalchemy
from litellm_sqlalchemy.consumer import producers
from litellm_sqlalchemy.database import ErrorClass
from litellm_sqlalchemy.dead_letters import read_origins
from litellm_sqlalchemy.errors import ExitCode, SettingsError
from litellm_sqlalchemy.frames import Kind
from litellm_sqlalchemy.producer import Producer
from litellm_sqlalchemy.settings import Settings, as_mapping
from litellm_sqlalchemy.store import Unavailable
from litellm_sqlalchemy.writer import Writer


def _settings(directory: Path, listen: str | None = None, **database: Any) -> Settings:
    (directory / "spool").mkdir()
    (directory / "writer.json").write_text('{"user": "w", "password": "p"}')
    content = {
        "database": {"host": "127.0.0.1", "credentials_directory": directory, **database},
        "spool": {"directory": directory / "spool"},
        "writer": {"listen": listen},
    }
    return Settings.model_validate(content)


def test_an_outage_is_not_over_because_a_gateway_process_has_ended(tmp_path: Path) -> None:
    """What it leaves is a folder without a frame, for which the database is not asked."""
    settings = _settings(tmp_path)
    writer, producer = Writer(settings), Producer(settings.spool)
    Ledger().send(producer, 1)
    writer._store = FakeStore()  # type: ignore[assignment]
    writer.drain_once()
    writer.health.database(ErrorClass.RETRY, "no answer")
    producer.close()
    writer.drain_once()
    assert not producers(settings.spool.directory)
    assert writer.health.problem() == ("retry", "no answer")
    writer._consumer.close()


@pytest.mark.parametrize("name", ["counters.json", "origins.json", "requeued.json"])
@pytest.mark.parametrize("content", ["", "17", "[[]]", '{"received": [], "hooks": {}}', '{"hooks": {"new": 1}}', DEEP])
def test_what_stands_beside_the_frames_stops_no_delivery(name: str, content: str, tmp_path: Path) -> None:
    """Somebody who has taken over a gateway may put anything there."""
    settings, ledger, store = _settings(tmp_path), Ledger(), FakeStore()
    writer, producer = Writer(settings), Producer(settings.spool)
    writer._store = store  # type: ignore[assignment]
    ledger.append(producer, Kind.REQUEST, "a", request("a"), BODY)
    producer.close()
    os.mkdir(os.fsencode(tmp_path / "spool" / "producers") + b"/\xff")
    (tmp_path / "spool" / "producers" / producer._name / name).write_text(content)
    while producers(settings.spool.directory):
        writer.drain_once()
    assert [status for _record, status in store.rows] == ["", "interrupted"]
    writer._consumer.close()


def test_a_list_that_cannot_be_opened_now_is_read_later(tmp_path: Path) -> None:
    (tmp_path / "origins.json").write_text('{"call": "gateway"}')
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[1]))
    try:
        with pytest.raises(OSError, match="Too many open files"):
            read_origins(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert read_origins(tmp_path) == {"call": "gateway"}


def test_the_database_is_not_asked_by_a_writer_that_shall_stop(tmp_path: Path) -> None:
    """Behind a network that swallows all it would be a long while before there is no answer."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(20)
        settings = _settings(
            tmp_path, port=server.getsockname()[1], sslmode="disable", channel_binding="disable", connect_timeout=2
        )
        producer = Producer(settings.spool)
        Ledger().send(producer, 1)
        writer = Writer(settings)
        thread = threading.Thread(target=writer.run)
        thread.start()
        with server.accept()[0]:  # the batch is under way
            writer.stop()
            thread.join(20)
        assert not thread.is_alive()
        server.setblocking(False)
        with pytest.raises(BlockingIOError):
            server.accept()
        producer.close()


@pytest.mark.parametrize(("cause", "longest"), [(ErrorClass.RETRY, 2), (ErrorClass.PAUSE, 5), (ErrorClass.SCHEMA, 5)])
def test_it_waits_twice_as_long_after_each_attempt(cause: ErrorClass, longest: float, tmp_path: Path) -> None:
    """Where somebody has to mend something first, `writer.retry_delay_max` may be too short."""
    writer = Writer(_settings(tmp_path))
    writer._settings = writer._settings.model_copy(update={"retry_delay_max": 2})
    for attempt, seconds in ((1, 0.1), (2, 0.2), (3, 0.4), (5, 1.6), (6, min(3.2, longest)), (10_000, longest)):
        assert seconds / 2 <= writer._delay(Unavailable(cause, ""), attempt) <= seconds
    writer._consumer.close()


def test_it_gives_signs_of_life_while_it_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However long `writer.retry_delay_max` is: its unit has a watchdog."""
    monkeypatch.setattr("litellm_sqlalchemy.writer._PING", 0.05)
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
    writer = Writer(_settings(tmp_path))
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(tmp_path / "notify"))
        systemd.settimeout(20)
        thread = threading.Thread(target=writer._wait, args=(600,))
        thread.start()
        assert {systemd.recv(100) for _ in range(3)} == {b"WATCHDOG=1"}
        writer.stop()
        thread.join(20)
    assert not thread.is_alive()
    writer._consumer.close()


#: A writer whose main thread is where `Event.wait` holds its lock when the signal comes.
_SIGNALLED = """
import os, signal, sys, time
from pathlib import Path
from litellm_sqlalchemy.settings import load_settings
from litellm_sqlalchemy.writer import Writer, run_writer

def run(writer):
    with writer._stop._cond:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.1)
    assert writer._stop.wait(20)

Writer.run = run
run_writer(load_settings(Path(sys.argv[1])))
"""


def test_a_signal_stops_it_wherever_it_is(tmp_path: Path) -> None:
    with _python("-c", _SIGNALLED, str(_settings_file(tmp_path))) as process:
        assert process.communicate(timeout=60) == ("", "")
        assert process.returncode == 0


def test_a_spool_that_breaks_under_it(tmp_path: Path) -> None:
    folder = tmp_path / "spool" / "producers"
    with _python("-m", "litellm_sqlalchemy", "write", "--settings", str(_settings_file(tmp_path))) as process:
        assert process.stderr is not None
        assert "delivering from" in process.stderr.readline()
        folder.rename(tmp_path / "elsewhere")
        folder.touch()
        assert process.wait(60) == ExitCode.SPOOL
        assert process.stderr.read().splitlines()[-1].endswith(f"Not a directory: '{folder}'")


def _settings_file(directory: Path) -> Path:
    file = directory / "settings.yml"
    file.write_text(yaml.safe_dump(as_mapping(_settings(directory))))
    return file


@contextmanager
def _python(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    environment = {**os.environ, "PYTHONPATH": str(Path(litellm_sqlalchemy.__file__).parents[1])}
    with subprocess.Popen(
        [sys.executable, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize("address", ["127.0.0.1", "[::1]"])
def test_it_listens(address: str, tmp_path: Path) -> None:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.create_server((address.strip("[]"), 0), family=family) as probe:
        place = f"{address}:{probe.getsockname()[1]}"
    writer = Writer(_settings(tmp_path, place))
    writer._monitor.start()
    with urllib.request.urlopen(f"http://{place}/health") as answer:
        assert json.load(answer) == {"status": "ok"}
    writer._monitor.stop()
    writer._consumer.close()


def test_who_says_nothing_is_not_waited_for(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    writer = Writer(_settings(tmp_path, f"127.0.0.1:{port}"))
    writer._monitor.start()
    with socket.create_connection(("127.0.0.1", port), timeout=30) as silent:
        assert silent.recv(1) == b"", "the connection is closed"
    writer._monitor.stop()
    writer._consumer.close()


@pytest.mark.parametrize("place", ["no-such-name.invalid:9465", f"{'a' * 64}.invalid:9465"])
def test_an_address_that_is_none(place: str, tmp_path: Path) -> None:
    writer = Writer(_settings(tmp_path, place))
    with pytest.raises(SettingsError, match=f"`writer.listen` is '{place}': "):
        writer._monitor.start()
    writer._consumer.close()
