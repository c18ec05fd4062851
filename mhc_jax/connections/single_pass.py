r"""Single-pass mHC (DeepSeek-V4.1): a sub-layer reads with the H_pre that the sub-layer before it made.

    $x_{l+1} = B_l x_l + C_l F_l(A_{l-1} x_l)$

$A_l$, $B_l$ and $C_l$ are H_pre, H_res and H_post of mHC (Eq. 7, 8), all made from $x_l$.  Sub-layer l + 1 reads $x_{l+1}$ with
$A_l$, which is known before $x_{l+1}$ is.  One pass over the streams can therefore write $x_{l+1}$ and read from it.  Sub-layer 1
reads with $A_0$, which is one-hot on stream 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float
from mhc_kernels import read, write

from mhc_jax.connections.base import Connection, home_stream
from mhc_jax.connections.mhc import ManifoldHyperConnection, ManifoldHyperConnectionConfig
from mhc_jax.connections.mhc_family import bias_init
from mhc_jax.errors import require


@dataclass(frozen=True)
class SinglePassConfig(ManifoldHyperConnectionConfig):
    """Settings of single-pass mHC: the settings of mHC, and one more value of `exit`.

    The exit `last_read` reads the streams with A_L, the coefficients that the last sub-layer makes and no branch uses.
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
        require(
            self.write_rank == 1,
            f"connection.write_rank is {self.write_rank}; `single_pass` writes in one pass over the streams, with rank 1: use "
            "`mhc` for more.",
        )


class Ahead(NamedTuple):
    """The streams that enter sub-layer l, and the coefficients that sub-layer l - 1 made for reading them."""

    x: Float[Array, "B T nC"]
    """Flat streams x_l that enter sub-layer l."""
    pre: Float[Array, "n B T"]
    """Coefficients A_{l-1}, float32, with which sub-layer l reads the streams x_l."""


class SinglePassCoefficients(NamedTuple):
    """Coefficients of sub-layer l of single-pass mHC, float32, with the axes of tokens last."""

    pre: Float[Array, "n B T"]
    """Coefficients A_{l-1}, with which sub-layer l reads the streams x_l."""
    post: Float[Array, "n B T"] | None
    """Coefficients C_l, with which sub-layer l writes its branch output.  None if they are disabled."""
    res: Float[Array, "n n B T"] | None
    """Coefficients B_l, with which sub-layer l mixes the streams.  None if they are disabled."""
    next_pre: Float[Array, "n B T"]
    """Coefficients A_l, made by sub-layer l, with which sub-layer l + 1 will read."""


class SinglePass(ManifoldHyperConnection):
    """The connection single-pass mHC: each sub-layer makes the coefficients with which the next sub-layer reads.

    The presets of `init` are those of mHC.  The initial static logits of A_l are those that mHC's sub-layer l + 1 has for H_pre,
    because sub-layer l + 1 reads with A_l.
    """

    config_class = SinglePassConfig

    def static_logits(self) -> dict[str, Array]:
        """Return mHC's initial static logits: those of post and res of this sub-layer, and those of pre of the next sub-layer."""
        ahead = bias_init(self.config.init, jnp.asarray(self.sublayer) + 1, self.config.num_streams)
        return {**super().static_logits(), "pre": ahead["pre"]}

    def expand(self, x: Float[Array, "B T C"]) -> Ahead:
        """Make the streams of the embedding x, and the coefficients of their first read (A_0, one-hot on stream 0)."""
        n, tokens = self.config.num_streams, x.shape[:-1]
        first = home_stream(0, n).reshape(n, *(1,) * len(tokens))
        return Ahead(super().expand(x), jnp.broadcast_to(first, (n, *tokens)))

    def start(self, x: Float[Array, "B T C"]) -> tuple[Ahead, SinglePassCoefficients]:
        """Make the state (streams, c) before the first boundary.  Writing y = 0 with this c changes neither streams nor A_0."""
        streams, c = super().start(x)
        return streams, SinglePassCoefficients(streams.pre, c.post, c.res, streams.pre)

    def collapse(self, streams: Ahead, c: SinglePassCoefficients) -> Float[Array, "B T C"]:
        """Make one vector of the streams: by a read with A_L if the exit is `last_read`, otherwise as mHC does."""
        if self.config.exit == "last_read":
            return read(streams.x, streams.pre, self.config.num_streams)
        return super().collapse(streams.x, c)

    def flat(self, streams: Ahead) -> Float[Array, "B T nC"]:
        """Return the flat streams x_l, without the coefficients A_{l-1} that come with them."""
        return streams.x

    def with_flat(self, streams: Ahead, x: Float[Array, "B T nC"]) -> Ahead:
        """Return the flat streams x with the coefficients A_{l-1} of `streams`."""
        return streams._replace(x=x)

    def coefficients(self, streams: Ahead) -> SinglePassCoefficients:
        """Make A_l, B_l and C_l from the streams x_l, as mHC does.  A_{l-1} comes with the streams."""
        c = super().coefficients(streams.x)
        assert c.pre is not None
        return SinglePassCoefficients(streams.pre, c.post, c.res, c.pre)

    def read(self, streams: Ahead, c: SinglePassCoefficients) -> Float[Array, "B T C"]:
        """Return the branch input $h_l = A_{l-1} x_l$, read from the streams with the A_{l-1} that sub-layer l - 1 made."""
        return read(streams.x, c.pre, self.config.num_streams)

    def write(self, streams: Ahead, c: SinglePassCoefficients, y: Float[Array, "B T C"]) -> Ahead:
        """Return the new streams $x_{l+1} = B_l x_l + C_l y$, and A_l, with which sub-layer l + 1 reads them."""
        return Ahead(write(streams.x, y, c.post, c.res, self.config.num_streams), c.next_pre)

    def write_read(self, streams, c, y):
        """Run the boundary as three operations: the write, the coefficients, the read.

        mHC's fused operation, `mhc_kernels.write_read`, is not used, because it reads the new streams with coefficients that it
        makes from these same streams.
        """
        return Connection.write_read(self, streams, c, y)
