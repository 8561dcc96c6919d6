"""Backups are good when they come back: while a gateway writes, in this order."""

import json
import shutil
import subprocess
import time
from pathlib import Path

import pytest
from conftest import ENVIRONMENT, INVENTORY, PROJECT, SCENARIO, changes, controller, play, stored

DUMPS = "/var/backups/postgresql"
RUN = "/run/postgresql-backup"
SNAPSHOTS = "/srv/postgresql-backup-snapshots"
PARTIAL = f"timeout 20 sh -c 'until ls -d {DUMPS}/.partial-*; do :; done'"
SSH = "-i /etc/postgresql-backup/offsite/key -o UserKnownHostsFile=/etc/postgresql-backup/known_hosts"
DUMP, BASE = "postgresql-backup-dump.service", "postgresql-backup-base@full.service"
#: moto's own server ends TLS without saying so, which pgBackRest does not take.
HAPROXY = """
defaults
    mode http
    timeout connect 5s
    timeout client 60s
    timeout server 60s
listen s3
    bind :5000 ssl crt /root/s3.pem
    server moto 127.0.0.1:5001
"""
#: What `postgresql_backup_archive_timeout` promises by default, and what docs/operations/backup.md says.
RECOVERY_POINT = 300


def newest(db):
    return db.run(f"ls {DUMPS} | tail -n 1")


def now(db):
    return db.sql("SELECT to_char(clock_timestamp() AT TIME ZONE 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS.US\"+00:00\"')")[0]


def locks(db, table, condition):
    return db.sql(f"SELECT count(*) FROM pg_locks WHERE relation = '{table}'::regclass AND {condition}") != ["0"]


def store_address(db):
    return "postgresql-backup@" + db.run("cut -d' ' -f1 /etc/postgresql-backup/known_hosts | head -n 1")


def wait_until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.2)


def test_a_dump_under_load_equals_its_snapshot_and_is_encrypted(db, gateway, recovery_key):
    wait_until(lambda: len(stored(db)) > 20)
    db.run("systemctl start postgresql-backup-dump.service")
    manifest = json.loads(db.run(f"cat {DUMPS}/{newest(db)}/manifest.json"))
    assert manifest["databases"]["litellm"]["tables"]["public.requests"]["rows"] > 0
    assert db.try_run(f"grep -rla 'hello hello' {DUMPS} /var/lib/pgbackrest").stdout == ""
    assert "decrypted" in db.run("postgresql-backup verify --decrypt", recovery_key)
    assert db.try_run("grep -rlaF -f - /etc /var /root /run", recovery_key).stdout == ""


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


def test_both_drills_are_green_and_leave_nothing(db):
    db.run(f"systemctl start {BASE} && systemctl start postgresql-backup-base@incr.service")
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


def test_without_damage_the_drills_are_green_again(db):
    for kind in ("dump", "base"):
        report = db.drill(kind)
        assert report["ok"], report["message"]


@pytest.mark.parametrize("signal", ["KILL", "TERM"])
def test_an_interrupted_dump_is_never_promoted(db, signal):
    before = db.run(f"ls {DUMPS}")
    db.run("systemctl start --no-block postgresql-backup-dump.service")
    db.run(PARTIAL)
    db.try_run(
        f"systemctl kill --signal={signal} postgresql-backup-dump.service; systemctl stop postgresql-backup-dump"
    )
    assert db.run(f"ls {DUMPS}") == before


def test_an_interrupted_base_backup_is_never_listed(db):
    before = db.run("postgresql-backup list | grep ^base")
    db.run("systemctl start --no-block postgresql-backup-base@full.service")
    db.run("timeout 30 sh -c 'until pgrep -f \"type=full backup\"; do :; done'")
    db.try_run(f"systemctl kill --signal=KILL {BASE}; systemctl stop {BASE}")
    assert db.run("postgresql-backup list | grep ^base") == before
    db.run(f"systemctl reset-failed; systemctl start {BASE}")
    assert before in db.run("postgresql-backup list | grep ^base")


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


def test_what_overlaps_with_a_dump_is_safe(db, gateway, recovery_key):
    """The dump is stopped in its middle, so that all of the rest happens meanwhile."""
    before = newest(db)
    db.sql("CREATE TABLE known (id int)")
    lock = "BEGIN; LOCK TABLE known; SELECT pg_sleep(600)"
    db.run(f"systemd-run --quiet --unit=blocker -- runuser -u postgres -- psql litellm -c '{lock}'")
    wait_until(lambda: locks(db, "known", "granted"))
    db.run(f"systemctl start --no-block {DUMP}")
    wait_until(lambda: locks(db, "known", "NOT granted"))
    db.run(f"systemctl kill --signal=STOP {DUMP}")
    db.sql("SELECT pg_terminate_backend(pid) FROM pg_locks WHERE relation = 'known'::regclass AND granted")
    try:
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
        wait_until(lambda: db.sql(query) == ["2"], 120)
    finally:
        db.run(f"systemctl kill --signal=CONT {DUMP}")
    output, _ = rotation.communicate(timeout=300)
    assert rotation.returncode == 0, output[-4000:]
    assert db.sql(query) == ["1"]
    assert newest(db) > before
    db.run(f"systemctl start {DUMP}")
    assert "FAILED" not in db.run("postgresql-backup verify --decrypt", recovery_key)


def test_a_restore_between_two_rows_returns_exactly_the_first(db):
    db.sql("INSERT INTO known VALUES (1)")
    targets = {"lsn": db.sql("SELECT pg_current_wal_flush_lsn()")[0], "time": now(db), "point": "between"}
    db.run("postgresql-backup mark between")
    db.sql("INSERT INTO known VALUES (2)")
    db.run("postgresql-backup mark")
    for kind, target in targets.items():
        print(db.run(f"postgresql-backup restore --{kind} {target}"))
        assert db.sql("SELECT id FROM known", 5433) == ["1"], kind
        db.run("postgresql-backup discard")


def test_a_restore_to_the_newest_loses_no_committed_row(db):
    before = stored(db)
    db.run("postgresql-backup mark")
    db.run("postgresql-backup restore --repository 2")
    assert before <= stored(db, 5433)
    db.run("postgresql-backup discard")


def test_a_lost_table_comes_back(db, runbook):
    before = now(db)
    db.sql("DROP TABLE known")
    db.run("postgresql-backup mark")
    runbook.run("restore_time", values=(before,))
    again = controller(play("restore-backup.yml", restore_target="db1"), check=False)
    assert "is there already, and a restore overwrites nothing" in again
    runbook.run("pg_dump", on=db, user="postgres", values=("public.known",))
    assert db.sql("SELECT id FROM known ORDER BY id") == ["1", "2"]
    runbook.run("discard-restored")
    assert db.run("pg_lsclusters -h | wc -l") == "1"


def test_a_lost_database_comes_back_and_the_spools_bring_what_its_recovery_point_lost(db, gateway, runbook):
    point, written = now(db), len(gateway.calls())
    wait_until(lambda: len(gateway.calls()) > written + 40)
    gateway.stop()
    calls = gateway.calls()
    assert calls <= stored(db)
    db.run("postgresql-backup mark")
    assert "Missing:" in controller(play("restore-backup.yml", restore_target="db1", restore_time=point))
    runbook.run("promote-restored")
    assert changes(runbook.run("site.yml")) == []
    lost = calls - stored(db)
    assert lost
    print(len(lost), "lost:", runbook.run("replay", on=gateway, values=(point,)))
    assert calls <= stored(db)
    again = gateway.run(f"litellm-sqlalchemy replay --since {point} --json")
    assert json.loads(again)["restored"] == 0
    db.run(f"systemctl start {BASE}")
    gateway.start()


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ("--time yesterday", "is no time"),
        ("--time 2020-01-01T00:00:00+00:00", "before the end of the first base backup"),
        ("--time 2099-01-01T00:00:00+00:00", "in the future"),
        ("--point nosuch", "has no point of that name"),
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


def test_the_copies_are_off_the_host_and_their_user_has_no_shell(db, store):
    db.run("systemctl start postgresql-backup-copy.service")
    assert newest(db) in store.run("ls /srv/postgresql-backup/dumps").split()
    done = db.try_run(f"ssh {SSH} {store_address(db)} id")
    assert "sftp" in done.stdout.lower()
    assert "uid=" not in done.stdout


def test_a_corrupt_backup_gives_way_to_its_copy_and_to_new_ones(db, runbook, recovery_key):
    name = newest(db)
    db.run(f"truncate -s -100 {DUMPS}/{name}/litellm.dump.age")
    assert "FAILED dump.files" in runbook.run("list-backups")
    runbook.run("fetch-dump", values=(name,))
    assert db.run(f"ls -d {DUMPS}/.damaged-{name}")
    runbook.run("restore_from=dump", values=(name,))
    manifest = json.loads(db.run(f"cat {DUMPS}/{name}/manifest.json"))
    rows = manifest["databases"]["litellm"]["tables"]["public.requests"]["rows"]
    assert db.sql("SELECT count(*) FROM requests", 5433) == [str(rows)]
    db.run("postgresql-backup discard")
    runbook.run("take-backup")
    assert newest(db) > name
    assert "FAILED" not in db.run("postgresql-backup verify --decrypt", recovery_key)


def test_what_a_taken_over_host_removes_is_in_the_snapshots(db, store, runbook):
    store.run("systemctl start postgresql-backup-snapshot.service")
    remove = "printf 'rm dumps/*/*\nrm pgbackrest/backup/main/backup.info*\nls -la ..\n'"
    print(db.try_run(f"{remove} | sftp -b - {SSH} {store_address(db)}").stdout)
    assert db.try_run("postgresql-backup restore --repository 2").returncode
    runbook.run("systemctl stop", on=store)
    snapshot = runbook.run("ls /srv", on=store).split()[-1]
    runbook.run("rsync", on=store, values=(snapshot,))
    db.run("postgresql-backup restore --repository 2")
    assert db.sql("SELECT count(*) > 0 FROM requests", 5433) == ["t"]
    db.run("postgresql-backup discard")
    runbook.run("systemctl start", on=store)


def test_the_report_is_green(db):
    for kind in ("dump", "base"):
        report = db.drill(kind)
        assert report["ok"], report["message"]
    said = db.run("postgresql-backup status")
    print(said)
    for words in ("dump.newest", "base_backup.newest[1]", "base_backup.newest[2]", "offsite.dumps", "recovery point"):
        assert words in said
    assert said.count("recovery time") == 2


def test_a_new_controller_changes_nothing(runbook, tmp_path):
    project, inventory = tmp_path / "project", tmp_path / "project/inventories/production"
    ignored = shutil.ignore_patterns(".git", ".venv", ".cache", ".*_cache", "__pycache__", "vault.yml", "pki")
    shutil.copytree(PROJECT, project, ignore=ignored)
    shutil.rmtree(inventory)
    shutil.copytree(INVENTORY, inventory, ignore=shutil.ignore_patterns("ansible_inventory.yml"))
    output = runbook.run("--check", inventory=Path("inventories/production"), cwd=project)
    assert changes(output) == []


def test_a_lost_host_is_rebuilt_from_the_off_host_copy(db, store, gateway, runbook):
    lost_at, before = now(db), stored(db)
    subprocess.run(["podman", "kill", db.container], check=True, capture_output=True)
    subprocess.run(["podman", "rm", "--force", db.container], check=True, capture_output=True)
    controller(f"ansible-playbook -i {INVENTORY} molecule/shared/create.yml")
    began = time.monotonic()
    runbook.run("postgresql.yml")
    assert "holds the backups of another cluster" in runbook.run("backup.yml", check=False)
    runbook.run("restore_repository=2")
    runbook.run("promote-restored")
    recovered = stored(db)
    loss = db.sql(f"SELECT extract(epoch FROM '{lost_at}'::timestamptz - max(created_at)) FROM requests")[0]
    print(f"recovered to {float(loss):.0f} s before the loss, {len(before - recovered)} calls are missing")
    assert float(loss) <= RECOVERY_POINT
    runbook.run("site.yml")
    print(f"rebuilt in {time.monotonic() - began:.0f} s")
    gateway.stop()
    since = db.sql(f"SELECT '{lost_at}'::timestamptz - interval '{RECOVERY_POINT} s'")[0].replace(" ", "T")
    print(runbook.run("replay", on=gateway, values=(since,)))
    assert before | gateway.calls() <= stored(db)
    assert db.drill("base")["ok"]


def test_copies_go_into_a_bucket_under_a_new_passphrase_and_stanza(db, store, runbook, recovery_key):
    name = store.container
    store.run(
        f"openssl req -x509 -newkey rsa:2048 -noenc -days 2 -subj /CN={name} -addext subjectAltName=DNS:{name}"
        " -keyout /root/s3.pem.key -out /root/s3.pem 2>&1; cat > /root/s3.cfg;"
        " systemd-run --quiet --unit=moto /opt/test-venv/bin/moto_server -p 5001;"
        " systemd-run --quiet --unit=s3 haproxy -W -f /root/s3.cfg",
        HAPROXY,
    )
    make = f"""
import ssl, urllib.request
request = urllib.request.Request("https://{name}:5000/backups", method="PUT")
urllib.request.urlopen(request, context=ssl.create_default_context(cafile="/root/s3.pem"))
"""
    wait_until(lambda: store.try_run("python3 -", make).returncode == 0)
    db.run("cat > /etc/ssl/certs/s3.pem", store.run("cat /root/s3.pem"))
    vault = SCENARIO / "inventory/group_vars/all/vault.yml"
    controller(f"EDITOR='sed -i /repository_passphrase/d' ansible-vault edit {vault}")
    runbook.run("create-secrets")
    bucket = {"endpoint": name, "port": 5000, "region": "us-east-1", "bucket": "backups", "key": "test"}
    bucket |= {"secret": "test-secret", "ca_file": "/etc/ssl/certs/s3.pem"}
    variables = {"postgresql_backup_offsite_s3": bucket, "postgresql_backup_offsite_host": {}}
    runbook.run("backup.yml", variables={**variables, "postgresql_backup_stanza": "second"})
    said = db.run("postgresql-backup status | grep -v drill")
    assert "FAILED" not in said
    assert "offsite:backups/dumps" in said
    db.run(f"rm -r {DUMPS}/{newest(db)}; systemctl start postgresql-backup-fetch@newest.service")
    assert "FAILED" not in db.run("postgresql-backup verify --decrypt", recovery_key)
    before = stored(db)
    db.run("postgresql-backup mark; postgresql-backup restore --repository 2")
    assert before <= stored(db, 5433)
    db.run("postgresql-backup discard")


def test_every_command_of_the_runbook_was_run(runbook):
    assert runbook.pending == set()
