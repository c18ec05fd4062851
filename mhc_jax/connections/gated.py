"""Gated residual streams (Qwen4-Exp): a low-rank gate per channel reads, a sigmoid per stream writes, H_res = I."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
from mhc_kernels import Coefficients, normalized

from mhc_jax.connections.base import Connection, ConnectionConfig
from mhc_jax.errors import require


@dataclass(frozen=True)
class GatedConfig(ConnectionConfig):
    """Settings of Qwen4-Exp's connection, which has no static part and therefore no presets."""

    kind: ClassVar[str] = "gated"
    exits: ClassVar[tuple[str, ...]] = ("sum", "mean", "head", "gate")
    learnable: ClassVar[tuple[str, ...]] = ("pre", "post")

    exit: str = "gate"
    """`gate` (Qwen4-Exp): a gated read of its own; or as elsewhere."""
    rank: int = 16
    """Of the read gate; 320 in Qwen4-Exp."""
    init_std: float = 0.02
    """Of down, up and inject; what tells the streams apart at the start."""
    eps_norm: float = 1e-6
    """Of the per-stream RMSNorm."""

    def __post_init__(self) -> None:
        super().__post_init__()
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
    """z_i = RMSNorm(x_i) norm_i over the C channels of each stream, float32."""
    n = num_streams
    v = x.reshape(*x.shape[:-1], n, -1).astype(jnp.float32)
    return normalized(v, eps_norm) * norm.reshape(*(1,) * (v.ndim - 2), n, -1)


def read_gate(
    z: Float[Array, "*tokens n C"], down: Float[Array, "nC r"], up: Float[Array, "r nC"]
) -> Float[Array, "*tokens n C"]:
    """g = sigmoid(up(silu(down(vec z) / n))): one number a stream and channel, float32."""
    n = z.shape[-2]
    rank_r = jnp.matmul(z.reshape(*z.shape[:-2], -1), down, precision="highest")
    return jax.nn.sigmoid(jnp.matmul(jax.nn.silu(rank_r / n), up, precision="highest")).reshape(z.shape)


def write_gate(z: Float[Array, "*tokens n C"], inject: Float[Array, "nC n"]) -> Float[Array, "n *tokens"]:
    """post = 2 sigmoid(inject(vec z) / n), float32, tokens last."""
    n = z.shape[-2]
    logits = jnp.matmul(z.reshape(*z.shape[:-2], -1), inject, precision="highest")
    return 2 * jax.nn.sigmoid(jnp.moveaxis(logits, -1, 0) / n)


class Gated(Connection):
    """h = mean_i g_i z_i, x'_i = x_i + post_i F(h).  Not Pre-Norm at step 0.

    There is no n -> 1 matrix: for diagnostics `pre` is the mean gate over channels, over n.  `norm` starts at 1 (Qwen4-Exp's
    weight is norm - 1).
    """

    config_class = GatedConfig
    static_params = ("norm", "head_bias", "head_alpha", "entry_scale")

    def setup_ends(self) -> None:
        """Those of a read gate for the exit `gate`."""
        super().setup_ends()
        if self.config.exit == "gate":
            self.setup_gate()

    def setup_gate(self) -> None:
        """norm [nC], down [nC, r], up [r, nC]."""
        nC, r, normal = self.config.num_streams * self.width, self.config.rank, self.normal
        self.norm = self.param("norm", nn.initializers.ones, (nC,))
        self.down, self.up = self.param("down", normal, (nC, r)), self.param("up", normal, (r, nC))

    def setup_sublayer(self) -> None:
        """Those of the read gate, and inject [nC, n]."""
        self.setup_gate()
        n = self.config.num_streams
        self.inject = self.param("inject", self.normal, (n * self.width, n))

    @property
    def normal(self) -> nn.initializers.Initializer:
        """Initialiser of the matrices."""
        return nn.initializers.normal(self.config.init_std)

    def normed(self, streams: Float[Array, "B T nC"]) -> Float[Array, "B T n C"]:
        """See `stream_norm`."""
        return stream_norm(streams, self.norm, self.config.num_streams, self.config.eps_norm)

    def coefficients(self, streams: Float[Array, "B T nC"]) -> Coefficients:
        """post by `write_gate`; pre is for diagnostics."""
        z = self.normed(streams)
        gate = jnp.moveaxis(jnp.mean(read_gate(z, self.down, self.up), -1), -1, 0)
        return Coefficients(pre=gate / self.config.num_streams, post=write_gate(z, self.inject), res=None)

    def read(self, streams: Float[Array, "B T nC"], c: Coefficients) -> Float[Array, "B T C"]:
        """mean_i g_i z_i, in the dtype of the streams."""
        z = self.normed(streams)
        return jnp.mean(read_gate(z, self.down, self.up) * z, -2).astype(streams.dtype)

    def collapse(self, streams: Float[Array, "B T nC"], c: Coefficients) -> Float[Array, "B T C"]:
        """`gate`: a read; else as elsewhere."""
        return self.read(streams, c) if self.config.exit == "gate" else super().collapse(streams, c)
