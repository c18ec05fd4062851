"""C-mHC (contactsebi/circulant-hyper-connections): H_res as a convex combination of the n cyclic shifts, bounded over depth."""

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
    """Settings of C-mHC.  The author's code starts phi with small random numbers; here it starts at 0, as for all kinds."""

    kind: ClassVar[str] = "circulant"

    init: str = "residual"
    """The author's start: H_pre reads each stream with 1/n and H_post writes each with 1."""

    beta: float = 4.0
    """Mixing over the whole depth: g = beta / (2L), L the sub-layers of the decoder."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.num_streams >= 2, f"connection.num_streams is {self.num_streams}; `circulant` needs 2 or more.")
        require(self.beta > 0, f"connection.beta is {self.beta}; it must be above 0 (kind 'identity' has no mixing).")


def circulant_mixing(logits: Float[Array, "n *tokens"], g: float) -> Float[Array, "n n *tokens"]:
    """H_res = sum_k c_k Pi^k, H_ij = c_{(j - i) mod n}, c = (1 - g) e_0 + g softmax(logits); float32.

    Doubly stochastic, and products stay circulant; the smallest singular value of a product over depth is at least
    exp(-beta - beta^2 / L).
    """
    c = g * jax.nn.softmax(logits, axis=0)
    c = c.at[0].add(1 - g)
    return jnp.stack([jnp.roll(c, i, axis=0) for i in range(len(c))])


class Circulant(DynamicConnection):
    """mHC with `circulant_mixing`; phi is [nC, 3n].  g follows from L, so the same settings mix less in a deeper decoder."""

    config_class = CirculantConfig

    def setup_sublayer(self) -> None:
        """As `DynamicConnection`.

        Raises:
          InputError: beta above 2L, where g would leave [0, 1].
        """
        beta, L = self.config.beta, self.num_sublayers
        require(
            beta <= 2 * L,
            f"connection.beta is {beta}; with {L} sub-layers g = beta / {2 * L} must not exceed 1: lower it.",
        )
        super().setup_sublayer()

    def res_logits(self) -> Array:
        """n zeros: c_0 = 1 - g (n - 1) / n at the start, whatever the preset."""
        return jnp.zeros(self.config.num_streams)

    def mixing(self, logits: Float[Array, "n *tokens"]) -> Float[Array, "n n *tokens"]:
        """See `circulant_mixing`."""
        return circulant_mixing(logits, self.config.beta / (2 * self.num_sublayers))
