"""The command postgresql-backup: what it keeps, what it refuses, what it says. What it does: molecule/backup."""

import contextlib
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace

import postgresql_backup_filters
import pytest
import vault_secrets
from postgresql_backup import base, cli, dumps, offsite, restore, status, tools
from postgresql_backup.database import differences
from postgresql_backup.dumps import Manifest
from postgresql_backup.errors import BackupError, DamagedError, ExitCode, LockedError, RefusedError, SettingsError
from postgresql_backup.settings import Settings, load_settings

START = datetime(2026, 1, 1, tzinfo=UTC)
RETENTION = {"hourly": 24, "daily": 7, "weekly": 5, "monthly": 12}
HISTORY = '1\t0/301FC78\tat restore point "p1"\n\n2\t0/5000000\tno recovery target specified\n'
TABLES = {"public.requests": {"rows": 2, "digest": "ab"}}
LIMITS = {"dump": 7200, "base_backup": 1, "archive": 1, "drill": 1, "offsite": 1, "wal_room": 1}


def names(hours):
    return [dumps.name_of(START + timedelta(hours=hour)) for hour in hours]


def store(directory, name, content=b"encrypted"):
    """Write a dump as dump.take leaves it."""
    folder = directory / name
    folder.mkdir(parents=True)
    (folder / "litellm.dump.age").write_bytes(content)
    file = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    moment = datetime.strptime(name, "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC).isoformat()
    databases = {"litellm": {"tables": TABLES}}
    manifest = Manifest(name, moment, moment, "17.12", "17.12", "1", databases, {"litellm.dump.age": file})
    dumps.save(folder, manifest)
    return manifest


def test_retention_keeps_the_newest_of_each_period():
    kept = dumps.kept(names(range(24 * 100)), RETENTION)
    assert len([name for name in kept if name >= dumps.name_of(START + timedelta(days=99))]) == 24
    assert names([24 * 100 - 1])[0] in kept
    assert 24 + 6 + 3 + 2 <= len(kept) <= 24 + 7 + 5 + 4


def test_retention_is_stable_and_never_empty():
    generator = random.Random(1)
    for _ in range(50):
        found = names(generator.sample(range(5000), generator.randint(1, 60)))
        rules = {rule: generator.randint(0, 3) for rule in RETENTION}
        kept = dumps.kept(found, rules)
        assert max(found) in kept
        assert kept <= set(found)
        assert dumps.kept(kept, rules) == kept


def test_a_clock_that_jumped_ahead_removes_nothing_else():
    usual = names(range(10))
    jumped = dumps.name_of(START + timedelta(days=4000))
    assert set(usual) - dumps.kept([*usual, jumped], {"hourly": 24}) == set()


def test_an_unknown_rule_is_refused():
    with pytest.raises(RefusedError, match="yearly"):
        dumps.kept(names([1]), {"yearly": 1})


@pytest.mark.parametrize("content", [b"", b"Encrypted"])  # truncated; of the right size, with a bit flipped
def test_a_damaged_newest_dump_does_not_drive_out_the_last_good_one(tmp_path, content):
    good, damaged = names([1, 2])
    store(tmp_path, good)
    store(tmp_path, damaged)
    (tmp_path / damaged / "litellm.dump.age").write_bytes(content)
    assert dumps.prune(tmp_path, {"hourly": 1}) == []
    (tmp_path / damaged / "manifest.json").write_text("{")
    assert dumps.prune(tmp_path, {"hourly": 1}) == []
    assert dumps.names(tmp_path) == [good, damaged]
    (tmp_path / good / "litellm.dump.age").write_bytes(content)
    assert dumps.prune(tmp_path, {"hourly": 1}) == []


def test_prune_removes_what_no_rule_keeps(tmp_path):
    first, second = names([1, 2])
    store(tmp_path, first)
    store(tmp_path, second)
    assert dumps.prune(tmp_path, {"hourly": 1}) == [first]
    assert dumps.names(tmp_path) == [second]


def test_what_retention_removes_meanwhile_is_no_damage(monkeypatch, tmp_path, capsys):
    kept, removed = names([1, 2])
    store(tmp_path, kept)
    store(tmp_path, removed)
    check_files = dumps.check_files

    def checked(folder, manifest, pace=None):
        shutil.rmtree(tmp_path / removed, ignore_errors=True)  # as a dump does at its end
        check_files(folder, manifest, pace)

    monkeypatch.setattr(dumps, "check_files", checked)
    settings = Settings([], [], {}, dumps=str(tmp_path))
    assert cli._verify(settings, SimpleNamespace(dump="", decrypt=False)) == ExitCode.OK
    assert capsys.readouterr().out.split()[:2] == ["OK", kept]
    assert cli._verify(settings, SimpleNamespace(dump=removed, decrypt=False)) == ExitCode.DAMAGED
    (tmp_path / kept / "litellm.dump.age").write_bytes(b"")
    assert cli._verify(settings, SimpleNamespace(dump="", decrypt=False)) == ExitCode.DAMAGED


@pytest.mark.parametrize(
    ("content", "word"),
    [(b"", "empty"), (b"encrypt", "truncated"), (b"encrypted twice", "too long"), (b"encryptee", "changed")],
)
def test_a_file_that_is_not_as_the_manifest_says_is_named(tmp_path, content, word):
    manifest = store(tmp_path, names([1])[0])
    folder = tmp_path / manifest.name
    dumps.check_files(folder, manifest)
    (folder / "litellm.dump.age").write_bytes(content)
    with pytest.raises(DamagedError, match=rf"litellm\.dump\.age (is|was) {word}"):
        dumps.check_files(folder, manifest)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"name": "other"}'])
def test_a_damaged_manifest_is_an_error_of_its_own(tmp_path, content):
    manifest = store(tmp_path, names([1])[0])
    (tmp_path / manifest.name / "manifest.json").write_text(content)
    with pytest.raises(DamagedError, match=manifest.name):
        dumps.load(tmp_path / manifest.name)


@pytest.mark.parametrize(
    "changes", [{"name": "other"}, {"format": 2}, {"files": {}}, {"files": ["x"]}, {"files": {"x": {}}}]
)
def test_a_manifest_that_tells_of_no_such_dump(tmp_path, changes):
    manifest = store(tmp_path, names([1])[0])
    dumps.save(tmp_path / manifest.name, replace(manifest, **changes))
    with pytest.raises(DamagedError, match=f"{manifest.name} has a damaged manifest"):
        dumps.load(tmp_path / manifest.name)


@pytest.mark.parametrize("name", ["../../etc/x", "a/b", "..", ""])
def test_a_manifest_names_no_path(tmp_path, name):
    manifest = store(tmp_path, names([1])[0])
    for field in ("files", "databases"):
        content = json.loads((tmp_path / manifest.name / "manifest.json").read_text())
        content[field][name] = next(iter(content[field].values()))
        (tmp_path / manifest.name / "manifest.json").write_text(json.dumps(content))
        with pytest.raises(DamagedError, match="is no name"):
            dumps.load(tmp_path / manifest.name)
        del content[field][name]


def test_nothing_is_written_where_others_could_have_put_a_link(tmp_path):
    tmp_path.chmod(0o777)
    for write in (lambda: tools.write_json(tmp_path / "x", {}), lambda: tools.lock(tmp_path / "x").__enter__()):
        with pytest.raises(RefusedError, match="can be written by others"):
            write()
    tmp_path.chmod(0o700)
    (tmp_path / "target").touch()
    (tmp_path / "link").symlink_to(tmp_path / "target")
    with pytest.raises(OSError, match="symbolic links"), tools.lock(tmp_path / "link"):
        pass
    tools.write_json(tmp_path / "link", {})
    assert not (tmp_path / "link").is_symlink()
    assert (tmp_path / "target").read_bytes() == b""


def test_interrupted_dumps_are_no_dumps_and_are_removed(tmp_path):
    (tmp_path / f"{dumps.PARTIAL}{names([1])[0]}").mkdir()
    assert dumps.names(tmp_path) == []
    assert len(dumps.remove_partial(tmp_path)) == 1
    with pytest.raises(DamagedError, match="there is no dump"):
        dumps.newest(tmp_path)


def test_every_kind_of_difference_is_said():
    assert differences(TABLES, TABLES) == []
    changed = {"public.requests": {"rows": 2, "digest": "cd"}}
    assert "another content" in differences(TABLES, changed)[0]
    fewer = {"public.requests": {"rows": 1, "digest": "ab"}}
    assert "1 rows instead of 2" in differences(TABLES, fewer)[0]
    assert "is missing" in differences(TABLES, {})[0]
    assert "should not be there" in differences({}, TABLES)[0]


def backup(number):
    moment = START + timedelta(hours=number)
    return base.BaseBackup(f"label{number}", "full", 1, moment, moment, 10, 5, False)


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        (restore.Target(time="yesterday"), "no time"),
        (restore.Target(time="2026-01-01T02:00:00"), "no time zone"),
        (restore.Target(time="2030-01-01T00:00:00+00:00"), "in the future"),
        (restore.Target(time="2025-01-01T00:00:00+00:00"), "before the end of the first base backup"),
        (restore.Target(lsn="zero"), "no LSN"),
        (restore.Target(lsn="0/1", name="point"), "one of"),
    ],
)
def test_a_target_that_cannot_be_reached_is_refused_before_anything_is_done(target, reason):
    with pytest.raises(RefusedError, match=reason):
        target.options([backup(1), backup(5)], START + timedelta(days=2))


def test_a_time_takes_the_last_backup_before_it():
    found = [backup(1), backup(5), backup(9)]
    options, _words = restore.Target(time="2026-01-01T07:00:00+01:00").options(found, START + timedelta(days=2))
    assert "--set=label5" in options
    with pytest.raises(RefusedError, match="no base backup"):
        restore.Target().options([], START)


def test_a_point_and_an_lsn_take_the_last_backup_before_them():
    found = [replace(backup(hour), lsn=hour << 24) for hour in (1, 5, 9)]
    now, points = START + timedelta(days=2), {"old": [START, START + timedelta(hours=6)], "older": [START]}
    points["twice"] = [START + timedelta(hours=hour) for hour in (6, 7)]
    assert "--set=label5" in restore.Target(name="old").options(found, now, points)[0]
    assert "--set=label9" in restore.Target(name="old").options(found, now)[0]  # no live cluster knows the points
    assert "--set=label5" in restore.Target(lsn="0/8000000").options(found, now)[0]
    for target, reason in (
        ("older", "before the end of the first"),
        ("new", "no point new; the last ones are older, old, twice"),
        ("twice", "several times since base backup label5.* give its time, 2026-01-01T07:00:00"),
    ):
        with pytest.raises(RefusedError, match=reason):
            restore.Target(name=target).options(found, now, points)


def described(number, database, timeline, lsn):
    """Return what pgBackRest says of a backup."""
    size = {"size": 1, "repository": {"delta": 1}}
    times = {"start": number, "stop": number}
    return {
        "label": f"label{number}", "type": "full", "database": {"id": database, "repo-key": 1}, "timestamp": times,
        "info": size, "archive": {"stop": f"{timeline:08X}0000000000000001"}, "lsn": {"stop": lsn},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("backups", "history", "usable"),
    [
        ([(1, 1, "0/9000000"), (2, 1, "0/1000000")], "", ["label1"]),  # of another cluster before, restored from a dump
        ([(2, 1, "0/3000000"), (2, 1, "0/4000000")], "", ["label0", "label1"]),
        # the first timeline was left between them; with the third, the second one, too
        ([(2, 1, "0/3000000"), (2, 1, "0/4000000")], HISTORY, ["label0"]),
        ([(2, 2, "0/4000000"), (2, 2, "0/5000001"), (2, 3, "0/5000001")], HISTORY, ["label0", "label2"]),
    ],
)
def test_only_backups_that_lead_to_the_present_are_restored(monkeypatch, backups, history, usable):
    stanza = {
        "repo": [{"key": 1, "status": {"code": 0}}],
        "db": [{"id": number, "repo-key": 1, "system-id": number} for number in (1, 2)],
        "archive": [{"id": f"17-{number}", "database": {"id": number, "repo-key": 1}} for number in (1, 2)],
        "backup": [described(number, *backup) for number, backup in enumerate(backups)],
    }
    answers = {"info": json.dumps([stanza])}
    answers["archive/main/17-2"] = "00000002.history\n00000003.history\n" if history else ""
    answers["archive/main/17-2/00000003.history"] = history
    monkeypatch.setattr(base, "run", lambda command, user: answers[command[-1]])
    found = base.usable_in(Settings([], [], {}), 1)
    assert [backup.label for backup in found] == usable
    assert restore.Target().options(found, START)[0] == [f"--set={usable[-1]}", "--type=default"]


def test_the_history_of_the_timeline_that_is_promoted_gets_archived_once(tmp_path):
    state = tmp_path / "pg_wal/archive_status"
    state.mkdir(parents=True)
    restore.announce_timeline(tmp_path)  # restored of a dump: the first timeline has none
    for name in ("00000002.history", "0000000A.history", "0000000A0000000000000003"):
        (tmp_path / "pg_wal" / name).touch()
    restore.announce_timeline(tmp_path)
    assert [file.name for file in state.iterdir()] == ["0000000A.history.ready"]
    (state / "0000000A.history.ready").rename(state / "0000000A.history.done")
    restore.announce_timeline(tmp_path)
    assert [file.name for file in state.iterdir()] == ["0000000A.history.done"]


def test_a_timeline_that_an_earlier_version_promoted_gets_archived_too(monkeypatch, tmp_path):
    (tmp_path / "pg_wal/archive_status").mkdir(parents=True)
    (tmp_path / "pg_wal/00000002.history").touch()
    monkeypatch.setattr(Settings, "data", tmp_path)
    monkeypatch.setattr(base, "prepare", lambda _: False)
    monkeypatch.setattr(base, "check_repositories", lambda _: [])
    cli._prepare(Settings([], [], {}), SimpleNamespace())
    assert (tmp_path / "pg_wal/archive_status/00000002.history.ready").exists()


@pytest.mark.parametrize(
    ("newest", "whole", "lacking"),
    [
        ("000000020000000000000004", True, ""),
        ("000000020000000000000009", False, "one before it is missing"),
        ("000000030000000000000004", True, "the history file of their timeline is missing"),
    ],
)
def test_a_restore_that_missed_a_segment_or_a_timeline_says_so(monkeypatch, tmp_path, newest, whole, lacking):
    (tmp_path / "pg_wal").mkdir()
    (tmp_path / "pg_wal/00000003.history").write_text(HISTORY)
    monkeypatch.setattr(restore, "session", lambda *_, **__: contextlib.nullcontext())
    monkeypatch.setattr(restore, "rows", lambda *_: [("0/4100000", whole)])
    monkeypatch.setattr(restore, "acting_as", contextlib.nullcontext)
    cluster = SimpleNamespace(data=tmp_path, port=5433)
    said = restore._gap(Settings([], [], {}), cluster, restore.Target(), newest)
    assert said.endswith(lacking)
    assert bool(said) == bool(lacking)


def test_repositories_that_have_the_cluster_are_asked_no_more(monkeypatch):
    """A base backup may go on meanwhile, as after a promotion."""
    stanza = {"repo": [{"key": 1, "status": {"code": 0}}], "db": [{"id": 1, "repo-key": 1, "system-id": 7}]}
    monkeypatch.setattr(base, "session", lambda *_: contextlib.nullcontext())
    monkeypatch.setattr(base, "one", lambda *_: 7)
    monkeypatch.setattr(base, "run", lambda command, user: {"info": json.dumps([stanza])}[command[-1]])
    assert base.check_repositories(Settings([], [], {})) == []
    stanza["db"][0]["system-id"] = 8
    with pytest.raises(RefusedError, match="of another cluster"):
        base.check_repositories(Settings([], [], {}))


def test_settings_name_what_is_wrong(tmp_path):
    file = tmp_path / "settings.json"
    with pytest.raises(SettingsError, match="cannot be read"):
        load_settings(file)
    whole = '{"databases": [], "recipients": [], "retention": {}, "dump_share": 0}'
    for content, word in (
        ("{", "not JSON"), ('{"x": 1}', "unknown key x"), ("{}", "missing"), (whole, "dump_share is 0, it is above 0")
    ):  # fmt: skip
        file.write_text(content)
        with pytest.raises(SettingsError, match=word):
            load_settings(file)


def test_work_takes_its_share_of_the_time(monkeypatch):
    now, rests = 100.0, []

    def sleep(seconds):
        nonlocal now
        now += seconds
        rests.append(seconds)

    monkeypatch.setattr(tools, "time", SimpleNamespace(monotonic=lambda: now, sleep=sleep))
    pace = tools.Pace(0.25)
    for work in (0.5, 0.25, 3600):
        now += work
        pace.rest()
    whole = tools.Pace()
    now += 1
    whole.rest()
    assert rests == [1.5, 0.75, 5, 0]


def test_a_lock_names_its_holder(tmp_path):
    refused = pytest.raises(LockedError, match=f"process {os.getpid()} since 0 s")
    with tools.lock(tmp_path / "lock"), refused, tools.lock(tmp_path / "lock"):
        pass
    with tools.lock(tmp_path / "lock"):
        pass


def test_without_off_host_copies_none_is_sent_or_fetched(monkeypatch):
    monkeypatch.delenv("CREDENTIALS_DIRECTORY", raising=False)
    for verb in (cli._copy, cli._fetch):
        with pytest.raises(RefusedError, match="no off-host copy is configured"):
            verb(Settings([], [], {}), SimpleNamespace(dump="newest"))


def test_a_copy_elsewhere_does_not_count(tmp_path):
    here, there = (Settings([], [], {}, dumps=str(tmp_path), offsite=place) for place in ("offsite:/a", "offsite:b"))
    assert offsite.state(here) == {}
    tools.write_json(tmp_path / ".offsite.json", {"place": here.offsite, "newest": "", "count": 0})
    assert offsite.state(here)["count"] == 0
    assert offsite.state(there) == {}


def test_status_says_how_old_and_metrics_say_the_same(tmp_path):
    manifest = store(tmp_path, names([1])[0])
    settings = Settings(["litellm"], ["age1"], RETENTION, dumps=str(tmp_path), repositories=[], limits=LIMITS)
    for hours, ok in ((1.5, True), (4, False), (-1, False)):
        checks = status.Status(settings, manifest.moment.timestamp() + hours * 3600)
        result = next(iter(checks.run()))
        assert (result.id, result.ok) == ("dump.newest", ok), result
        text = status.exposition(checks.metrics)
        stamp = round(manifest.moment.timestamp())
        assert f'postgresql_backup_last_success_timestamp_seconds{{kind="dump"}} {stamp}' in text


def test_a_check_that_the_system_refuses_fails_and_the_others_go_on(tmp_path):
    now = START.timestamp()
    checks = status.Status(Settings([], [], {}, dumps=str(tmp_path / "gone"), repositories=[], limits=LIMITS), now)
    checks._archive = checks._room = checks._drill = lambda *_, **__: "seen"
    results = {result.id: result for result in checks.run()}
    assert [result.id for result in results.values() if not result.ok] == ["dump.newest", "dump.files"]
    assert "No such file or directory" in results["dump.files"].seen
    text = status.exposition(checks.metrics)
    assert 'postgresql_backup_check{check="dump.files"} 0' in text
    assert f"postgresql_backup_status_timestamp_seconds {round(now)}" in text


def test_exit_codes_are_in_the_help_and_in_the_readme(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for code in ExitCode:
        assert f"{code.value} {code.name.lower()}" in text
    kinds = {error.exit_code for error in BackupError.__subclasses__()}
    assert kinds == set(ExitCode) - {ExitCode.OK, ExitCode.FAILED, ExitCode.USAGE}


def test_a_wrong_verb_is_a_usage_error():
    with pytest.raises(SystemExit) as ending:
        cli.main(["nothing"])
    assert ending.value.code == ExitCode.USAGE


def test_durations_are_said_in_two_units():
    assert [tools.duration(seconds) for seconds in (0, 59, 60, 3660, 90000)] == [
        "0 s",
        "59 s",
        "1 min",
        "1 h 1 min",
        "1 d 1 h",
    ]


def test_the_last_words_are_the_telling_ones():
    assert tools.last_words(b"noise\npg_dump: error: no\nend\n", None, 1) == "pg_dump: error: no"
    assert tools.last_words(b"", b"", 3) == "exit status 3"


def test_a_server_that_refuses_connections_while_it_recovers_says_nothing_by_that():
    cause = "2026-01-01 00:00:00.000 GMT [7] FATAL:  recovery ended before configured recovery target was reached"
    refused = "2026-01-01 00:00:00.001 GMT [8] FATAL:  the database system is not accepting connections"
    log = f"{refused}\n{cause}\n{refused}\n2026-01-01 00:00:00.002 GMT [1] LOG:  database system is shut down\n"
    assert tools.last_error(log, "FATAL|PANIC") == cause
    assert tools.last_error(refused, "FATAL|PANIC") == refused
    assert tools.last_error("", "FATAL|PANIC") == "its log is empty"
    with pytest.raises(BackupError, match="false failed"):
        tools.run(["false"])


def test_files_appear_whole(tmp_path):
    tools.write_json(tmp_path / "file.json", {"a": 1})
    assert json.loads((tmp_path / "file.json").read_text()) == {"a": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == ["file.json"]


def test_a_generated_identity_has_the_public_half_that_age_computes():
    # From age's own documentation: age-keygen.
    identity = "AGE-SECRET-KEY-1GFPYYSJZGFPYYSJZGFPYYSJZGFPYYSJZGFPYYSJZGFPYYSJZGFPQ4EGAEX"
    assert (
        postgresql_backup_filters.recipient(identity)
        == "age1zvkyg2lqzraa2lnjvqej32nkuu0ues2s82hzrye869xeexvn73equnujwj"
    )
    made = vault_secrets.KINDS["age_identity"]()
    assert made.startswith("AGE-SECRET-KEY-1")
    assert len(postgresql_backup_filters.recipient(made)) == 62
    with pytest.raises(Exception, match="no age identity") as refusal:
        postgresql_backup_filters.recipient(made[:-1] + ("Q" if made[-1] != "Q" else "P"))
    assert made[20:30] not in str(refusal.value)


def test_the_module_is_typed_strictly():
    command = [sys.executable, "-m", "mypy", "--strict", "-p", "postgresql_backup"]
    environment = {**os.environ, "MYPYPATH": "roles/postgresql_backup/files"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tools.Path(__file__).parents[1])
    assert done.returncode == 0, done.stdout


def test_wal_is_measured_over_the_last_hour(tmp_path):
    file = tmp_path / "wal.json"
    file.write_text("damaged")
    pace = 1000.0
    for moment in range(0, 7200, 300):
        found = status.wal_growth(file, 1e9 + moment, int(moment * pace))
        assert found == pytest.approx(0 if not moment else pace if moment >= 900 else moment * pace / 900)
    burst = status.wal_growth(file, 1e9 + 7000, int(7000 * pace + 2**28))
    assert burst == pytest.approx(pace + 2**28 / 3600, rel=0.1)
    assert status.wal_growth(file, 1e9 + 7300, 5) == 0  # of a restored cluster
    assert len(json.loads(file.read_bytes())) <= 3600 / 240 + 1
