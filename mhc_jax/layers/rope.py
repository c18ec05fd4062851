"""Rotary position embeddings (Su et al., arXiv 2104.09864)."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

ROPE_THETA = 1e4
"""Base of the frequencies (Su et al., section 3.2.2)."""


def rope(x: Float[Array, "B T H D"], theta: float, first: Int[Array, " B"] | None = None) -> Float[Array, "B T H D"]:
    """Rotate pairs (d, d + D/2) of each head by position times theta^(-2d/D); float32 inside, dtype of x outside.

    Args:
      x: tokens at the positions 0 to T - 1, or from `first` on.
      theta: base of the frequencies.
      first: position of the first token of each row.
    """
    T, D = x.shape[1], x.shape[-1]
    frequencies = theta ** (-jnp.arange(0, D, 2, dtype=jnp.float32) / D)
    positions = jnp.arange(T, dtype=jnp.float32)[None, :]
    if first is not None:
        positions = positions + first.astype(jnp.float32)[:, None]
    angles = positions[:, :, None] * frequencies[None, None, :]
    cos, sin = jnp.cos(angles)[:, :, None, :], jnp.sin(angles)[:, :, None, :]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1).astype(x.dtype)
