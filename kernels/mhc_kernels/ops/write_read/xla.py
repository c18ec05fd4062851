"""The boundary between two sub-layers for plain XLA on TPUs and GPUs; CPUs run the single operations one after another.

The forward pass and the backward pass are each one function.  The gradient of the new streams is a sum of three gradients: from the
next write, the read and the projection.  If the single operations ran one after another, XLA would join each of these gradients
into flat streams before it adds them.  This took a quarter of the boundary's cycles on a v5p.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from mhc_kernels.backends import Saved, through_pre
from mhc_kernels.ops.rms_norm import inverse_rms
from mhc_kernels.ops.write.xla import mixed, pull
from mhc_kernels.xla import add, dots, join, streams, weighted

KEEPS_NEW = True


def forward(
    x: Array, y: Array, post: Array, res: Array, phi: Array, alpha: Array, bias: Array, eps_norm: float, eps: float
) -> tuple[Array, Array, Array, Array]:
    """Map x [*tokens, nC], y [*tokens, C], post [n, *tokens], res, phi [nC, k] -> x', z = x' phi / RMS, inverse = 1 / RMS, h.

    alpha [] and bias [n] are the gate and the static logits of H_pre of the second sub-layer, whose branch input is h.
    """
    n = post.shape[0]
    rows = [row.astype(x.dtype) for row in mixed(x, y, post, res)]
    new = join(rows, x)
    values = [row.astype(jnp.float32) for row in rows]
    inverse = inverse_rms(add(jnp.sum(v * v, axis=-1) for v in values) / x.shape[-1], eps_norm)
    z = jnp.einsum("...c,ck->k...", new.astype(jnp.float32), phi, precision="highest") * inverse[None]
    pre = jax.nn.sigmoid(alpha * z[:n] + bias.reshape(n, *(1,) * (z.ndim - 1))) + eps
    return new, z, inverse, weighted(pre, values).astype(x.dtype)


def backward(saved: Saved, pre: Array, slope: Array, g_new: Array, g_h: Array, g_z: Array) -> tuple[Array, ...]:
    """Return dx, dy, dpost, dres, dphi and dpre by the formulas in `backends.py`; the sum G is rounded to the dtype of x."""
    x, y, post, res, phi, new, z, inverse = saved
    n, C = post.shape[0], y.shape[-1]
    dpre = dots(streams(new, n), g_h.astype(jnp.float32))
    g_z = through_pre(g_z, slope, dpre)
    scaled = g_z * inverse[None]
    shrink = (jnp.sum(scaled * z, axis=0) * inverse / x.shape[-1])[..., None]
    h32, gs = g_h.astype(jnp.float32), []
    for i, (g, v) in enumerate(zip(streams(g_new, n), streams(new, n), strict=True)):
        through_z = jnp.einsum("k...,ck->...c", scaled, phi[i * C : (i + 1) * C], precision="highest")
        gs.append((through_z + g + pre[i][..., None] * h32 - shrink * v).astype(x.dtype).astype(jnp.float32))
    dphi = jnp.einsum("...c,k...->ck", new.astype(jnp.float32), scaled, precision="highest")
    return *pull(gs, x, y, post, res), dphi, dpre
