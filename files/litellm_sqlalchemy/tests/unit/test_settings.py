"""Settings: what is wrong is said in one line that names the file and the key."""

import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.records import DEEP

from litellm_sqlalchemy import settings
from litellm_sqlalchemy.errors import SettingsError

MINIMUM = {"database": {"host": "db1"}}


def _error(tmp_path: Path, content: str | bytes) -> str:
    file = tmp_path / "settings.yml"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(SettingsError) as caught:
        settings.load_settings(file)
    message = str(caught.value)
    assert "\n" not in message
    assert str(file) in message
    return message


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({**MINIMUM, "databse": {}}, "unknown key `databse`"),
        ({"database": {"host": "db1", "prot": 1}}, "unknown key `database.prot`"),
        ({"database": {}}, "the key `database.host` is missing"),
        ({}, "the key `database` is missing"),
        ({**MINIMUM, "content": {"headers": ["X-Api-Key"]}}, "`content.headers.0` is 'X-Api-Key'"),
        ({**MINIMUM, "content": {"headers": ["authorization"]}}, "never kept"),
        ({"database": {"host": "db1", "port": "many"}}, "`database.port` is 'many'"),
        ({"database": {"host": "db1", "port": 70000}}, "`database.port` is 70000"),
        ({"database": {"host": "db1", "sslmode": "allow"}}, "`database.sslmode` is 'allow'"),
        ({"database": "db1"}, "`database` is 'db1'"),
        ({"database": {"host": ""}}, "`database.host` is ''"),
        *(
            ({**MINIMUM, "validation": {"gateway_urls": [url]}}, f"`validation.gateway_urls.0` is '{url}': ")
            for url in ("gateway1:4000", "", "ftp://h", "http://", "http://h:99999", "http://h:p", "http://[::1")
        ),
        ({**MINIMUM, "validation": {"front_url": "https://h:0"}}, "`validation.front_url` is 'https://h:0': "),
        ({**MINIMUM, "spool": {"fsync": "sometimes"}}, "`spool.fsync` is 'sometimes'"),
        ({**MINIMUM, "spool": {"segment_size": 10}}, "`spool.segment_size` is 10"),
        ({**MINIMUM, "spool": {"when_full": None}}, "`spool.when_full` is None"),
        ({**MINIMUM, "writer": {"batch_size": 0}}, "`writer.batch_size` is 0"),
        ({**MINIMUM, "writer": {"batch_delay": -1}}, "`writer.batch_delay` is -1"),
        *(
            ({**MINIMUM, "writer": {"listen": listen}}, f"`writer.listen` is '{listen}': ")
            for listen in ("9465", ":9465", "127.0.0.1", "127.0.0.1:", "127.0.0.1:metrics", "127.0.0.1:94650", "h:0")
        ),
        ({**MINIMUM, "writer": {"statement_timeout": float("inf")}}, "`writer.statement_timeout` is inf"),
        (
            {"database": {"host": "db1", "connect_timeout": 60}, "writer": {"statement_timeout": 80.5}},
            "`database.connect_timeout` and `writer.statement_timeout` are 140.5 s together",
        ),
        ({**MINIMUM, "content": {"mode": "some"}}, "`content.mode` is 'some'"),
        ({**MINIMUM, "logging": {"level": "LOUD"}}, "`logging.level` is 'LOUD'"),
    ],
)
def test_a_wrong_key_or_value_is_named(content: dict[str, Any], says: str, tmp_path: Path) -> None:
    assert says in _error(tmp_path, yaml.safe_dump(content))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("database: [", "is not YAML"),
        (DEEP, "is not YAML"),
        ("- a\n- b\n", "must hold a mapping"),
        ("", "must hold a mapping"),
        (b"database: {host: \xff\xfe}", "is not"),
        ("a: !!python/object/apply:os.system [ls]", "is not YAML"),
    ],
)
def test_a_file_that_is_no_settings_file(content: str | bytes, says: str, tmp_path: Path) -> None:
    assert says in _error(tmp_path, content)


def test_a_missing_file_and_a_directory(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="does not exist: write it, or name another with --settings"):
        settings.load_settings(tmp_path / "none.yml")
    with pytest.raises(SettingsError, match="cannot be read: Is a directory"):
        settings.load_settings(tmp_path)


def test_the_least_that_is_needed(tmp_path: Path) -> None:
    file = tmp_path / "settings.yml"
    file.write_text(yaml.safe_dump(MINIMUM))
    loaded = settings.load_settings(file)
    assert loaded.database.sslmode == "verify-full"
    assert loaded.spool.when_full == "drop"
    again = yaml.safe_dump(settings.as_mapping(loaded))
    file.write_text(again)
    assert settings.load_settings(file) == loaded, "what `settings` prints is a settings file"


@pytest.mark.parametrize(
    "content",
    [
        '{"user": "a"}', "no", '{"user": "a", "password": 17}', '["s3cret"]', DEEP, '{"user": "a", "password": ""}',
        '{"user": "", "password": "s3cret"}', r'{"user": "a", "password": "s3cret\u0000"}',
        r'{"user": "a", "password": "s3cret\ud800"}',
    ],
)  # fmt: skip
def test_a_wrong_credential_is_named_and_never_quoted(
    content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "writer.json").write_text(content.replace("no", "s3cret"))
    monkeypatch.delenv("CREDENTIALS_DIRECTORY", raising=False)
    database = settings.DatabaseSettings(host="db1", credentials_directory=tmp_path)
    with pytest.raises(SettingsError) as caught:
        settings.load_credential(database, "writer")
    assert str(tmp_path / "writer.json") in str(caught.value)
    assert "s3cret" not in str(caught.value)


def test_a_credential_that_the_user_may_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CREDENTIALS_DIRECTORY", raising=False)
    (tmp_path / "roots").mkdir(mode=0)
    database = settings.DatabaseSettings(host="db1", credentials_directory=tmp_path / "roots")
    user = os.geteuid()
    os.seteuid(user or 65534)
    try:
        with pytest.raises(SettingsError, match=r"reader\.json cannot be read: Permission denied"):
            settings.load_credential(database, "reader")
    finally:
        os.seteuid(user)


def test_systemd_credentials_come_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for place in ("etc", "run"):
        (tmp_path / place).mkdir()
        (tmp_path / place / "writer.json").write_text(f'{{"user": "{place}", "password": "p"}}')
    database = settings.DatabaseSettings(host="db1", credentials_directory=tmp_path / "etc")
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path / "run"))
    assert settings.load_credential(database, "writer").user == "run"
    (tmp_path / "run" / "writer.json").unlink()
    assert settings.load_credential(database, "writer").user == "etc"
    assert "password" not in repr(settings.load_credential(database, "writer"))
