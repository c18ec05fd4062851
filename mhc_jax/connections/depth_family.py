r"""What the connections have in common whose sub-layers read sources: embedding, branch outputs, or streams of earlier depth.

The N sources V of a token are kept side by side in one buffer [B, T, N C], whose slots are filled as depth grows.  Attention over
depth (AttnRes, arXiv 2603.15031, Eq. 2 to 4) weighs them with a learned query w [C] of each sub-layer:

    $a_i = \mathrm{softmax}_i(w \cdot \mathrm{rms}(V_i)), \qquad \mathrm{read} = \sum_i a_i V_i$

With H heads (arXiv 2607.27230, Eq. 3) head h has a softmax of its own and reads its own C / H channels [h]:

    $a^h_i = \mathrm{softmax}_i(w_{[h]} \cdot \mathrm{rms}(V_i)_{[h]}), \qquad \mathrm{read}_{[h]} = \sum_i a^h_i V_{i,[h]}$

The RMS is that of all C channels, also with several heads, as in that paper.  It takes no weight, which the public code has: the
query would absorb it.  Logits are not divided by $\sqrt{C}$, neither in the papers nor here.

The scores of all heads are one product with a matrix [C, H] that is 0 outside each head's channels.  These are H times the FLOPs
of one head, in an operation whose time goes into reading V.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
from mhc_kernels import Coefficients, inverse_rms, normalized, projection, read

from mhc_jax.connections.base import Connection, ConnectionConfig
from mhc_jax.errors import require


@dataclass(frozen=True)
class DepthConfig(ConnectionConfig):
    """Settings of all kinds of connection that read sources of earlier depth."""

    entries: ClassVar[tuple[str, ...]] = ("copy",)
    learnable: ClassVar[tuple[str, ...]] = ("pre",)

    num_streams: int = 1
    """Number of streams, which is always 1: what stands beside the residual stream are sources."""
    block_size: int = 4
    """Number of sub-layers that make one source, at least 1."""
    eps_norm: float = 1e-20
    """Epsilon of the RMSNorm of the sources, at least 1e-20."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.num_streams == 1,
            f"connection.num_streams is {self.num_streams}; `{self.kind}` keeps sources, not streams: set block_size, "
            f"the number of sub-layers that make one source ({type(self).block_size} by default).",
        )
        require(self.block_size >= 1, f"connection.block_size is {self.block_size}; it must be at least 1.")
        require(
            not self.disable,
            f"connection.disable is not empty; `{self.kind}` has only its read: use kind 'residual'.",
        )
        require(
            self.eps_norm >= 1e-20,
            f"connection.eps_norm is {self.eps_norm}; it must be at least 1e-20, because slots without a source are zeros.",
        )


@dataclass(frozen=True)
class DepthAttentionConfig(DepthConfig):
    """Settings of the kinds of connection that read by attention over depth."""

    heads: int = 1
    """Number H of heads, at least 1.  The width must be a multiple of it.  arXiv 2607.27230 finds 4 or 8 best."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.heads >= 1, f"connection.heads is {self.heads}; it must be at least 1.")


class StreamAndSources(NamedTuple):
    """The state of connections that have a residual stream beside their sources."""

    x: Float[Array, "B T C"]
    """The residual stream."""
    sources: Float[Array, "B T NC"]
    """The buffer of sources.  Slots that are not filled yet are zero."""


class SourceCoefficients(NamedTuple):
    """Coefficients of one sub-layer, float32, with the axes of tokens last."""

    pre: Float[Array, "*H N B T"]
    """Weights with which the sub-layer reads the slots, for each head if the kind has heads."""
    post: Float[Array, "N B T"]
    """Weights of a write to the slots: 1 for the slot that the sub-layer writes to, 0 for all others."""


class DepthConnection(Connection):
    """The base class of connections that read sources.  Diagnostics see one stream, which `flat` returns."""

    @property
    def slots(self) -> int:
        """Number N of slots: one for each group of `block_size` sub-layers, for what is known when the group begins."""
        return -(-self.num_sublayers // self.config.block_size)

    def flat(self, streams: Any) -> Float[Array, "B T C"]:
        """Return the residual stream x."""
        return streams.x

    def with_flat(self, streams: Any, x: Float[Array, "B T C"]) -> Any:
        """Return the residual stream x with the sources of `streams`."""
        return streams._replace(x=x)

    def source_weights(self, c: SourceCoefficients) -> Float[Array, "N B T"]:
        """Return the weights with which this sub-layer reads its sources, float32, as means over heads."""
        return c.pre.mean(0)

    def dense(self, c: Any, like: Float[Array, "B T C"]) -> tuple[Array, Array, Array]:
        """Return 1 for each of pre, post and res, because a write adds y to the residual stream that `flat` returns."""
        return super().dense(Coefficients(None, None, None), like)


class DepthAttention(DepthConnection):
    """The base class of connections that read by attention over depth.  A subclass says which slots are filled."""

    def setup_query(self) -> None:
        """Declare the query w [C].  It starts at 0, so that all sources weigh alike.

        Raises:
          InputError: the width is no multiple of the number of heads.
        """
        H = self.config.heads
        require(
            self.width % H == 0,
            f"connection.heads is {H}, and model.width {self.width} is no multiple of it; choose a divisor of the width.",
        )
        self.w = self.param("w", nn.initializers.zeros, (self.width,))

    def attend(self, V: Float[Array, "*tokens NC"], filled: int | Int[Array, ""]) -> Float[Array, "H N *tokens"]:
        """Return the `attention_weights` of the first `filled` slots for the query of this sub-layer."""
        return attention_weights(V, self.w, filled, self.config.eps_norm, self.config.heads)


def attention_weights(
    V: Float[Array, "*tokens NC"], w: Float[Array, " C"], filled: int | Int[Array, ""], eps_norm: float, heads: int = 1
) -> Float[Array, "H N *tokens"]:
    r"""Return the attention weights of the N slots for each head, float32, with the axes of tokens last.

    $a^h_i = \mathrm{softmax}_i(w_{[h]} \cdot \mathrm{rms}(V_i)_{[h]})$ over the first `filled` slots, and 0 for all others.  If no
    slot is filled, all weights are 0.

    Args:
      V: the buffer, with its slots side by side, of any float dtype.
      w: the query of one sub-layer or of the exit.
      filled: number of slots that hold a source.
      eps_norm: epsilon of the RMSNorm.
      heads: number H of heads, a divisor of C.

    Examples:
      A query of 0 weighs all sources alike.

      >>> import jax.numpy as jnp
      >>> print(attention_weights(jnp.ones((1, 8)), jnp.zeros(2), 2, 1e-20)[0, :, 0])
      [0.5 0.5 0.  0. ]

      The first head sees that source 2 is twice source 1 in its channel; the second head, with a query of 0, does not look.

      >>> print(attention_weights(jnp.array([[0.0, 1.0, 1.0, 1.0]]), jnp.array([2.0, 0.0]), 2, 0.0, 2)[..., 0].round(2))
      [[0.12 0.88]
       [0.5  0.5 ]]
    """
    C = len(w)
    of_head = jnp.arange(C)[:, None] // (C // heads) == jnp.arange(heads)[None]
    # z has the shape [H, *tokens, slots].
    z = projection(V.reshape(*V.shape[:-1], -1, C), jnp.where(of_head, w[:, None], 0), eps_norm)
    logits = jnp.moveaxis(z, -1, 1)
    seen = jnp.arange(logits.shape[1]).reshape(1, -1, *(1,) * (logits.ndim - 2)) < filled
    lowest = jnp.finfo(jnp.float32).min
    return jnp.where(seen, jax.nn.softmax(jnp.where(seen, logits, lowest), axis=1), 0)


def mix_weights(
    V: Float[Array, "*tokens SC"],
    filled: int | Int[Array, ""],
    W1: Float[Array, "C S"],
    W2: Float[Array, "S S"],
    bias: Float[Array, " S"],
    gamma: Float[Array, ""] | None,
    eps: float,
) -> Float[Array, "S *tokens"]:
    r"""Return the weights w of the S = N + 1 streams of V in the mix $x = \sum_j w_j X_j$ of MUDD (`mudd.py`), float32.

    $a = W_2^\top \mathrm{GELU}(W_1^\top\, \mathrm{rms}(X_b)) + \mathrm{bias}$

    Without gamma, $w = a$.  With gamma,
    $x = X_b + \gamma\, \mathrm{rms}(\sum_j a_j\, \mathrm{rms}(X_j))$, and w has both norms and the 1 of $X_b$ in it.

    Args:
      V: the buffer of N slots, and behind it the current stream X_b, of any float dtype.
      filled: number of slots that hold a stream.  The others have the weight 0.
      W1: projection to the S hidden units.
      W2: projection of the hidden units to the S weights.
      bias: static part of the weights.
      gamma: weight of the outer norm, or None.
      eps: epsilon of the norms.

    Examples:
      >>> import jax.numpy as jnp
      >>> zeros, bias = jnp.zeros((2, 2)), jnp.array([0.5, 1.0])
      >>> print(mix_weights(jnp.ones((1, 4)), 1, zeros, zeros, bias, None, 1e-6)[:, 0])
      [0.5 1. ]
    """
    C, S = W1.shape
    ones = (1,) * (V.ndim - 1)
    slot = jnp.arange(S).reshape(-1, *ones)
    hidden = jax.nn.gelu(projection(V[..., -C:], W1, eps), approximate=False)
    a = jnp.einsum("ks,k...->s...", W2, hidden, precision="highest") + bias.reshape(-1, *ones)
    a = jnp.where((slot < filled) | (slot == S - 1), a, 0)
    if gamma is None:
        return a
    v = V.reshape(*V.shape[:-1], S, C).astype(jnp.float32)
    inner = read(normalized(v, eps).reshape(V.shape), a, S)
    scales = inverse_rms(jnp.moveaxis(jnp.mean(v**2, -1), -1, 0), eps)
    return gamma * inverse_rms(jnp.mean(inner**2, -1), eps)[None] * a * scales + (slot == S - 1)


def read_heads(V: Float[Array, "*tokens NC"], weights: Float[Array, "H N *tokens"]) -> Float[Array, "*tokens C"]:
    r"""Return $\sum_i a^h_i V_{i,[h]}$ of each head's channels [h], side by side, in the dtype of the sources V.

    Examples:
      >>> import jax.numpy as jnp
      >>> weights = jnp.array([[[1.0], [0.0]], [[0.5], [0.5]]])
      >>> print(read_heads(jnp.array([[1.0, 2.0, 3.0, 4.0]]), weights))
      [[1. 3.]]
    """
    H, N = weights.shape[:2]
    heads = V.reshape(*V.shape[:-1], N, H, -1)
    return jnp.concatenate([read(heads[..., h, :].reshape(*V.shape[:-1], -1), weights[h], N) for h in range(H)], -1)


def one_slot(slot: int | Int[Array, ""], like: Float[Array, "_ N *tokens"]) -> Float[Array, "N *tokens"]:
    """Return weights of a write that adds to one slot, float32: 1 for the slot, 0 for all others.  `like` has the shape."""
    shape = like.shape[1:]
    hot = (jnp.arange(shape[0]) == slot).astype(jnp.float32)
    return jnp.broadcast_to(hot.reshape(-1, *(1,) * (len(shape) - 1)), shape)


def buffer(x: Float[Array, "*tokens C"], slots: int) -> Float[Array, "*tokens NC"]:
    """Return a buffer of N = `slots` slots with x in its first slot and zeros in all other slots."""
    return jnp.concatenate([x, jnp.zeros((*x.shape[:-1], (slots - 1) * x.shape[-1]), x.dtype)], -1)
