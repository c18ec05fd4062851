"""The fast suite runs some cases of a product, and `make test-all` runs all of them."""

import pytest


def thin(cases, keep):
    """`cases` for `pytest.mark.parametrize`; those that `keep(case)` refuses are marked `full`."""
    return [case if keep(case) else _full(case) for case in cases]


def _full(case):
    return pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.full)
