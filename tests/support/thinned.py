"""Full products of cases, of which the fast suite runs some."""

from collections.abc import Callable, Iterable
from typing import Any

import pytest


def thin(cases: Iterable[Any], keep: Callable[[Any], bool]) -> list[Any]:
    """The cases for `parametrize`; those that are not kept run in the full suite alone."""
    own = [(case, case if isinstance(case, tuple) else (case,)) for case in cases]
    return [pytest.param(*values, marks=() if keep(case) else pytest.mark.full) for case, values in own]
