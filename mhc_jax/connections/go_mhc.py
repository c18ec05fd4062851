r"""go-mHC (arXiv 2604.02309): H_res is generalised orthostochastic, made of the squares of an orthogonal matrix.

Row and column sums are exactly 1 without iterations, for any number of streams.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from mhc_jax.connections.cayley import cayley
from mhc_jax.connections.mhc_family import DynamicConfig, DynamicConnection
from mhc_jax.errors import require

LARGEST_LOGIT = 80.0
"""Size to which logits of H_res are clipped."""
LOGITS_STD = 0.02
"""Standard deviation of the initial static logits of H_res."""


@dataclass(frozen=True)
class GoMHCConfig(DynamicConfig):
    """Settings of go-mHC."""

    kind: ClassVar[str] = "go_mhc"

    s: int = 2
    """Size s of the blocks that are averaged.  1: orthostochastic matrices; with larger s H_res can reach more of the doubly
    stochastic matrices.  The authors recommend 2, and 64 is the most."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.num_streams >= 2, f"connection.num_streams is {self.num_streams}; `go_mhc` needs 2 or more.")
        require(
            1 <= self.s <= 64,
            f"connection.s is {self.s}; a block has at least 1 row and at most 64: the authors recommend 2.",
        )


def orthostochastic_mixing(logits: Float[Array, "k *tokens"], num_streams: int) -> Float[Array, "n n *tokens"]:
    r"""Make H_res of go-mHC from k = m (m - 1) / 2 logits, m = n s, float32.  H_res is doubly stochastic.

    $H^{res}_{ij} = \frac{1}{s} \sum_{a, b = 1}^{s} Q_{(i, a), (j, b)}^2, \quad Q = (I - A)(I + A)^{-1}$

    The logits are the entries of A above its diagonal, row by row.  Row sums and column sums are within 1e-6 of 1, for n to 16 and
    s to 2.  Logits beyond 80 in size count as 80, with a gradient of 0, because float32 loses all digits at 1e4.  A = 0 gives the
    identity, where all gradients are 0.

    Source: arXiv 2604.02309 and its code, github.com/itstorque/go-mHC.  The authors make A as Theta - Theta^T of m^2 numbers, of
    which these k are the only ones that count.  Their notebooks solve for $(I - A)^{-1} (I + A)$, which is the transpose of the
    paper's Q: H_res of -A.

    Examples:
      For two streams and s = 1 a logit of tan(15 degrees) rotates by 30 degrees.

      >>> import jax.numpy as jnp
      >>> print(orthostochastic_mixing(jnp.tan(jnp.deg2rad(jnp.array([15.0]))), 2).round(2))
      [[0.75 0.25]
       [0.25 0.75]]
    """
    n, k, tokens = num_streams, len(logits), logits.shape[1:]
    m = (1 + round((1 + 8 * k) ** 0.5)) // 2
    above = np.zeros((m, m), np.int32)
    above[np.triu_indices(m, 1)] = np.arange(k)
    sign = np.triu(np.ones((m, m), np.float32), 1)
    A = logits[above + above.T] * (sign - sign.T).reshape(m, m, *(1,) * len(tokens))
    squares = cayley(jnp.clip(A, -LARGEST_LOGIT, LARGEST_LOGIT)) ** 2
    return jnp.sum(squares.reshape(n, m // n, n, m // n, *tokens), axis=(1, 3)) / (m // n)


class GoMHC(DynamicConnection):
    """The connection go-mHC: mHC whose H_res is made by `orthostochastic_mixing`.  phi is [nC, 2n + ns(ns - 1) / 2]."""

    config_class = GoMHCConfig

    def res_logits(self) -> Array:
        """Return the initial logits of H_res, the same normal numbers for every sub-layer, seed and preset.

        Their standard deviation of 0.02 makes the entries off the diagonal 4 s 0.02^2 on average, 3.2e-3 for s = 2, where mHC's
        preset `paper` has 2.5e-3.  They cannot be 0, because no gradient leads away from A = 0, and they differ from each other,
        because equal logits of a block would stay nearly equal.  The authors' toy models draw them from [0, 1).
        """
        m = self.config.num_streams * self.config.s
        return jnp.asarray(LOGITS_STD * np.random.default_rng(0).normal(size=m * (m - 1) // 2), jnp.float32)

    def mixing(self, logits: Float[Array, "k *tokens"]) -> Float[Array, "n n *tokens"]:
        """Make H_res, float32, from its logits by `orthostochastic_mixing`."""
        return orthostochastic_mixing(logits, self.config.num_streams)
