"""Fixtures of the integration tests: a PostgreSQL server, a migrated database and a deployment for each test."""

import itertools
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from faults.disks import file_system
from support.gateway_fixtures import (  # noqa: F401 - fixtures
    gateway,
    gateway_database,
    gateway_deployment,
    gateway_directory,
    gateway_writer,
    upstream,
)
from support.harness import Harness
from support.postgresql import Database, Server
from support.processes import OTHER, Deployment, WriterProcess

from litellm_sqlalchemy.migrate import migrate

_TEMPLATE = "migrated_template"
_numbers = itertools.count(1)


def _memory_directory() -> Path | None:
    """Return a directory in memory with room for a cluster, None where there is none."""
    memory = Path("/dev/shm")
    return memory if memory.is_dir() and shutil.disk_usage(memory).free > 2 * 1024**3 else None


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    """A PostgreSQL server with the deployment's roles, started once."""
    with tempfile.TemporaryDirectory(prefix="pg-", dir=_memory_directory(), ignore_cleanup_errors=True) as directory:
        result = Server(Path(directory))
        result.create()
        try:
            yield result
        finally:
            if result.is_running():
                result.stop("immediate")


@pytest.fixture(scope="session")
def template(server: Server, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The name of a database with the migrated schema, to be copied."""
    server.create_database(_TEMPLATE)
    migrate(Deployment.create(tmp_path_factory.mktemp("template"), server, _TEMPLATE).load())
    return _TEMPLATE


@pytest.fixture
def database(server: Server, template: str) -> Iterator[Database]:
    """A database with the migrated schema, of this test alone."""
    if not server.is_running():  # a test of faults may have failed while it was down
        server.start()
    result = server.create_database(f"test_{next(_numbers)}", template)
    yield result
    if not server.is_running():
        server.start()
    result.drop()


@pytest.fixture
def deployment(server: Server, database: Database, tmp_path: Path) -> Deployment:
    """Settings file, credentials and spool for the test's database."""
    return Deployment.create(tmp_path, server, database.name)


@pytest.fixture
def writer(deployment: Deployment) -> Iterator[WriterProcess]:
    """A writer process of the deployment, not yet started; it does not outlive the test."""
    process = WriterProcess(deployment)
    yield process
    process.kill()


@pytest.fixture
def harness(server: Server, database: Database, deployment: Deployment, writer: WriterProcess) -> Iterator[Harness]:
    """Spool, writer and database of the test, with a ledger of what is sent."""
    result = Harness(server, database, deployment, writer)
    yield result
    result.close()


@pytest.fixture
def others_deployment(server: Server, database: Database) -> Iterator[Deployment]:
    """A deployment whose writer is not root: files of the user `OTHER`, in a place that everybody gets at."""
    with tempfile.TemporaryDirectory(prefix="deployment-", dir="/var/tmp") as directory:
        Path(directory).chmod(0o755)
        certificate = shutil.copy(server.certificate, Path(directory) / "ca.crt")
        deployment = Deployment.create(Path(directory), server, database.name)
        deployment.update(database={"sslrootcert": str(certificate)})
        deployment.give_to(OTHER)
        yield deployment


@pytest.fixture
def small_disk() -> Iterator[Path]:
    """A file system of 4 MB that every user can reach."""
    with file_system(4) as place:
        yield place
