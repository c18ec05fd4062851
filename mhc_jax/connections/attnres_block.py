r"""Attention Residuals (AttnRes, arXiv 2603.15031): a sub-layer reads by attention over sums of earlier branch outputs.

    $h_l = \sum_i \mathrm{softmax}_i(w_l \cdot \mathrm{rms}(V_i))\, V_i$

The sources V are the embedding, one sum of branch outputs for each finished group of `block_size` sub-layers, and the partial
sum of the group that is not finished yet.  This is the paper's Block AttnRes (Eq. 5 and 6), which calls such a group a
block.  With `block_size=1` the sources are the embedding and every branch output, which is exactly its Full AttnRes (Eq. 2 to
4).  With `heads` each group of channels has a softmax of its own (arXiv 2607.27230); `depth_family.py` has the formula.

No streams are mixed.  The decoder keeps the sources in a flat buffer [B, T, S C] of S = 1 + ceil(L / block_size) slots.  A
write adds a branch output to one slot.  With the initial query w = 0 a read returns the mean of the sources, which is the
residual stream divided by the number of sources.  The norm of the branch removes this factor, so that the decoder equals a
Pre-Norm decoder.

tokenbender/nanogpt-attnres-repro has the same sources.  wdlctc/open-attention-residuals adds a learned bias to the logit of the
partial sum, which the paper does not have, and neither do we.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float
from mhc_kernels import split, write

from mhc_jax.connections.depth_family import (
    DepthAttention,
    DepthAttentionConfig,
    SourceCoefficients,
    buffer,
    one_slot,
    read_heads,
)
from mhc_jax.errors import InputError


@dataclass(frozen=True)
class AttnResBlockConfig(DepthAttentionConfig):
    """Settings of AttnRes (Attention Residuals).  With block_size=1 every branch output is a source (Full AttnRes)."""

    kind: ClassVar[str] = "attnres_block"
    exits: ClassVar[tuple[str, ...]] = ("attention",)

    exit: str = "attention"
    """How the sources become one vector.  `attention`: by softmax attention over all sources, with a query w that is a parameter
    of the exit."""


class AttnResBlock(DepthAttention):
    """The connection AttnRes.  Diagnostics see the sum of its sources as one stream, whose pre, post and res are 1."""

    config_class = AttnResBlockConfig

    @property
    def slots(self) -> int:
        """Number S of slots: one for the embedding, and one for each group."""
        return 1 + super().slots

    def setup(self) -> None:
        """Declare the query w [C] of one sub-layer or of the exit."""
        self.setup_query()

    def expand(self, x: Float[Array, "B T C"]) -> Float[Array, "B T SC"]:
        """Make the buffer of sources, with the embedding in its first slot and zeros in all other slots."""
        return buffer(x, self.slots)

    def start(self, x: Float[Array, "B T C"]) -> tuple[Float[Array, "B T SC"], SourceCoefficients]:
        """Make the state (sources, c) before the first boundary.  A write with these coefficients c adds to no slot."""
        none = jnp.zeros((self.config.heads, self.slots, *x.shape[:-1]), jnp.float32)
        return self.expand(x), SourceCoefficients(none, none[0])

    def flat(self, streams: Float[Array, "B T SC"]) -> Float[Array, "B T C"]:
        """Return the residual stream, which is the sum of all sources."""
        return sum(split(streams, self.slots)[1:], streams[..., : self.width])

    def with_flat(self, streams: Float[Array, "B T SC"], x: Float[Array, "B T C"]) -> Float[Array, "B T SC"]:
        """Raise `InputError`, because many different sources have the sum x."""
        raise InputError(
            "`attnres_block` reads sums of branch outputs, and no stream that could be replaced; look at it without an "
            "edit, or give a model with another kind of connection."
        )

    def coefficients(self, streams: Float[Array, "B T SC"]) -> SourceCoefficients:
        """Make the coefficients: pre [H, S, B, T] has the attention weights, and post is one-hot on the slot to write to."""
        sublayer, size = self.sublayer, self.config.block_size
        pre = self.attend(streams, 1 + (sublayer + size - 1) // size)
        return SourceCoefficients(pre, one_slot(1 + sublayer // size, pre))

    def read(self, streams: Float[Array, "B T SC"], c: SourceCoefficients) -> Float[Array, "B T C"]:
        r"""Read the sources V with the weights H_pre: $h = \sum_i H^{pre}_i V_i$ in the channels of each head."""
        return read_heads(streams, c.pre)

    def write(
        self, streams: Float[Array, "B T SC"], c: SourceCoefficients, y: Float[Array, "B T C"]
    ) -> Float[Array, "B T SC"]:
        """Add the branch output y to the slot of the group that the sub-layer belongs to."""
        return write(streams, y, c.post, None, self.slots)

    def collapse(self, streams: Float[Array, "B T SC"], c: SourceCoefficients) -> Float[Array, "B T C"]:
        """Make one vector of all sources, by attention with the query of the exit."""
        return read_heads(streams, self.attend(streams, self.slots))
