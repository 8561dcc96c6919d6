"""Dumps, while a gateway writes: whole or not there, and in nobody's way. The files' tests run in their order."""

import json
import subprocess
import time

import pytest
from conftest import ENVIRONMENT, PROJECT, play, stored
from helpers import DUMP, DUMPS, PLANTED, RUN, locks, newest, places_of, planted, wait_until

PARTIAL = f"timeout 120 sh -c 'until ls -d {DUMPS}/.partial-*; do :; done'"


def test_a_dump_under_load_equals_its_snapshot_and_is_encrypted(db, gateway, recovery_key):
    wait_until(lambda: len(stored(db)) > 20)
    db.run("systemctl start postgresql-backup-dump.service")
    manifest = json.loads(db.run(f"cat {DUMPS}/{newest(db)}/manifest.json"))
    assert manifest["databases"]["litellm"]["tables"]["public.requests"]["rows"] > 0
    assert db.try_run(f"grep -rla 'hello hello' {DUMPS} /var/lib/pgbackrest").stdout == ""
    assert "decrypted" in db.run("postgresql-backup verify --decrypt", recovery_key)
    with planted(db) as text:
        assert PLANTED in places_of(db, text, "/etc /var /root /run")
    assert places_of(db, recovery_key, "/etc /var /root /run") == []


#: Prints what a manifest would say of a table.
DIGEST = """
import sys
sys.path.insert(0, "/usr/local/lib/postgresql-backup")
from postgresql_backup.database import contents, session
from postgresql_backup.settings import load_settings
with session(load_settings(), "litellm") as connection:
    print(contents(connection)[sys.argv[1]])
"""


def test_a_digest_is_of_all_columns_whatever_their_names(db):
    db.sql("""CREATE TABLE "t ""ü" (t int, "count(*)" text); INSERT INTO "t ""ü" VALUES (1, 'a')""")
    found = []
    for value in "aba":
        db.sql(f"""UPDATE "t ""ü" SET "count(*)" = '{value}'""")
        found.append(db.run("python3 -IB - 'public.t \"ü'", DIGEST))
    db.sql('DROP TABLE "t ""ü"')
    assert found[0] == found[2] != found[1]


def test_the_backup_login_reads_and_does_nothing_else(db):
    assert (
        db.sql("SELECT rolsuper OR rolcreaterole OR rolcreatedb FROM pg_roles WHERE rolname LIKE 'litellm_backup__'")[0]
        == "f"
    )
    read = 'import json; print(json.load(open("/etc/postgresql-backup/database.json"))["%s"])'
    login = " ".join(f"PG{name.upper()}=$(python3 -c '{read % name}')" for name in ("user", "password"))
    for statement in ("DELETE FROM requests", "CREATE TABLE x ()", "CREATE ROLE x"):
        done = db.try_run(f"{login} psql -h /var/run/postgresql litellm -c '{statement}'")
        assert done.returncode
        assert "denied" in done.stderr or "read-only" in done.stderr


def test_a_dump_takes_longer_than_sessions_may(db):
    timeouts = ("transaction_timeout", "idle_session_timeout", "idle_in_transaction_session_timeout")
    roles = [f"ALTER ROLE litellm_backup_{letter}" for letter in "ab"]
    db.sql("; ".join(f"{role} SET {timeout} = '500ms'" for role in roles for timeout in timeouts))
    try:
        db.run(f"systemctl start {DUMP}")
    finally:
        db.sql("; ".join(f"{role} RESET {timeout}" for role in roles for timeout in timeouts))


@pytest.mark.parametrize("signal", ["KILL", "TERM"])
def test_an_interrupted_dump_is_never_promoted(db, signal):
    before = db.run(f"ls {DUMPS}")
    db.run("systemctl start --no-block postgresql-backup-dump.service")
    db.run(PARTIAL)
    db.try_run(
        f"systemctl kill --signal={signal} postgresql-backup-dump.service; systemctl stop postgresql-backup-dump"
    )
    assert db.run(f"ls {DUMPS}") == before
    assert db.try_run(f"ls -d {DUMPS}/.partial-*").stdout == ""
    assert db.try_run(f"ls {RUN}/configuration.tar").returncode


def test_a_dump_on_a_full_disk_is_never_promoted(db):
    # the copy that the last dump has started would note there what it has sent
    wait_until(lambda: db.run("systemctl show -P ActiveState postgresql-backup-copy") == "inactive")
    before = db.run(f"ls {DUMPS}")
    owner = "uid=$(id -u postgresql-backup),gid=$(id -g postgresql-backup)"
    needed = int(db.sql("SELECT pg_database_size('litellm')")[0])
    for size, word in ((65536, "nothing was begun"), (needed + 2**20, "no space left")):
        db.run(f"mount -t tmpfs -o size={size},mode=2750,{owner} none {DUMPS}")
        try:
            db.run("systemctl start --no-block postgresql-backup-dump.service")
            if size > needed:  # it fills up while the dump is written
                db.run(f"{PARTIAL}; head -c {size} /dev/zero > {DUMPS}/full || true")
            wait_until(lambda: db.run(f"systemctl show -P ActiveState {DUMP}") == "failed")
            assert db.run(f"ls -A {DUMPS}").split() in ([".lock"], [".lock", "full"])
            assert word in db.run("journalctl -u postgresql-backup-dump -n 20 --no-pager -o cat").lower()
        finally:
            db.run(f"umount {DUMPS}")
    assert db.run(f"ls {DUMPS}") == before


def test_what_overlaps_with_a_dump_is_safe(db, gateway, recovery_key):
    """The dump gives way to who alters a table; then it is stopped in its middle, and the rest happens meanwhile."""
    before = newest(db)
    db.sql("CREATE TABLE IF NOT EXISTS known (id int)")
    lock = "BEGIN; LOCK TABLE known; SELECT pg_sleep(900)"
    of_blocker = "relation = 'known'::regclass AND mode = 'AccessExclusiveLock'"
    release = f"SELECT pg_terminate_backend(pid) FROM pg_locks WHERE {of_blocker}"
    db.run(f"systemd-run --quiet --unit=blocker -- runuser -u postgres -- psql litellm -c '{lock}'")
    try:
        wait_until(lambda: locks(db, "known", "granted"))
        db.run(f"systemctl start --no-block {DUMP}")
        wait_until(lambda: locks(db, "known", "NOT granted"))
        reader = "SELECT pid FROM pg_stat_activity WHERE application_name = 'postgresql-backup'"
        assert locks(db, "requests", f"granted AND pid IN ({reader})")  # until it has read it, longer than pg_dump
        alter = "ALTER TABLE requests ADD COLUMN added int; ALTER TABLE requests DROP COLUMN added"
        began = int(time.time())
        db.sql(f"SET ROLE litellm_owner; SET lock_timeout = '10s'; BEGIN; {alter}; COMMIT")
        print(f"altered within {time.time() - began:.1f} s, beside a dump that has the table")
        wait_until(lambda: "gave way" in db.run(f"journalctl -u {DUMP} -n 5 -o cat --no-pager"))
        assert "lock timeout" not in gateway.run(f"journalctl -u litellm-log-writer --since=@{began} -o cat --no-pager")
        wait_until(lambda: locks(db, "known", "NOT granted"))
        db.run(f"systemctl kill --signal=STOP {DUMP}")
        db.sql(release)
        second = db.try_run("postgresql-backup prune")
        assert second.returncode == 5
        assert "is held by process" in second.stderr

        head = db.sql("SELECT version_num FROM alembic_version")[0]
        db.sql("UPDATE alembic_version SET version_num = '0001'")
        migration = gateway.try_run("litellm-sqlalchemy migrate")
        db.sql(f"UPDATE alembic_version SET version_num = '{head}'")
        assert migration.returncode
        assert "lock" in migration.stderr
        print(migration.stderr)

        rotation = subprocess.Popen(
            ["bash", "-c", play("rotate-secrets.yml", rotate_only="backup")],
            cwd=PROJECT, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT,
        )  # fmt: skip
        query = "SELECT count(*) FROM pg_roles WHERE rolname LIKE 'litellm_backup__' AND rolcanlogin"
        wait_until(lambda: db.sql(query) == ["2"])
    finally:
        db.sql(release)
        db.try_run(f"systemctl kill --signal=CONT {DUMP}")
    output, _ = rotation.communicate(timeout=300)
    assert rotation.returncode == 0, output[-4000:]
    assert db.sql(query) == ["1"]
    wait_until(lambda: newest(db) > before)
    db.run(f"systemctl start {DUMP}")
    assert "FAILED" not in db.run("postgresql-backup verify --decrypt", recovery_key)
