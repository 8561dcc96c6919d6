"""Backups are good when they come back: while a gateway writes, in this order."""

import json
import time
from datetime import UTC, datetime

import pytest
from conftest import stored

DUMPS = "/var/backups/postgresql"
RUN = "/run/postgresql-backup"


def newest(db):
    return db.run(f"ls {DUMPS} | tail -n 1")


def now(db):
    return db.sql("SELECT to_char(clock_timestamp() AT TIME ZONE 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS.US\"+00:00\"')")[0]


def test_a_dump_under_load_equals_its_snapshot_and_is_encrypted(db, gateway, recovery_key):
    time.sleep(3)
    db.run("systemctl start postgresql-backup-dump.service")
    manifest = json.loads(db.run(f"cat {DUMPS}/{newest(db)}/manifest.json"))
    assert manifest["databases"]["litellm"]["tables"]["public.requests"]["rows"] > 0
    assert db.try_run(f"grep -rla 'hello hello' {DUMPS} /var/lib/pgbackrest").stdout == ""
    assert "decrypted" in db.run("postgresql-backup verify --decrypt", recovery_key)
    assert db.try_run(f"grep -rla {recovery_key[:40]} /etc /var /root /run --exclude-dir=proc").stdout == ""


def test_the_backup_login_reads_and_does_nothing_else(db):
    assert (
        db.sql("SELECT rolsuper OR rolcreaterole OR rolcreatedb FROM pg_roles WHERE rolname LIKE 'litellm_backup__'")[0]
        == "f"
    )
    for statement in ("DELETE FROM requests", "CREATE TABLE x ()", "CREATE ROLE x"):
        read = 'import json; print(json.load(open("/etc/postgresql-backup/database.json"))["password"])'
        done = db.try_run(
            f"PGPASSWORD=$(python3 -c '{read}')"
            f" psql -h /var/run/postgresql -U litellm_backup_a litellm -c '{statement}'"
        )
        assert done.returncode
        assert "denied" in done.stderr or "read-only" in done.stderr


def test_both_drills_are_green_and_leave_nothing(db):
    db.run("systemctl start postgresql-backup-base@full.service")
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
        ("wrong key", "cannot be decrypted", f"age-keygen 2>/dev/null | grep AGE > {RUN}/$N.key"),
    ],
)
def test_a_corrupt_dump_turns_the_drill_red_and_is_kept(db, corruption, word, command):
    name = newest(db)
    db.run(f"rm -rf /root/good; cp -a {DUMPS}/{name} /root/good; cp -a {RUN}/{name}.key /root/good.key")
    before = db.run(f"ls {DUMPS}")
    try:
        db.run(f"D={DUMPS}/{name} N={name}; {command}")
        report = db.drill("dump")
        assert not report["ok"], corruption
        assert word in report["message"]
        assert db.run(f"ls {DUMPS}") == before
    finally:
        db.run(f"rm -rf {DUMPS}/{name}; cp -a /root/good {DUMPS}/{name}; cp -a /root/good.key {RUN}/{name}.key")


def test_missing_wal_turns_the_drill_red(db):
    db.run("systemctl start postgresql-backup-mark.service")
    segment = db.run("find /var/lib/pgbackrest/archive/main -name '0*-*' | sort | tail -n 1")
    db.run(f"mv {segment} /root/segment")
    try:
        report = db.drill("base")
    finally:
        db.run(f"mv /root/segment {segment}")
    assert not report["ok"]
    assert "WAL is missing" in report["message"]


@pytest.mark.parametrize("signal", ["KILL", "TERM"])
def test_an_interrupted_dump_is_never_promoted(db, signal):
    before = db.run(f"ls {DUMPS}")
    db.run("systemctl start --no-block postgresql-backup-dump.service")
    db.run(f"timeout 20 sh -c 'until ls -d {DUMPS}/.partial-*; do :; done'")
    db.try_run(
        f"systemctl kill --signal={signal} postgresql-backup-dump.service; systemctl stop postgresql-backup-dump"
    )
    assert db.run(f"ls {DUMPS}") == before


def test_a_dump_on_a_full_disk_is_never_promoted(db):
    before = db.run(f"ls {DUMPS}")
    owner = "uid=$(id -u postgresql-backup),gid=$(id -g postgresql-backup)"
    db.run(f"mount -t tmpfs -o size=64k,mode=2750,{owner} none {DUMPS}")
    try:
        assert db.try_run("systemctl start postgresql-backup-dump.service").returncode
        assert db.run(f"ls {DUMPS}") == ""
        said = db.run("journalctl -u postgresql-backup-dump -n 20 --no-pager -o cat")
        assert "no space left" in said.lower()
    finally:
        db.run(f"umount {DUMPS}")
    assert db.run(f"ls {DUMPS}") == before


def test_a_restore_between_two_rows_returns_exactly_the_first(db):
    db.sql("CREATE TABLE IF NOT EXISTS known (id int); INSERT INTO known VALUES (1)")
    between = now(db)
    db.sql("INSERT INTO known VALUES (2)")
    db.run("postgresql-backup mark")
    print(db.run(f"postgresql-backup restore --time {between}"))
    assert db.sql("SELECT id FROM known", 5433) == ["1"]
    db.run("postgresql-backup discard")


def test_a_restore_to_the_newest_loses_no_committed_row(db):
    before = stored(db)
    db.run("postgresql-backup mark")
    db.run("postgresql-backup restore --repository 2")
    assert before <= stored(db, 5433)
    db.run("postgresql-backup discard")


def test_a_dropped_table_comes_back(db):
    db.run("postgresql-backup mark before-drop")
    db.sql("DROP TABLE known")
    db.run("postgresql-backup mark; postgresql-backup restore --point before-drop")
    db.run("runuser -u postgres -- sh -c 'pg_dump -p 5433 --table=public.known litellm | psql -q litellm'")
    assert db.sql("SELECT id FROM known ORDER BY id") == ["1", "2"]
    db.run("postgresql-backup discard")


def test_the_spool_brings_back_what_the_recovery_point_lost(db, gateway, playbook):
    point = now(db)
    time.sleep(5)
    gateway.run("touch /tmp/stop")
    gateway.wait_drained()
    calls = gateway.calls()
    assert calls <= stored(db)
    db.run("postgresql-backup mark")
    output = playbook("restore-backup.yml", restore_target="db1", restore_time=point)
    assert "Missing:" in output
    playbook("promote-restored.yml", promote_target="db1")
    lost = calls - stored(db)
    assert lost
    print(gateway.run(f"litellm-sqlalchemy replay --since {point}"))
    assert calls <= stored(db)
    again = gateway.run(f"litellm-sqlalchemy replay --since {point} --json")
    assert json.loads(again)["restored"] == 0
    db.run("systemctl start postgresql-backup-base@full.service")
    gateway.start()


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ("--time yesterday", "is no time"),
        ("--time 2020-01-01T00:00:00+00:00", "before the end of the first base backup"),
        ("--time 2099-01-01T00:00:00+00:00", "in the future"),
        ("--point nosuch", "has no point of that name"),
        ("--from dump", "recovery key is missing"),
    ],
)
def test_what_cannot_be_restored_is_one_clear_message(db, arguments, word):
    done = db.try_run(f"postgresql-backup restore {arguments}")
    assert done.returncode
    assert word in done.stderr
    assert done.stderr.count("\n") == 1
    assert db.run("pg_lsclusters -h | wc -l") == "1"


def test_the_copies_are_off_the_host_and_their_user_has_no_shell(db, store):
    db.run("systemctl start postgresql-backup-copy.service")
    assert newest(db) in store.run("ls /srv/postgresql-backup/dumps").split()
    ssh = "ssh -i /etc/postgresql-backup/offsite/key -o UserKnownHostsFile=/etc/postgresql-backup/known_hosts"
    address = db.run("cut -d' ' -f1 /etc/postgresql-backup/known_hosts | head -n 1")
    assert "sftp" in db.try_run(f"{ssh} postgresql-backup@{address} id").stdout.lower()
    store.run("systemctl start postgresql-backup-snapshot.service")
    assert store.run("ls /srv/postgresql-backup-snapshots/2*Z/dumps")


def test_the_report_is_green(db):
    for kind in ("dump", "base"):
        assert db.drill(kind)["ok"]
    assert "FAILED" not in db.run("postgresql-backup status")


def test_a_lost_host_is_rebuilt_from_the_off_host_copy(db, store, gateway, playbook):
    time.sleep(2)
    gateway.run("touch /tmp/stop")
    gateway.wait_drained()
    calls = gateway.calls()
    time.sleep(15)  # archive_timeout is 10 s here: this is the recovery point
    began = time.monotonic()
    lost_at = datetime.now(UTC)
    db.run(
        "systemctl kill -s KILL postgresql@17-main; systemctl stop postgresql@17-main 'postgresql-backup-*.timer';"
        "pg_dropcluster --stop 17 main; rm -rf /var/lib/pgbackrest/* /var/backups/postgresql/* /etc/postgresql-backup"
        " /etc/systemd/system/postgresql@17-main.service.d /usr/local/lib/postgresql-backup /etc/pgbackrest.conf"
    )
    playbook("postgresql.yml")
    refused = playbook("backup.yml", check=False)
    assert "holds the backups of another cluster" in refused
    playbook("restore-backup.yml", restore_target="db1", restore_repository="2")
    playbook("promote-restored.yml", promote_target="db1")
    playbook("backup.yml")
    print(f"rebuilt in {time.monotonic() - began:.0f} s")
    missing = calls - stored(db)
    assert not missing, f"{len(missing)} calls committed 15 s before {lost_at} are missing"
    assert db.drill("base")["ok"]
