"""What the role postgresql_backup makes of its variables, in settings and units. What they do: molecule/backup."""

import json
import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROLE = ROOT / "roles/postgresql_backup"


def rendered(expression, **variables):
    """Return a Jinja expression's value, by the role's variables and these."""
    given = {"postgresql_backup_repository_passphrase": "none", **variables}
    files = [f"@{ROLE}/defaults/main.yml", f"@{ROLE}/vars/main.yml", json.dumps(given)]
    command = ["ansible", "localhost", "-m", "debug", "-a", json.dumps({"msg": expression})]
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
