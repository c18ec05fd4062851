"""Root mean square normalisation (RMSNorm, Zhang and Sennrich, arXiv 1910.07467)."""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float
from mhc_kernels import normalized


def rms_norm(x: Float[Array, "*tokens C"], weight: Float[Array, " C"], eps: float) -> Float[Array, "*tokens C"]:
    r"""RMSNorm over the last axis (arXiv 1910.07467, Eq. 4), computed and returned in float32.

    $y_c = x_c\, w_c / \sqrt{\tfrac{1}{C} \sum_{c'} x_{c'}^2 + \epsilon}$

    Deviation: the paper has no $\epsilon$.  A token whose sum of squares overflows float32 becomes NaN; one whose squares underflow
    becomes $x w / \sqrt{\epsilon}$ (`mhc_kernels.inverse_rms`).

    Examples:
      >>> import jax.numpy as jnp
      >>> print(rms_norm(jnp.array([3.0, -3.0]), jnp.array([1.0, 2.0]), 1e-20))
      [ 1. -2.]
    """
    return normalized(x.astype(jnp.float32), eps) * weight[(None,) * (x.ndim - 1)]


NORM_EPS = 1e-20
"""eps of the decoder's RMSNorms (mHC Table 5); a larger one breaks the equality with Pre-Norm at step 0 for small embeddings."""


class RMSNorm(nn.Module):
    """`rms_norm` with a learned weight that starts at 1."""

    eps: float

    @nn.compact
    def __call__(self, x: Float[Array, "*tokens C"]) -> Float[Array, "*tokens C"]:
        """The normed x, float32."""
        weight = self.param("weight", nn.initializers.ones, (x.shape[-1],))
        return rms_norm(x, weight, self.eps)
