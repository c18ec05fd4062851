"""h = H_pre x on flat streams, with a hand-written VJP.  The semantics of the op."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mhc_kernels import choice
from mhc_kernels.ops import flat
from mhc_kernels.ops.once import once


def split(x: Float[Array, "*tokens nC"], num_streams: int) -> list[Float[Array, "*tokens C"]]:
    """Streams of a flat stream-major array: stream i is columns i C to (i + 1) C."""
    return jnp.split(x, num_streams, axis=-1)  # one operation, whose gradient is one concatenation


def read(
    x: Float[Array, "*tokens nC"], pre: Float[Array, "n *tokens"] | None, num_streams: int
) -> Float[Array, "*tokens C"]:
    """See `mhc_kernels.read`, whose meaning this is."""
    if pre is None:
        if num_streams == 1:
            return x
        mean = functools.reduce(jnp.add, (xi.astype(jnp.float32) for xi in split(x, num_streams)))
        return (mean / num_streams).astype(x.dtype)
    return _read(x, pre)


@jax.custom_vjp
def _read(x, pre):
    streams = split(x, pre.shape[0])
    h = functools.reduce(jnp.add, (p[..., None] * xi.astype(jnp.float32) for p, xi in zip(pre, streams, strict=True)))
    return h.astype(x.dtype)


def _read_bwd(saved, g):
    x, pre = saved
    if choice.platform() != "cpu":
        return flat.read_gradients(x, pre, g)
    g32 = once(g.astype(jnp.float32))  # or the gradient of the branch's norm is computed again for every stream
    dx = (jnp.moveaxis(pre, 0, -1)[..., None] * g32[..., None, :]).reshape(x.shape).astype(x.dtype)
    streams = x.reshape(*g.shape[:-1], pre.shape[0], g.shape[-1]).astype(jnp.float32)
    dpre = jnp.einsum("...ic,...c->...i", streams, g32, precision="highest")
    return dx, jnp.moveaxis(dpre, -1, 0)


_read.defvjp(lambda x, pre: (_read(x, pre), (x, pre)), _read_bwd)
