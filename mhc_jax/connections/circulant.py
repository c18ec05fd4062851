"""Circulant mHC (C-mHC, github.com/contactsebi/circulant-hyper-connections): H_res is a convex combination of cyclic shifts.

How much all sub-layers together mix is bounded by one setting, `beta`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mhc_jax.connections.dynamic import DynamicConfig, DynamicConnection
from mhc_jax.errors import require


@dataclass(frozen=True)
class CirculantConfig(DynamicConfig):
    """Settings of C-mHC.

    Deviation: phi starts at 0 as for all kinds.  In the author's code it starts with small random numbers.
    """

    kind: ClassVar[str] = "circulant"

    init: str = "residual"
    """The author's start: H_pre reads each stream with 1/n and H_post writes each with 1."""

    beta: float = 4.0
    """Mixing of the whole decoder; each of the L sub-layers has the share g = beta / (2L)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.num_streams >= 2, f"connection.num_streams is {self.num_streams}; `circulant` needs 2 or more.")
        require(self.beta > 0, f"connection.beta is {self.beta}; it must be above 0 (kind 'identity' has no mixing).")


def circulant_mixing(logits: Float[Array, "n *tokens"], g: float) -> Float[Array, "n n *tokens"]:
    r"""H_res of C-mHC from n logits, float32: exactly doubly stochastic for any logits.

    $H^{res} = \sum_{k=0}^{n-1} c_k \Pi^k, \quad H^{res}_{ij} = c_{(j - i) \bmod n}, \quad
    c = (1 - g)\, e_0 + g\, \mathrm{softmax}(z)$

    with the cyclic shift $\Pi$.  Products of such matrices are circulant again.  The smallest singular value of the product over L
    sub-layers is at least $\exp(-\beta - \beta^2 / L)$.  Source: the author's code; there is no paper.

    Args:
      logits: z.
      g: share of the learned mixing, in [0, 1].

    Examples:
      Equal logits spread the share g evenly over all shifts.

      >>> import jax.numpy as jnp
      >>> print(circulant_mixing(jnp.zeros(3), 0.75).round(2))
      [[0.5  0.25 0.25]
       [0.25 0.5  0.25]
       [0.25 0.25 0.5 ]]
    """
    c = g * jax.nn.softmax(logits, axis=0)
    c = c.at[0].add(1 - g)
    return jnp.stack([jnp.roll(c, i, axis=0) for i in range(len(c))])


class Circulant(DynamicConnection):
    """mHC with `circulant_mixing`; phi is [nC, 3n].  With the same settings a deeper decoder mixes less in each sub-layer."""

    config_class = CirculantConfig

    def setup_sublayer(self) -> None:
        """Declare the parameters of `DynamicConnection`.

        Raises:
          InputError: beta exceeds 2L, where g would exceed 1.
        """
        beta, L = self.config.beta, self.num_sublayers
        require(
            beta <= 2 * L,
            f"connection.beta is {beta}; with {L} sub-layers g = beta / {2 * L} must not exceed 1: lower it.",
        )
        super().setup_sublayer()

    def res_logits(self) -> Array:
        """Initial logits [n], all 0 under every preset, so that c_0 = 1 - g (n - 1) / n."""
        return jnp.zeros(self.config.num_streams)

    def mixing(self, logits: Float[Array, "n *tokens"]) -> Float[Array, "n n *tokens"]:
        """H_res by `circulant_mixing`."""
        return circulant_mixing(logits, self.config.beta / (2 * self.num_sublayers))
