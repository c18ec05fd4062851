"""Causal self-attention with grouped key/value heads (GQA, Ainslie et al., arXiv 2305.13245)."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
from jaxtyping import Array, Float

from mhc_jax.layers.norm import RMSNorm
from mhc_jax.layers.rope import rope


class Attention(nn.Module):
    """A branch: RMSNorm, projections, RoPE, causal softmax attention, output projection.

    Weights are [in, out]; input projections start at N(0, 1/in), the output projection at that times `output_scale`.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float
    norm_eps: float
    output_scale: float
    dtype: Any

    @nn.compact
    def __call__(self, h: Float[Array, "B T C"]) -> tuple[Float[Array, "B T C"], dict[str, Array]]:
        """Branch output in the compute dtype, and no auxiliary values."""
        B, T, C = h.shape
        H, K, D = self.num_heads, self.num_kv_heads, self.head_dim
        x = RMSNorm(self.norm_eps, name="norm")(h).astype(self.dtype)
        init = nn.initializers.variance_scaling(1.0, "fan_in", "normal")
        out_init = nn.initializers.variance_scaling(self.output_scale**2, "fan_in", "normal")

        def dense(name, outputs, initializer, value):
            weight = self.param(name, initializer, (value.shape[-1], outputs))
            return value @ weight.astype(self.dtype)

        q = rope(dense("W_q", H * D, init, x).reshape(B, T, H, D), self.rope_theta)
        k = rope(dense("W_k", K * D, init, x).reshape(B, T, K, D), self.rope_theta)
        v = dense("W_v", K * D, init, x).reshape(B, T, K, D)
        mixed = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        return dense("W_o", C, out_init, mixed.reshape(B, T, H * D)), {}
