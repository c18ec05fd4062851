"""Multi-head latent attention (MLA, DeepSeek-V2, arXiv 2405.04434, Eq. 9-19) without a low rank of the queries.

    [q^C | q^R] = x W_q,   [c | k^R] = x W_kv_down,   [k^C | v] = rms(c) W_kv_up,
    scores = (q^C . k^C + rope(q^R) . rope(k^R)) / sqrt(D + R),   one k^R for all heads

The RMSNorm sits on the latent c alone, before the up-projection, as `kv_a_layernorm` does in DeepSeek-V2 and V3.  RoPE turns
halves (d, d + R/2) where theirs turns neighbours (2d, 2d + 1): a permutation of columns of W_q and W_kv_down.

What is kept of earlier tokens is rms(c) and rope(k^R), rank + R numbers a token for all heads.  Over them the up-projection moves
to the other side of the products ("absorbed", section 2.1.2 of the paper), so that no key or value of the past is made again:

    q^C . k^C = (q^C W_k^T) . rms(c),   sum_s p_s v_s = (sum_s p_s rms(c_s)) W_v,   W_kv_up = [W_k | W_v] of each head
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from mhc_jax.layers.attention import Past, attend, attend_past, project, split_heads
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
    def __call__(
        self, h: Float[Array, "B T C"], past: Past | None = None
    ) -> tuple[Float[Array, "B T C"], dict[str, Array]]:
        """Branch output in the compute dtype, and no auxiliary values; with a past what is to be kept of these tokens."""
        B, T, C = h.shape
        H, D, R, rank = self.num_heads, self.head_dim, self.rope_width, self.kv_rank
        x = RMSNorm(self.norm_eps, name="norm")(h).astype(self.dtype)
        init = nn.initializers.variance_scaling(1.0, "fan_in", "normal")
        out_init = nn.initializers.variance_scaling(self.output_scale**2, "fan_in", "normal")

        q_C, q_R = jnp.split(project(self, "W_q", x, H * (D + R), init).reshape(B, T, H, D + R), [D], axis=-1)
        c, k_R = jnp.split(project(self, "W_kv_down", x, rank + R, init), [rank], axis=-1)
        c = RMSNorm(self.norm_eps, name="kv_norm")(c).astype(self.dtype)
        first = None if past is None else past.position
        q_R, k_R = rope(q_R, self.rope_theta, first), rope(k_R[:, :, None], self.rope_theta, first)
        kept = {} if past is None else {"c": c, "k_R": k_R[:, :, 0]}
        if past is not None and past.kept["c"].shape[1] > 0:
            mixed = self.absorbed(q_C, q_R, c, k_R, past)
        else:
            k_C, v = jnp.split(project(self, "W_kv_up", c, H * 2 * D, init).reshape(B, T, H, 2 * D), [D], axis=-1)
            q = jnp.concatenate([q_C, q_R], -1)
            k = jnp.concatenate([k_C, jnp.broadcast_to(k_R, (B, T, H, R))], -1)
            q, k, v = split_heads(q, k, v)
            # Initialisation runs on a few tokens, on any device.
            mixed = attend(q, k, v, "xla" if self.is_initializing() else self.implementation)
        return project(self, "W_o", mixed.reshape(B, T, H * D), C, out_init), kept

    def absorbed(
        self,
        q_C: Float[Array, "B T H D"],
        q_R: Float[Array, "B T H R"],
        c: Float[Array, "B T rank"],
        k_R: Float[Array, "B T 1 R"],
        past: Past,
    ) -> Float[Array, "B T H D"]:
        """Attention of all heads over the one latent, kept and new.  c comes after its norm, q_R and k_R after RoPE."""
        D = self.head_dim
        W = self.variables["params"]["W_kv_up"].astype(self.dtype).reshape(self.kv_rank, self.num_heads, 2 * D)
        W_k, W_v = W[..., :D], W[..., D:]
        q = jnp.concatenate([jnp.einsum("bthd,rhd->bthr", q_C, W_k), q_R], -1)
        old = past.kept["c"][:, :, None], past.kept["k_R"][:, :, None]
        new = c[:, :, None], k_R
        keys = [jnp.concatenate(pair, -1) for pair in (old, new)]
        scale = (D + self.rope_width) ** -0.5
        latents = attend_past(q, (keys[0], old[0]), (keys[1], new[0]), past.position, scale)
        return jnp.einsum("bthr,rhd->bthd", latents, W_v)
