"""How property tests draw: the same examples at every run, nothing kept, and no verdict on how fast the machine is."""

from hypothesis import HealthCheck, settings


def reproducible(max_examples: int):
    """The decorator of a property test."""
    return settings(
        max_examples=max_examples,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=[HealthCheck.too_slow],
    )
