"""Products of cases of which the fast suite takes some; the rest is marked `full`."""

from collections.abc import Callable, Iterable
from typing import Any

import pytest


def thin(cases: Iterable[Any], keep: Callable[..., bool]) -> list[Any]:
    """The cases for `parametrize`, those that `keep` refuses as `full`; a tuple is one case of several arguments."""
    out = []
    for case in cases:
        values = case if isinstance(case, tuple) else (case,)
        out.append(case if keep(*values) else pytest.param(*values, marks=pytest.mark.full))
    return out
