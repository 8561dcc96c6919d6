"""The writer in an outage of its database, and where it listens."""

import json
import socket
import threading
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from support.fakes import FakeStore
from support.records import Ledger

from litellm_sqlalchemy.consumer import producers
from litellm_sqlalchemy.database import ErrorClass
from litellm_sqlalchemy.errors import SettingsError
from litellm_sqlalchemy.producer import Producer
from litellm_sqlalchemy.settings import Settings
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


@pytest.mark.parametrize("place", ["127.0.0.1:94650", "127.0.0.1:metrics", "no-such-name.invalid:9465"])
def test_an_address_that_is_none(place: str, tmp_path: Path) -> None:
    writer = Writer(_settings(tmp_path, place))
    with pytest.raises(SettingsError, match=f"`writer.listen` is '{place}': "):
        writer._monitor.start()
    writer._consumer.close()
