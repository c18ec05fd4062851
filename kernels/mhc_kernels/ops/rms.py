"""The scale of an RMSNorm, the same function in every form of every operation."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array


def inverse_rms(mean_square: Array, eps: float) -> Array:
    """rsqrt(mean_square + eps), float32; NaN where the mean of squares has overflowed.

    rsqrt(inf) is 0: it would turn a token of large finite numbers into zeros, with a gradient of zero, and a loss that looks sound.
    A sum of C squares overflows float32 from an RMS of 1.8e19 / sqrt(C) on.

    Where squares underflow (numbers below 1e-19 to 1e-23; a device may flush denormals) the mean is 0 and the scale is
    rsqrt(eps).  With eps above 0, numbers of zero thus give zeros and finite gradients.
    """
    return jnp.where(mean_square < jnp.inf, jax.lax.rsqrt(mean_square + eps), jnp.nan)
