"""RMSNorm."""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float
from mhc_kernels import normalized


def rms_norm(x: Float[Array, "*tokens C"], weight: Float[Array, " C"], eps: float) -> Float[Array, "*tokens C"]:
    """x rsqrt(mean(x^2) + eps) weight; computed in float32, returned in float32 (Zhang and Sennrich, arXiv 1910.07467).

    NaN for a token whose sum of squares overflows float32, and x rsqrt(eps) weight for one whose squares underflow; see
    `mhc_kernels.inverse_rms`.
    """
    return normalized(x.astype(jnp.float32), eps) * weight[(None,) * (x.ndim - 1)]


NORM_EPS = 1e-20
"""eps of the decoder's RMSNorms (mHC Table 5); a larger one breaks the equality with Pre-Norm at step 0 for small embeddings."""


class RMSNorm(nn.Module):
    """`rms_norm` with a weight that starts at 1."""

    eps: float

    @nn.compact
    def __call__(self, x: Float[Array, "*tokens C"]) -> Float[Array, "*tokens C"]:
        """Float32 result."""
        weight = self.param("weight", nn.initializers.ones, (x.shape[-1],))
        return rms_norm(x, weight, self.eps)
