"""When the server is told to load its files: the module postgresql_configuration."""

import time
from pathlib import Path

import pytest
from test_postgresql_access import load

configuration = load("library/postgresql_configuration.py", "postgresql_configuration")


def test_files_are_loaded_that_were_written_after_the_last_time(tmp_path: Path) -> None:
    (tmp_path / "pg_hba.conf").touch()
    written = (tmp_path / "pg_hba.conf").stat().st_mtime
    files = [str(tmp_path / "pg_hba.conf"), str(tmp_path / "not there")]
    assert configuration.unread(files, written - 1)
    assert not configuration.unread(files, written)


def test_a_load_before_the_clock_was_set_back_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pg_hba.conf").touch()
    loaded = [time.time() + 3600]

    def answer(connection: None, query: str) -> list[tuple[float]]:
        if "pg_reload_conf" in query:
            loaded.append(time.time())
        return [(loaded[-1],)]

    monkeypatch.setattr(configuration, "rows", answer)
    assert configuration.unread([str(tmp_path / "pg_hba.conf")], configuration.load_time(None))
    configuration.reload(None)
    assert not configuration.unread([str(tmp_path / "pg_hba.conf")], configuration.load_time(None))
