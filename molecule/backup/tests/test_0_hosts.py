"""Before anything was backed up: who may write where, how far units are shut in, and what a user is told."""

import re

import pytest
from conftest import changes, controller, play
from helpers import DRILL, RUN, store_address

UNITS = ["dump", "base@full", "mark", "copy", "fetch@newest", "drill@dump", "report@dump", "status"]


def exposure(host, unit):
    said = host.run(f"systemd-analyze security --no-pager {unit} | tail -n 1")
    return float(re.search(r"level for \S+: ([\d.]+)", said)[1])


def test_the_units_are_shut_in(db, store):
    found = {unit: exposure(db, f"postgresql-backup-{unit}.service") for unit in UNITS}
    found["snapshot"] = exposure(store, "postgresql-backup-snapshot.service")
    print(found)
    assert max(found.values()) <= 2.0
    assert exposure(db, "postgresql@17-main.service") <= 1.5


def test_no_user_can_put_a_link_in_the_way_of_another(db):
    own = {
        "postgresql-backup": f"{RUN}/keys",
        "postgres": f"{RUN}/server",
        "postgresql-drill": DRILL,
    }
    for user, mine in own.items():
        link = f"setpriv --reuid={user} --regid={user} --groups=postgresql-backup ln -s /etc/shadow"  # as in its units
        db.run(f"{link} {mine}/link; rm {mine}/link")
        for place in {RUN, "/var/lib/postgresql-backup", *own.values()} - {mine}:
            assert "Permission denied" in db.try_run(f"{link} {place}/link").stderr, (user, place)


@pytest.mark.parametrize(
    ("unit", "link", "user"),
    [
        ("postgresql-backup-base@full", f"{RUN}/server/base-backup.lock", "postgres"),
        ("postgresql-backup-dump", "/var/backups/postgresql/.lock", "postgresql-backup"),
    ],
)
def test_a_link_in_the_place_of_a_lock_is_not_followed(db, unit, link, user):
    db.run(f"touch /tmp/target; rm -f {link}; ln -s /tmp/target {link}; chown -h {user} /tmp/target {link}")
    try:
        assert db.try_run(f"systemctl start {unit}.service").returncode
        assert "Too many levels of symbolic links" in db.run(f"journalctl -u {unit} -n 5 -o cat --no-pager")
        assert db.run("cat /tmp/target") == ""
    finally:
        db.run(f"rm -f {link} /tmp/target; systemctl reset-failed")


def test_metrics_are_published_from_a_file_of_the_server_alone(db):
    db.run(f"ln -sf /etc/shadow {RUN}/server/status.prom")
    refused = db.try_run("postgresql-backup publish /root/metrics.prom")
    db.run(f"rm {RUN}/server/status.prom")
    assert refused.returncode == 7
    assert db.try_run("ls /root/metrics.prom").returncode
    db.run("systemctl start postgresql-backup-status.service")
    published = "/var/lib/prometheus/node-exporter/postgresql_backup.prom"
    before = db.run(f"cat {published}")
    assert "postgresql_backup_check" in before
    report = f"{DRILL}/dump.json"  # with a time that no drill writes
    db.run(f"cat > {report}; chmod 0644 {report}", '{"kind": "dump", "started_at": "never", "ok": true}')
    try:
        assert db.try_run("systemctl start postgresql-backup-status.service").returncode
        assert "this is a defect" in db.run("journalctl -u postgresql-backup-status -n 5 -o cat --no-pager")
        assert db.run(f"cat {published}") == before  # with the time of that run
    finally:
        db.run(f"rm {report}; systemctl reset-failed")


@pytest.mark.parametrize(
    ("hide", "verb", "word"),
    [
        ("mount --bind /dev/null /usr/bin/pgbackrest", "list", "pgbackrest cannot be run"),
        ("mount -t tmpfs none /etc/postgresql-backup", "list", "run playbooks/backup.yml"),
        ("mount -t tmpfs -o mode=777 none /var/lib/postgresql-backup", "restore", "can be written by others"),
        ("mount -t tmpfs none /var/backups", "verify", "/var/backups/postgresql: No such file or directory"),
        ("cd /run/postgresql-backup && mount -t tmpfs -o size=4k,mode=755 none . && head -c 4k /dev/zero > $PWD/x",
         "restore", "make room"),
        ("mount -t tmpfs none /run/postgresql", "mark", "No such file or directory"),
        ("true", "promote", "there is no restored cluster"),
        ("true", "dump", "systemctl start"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_one_line_that_says_what_to_do(db, hide, verb, word):
    done = db.try_run(f"unshare --mount sh -c '{hide} && exec postgresql-backup {verb}'")
    assert done.returncode
    assert word in done.stderr
    assert done.stderr.startswith("postgresql-backup: ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("limit", ["db1", "store1"])
def test_a_run_that_is_limited_to_one_host_keeps_what_lets_the_two_meet(limit):
    assert changes(controller(play("backup.yml") + f" --limit {limit} --check")) == []


def test_copies_go_to_the_port_that_the_store_listens_on(db, store):
    """It stays there for all tests."""
    store.run("echo 'Port 2222' > /etc/ssh/sshd_config.d/40-port.conf; systemctl restart ssh")
    assert db.try_run("systemctl start postgresql-backup-copy").returncode
    controller(play("backup.yml") + " --limit db1")
    db.run("systemctl start postgresql-backup-copy; runuser -u postgres -- pgbackrest --stanza=main check")
    assert "Port=2222" in store_address(db)
    assert changes(controller(play("backup.yml") + " --check")) == []
