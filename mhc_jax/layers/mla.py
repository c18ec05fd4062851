r"""Multi-head latent attention (MLA, DeepSeek-V2, arXiv 2405.04434, Eq. 9-19), with queries of full rank.

    $[q^C \mid q^R] = x W_q, \qquad [c \mid k^R] = x W_{kv,down}, \qquad [k^C \mid v] = \mathrm{rms}(c)\, W_{kv,up}$
    $\mathrm{scores} = (q^C \cdot k^C + \mathrm{rope}(q^R) \cdot \mathrm{rope}(k^R)) / \sqrt{D + R}$, with one $k^R$ for all heads

The rotary part ($q^R$, $k^R$, R channels) carries the position and the rest ($q^C$, $k^C$, D channels) the content.

Deviations.  Queries are projected directly, as in mHC's models, while DeepSeek-V2 projects them through a low rank.  The latent c
alone is normed before the up-projection, as by `kv_a_layernorm` in DeepSeek's code.  RoPE turns pairs of channels (d, d + R/2),
while DeepSeek's code turns neighbours (2d, 2d + 1).  A permutation of the columns of W_q and W_kv_down makes both equal.

A key-value cache keeps rms(c) and rope(k^R): rank + R numbers for each token, which all heads share.  With a cache, keys and values
of earlier tokens are not made at all, because the up-projection is absorbed into queries and outputs (section 2.1.2 of the paper).
For each head, with $W_{kv,up} = [W_k \mid W_v]$ and attention weights $p_s$ of the tokens s:

    $q^C \cdot k^C = (q^C W_k^\top) \cdot \mathrm{rms}(c), \qquad \sum_s p_s v_s = (\sum_s p_s\, \mathrm{rms}(c_s))\, W_v$
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mhc_jax.layers.attention import AttentionBranch, Past, attend_past, split_heads
from mhc_jax.layers.mlp import project
from mhc_jax.layers.norm import RMSNorm
from mhc_jax.layers.rope import rope


class LatentAttention(AttentionBranch):
    """The branch of MLA: RMSNorm, attention whose keys and values are made from a latent, and an output projection."""

    rope_width: int
    """Number R of channels of the rotary part of queries and keys."""
    kv_rank: int
    """Number of channels of the latent c, from which keys and values are made."""

    def heads(
        self, x: Float[Array, "B T C"], past: Past | None, documents: Int[Array, "B T"] | None
    ) -> tuple[Float[Array, "B T H D"], dict[str, Array]]:
        """Return the outputs of all heads, and two arrays for the key-value cache: the normed latents c and the rotary keys k_R."""
        (B, T, _), H, D, R, rank = x.shape, self.num_heads, self.head_dim, self.rope_width, self.kv_rank
        q_C, q_R = jnp.split(project(self, "W_q", x, H * (D + R)).reshape(B, T, H, D + R), [D], axis=-1)
        c, k_R = jnp.split(project(self, "W_kv_down", x, rank + R), [rank], axis=-1)
        c = RMSNorm(self.norm_eps, name="kv_norm")(c).astype(self.dtype)
        first = None if past is None else past.position
        q_R, k_R = rope(q_R, self.rope_theta, first), rope(k_R[:, :, None], self.rope_theta, first)
        if past is None or past.empty:
            k_C, v = jnp.split(project(self, "W_kv_up", c, H * 2 * D).reshape(B, T, H, 2 * D), [D], axis=-1)
            q = jnp.concatenate([q_C, q_R], -1)
            k = jnp.concatenate([k_C, jnp.broadcast_to(k_R, (B, T, H, R))], -1)
            mixed = self.attend(*split_heads(q, k, v), documents)
        else:
            mixed = self.absorbed(q_C, q_R, c, k_R, past, documents)
        return mixed, {"c": c, "k_R": k_R[:, :, 0]}

    def absorbed(
        self,
        q_C: Float[Array, "B T H D"],
        q_R: Float[Array, "B T H R"],
        c: Float[Array, "B T rank"],
        k_R: Float[Array, "B T 1 R"],
        past: Past,
        documents: Int[Array, "B T"] | None,
    ) -> Float[Array, "B T H D"]:
        """Return the outputs of all heads for new tokens that attend to earlier and new tokens by their latents.

        The up-projection to keys and values is absorbed into queries and outputs (module docstring).

        Args:
          q_C: content part of the queries.
          q_R: rotary part of the queries, after RoPE.
          c: latents of the new tokens, after their norm.
          k_R: rotary keys of the new tokens, after RoPE.
          past: latents and rotary keys of earlier tokens.
          documents: number of each new token's document, to which attention is limited.  None: it is not limited.
        """
        D = self.head_dim
        W = self.variables["params"]["W_kv_up"].astype(self.dtype).reshape(self.kv_rank, self.num_heads, 2 * D)
        W_k, W_v = W[..., :D], W[..., D:]
        q = jnp.concatenate([jnp.einsum("bthd,rhd->bthr", q_C, W_k), q_R], -1)
        earlier = past.kept["c"][:, :, None], past.kept["k_R"][:, :, None]
        new = c[:, :, None], k_R
        keys = [jnp.concatenate(pair, -1) for pair in (earlier, new)]
        scale = (D + self.rope_width) ** -0.5
        latents = attend_past(q, (keys[0], earlier[0]), (keys[1], new[0]), past, scale, documents)
        return jnp.einsum("bthr,rhd->bthd", latents, W_v)
