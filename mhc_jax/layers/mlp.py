"""SwiGLU feed-forward (Shazeer, arXiv 2002.05202)."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
from jaxtyping import Array, Float

from mhc_jax.layers.norm import RMSNorm
from mhc_jax.parallel.sharding import constrain


class SwiGLU(nn.Module):
    """A branch: RMSNorm, then (silu(x W_gate) * (x W_up)) W_down.

    Weights are [in, out]; W_gate and W_up start at N(0, 1/in), W_down at that times `output_scale`.
    """

    hidden: int
    norm_eps: float
    output_scale: float
    dtype: Any

    @nn.compact
    def __call__(self, h: Float[Array, "B T C"]) -> tuple[Float[Array, "B T C"], dict[str, Array]]:
        """Branch output in the compute dtype, and no auxiliary values."""
        C = h.shape[-1]
        x = RMSNorm(self.norm_eps, name="norm")(h).astype(self.dtype)
        init = nn.initializers.variance_scaling(1.0, "fan_in", "normal")
        out_init = nn.initializers.variance_scaling(self.output_scale**2, "fan_in", "normal")
        W_gate = self.param("W_gate", init, (C, self.hidden)).astype(self.dtype)
        W_up = self.param("W_up", init, (C, self.hidden)).astype(self.dtype)
        W_down = self.param("W_down", out_init, (self.hidden, C)).astype(self.dtype)
        hidden = constrain(nn.silu(x @ W_gate) * (x @ W_up), "batch", "sequence", "hidden")
        return hidden @ W_down, {}
