"""What the role postgresql_backup makes of its variables, in settings and units. What they do: molecule/backup."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROLE = ROOT / "roles/postgresql_backup"


def rendered(expression, **variables):
    """Return a Jinja expression's value, by the role's variables and these."""
    given = {"postgresql_backup_repository_passphrase": "none", **variables}
    files = [f"@{ROLE}/defaults/main.yml", f"@{ROLE}/vars/main.yml", json.dumps(given)]
    command = ["ansible", "-i", "localhost,", "localhost", "-m", "debug", "-a", json.dumps({"msg": expression})]
    command += [word for file in files for word in ("-e", file)]
    environment = {**os.environ, "ANSIBLE_CALLBACK_RESULT_FORMAT": "json"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.partition("=> ")[2])["msg"]


@pytest.mark.parametrize(
    ("stanza", "s3", "place"),
    [
        ("main", {}, "offsite:/dumps"),
        ("other", {}, "offsite:/dumps/other"),
        ("other", {"bucket": "b"}, "offsite:b/dumps/other"),
    ],
)
def test_each_stanza_has_its_own_copies(stanza, s3, place):
    host = {} if s3 else {"host": "backup1"}
    variables = {"postgresql_backup_offsite_s3": s3, "postgresql_backup_offsite_host": host}
    found = rendered("{{ __postgresql_backup_settings.offsite }}", postgresql_backup_stanza=stanza, **variables)
    assert found == place


ETC = "/etc/postgresql-backup"
KEY = [f"{ETC}/offsite/key", f"{ETC}/offsite/key.pub", f"{ETC}/known_hosts"]
HOST = {"postgresql_backup_offsite_host": {"host": "backup1"}}
BUCKET = {"postgresql_backup_offsite_s3": {"bucket": "b"}}


@pytest.mark.parametrize(
    ("variables", "unused"),
    [
        ({}, [f"{ETC}/rclone.conf", *KEY]),
        (BUCKET, KEY),
        ({**BUCKET, "postgresql_backup_public_key": "ssh-ed25519 AAAA"}, []),  # a host takes copies, too
        (HOST, []),
    ],
)
def test_credentials_that_no_copy_needs_are_unused(variables, unused):
    name = f"{ROLE}/templates/postgresql-backup-copy.service.j2"
    found, unit = rendered(
        f"{{{{ [__postgresql_backup_unused_files, lookup('ansible.builtin.template', '{name}')] }}}}", **variables
    )
    assert found == unused
    asked = re.findall(r"^LoadCredential=\S+:(\S+)", unit, re.M)
    assert asked == ([f"{ETC}/rclone.conf"] if variables else []) + (KEY[:1] if variables == HOST else [])


def test_unused_files_are_removed_once_and_not_in_check_mode(tmp_path):
    (tmp_path / "key").write_text("secret")
    (tmp_path / "other").touch()
    arguments = {"files": [], "absent": [f"{tmp_path}/key", f"{tmp_path}/key.pub"]}
    command = ["ansible", "-i", "localhost,", "-c", "local", "localhost", "-m", "postgresql_backup_files", "-a"]
    command += [json.dumps(arguments), "-e", f"ansible_python_interpreter={sys.executable}", "--diff"]
    result = {"ANSIBLE_CALLBACK_RESULT_FORMAT": "json"}
    environment = {**os.environ, **result, "ANSIBLE_LIBRARY": str(ROLE / "library")}
    for check, changed, there in (("--check", "true", True), ("-o", "true", False), ("-o", "false", False)):
        done = subprocess.run([*command, check], cwd=ROOT, capture_output=True, text=True, env=environment)
        assert f'"changed": {changed}' in done.stdout, done.stdout + done.stderr
        assert "secret" not in done.stdout
        assert (tmp_path / "key").exists() == there
    assert (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("options", "written"),
    [
        ({}, ["/var/lib/pgbackrest"]),
        ({"repo1-path": "/srv/backups"}, ["/srv/backups"]),
        ({"repo1-path": "/backups", "repo1-type": "s3"}, []),
    ],
)
def test_units_write_where_the_first_repository_is(options, written):
    names = ["server-unit.conf", "postgresql-backup-base@.service", "tmpfiles.conf", "pgbackrest.conf"]
    texts = [f"lookup('ansible.builtin.template', '{ROLE}/templates/{name}.j2')" for name in names]
    variables = {"postgresql_backup_pgbackrest_options": options, "item": {"drill": False}}
    server, base, directories, settings = rendered(f"{{{{ [{', '.join(texts)}] }}}}", **variables)
    for unit in (server, base):
        paths = re.search(r"^ReadWritePaths=(.*)", unit, re.M)[1].split()
        assert paths[: len(written) + 1] == [*written, "/var/log/pgbackrest"]
    assert re.findall(r"^d (\S*/(?:pgbackrest|backups)) 2750", directories, re.M) == written
    assert f"repo1-path={options.get('repo1-path', '/var/lib/pgbackrest')}\n" in settings
