"""Casting of weights to the compute dtype once a step, instead of once in every microbatch.

Flax modules cast a float32 weight where they use it.  In a pipeline they use it inside the loop over ticks, and XLA does not move
the cast out.  Without this module every microbatch would read the weights of a stage in float32 and write them in bfloat16.
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
"""Names of primitives that run an inner jaxpr.  The inputs of the jaxpr are the operands of the primitive, in the same order."""
_MOVES = frozenset({"slice", "dynamic_slice", "squeeze", "reshape", "expand_dims", "transpose", "split", "copy"})
"""Names of primitives that move or select elements of their first operand, without a change of value."""


def computed_in(function: Callable[..., Any], params: Tree, *arguments: Any) -> Tree:
    """Return for each of `params` the dtype in which function(params, *arguments) computes with it.

    If every use of a parameter first casts it to the same narrower float dtype, this is the dtype.  Otherwise the dtype is the
    parameter's own, as for a parameter that some use does not cast, or that the function returns.
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
    """Return the set of dtypes to which a jaxpr casts a variable.  It contains None if some use of the variable is no cast."""
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
