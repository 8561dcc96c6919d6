"""Checks of the validation where nothing is as it should be: each fails in a line, and the others go on."""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from litellm_sqlalchemy.settings import Settings
from litellm_sqlalchemy.validate import Result, Validation


@contextmanager
def _answering(content: bytes, address: str = "127.0.0.1", seen: list[object] | None = None) -> Iterator[int]:
    """Yield the port of a server that answers each connection with this, and notes it in `seen`."""
    with socket.create_server((address, 0), family=socket.AF_INET6 if ":" in address else socket.AF_INET) as server:

        def serve() -> None:
            with suppress(OSError):  # it is closed
                while True:
                    connection, client = server.accept()
                    if seen is not None:
                        seen.append(client)
                    _answer(connection, content)

        threading.Thread(target=serve, daemon=True).start()
        yield server.getsockname()[1]


def _answer(connection: socket.socket, content: bytes) -> None:
    with connection, suppress(ConnectionError):
        if connection.recv(65536):
            connection.sendall(content)
            connection.shutdown(socket.SHUT_WR)
            while connection.recv(65536):  # to close before all of the request is read would reset the connection
                pass


def _check(directory: Path, name: str, database: dict[str, Any], **sections: Any) -> Result:
    """Run the whole validation; return one of its results."""
    (directory / "reader.json").write_text('{"user": "r", "password": "p"}')
    database = {"host": "127.0.0.1", "port": 1, "credentials_directory": directory, "connect_timeout": 2, **database}
    content = {"database": database, "spool": {"directory": directory}, **sections}
    results = {result.id: result for result in Validation(Settings.model_validate(content)).run()}
    assert not results[name].ok
    return results[name]


@pytest.mark.parametrize("content", [b"HTTP/1.0 200 OK\r\n\r\n<html>", b"SSH-2.0-OpenSSH\r\n"])
def test_an_url_that_no_gateway_answers(content: bytes, tmp_path: Path) -> None:
    with _answering(content) as port:
        url = f"http://127.0.0.1:{port}"
        result = _check(tmp_path, f"gateway.request[{url}]", {}, validation={"gateway_urls": [url], "model": "demo"})
    assert result.seen.startswith(f"{url} is no gateway's: ")


def test_a_key_file_that_holds_no_key(tmp_path: Path) -> None:
    (tmp_path / "key").write_bytes(b"sk-\xff")
    validation = {"gateway_urls": ["http://h"], "model": "demo", "gateway_key_file": tmp_path / "key"}
    result = _check(tmp_path, "gateway.request[http://h]", {}, validation=validation)
    assert result.seen == f"key file {tmp_path / 'key'} holds no key: not all of it is ASCII"


def test_a_database_that_has_only_ipv6(tmp_path: Path) -> None:
    with _answering(b"N", "::1") as port:
        result = _check(tmp_path, "database.verify_full", {"host": "::1", "port": port, "sslrootcert": None})
    assert "server does not support SSL" in result.seen


def test_a_database_that_is_not_there_is_waited_for_once_by_a_login(tmp_path: Path) -> None:
    """An address that swallows all costs `connect_timeout` each time."""
    seen: list[object] = []
    (tmp_path / "writer.json").write_text('{"user": "w", "password": "p"}')
    with _answering(b"N", seen=seen) as port:
        result = _check(tmp_path, "schema.head", {"port": port, "sslrootcert": None})
    assert "server does not support SSL" in result.seen
    assert len(seen) == 6, "two logins, and four connections of the checks that are about connecting"


@pytest.mark.parametrize("content", ["", "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"])
def test_files_without_a_certificate(content: str, tmp_path: Path) -> None:
    (tmp_path / "login").mkdir()
    file = tmp_path / "login" / "client.crt"
    file.write_text(content)
    files = {"client_certificates": tmp_path, "sslrootcert": file}
    assert _check(tmp_path, "certificates.clients", files).seen == f"{file} holds no certificate"
    assert _check(tmp_path, "certificates.authority", files).seen == f"{file} holds no certificate"
