"""Pages of a table that the disk gives back changed."""

from collections.abc import Iterator
from contextlib import contextmanager

from support.postgresql import Database

_PAGE = 8192


@contextmanager
def damaged_page(database: Database, table: str, page: int) -> Iterator[None]:
    """Change bytes in a page of a table that no memory holds any more; put them back at the end."""
    path = database.value("SELECT pg_relation_filepath(%s::regclass)", table)
    file = database.server.data / path
    database.server.stop()
    original = file.read_bytes()[page * _PAGE : (page + 1) * _PAGE]
    assert len(original) == _PAGE, f"{table} has no page {page}"
    _write(database, path, page, bytes(byte ^ 0xFF for byte in original))
    database.server.start()
    try:
        yield
    finally:
        database.server.stop()
        _write(database, path, page, original)
        database.server.start()


def last_page(database: Database, table: str) -> int:
    """Return the number of the page that the next row goes to."""
    return int(database.value("SELECT pg_relation_size(%s::regclass) / 8192 - 1", table))


def _write(database: Database, path: str, page: int, content: bytes) -> None:
    with (database.server.data / path).open("r+b") as file:
        file.seek(page * _PAGE)
        file.write(content)
