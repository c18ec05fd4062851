r"""MUDD connections (MUDDFormer, arXiv 2502.12170), the residual way alone: each group of sub-layers begins with a mix of streams.

    $x_b = \sum_{j \le b} a_{bj}\, X_j, \qquad a_b = W_2^\top\, \mathrm{GELU}(W_1^\top\, \mathrm{rms}(X_b)) + \mathrm{bias}$

$X_0$ is the embedding, and $X_b$ is the residual stream after b groups of `block_size` sub-layers, which add their outputs to
$x$.  There is one mix before each group but the first, and one more, the exit, after the last group.  Queries, keys and values
read the same mix as the residual stream.  This is `dense_type` l of the public code (Caiyun-AI/MUDDFormer); the full method has
four mixes.

With `norms` the mix is added to the stream, between two norms (`mudd_prenorm` and `mudd_postnorm` of the public JAX code):

    $x_b = X_b + \gamma_b\, \mathrm{rms}(\sum_{j \le b} a_{bj}\, \mathrm{rms}(X_j))$

The decoder starts exactly as Pre-Norm.  W_2 is 0, and the bias is 1 for X_b and 0 for all others, or 0 for all with
`norms`.  With `norms` the inner sum is then 0, and $\gamma = 0.001 = \sqrt{\epsilon}$ gives the outer norm the derivative 1
there.

Deviations.  The public norms have a weight for each channel, 1 and 0.001 at the start.  Here gamma stands for the second one,
and the first has none, so that x_b is a sum of the X_j with one number each.  Such numbers are what coefficients carry from a
read to the write after it.  The hidden layer has N + 1 units, the length of the longest mix, because all sub-layers have
parameters of one shape.  In the paper it grows with b, and the code rounds it up to 64.  For the same reason sub-layers that
begin no group have parameters too.  These are not used and get no gradient, and weight decay shrinks them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
from mhc_kernels import Coefficients, read, write

from mhc_jax.connections.depth_family import (
    DepthConfig,
    DepthConnection,
    SourceCoefficients,
    StreamAndSources,
    mix_weights,
    one_slot,
)


@dataclass(frozen=True)
class MuddConfig(DepthConfig):
    """Settings of MUDD connections."""

    kind: ClassVar[str] = "mudd"
    exits: ClassVar[tuple[str, ...]] = ("mix",)

    exit: str = "mix"
    """How the last stream becomes the output.  `mix`: by a mix of all streams, whose parameters belong to the exit."""
    block_size: int = 2
    eps_norm: float = 1e-6
    norms: bool = True
    """Whether the mix stands between two norms and is added to the stream, or replaces the stream."""


class Mudd(DepthConnection):
    """The connection MUDD.  Diagnostics see the residual stream, before the mix if the sub-layer begins a group.

    pre and res are the weight of this stream in its own mix, and `source_weights` has those of the earlier streams.
    """

    config_class = MuddConfig
    static_params = ("bias", "gamma")

    def setup(self) -> None:
        """Declare W1 [C, N + 1], W2 [N + 1, N + 1], bias [N + 1] and, with `norms`, gamma [] of one mix."""
        S, norms = self.slots + 1, self.config.norms
        self.W1 = self.param("W1", nn.initializers.variance_scaling(1.0, "fan_in", "normal"), (self.width, S))
        self.W2 = self.param("W2", nn.initializers.zeros, (S, S))
        self.bias = self.param("bias", lambda _: jnp.zeros(S).at[-1].set(0.0 if norms else 1.0))
        self.gamma = self.param("gamma", nn.initializers.constant(self.config.eps_norm**0.5), ()) if norms else None

    def expand(self, x: Float[Array, "B T C"]) -> StreamAndSources:
        """Make the stream of the embedding x, and an empty buffer of N slots."""
        return StreamAndSources(x, jnp.zeros((*x.shape[:-1], self.slots * self.width), x.dtype))

    def start(self, x: Float[Array, "B T C"]) -> tuple[StreamAndSources, SourceCoefficients]:
        """Make the state (streams, c) before the first boundary.  A write of y = 0 with this c changes nothing."""
        pre = one_slot(self.slots, jnp.zeros((1, self.slots + 1, *x.shape[:-1])))
        return self.expand(x), SourceCoefficients(pre, jnp.zeros_like(pre[1:]))

    def mix(self, streams: StreamAndSources, filled: int | Int[Array, ""]) -> Float[Array, "S B T"]:
        """Return the `mix_weights` of this sub-layer or of the exit."""
        V = jnp.concatenate(streams[::-1], -1)
        return mix_weights(V, filled, self.W1, self.W2, self.bias, self.gamma, self.config.eps_norm)

    def coefficients(self, streams: StreamAndSources) -> SourceCoefficients:
        """Make the coefficients: pre [N + 1, B, T] weighs the slots and x, and post is one-hot on the slot that will keep x."""
        group, within = self.sublayer // self.config.block_size, self.sublayer % self.config.block_size
        pre = self.mix(streams, group)
        pre = jnp.where((within == 0) & (group > 0), pre, one_slot(self.slots, pre[None]))
        return SourceCoefficients(pre, one_slot(jnp.where(within == 0, group, self.slots), pre[None, 1:]))

    def read(self, streams: StreamAndSources, c: SourceCoefficients) -> Float[Array, "B T C"]:
        r"""Return the stream that enters the branch, $h = \sum_j H^{pre}_j X_j$, in the dtype of the streams."""
        return read(jnp.concatenate(streams[::-1], -1), c.pre, self.slots + 1)

    def write(self, streams: StreamAndSources, c: SourceCoefficients, y: Float[Array, "B T C"]) -> StreamAndSources:
        """Add the branch output y to the stream that entered the branch, and keep the stream that entered the group."""
        kept = write(streams.sources, streams.x, c.post, None, self.slots)
        return StreamAndSources(write(self.read(streams, c), y, None, None, 1), kept)

    def source_weights(self, c: SourceCoefficients) -> Float[Array, "N B T"]:
        """Return the weights of the N earlier streams in the mix, float32.  A sub-layer that begins no group has none."""
        return c.pre[:-1]

    def dense(self, c: SourceCoefficients, like: Float[Array, "B T C"]) -> tuple[Array, Array, Array]:
        """Return pre and res, the weight of the stream in its own mix, and post = 1."""
        return super(DepthConnection, self).dense(Coefficients(c.pre[-1:], None, c.pre[None, -1:]), like)

    def collapse(self, streams: StreamAndSources, c: SourceCoefficients) -> Float[Array, "B T C"]:
        """Make one vector by the mix of the exit."""
        return self.read(streams, c._replace(pre=self.mix(streams, self.slots)))
