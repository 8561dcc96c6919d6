"""Which login of a pair gets the password: the module postgresql_access, with the filter for its verifiers."""

import importlib.util
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest

ROLE = Path(__file__).resolve().parent.parent / "roles/postgresql"
PASSWORD, OTHER = "a password for a test", "another password for a test"


def load(path, name):
    """Import a file of the role, under the name that others import it by."""
    specification = importlib.util.spec_from_file_location(name, ROLE / path)
    module = sys.modules[name] = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


load("module_utils/postgresql_peer.py", "ansible.module_utils.postgresql_peer")
postgresql_access = load("library/postgresql_access.py", "postgresql_access")
filters = load("filter_plugins/postgresql_filters.py", "postgresql_filters")


@pytest.fixture
def server(monkeypatch):
    """Return a function that takes the pair's logins (enabled when, password) and gives what a run does to them."""

    def run(*logins):
        found = [
            (f"app_{end}", bool(enabled), 5, password and filters.scram_verifier(password), comment, False, [])
            for end, (enabled, password) in zip("ab", logins, strict=True)
            for comment in [f"enabled {enabled}T00:00:00Z" if enabled else "idle"]
        ]
        stored = {name: verifier or "" for name, _login, _limit, verifier, *_rest in found}
        salts = {name: verifier.rpartition("$")[0] for name, verifier in stored.items()}
        pairs = [{"name": "app", "password": PASSWORD, "connection_limit": 5, "member_of": []}]
        answers = {postgresql_access.ROLES: found}
        monkeypatch.setattr(postgresql_access, "connect", lambda port: None)
        monkeypatch.setattr(postgresql_access, "rows", lambda connection, query: answers.get(query, []))
        params = {"port": 5432, "groups": [], "databases": [], "login_pairs": filters.without_passwords(pairs)}
        params["verifiers"] = filters.login_verifiers(pairs, salts)
        access = postgresql_access.Access(SimpleNamespace(params=params, check_mode=True))
        monkeypatch.setattr(access, "do", noted := Mock(wraps=access.do))
        access.all()
        run.comments = [call.args[-1] for call in noted.call_args_list if call.args[-1].startswith("enabled")]
        return [re.sub(" with the new password$", "", change) for change in access.changes]

    return run


@pytest.mark.parametrize(
    ("a", "b", "changes"),
    [
        (("2026-01-01", PASSWORD), ("", ""), []),
        (("2026-01-01", OTHER), ("", ""), ["enable login app_b"]),
        (("", ""), ("", ""), ["enable login app_a"]),
        (("2026-01-01", PASSWORD), ("2026-01-02", OTHER), ["prefer login app_a again"]),
        # restored of a dump, which has no passwords
        (("2026-01-01", ""), ("", ""), ["enable login app_a"]),
        (("", ""), ("2026-01-01", ""), ["enable login app_b"]),
        (("2026-01-01", ""), ("2026-01-02", ""), ["enable login app_b"]),
        (("2026-01-01", PASSWORD), ("2026-01-02", ""), ["prefer login app_a again"]),
        (("2026-01-01", OTHER), ("2026-01-02", ""), ["enable login app_b"]),
    ],
)
def test_a_run_ends_with_the_password_on_the_login_that_was_enabled_last(server, a, b, changes):
    assert server(a, b) == changes


def test_a_login_that_is_enabled_after_the_clock_was_set_back_is_the_last_one_all_the_same(server):
    assert server(("2199-12-31", OTHER), ("", "")) == ["enable login app_b"]
    assert server.comments == ["enabled 2199-12-31T00:00:01Z"]
