"""The read h = H_pre x on flat streams for plain XLA, with a hand-written gradient."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from mhc_kernels import backend_choice
from mhc_kernels.xla import add, dots, join, once, streams, weighted


def read(x: Array, pre: Array | None, num_streams: int) -> Array:
    """Map x [*tokens, nC], pre [n, *tokens] -> h [*tokens, C]; `mhc_kernels.read` has the formula."""
    if pre is not None:
        return _read(x, pre)
    return x if num_streams == 1 else (add(streams(x, num_streams)) / num_streams).astype(x.dtype)


@jax.custom_vjp
def _read(x, pre):
    return weighted(pre, streams(x, len(pre))).astype(x.dtype)


def _read_bwd(saved, g):
    """Return dx_i = pre_i g and dpre_i = <x_i, g>, where g is the gradient of h."""
    x, pre = saved
    g32 = g.astype(jnp.float32)
    if backend_choice.platform() != "cpu":
        return join([p[..., None] * g32 for p in pre], x), dots(streams(x, len(pre)), g32)
    g32 = once(g32)  # without `once`, XLA:CPU computes the gradient of the branch's norm again for each stream
    dx = (jnp.moveaxis(pre, 0, -1)[..., None] * g32[..., None, :]).reshape(x.shape).astype(x.dtype)
    xs = x.reshape(*g.shape[:-1], len(pre), g.shape[-1]).astype(jnp.float32)
    dpre = jnp.einsum("...ic,...c->...i", xs, g32, precision="highest")
    return dx, jnp.moveaxis(dpre, -1, 0)


_read.defvjp(lambda x, pre: (_read(x, pre), (x, pre)), _read_bwd)
