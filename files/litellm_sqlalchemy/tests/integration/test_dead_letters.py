"""Dead letters: listed with their reason, requeued once it is mended, never lost on the way."""

import json

from support.oracle import check
from support.postgresql import Database
from support.processes import OTHER, Deployment, WriterProcess
from support.records import BODY, Ledger, request, response
from support.waiting import wait_until

from litellm_sqlalchemy.dead_letters import REQUEUED_FILE
from litellm_sqlalchemy.frames import Kind
from litellm_sqlalchemy.identifiers import uuid7
from litellm_sqlalchemy.producer import Producer
from litellm_sqlalchemy.status import spool_status


def _refused(deployment: Deployment, database: Database) -> tuple[Ledger, list[str]]:
    """Send three good calls and two that a constraint refuses."""
    database.execute("ALTER TABLE requests ADD CONSTRAINT no_odd CHECK (model <> 'odd')")
    ledger = Ledger()
    producer = Producer(deployment.load().spool)
    ledger.send(producer, 3)
    calls = [uuid7().hex for _ in range(2)]
    for call in calls:
        ledger.append(producer, Kind.REQUEST, call, request(call, model="odd"), BODY)
        ledger.append(producer, Kind.RESPONSE, call, response(call), BODY)
    producer.close()
    return ledger, calls


def _mended(database: Database) -> None:
    database.execute("ALTER TABLE requests DROP CONSTRAINT no_odd")


def test_list_and_requeue(deployment: Deployment, database: Database, writer: WriterProcess) -> None:
    ledger, calls = _refused(deployment, database)
    writer.start()
    wait_until(lambda: not spool_status(deployment.spool).spooled, "the spool is drained")
    assert check(ledger, database, deployment.spool).dead == 4

    listed = json.loads(deployment.run("dead-letters", "list", "--json").stdout)
    assert [letter["kind"] for letter in listed] == ["request", "request", "response", "response"]
    assert {letter["call"] for letter in listed} == set(calls)
    assert "no_odd" in listed[0]["reason"]
    lines = deployment.run("dead-letters").stdout.splitlines()
    assert [line.split()[0] for line in lines] == [letter["id"] for letter in listed]
    assert deployment.run("status").returncode == 1

    _mended(database)
    first = next(letter["id"] for letter in listed if letter["call"] == calls[0])
    done = deployment.run("dead-letters", "requeue", first)
    assert (done.returncode, done.stdout) == (0, "2 dead letters requeued\n"), "a request and its response go together"
    assert deployment.run("dead-letters", "requeue").stdout == "2 dead letters requeued\n"
    assert deployment.run("dead-letters").stdout == "no dead letters\n"
    wait_until(lambda: database.count("responses") == 5, "the requeued calls are stored")
    wait_until(lambda: not list((deployment.spool / "producers").iterdir()), "their folders are removed")
    assert check(ledger, database, deployment.spool).dead == 0
    assert deployment.run("status").returncode == 0


def test_requeued_too_early_they_die_again(deployment: Deployment, database: Database, writer: WriterProcess) -> None:
    ledger, _ = _refused(deployment, database)
    writer.start()
    wait_until(lambda: not spool_status(deployment.spool).spooled, "the spool is drained")
    deployment.run("dead-letters", "requeue")
    wait_until(lambda: not list((deployment.spool / "producers").iterdir()), "they are tried again")
    assert check(ledger, database, deployment.spool).dead == 4


def test_requeue_killed_before_the_letters_are_removed(
    deployment: Deployment, database: Database, writer: WriterProcess
) -> None:
    ledger, _ = _refused(deployment, database)
    writer.start()
    wait_until(lambda: not spool_status(deployment.spool).spooled, "the spool is drained")
    assert writer.stop() == 0
    kept = {file: file.read_bytes() for file in (deployment.spool / "dead").iterdir()}
    deployment.run("dead-letters", "requeue")
    [folder] = (deployment.spool / "producers").iterdir()
    for file, content in kept.items():
        file.write_bytes(content)
    (folder / REQUEUED_FILE).write_text(json.dumps([file.stem for file in kept]))
    assert deployment.run("dead-letters", "requeue").stdout == "0 dead letters requeued\n"
    _mended(database)
    writer.start()
    wait_until(lambda: not folder.exists(), "they are stored")
    assert check(ledger, database, deployment.spool).duplicates == 0


def test_unknown_and_damaged_letters(deployment: Deployment) -> None:
    Producer(deployment.load().spool).close()
    done = deployment.run("dead-letters", "requeue", "nobody")
    assert done.returncode == 1
    assert "no dead letter nobody" in done.stderr
    (deployment.spool / "dead").mkdir(exist_ok=True)
    (deployment.spool / "dead" / "x-1.json").write_text('{"frame": "', encoding="ascii")
    done = deployment.run("dead-letters")
    assert (done.returncode, done.stderr.count("\n")) == (6, 1)
    assert "x-1.json is damaged" in done.stderr


def test_requeued_by_root_for_a_writer_that_is_not(others_deployment: Deployment, database: Database) -> None:
    """What root makes in the spool belongs to those that share it, whatever root's umask is."""
    deployment, writer = others_deployment, WriterProcess(others_deployment)
    ledger, _ = _refused(deployment, database)
    try:
        writer.start(user=OTHER)
        wait_until(lambda: spool_status(deployment.spool).dead == 4, "the letters are there")
        _mended(database)
        assert deployment.run("dead-letters", "requeue").stdout == "4 dead letters requeued\n"
        wait_until(lambda: database.count("responses") == 5, "the requeued calls are stored")
        wait_until(lambda: not list((deployment.spool / "producers").iterdir()), "their folders are removed")
        assert writer.health() == {"status": "ok"}
        assert check(ledger, database, deployment.spool).dead == 0
        assert {path.stat().st_uid for path in deployment.spool.rglob("*")} == {OTHER}
        assert not [path for path in deployment.spool.rglob("*") if path.stat().st_mode & 0o007]
    finally:
        writer.kill()


def test_requeued_while_the_call_runs(deployment: Deployment, database: Database, writer: WriterProcess) -> None:
    """The call has no answer yet: it must not be told to be interrupted while its gateway lives."""
    database.execute("ALTER TABLE requests ADD CONSTRAINT no_odd CHECK (model <> 'odd')")
    writer.start()
    producer, ledger, call = Producer(deployment.load().spool), Ledger(), uuid7().hex
    ledger.append(producer, Kind.REQUEST, call, request(call, model="odd"), BODY)
    for mended in (False, True):
        wait_until(lambda: spool_status(deployment.spool).dead == 1, "the request is refused")
        if mended:
            _mended(database)
        deployment.run("dead-letters", "requeue")
        wait_until(lambda: len(list((deployment.spool / "producers").iterdir())) == 1, "it is tried again")
    assert (database.count("requests"), database.count("responses")) == (1, 0)
    ledger.append(producer, Kind.RESPONSE, call, response(call), BODY)
    wait_until(lambda: database.count("responses") == 1, "the answer is stored")
    assert database.query("SELECT status FROM responses") == [("success",)]
    producer.close()
    wait_until(lambda: not list((deployment.spool / "producers").iterdir()), "all is delivered")
    assert check(ledger, database, deployment.spool).interrupted == 0
