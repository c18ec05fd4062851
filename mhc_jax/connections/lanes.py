"""Two lanes (modded-nanogpt, record 73, pull request 230): attention reads one stream and feed-forward reads the other.

Both kinds of branch write to both lanes, with learned numbers that are the same for every token.  The lanes are not mixed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float
from mhc_kernels import Coefficients

from mhc_jax.connections.base import Connection, ConnectionConfig, home_stream
from mhc_jax.errors import require


@dataclass(frozen=True)
class LanesConfig(ConnectionConfig):
    """Settings of the two lanes.

    The exit `mean`, half the sum of both lanes, is that of the record.  Deviations: the record splits the stream in two before the
    eighth of its eleven blocks and not at the embedding, starts attention's write to lane 1 at 1.5 and not at 1, and multiplies
    both lanes with one more learned number in each sub-layer, where H_res is the identity here.
    """

    kind: ClassVar[str] = "lanes"
    learnable: ClassVar[tuple[str, ...]] = ("post",)

    num_streams: int = 2
    """Number of lanes, which is always 2."""
    exit: str = "mean"

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.num_streams == 2,
            f"connection.num_streams is {self.num_streams}; `lanes` has two, one for attention and one for feed-forward: use 2, "
            "or `hc` or `mhc` for any number.",
        )
        require(
            not self.disable,
            "connection.disable is not empty; `lanes` learns its writes alone, and without them both lanes are the residual "
            "stream: use kind 'residual'.",
        )


class Lanes(Connection):
    r"""The connection with two lanes: $x'_i = x_i + w_i F(x_{(l - 1) \bmod 2})$ for the lanes i = 0, 1.

    Attention has the odd sub-layers l and reads lane 0; feed-forward has the even ones and reads lane 1.  Both numbers w start at
    1.  The lanes of the entry `copy` are then equal until the first update, and the decoder at initialisation equals a Pre-Norm
    decoder exactly under the exit `mean`, and up to rounding under `sum` and `head`.
    """

    config_class = LanesConfig
    static_params = ("post", "head_bias", "head_alpha", "entry_scale")

    def setup_sublayer(self) -> None:
        """Declare the learned numbers w as post [2]."""
        self.post = self.param("post", nn.initializers.ones, (2,))

    def start(self, x: Float[Array, "B T C"]) -> tuple[Float[Array, "B T nC"], Coefficients]:
        """Make the state (streams, c) before the first boundary.  Nothing reads with the pre of this c, which is 0."""
        streams, c = super().start(x)
        return streams, c._replace(pre=jnp.zeros_like(c.post))

    def coefficients(self, streams: Float[Array, "B T nC"]) -> Coefficients:
        """Make the coefficients, equal for every token, float32: pre, one-hot on the lane to read, and post, the numbers w."""
        tokens = streams.shape[:-1]
        pre, post = (
            jnp.broadcast_to(a[:, None, None], (2, *tokens)) for a in (home_stream(self.sublayer, 2), self.post)
        )
        return Coefficients(pre, post, None)
