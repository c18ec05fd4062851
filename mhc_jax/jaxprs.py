"""Walk the traced program of a function, its jaxpr: find called programs, and variables that depend on given ones."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import jax
from jax.extend import core


def called(eqn: core.JaxprEqn) -> list[core.ClosedJaxpr]:
    """Return the programs inside an operation: the target of a call, the body of a loop, or the branches of a conditional."""
    inner = [value for value in jax.tree.leaves(eqn.params, is_leaf=_is_jaxpr) if _is_jaxpr(value)]
    return [value if isinstance(value, core.ClosedJaxpr) else core.ClosedJaxpr(value, ()) for value in inner]


def computed_from(jaxpr: core.Jaxpr, start: Iterable[Any]) -> set[Any]:
    """Return the variables of a jaxpr that depend on the variables in `start`, which are included."""
    dependent = set(start)
    for eqn in jaxpr.eqns:
        if any(isinstance(v, core.Var) and v in dependent for v in eqn.invars):
            dependent.update(eqn.outvars)
    return dependent


def _is_jaxpr(value: Any) -> bool:
    return isinstance(value, core.Jaxpr | core.ClosedJaxpr)
