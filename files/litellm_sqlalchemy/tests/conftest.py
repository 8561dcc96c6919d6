"""Settings of all tests."""

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile(
    "tests", deadline=None, database=None, max_examples=100, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("thorough", parent=settings.get_profile("tests"), max_examples=5000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "tests"))

collect_ignore = [str(Path(__file__).parent / "support"), str(Path(__file__).parent / "faults")]


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let the command line say how long the soak is."""
    parser.addoption("--events", type=int, default=100_000, help="events of the soak")
    parser.addoption("--seed", type=int, default=1, help="seed of the soak's faults")
    parser.addoption("--every-call", action="store_true", help="kill processes in every system call, not in some")
