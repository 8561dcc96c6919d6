"""`prune` removes what is older than a moment, in batches, and keeps its sums."""

import json
from datetime import UTC, datetime, timedelta

import pytest
from support.postgresql import Database
from support.processes import Deployment
from support.records import BODY, request, response

from litellm_sqlalchemy import prune
from litellm_sqlalchemy.database import make_engine
from litellm_sqlalchemy.frames import Frame, Kind
from litellm_sqlalchemy.identifiers import uuid7
from litellm_sqlalchemy.store import Store

_NOW = datetime.now(UTC)


@pytest.fixture
def filled(deployment: Deployment) -> Deployment:
    """A deployment with calls of 0 to 39 days ago, each a minute before midnight; every fifth has no response."""
    frames = []
    for days in range(40):
        moment = _NOW.replace(hour=0, minute=0, second=0, microsecond=0) - timedelta(days=days, minutes=1)
        call, at = uuid7(int(moment.timestamp() * 1e9)).hex, int(moment.timestamp() * 1e6)
        frames.append(Frame(Kind.REQUEST, 0, request(call, call_id=f"{days}", created_at=at), BODY))
        if days % 5:
            frames.append(Frame(Kind.RESPONSE, 0, response(call, created_at=at, total_tokens=10), BODY))
    engine = make_engine(deployment.load().database, "writer", "test")
    assert Store(engine).deliver(frames).inserted == 72
    engine.dispose()
    return deployment


def _left(database: Database) -> list[int]:
    return sorted(int(call) for (call,) in database.query("SELECT call_id FROM requests"))


def test_what_is_older_goes_in_batches(filled: Deployment, database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prune, "_BATCH", 7)
    before = database.query("SELECT sum(calls), sum(total_tokens) FROM daily_usage")
    moment = _NOW.replace(hour=0, minute=0, second=0, microsecond=0) - timedelta(days=20)
    assert prune.prune(filled.load(), moment, dry_run=True) == 20
    assert len(_left(database)) == 40
    assert prune.prune(filled.load(), moment) == 20
    assert _left(database) == list(range(20))
    assert database.count("responses") == 16
    assert database.query("SELECT sum(calls), sum(total_tokens) FROM daily_usage") == before
    assert prune.prune(filled.load(), moment) == 0


def test_it_goes_on_where_it_was_broken_off(
    filled: Deployment, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each batch is a transaction of its own, requests and responses together."""
    monkeypatch.setattr(prune, "_BATCH", 7)
    database.execute("CREATE FUNCTION stop() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE 'stopped'; END $$")
    database.execute(
        "CREATE TRIGGER stop BEFORE DELETE ON requests FOR EACH ROW WHEN (OLD.call_id = '25') EXECUTE FUNCTION stop()"
    )
    with pytest.raises(Exception, match="stopped"):
        prune.prune(filled.load(), _NOW - timedelta(days=20))
    assert _left(database) == list(range(26))
    assert database.count("responses") == 20
    database.execute("DROP TRIGGER stop ON requests")
    prune.prune(filled.load(), _NOW - timedelta(days=20))
    assert max(_left(database)) in (18, 19)


def test_the_verb(filled: Deployment, database: Database) -> None:
    done = filled.run("prune", "--before", "31d", "--dry-run")
    assert (done.returncode, done.stdout.split(" from")[0]) == (0, "would remove the rows of 10 calls")
    assert json.loads(filled.run("prune", "--before", "31d", "--json").stdout)["calls"] == 10
    assert _left(database) == list(range(30))


def test_the_retention_of_the_settings(filled: Deployment, database: Database) -> None:
    """`prune` keeps to it by itself, and `validate` sees that nobody does."""

    def overdue() -> list[str]:
        checks = json.loads(filled.run("validate", "--json").stdout)["checks"]
        return [check["seen"] for check in checks if check["id"] == "calls.retention" and not check["ok"]]

    done = filled.run("prune")
    assert (done.returncode, done.stdout) == (2, "")
    assert "set `content.retention_days`" in done.stderr
    filled.update(content={"retention_days": 31})
    (seen,) = overdue()
    assert seen == f"there are calls of {_NOW - timedelta(days=40):%Y-%m-%d}, and 31 days are kept"
    assert json.loads(filled.run("prune", "--json").stdout)["calls"] == 10
    assert _left(database) == list(range(30))
    assert overdue() == []


@pytest.mark.parametrize("moment", ["1h", "1d", "2999-01-01", "soon"])
def test_calls_that_may_still_run_are_not_removed(filled: Deployment, database: Database, moment: str) -> None:
    done = filled.run("prune", "--before", moment)
    assert (done.returncode, done.stdout) == (2, "")
    assert ("is not a day ago: calls may still run" in done.stderr) == (moment != "soon")
    assert len(_left(database)) == 40
