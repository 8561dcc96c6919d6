"""Injectors of faults: each breaks one thing, on purpose and for as long as the test says."""
