r"""Single-pass mHC (DeepSeek-V4.1): a sub-layer reads with the H_pre that the sub-layer before it predicted.

    $x_{l+1} = B_l x_l + C_l F_l(A_{l-1} x_l)$

$A_l$, $B_l$ and $C_l$ are H_pre, H_res and H_post of mHC (Eq. 7, 8), all made from $x_l$.  The coefficients of the read of
sub-layer l + 1 are thus known before $x_{l+1}$ is.  One pass over the streams can therefore write and read.  The first read, $A_0$,
is one-hot on stream 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float
from mhc_kernels import coefficients, read, write

from mhc_jax.connections.base import Connection, home_stream
from mhc_jax.connections.mhc import ManifoldHyperConnection, ManifoldHyperConnectionConfig
from mhc_jax.connections.mhc_family import bias_init
from mhc_jax.errors import require


@dataclass(frozen=True)
class SinglePassConfig(ManifoldHyperConnectionConfig):
    """Settings of single-pass mHC: the settings of mHC, and one more exit.

    The exit `last_read` reads with A_L, the read that the last sub-layer predicted and that no branch has used.
    """

    kind: ClassVar[str] = "single_pass"
    exits: ClassVar[tuple[str, ...]] = ("sum", "mean", "head", "last_read")

    exit: str = "last_read"

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            "pre" not in self.disable,
            "connection.disable has 'pre', and `single_pass` is mHC but for its read: use `mhc:disable=pre`.",
        )


class Ahead(NamedTuple):
    """The streams, together with the coefficients that were predicted for reading them."""

    x: Float[Array, "B T nC"]
    """Flat streams x_l that enter sub-layer l."""
    pre: Float[Array, "n B T"]
    """Coefficients A_{l-1}, float32, with which sub-layer l reads these streams."""


class SinglePassCoefficients(NamedTuple):
    """Coefficients of sub-layer l of single-pass mHC, float32, tokens last."""

    pre: Float[Array, "n B T"]
    """Coefficients A_{l-1}, with which sub-layer l reads."""
    post: Float[Array, "n B T"] | None
    """Coefficients C_l, with which sub-layer l writes.  None if they are disabled."""
    res: Float[Array, "n n B T"] | None
    """Coefficients B_l, with which sub-layer l mixes the streams.  None if they are disabled."""
    next_pre: Float[Array, "n B T"]
    """Coefficients A_l, with which sub-layer l + 1 will read."""


class SinglePass(ManifoldHyperConnection):
    """The connection single-pass mHC: each sub-layer predicts the coefficients with which the next sub-layer reads.

    Presets mean what they mean for mHC.  The static logits of A_l favour the home stream of sub-layer l + 1, which reads with A_l.
    """

    config_class = SinglePassConfig

    def static_logits(self) -> dict[str, Array]:
        """Return the initial static logits of mHC, with the logits of pre for the home stream of the next sub-layer."""
        ahead = bias_init(self.config.init, jnp.asarray(self.sublayer) + 1, self.config.num_streams)
        return {**super().static_logits(), "pre": ahead["pre"]}

    def expand(self, x: Float[Array, "B T C"]) -> Ahead:
        """Make the streams of the embedding, with a first read that is one-hot on stream 0."""
        n, tokens = self.config.num_streams, x.shape[:-1]
        first = home_stream(0, n).reshape(n, *(1,) * len(tokens))
        return Ahead(super().expand(x), jnp.broadcast_to(first, (n, *tokens)))

    def start(self, x: Float[Array, "B T C"]) -> tuple[Ahead, SinglePassCoefficients]:
        """Make the state before the first boundary, which writes nothing and passes on the one-hot read."""
        streams, c = super().start(x)
        return streams, SinglePassCoefficients(streams.pre, c.post, c.res, streams.pre)

    def collapse(self, streams: Ahead, c: SinglePassCoefficients) -> Float[Array, "B T C"]:
        """Make one vector of the streams: under the exit `last_read` by a read with A_L, otherwise as mHC does."""
        if self.config.exit == "last_read":
            return read(streams.x, streams.pre, self.config.num_streams)
        return super().collapse(streams.x, c)

    def flat(self, streams: Ahead) -> Float[Array, "B T nC"]:
        """Return the streams x_l without the predicted read."""
        return streams.x

    def coefficients(self, streams: Ahead) -> SinglePassCoefficients:
        """Make A_l, B_l and C_l from x_l by `mhc_kernels.coefficients`, and add A_{l-1} as it was predicted."""
        c = coefficients(streams.x, self.phi, self.alpha, self.bias, **self.options())
        assert c.pre is not None
        return SinglePassCoefficients(streams.pre, c.post, c.res, c.pre)

    def read(self, streams: Ahead, c: SinglePassCoefficients) -> Float[Array, "B T C"]:
        """Read with the predicted coefficients: $h_l = A_{l-1} x_l$."""
        return read(streams.x, c.pre, self.config.num_streams)

    def write(self, streams: Ahead, c: SinglePassCoefficients, y: Float[Array, "B T C"]) -> Ahead:
        """Write $x_{l+1} = B_l x_l + C_l y$, and keep A_l for the next read."""
        return Ahead(write(streams.x, y, c.post, c.res, self.config.num_streams), c.next_pre)

    def write_read(self, streams, c, y):
        """Run the boundary as three operations.

        The fused operation of mHC does not fit, because it reads with coefficients that it makes from the new streams.
        """
        return Connection.write_read(self, streams, c, y)
