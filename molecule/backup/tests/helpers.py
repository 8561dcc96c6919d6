"""What the tests share: names on the hosts, and waiting."""

import contextlib
import time
import uuid

DUMPS = "/var/backups/postgresql"
RUN = "/run/postgresql-backup"
DRILL = "/var/lib/postgresql-drill"
PLANTED = "/var/tmp/planted"
DUMP, BASE = "postgresql-backup-dump.service", "postgresql-backup-base@full.service"
INCREMENTAL = "postgresql-backup-base@incr.service"
MARK = "postgresql-backup-mark.service"


def newest(db):
    return db.run(f"ls {DUMPS} | tail -n 1")


def now(db):
    return db.sql("SELECT to_char(clock_timestamp() AT TIME ZONE 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS.US\"+00:00\"')")[0]


def locks(db, table, condition):
    return db.sql(f"SELECT count(*) FROM pg_locks WHERE relation = '{table}'::regclass AND {condition}") != ["0"]


def store_address(db):
    host, _, port = db.run("cut -d' ' -f1 /etc/postgresql-backup/known_hosts | head -n 1").strip("[").partition("]:")
    return f"-o Port={port or 22} postgresql-backup@{host}"


@contextlib.contextmanager
def without_segment(db, newer=0):
    """Have the archive lack a segment of WAL: the newest, or the one that so many are newer than."""
    segments = "find /var/lib/pgbackrest/archive/main -name '0*-*' | sort"
    segment = db.run(f"{segments} | tail -n {newer + 1} | head -n 1")
    db.run(f"mv {segment} /root/segment")
    try:
        yield
    finally:
        db.run(f"mv /root/segment {segment}")


@contextlib.contextmanager
def without_marking(db):
    """Have the drill of a base backup write no marker before it."""
    unit = "/etc/systemd/system/postgresql-backup-mark.service"
    db.run(f"mv {unit} /root/mark.service; systemctl daemon-reload")
    try:
        yield
    finally:
        db.run(f"mv /root/mark.service {unit}; systemctl daemon-reload")


def places_of(host, text, places):
    """Return the files in these places that have a text."""
    return host.try_run(f"grep -rlaF -D skip -f - {places} 2> /dev/null", text).stdout.split()


def times_in_the_journal(host, text):
    return int(host.try_run("exec 3<&0; journalctl -a -o export --no-pager | grep -caF -f /dev/fd/3", text).stdout)


@contextlib.contextmanager
def planted(host):
    """Have a text in PLANTED, in a process's environment and in the journal: who looks for a secret has to find it."""
    text = uuid.uuid4().hex
    process = f"systemd-run --quiet --unit=planted --service-type=exec --setenv=PLANTED={text} sleep infinity"
    host.run(f"echo {text} > {PLANTED} && logger {text} && journalctl --sync && {process}")
    try:
        yield text
    finally:
        host.run(f"systemctl stop planted; rm {PLANTED}")


def wait_until(condition, seconds=240):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds} s"
        time.sleep(0.2)
