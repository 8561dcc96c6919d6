"""The gateway, the writer and root's commands share the spool: none of them gets another's rights by what is in it."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from support.harness import Harness
from support.postgresql import Database, Server
from support.processes import OTHER, Deployment, WriterProcess

from litellm_sqlalchemy.consumer import Consumer, Cursor, oldest_waiting, read_state
from litellm_sqlalchemy.dead_letters import read_origins
from litellm_sqlalchemy.errors import ExitCode
from litellm_sqlalchemy.retention import open_segments
from litellm_sqlalchemy.status import spool_status

#: User and group of the gateway. The spool is the writer's, and the gateway's group may write in it.
GATEWAY = 65533
Plant = Callable[[str, str], None]


@pytest.fixture
def deployment(others_deployment: Deployment) -> Deployment:
    """Only the writer reads its own credential, and only root the others."""
    for path in (others_deployment.directory / "credentials").iterdir():
        if path.name != "writer.json":
            os.chown(path, 0, 0)
        path.chmod(0o600)
    os.chown(others_deployment.spool, OTHER, GATEWAY)
    others_deployment.spool.chmod(0o2770)
    return others_deployment


@pytest.fixture
def plant(deployment: Deployment) -> Plant:
    """Run a line of Python as the gateway, in the spool; it knows `os`, `json` and `target`."""

    def run(program: str, target: str) -> None:
        head = "import json, os, sys; target = sys.argv[1]; "
        command = [sys.executable, "-c", head + program, target]
        user = {"user": GATEWAY, "group": GATEWAY, "extra_groups": [], "umask": 0o007}
        subprocess.run(command, cwd=deployment.spool, check=True, **user)  # type: ignore[call-overload]

    return run


@pytest.mark.parametrize(
    ("planted", "verb"),
    [
        ("os.symlink(target, 'writer.lock')", ["validate"]),
        (
            "[os.symlink(target, f'.acknowledged.json.{os.getpid() + later}') for later in range(1000)]",
            ["status", "--acknowledge", "--spool-only"],
        ),
        (
            "[os.makedirs(name) for name in ('dead', 'producers/x')]\n"
            "name = os.path.relpath(target, 'dead').removesuffix('.json')\n"
            "json.dump([name], open('producers/x/requeued.json', 'w'))",
            ["dead-letters", "requeue"],
        ),
    ],
    ids=["overwrites a file", "gives a file away", "removes a file"],
)
def test_root_is_led_to_no_file_of_the_host(
    planted: str, verb: list[str], deployment: Deployment, plant: Plant, tmp_path: Path
) -> None:
    target = tmp_path / "of-root.json"
    target.write_text("{}")
    target.chmod(0o600)
    plant(planted, str(target))
    deployment.run(*verb, timeout=300)
    status = target.stat()
    assert (target.read_text(), status.st_uid, status.st_gid, status.st_mode & 0o777) == ("{}", 0, 0, 0o600)


def test_root_logs_in_as_root(deployment: Deployment, server: Server, database: Database) -> None:
    deployment.update(spool={"segment_size": 4096})  # so small that some are retired
    harness = Harness(server, database, deployment, WriterProcess(deployment))
    try:
        harness.writer.start(user=OTHER)
        harness.send(30)
        harness.settled()
        database.execute("UPDATE requests SET user_id = 'alice'")
        retired = list(deployment.spool.glob("retired/*/*.seg"))
        for segment in retired:
            os.chown(segment, GATEWAY, GATEWAY)
        times = [segment.stat().st_mtime_ns for segment in retired]
        for verb in (["status"], ["replay", "--since", "2026-01-01T00:00:00+00:00"], ["erase", "--user", "alice"]):
            done = deployment.run(*verb, timeout=300)
            assert (done.returncode, done.stderr) == (ExitCode.OK, ""), verb
        assert times
        assert [segment.stat().st_mtime_ns for segment in retired] == times
        assert database.count("requests") == 0
        report = deployment.run("validate", timeout=300).stdout
        for check in ("database.reachable", "database.plaintext_refused", "spool.writable", "writer.running"):
            assert f"OK     {check}" in report, report
    finally:
        harness.close()


def _link(file: Path) -> None:
    file.symlink_to(file.parents[3] / "writer.json")


@pytest.mark.parametrize(
    ("plant", "problem"), [(_link, "Too many levels of symbolic links"), (os.mkfifo, "Not a regular file")]
)
def test_nothing_is_read_through_a_link_or_waited_for(
    plant: Callable[[Path], None], problem: str, tmp_path: Path
) -> None:
    """What is no frame becomes a dead letter, which the gateway may read."""
    (tmp_path / "writer.json").write_text('{"user": "litellm_writer_a", "password": "correct horse"}')
    (tmp_path / "spool").mkdir()
    consumer = Consumer(tmp_path / "spool")
    folder = tmp_path / "spool/producers/x"
    folder.mkdir()
    for name in ("0000000001.seg", "origins.json", "counters.json", "state.json"):
        plant(folder / name)
    assert [batch.damages for batch in consumer.batches(10)] == []
    assert consumer.problem == f"{folder / '0000000001.seg'}: {problem}"
    assert read_origins(folder) == {}
    for reads in (
        lambda: spool_status(tmp_path / "spool"),
        lambda: oldest_waiting(folder, Cursor()),
        lambda: read_state(folder),
        lambda: [file.read() for _segment, file in open_segments(tmp_path / "spool", "r+b")],
    ):
        with pytest.raises(OSError, match=problem):
            reads()
    consumer.close()
