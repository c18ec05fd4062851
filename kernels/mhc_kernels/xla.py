"""Arithmetic on streams that the XLA forms of the operations share.

CPUs and accelerators want different programs for the same formula.  XLA:CPU is fastest on `[*tokens, n, C]`.  On a TPU that reshape
moves every number, because n = 4 fills half of the 8 rows of a tile.  There, and on GPUs, streams are a list of n arrays that are
joined at the end.  Batch and tokens stay two axes, because merging them moves every number too.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence

import jax.numpy as jnp
from jax import Array

from mhc_kernels.layout import split


def once(a: Array) -> Array:
    """Return `a`, computed one time on CPUs: the same numbers, and NaN where they are infinite or NaN.

    XLA:CPU computes sums and products again inside every consumer, but a division only once.  It removes `optimization_barrier`
    before it fuses, so this divides by a 1 that depends on `a`.
    """
    return a / (1 + 0 * a)


def add(terms: Iterable[Array]) -> Array:
    """Sum without a 0 to begin with."""
    return functools.reduce(jnp.add, terms)


def streams(x: Array, n: int) -> list[Array]:
    """Streams of a flat array [*tokens, nC] as n float32 arrays [*tokens, C]."""
    return [xi.astype(jnp.float32) for xi in split(x, n)]


def weighted(weights: Sequence[Array] | Array, values: Sequence[Array]) -> Array:
    """sum_i weights_i values_i for weights [n, *tokens] and n values [*tokens, C]."""
    return add(w[..., None] * v for w, v in zip(weights, values, strict=True))


def join(values: Sequence[Array], like: Array) -> Array:
    """Flat streams [*tokens, nC] in the dtype of `like`."""
    return jnp.concatenate([v.astype(like.dtype) for v in values], axis=-1)


def dots(values: Sequence[Array], vector: Array) -> Array:
    """Products <values_i, vector> over channels, [n, *tokens]."""
    return jnp.stack([jnp.sum(v * vector, axis=-1) for v in values])
