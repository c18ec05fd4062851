"""Manifold-Constrained Hyper-Connections (mHC, DeepSeek, arXiv 2512.24880): H_res is doubly stochastic."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from jaxtyping import Array, Float
from mhc_kernels import Coefficients, coefficients, write_read

from mhc_jax.connections.mhc_family import DynamicConfig, DynamicConnection, bias_init
from mhc_jax.errors import require


@dataclass(frozen=True)
class ManifoldHyperConnectionConfig(DynamicConfig):
    """Settings of Manifold-Constrained Hyper-Connections (mHC)."""

    kind: ClassVar[str] = "mhc"

    t_max: int = 20
    """Number of Sinkhorn-Knopp iterations."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.t_max >= 1, f"connection.t_max is {self.t_max}; Sinkhorn needs at least 1 iteration.")
        require(
            self.num_streams > 1 or self.parts != ("res",),
            "connection.num_streams is 1 with pre and post disabled; H_res is then the number 1 and nothing is learned: use "
            "more streams or kind 'residual'.",
        )


class ManifoldHyperConnection(DynamicConnection):
    r"""The connection mHC: $x' = H^{res} x + (H^{post})^\top F(H^{pre} x)$ (mHC Eq. 7-9).

    All coefficients are non-negative, and H_res is doubly stochastic.

    $H^{pre} = \sigma(\tilde H^{pre}), \quad H^{post} = 2 \sigma(\tilde H^{post}), \quad
    H^{res} = \mathrm{SinkhornKnopp}(\exp \tilde H^{res})$

    with the logits $\tilde H = \alpha\, \mathrm{RMSNorm}(\mathrm{vec}\, x)\, \phi + b$.

    `mhc_kernels.coefficients` computes all three coefficients.
    """

    config_class = ManifoldHyperConnectionConfig

    def res_logits(self) -> Array:
        """Return the initial static logits [n, n] of H_res for the preset that the setting `init` names."""
        return bias_init(self.config.init, self.sublayer, self.config.num_streams)["res"]

    def options(self) -> dict[str, Any]:
        """Return the settings that `mhc_kernels.coefficients` and `write_read` take as keyword arguments."""
        cfg = self.config
        return {"num_streams": cfg.num_streams, "parts": cfg.parts, "num_iters": cfg.t_max, **self.epsilons()}

    def coefficients(self, streams: Float[Array, "B T nC"]) -> Coefficients:
        """Make the coefficients of this sub-layer by `mhc_kernels.coefficients`."""
        return coefficients(streams, self.phi, self.alpha, self.bias, **self.options())

    def write_read(self, streams, c, y):
        """Run the boundary (write, coefficients, read) as one operation, `mhc_kernels.write_read`."""
        return write_read(streams, c, y, self.phi, self.alpha, self.bias, **self.options())
