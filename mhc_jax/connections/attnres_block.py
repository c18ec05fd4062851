r"""Block Attention Residuals (AttnRes, arXiv 2603.15031): a sub-layer reads by attention over sums of earlier branch outputs.

    $h_l = \sum_i \mathrm{softmax}_i(w_l \cdot \mathrm{rms}(V_i))\, V_i$

The sources V are the embedding, one sum of branch outputs for each finished group of `block_size` sub-layers, and the partial sum
of the group that is not finished yet.  (The paper calls such a group a block.)

No streams are mixed.  The decoder keeps the sources in a flat buffer [B, T, S C] of S = 1 + ceil(L / block_size) slots.  A write
adds a branch output to one slot.  With the initial query w = 0 a read returns the mean of the sources, which is the residual
stream divided by the number of sources.  The norm of the branch removes this factor, so that the decoder equals a Pre-Norm decoder.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
from mhc_kernels import Coefficients, projection, read, split, write

from mhc_jax.connections.base import Connection, ConnectionConfig
from mhc_jax.errors import InputError, require


@dataclass(frozen=True)
class AttnResBlockConfig(ConnectionConfig):
    """Settings of Block AttnRes (Block Attention Residuals)."""

    kind: ClassVar[str] = "attnres_block"
    exits: ClassVar[tuple[str, ...]] = ("attention",)
    entries: ClassVar[tuple[str, ...]] = ("copy",)
    learnable: ClassVar[tuple[str, ...]] = ("pre",)

    num_streams: int = 1
    """Number of streams, which is always 1: the residual stream is the sum of the sources."""
    exit: str = "attention"
    """How the sources become one vector.  `attention`: by softmax attention over all sources, with a query w that is a parameter
    of the exit."""
    block_size: int = 4
    """Number of sub-layers whose branch outputs are summed into one source.  With 1 every output is a source (full AttnRes)."""
    eps_norm: float = 1e-20
    """Epsilon of the RMSNorm of the sources.  This norm has no weight, because the learned query w, with which the sources are
    scored, would absorb it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.num_streams == 1,
            f"connection.num_streams is {self.num_streams}; `attnres_block` keeps sums of outputs, not streams: set block_size.",
        )
        require(self.block_size >= 1, f"connection.block_size is {self.block_size}; it must be at least 1.")
        require(
            not self.disable, "connection.disable is not empty; `attnres_block` has only its read: use kind 'residual'."
        )


def source_weights(
    V: Float[Array, "*tokens SC"], w: Float[Array, " C"], filled: int | Int[Array, ""], eps_norm: float
) -> Float[Array, "S *tokens"]:
    r"""Return the attention weights of the S slots, float32, with the axes of tokens last.  A slot without a source gets 0.

    $a_i = \mathrm{softmax}_i(w \cdot \mathrm{rms}(V_i))$ over the first `filled` slots

    Args:
      V: the buffer, with its slots side by side, of any float dtype.
      w: the query of one sub-layer or of the exit.
      filled: number of slots that hold a source.
      eps_norm: epsilon of the RMSNorm.

    Examples:
      A query of 0 weighs all sources alike.

      >>> import jax.numpy as jnp
      >>> print(source_weights(jnp.ones((1, 8)), jnp.zeros(2), 2, 1e-20)[:, 0])
      [0.5 0.5 0.  0. ]
    """
    # z has the shape [1, *tokens, slots].
    z = projection(V.reshape(*V.shape[:-1], -1, len(w)), w[:, None], eps_norm)
    logits = jnp.moveaxis(z[0], -1, 0)
    slots = jnp.arange(len(logits)).reshape(-1, *(1,) * (logits.ndim - 1))
    return jax.nn.softmax(jnp.where(slots < filled, logits, -jnp.inf), axis=0)


class AttnResBlock(Connection):
    """The connection Block AttnRes.  Diagnostics see the sum of its sources as one stream, whose pre, post and res are 1."""

    config_class = AttnResBlockConfig

    @property
    def slots(self) -> int:
        """Number S of slots of the buffer that holds the sources."""
        return 1 + -(-self.num_sublayers // self.config.block_size)

    def setup(self) -> None:
        """Declare the query w [C] of one sub-layer or of the exit."""
        self.w = self.param("w", nn.initializers.zeros, (self.width,))

    def expand(self, x: Float[Array, "B T C"]) -> Float[Array, "B T SC"]:
        """Make the buffer of sources, with the embedding in its first slot and zeros in all other slots."""
        return jnp.concatenate([x, jnp.zeros((*x.shape[:-1], (self.slots - 1) * self.width), x.dtype)], -1)

    def start(self, x: Float[Array, "B T C"]) -> tuple[Float[Array, "B T SC"], Coefficients]:
        """Make the state (sources, c) before the first boundary.  A write with these coefficients c adds to no slot."""
        none = jnp.zeros((self.slots, *x.shape[:-1]), jnp.float32)
        return self.expand(x), Coefficients(none, none, None)

    def flat(self, streams: Float[Array, "B T SC"]) -> Float[Array, "B T C"]:
        """Return the residual stream, which is the sum of all sources."""
        return sum(split(streams, self.slots)[1:], streams[..., : self.width])

    def with_flat(self, streams: Float[Array, "B T SC"], x: Float[Array, "B T C"]) -> Float[Array, "B T SC"]:
        """Raise `InputError`, because many different sources have the sum x."""
        raise InputError(
            "`attnres_block` reads sums of branch outputs, and no stream that could be replaced; look at it without an "
            "edit, or give a model with another kind of connection."
        )

    def coefficients(self, streams: Float[Array, "B T SC"]) -> Coefficients:
        """Make the coefficients: pre has the attention weights of the S slots, and post is one-hot on the slot to write to."""
        sublayer, size = self.sublayer, self.config.block_size
        pre = source_weights(streams, self.w, 1 + (sublayer + size - 1) // size, self.config.eps_norm)
        slot = (jnp.arange(self.slots) == 1 + sublayer // size).astype(jnp.float32)
        return Coefficients(pre, jnp.broadcast_to(slot.reshape(-1, 1, 1), pre.shape), None)

    def read(self, streams: Float[Array, "B T SC"], c: Coefficients) -> Float[Array, "B T C"]:
        r"""Read the sources V with the weights H_pre: $h = \sum_i H^{pre}_i V_i$."""
        return read(streams, c.pre, self.slots)

    def write(
        self, streams: Float[Array, "B T SC"], c: Coefficients, y: Float[Array, "B T C"]
    ) -> Float[Array, "B T SC"]:
        """Add the branch output y to the slot of the group that the sub-layer belongs to."""
        return write(streams, y, c.post, None, self.slots)

    def collapse(self, streams: Float[Array, "B T SC"], c: Coefficients) -> Float[Array, "B T C"]:
        """Make one vector of all sources, by attention with the query of the exit."""
        weights = source_weights(streams, self.w, self.slots, self.config.eps_norm)
        return read(streams, weights, self.slots)

    def dense(self, c: Coefficients, like: Float[Array, "B T C"]) -> tuple[Array, Array, Array]:
        """Return 1 for each of pre, post and res, because a write adds y to the residual stream that `flat` returns."""
        return super().dense(Coefficients(None, None, None), like)
