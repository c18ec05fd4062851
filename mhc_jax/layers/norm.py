"""Root mean square normalisation (RMSNorm, Zhang and Sennrich, arXiv 1910.07467)."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
from mhc_kernels import inverse_rms


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def rms_norm(x: Float[Array, "*tokens C"], weight: Float[Array, " C"], eps: float) -> Float[Array, "*tokens C"]:
    r"""Apply RMSNorm over the last axis (arXiv 1910.07467, Eq. 4), computed and returned in float32.

    $y_c = x_c\, w_c / \sqrt{\tfrac{1}{C} \sum_{c'} x_{c'}^2 + \epsilon}$

    Deviation: the paper has no $\epsilon$.  If the sum of squares of a token overflows float32, the result for this token is NaN.
    If the squares underflow, the result is $x w / \sqrt{\epsilon}$ (`mhc_kernels.inverse_rms`).

    The backward pass keeps x in its own dtype, and one float32 number for each token.  Automatic derivatives would keep a float32
    number for each channel.

    Examples:
      >>> import jax.numpy as jnp
      >>> print(rms_norm(jnp.array([3.0, -3.0]), jnp.array([1.0, 2.0]), 1e-20))
      [ 1. -2.]
    """
    return _rms_norm_fwd(x, weight, eps)[0]


def _rms_norm_fwd(x, weight, eps):
    v = x.astype(jnp.float32)
    mean_square = jnp.einsum("...c,...c->...", v, v, precision="highest") / v.shape[-1]
    scale = inverse_rms(mean_square, eps)[..., None]
    return v * scale * weight[(None,) * (x.ndim - 1)], (x, weight, scale)


def _rms_norm_bwd(_, saved, g):
    r"""Return $\bar x = s\, (\bar y\, w) - u\, \mathrm{mean}(u\, s\, \bar y\, w)$ and $\bar w = \sum \bar y\, u$, with $u = s\, x$.

    s is 1 / RMS.  A formula with a third power of s would underflow from an RMS of 4e12 on.
    """
    x, weight, scale = saved
    u, scaled = x.astype(jnp.float32) * scale, g * weight[(None,) * (x.ndim - 1)] * scale
    mean = jnp.einsum("...c,...c->...", u, scaled, precision="highest") / x.shape[-1]
    dweight = jnp.sum(g * u, axis=tuple(range(x.ndim - 1)))
    return (scaled - u * mean[..., None]).astype(x.dtype), dweight


rms_norm.defvjp(_rms_norm_fwd, _rms_norm_bwd)


class RMSNorm(nn.Module):
    """The layer that applies `rms_norm` with a learned weight [C], which starts at 1."""

    eps: float

    @nn.compact
    def __call__(self, x: Float[Array, "*tokens C"]) -> Float[Array, "*tokens C"]:
        """Return `rms_norm` of x, float32."""
        weight = self.param("weight", nn.initializers.ones, (x.shape[-1],))
        return rms_norm(x, weight, self.eps)
