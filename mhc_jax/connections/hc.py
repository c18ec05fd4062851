"""Hyper-Connections (HC, Zhu et al., arXiv 2409.19606): n streams with unconstrained learned coefficients.

In static HC (SHC) the coefficients are the same for every token.  In dynamic HC (DHC) they depend on the token.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float
from mhc_kernels import Coefficients, projection

from mhc_jax.connections.base import ALPHA_INIT, Connection, ConnectionConfig, home_stream
from mhc_jax.errors import at_least

GATE = {"pre": "s_a", "post": "s_b", "res": "s_a"}
"""Name of the gate parameter in the dynamic part of each coefficient.  Coefficients pre and res share a gate (HC Eq. 12, 13)."""


@dataclass(frozen=True)
class HyperConnectionConfig(ConnectionConfig):
    """Settings of Hyper-Connections (HC)."""

    kind: ClassVar[str] = "hc"

    dynamic: bool = True
    """Whether the coefficients depend on the token (dynamic HC, DHC).  False: they do not (static HC, SHC)."""
    tanh: bool = True
    """Whether the dynamic part passes through tanh.  The HC paper reports results with and without tanh."""
    alpha_init: float = ALPHA_INIT
    """Initial value of the gates s, which scale the dynamic part of the coefficients."""
    eps_norm: float = 1e-20
    """Epsilon of the RMSNorm of each stream, not negative."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(0, self, "connection.", "eps_norm")
        self.require_parts()


def dynamic_columns(num_streams: int, parts: tuple[str, ...]) -> dict[str, slice]:
    """Return the columns of the projection W for each coefficient in `parts`: 1 for pre, then 1 for post, then n for res."""
    sizes = {"pre": 1, "post": 1, "res": num_streams}
    columns, start = {}, 0
    for part in parts:
        columns[part] = slice(start, start + sizes[part])
        start += sizes[part]
    return columns


def hc_coefficients(
    x: Float[Array, "*tokens nC"],
    static: Coefficients,
    W: Float[Array, "C k"] | None,
    gates: Mapping[str, Float[Array, ""]],
    *,
    num_streams: int,
    tanh: bool,
    eps_norm: float,
) -> Coefficients:
    r"""Make the coefficients of one sub-layer of HC (HC Eq. 10-13), float32, with the axes of tokens last.

    $D = \mathrm{norm}(x)\, W, \qquad W = [W_m \mid W_\beta \mid W_r]$, where row j of D comes from stream j
    $H^{pre}_i = A_{m,i} + s_\alpha \tanh D_{i,m}$
    $H^{post}_i = B_i + s_\beta \tanh D_{i,\beta}$
    $H^{res}_{ij} = A_{r,ij} + s_\alpha \tanh D_{j,r_i}$

    The dynamic part of $H^{res}_{ij}$ comes from stream j, which this entry multiplies, as in both papers.  In HC row j of $A_r$
    comes from stream j, and $A_r^\top$ is applied.  In mHC Eq. 5 column j of $\theta\, \mathrm{norm}(x)^\top$ comes from stream j.

    Deviation: norm is an RMSNorm over the C channels of a stream, without a weight.  The norm in HC's code has a weight, which W
    can absorb.

    Args:
      x: flat streams of any float dtype.
      static: static parts A_m [n], B [n] and A_r [n, n] of pre, post and res.  One that is disabled is None.
      W: projection of the dynamic part, with columns as in `dynamic_columns`.  None for static HC.
      gates: the gate s of each learned coefficient, by the coefficient's name.
      num_streams: number n of streams.
      tanh: whether the dynamic part passes through tanh.
      eps_norm: epsilon of the RMSNorm.

    Examples:
      There are two streams of two channels.  The static part of H_pre is [1, 0], and its dynamic part is 0.5 tanh(D).  D is 1 for
      the first stream and -1 for the second, and tanh(1) = 0.76.

      >>> import jax.numpy as jnp
      >>> x, W = jnp.array([[2.0, 2.0, -3.0, -3.0]]), jnp.array([[1.0], [0.0]])
      >>> static, gates = Coefficients(jnp.array([1.0, 0.0]), None, None), {"pre": jnp.float32(0.5)}
      >>> c = hc_coefficients(x, static, W, gates, num_streams=2, tanh=True, eps_norm=1e-20)
      >>> print(c.pre[:, 0].round(2))
      [ 1.38 -0.38]
    """
    n, tokens = num_streams, x.shape[:-1]
    present = {part: value for part, value in static._asdict().items() if value is not None}
    out = {
        part: jnp.broadcast_to(value[(..., *(None,) * len(tokens))], (*value.shape, *tokens))
        for part, value in present.items()
    }
    if W is not None:
        # D has the shape [k, n, *tokens], where k is the number of columns of W.
        D = jnp.moveaxis(projection(x.reshape(*tokens, n, -1), W, eps_norm), -1, 1)
        D = jnp.tanh(D) if tanh else D
        for part, columns in dynamic_columns(n, tuple(present)).items():
            dynamic = D[columns] if part == "res" else D[columns.start]
            out[part] = out[part] + gates[part] * dynamic
    return Coefficients(out.get("pre"), out.get("post"), out.get("res"))


class HyperConnection(Connection):
    r"""The connection HC: $x' = H^{res} x + (H^{post})^\top F(H^{pre} x)$ with unconstrained H.

    Parameters start as in HC Eq. 14: $A_m = e_{(l - 1) \bmod n}$, B = 1, A_r = I, W = 0 and s = `alpha_init`.  The decoder at
    initialisation then equals a Pre-Norm decoder, because the final norm removes the factor n of the exit `sum`.

    Deviation: HC multiplies the initial output projections of branches by sqrt(n).  Here branches start with the same values under
    every connection, so that runs with the same seed can be compared in pairs.
    """

    config_class = HyperConnectionConfig
    static_params = ("A_m", "B", "A_r", "s_a", "s_b", "head_bias", "head_alpha", "entry_scale")

    def setup_sublayer(self) -> None:
        """Declare the parameters A_m [n], B [n] and A_r [n, n] and, for dynamic HC, W [C, k] and the gates s_a [] and s_b []."""
        n, cfg, parts = self.config.num_streams, self.config, self.config.parts
        self.static = Coefficients(
            pre=self.param("A_m", lambda _: home_stream(self.sublayer, n)) if "pre" in parts else None,
            post=self.param("B", nn.initializers.ones, (n,)) if "post" in parts else None,
            res=self.param("A_r", lambda _: jnp.eye(n)) if "res" in parts else None,
        )
        self.W, self.gates = None, {}
        if cfg.dynamic:
            self.W = self.param("W", nn.initializers.zeros, (self.width, dynamic_columns(n, parts)[parts[-1]].stop))
            alpha_init = nn.initializers.constant(cfg.alpha_init)
            s = {name: self.param(name, alpha_init, ()) for name in sorted({GATE[part] for part in parts})}
            self.gates = {part: s[GATE[part]] for part in parts}

    def coefficients(self, streams: Float[Array, "B T nC"]) -> Coefficients:
        """Make the coefficients of this sub-layer by `hc_coefficients`."""
        cfg = self.config
        return hc_coefficients(
            streams, self.static, self.W, self.gates, num_streams=cfg.num_streams, tanh=cfg.tanh, eps_norm=cfg.eps_norm
        )
