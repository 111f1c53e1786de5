"""A package only so that tests can share `tests.strategies`."""
