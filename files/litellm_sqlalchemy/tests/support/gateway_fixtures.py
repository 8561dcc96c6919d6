"""Fixtures of a session's one gateway with all that it needs; the integration tests' conftest takes them in."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from support.gateway import Gateway
from support.postgresql import Database, Server
from support.processes import Deployment, WriterProcess
from support.upstream import Upstream


@pytest.fixture(scope="session")
def upstream() -> Iterator[Upstream]:
    """The fake provider."""
    with Upstream() as result:
        yield result


@pytest.fixture(scope="session")
def gateway_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the gateway's files are."""
    return tmp_path_factory.mktemp("gateway")


@pytest.fixture(scope="session")
def gateway_database(server: Server, template: str) -> Iterator[Database]:
    """The database that the gateway's calls are stored in."""
    result = server.create_database("gateway", template)
    yield result
    result.drop()


@pytest.fixture(scope="session")
def gateway_deployment(server: Server, gateway_database: Database, gateway_directory: Path) -> Deployment:
    """Settings and spool of the gateway."""
    deployment = Deployment.create(gateway_directory, server, gateway_database.name)
    deployment.update(content={"event_timeout": 20})
    return deployment


@pytest.fixture(scope="session")
def gateway_writer(gateway_deployment: Deployment) -> Iterator[WriterProcess]:
    """The writer of the gateway's spool."""
    process = WriterProcess(gateway_deployment).start()
    yield process
    process.kill()


@pytest.fixture(scope="session")
def gateway(
    gateway_writer: WriterProcess, gateway_deployment: Deployment, gateway_directory: Path, upstream: Upstream
) -> Iterator[Gateway]:
    """The gateway, serving."""
    result = Gateway(gateway_directory / "litellm", upstream, gateway_deployment).launch()
    try:
        yield result.wait()
    finally:
        result.kill()
