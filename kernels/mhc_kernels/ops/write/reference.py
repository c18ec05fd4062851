r"""Write the output of a branch to the streams: $x' = H^{res} x + (H^{post})^\top y$ (mHC, arXiv 2512.24880, Eq. 3).

Stream i becomes $x'_i = \sum_j H^{res}_{ij} x_j + H^{post}_i y$.  $H^{res}$ is applied without a transpose.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array


def write(x: Array, y: Array, post: Array, res: Array, num_streams: int) -> Array:
    """Map streams x [N, nC], branch output y [N, C], post [n, N], res [n, n, N] -> new streams x' [N, nC]."""
    mixed = jnp.einsum("ijn,njc->nic", res, x.reshape(len(x), num_streams, -1))
    return (mixed + jnp.einsum("in,nc->nic", post, y)).reshape(x.shape)
