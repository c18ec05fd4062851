r"""Causal self-attention, and the branch with grouped key/value heads (GQA, Ainslie et al., arXiv 2305.13245).

    $\mathrm{attention}(q, k, v) = \mathrm{softmax}(q k^\top / \sqrt{D})\, v$ under a causal mask (arXiv 1706.03762, Eq. 1)

Letters: H query heads, K key/value heads, D channels of a query or key head, E channels of a value head.  S is the number of slots
of a key-value cache, which keeps one earlier token in each slot.

Attention may be limited to documents (model.attention_scope): a token then attends only to tokens whose document has the same
number.  Positions go on from one document to the next.  RoPE makes scores that depend on differences of positions alone, so that
each document gets the outputs that it has by itself.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int
from mhc_kernels import backend_choice

from mhc_jax.errors import require
from mhc_jax.layers.mlp import project
from mhc_jax.layers.norm import RMSNorm
from mhc_jax.layers.rope import rope
from mhc_jax.parallel.sharding import constrain, on_each_shard


def attend(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B T K D"],
    v: Float[Array, "B T K E"],
    implementation: str,
    documents: Int[Array, "B T"] | None = None,
) -> Float[Array, "B T H E"]:
    """Return the result of causal attention among T tokens.  Query head h uses key/value head h K // H.

    Args:
      q, k, v: queries and keys after RoPE, and values.  With `splash` and `xla`, values may be narrower than keys (E < D,
        as in MLA).  `xla` then pads values with zeros, because JAX's attention needs keys and values of equal width.
      implementation: `xla` (any device and dtype; writes T x T scores), `cudnn` (flash attention of NVIDIA GPUs, 16-bit) or
        `splash` (JAX's flash attention for TPUs).  Under a mesh the two kernels run on each device's own sequences and heads.
      documents: number of each token's document.  None: attention is not limited to documents.  `cudnn` needs an array [B, 1, T, T]
        for it, which flash attention otherwise avoids.

    Raises:
      InputError: E > D; E < D with `cudnn`; `splash` on a device that is no TPU, or with a T or E that is no multiple of 128,
        or with a D that is no multiple of 64.
    """
    D, E = q.shape[-1], v.shape[-1]
    require(E <= D, f"attention needs values that are no wider than keys, not {E} and {D}.")
    if E < D and implementation != "splash":
        require(
            implementation == "xla",
            f"attention {implementation!r} needs values as wide as keys, not {E} and {D}; use 'xla'.",
        )
        v = jnp.pad(v, ((0, 0), (0, 0), (0, 0), (0, D - E)))
        return _masked(q, k, v, documents, "xla")[..., :E]
    if implementation == "xla":
        return _masked(q, k, v, documents, "xla")
    kernel = _splash if implementation == "splash" else functools.partial(_masked, implementation="cudnn")
    given = () if documents is None else (documents,)
    return on_each_shard(kernel, ("batch", None, "heads", None), q, k, v, *given)


def split_heads(
    q: Float[Array, "B T H D"], k: Float[Array, "B T K D"], v: Float[Array, "B T K E"]
) -> tuple[Float[Array, "B T H D"], Float[Array, "B T K D"], Float[Array, "B T K E"]]:
    """Return q, k and v with heads sharded over the mesh axis `tensor` and, in q alone, tokens sharded over `sequence`."""
    q = constrain(q, "batch", "sequence", "heads", None)
    return q, constrain(k, "batch", None, "heads", None), constrain(v, "batch", None, "heads", None)


def same_document(queries: Int[Array, "B T"], keys: Int[Array, "B S"]) -> Bool[Array, "B T S"]:
    """Return whether a query and a key belong to one document, from the numbers of their documents."""
    return queries[:, :, None] == keys[:, None, :]


def _masked(q, k, v, documents=None, implementation: Any = "xla"):
    mask = None if documents is None else same_document(documents, documents)[:, None]
    return jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=True, implementation=implementation)


def _splash(q, k, v, documents=None):
    # Kernels for TPUs take time to import, which other devices need not spend.
    from jax.experimental.pallas.ops.tpu import splash_attention as splash_kernels

    B, T, H, D = q.shape
    K, E = v.shape[2:]
    where = "attention 'splash' runs on TPUs only and this program is traced for a " + backend_choice.platform().upper()
    require(
        backend_choice.platform() == "tpu" or backend_choice.interpret(),
        f"{where}; use 'xla', or 'cudnn' on an NVIDIA GPU.",
    )
    require(
        T % 128 == 0 and E % 128 == 0 and D % 64 == 0,
        f"attention 'splash' needs sequence lengths and values that are multiples of 128 and keys that are multiples of 64, "
        f"not {T}, {E} and {D}; use 'xla'.",
    )
    block = next(b for b in (1024, 512, 256, 128) if T % b == 0)
    sizes = splash_kernels.BlockSizes(
        block_q=block, block_kv=block, block_q_dkv=block, block_kv_dkv=block, use_fused_bwd_kernel=True
    )
    mask = splash_kernels.MultiHeadMask([splash_kernels.CausalMask((T, T))] * (H // K))
    kernel: Any = splash_kernels.make_splash_mqa_single_device(
        mask, block_sizes=sizes, interpret=backend_choice.interpret()
    )
    grouped = (q * D**-0.5).reshape(B, T, K, H // K, D).transpose(0, 2, 3, 1, 4)
    given = () if documents is None else (splash_kernels.SegmentIds(documents, documents),)
    heads = jax.vmap(kernel, in_axes=(0, 0, 0, *(None for _ in given)))
    out = jax.vmap(heads)(grouped, k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3), *given)
    return out.transpose(0, 3, 1, 2, 4).reshape(B, T, H, E)


class Past(NamedTuple):
    """The key-value cache (`mhc_jax.kv_cache`) of one layer, or of several layers, whose arrays then have one more leading axis."""

    kept: dict[str, Array]
    """Arrays [B, S, ...] by name, with S slots for tokens: k and v for GQA, or the latent c and the rotary key k_R for MLA."""
    position: Int[Array, " B"]
    """Number of tokens of each sequence that are in the cache.  Slots from this number on are empty or outdated, and never read."""
    documents: Int[Array, "B S"] | None = None
    """Number of the document of the token in each slot.  None: attention is not limited to documents."""

    @property
    def empty(self) -> bool:
        """Whether the cache has no slots, so that there are no earlier tokens."""
        return jax.tree.leaves(self.kept)[0].shape[1] == 0


def attend_past(
    q: Float[Array, "B T H D"],
    earlier: tuple[Float[Array, "B S K D"], Float[Array, "B S K E"]],
    new: tuple[Float[Array, "B T K D"], Float[Array, "B T K E"]],
    past: Past,
    scale: float,
    documents: Int[Array, "B T"] | None,
) -> Float[Array, "B T H E"]:
    """Return the result of attention for T new tokens, which attend to all earlier tokens and, causally, to each other.

    Scores and softmax are float32.  The scores of earlier and of new tokens are concatenated.  The keys of the key-value cache are
    thus read in place, while a concatenation of keys would copy them.

    Args:
      q: queries of the new tokens.
      earlier: keys and values in the S slots of the cache.
      new: keys and values of the new tokens.
      past: the cache, which has the number of slots that hold a token, and the documents of these tokens.
      scale: factor by which q k^T is multiplied.
      documents: number of each new token's document, to which attention is limited.  None: it is not limited.
    """
    B, T, H, D = q.shape
    S, K = earlier[0].shape[1:3]
    q = q.reshape(B, T, K, H // K, D)
    seen = jnp.broadcast_to(jnp.arange(S)[None, None, :] < past.position[:, None, None], (B, T, S))
    causal = jnp.broadcast_to(jnp.tril(jnp.ones((T, T), bool))[None], (B, T, T))
    if documents is not None and past.documents is not None:
        seen &= same_document(documents, past.documents)
        causal &= same_document(documents, documents)

    def scores(k: Array, mask: Array) -> Array:
        s = jnp.einsum("btkgd,bskd->bkgts", q, k, preferred_element_type=jnp.float32) * scale
        return jnp.where(mask[:, None, None], s, -jnp.inf)

    joined = jnp.concatenate([scores(earlier[0], seen), scores(new[0], causal)], -1)
    weights = jax.nn.softmax(joined, axis=-1).astype(q.dtype)
    parts = [(weights[..., :S], earlier[1]), (weights[..., S:], new[1])]
    out = [jnp.einsum("bkgts,bske->btkge", w, v, preferred_element_type=jnp.float32) for w, v in parts]
    return (out[0] + out[1]).reshape(B, T, H, -1).astype(q.dtype)


class AttentionBranch(nn.Module):
    """The base class of attention branches: RMSNorm, then the heads that a subclass defines (`heads`), then an output projection.

    Weights are [in, out].  Input projections start as N(0, 1/in).  The output projection starts as N(0, 1/in) times `output_scale`.
    """

    num_heads: int
    """Number H of query heads."""
    head_dim: int
    """Number D of channels of a head.  In MLA it does not include the channels to which RoPE is applied."""
    rope_theta: float
    norm_eps: float
    output_scale: float
    """Factor by which the initial output projection is multiplied."""
    dtype: Any
    """Dtype in which matrices are multiplied."""
    implementation: str
    """Implementation of attention that `attend` uses: `xla`, `cudnn` or `splash`."""

    @nn.compact
    def __call__(
        self, h: Float[Array, "B T C"], past: Past | None = None, documents: Int[Array, "B T"] | None = None
    ) -> tuple[Float[Array, "B T C"], dict[str, Array]]:
        """Return the output of the branch in `dtype`, and the new tokens' arrays for the key-value cache ({} if `past` is None).

        Args:
          h: input of the branch.
          past: arrays of earlier tokens.  None: there are no earlier tokens.
          documents: number of each token's document, to which attention is limited.  None: it is not limited.
        """
        x = RMSNorm(self.norm_eps, name="norm")(h).astype(self.dtype)
        mixed, kept = self.heads(x, past, documents)
        y = project(self, "W_o", mixed.reshape(*h.shape[:2], -1), h.shape[-1], self.output_scale)
        return y, {} if past is None else kept

    def heads(
        self, x: Float[Array, "B T C"], past: Past | None, documents: Int[Array, "B T"] | None
    ) -> tuple[Float[Array, "B T H D"], dict[str, Array]]:
        """Return the outputs of all heads, and the arrays of these tokens that the key-value cache keeps."""
        raise NotImplementedError

    def attend(self, q: Array, k: Array, v: Array, documents: Array | None) -> Array:
        """Return the result of the function `attend` with the implementation `self.implementation`.

        Initialisation always uses `xla`, because it must run with few tokens and on any device.
        """
        return attend(q, k, v, "xla" if self.is_initializing() else self.implementation, documents)


class Attention(AttentionBranch):
    """Attention with grouped key/value heads (GQA): projections to queries, keys and values, then RoPE and causal attention."""

    num_kv_heads: int
    """Number K of key/value heads, which divides the number H of query heads."""
    qk_norm: bool = False
    """Whether queries and keys of each head go through RMSNorm, with weights [D] that all heads share, before RoPE."""

    def heads(
        self, x: Float[Array, "B T C"], past: Past | None, documents: Int[Array, "B T"] | None
    ) -> tuple[Float[Array, "B T H D"], dict[str, Array]]:
        """Return the outputs of all heads, and two arrays for the key-value cache: the keys k (after RoPE) and the values v."""
        (B, T, _), H, K, D = x.shape, self.num_heads, self.num_kv_heads, self.head_dim
        first = None if past is None else past.position
        q = project(self, "W_q", x, H * D).reshape(B, T, H, D)
        k = project(self, "W_k", x, K * D).reshape(B, T, K, D)
        if self.qk_norm:
            q = RMSNorm(self.norm_eps, name="q_norm")(q).astype(self.dtype)
            k = RMSNorm(self.norm_eps, name="k_norm")(k).astype(self.dtype)
        q, k = rope(q, self.rope_theta, first), rope(k, self.rope_theta, first)
        v = project(self, "W_v", x, K * D).reshape(B, T, K, D)
        q, k, v = split_heads(q, k, v)
        if past is None or past.empty:
            mixed = self.attend(q, k, v, documents)
        else:
            mixed = attend_past(q, (past.kept["k"], past.kept["v"]), (k, v), past, D**-0.5, documents)
        return mixed, {"k": k, "v": v}
