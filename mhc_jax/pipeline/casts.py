"""Weights in the type that a function computes with: cast once a step instead of in every microbatch.

Flax modules cast a float32 weight where they use it.  In a pipeline that is in a branch of the loop over ticks, from where no
compiler takes it out: every microbatch would read all weights of a stage in float32 and write them in bfloat16 again.
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
"""Operations that run a program on what they get, in order."""
_MOVES = frozenset({"slice", "dynamic_slice", "squeeze", "reshape", "expand_dims", "transpose", "split", "copy"})
"""Operations that take elements of their first operand as they are."""


def computed_in(function: Callable[..., Any], params: Tree, *arguments: Any) -> Tree:
    """For each of `params` the type that function(params, *arguments) casts it to before anything else, else its own.

    A parameter that is used in two ways, or given back, keeps its type, and so does one that is cast to a wider one.
    """
    closed = jax.make_jaxpr(function)(params, *arguments)
    leaves, tree = jax.tree.flatten(params)
    found = [_casts(closed.jaxpr, v) for v in closed.jaxpr.invars[: len(leaves)]]
    return tree.unflatten(
        next(iter(to)) if len(to) == 1 and None not in to and _narrower(next(iter(to)), a.dtype) else np.dtype(a.dtype)
        for a, to in zip(leaves, found, strict=True)
    )


def cast(params: Tree, dtypes: Tree) -> Tree:
    """`params`, each in its type."""
    return jax.tree.map(lambda a, dtype: a.astype(dtype), params, dtypes)


def _narrower(to: np.dtype, dtype: Any) -> bool:
    both = jnp.issubdtype(to, jnp.floating) and jnp.issubdtype(dtype, jnp.floating)
    return both and to.itemsize < jnp.dtype(dtype).itemsize


def _casts(jaxpr: core.Jaxpr, v: Any) -> set[Any]:
    """The types that a variable is cast to; None among them: it is used in another way."""
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
