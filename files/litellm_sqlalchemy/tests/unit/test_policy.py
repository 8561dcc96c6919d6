"""Which content mode holds for a call."""

import timeit
from pathlib import Path
from typing import Any

import pytest
import yaml

from litellm_sqlalchemy.errors import SettingsError
from litellm_sqlalchemy.policy import Policy
from litellm_sqlalchemy.settings import ContentSettings, load_settings

POLICIES: dict[str, Any] = {
    "keys": {"a" * 64: "full", "batch-*": "metadata", "batch-eu-*": "redacted"},
    "teams": {"legal": "metadata", "l*": "redacted"},
    "models": {"gpt-5": "metadata", "gpt-*": "redacted"},
}


def _policy(mode: str = "full", **policies: Any) -> Policy:
    return Policy(ContentSettings.model_validate({"mode": mode, "policies": policies}))


@pytest.mark.parametrize(
    ("key", "alias", "team", "model", "mode"),
    [
        (None, None, None, None, "full"),
        (None, None, "other", "claude", "full"),
        (None, None, None, "gpt-4", "redacted"),
        (None, None, None, "gpt-5", "metadata"),
        (None, None, "legal", "claude", "metadata"),
        (None, None, "lab", "claude", "redacted"),
        ("a" * 64, None, "legal", "gpt-5", "full"),
        ("b" * 64, "batch-1", "lab", "gpt-4", "metadata"),
        ("b" * 64, "batch-eu-1", "legal", "gpt-5", "redacted"),
    ],
)
def test_the_key_counts_before_the_team_before_the_model(
    key: str | None, alias: str | None, team: str | None, model: str | None, mode: str
) -> None:
    assert _policy(**POLICIES).mode(key, alias, team, model) == mode


@pytest.mark.parametrize(
    ("mode", "policies", "strictest", "keeps_content"),
    [
        ("full", {}, "full", True),
        ("metadata", {}, "metadata", False),
        ("metadata", {"teams": {"a": "redacted"}}, "metadata", True),
        ("full", {"teams": {"a": "redacted"}}, "redacted", True),
        ("full", {"keys": {"a": "metadata"}}, "metadata", True),
    ],
)
def test_the_strictest(mode: str, policies: dict[str, Any], strictest: str, keeps_content: bool) -> None:
    policy = _policy(mode, **policies)
    assert (policy.strictest, policy.keeps_content) == (strictest, keeps_content)


def test_it_costs_microseconds() -> None:
    policy = _policy(teams={f"team-{n}": "redacted" for n in range(10_000)}, models={"gpt-*": "metadata"})
    seconds = min(timeit.repeat(lambda: policy.mode("a" * 64, "alias", "team-7", "demo"), number=10_000, repeat=5))
    assert seconds / 10_000 < 5e-6


@pytest.mark.parametrize(
    ("policies", "says"),
    [
        ({"models": {"a*b": "full"}}, "content.policies.models.a*b"),
        ({"teams": {"legal": "some"}}, "`content.policies.teams.legal` is 'some'"),
        ({"users": {}}, "unknown key `content.policies.users`"),
        ({"keys": {"sk-1234567890abcdef": "full"}}, "never the key"),
    ],
)
def test_a_wrong_policy_is_named_and_a_key_is_never_shown(policies: dict[str, Any], says: str, tmp_path: Path) -> None:
    file = tmp_path / "settings.yml"
    file.write_text(yaml.safe_dump({"database": {"host": "x"}, "content": {"policies": policies}}))
    with pytest.raises(SettingsError) as caught:
        load_settings(file)
    assert says in str(caught.value)
    assert "1234567890" not in str(caught.value)
