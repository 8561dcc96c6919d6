"""What the tests share: names on the hosts, and waiting."""

import contextlib
import time

DUMPS = "/var/backups/postgresql"
RUN = "/run/postgresql-backup"
DRILL = "/var/lib/postgresql-drill"
DUMP, BASE = "postgresql-backup-dump.service", "postgresql-backup-base@full.service"


def newest(db):
    return db.run(f"ls {DUMPS} | tail -n 1")


def now(db):
    return db.sql("SELECT to_char(clock_timestamp() AT TIME ZONE 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS.US\"+00:00\"')")[0]


def locks(db, table, condition):
    return db.sql(f"SELECT count(*) FROM pg_locks WHERE relation = '{table}'::regclass AND {condition}") != ["0"]


def store_address(db):
    return "postgresql-backup@" + db.run("cut -d' ' -f1 /etc/postgresql-backup/known_hosts | head -n 1")


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


def wait_until(condition, seconds=240):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds} s"
        time.sleep(0.2)
