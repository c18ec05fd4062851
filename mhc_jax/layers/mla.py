"""Multi-head latent attention (MLA, DeepSeek-V2, arXiv 2405.04434, Eq. 9-19) without a low rank of the queries.

    [q^C | q^R] = x W_q,   [c | k^R] = x W_kv_down,   [k^C | v] = rms(c) W_kv_up,
    scores = (q^C . k^C + rope(q^R) . rope(k^R)) / sqrt(D + R),   one k^R for all heads

The RMSNorm sits on the latent c alone, before the up-projection, as `kv_a_layernorm` does in DeepSeek-V2 and V3.  RoPE turns
halves (d, d + R/2) where theirs turns neighbours (2d, 2d + 1): a permutation of columns of W_q and W_kv_down.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from mhc_jax.layers.attention import attend, project, split_heads
from mhc_jax.layers.norm import RMSNorm
from mhc_jax.layers.rope import rope


class LatentAttention(nn.Module):
    """A branch: RMSNorm, projections through the latent, RoPE on its own columns, causal attention, output projection.

    Weights are [in, out]; input projections start at N(0, 1/in), the output projection at that times `output_scale`.
    """

    num_heads: int
    head_dim: int
    """D, of the part of queries and keys without RoPE, and of values."""
    rope_width: int
    """R."""
    kv_rank: int
    """Width of the latent c."""
    rope_theta: float
    norm_eps: float
    output_scale: float
    dtype: Any
    implementation: str = "xla"
    """See `attend`."""

    @nn.compact
    def __call__(self, h: Float[Array, "B T C"]) -> tuple[Float[Array, "B T C"], dict[str, Array]]:
        """Branch output in the compute dtype, and no auxiliary values."""
        B, T, C = h.shape
        H, D, R, rank = self.num_heads, self.head_dim, self.rope_width, self.kv_rank
        x = RMSNorm(self.norm_eps, name="norm")(h).astype(self.dtype)
        init = nn.initializers.variance_scaling(1.0, "fan_in", "normal")
        out_init = nn.initializers.variance_scaling(self.output_scale**2, "fan_in", "normal")

        q_C, q_R = jnp.split(project(self, "W_q", x, H * (D + R), init).reshape(B, T, H, D + R), [D], axis=-1)
        c, k_R = jnp.split(project(self, "W_kv_down", x, rank + R, init), [rank], axis=-1)
        c = RMSNorm(self.norm_eps, name="kv_norm")(c).astype(self.dtype)
        k_C, v = jnp.split(project(self, "W_kv_up", c, H * 2 * D, init).reshape(B, T, H, 2 * D), [D], axis=-1)
        k_R = jnp.broadcast_to(rope(k_R[:, :, None], self.rope_theta), (B, T, H, R))
        q = jnp.concatenate([q_C, rope(q_R, self.rope_theta)], -1)
        k = jnp.concatenate([k_C, k_R], -1)
        q, k, v = split_heads(q, k, v)
        # Initialisation runs on a few tokens, on any device.
        mixed = attend(q, k, v, "xla" if self.is_initializing() else self.implementation)
        return project(self, "W_o", mixed.reshape(B, T, H * D), C, out_init), {}
