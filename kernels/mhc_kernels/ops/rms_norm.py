"""RMSNorm without a weight: the scale 1 / RMS, which all implementations use, and the normalised numbers."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float


def inverse_rms(mean_square: Array, eps: float) -> Array:
    r"""Return the scale of an RMSNorm, $1 / \sqrt{\mathrm{mean}(v^2) + \epsilon}$, or NaN if the mean of squares has overflowed.

    A sum of C squares overflows float32 from an RMS of 1.8e19 / sqrt(C) on.  The formula would then give a scale of 0, which would
    turn a token of large finite numbers into zeros with a gradient of zero.  NaN shows in the loss, and these zeros would not.

    If the squares underflow (numbers below 1e-19 to 1e-23, depending on the device), the scale is $1 / \sqrt{\epsilon}$.  With eps
    above 0, a token of zeros thus gives zeros and finite gradients.

    Args:
      mean_square: mean of the squares of the channels of each token, float32, any shape.
      eps: epsilon, 1e-20 in mHC and 1e-6 in DeepSeek-V4.

    Returns:
      Scales of the same shape, float32.

    Examples:
      >>> import jax.numpy as jnp
      >>> import numpy as np
      >>> from mhc_kernels import inverse_rms
      >>> print(np.asarray(inverse_rms(jnp.array([4.0, 0.0, jnp.inf]), 0.0625)).round(3))
      [0.496 4.      nan]
    """
    return jnp.where(mean_square < jnp.inf, jax.lax.rsqrt(mean_square + eps), jnp.nan)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def normalized(v: Float[Array, "*tokens C"], eps: float) -> Float[Array, "*tokens C"]:
    r"""Apply RMSNorm over the last axis without a weight, $y = s\, v$ with $s = 1 / \sqrt{\mathrm{mean}(v^2) + \epsilon}$.

    The derivative is $dy = s\, dv - y\, \mathrm{mean}(y\, s\, dv)$.  It is written by hand, because JAX's derivative of s has a
    third power of s, which underflows from an RMS of 4e12 on.

    Args:
      v: float32 channels of each token.
      eps: epsilon, 1e-20 in mHC and 1e-6 in DeepSeek-V4.

    Returns:
      float32 of the same shape; NaN for a token whose sum of squares overflows, see `inverse_rms`.

    Examples:
      >>> import jax.numpy as jnp
      >>> import numpy as np
      >>> from mhc_kernels import normalized
      >>> print(np.asarray(normalized(jnp.array([3.0, 4.0]), 0.0)).round(3))
      [0.849 1.131]
    """
    return v * _scale(v, eps)


@normalized.defjvp
def _normalized_jvp(eps: float, primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    (v,), (dv,) = primals, tangents
    scale = _scale(v, eps)
    y, scaled = v * scale, dv * scale
    mean = jnp.einsum("...c,...c->...", y, scaled, precision="highest") / v.shape[-1]
    return y, scaled - y * mean[..., None]


def _scale(v: Array, eps: float) -> Array:
    return inverse_rms(jnp.einsum("...c,...c->...", v, v, precision="highest") / v.shape[-1], eps)[..., None]
