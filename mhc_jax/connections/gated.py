r"""Gated residual streams (Qwen4-Exp): reads are gated channel by channel, writes stream by stream, and H_res is the identity.

    $h = \frac{1}{n} \sum_i g_i \odot z_i, \qquad x'_i = x_i + H^{post}_i F(h)$

with the normed streams z (`stream_norm`), the read gate g (`read_gate`) and the write gate $H^{post}$ (`write_gate`).  The source
is `Qwen4ExpTextGatedResidual` of Hugging Face transformers; there is no paper.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
from mhc_kernels import Coefficients, normalized

from mhc_jax.connections.base import Connection, ConnectionConfig
from mhc_jax.errors import at_least, require


@dataclass(frozen=True)
class GatedConfig(ConnectionConfig):
    """Settings of the gated connection of Qwen4-Exp.  Its coefficients have no static part, so that no setting `init` is needed."""

    kind: ClassVar[str] = "gated"
    exits: ClassVar[tuple[str, ...]] = ("sum", "mean", "head", "gate")
    learnable: ClassVar[tuple[str, ...]] = ("pre", "post")

    exit: str = "gate"
    """How the n streams become one vector.  `gate` (Qwen4-Exp): by a gated read whose parameters belong to the exit.  The values
    `sum`, `mean` and `head` mean what they mean for every kind of connection."""
    rank: int = 16
    """Rank r of the two projections that make the read gate (`read_gate`), at least 1.  Qwen4-Exp has 320."""
    init_std: float = 0.02
    """Standard deviation of the matrices down, up and inject at initialisation, above 0.  At the start only their random numbers
    make the streams differ."""
    eps_norm: float = 1e-6
    """Epsilon of the RMSNorm of each stream, not negative."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(0, self, "connection.", "eps_norm")
        require(self.num_streams >= 2, f"connection.num_streams is {self.num_streams}; `gated` needs 2 or more.")
        require(self.rank >= 1, f"connection.rank is {self.rank}; it must be at least 1.")
        require(self.init_std > 0, f"connection.init_std is {self.init_std}; at 0 the gate would have no gradient.")
        require(
            not self.disable,
            f"connection.disable is {self.disable}; the read gate and the write of `gated` share their norm, leave it "
            "empty: `identity` has the ablation.",
        )


def stream_norm(
    x: Float[Array, "*tokens nC"], norm: Float[Array, " nC"], num_streams: int, eps_norm: float
) -> Float[Array, "*tokens n C"]:
    r"""Return the normed streams $z_i = \mathrm{RMSNorm}(x_i) \odot w_i$ over the C channels of each stream, float32.

    Args:
      x: flat streams of any float dtype.
      norm: weights w of all streams.  Qwen4-Exp's checkpoints hold w - 1.
      num_streams: number n of streams.
      eps_norm: epsilon of the RMSNorm.

    Examples:
      >>> import jax.numpy as jnp
      >>> print(stream_norm(jnp.array([3.0, 3.0, -5.0, 5.0]), jnp.array([1.0, 1.0, 2.0, 2.0]), 2, 1e-6).round(2))
      [[ 1.  1.]
       [-2.  2.]]
    """
    n = num_streams
    v = x.reshape(*x.shape[:-1], n, -1).astype(jnp.float32)
    return normalized(v, eps_norm) * norm.reshape(*(1,) * (v.ndim - 2), n, -1)


def read_gate(
    z: Float[Array, "*tokens n C"], down: Float[Array, "nC r"], up: Float[Array, "r nC"]
) -> Float[Array, "*tokens n C"]:
    r"""Make the read gate g from the normed streams z: one number for each stream and channel, float32.

    $g = \sigma(W_{up}\, \mathrm{silu}(W_{down}\, \mathrm{vec}(z) / n))$

    Examples:
      With `up` at 0 every gate is 1/2.

      >>> import jax.numpy as jnp
      >>> print(read_gate(jnp.ones((2, 1)), jnp.ones((2, 3)), jnp.zeros((3, 2))))
      [[0.5]
       [0.5]]
    """
    n = z.shape[-2]
    rank_r = jnp.matmul(z.reshape(*z.shape[:-2], -1), down, precision="highest")
    return jax.nn.sigmoid(jnp.matmul(jax.nn.silu(rank_r / n), up, precision="highest")).reshape(z.shape)


def write_gate(z: Float[Array, "*tokens n C"], inject: Float[Array, "nC n"]) -> Float[Array, "n *tokens"]:
    r"""Make the write gate from the normed streams z: one number for each stream, float32, with the axes of tokens last.

    $H^{post} = 2 \sigma(W_{inject}\, \mathrm{vec}(z) / n)$

    Examples:
      >>> import jax.numpy as jnp
      >>> print(write_gate(jnp.ones((2, 1)), jnp.array([[0.0, 2.0], [0.0, 2.0]])).round(2))
      [1.   1.76]
    """
    n = z.shape[-2]
    logits = jnp.matmul(z.reshape(*z.shape[:-2], -1), inject, precision="highest")
    return 2 * jax.nn.sigmoid(jnp.moveaxis(logits, -1, 0) / n)


class Gated(Connection):
    """The gated connection of Qwen4-Exp.  The decoder at initialisation does not equal a Pre-Norm decoder.

    The read has a gate for each stream and channel, so that no vector H_pre [n] describes it.  For diagnostics `pre` is the mean of
    the read gate over channels, divided by n.
    """

    config_class = GatedConfig
    static_params = ("norm", "head_bias", "head_alpha", "entry_scale")

    def setup_ends(self) -> None:
        """Declare the parameters of entry and exit.  The exit `gate` has those of a read gate (`setup_gate`)."""
        super().setup_ends()
        if self.config.exit == "gate":
            self.setup_gate()

    def setup_gate(self) -> None:
        """Declare the parameters of a read gate: norm [nC], down [nC, r] and up [r, nC]."""
        nC, r, normal = self.config.num_streams * self.width, self.config.rank, self.normal
        self.norm = self.param("norm", nn.initializers.ones, (nC,))
        self.down, self.up = self.param("down", normal, (nC, r)), self.param("up", normal, (r, nC))

    def setup_sublayer(self) -> None:
        """Declare the parameters of a read gate, and the parameter inject [nC, n] of the write gate."""
        self.setup_gate()
        n = self.config.num_streams
        self.inject = self.param("inject", self.normal, (n * self.width, n))

    @property
    def normal(self) -> nn.initializers.Initializer:
        """Initialiser of the matrices down, up and inject: a normal distribution with the standard deviation `init_std`."""
        return nn.initializers.normal(self.config.init_std)

    def normed(self, streams: Float[Array, "B T nC"]) -> Float[Array, "B T n C"]:
        """Return the streams z after the RMSNorm of each stream (`stream_norm`), float32."""
        return stream_norm(streams, self.norm, self.config.num_streams, self.config.eps_norm)

    def coefficients(self, streams: Float[Array, "B T nC"]) -> Coefficients:
        """Make the coefficients: post by `write_gate`, and pre, which only diagnostics use.  None for res means the identity."""
        z = self.normed(streams)
        gate = jnp.moveaxis(jnp.mean(read_gate(z, self.down, self.up), -1), -1, 0)
        return Coefficients(pre=gate / self.config.num_streams, post=write_gate(z, self.inject), res=None)

    def read(self, streams: Float[Array, "B T nC"], c: Coefficients) -> Float[Array, "B T C"]:
        r"""Return the branch input $h = \frac{1}{n} \sum_i g_i \odot z_i$, in the dtype of the streams.

        g is the read gate, and z are the normed streams.
        """
        z = self.normed(streams)
        return jnp.mean(read_gate(z, self.down, self.up) * z, -2).astype(streams.dtype)

    def collapse(self, streams: Float[Array, "B T nC"], c: Coefficients) -> Float[Array, "B T C"]:
        """Make one vector of the streams: by a gated read if the exit is `gate`, otherwise by `Connection.collapse`."""
        return self.read(streams, c) if self.config.exit == "gate" else super().collapse(streams, c)
