"""What a dump costs the writer, and how long drills of 1 GB take; too long for every run of the scenario.

On fresh hosts, before the scenario's tests, which leave another repository:

molecule converge --scenario-name backup
pytest -s molecule/backup/tests/measure.py
"""

import time

import pytest
from conftest import Gateway, Host
from helpers import wait_until

METRICS = "import urllib.request as u; print(u.urlopen('http://127.0.0.1:9465/metrics').read().decode())"
ROUNDS = 2
pytestmark = pytest.mark.timeout(1800)  # a dump of 1 GB takes three minutes, at the pace that it keeps
#: About 1 kB a row that does not compress to nothing.
BALLAST = """
CREATE TABLE IF NOT EXISTS ballast AS
SELECT g AS id, (SELECT string_agg(md5(g::text || n), '') FROM generate_series(1, 30) n) AS content
FROM generate_series(1, 1000000) g;
ALTER TABLE ballast ADD PRIMARY KEY (id);
"""


def batches(gateway: Host) -> tuple[float, float]:
    """Return seconds and number of the writer's batches so far."""
    lines = dict(line.rsplit(" ", 1) for line in gateway.run(f'python3 -c "{METRICS}"').splitlines() if line[:1] != "#")
    found = {
        name.rsplit("_", 1)[1]: float(value)
        for name, value in lines.items()
        if "batch_seconds_" in name and "{" not in name
    }
    return found["sum"], found["count"]


def mean(gateway: Host, work) -> float:
    """Return the mean seconds of the batches while `work` is done."""
    seconds, count = batches(gateway)
    work()
    after, until = batches(gateway)
    return (after - seconds) / (until - count)


@pytest.fixture(scope="module", autouse=True)
def gigabyte(db: Host) -> None:
    """Fill the database."""
    if db.sql("SELECT to_regclass('ballast') IS NULL") == ["t"]:
        db.sql(BALLAST)
    db.sql("VACUUM ANALYZE; CHECKPOINT")


def test_a_dump_costs_the_writer_at_most_a_tenth(db: Host, gateway: Gateway) -> None:
    print(f"\ndatabase: {db.sql('SELECT pg_size_pretty(pg_database_size(current_database()))')[0]}")
    with_dump, without = [], []
    for _ in range(ROUNDS):
        began = time.monotonic()
        with_dump.append(mean(gateway, lambda: db.run("systemctl start postgresql-backup-dump.service")))
        took = time.monotonic() - began
        without.append(mean(gateway, lambda took=took: time.sleep(took)))
    plain, dumping = (sum(means) / ROUNDS for means in (without, with_dump))
    print(f"batch: {plain * 1e3:.2f} ms, beside a dump of {took:.0f} s {dumping * 1e3:.2f} ms: {dumping / plain:.3f}")
    assert dumping / plain <= 1.1


def test_drills_of_a_gigabyte_take_at_most_ten_minutes(db: Host) -> None:
    db.run("systemctl start postgresql-backup-dump.service")
    segment = db.sql("SELECT pg_walfile_name(pg_switch_wal())")[0]  # behind what the ballast has written
    wait_until(lambda: db.sql(f"SELECT last_archived_wal >= '{segment}' FROM pg_stat_archiver") == ["t"], 300)
    db.run("systemctl start postgresql-backup-base@full.service")
    for kind in ("dump", "base"):
        report = db.drill(kind)
        print(f"\n{kind}: {report['total_seconds']:.0f} s; {report['message']}")
        assert report["ok"]
        assert report["total_seconds"] <= 600
