r"""Delta Attention Residuals (arXiv 2605.18855): a read adds an attention over earlier branch outputs to the residual stream.

    $h_l = x_l + g_l \sum_j \mathrm{softmax}_j(w_l \cdot \mathrm{rms}(d_j))\, d_j, \qquad x_{l+1} = x_l + F_l(h_l)$

The sources d are the embedding and one sum of branch outputs for each finished group of `block_size` sub-layers (the paper's
Delta Block, its practical default).  With `block_size=1` they are the embedding and every branch output (its Delta
AttnRes).  The first sub-layer has no source, because the embedding is its whole stream.  `heads` is that of `attnres_block`.

$g_l$ is a learned number, 0 at the start.  The decoder is then the residual one bit for bit, and a run can start from a
residual checkpoint (train.init_from).  While g is 0, g has a gradient and w has none.

The paper's own runs have no g but w = 0, so that they add the mean of the sources at the start.  With `block_size=1` and N
sources this multiplies the stream by 1 + 1/N, which the norm of the branch removes.  With larger groups it changes the
direction of the stream.  We follow the gate `learnable_alpha` of the public code (wdlctc/delta-attention-residuals-code) and
section 3.3 of arXiv 2607.27230, where an 8 B model is converted with such a g.

Two details of the code's Delta Block are not in the paper, and not here: a source is the difference of the stream to the source
before it, where the paper has the difference to the stream at the start of the group, and the first sub-layer of a group does
not see the group just finished.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float
from mhc_kernels import write

from mhc_jax.connections.depth_family import (
    DepthAttention,
    DepthAttentionConfig,
    SourceCoefficients,
    StreamAndSources,
    buffer,
    one_slot,
    read_heads,
)


@dataclass(frozen=True)
class DeltaAttnResConfig(DepthAttentionConfig):
    """Settings of Delta AttnRes.  The default of `block_size` is that of `attnres_block`: only the addition to x then differs."""

    kind: ClassVar[str] = "delta_attnres"
    exits: ClassVar[tuple[str, ...]] = ("sum",)


class DeltaAttnRes(DepthAttention):
    """The connection Delta AttnRes.  Diagnostics see the residual stream x, whose pre, post and res are 1."""

    config_class = DeltaAttnResConfig
    static_params = ("g",)

    def setup_sublayer(self) -> None:
        """Declare the query w [C] and the gate g []."""
        self.setup_query()
        self.g = self.param("g", nn.initializers.zeros, ())

    def expand(self, x: Float[Array, "B T C"]) -> StreamAndSources:
        """Make the stream of the embedding x, and the buffer of sources with x in its first slot."""
        return StreamAndSources(x, buffer(x, self.slots))

    def start(self, x: Float[Array, "B T C"]) -> tuple[StreamAndSources, SourceCoefficients]:
        """Make the state (streams, c) before the first boundary.  A write of y = 0 with this c changes nothing."""
        none = jnp.zeros((self.config.heads, self.slots, *x.shape[:-1]), jnp.float32)
        return self.expand(x), SourceCoefficients(none, none[0])

    def coefficients(self, streams: StreamAndSources) -> SourceCoefficients:
        """Make the coefficients: pre [H, N, B, T] is g times the attention weights, and post is one-hot on a slot.

        The outputs of the last group have no slot, because no sub-layer would read it.
        """
        begun = self.sublayer // self.config.block_size
        pre = self.g * self.attend(streams.sources, jnp.where(self.sublayer == 0, 0, 1 + begun))
        return SourceCoefficients(pre, one_slot(1 + begun, pre))

    def read(self, streams: StreamAndSources, c: SourceCoefficients) -> Float[Array, "B T C"]:
        r"""Return the branch input $h = x + \sum_j H^{pre}_j d_j$, in the dtype of the streams."""
        return streams.x + read_heads(streams.sources, c.pre)

    def write(self, streams: StreamAndSources, c: SourceCoefficients, y: Float[Array, "B T C"]) -> StreamAndSources:
        """Add the branch output y to the stream, and to the slot of the group that the sub-layer belongs to."""
        return StreamAndSources(write(streams.x, y, None, None, 1), write(streams.sources, y, c.post, None, self.slots))

    def collapse(self, streams: StreamAndSources, c: SourceCoefficients) -> Float[Array, "B T C"]:
        """Return the residual stream x."""
        return streams.x
