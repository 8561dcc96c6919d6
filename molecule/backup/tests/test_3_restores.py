"""Restores: exactly what was asked for, or one clear message; and their promotion."""

import json

import pytest
from conftest import changes, controller, play, stored
from helpers import BASE, RUN, now, wait_until, without_segment


def test_a_restore_between_two_rows_returns_exactly_the_first(db):
    db.sql("INSERT INTO known VALUES (1)")
    targets = {"lsn": db.sql("SELECT pg_current_wal_flush_lsn()")[0], "time": now(db), "point": "between"}
    db.run("postgresql-backup mark between")
    db.sql("INSERT INTO known VALUES (2)")
    db.run("postgresql-backup mark")
    db.run("systemctl start postgresql-backup-base@incr.service")  # behind all of the targets
    for kind, target in targets.items():
        print(db.run(f"postgresql-backup restore --{kind} {target}"))
        assert db.sql("SELECT id FROM known", 5433) == ["1"], kind
        db.run("postgresql-backup discard")


def test_a_restore_to_the_newest_loses_no_committed_row(db):
    before = stored(db)
    db.run("postgresql-backup restore --repository 2")
    assert before <= stored(db, 5433)
    db.run("postgresql-backup discard")


def test_a_lost_table_comes_back(db, runbook):
    before = now(db)
    db.sql("DROP TABLE known")
    runbook.run("restore_time", values=(before,))
    again = controller(play("restore-backup.yml", restore_target="db1"), check=False)
    assert "is there already, and a restore overwrites nothing" in again
    runbook.run("pg_dump", on=db, user="postgres", values=("public.known",))
    assert db.sql("SELECT id FROM known ORDER BY id") == ["1", "2"]
    runbook.run("discard-restored")
    assert db.run("pg_lsclusters -h | wc -l") == "1"


#: A promotion that is killed behind a step.
KILLED = """
import os, sys
sys.path.insert(0, "/usr/local/lib/postgresql-backup")
from postgresql_backup.restore import Promotion, promote
from postgresql_backup.settings import load_settings
step = getattr(Promotion, sys.argv[1])
def last(self):
    step(self)
    os.kill(os.getpid(), 9)
setattr(Promotion, sys.argv[1], last)
promote(load_settings(), 5433)
"""


def test_a_killed_restore_is_not_promoted_and_leaves_nothing(db):
    begun = "until [ -e /var/lib/postgresql/17/restored/base ]; do :; done"
    db.run(f"setsid postgresql-backup restore > /dev/null & P=$!; timeout 120 sh -c '{begun}'; kill -9 -- -$P")
    assert "did not come to its end: nothing was promoted" in db.try_run("postgresql-backup promote").stderr
    db.run("postgresql-backup restore --background")  # removes what the killed one left
    db.run(f"timeout 120 sh -c 'until [ -e /var/lib/postgresql-backup/restored.json ]; do :; done; {begun}'")
    db.run("systemctl kill --signal=KILL postgresql-backup-restore.service")
    said = json.loads(db.run("postgresql-backup progress --wait 60"))
    assert said["phase"] == "failed"
    assert "was killed" in said["message"]
    assert db.run("pg_lsclusters -h | wc -l; ls /var/lib/postgresql/17") == "1\nmain"
    assert "there is no restored cluster" in db.try_run("postgresql-backup promote").stderr


def test_archived_wal_that_is_missing_is_said_and_not_promoted(db):
    db.run("postgresql-backup mark && postgresql-backup mark && postgresql-backup mark")
    with without_segment(db, newer=1):
        said = db.run("postgresql-backup restore")
    assert "and one before it is missing" in said
    assert "lacks WAL after" in db.try_run("postgresql-backup promote").stderr
    db.run("postgresql-backup discard")


def test_a_lost_database_comes_back_and_the_spools_bring_what_its_recovery_point_lost(db, gateway, runbook):
    point, written = now(db), len(gateway.calls())
    wait_until(lambda: len(gateway.calls()) > written + 40)
    gateway.stop()
    calls = gateway.calls()
    assert calls <= stored(db)
    assert "Missing:" in controller(play("restore-backup.yml", restore_target="db1", restore_time=point))
    other = {"who": "other@elsewhere", "machine": "elsewhere", "process": "1", "started": "1"}
    db.run("cat > /run/litellm-gateway.lock", json.dumps(other))
    assert "other@elsewhere" in runbook.run("promote-restored", check=False)
    db.run("rm /run/litellm-gateway.lock")
    hold = f"flock {RUN}/server/base-backup.lock sleep infinity"  # a promotion's own base backup is refused
    db.run(f"systemd-run --quiet --unit=holder {hold}")
    for step in ("stop", "set_aside", "put", "configure", "start", "adopt"):
        assert db.try_run(f"python3 -IB - {step}", KILLED).returncode == -9, step
    for verb in ("restore", "discard"):
        assert "promotion did not come to its end" in db.try_run(f"postgresql-backup {verb}").stderr
    assert "Put it into its place" in str(changes(runbook.run("promote-restored")))
    assert changes(runbook.run("site.yml")) == []
    assert changes(controller(play("litellm.yml"))) == []  # alone: no other play has asked the database's host
    lost = calls - stored(db)
    assert lost
    print(len(lost), "lost:", runbook.run("replay", on=gateway, values=(point,)))
    assert calls <= stored(db)
    again = gateway.run(f"litellm-sqlalchemy replay --since {point} --json")
    assert json.loads(again)["restored"] == 0
    history = "/var/lib/postgresql/17/main/pg_wal/archive_status/*.history.done"
    wait_until(lambda: db.try_run(f"ls {history}").returncode == 0)
    db.run("postgresql-backup restore")  # begins with a base backup of before the promotion
    assert calls <= stored(db, 5433)
    db.run("postgresql-backup discard")
    assert "base-backup.lock is held" in db.run(f"journalctl -u {BASE} -n 5 -o cat --no-pager")
    db.run(f"systemctl stop holder; systemctl start {BASE}")
    gateway.start()


def test_a_promoted_dump_lets_everybody_in_and_gets_a_base_backup(db, gateway, runbook, recovery_key):
    point = now(db)
    db.run("systemctl start postgresql-backup-dump.service")
    db.run("postgresql-backup restore --from dump", recovery_key)
    gateway.stop()
    db.run("postgresql-backup promote")
    assert "holds no base backup of the present cluster" in db.try_run("postgresql-backup restore").stderr
    runbook.run("site.yml")
    print(runbook.run("replay", on=gateway, values=(point,)))
    gateway.start()
    wait_until(lambda: gateway.calls() & stored(db))
    before = stored(db)
    db.run("postgresql-backup restore")
    assert before <= stored(db, 5433)
    db.run("postgresql-backup discard")


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ("--time yesterday", "is no time"),
        ("--time 2020-01-01T00:00:00+00:00", "a recovery can go to any time after"),
        ("--time 2099-01-01T00:00:00+00:00", "a recovery can go to any time after"),
        ("--lsn 0/1", "a recovery can go to any time after"),
        ("--point nosuch", "there is no point nosuch; the last ones are"),
        ("--repository 7", "no base backup"),
        ("--from dump", "recovery key is missing"),
        ("--from dump --dump 20200101T000000Z", "there is no dump"),
    ],
)
def test_what_cannot_be_restored_is_one_clear_message(db, recovery_key, arguments, word):
    done = db.try_run(f"postgresql-backup restore {arguments}", recovery_key if "--dump" in arguments else "")
    assert done.returncode
    assert word in done.stderr
    assert done.stderr.count("\n") == 1
    assert db.run("pg_lsclusters -h | wc -l") == "1"


def test_a_missing_key_a_wrong_key_and_a_full_disk_are_one_clear_message(db):
    said = controller(
        play("restore-backup.yml", restore_target="db1", restore_from="dump", vault_postgresql_backup_identity=""),
        check=False,
    )
    assert "the recovery key is missing" in said
    wrong = db.run("age-keygen 2>/dev/null | grep AGE")
    assert "cannot be decrypted" in db.try_run("postgresql-backup restore --from dump", wrong).stderr
    small = "mount -t tmpfs -o size=1m none /var/lib/postgresql/17 && postgresql-backup restore"
    full = db.try_run(f"unshare --mount sh -c '{small}'").stderr
    assert "nothing was begun" in full
    assert full.count("\n") == 1
    assert db.run("pg_lsclusters -h | wc -l") == "1"
