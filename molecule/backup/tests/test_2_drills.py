"""Drills find every damage, and touch nothing but their spare cluster."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest
from helpers import (
    BASE,
    DRILL,
    DUMPS,
    INCREMENTAL,
    MARK,
    RUN,
    locks,
    newest,
    wait_until,
    without_marking,
    without_segment,
)


def test_both_drills_are_green_and_leave_nothing(db):
    db.run(f"systemctl start {BASE} && systemctl start {INCREMENTAL}")
    for kind in ("dump", "base"):
        report = db.drill(kind)
        assert report["ok"], report["message"]
        assert report["recovery_seconds"] < 600
        print(report["message"])
    assert db.run("ls -A /var/lib/postgresql-drill").split() == [".lock", "base.json", "dump.json"]
    assert db.try_run("pgrep -u postgresql-drill").stdout == ""
    assert db.sql("SELECT count(*) FROM backup.restore_drills WHERE ok", database="backup") == ["2"]
    db.run("systemctl start postgresql-backup-status.service")
    assert 'check="drill.base"} 1' in db.run("cat /var/lib/prometheus/node-exporter/postgresql_backup.prom")


@pytest.mark.parametrize("kind", ["dump", "base"])
def test_a_drill_that_might_fill_the_disk_of_the_server_is_not_begun(db, kind):
    """Not even with twice the room of the data: an empty cluster and WAL come on top."""
    data = int(db.sql("SELECT sum(pg_database_size(oid)) FROM pg_database")[0])
    owner = "uid=$(id -u postgresql-drill),gid=$(id -g postgresql-backup)"
    db.run(f"mount -t tmpfs -o size={2 * data},mode=2750,{owner} none {DRILL}")
    try:
        report = db.drill(kind)
    finally:
        db.run(f"umount {DRILL}")
    assert "nothing was begun" in report["message"]


def test_a_drill_cannot_reach_the_live_cluster(db):
    properties = db.run(
        "systemctl show postgresql-backup-drill@dump.service -p PrivateNetwork,User,InaccessiblePaths,MemoryMax"
    )
    assert "PrivateNetwork=yes" in properties
    assert "User=postgresql-drill" in properties
    assert "/run/postgresql" in properties
    refused = db.try_run("runuser -u postgres -- /usr/local/bin/postgresql-backup drill dump")
    assert refused.returncode == 7


FLIP = "import sys; f = open(sys.argv[1], 'r+b'); f.seek(5000); b = f.read(1); f.seek(5000); f.write(bytes([b[0] ^ 1]))"
#: Makes a manifest say of a file what it is.
ADAPT = """import hashlib, json, sys; b = open(sys.argv[2], "rb").read(); m = json.load(open(sys.argv[1]))
m["files"]["litellm.dump.age"].update(size=len(b), sha256=hashlib.sha256(b).hexdigest())
json.dump(m, open(sys.argv[1], "w"))"""
EDIT = "import json, sys; m = json.load(open(sys.argv[1])); exec(sys.argv[2]); json.dump(m, open(sys.argv[1], 'w'))"


@pytest.mark.parametrize(
    ("corruption", "word", "command"),
    [
        ("truncated", "truncated", "truncate -s -100 $D/litellm.dump.age"),
        ("bit-flipped", "was changed", f'python3 -c "{FLIP}" $D/litellm.dump.age'),
        ("empty", "empty", "truncate -s 0 $D/litellm.dump.age"),
        ("stale", "stale", f'python3 -c "{EDIT}" $D/manifest.json \'m["started_at"] = "2026-01-01T00:00:00+00:00"\''),
        ("wrong version", "wrong version", f'python3 -c "{EDIT}" $D/manifest.json \'m["server_version"] = "16.4"\''),
        (
            "other content",
            "another content",
            f'python3 -c "{EDIT}" $D/manifest.json '
            '\'m["databases"]["litellm"]["tables"]["public.requests"]["digest"] = "0"\'',
        ),
        (
            "a table emptied",
            "public.responses has 0 rows instead of",
            "K=$(age-keygen -y /run/postgresql-backup/keys/$N.key); rm $D/litellm.dump.age;"
            " runuser -u postgres -- pg_dump -Fc --exclude-table-data=responses litellm"
            " | age -r $K > $D/litellm.dump.age;"
            f" python3 -c '{ADAPT}' $D/manifest.json $D/litellm.dump.age",
        ),
        ("wrong key", "cannot be decrypted", f"age-keygen 2>/dev/null | grep AGE > {RUN}/keys/$N.key"),
    ],
)
def test_a_corrupt_dump_turns_the_drill_red_and_is_kept(db, corruption, word, command):
    name = newest(db)
    db.run(f"rm -rf /root/good; cp -a {DUMPS}/{name} /root/good; cp -a {RUN}/keys/{name}.key /root/good.key")
    before = db.run(f"ls {DUMPS}")
    try:
        db.run(f"D={DUMPS}/{name} N={name}; {command}")
        report = db.drill("dump")
        assert not report["ok"], corruption
        assert word in report["message"]
        assert db.run(f"ls {DUMPS}") == before
    finally:
        db.run(f"rm -rf {DUMPS}/{name}; cp -a /root/good {DUMPS}/{name}; cp -a /root/good.key {RUN}/keys/{name}.key")


REPOSITORY = "/var/lib/pgbackrest/backup/main"
SETTINGS = "/etc/postgresql-backup/settings.json"
#: The largest file of the newest full backup.
LARGEST = (
    f"$(find $(ls -d {REPOSITORY}/*F | tail -n 1) -type f -printf '%s %p\\n' | sort -n | tail -n 1 | cut -d' ' -f2)"
)


@pytest.mark.parametrize(
    ("damage", "words", "file", "command"),
    [
        ("truncated", "base backup", LARGEST, "truncate -s -1000 $FILE"),
        ("bit-flipped", "base backup", LARGEST, f'python3 -c "{FLIP}" $FILE'),
        ("empty", "there is no base backup", f"{REPOSITORY}/backup.info", f"mv {REPOSITORY} {REPOSITORY}.gone"),
        ("stale", "is stale", SETTINGS, 'sed -i \'s/"base_backup": [0-9]*/"base_backup": 0/\' $FILE'),
        ("wrong version", "wrong version", SETTINGS, 'sed -i \'s/^{/{"version": "16",/\' $FILE'),
        (
            "wrong key",
            "repository 1 cannot be read",
            "/etc/postgresql-backup/drill-pgbackrest.conf",
            "sed -i 's/cipher-pass=/&x/' $FILE",
        ),
    ],
)
def test_a_damaged_base_backup_turns_the_drill_red_and_is_kept(db, damage, words, file, command):
    before = db.run("postgresql-backup list | grep ^base")
    name = db.run(f"F={file}; cp -a $F /root/undamaged; echo $F")
    try:
        db.run(f"FILE={name}; {command}")
        report = db.drill("base")
    finally:
        db.run(f"[ ! -e {REPOSITORY}.gone ] || mv {REPOSITORY}.gone {REPOSITORY}; cp -a /root/undamaged {name}")
    print(report["message"])
    assert not report["ok"], damage
    assert words in report["message"]
    assert db.run("postgresql-backup list | grep ^base") == before


def test_a_table_that_comes_back_empty_turns_the_drill_of_the_base_backup_red(db):
    """The marker is of the emptied table; what it says of the content is of before."""
    marker = f"{RUN}/server/marker.json"
    db.sql("CREATE TABLE emptied AS SELECT generate_series(1, 100) AS id")
    db.run("systemctl start postgresql-backup-mark.service")
    before = json.loads(db.run(f"cat {marker}"))
    db.sql("TRUNCATE emptied")
    db.run("systemctl start postgresql-backup-mark.service")
    after = json.loads(db.run(f"cat {marker}"))
    after["databases"] = before["databases"]
    with without_marking(db):
        db.run(f"cat > {marker}", json.dumps(after))
        report = db.drill("base")
    db.sql("DROP TABLE emptied")
    assert not report["ok"]
    assert "table public.emptied has 0 rows instead of 100" in report["message"]


def test_a_base_backup_that_ended_since_the_marker_is_not_drilled(db):
    db.run("systemctl start postgresql-backup-mark.service")
    with without_marking(db):
        db.run(f"systemctl start {INCREMENTAL}")
        newer = db.run("postgresql-backup list | grep '^base.*repository 1' | tail -n 1 | cut -d' ' -f3")
        report = db.drill("base")
    assert report["ok"], report["message"]
    assert report["backup"] < newer


#: Writes as a batch does: into `requests` first, and when the marker waits for that, into what a trigger writes to.
BATCH = """BEGIN; LOCK TABLE requests IN ROW EXCLUSIVE MODE;
DO $$ BEGIN
WHILE NOT EXISTS (SELECT FROM pg_locks WHERE relation = 'requests'::regclass AND mode = 'ShareLock')
LOOP PERFORM pg_sleep(0.05); END LOOP;
END $$;
LOCK TABLE daily_usage IN ROW EXCLUSIVE MODE; COMMIT"""


def test_a_marker_and_who_writes_into_several_tables_do_not_wait_for_each_other(db):
    own = "pid IN (SELECT pid FROM pg_stat_activity WHERE application_name = 'psql')"
    with ThreadPoolExecutor() as pool:
        batch = pool.submit(db.sql, BATCH)
        wait_until(lambda: locks(db, "requests", f"mode = 'RowExclusiveLock' AND {own}"))
        db.run(f"systemctl start {MARK}")
        batch.result()


def test_a_marker_waits_for_who_writes_for_long(db):
    lock = "BEGIN; LOCK TABLE alembic_version IN ROW EXCLUSIVE MODE; SELECT pg_sleep(900)"
    held = "relation = 'alembic_version'::regclass AND mode = 'RowExclusiveLock'"
    db.run(f"systemd-run --quiet --collect --unit=blocker -- runuser -u postgres -- psql litellm -c '{lock}'")
    try:
        wait_until(lambda: locks(db, "alembic_version", "mode = 'RowExclusiveLock'"))
        db.run(f"rm -f {RUN}/server/marker.json; systemctl start --no-block {MARK}")
        wait_until(lambda: "trying again" in db.run(f"journalctl -u {MARK} -n 3 -o cat --no-pager"))
    finally:
        db.sql(f"SELECT pg_terminate_backend(pid) FROM pg_locks WHERE {held}")
    wait_until(lambda: db.run(f"systemctl show -P ActiveState {MARK}") == "inactive")
    assert "alembic_version" in db.run(f"cat {RUN}/server/marker.json")


def test_a_killed_drill_is_red_and_leaves_nothing(db):
    db.run("systemctl start --no-block postgresql-backup-drill@base.service")
    db.run(f"timeout 120 sh -c 'until [ -e {DRILL}/spare/data/base ]; do :; done'")
    db.run("systemctl kill --signal=KILL postgresql-backup-drill@base.service")
    wait_until(lambda: db.run("systemctl show -P ActiveState postgresql-backup-drill@base") == "failed")
    assert set(db.run(f"ls -A {DRILL}").split()) <= {".lock", "base.json", "dump.json"}
    report = json.loads(db.run(f"cat {DRILL}/base.json"))
    assert not report["ok"]
    assert "did not come to its end" in report["message"]


def test_a_failing_archive_is_told_long_before_the_disk_is_full(db):
    metrics = "/var/lib/prometheus/node-exporter/postgresql_backup.prom"
    # not the size of pg_wal: segments that were kept for use again are taken first
    waiting = f"grep ^postgresql_backup_archive_waiting {metrics} | cut -d' ' -f2"
    archive = "/var/lib/pgbackrest/archive"
    db.run(
        f'sed \'s/"wal_room": [0-9]*/"wal_room": 9999999999/\' {SETTINGS} > /tmp/s.json; mv {archive} {archive}.gone'
    )
    try:
        for _ in range(6):
            db.sql("SELECT pg_current_xact_id(); SELECT pg_switch_wal()")
        failing = "SELECT last_failed_time > coalesce(last_archived_time, '-infinity') FROM pg_stat_archiver"
        wait_until(lambda: db.sql(failing) == ["t"])
        [ready] = db.sql("SELECT count(*) FROM pg_ls_archive_statusdir() WHERE name LIKE '%.ready'")
        assert int(ready) >= 5  # the first switch may have found an empty segment
        db.run("systemctl start postgresql-backup-status.service")
        assert float(db.run(waiting)) >= int(ready)
        assert 'postgresql_backup_check{check="archive.working"} 0' in db.run(f"cat {metrics}")
        said = db.try_run("postgresql-backup --settings /tmp/s.json status").stdout
        assert "FAILED archive.working" in said
        assert "without an archive the disk is full in" in said
    finally:
        db.run(f"rm -rf {archive}; mv {archive}.gone {archive}")
    db.sql("SELECT pg_current_xact_id(); SELECT pg_switch_wal()")  # wakes the archiver
    wait_until(
        lambda: db.sql("SELECT NOT EXISTS (SELECT FROM pg_ls_archive_statusdir() WHERE name LIKE '%.ready')") == ["t"]
    )
    assert "OK     archive.working" in db.try_run("postgresql-backup status").stdout


def test_a_base_backup_and_its_marker_wait_for_an_archive_that_lags(db):
    """Longer than the minute that pgBackRest allows it."""
    archiver = db.sql("SELECT pid FROM pg_stat_activity WHERE backend_type = 'archiver'")[0]
    db.run(f"kill -STOP {archiver}; systemctl start --no-block {INCREMENTAL}")
    try:
        backup = f"ps -o etimes= -p $(systemctl show -P MainPID {INCREMENTAL})"
        wait_until(lambda: int(db.try_run(backup).stdout or 0) > 65)
    finally:
        db.run(f"kill -CONT {archiver}")
    wait_until(lambda: db.run(f"systemctl show -P ActiveState {INCREMENTAL}") != "activating")
    assert db.run(f"systemctl show -P Result {INCREMENTAL}") == "success"


def test_missing_wal_turns_the_drill_red(db):
    db.run("systemctl start postgresql-backup-mark.service")
    with without_segment(db):
        report = db.drill("base")
    assert not report["ok"]
    assert "WAL is missing" in report["message"]


def test_without_damage_the_drills_are_green_again(db):
    for kind in ("dump", "base"):
        report = db.drill(kind)
        assert report["ok"], report["message"]


def test_an_interrupted_base_backup_is_never_listed(db):
    before = db.run("postgresql-backup list | grep ^base")
    db.run("systemctl start --no-block postgresql-backup-base@full.service")
    # [b]: without it pgrep finds the shell that waits
    db.run("timeout 120 sh -c 'until pgrep -u postgres -f \"type=full [b]ackup\"; do :; done'")
    db.try_run(f"systemctl kill --signal=KILL {BASE}; systemctl stop {BASE}")
    assert db.run("postgresql-backup list | grep ^base") == before
    db.run(f"systemctl reset-failed; systemctl start {BASE}")
    assert before in db.run("postgresql-backup list | grep ^base")
