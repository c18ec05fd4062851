"""Circulant mHC (C-mHC, github.com/contactsebi/circulant-hyper-connections): H_res is a convex combination of cyclic shifts.

The setting `beta` bounds how much all sub-layers together mix the streams.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mhc_jax.connections.mhc_family import DynamicConfig, DynamicConnection
from mhc_jax.errors import require


@dataclass(frozen=True)
class CirculantConfig(DynamicConfig):
    """Settings of C-mHC.

    Deviation: the projection phi starts at 0, as in mHC.  In the author's code phi starts with small random numbers.
    """

    kind: ClassVar[str] = "circulant"

    init: str = "residual"
    """Preset of the initial static logits of H_pre and H_post (`bias_init`).  With `residual`, the author's choice, H_pre starts at
    1/n and H_post at 1 for each stream."""

    beta: float = 4.0
    """Strength of the mixing over the whole decoder.  In each of the L sub-layers, H_res is the sum of a learned mixing with the
    weight g = beta / (2L) and the identity with the weight 1 - g.  beta lies above 0 and is at most 2L."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.num_streams >= 2, f"connection.num_streams is {self.num_streams}; `circulant` needs 2 or more.")
        require(self.beta > 0, f"connection.beta is {self.beta}; it must be above 0 (kind 'identity' has no mixing).")


def circulant_mixing(logits: Float[Array, "n *tokens"], g: float) -> Float[Array, "n n *tokens"]:
    r"""Make H_res of C-mHC from n logits z, float32.  H_res is doubly stochastic for any logits.

    $H^{res} = \sum_{k=0}^{n-1} c_k \Pi^k, \quad H^{res}_{ij} = c_{(j - i) \bmod n}, \quad
    c = (1 - g)\, e_0 + g\, \mathrm{softmax}(z)$

    with the cyclic shift $\Pi$.  Products of such matrices are circulant again.  The smallest singular value of the product over L
    sub-layers is at least $\exp(-\beta - \beta^2 / L)$ if $\beta \le L / 2$.  Source: the author's code, because there is no paper.

    Args:
      logits: the logits z.
      g: weight of the learned mixing, in [0, 1].  The identity has the weight 1 - g.

    Examples:
      Equal logits spread the weight g evenly over all shifts.

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
    """The connection C-mHC: mHC whose H_res is made by `circulant_mixing`.  The projection phi is [nC, 3n].

    With the same `beta`, each sub-layer of a deeper decoder mixes less, because its weight is g = beta / (2L).
    """

    config_class = CirculantConfig

    def setup_sublayer(self) -> None:
        """Check `beta`, and declare the parameters phi, alpha and bias of `DynamicConnection`.

        Raises:
          InputError: beta exceeds 2L, so that the weight g = beta / (2L) would exceed 1.
        """
        beta, L = self.config.beta, self.num_sublayers
        require(
            beta <= 2 * L,
            f"connection.beta is {beta}; with {L} sub-layers g = beta / {2 * L} must not exceed 1: lower it.",
        )
        super().setup_sublayer()

    def res_logits(self) -> Array:
        """Return the initial logits [n] of H_res: 0 under every preset, so that H_res has 1 - g (n - 1) / n on its diagonal."""
        return jnp.zeros(self.config.num_streams)

    def mixing(self, logits: Float[Array, "n *tokens"]) -> Float[Array, "n n *tokens"]:
        """Make H_res, float32, from its logits by `circulant_mixing`."""
        return circulant_mixing(logits, self.config.beta / (2 * self.num_sublayers))
