r"""Writes of rank r, the setting `write_rank` of mHC: the increments of the n streams of a token span up to r directions.

    $x'_i = \sum_j H^{res}_{ij} x_j + H^{post}_i y + \sum_{k=2}^{r} p_{ki}\, w_k \odot y$

mHC adds multiples of one vector, the branch output y, to all its streams.  xHC (arXiv 2607.14530) holds that this write is what
limits more than 4 streams.  This file is our reduction of its idea, and no published method: each further direction is y times a
learned vector w_k [C], with coefficients p_k of its own, so that it costs r C parameters and no matrix product.  In a pipeline a
message carries w once for each token, (r - 1) C float32 numbers more, which the planned costs of pipelines do not count.

$p_k = 2 \sigma(\alpha z_k + b_k) - 1$ is in (-1, 1), where z is the projection of the streams that also makes H_post.  It starts at
exactly 0, so that mHC starts as it does with `write_rank=1`.  w starts with random normal numbers, because with equal numbers the
increments would have rank 1.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float
from mhc_kernels import projection, write


class RankedCoefficients(NamedTuple):
    """Coefficients of a sub-layer whose write has rank r, float32, with the axes of tokens last."""

    pre: Float[Array, "n B T"] | None
    post: Float[Array, "n B T"]
    res: Float[Array, "n n B T"] | None
    more: Float[Array, "ranks n B T"]
    """Coefficients p of the r - 1 further directions."""
    scale: Float[Array, "ranks C"]
    """Vectors w of these directions.  They are parameters of the sub-layer, and travel with its coefficients, because the module of
    the next sub-layer does the write."""


def more_posts(
    x: Float[Array, "*tokens nC"],
    phi: Float[Array, "nC k"],
    alpha: Float[Array, " 1"],
    bias: Float[Array, " k"],
    num_streams: int,
    eps_norm: float,
) -> Float[Array, "ranks n *tokens"]:
    r"""Make the coefficients p of the further directions from flat streams, float32: $2 \sigma(\alpha z + b) - 1$.

    Examples:
      With phi = 0 the bias alone decides: 2 sigmoid(ln 3) - 1 = 1/2.

      >>> bias = jnp.log(jnp.array([3.0, 1.0]))
      >>> print(more_posts(jnp.ones((1, 6)), jnp.zeros((6, 2)), jnp.ones(1), bias, 2, 1e-20)[..., 0].round(6))
      [[0.5 0. ]]
    """
    z = projection(x, phi, eps_norm)
    p = jnp.tanh((alpha[0] * z + bias.reshape(-1, *(1,) * (z.ndim - 1))) / 2)
    return p.reshape(-1, num_streams, *p.shape[1:])


def ranked_write(
    x: Float[Array, "*tokens nC"], c: RankedCoefficients, y: Float[Array, "*tokens C"], num_streams: int
) -> Float[Array, "*tokens nC"]:
    """Return the streams after the write of rank r.  Sums are in float32, and the result has the dtype of the streams x.

    Examples:
      Two streams of two channels: y = [1, 1] goes to both, and w y = [2, -2] to the second one.

      >>> post, more, scale = jnp.ones((2, 1)), jnp.array([[[0.0], [1.0]]]), jnp.array([[2.0, -2.0]])
      >>> print(ranked_write(jnp.zeros((1, 4)), RankedCoefficients(None, post, None, more, scale), jnp.ones((1, 2)), 2))
      [[ 1.  1.  3. -1.]]
    """
    dtype, y = x.dtype, y.astype(jnp.float32)
    x = write(x.astype(jnp.float32), y, c.post, c.res, num_streams)
    for p, w in zip(c.more, c.scale, strict=True):
        x = write(x, y * w.reshape(*(1,) * (y.ndim - 1), -1), p, None, num_streams)
    return x.astype(dtype)
