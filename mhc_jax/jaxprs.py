"""Functions on jaxprs, the traced programs of JAX: they find programs inside operations, and variables that depend on others."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import jax
from jax.extend import core


def called(eqn: core.JaxprEqn) -> list[core.ClosedJaxpr]:
    """Return the jaxprs inside an operation: the function that is called, the parts of a loop, or the branches of a conditional."""
    inner = [value for value in jax.tree.leaves(eqn.params, is_leaf=_is_jaxpr) if _is_jaxpr(value)]
    return [value if isinstance(value, core.ClosedJaxpr) else core.ClosedJaxpr(value, ()) for value in inner]


def computed_from(jaxpr: core.Jaxpr, start: Iterable[Any]) -> set[Any]:
    """Return all variables of a jaxpr whose values depend on the variables in `start`, and `start` itself."""
    dependent = set(start)
    for eqn in jaxpr.eqns:
        if any(isinstance(v, core.Var) and v in dependent for v in eqn.invars):
            dependent.update(eqn.outvars)
    return dependent


def _is_jaxpr(value: Any) -> bool:
    return isinstance(value, core.Jaxpr | core.ClosedJaxpr)
