"""Arithmetic on streams that the `xla.py` files of the operations share.

CPUs and accelerators need different programs for the same formula.  XLA:CPU is fastest on streams `[*tokens, n, C]`.  On a TPU, a
reshape to this shape moves every number, because n = 4 fills half of the 8 rows of a memory tile.  So on TPUs and GPUs, streams are
a list of n arrays `[*tokens, C]`, which are joined at the end.  The token axes are not merged, which would move every number too.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence

import jax.numpy as jnp
from jax import Array

from mhc_kernels.layout import split


def once(a: Array) -> Array:
    """Return `a` in a form that XLA:CPU computes only once, however often it is used; infinite entries become NaN.

    XLA:CPU computes sums and products again inside every consumer, but a division only once.  It removes `optimization_barrier`
    before it fuses operations, so this function divides by a 1 that depends on `a`.
    """
    return a / (1 + 0 * a)


def add(terms: Iterable[Array]) -> Array:
    """Return the sum of the terms, without the 0 that Python's `sum` starts from."""
    return functools.reduce(jnp.add, terms)


def streams(x: Array, n: int) -> list[Array]:
    """Split flat streams [*tokens, nC] into n float32 arrays [*tokens, C]."""
    return [xi.astype(jnp.float32) for xi in split(x, n)]


def weighted(weights: Sequence[Array] | Array, values: Sequence[Array]) -> Array:
    """Return sum_i weights_i values_i for weights [n, *tokens] and a list of n arrays [*tokens, C]."""
    return add(w[..., None] * v for w, v in zip(weights, values, strict=True))


def join(values: Sequence[Array], like: Array) -> Array:
    """Join n arrays [*tokens, C] to flat streams [*tokens, nC] in the dtype of `like`."""
    return jnp.concatenate([v.astype(like.dtype) for v in values], axis=-1)


def dots(values: Sequence[Array], vector: Array) -> Array:
    """Return the inner products <values_i, vector> over channels, [n, *tokens], for arrays [*tokens, C]."""
    return jnp.stack([jnp.sum(v * vector, axis=-1) for v in values])
