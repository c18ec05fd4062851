"""The scale of an RMSNorm, the same function in every form of every operation, and the normalised numbers themselves."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float


def inverse_rms(mean_square: Array, eps: float) -> Array:
    """rsqrt(mean_square + eps), float32; NaN where the mean of squares has overflowed.

    rsqrt(inf) is 0: it would turn a token of large finite numbers into zeros, with a gradient of zero, and a loss that looks sound.
    A sum of C squares overflows float32 from an RMS of 1.8e19 / sqrt(C) on.

    Where squares underflow (numbers below 1e-19 to 1e-23; a device may flush denormals) the mean is 0 and the scale is
    rsqrt(eps).  With eps above 0, numbers of zero thus give zeros and finite gradients.
    """
    return jnp.where(mean_square < jnp.inf, jax.lax.rsqrt(mean_square + eps), jnp.nan)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def normalized(v: Float[Array, "*tokens C"], eps: float) -> Float[Array, "*tokens C"]:
    """y = v inverse_rms(mean(v^2), eps) over the last axis, float32 in and out.

    The derivative is dy = s - y mean(y s) with s = inverse_rms dv.  That of rsqrt by itself would be a third power of the scale,
    which underflows from an RMS of 4e12 on.
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
