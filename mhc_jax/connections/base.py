r"""The interface that every kind of connection implements, and the base class with most of the implementation.

A connection replaces $x + F(x)$.  Sub-layer $l = 1 \dots L$ reads, mixes and writes $n$ streams (mHC, arXiv 2512.24880, Eq. 3):

    $h_l = H^{pre}_l x_l, \qquad x_{l+1} = H^{res}_l x_l + (H^{post}_l)^\top F_l(h_l)$

The decoder uses a connection only through these methods of `Connection`:

    expand(x[B,T,C]) -> streams                  collapse(streams, c) -> x[B,T,C]
    coefficients(streams) -> c                   read(streams, c) -> h[B,T,C]
    write(streams, c, y) -> streams              write_read(streams, c, y) -> (streams, c_next, h)

`streams` is any pytree of arrays.  Most kinds use one flat array `[B, T, n*C]`, in which stream i (counted from 0) has the columns
i C to (i + 1) C - 1.  `c` holds the coefficients of one sub-layer and may be any pytree.  Each sub-layer has a Flax module of
its own, with the parameters of that sub-layer.  One more module, called the ends (`sublayer=None`), has the parameters of
`expand` and `collapse`.

The decoder runs boundaries and branches in turn.  At the boundary before branch l, the module of sub-layer l writes the output
of branch l - 1 with the coefficients of sub-layer l - 1.  Then it makes the coefficients of sub-layer l, and reads the input of
branch l.  `write_read` does these three operations, so that one kernel can do them in a single pass over the streams.  A branch
output that is not yet written is called a pending write.  `start` gives the state before the first boundary, whose pending write
changes nothing.

Diagnostics use `flat(streams)`, the three arrays of `dense(c, y)`, and of kinds that have them `mixing_logits(streams)` and
`source_weights(c)`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
from mhc_kernels import Coefficients, projection, read, write

from mhc_jax.errors import finite, most, one_of, require

ALPHA_INIT = 0.01
"""Initial value of the gates of dynamic parts, which are alpha in mHC (Table 5) and s in HC.  It is the default of the setting
`alpha_init`."""


MOST_STREAMS = 256
"""Largest number of streams.  A connection with more would take minutes to trace, because it names every pair of streams."""


@dataclass(frozen=True)
class ConnectionConfig:
    """Settings that every kind of connection has.  Each kind adds settings of its own in a subclass."""

    kind: ClassVar[str]
    exits: ClassVar[tuple[str, ...]] = ("sum", "mean", "head")
    """Allowed values of the setting `exit`."""
    entries: ClassVar[tuple[str, ...]] = ("copy", "scaled")
    """Allowed values of the setting `entry`."""
    learnable: ClassVar[tuple[str, ...]] = ("pre", "post", "res")
    """Names of the coefficients (among pre, post and res) that this kind of connection can learn, in the order in which arrays of
    parameters hold them."""

    num_streams: int = 4
    """Number of streams n, from 1 to 256.  `residual` and `scalar_gated` have 1; `identity_mix`, `circulant`, `go_mhc` and `gated`
    need at least 2, `mhc_lite` 2 to 5, and `kromhc` a power of two from 2 on."""
    exit: str = "sum"
    """How the n streams become one vector: by their `sum` (HC), by their `mean`, or by a sum with learned weights, `head`
    (DeepSeek-V4, `head_weights`).  `single_pass` also has `last_read`, a read with the coefficients that its last sub-layer makes.
    `residual` has `sum` and `mean`; `scalar_gated` and `delta_attnres` have `sum` alone."""
    entry: str = "copy"
    """How the embedding becomes n streams.  `copy` (HC, mHC): n equal copies.  `scaled` (arXiv 2606.03483): each stream is the
    embedding times a learned vector of its own.  The streams then differ from the start, and the decoder at initialisation does
    not equal a Pre-Norm decoder.  Kinds with one stream have `copy` alone."""
    disable: tuple[str, ...] = ()
    """Coefficients that are fixed instead of learned: pre at 1/n, post at 1, res at the identity (the ablation of mHC Table 1).
    Empty: all coefficients that the kind can learn are learned."""

    def __post_init__(self) -> None:
        finite(self, "connection.")
        most(self, "connection.", *vars(self))
        require(
            1 <= self.num_streams <= MOST_STREAMS,
            f"connection.num_streams is {self.num_streams}; a connection needs at least 1 stream, and at most {MOST_STREAMS} are "
            "allowed.",
        )
        one_of("connection.exit", self.exit, self.exits)
        one_of("connection.entry", self.entry, self.entries)
        for part in self.disable:
            one_of("An entry of connection.disable", part, self.learnable)

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the coefficients (pre, post, res) that are learned: those in `learnable` that are not in `disable`."""
        return tuple(part for part in self.learnable if part not in self.disable)

    def require_parts(self) -> None:
        """Raise `InputError` if `disable` names every coefficient.

        A static connection with the entry `scaled` may disable them all.  It is a residual connection with a learned scale of the
        embedding, the counterpart of those that learn some of them.
        """
        *head, tail = self.learnable
        require(
            len(self.parts) > 0 or (self.entry == "scaled" and not getattr(self, "dynamic", True)),
            f"connection.disable switches off {', '.join(head)} and {tail}; nothing of `{self.kind}` is left: use kind "
            "'residual'.",
        )


class Connection(nn.Module):
    """The base class of all connections.  It reads, mixes and writes n flat streams, with coefficients for each token.

    A kind of connection is a subclass that overrides the methods in which it differs.
    """

    config: Any
    """Settings of the connection, an instance of `config_class`."""
    width: int
    """Number C of channels of one stream."""
    num_sublayers: int
    """Number L of sub-layers of the whole decoder."""
    sublayer: int | Array | None = None
    """Index l - 1 of the sub-layer l that this instance belongs to, as a number or a traced array.  None: the instance has the
    parameters of the entry and the exit."""

    config_class: ClassVar[type[ConnectionConfig]]
    static_params: ClassVar[tuple[str, ...]] = ()
    """Names of the parameters that take no weight decay (`mhc_jax.optim`): those that do not project streams, such as biases."""

    def setup(self) -> None:
        """Declare the parameters of entry and exit (`sublayer=None`), or those of one sub-layer."""
        if self.sublayer is None:
            self.setup_ends()
        else:
            self.setup_sublayer()

    def setup_ends(self) -> None:
        """Declare entry_scale [n, C] of the entry `scaled`, and head_phi [nC, n], head_bias [n], head_alpha [1] of the exit `head`.

        A parameter exists only if the config has this entry or this exit.
        """
        n, C = self.config.num_streams, self.width
        if self.config.entry == "scaled":
            noise = nn.initializers.xavier_normal()
            self.entry_scale = self.param("entry_scale", lambda key: 0.6 + noise(key, (n, C)))
        if self.config.exit == "head":
            self.head_phi = self.param("head_phi", nn.initializers.zeros, (n * C, n))
            self.head_bias = self.param("head_bias", nn.initializers.zeros, (n,))
            self.head_alpha = self.param("head_alpha", nn.initializers.constant(ALPHA_INIT), (1,))

    def setup_sublayer(self) -> None:
        """Declare the parameters from which one sub-layer makes its coefficients."""

    def expand(self, x: Float[Array, "B T C"]) -> Any:
        """Make n streams of the embedding x, in the dtype of x, as the setting `entry` says."""
        if self.config.entry == "scaled":
            return jnp.concatenate([(x * s[None, None]).astype(x.dtype) for s in self.entry_scale], axis=-1)
        # jnp.tile would first make an array [B, T, n, C], which takes 5 % of the cycles of two blocks of width 2560 on a v5p.
        return jnp.concatenate([x] * self.config.num_streams, axis=-1)

    def collapse(self, streams: Any, c: Any) -> Float[Array, "B T C"]:
        """Make one vector of the n streams of each token, as the setting `exit` says.

        Sums are computed in float32, and the result has the dtype of the streams.

        Args:
          streams: the streams after the write of the last branch output.
          c: coefficients of the last sub-layer, for their form.  The result must not depend on their values, because stages of a
            pipeline send streams alone.
        """
        n = self.config.num_streams
        if self.config.exit == "head":
            weights = head_weights(streams, self.head_phi, self.head_alpha, self.head_bias, **self.epsilons())
        elif n == 1:
            return streams
        else:
            # The sum is computed as a read with weights of 1, because XLA on a TPU would transpose the streams before a plain sum.
            weights = None if self.config.exit == "mean" else jnp.ones((n, *streams.shape[:-1]), jnp.float32)
        return read(streams, weights, n)

    def epsilons(self) -> dict[str, float]:
        """Return the two epsilons of coefficients: `eps_norm` of the RMSNorm of streams, and `eps` (see `EPS_CONVENTIONS`)."""
        return {"eps_norm": 1e-20, "eps": 0.0}

    def start(self, x: Float[Array, "B T C"]) -> tuple[Any, Any]:
        """Make the state (streams, coefficients c) before the first boundary from the embedding x.

        Writing a branch output y = 0 with this c leaves the streams unchanged.
        """
        dense = self.dense(Coefficients(None, None, None), x)
        c = [a if part in self.config.parts else None for part, a in zip(Coefficients._fields, dense, strict=True)]
        return self.expand(x), Coefficients(*c)

    def flat(self, streams: Any) -> Float[Array, "B T nC"]:
        """Return the n streams as one flat array, for diagnostics."""
        return streams

    def with_flat(self, streams: Any, x: Float[Array, "B T nC"]) -> Any:
        """Return `streams` with x in place of the array that `flat` returns, for analysis.  All else that they carry stays."""
        return x

    def coefficients(self, streams: Any) -> Any:
        """Make the coefficients of this sub-layer, float32, from the streams that enter it."""
        raise NotImplementedError

    def mixing_logits(self, streams: Any) -> Float[Array, "k B T"] | None:
        """Return the k logits from which this sub-layer makes H_res, float32, for diagnostics.

        None means that H_res is fixed, or that this kind of connection does not make it from logits.
        """
        return None

    def source_weights(self, c: Any) -> Float[Array, "S B T"] | None:
        """Return the weights with which this sub-layer reads the S slots of its sources of earlier depth, float32, for diagnostics.

        Slots that the sub-layer does not see have the weight 0.  None means that this kind of connection keeps no sources.
        """
        return None

    def read(self, streams: Any, c: Any) -> Float[Array, "B T C"]:
        """Return the input of the branch, read from the streams x: $h = H^{pre} x$, in the dtype of the streams."""
        return read(streams, c.pre, self.config.num_streams)

    def write(self, streams: Any, c: Any, y: Float[Array, "B T C"]) -> Any:
        r"""Return the mixed streams plus the branch output y: $H^{res} x + (H^{post})^\top y$, in the dtype of the streams x."""
        return write(streams, y, c.post, c.res, self.config.num_streams)

    def write_read(self, streams: Any, c: Any, y: Float[Array, "B T C"]) -> tuple[Any, Any, Float[Array, "B T C"]]:
        """Run the boundary between two sub-layers.  Return (new streams, coefficients, branch input h) of the second one.

        First the output y of the first sub-layer is written with that sub-layer's coefficients c.  Then the coefficients of the
        second sub-layer are made, and the input h of its branch is read.
        """
        streams = self.write(streams, c, y)
        c = self.coefficients(streams)
        return streams, c, self.read(streams, c)

    def dense(self, c: Any, like: Float[Array, "B T nC"]) -> tuple[Array, Array, Array]:
        """Return all coefficients for diagnostics, float32: pre [n, B, T], post [n, B, T] and res [n, n, B, T].

        Args:
          c: coefficients.  One that is disabled is None in c, and has its fixed value in the result.
          like: any array with the leading axes [B, T].
        """
        n, tokens = self.config.num_streams, like.shape[:-1]
        ones = jnp.ones((n, *tokens), jnp.float32)
        identity = jnp.broadcast_to(jnp.eye(n, dtype=jnp.float32)[(..., *(None,) * len(tokens))], (n, n, *tokens))
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
      eps: the $\epsilon$ added to each weight, 1e-6 in DeepSeek-V4.

    Returns:
      float32 weights, with the axes of tokens last.

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
    r"""Return the one-hot vector [n] that selects the home stream of sub-layer l: $e_{(l - 1) \bmod n}$ (HC Eq. 14), float32.

    Args:
      sublayer: index l - 1 of the sub-layer.
      num_streams: number n of streams.

    Examples:
      With 4 streams the home stream of sub-layer 7 is stream 2, counted from 0.

      >>> print(home_stream(6, 4))
      [0. 0. 1. 0.]
    """
    return (jnp.arange(num_streams) == jnp.asarray(sublayer) % num_streams).astype(jnp.float32)
