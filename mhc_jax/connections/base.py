r"""The contract that every connection keeps, and the base class that implements most of it.

A connection replaces $x + F(x)$.  Sub-layer $l = 1 \dots L$ reads, mixes and writes $n$ streams (mHC, arXiv 2512.24880, Eq. 3):

    $h_l = H^{pre}_l x_l, \qquad x_{l+1} = H^{res}_l x_l + (H^{post}_l)^\top F_l(h_l)$

The decoder knows a connection only through this class:

    expand(x[B,T,C]) -> streams                  collapse(streams, c) -> x[B,T,C]
    coefficients(streams) -> c                   read(streams, c) -> h[B,T,C]
    write(streams, c, y) -> streams              write_read(streams, c, y) -> (streams, c_next, h)

`streams` is any pytree of arrays.  Most kinds use one flat array `[B, T, n*C]` with stream i in columns i C to (i + 1) C.
`c` holds the coefficients of one sub-layer and may be any pytree.  One module instance belongs to one sub-layer and owns its
parameters.  One further instance, named the ends (`sublayer=None`), owns the parameters of `expand` and `collapse`.

The decoder runs a chain of boundaries.  At each boundary the instance of sub-layer l writes the output of sub-layer l - 1 with
the coefficients of l - 1.  Then it makes the coefficients of l and reads.  One kernel can do all three in a single pass.  `start`
gives the state before the first boundary: a pending write that changes nothing.

Diagnostics look at `flat(streams)` and at the three matrices of `dense(c, y)`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
from mhc_kernels import Coefficients, projection, read, write

from mhc_jax.errors import one_of, require

ALPHA_INIT = 0.01
"""Initial value of the gates of dynamic parts: alpha of mHC (Table 5) and s of HC.  It is the default of the setting
`alpha_init`."""


@dataclass(frozen=True)
class ConnectionConfig:
    """Settings that every kind of connection has.  Each kind adds settings of its own in a subclass."""

    kind: ClassVar[str]
    exits: ClassVar[tuple[str, ...]] = ("sum", "mean", "head")
    """Allowed values of the setting `exit`."""
    entries: ClassVar[tuple[str, ...]] = ("copy", "scaled")
    """Allowed values of the setting `entry`."""
    learnable: ClassVar[tuple[str, ...]] = ("pre", "post", "res")
    """Components (pre, post, res) that this kind of connection can learn.  Parameters hold them in this order."""

    num_streams: int = 4
    """Number of streams n."""
    exit: str = "sum"
    """How n streams become one vector: `sum` (HC), `mean`, or `head` (DeepSeek-V4: learned weights, see `head_weights`)."""
    entry: str = "copy"
    """How the embedding becomes n streams.  `copy` (HC, mHC): n equal copies.  `scaled` (arXiv 2606.03483): each stream is the
    embedding times a learned vector, so that streams differ from the start and the decoder does not start equal to Pre-Norm."""
    disable: tuple[str, ...] = ()
    """Components that are fixed instead of learned: pre at 1/n, post at 1, res at the identity (ablation of mHC Table 1).  Empty:
    all components of the kind are learned."""

    def __post_init__(self) -> None:
        require(
            self.num_streams >= 1,
            f"connection.num_streams is {self.num_streams}; a connection needs at least 1 stream.",
        )
        one_of("connection.exit", self.exit, self.exits)
        one_of("connection.entry", self.entry, self.entries)
        for part in self.disable:
            one_of("An entry of connection.disable", part, self.learnable)

    @property
    def parts(self) -> tuple[str, ...]:
        """Components (pre, post, res) that are learned: those of `learnable` that are not in `disable`."""
        return tuple(part for part in self.learnable if part not in self.disable)

    def require_parts(self) -> None:
        """Raise `InputError` if every component is disabled."""
        *head, tail = self.learnable
        require(
            len(self.parts) > 0,
            f"connection.disable switches off {', '.join(head)} and {tail}; nothing of `{self.kind}` is left: use kind "
            "'residual'.",
        )


class Connection(nn.Module):
    """The base class of all connections, which reads, mixes and writes n flat streams with coefficients of each token.

    A kind of connection overrides the methods in which it differs.
    """

    config: Any
    """Settings of the connection, an instance of `config_class`."""
    width: int
    """Number C of channels of one stream."""
    num_sublayers: int
    """Number L of sub-layers of the whole decoder."""
    sublayer: int | Array | None = None
    """Index l - 1 of the sub-layer l that this instance belongs to, which may be traced.  None: the instance of the ends."""

    config_class: ClassVar[type[ConnectionConfig]]
    static_params: ClassVar[tuple[str, ...]] = ()
    """Names of the static parameters, which are not multiplied with streams.  They take no weight decay (`mhc_jax.optim`)."""

    def setup(self) -> None:
        """Declare the parameters of the ends or of one sub-layer."""
        if self.sublayer is None:
            self.setup_ends()
        else:
            self.setup_sublayer()

    def setup_ends(self) -> None:
        """Declare the parameters of the entry, if it is `scaled`, and of the exit, if it is `head`."""
        n, C = self.config.num_streams, self.width
        if self.config.entry == "scaled":
            noise = nn.initializers.xavier_normal()
            self.entry_scale = self.param("entry_scale", lambda key: 0.6 + noise(key, (n, C)))
        if self.config.exit == "head":
            self.head_phi = self.param("head_phi", nn.initializers.zeros, (n * C, n))
            self.head_bias = self.param("head_bias", nn.initializers.zeros, (n,))
            self.head_alpha = self.param("head_alpha", nn.initializers.constant(ALPHA_INIT), (1,))

    def setup_sublayer(self) -> None:
        """Declare the parameters of the coefficients of one sub-layer."""

    def expand(self, x: Float[Array, "B T C"]) -> Any:
        """Make n streams of the embedding x, in the dtype of x, as the setting `entry` says."""
        if self.config.entry == "scaled":
            return jnp.concatenate([(x * s[None, None]).astype(x.dtype) for s in self.entry_scale], axis=-1)
        # jnp.tile would make an array [B, T, n, C] on the way.  It costs 5 % of the cycles of two layers of width 2560 on a v5p.
        return jnp.concatenate([x] * self.config.num_streams, axis=-1)

    def collapse(self, streams: Any, c: Any) -> Float[Array, "B T C"]:
        """Make one vector of the n streams, as the setting `exit` says.

        Sums are in float32, and the result has the dtype of the streams.

        Args:
          streams: the streams after the last write.
          c: coefficients of the last sub-layer.
        """
        n = self.config.num_streams
        if self.config.exit == "head":
            weights = head_weights(streams, self.head_phi, self.head_alpha, self.head_bias, **self.epsilons())
        elif n == 1:
            return streams
        else:
            # A sum is a read with weights of 1, because XLA on a TPU would transpose the streams before a plain sum.
            weights = None if self.config.exit == "mean" else jnp.ones((n, *streams.shape[:-1]), jnp.float32)
        return read(streams, weights, n)

    def epsilons(self) -> dict[str, float]:
        """Return the two epsilons of dynamic coefficients: `eps_norm` of the RMSNorm, and `eps`, which is added to sigmoids."""
        return {"eps_norm": 1e-20, "eps": 0.0}

    def start(self, x: Float[Array, "B T C"]) -> tuple[Any, Any]:
        """Make the state (streams, c) before the first boundary.  Writing y = 0 with this c leaves the streams as they are."""
        dense = self.dense(Coefficients(None, None, None), x)
        c = [a if part in self.config.parts else None for part, a in zip(Coefficients._fields, dense, strict=True)]
        return self.expand(x), Coefficients(*c)

    def flat(self, streams: Any) -> Float[Array, "B T nC"]:
        """Return the n streams as one flat array, for diagnostics."""
        return streams

    def coefficients(self, streams: Any) -> Any:
        """Make the coefficients of this sub-layer, float32, from the streams that enter it."""
        raise NotImplementedError

    def read(self, streams: Any, c: Any) -> Float[Array, "B T C"]:
        """Read the input of the branch from the streams x: $h = H^{pre} x$, in the dtype of the streams."""
        return read(streams, c.pre, self.config.num_streams)

    def write(self, streams: Any, c: Any, y: Float[Array, "B T C"]) -> Any:
        r"""Mix the streams x and add the branch output y: $H^{res} x + (H^{post})^\top y$, in the dtype of the streams."""
        return write(streams, y, c.post, c.res, self.config.num_streams)

    def write_read(self, streams: Any, c: Any, y: Float[Array, "B T C"]) -> tuple[Any, Any, Float[Array, "B T C"]]:
        """Run the boundary between two sub-layers.

        Write the output y of the previous sub-layer with that sub-layer's coefficients c.  Then make the coefficients of this
        sub-layer, and read the input of its branch.
        """
        streams = self.write(streams, c, y)
        c = self.coefficients(streams)
        return streams, c, self.read(streams, c)

    def dense(self, c: Any, like: Float[Array, "B T nC"]) -> tuple[Array, Array, Array]:
        """Return all coefficients for diagnostics, float32: pre [n, B, T], post [n, B, T] and res [n, n, B, T].

        Disabled components are filled in with their fixed values.

        Args:
          c: coefficients; None stands for a component that is disabled.
          like: any array with the leading axes [B, T].
        """
        n, tokens = self.config.num_streams, like.shape[:-1]
        ones = jnp.ones((n, *tokens), jnp.float32)
        identity = jnp.broadcast_to(jnp.eye(n)[(..., *(None,) * len(tokens))], (n, n, *tokens))
        return (
            ones / n if c.pre is None else c.pre,
            ones if c.post is None else c.post,
            identity if c.res is None else c.res,
        )


def head_weights(
    x: Float[Array, "*tokens nC"],
    phi: Float[Array, "nC n"],
    alpha: Float[Array, " 1"],
    bias: Float[Array, " n"],
    eps_norm: float,
    eps: float,
) -> Float[Array, "n *tokens"]:
    r"""Return the weights w of the exit `head` of DeepSeek-V4, one for each stream.  The exit is $\sum_i w_i x_i$.

    $w = \sigma(\alpha\, \mathrm{RMSNorm}(\mathrm{vec}\, x)\, \phi + b) + \epsilon$

    Source: `DeepseekV4HyperHead` of Hugging Face transformers; DeepSeek's report has no numbered equation for it.  The RMSNorm has
    no weight.

    Args:
      x: flat streams of any float dtype.
      phi: projection.
      alpha: gate.
      bias: static logits b.
      eps_norm: epsilon of the RMSNorm.
      eps: the $\epsilon$ added to each weight.

    Returns:
      float32 weights, tokens last.

    Examples:
      With a projection of 0 the bias alone decides: sigmoid(0) = 0.5 and sigmoid(2) = 0.88.

      >>> import jax.numpy as jnp
      >>> x = jnp.ones((1, 6))
      >>> print(head_weights(x, jnp.zeros((6, 2)), jnp.array([0.01]), jnp.array([0.0, 2.0]), 1e-6, 0.0).round(2))
      [[0.5 ]
       [0.88]]
    """
    z = projection(x, phi, eps_norm)
    return jax.nn.sigmoid(alpha[0] * z + bias[(slice(None), *(None,) * (z.ndim - 1))]) + eps


def home_stream(sublayer: int | Array | None, num_streams: int) -> Array:
    r"""Return a one-hot vector [n] at the home stream of sub-layer l: $e_{(l - 1) \bmod n}$ (HC Eq. 14), float32.

    Args:
      sublayer: index l - 1 of the sub-layer.
      num_streams: number n of streams.

    Examples:
      Sub-layer 7 of a decoder with 4 streams is at home in stream 2, counted from 0.

      >>> print(home_stream(6, 4))
      [0. 0. 1. 0.]
    """
    return (jnp.arange(num_streams) == jnp.asarray(sublayer) % num_streams).astype(jnp.float32)
