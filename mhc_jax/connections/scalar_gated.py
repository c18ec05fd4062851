r"""The scalar-gated residual $x' = \lambda x + \mu F(x)$: each sub-layer learns the numbers $\lambda$ and $\mu$, as in nanochat.

A comparison with HC shows whether HC learns more than two such numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float
from mhc_kernels import Coefficients

from mhc_jax.connections.base import Connection, ConnectionConfig
from mhc_jax.errors import require


@dataclass(frozen=True)
class ScalarGatedConfig(ConnectionConfig):
    """Settings of the scalar-gated residual.  `disable=res` fixes lambda at 1, and `disable=post` fixes mu at 1."""

    kind: ClassVar[str] = "scalar_gated"
    exits: ClassVar[tuple[str, ...]] = ("sum",)
    entries: ClassVar[tuple[str, ...]] = ("copy",)
    learnable: ClassVar[tuple[str, ...]] = ("post", "res")

    num_streams: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.num_streams == 1,
            f"connection.num_streams is {self.num_streams}; `scalar_gated` has one stream: use `hc` or `mhc` for more.",
        )
        self.require_parts()


class ScalarGated(Connection):
    r"""The scalar-gated residual, $x' = \lambda x + \mu F(x)$.  At first $\lambda = \mu = 1$, as in the residual connection."""

    config_class = ScalarGatedConfig
    static_params = ("lam", "mu")

    def setup_sublayer(self) -> None:
        """Declare the learned numbers lam (lambda) and mu, each of shape []."""
        ones = nn.initializers.ones
        self.lam = self.param("lam", ones, ()) if "res" in self.config.parts else None
        self.mu = self.param("mu", ones, ()) if "post" in self.config.parts else None

    def coefficients(self, streams: Float[Array, "B T C"]) -> Coefficients:
        r"""Make the coefficients $H^{res} = \lambda$ and $H^{post} = \mu$, which are equal for every token, float32."""
        tokens = streams.shape[:-1]
        return Coefficients(
            pre=None,
            post=None if self.mu is None else jnp.broadcast_to(self.mu, (1, *tokens)),
            res=None if self.lam is None else jnp.broadcast_to(self.lam, (1, 1, *tokens)),
        )
