"""Root mean square normalisation (RMSNorm, Zhang and Sennrich, arXiv 1910.07467)."""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float
from mhc_kernels import normalized


def rms_norm(x: Float[Array, "*tokens C"], weight: Float[Array, " C"], eps: float) -> Float[Array, "*tokens C"]:
    r"""Apply RMSNorm over the last axis (arXiv 1910.07467, Eq. 4), computed and returned in float32.

    $y_c = x_c\, w_c / \sqrt{\tfrac{1}{C} \sum_{c'} x_{c'}^2 + \epsilon}$

    Deviation: the paper has no $\epsilon$.  If the sum of squares of a token overflows float32, the result for this token is NaN.
    If the squares underflow, the result is $x w / \sqrt{\epsilon}$ (`mhc_kernels.inverse_rms`).

    Examples:
      >>> import jax.numpy as jnp
      >>> print(rms_norm(jnp.array([3.0, -3.0]), jnp.array([1.0, 2.0]), 1e-20))
      [ 1. -2.]
    """
    return normalized(x.astype(jnp.float32), eps) * weight[(None,) * (x.ndim - 1)]


class RMSNorm(nn.Module):
    """The layer that applies `rms_norm` with a learned weight [C], which starts at 1."""

    eps: float

    @nn.compact
    def __call__(self, x: Float[Array, "*tokens C"]) -> Float[Array, "*tokens C"]:
        """Return `rms_norm` of x, float32."""
        weight = self.param("weight", nn.initializers.ones, (x.shape[-1],))
        return rms_norm(x, weight, self.eps)
