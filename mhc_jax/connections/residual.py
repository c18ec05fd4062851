"""The residual connection $x' = x + F(x)$, which has one stream, no coefficients and no parameters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Array, Float
from mhc_kernels import Coefficients

from mhc_jax.connections.base import Connection, ConnectionConfig
from mhc_jax.errors import require


@dataclass(frozen=True)
class ResidualConfig(ConnectionConfig):
    """Settings of the residual connection.  It has one stream, and pre, post and res are fixed instead of learned."""

    kind: ClassVar[str] = "residual"
    entries: ClassVar[tuple[str, ...]] = ("copy",)

    num_streams: int = 1
    disable: tuple[str, ...] = ("pre", "post", "res")

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.num_streams == 1,
            f"connection.num_streams is {self.num_streams}; `residual` has one stream: use `hc` or `mhc` for more.",
        )
        require(
            self.exit != "head", "connection.exit is 'head'; `residual` has one stream and nothing to weigh: use 'sum'."
        )
        require(
            set(self.disable) == {"pre", "post", "res"},
            f"connection.disable is {self.disable}; `residual` learns no component, leave it at its default.",
        )


class Residual(Connection):
    """The residual connection, $x' = x + F(x)$."""

    config_class = ResidualConfig

    def coefficients(self, streams: Float[Array, "B T C"]) -> Coefficients:
        """Return None for each of pre, post and res, because all three are fixed."""
        return Coefficients(None, None, None)
