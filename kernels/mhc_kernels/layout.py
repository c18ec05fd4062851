"""How streams, coefficients and the parameters of the coefficients are laid out in arrays."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

PARTS = ("pre", "post", "res")
"""Names of the coefficients H_pre, H_post and H_res, in the order of their columns in the projection matrix phi."""


class Coefficients(NamedTuple):
    r"""Coefficients of one sub-layer: float32 arrays with the stream axes first and the tokens last.

    They are the matrices H of mHC (arXiv 2512.24880) Eq. 3:

        $x' = H^{res} x + (H^{post})^\top F(H^{pre} x)$

    A field that is None stands for a constant: 1/n for `pre`, 1 for `post`, and the identity for `res`.

    Examples:
      >>> import jax.numpy as jnp
      >>> from mhc_kernels import Coefficients
      >>> c = Coefficients(pre=jnp.ones((4, 10)), post=None, res=jnp.ones((4, 4, 10)))
      >>> c.pre.shape, c.post, c.res.shape
      ((4, 10), None, (4, 4, 10))
    """

    pre: Float[Array, "n *tokens"] | None
    """H_pre: the branch reads sum_i pre_i x_i, where x_i is stream i."""
    post: Float[Array, "n *tokens"] | None
    """H_post: stream i receives post_i y, where y is the output of the branch."""
    res: Float[Array, "n n *tokens"] | None
    """H_res: stream i receives sum_j res_ij x_j, where x_j is stream j."""


def columns(num_streams: int, parts: tuple[str, ...] = PARTS) -> dict[str, slice]:
    """Return the columns of each part of the coefficients in phi: [pre n | post n | res n*n, row-major].

    The same slices select the entries of each part in `bias`.

    Args:
      num_streams: n.
      parts: the parts that exist, in the order of `PARTS`; a part that is left out takes no columns.

    Examples:
      >>> from mhc_kernels import columns
      >>> columns(4)
      {'pre': slice(0, 4, None), 'post': slice(4, 8, None), 'res': slice(8, 24, None)}
      >>> columns(4, ("post", "res"))
      {'post': slice(0, 4, None), 'res': slice(4, 20, None)}
    """
    out, start = {}, 0
    for part in parts:
        stop = start + (num_streams**2 if part == "res" else num_streams)
        out[part] = slice(start, stop)
        start = stop
    return out


def split(x: Float[Array, "*tokens nC"], num_streams: int) -> list[Float[Array, "*tokens C"]]:
    """Split a flat array into its streams: stream i is channels i C to (i + 1) C.

    Args:
      x: flat streams, any float dtype.
      num_streams: n, which divides the last axis.

    Examples:
      >>> import jax.numpy as jnp
      >>> from mhc_kernels import split
      >>> [stream.tolist() for stream in split(jnp.arange(6.0), 3)]
      [[0.0, 1.0], [2.0, 3.0], [4.0, 5.0]]
    """
    return jnp.split(x, num_streams, axis=-1)  # a single operation, so its gradient is a single concatenation
