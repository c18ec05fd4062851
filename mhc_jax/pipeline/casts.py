"""Casting of weights to the compute dtype once a step, instead of once in every microbatch.

Flax modules cast a float32 weight where they use it.  In a pipeline this cast lies inside the loop over ticks, and no compiler
moves it out of the loop.  Every microbatch would read all weights of a stage in float32 and write them again in bfloat16.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from mhc_jax.jaxprs import called
from mhc_jax.pipeline.split import CALLS

Tree = Any

_INNER = CALLS | {"scan", "shard_map", "custom_jvp_call", "custom_vjp_call"}
"""Primitives that run an inner jaxpr, whose inputs are their operands in the same order."""
_MOVES = frozenset({"slice", "dynamic_slice", "squeeze", "reshape", "expand_dims", "transpose", "split", "copy"})
"""Primitives that move elements of their first operand without changing them."""


def computed_in(function: Callable[..., Any], params: Tree, *arguments: Any) -> Tree:
    """Return for each of `params` the dtype in which function(params, *arguments) computes with it.

    It is the dtype to which every use of the parameter casts it first, if all uses agree and this dtype is a narrower float.  A
    parameter that is used in two ways, returned, or cast to a wider dtype keeps its own dtype.
    """
    closed = jax.make_jaxpr(function)(params, *arguments)
    leaves, tree = jax.tree.flatten(params)
    dtypes = []
    for a, v in zip(leaves, closed.jaxpr.invars, strict=False):
        targets = _casts(closed.jaxpr, v)
        (target,) = targets if len(targets) == 1 else (None,)
        dtypes.append(target if target is not None and _narrower(target, a.dtype) else np.dtype(a.dtype))
    return tree.unflatten(dtypes)


def cast(params: Tree, dtypes: Tree) -> Tree:
    """Cast each of `params` to its dtype in the tree `dtypes`."""
    return jax.tree.map(lambda a, dtype: a.astype(dtype), params, dtypes)


def _narrower(to: np.dtype, dtype: Any) -> bool:
    both = jnp.issubdtype(to, jnp.floating) and jnp.issubdtype(dtype, jnp.floating)
    return both and to.itemsize < jnp.dtype(dtype).itemsize


def _casts(jaxpr: core.Jaxpr, v: Any) -> set[Any]:
    """Return the dtypes to which a jaxpr casts a variable.  The set also holds None if some use of the variable is no cast."""
    found: set[Any] = {None} if any(out is v for out in jaxpr.outvars) else set()
    for eqn in jaxpr.eqns:
        for k in (k for k, own in enumerate(eqn.invars) if own is v):
            found |= _use(eqn, jaxpr, k)
    return found


def _use(eqn: Any, jaxpr: core.Jaxpr, k: int) -> set[Any]:
    name = eqn.primitive.name
    if name == "convert_element_type":
        return {np.dtype(eqn.params["new_dtype"])}
    if name in _MOVES and k == 0:
        return set().union(*(_casts(jaxpr, out) for out in eqn.outvars))
    if name in _INNER:
        (inner,) = called(eqn)
        return _casts(inner.jaxpr, inner.jaxpr.invars[k])
    return {None}
