"""Which releases stay on a host: the one in use, the previous one, and as many older ones as the variable says."""

import os
import subprocess
from pathlib import Path

import jinja2
import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
TASKS = yaml.safe_load((ROOT / "roles/python_service/tasks/activate.yml").read_text())


@pytest.mark.parametrize(
    ("keep", "previous", "stay"),
    [
        (2, "fourth", ["fifth", "fourth", "third"]),
        (1, "fourth", ["fifth", "fourth"]),
        (0, "fourth", ["fifth", "fourth"]),  # a release that does not become ready goes back to it
        (2, "first", ["fifth", "first", "fourth"]),
    ],
)
def test_as_many_older_releases_stay_as_the_variable_says(
    tmp_path: Path, keep: int, previous: str, stay: list[str]
) -> None:
    releases = tmp_path / "releases"
    for age, name in enumerate(["fifth", "fourth", "third", "second", "first"]):
        (releases / name).mkdir(parents=True)
        os.utime(releases / name, (1_000_000_000 - age, 1_000_000_000 - age))
    (tmp_path / "previous").symlink_to(f"releases/{previous}")
    (task,) = (task["ansible.builtin.shell"] for task in TASKS if task["name"].endswith("Remove the oldest releases"))
    script = jinja2.Template(task["cmd"]).render(python_service_keep_releases=keep)
    environment = os.environ | {"current": "fifth"}
    subprocess.run([task["executable"], "-c", script], cwd=releases, env=environment, check=True)
    assert sorted(path.name for path in releases.iterdir()) == sorted(stay)
