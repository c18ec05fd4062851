"""The XLA form of read, write and projection for TPUs and GPUs: one array a stream, joined at the end.

On a TPU a reshape of `[*tokens, n C]` to `[*tokens, n, C]`, which is what XLA:CPU likes best, moves every number (n = 4 fills half
of a tile's 8 rows): mHC's two layers of width 2560 took 131 M cycles on a v5p with it (residual: 75 M).  Nor are batch and tokens
made one axis: XLA likes to keep tokens on the lanes, where that moves every number too.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax.numpy as jnp
from jax import Array

from mhc_kernels.ops.rms import inverse_rms


def streams(x: Array, n: int) -> list[Array]:
    """Stream i is columns i C to (i + 1) C; float32."""
    return [xi.astype(jnp.float32) for xi in jnp.split(x, n, axis=-1)]


def weighted(weights: Sequence[Array] | Array, values: Sequence[Array]) -> Array:
    """sum_i weights_i values_i; [*tokens] and [*tokens, C]."""
    return functools.reduce(jnp.add, (w[..., None] * v for w, v in zip(weights, values, strict=True)))


def join(values: Sequence[Array], like: Array) -> Array:
    """Flat streams in the dtype of `like`."""
    return jnp.concatenate([v.astype(like.dtype) for v in values], axis=-1)


def dots(values: Sequence[Array], other: Array) -> Array:
    """<values_i, other> over channels: [n, *tokens]."""
    return jnp.stack([jnp.sum(v * other, axis=-1) for v in values])


def read_gradients(x: Array, pre: Array, g: Array) -> tuple[Array, Array]:
    """-> dx, dpre."""
    g32 = g.astype(jnp.float32)
    return join([p[..., None] * g32 for p in pre], x), dots(streams(x, pre.shape[0]), g32)


def write(x: Array, y: Array, post: Array, res: Array) -> Array:
    """x' of `mhc_kernels.write`."""
    xs, y32 = streams(x, post.shape[0]), y.astype(jnp.float32)
    return join([weighted(row, xs) + p[..., None] * y32 for row, p in zip(res, post, strict=True)], x)


def write_gradients(x: Array, y: Array, post: Array, res: Array, g: Array) -> tuple[Array, Array, Array, Array]:
    """-> dx, dy, dpost, dres."""
    n = post.shape[0]
    xs, gs = streams(x, n), streams(g, n)
    dx = join([weighted(res[:, j], gs) for j in range(n)], x)
    dres = jnp.stack([dots(gs, xj) for xj in xs], axis=1)
    return dx, *post_gradients(y, post, g), dres


def post_gradients(y: Array, post: Array, g: Array) -> tuple[Array, Array]:
    """Gradients of post_i y with respect to y and post."""
    gs = streams(g, post.shape[0])
    return weighted(post, gs).astype(y.dtype), dots(gs, y.astype(jnp.float32))


def add_written(x: Array, y: Array, post: Array) -> Array:
    """x_i + post_i y."""
    y32 = y.astype(jnp.float32)
    return join([xi + p[..., None] * y32 for xi, p in zip(streams(x, post.shape[0]), post, strict=True)], x)


def projection(x: Array, phi: Array, eps_norm: float) -> tuple[Array, tuple[Array, ...]]:
    """z = (v phi) / RMS(v), [k, *tokens], and what its gradient needs."""
    v = x.astype(jnp.float32)
    inverse = inverse_rms(jnp.mean(v * v, axis=-1), eps_norm)
    z = jnp.einsum("...c,ck->k...", v, phi, precision="highest") * inverse[None]
    return z, (x, phi, inverse, z)


def projection_gradients(x: Array, phi: Array, inverse: Array, z: Array, g: Array) -> tuple[Array, Array]:
    """-> dx, dphi; the formula stands beside the CPU's form."""
    v = x.astype(jnp.float32)
    scaled = g * inverse[None]
    shrink = jnp.sum(scaled * z, axis=0) * inverse / x.shape[-1]
    dv = jnp.einsum("k...,ck->...c", scaled, phi, precision="highest") - shrink[..., None] * v
    return dv.astype(x.dtype), jnp.einsum("...c,k...->ck", v, scaled, precision="highest")
