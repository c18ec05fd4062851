"""The boundary as XLA runs it on TPUs and GPUs: streams as a list, joined where they leave.

Forward and backward are each written as a whole, because the gradient that reaches the new streams is a sum of three (of the next
write, the read and the projection): composed of single operations, XLA joins each of the three and adds them, which was a quarter
of the boundary's cycles on a v5p.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import Array

from mhc_kernels.ops.flat import dots, join, streams, weighted
from mhc_kernels.ops.rms import inverse_rms


def forward(
    x: Array, y: Array, post: Array, res: Array, phi: Array, alpha: Array, bias: Array, eps_norm: float, eps: float
) -> tuple[Array, Array, Array, Array]:
    """x [*tokens, nC], y [*tokens, C], post [n, *tokens], phi [nC, k], alpha [], bias [n] of pre -> x', z, inverse, h."""
    n = post.shape[0]
    xs, y32 = streams(x, n), y.astype(jnp.float32)
    rows = [(weighted(row, xs) + p[..., None] * y32).astype(x.dtype) for row, p in zip(res, post, strict=True)]
    new = join(rows, x)
    values = [row.astype(jnp.float32) for row in rows]
    squares = functools.reduce(jnp.add, (jnp.sum(v * v, axis=-1) for v in values))
    inverse = inverse_rms(squares / x.shape[-1], eps_norm)
    z = jnp.einsum("...c,ck->k...", new.astype(jnp.float32), phi, precision="highest") * inverse[None]
    pre = jax.nn.sigmoid(alpha * z[:n] + bias.reshape(n, *(1,) * (z.ndim - 1))) + eps
    return new, z, inverse, weighted(pre, values).astype(x.dtype)


def read_products(new: Array, g_h: Array) -> Array:
    """x' [*tokens, nC], g_h [*tokens, C] -> <x'_i, g_h> [n, *tokens]."""
    return dots(streams(new, new.shape[-1] // g_h.shape[-1]), g_h.astype(jnp.float32))


def backward(
    x: Array,
    y: Array,
    post: Array,
    res: Array,
    new: Array,
    pre: Array,
    phi: Array,
    z: Array,
    inverse: Array,
    g_new: Array,
    g_h: Array,
    g_z: Array,
) -> tuple[Array, Array, Array, Array, Array]:
    """-> dx, dy, dpost, dres, dphi.

    The gradient of x'_i is g_i + pre_i g_h + (g_z phi_i^T) / RMS - x'_i (g_z . z) / (RMS^2 nC), rounded to the dtype of x once.
    """
    n, C = post.shape[0], y.shape[-1]
    scaled = g_z * inverse[None]
    shrink = (jnp.sum(scaled * z, axis=0) * inverse / x.shape[-1])[..., None]
    h32, y32 = g_h.astype(jnp.float32), y.astype(jnp.float32)
    gradients = []
    for i, (g, v) in enumerate(zip(streams(g_new, n), streams(new, n), strict=True)):
        through_z = jnp.einsum("k...,ck->...c", scaled, phi[i * C : (i + 1) * C], precision="highest")
        gradients.append((through_z + g + pre[i][..., None] * h32 - shrink * v).astype(x.dtype).astype(jnp.float32))
    dx = join([weighted(res[:, j], gradients) for j in range(n)], x)
    dres = jnp.stack([dots(gradients, xj) for xj in streams(x, n)], axis=1)
    dphi = jnp.einsum("...c,k...->ck", new.astype(jnp.float32), scaled, precision="highest")
    return dx, weighted(post, gradients).astype(y.dtype), dots(gradients, y32), dres, dphi
