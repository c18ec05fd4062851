"""Rotary position embeddings (RoPE, Su et al., arXiv 2104.09864)."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def rope(x: Float[Array, "B T H D"], theta: float, first: Int[Array, " B"] | None = None) -> Float[Array, "B T H D"]:
    r"""Rotate pairs of channels of each head by angles that grow with the position (arXiv 2104.09864, Eq. 34).

    The pair $(x_d, x_{d + D/2})$, $d = 0 \dots D/2 - 1$, turns by $t\, \theta^{-2d/D}$ at position t.

    Deviation: the paper turns the neighbours $(x_{2d}, x_{2d+1})$ instead.  Both are equal up to a permutation of channels.
    Angles are float32, and the result has the dtype of x.

    Args:
      x: queries or keys of T consecutive tokens.
      theta: base of the frequencies.
      first: position of the first token of each of the B sequences.  None: position 0.

    Examples:
      With two channels, position t turns by t radians.

      >>> import jax.numpy as jnp
      >>> import numpy as np
      >>> print(np.asarray(rope(jnp.array([[[[1.0, 0.0]], [[1.0, 0.0]]]]), 1e4))[0, :, 0].round(2))
      [[1.   0.  ]
       [0.54 0.84]]
    """
    T, D = x.shape[1], x.shape[-1]
    frequencies = theta ** (-jnp.arange(0, D, 2, dtype=jnp.float32) / D)
    positions = jnp.arange(T, dtype=jnp.float32)[None, :]
    if first is not None:
        positions = positions + first.astype(jnp.float32)[:, None]
    angles = positions[:, :, None] * frequencies[None, None, :]
    cos, sin = jnp.cos(angles)[:, :, None, :], jnp.sin(angles)[:, :, None, :]
    front, back = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([front * cos - back * sin, back * cos + front * sin], -1).astype(x.dtype)
