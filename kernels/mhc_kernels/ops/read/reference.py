r"""Read the input of a branch from the streams: $h = H^{pre} x = \sum_i H^{pre}_i x_i$ (mHC, arXiv 2512.24880, Eq. 3)."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array


def read(x: Array, pre: Array, num_streams: int) -> Array:
    """Map streams x [N, nC] and H_pre, pre [n, N], to the branch input h [N, C]."""
    return jnp.einsum("nic,in->nc", x.reshape(len(x), num_streams, -1), pre)
