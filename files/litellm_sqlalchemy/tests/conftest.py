"""Settings of all tests."""

import os
from pathlib import Path

from hypothesis import HealthCheck, settings

settings.register_profile(
    "tests", deadline=None, database=None, max_examples=100, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("thorough", parent=settings.get_profile("tests"), max_examples=5000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "tests"))

collect_ignore = [str(Path(__file__).parent / "support"), str(Path(__file__).parent / "faults")]
