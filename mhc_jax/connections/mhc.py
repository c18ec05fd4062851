"""Manifold-Constrained Hyper-Connections (mHC, DeepSeek, arXiv 2512.24880): H_res is doubly stochastic."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float
from mhc_kernels import Coefficients, coefficients, sinkhorn, write_read

from mhc_jax.connections.base import Connection
from mhc_jax.connections.mhc_family import MOST_ITERATIONS, DynamicConfig, DynamicConnection, bias_init
from mhc_jax.connections.write_rank import RankedCoefficients, more_posts, ranked_write
from mhc_jax.errors import require


@dataclass(frozen=True)
class ManifoldHyperConnectionConfig(DynamicConfig):
    """Settings of Manifold-Constrained Hyper-Connections (mHC)."""

    kind: ClassVar[str] = "mhc"

    t_max: int = 20
    """Number of Sinkhorn-Knopp iterations, from 1 to 1000."""
    write_rank: int = 1
    """Number r of directions that a write adds to the n streams of a token (`mhc_jax/connections/write_rank.py`), from
    1 to n.  1: mHC; `single_pass` has no other."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            1 <= self.t_max <= MOST_ITERATIONS,
            f"connection.t_max is {self.t_max}; Sinkhorn needs at least 1 iteration, and at most {MOST_ITERATIONS} are allowed.",
        )
        require(
            self.num_streams > 1 or self.parts != ("res",),
            "connection.num_streams is 1 with pre and post disabled; H_res is then the number 1 and nothing is learned: use "
            "more streams or kind 'residual'.",
        )
        n, r = self.num_streams, self.write_rank
        require(
            1 <= r <= n, f"connection.write_rank is {r}; what {n} streams are given has rank 1 to {n}: use such a rank."
        )
        require(
            r == 1 or "post" in self.parts,
            f"connection.write_rank is {r} with post disabled; the further directions are learned as post is: use 1.",
        )
        require(
            r == 1 or self.dynamic,
            f"connection.write_rank is {r} with dynamic=False; the further directions depend on the token: use 1.",
        )


class ManifoldHyperConnection(DynamicConnection):
    r"""The connection mHC: $x' = H^{res} x + (H^{post})^\top F(H^{pre} x)$ (mHC Eq. 7-9).

    All coefficients are non-negative, and H_res is doubly stochastic.

    $H^{pre} = \sigma(\tilde H^{pre}), \quad H^{post} = 2 \sigma(\tilde H^{post}), \quad
    H^{res} = \mathrm{SinkhornKnopp}(\exp \tilde H^{res})$

    with the logits $\tilde H = \alpha\, \mathrm{RMSNorm}(\mathrm{vec}\, x)\, \phi + b$.

    `mhc_kernels.coefficients` computes all three coefficients.  With `write_rank` r above 1 a write has r - 1 further directions
    (`write_rank.py`), and the boundary runs as three operations.
    """

    config_class = ManifoldHyperConnectionConfig
    static_params = ("write_alpha", "write_bias", "write_scale", *DynamicConnection.static_params)

    def setup_sublayer(self) -> None:
        """Declare phi, alpha and bias of `DynamicConnection`, and for r > 1 the parameters of r - 1 further directions.

        They are write_phi [nC, (r - 1) n], write_alpha [1] and write_bias [(r - 1) n] of the coefficients p, and write_scale
        [r - 1, C], the vectors w.
        """
        super().setup_sublayer()
        cfg, n, ranks = self.config, self.config.num_streams, self.config.write_rank - 1
        if ranks:
            zeros = nn.initializers.zeros
            self.write_phi = self.param("write_phi", zeros, (n * self.width, ranks * n))
            self.write_alpha = self.param("write_alpha", nn.initializers.constant(cfg.alpha_init), (1,))
            self.write_bias = self.param("write_bias", zeros, (ranks * n,))
            self.write_scale = self.param("write_scale", nn.initializers.normal(1.0), (ranks, self.width))

    def res_logits(self) -> Array:
        """Return the initial static logits [n, n] of H_res for the preset that the setting `init` names."""
        return bias_init(self.config.init, self.sublayer, self.config.num_streams)["res"]

    def mixing(self, logits: Float[Array, "k *tokens"]) -> Float[Array, "n n *tokens"]:
        """Make H_res, float32, from its logits by `mhc_kernels.sinkhorn`."""
        n = self.config.num_streams
        return sinkhorn(logits.reshape(n, n, *logits.shape[1:]), self.config.t_max, self.epsilons()["eps"])

    def options(self) -> dict[str, Any]:
        """Return the settings that `mhc_kernels.coefficients` and `write_read` take as keyword arguments."""
        cfg = self.config
        return {"num_streams": cfg.num_streams, "parts": cfg.parts, "num_iters": cfg.t_max, **self.epsilons()}

    def start(self, x: Float[Array, "B T C"]) -> tuple[Any, Any]:
        """Make the state (streams, c) before the first boundary, whose further directions are 0."""
        streams, c = super().start(x)
        if self.config.write_rank == 1:
            return streams, c
        more = jnp.zeros((self.config.write_rank - 1, *c.post.shape), jnp.float32)
        return streams, RankedCoefficients(c.pre, c.post, c.res, more, jnp.zeros((len(more), self.width)))

    def coefficients(self, streams: Float[Array, "B T nC"]) -> Coefficients | RankedCoefficients:
        """Make the coefficients of this sub-layer by `mhc_kernels.coefficients`, and by `more_posts` for r > 1."""
        if not self.config.dynamic:
            return super().coefficients(streams)
        c = coefficients(streams, self.phi, self.alpha, self.bias, **self.options())
        if self.config.write_rank == 1:
            return c
        n, eps_norm = self.config.num_streams, self.epsilons()["eps_norm"]
        more = more_posts(streams, self.write_phi, self.write_alpha, self.write_bias, n, eps_norm)
        assert c.post is not None
        return RankedCoefficients(c.pre, c.post, c.res, more, self.write_scale)

    def write(self, streams, c, y):
        """Return the mixed streams plus the branch output, by `ranked_write` for r > 1."""
        if self.config.write_rank == 1:
            return super().write(streams, c, y)
        return ranked_write(streams, c, y, self.config.num_streams)

    def write_read(self, streams, c, y):
        """Run the boundary (write, coefficients, read) as one operation, `mhc_kernels.write_read`, if r = 1 and H is dynamic."""
        if self.config.write_rank > 1 or not self.config.dynamic:
            return Connection.write_read(self, streams, c, y)
        return write_read(streams, c, y, self.phi, self.alpha, self.bias, **self.options())
