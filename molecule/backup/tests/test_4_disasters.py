"""The runbook: corrupt backups, lost and taken over hosts, another place for the copies."""

import json
import shutil
import subprocess
import threading
import time
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from conftest import INVENTORY, PROJECT, SCENARIO, changes, controller, play, stored
from helpers import (
    DUMPS,
    PLANTED,
    newest,
    now,
    places_of,
    planted,
    store_address,
    times_in_the_journal,
    wait_until,
)

SSH = "-i /etc/postgresql-backup/offsite/key -o UserKnownHostsFile=/etc/postgresql-backup/known_hosts"
SNAPSHOTS = "/srv/postgresql-backup-snapshots"
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


def test_the_copies_are_off_the_host_and_their_user_has_no_shell(db, store):
    db.run("systemctl start postgresql-backup-copy.service")
    assert newest(db) in store.run("ls /srv/postgresql-backup/dumps").split()
    done = db.try_run(f"ssh {SSH} {store_address(db)} id")
    assert "sftp" in done.stdout.lower()
    assert "uid=" not in done.stdout


def test_copies_go_newest_first_and_what_was_broken_off_is_completed_or_removed(db, store):
    db.run("systemctl start postgresql-backup-dump.service; systemctl start postgresql-backup-copy.service")
    newer, older, gone = newest(db), "20260101T000000Z", "20250101T000000Z"  # which the host has no more
    copies = "/srv/postgresql-backup/dumps"
    db.run(f"cd {DUMPS}; cp -a {newer} {older}; sed -i s/{newer}/{older}/ {older}/manifest.json")
    db.run("systemctl start postgresql-backup-copy.service")
    store.run(f"cd {copies}; cp -a {older} {gone}; rm {gone}/manifest.json {older}/manifest.json; rm -r {newer}")
    store.run(f"truncate -s 10 {copies}/{older}/litellm.dump.age")
    db.run("systemctl start postgresql-backup-copy.service")
    assert f"sent {newer}, {older}" in db.run("journalctl -u postgresql-backup-copy -n 5 -o cat --no-pager")
    there = store.run(f"ls {copies}").split()
    assert {older, newer} <= set(there)
    assert gone not in there
    for name in (older, newer):
        sums = f"cd {{}}/{name} && sha256sum *"
        assert store.run(sums.format(copies)) == db.run(sums.format(DUMPS))
    db.run(f"rm -r {DUMPS}/{older}")
    store.run(f"rm -r {copies}/{older}")


def test_a_copy_without_room_is_not_fetched(db):
    owner = "uid=$(id -u postgresql-backup),gid=$(id -g postgresql-backup)"
    db.run(f"mount -t tmpfs -o size=16k,mode=2750,{owner} none {DUMPS}")
    try:
        assert db.try_run("systemctl start postgresql-backup-fetch@newest").returncode
        assert "nothing was begun" in db.run("journalctl -u postgresql-backup-fetch@newest -n 5 -o cat --no-pager")
    finally:
        db.run(f"umount {DUMPS}; systemctl reset-failed")


@contextmanager
def searched(db, key):
    """Look for the recovery key on the host, while the block runs and afterwards; what runs has it in its memory."""
    places = "/root/.ansible* /tmp /var/tmp /run/postgresql-backup /proc/[0-9]*/cmdline /proc/[0-9]*/environ"
    everywhere = "/etc /home /opt /root /run /srv /tmp /usr/local /var /dev/shm"
    with planted(db) as text:
        process = db.run("systemctl show -P MainPID planted")
        assert {PLANTED, f"/proc/{process}/environ"} <= set(places_of(db, text, places))
        assert PLANTED in places_of(db, text, everywhere)
        assert times_in_the_journal(db, text)
    found, over = [], threading.Event()

    def look():
        while not over.is_set():
            found.append(places_of(db, key, places))

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
    print(f"looked {len(found)} times")
    assert found
    assert [place for look in found for place in look] == []
    assert places_of(db, key, everywhere) == []
    assert times_in_the_journal(db, key) == 0


def test_a_corrupt_backup_gives_way_to_its_copy_and_to_new_ones(db, runbook, recovery_key):
    name = newest(db)
    db.run(f"truncate -s -100 {DUMPS}/{name}/litellm.dump.age")
    assert "FAILED dump.files" in runbook.run("list-backups")
    runbook.run("fetch-dump", values=(name,))
    assert db.run(f"ls -d {DUMPS}/.damaged-{name}")
    with searched(db, recovery_key):
        runbook.run("restore_from=dump", values=(name,))
    manifest = json.loads(db.run(f"cat {DUMPS}/{name}/manifest.json"))
    rows = manifest["databases"]["litellm"]["tables"]["public.requests"]["rows"]
    assert db.sql("SELECT count(*) FROM requests", 5433) == [str(rows)]
    db.run("postgresql-backup discard")
    runbook.run("take-backup")
    assert newest(db) > name
    assert "FAILED" not in db.run("postgresql-backup verify --decrypt", recovery_key)


def test_a_repository_that_cannot_be_read_does_not_keep_the_other_from_its_backup(db):
    count = "runuser -u postgres -- pgbackrest --stanza=main --repo=2 info | grep -c ' backup: '"
    before = int(db.run(count))
    files = [f"/var/lib/pgbackrest/backup/main/backup.info{ending}" for ending in ("", ".copy")]
    db.run(f"for file in {' '.join(files)}; do cp -p $file $file.good; echo damage > $file; done")
    try:
        said = db.try_run("postgresql-backup base incr").stderr
    finally:
        db.run(f"for file in {' '.join(files)}; do mv $file.good $file; done")
    print(said)
    assert "repository 1 cannot be read" in said
    assert "repository 2" not in said
    assert int(db.run(count)) == before + 1


def test_what_a_taken_over_host_removes_is_in_the_snapshots(db, store, runbook):
    store.run("systemctl start postgresql-backup-snapshot.service")
    remove = "printf 'rm dumps/*/*\nrm pgbackrest/backup/main/backup.info*\nls -la ..\n'"
    print(db.try_run(f"{remove} | sftp -b - {SSH} {store_address(db)}").stdout)
    assert "no base backup" in db.try_run("postgresql-backup restore --repository 2").stderr
    runbook.run("systemctl stop", on=store)
    snapshot = runbook.run("ls /srv", on=store).split()[-1]
    runbook.run("rsync", on=store, values=(snapshot,))
    db.run("postgresql-backup restore --repository 2")
    assert db.sql("SELECT count(*) > 0 FROM requests", 5433) == ["t"]
    db.run("postgresql-backup discard")
    runbook.run("systemctl start", on=store)


def test_a_snapshot_that_fails_or_is_old_is_told(store):
    validate = f"{play('validation.yml')} --limit store1"
    newest = store.run(f"ls -d {SNAPSHOTS}/2*Z | tail -n 1")
    script = "/usr/local/sbin/postgresql-backup-snapshot"
    for damage, mend in (
        (f"touch -d '49 hours ago' {newest}", f"touch {newest}"),
        (f"chmod -x {script}; ! systemctl start postgresql-backup-snapshot", f"chmod +x {script}"),
    ):
        controller(validate)
        store.run(damage)
        said = controller(validate, check=False)
        store.run(f"{mend}; systemctl reset-failed")
        assert "journalctl -u postgresql-backup-snapshot says why" in said
        assert newest in said


def test_a_snapshot_makes_room_before_and_leaves_none_taken_when_it_fails(store):
    """On a disk of 1 MB; the oldest snapshot, older than its days, has most of it."""
    store.run("mkdir -p /tmp/s /tmp/s-snapshots && mount -t tmpfs -o size=1m none /tmp/s-snapshots")
    try:
        old = [f"2026010{number}T000000Z" for number in range(1, 5)]
        store.run(f"cd /tmp/s-snapshots; mkdir {' '.join(old)}; head -c 700k /dev/zero > {old[0]}/file")
        store.run(f"cd /tmp/s-snapshots; touch -d '9 days ago' {' '.join(old)}; head -c 600k /dev/zero > /tmp/s/file")
        store.run("/usr/local/sbin/postgresql-backup-snapshot /tmp/s 7")
        [*kept, new] = store.run("ls -A /tmp/s-snapshots").split()
        assert kept == old[1:]
        assert store.run(f"ls /tmp/s-snapshots/{new}") == "file"
        store.run("head -c 600k /dev/zero > /tmp/s/other")
        assert store.try_run("/usr/local/sbin/postgresql-backup-snapshot /tmp/s 7").returncode
        assert store.run("ls -A /tmp/s-snapshots").split() == [*old[2:], new]
    finally:
        store.run("umount /tmp/s-snapshots; rm -r /tmp/s /tmp/s-snapshots")


def test_the_report_is_green(db, recovery_key):
    with searched(db, recovery_key):
        print(controller(play("run-restore-drill.yml")))
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
    missing = sorted(before - recovered)  # UUIDv7: they begin with their milliseconds
    loss = datetime.fromisoformat(lost_at).timestamp() - int(missing[0][:12], 16) / 1000 if missing else 0
    print(f"recovered to {loss:.0f} s before the loss, {len(missing)} calls are missing")
    assert loss <= RECOVERY_POINT
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
    assert "dumps in offsite:backups/dumps/second" in said
    db.run(f"rm -r {DUMPS}/{newest(db)}; systemctl start postgresql-backup-fetch@newest.service")
    assert "FAILED" not in db.run("postgresql-backup verify --decrypt", recovery_key)
    before = stored(db)
    db.run("postgresql-backup mark; postgresql-backup restore --repository 2")
    assert before <= stored(db, 5433)
    db.run("postgresql-backup discard")


def test_every_command_of_the_runbook_was_run(runbook):
    assert runbook.pending == set()
    readme = (PROJECT / "README.md").read_text().partition("## Get it back")[2].partition("## ")[0]
    commands = {line.strip() for line in readme.splitlines() if line.startswith("    ")}
    assert len(commands) == 3
    assert commands <= runbook.commands
