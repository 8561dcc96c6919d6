"""The command against a real database."""

from support.processes import Deployment, WriterProcess


def test_migrate_again_has_nothing_to_do(deployment: Deployment) -> None:
    done = deployment.run("migrate")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith(": nothing to do\n")


def test_write(writer: WriterProcess) -> None:
    writer.start()
    assert writer.health() == {"status": "ok"}
    assert writer.stop() == 0
