"""Diagonal Hyper-Connections (dHC): each stream keeps a share of itself, and no stream gets anything of another one.

dHC is one of the three variants that PaddleFleet has behind one switch, beside mHC and iHC (kind `identity`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mhc_jax.connections.mhc_family import DynamicConfig, DynamicConnection


@dataclass(frozen=True)
class DiagonalConfig(DynamicConfig):
    """Settings of dHC.  The share that a stream keeps of itself at the start is `Diagonal.res_logits`."""

    kind: ClassVar[str] = "diagonal"


def diagonal_mixing(logits: Float[Array, "n *tokens"]) -> Float[Array, "n n *tokens"]:
    r"""Make H_res of dHC from n logits z, float32: $H^{res} = \mathrm{diag}(\sigma(z_1), \dots, \sigma(z_n))$.

    Row sums and column sums are below 1, so that a stream forgets.  Source: bo-ke/llm-internal-medicine, pull request 61, which
    describes the module of PaddlePaddle/PaddleFleet (pull request 1894 has its switch).

    Examples:
      >>> import jax.numpy as jnp
      >>> print(diagonal_mixing(jnp.log(jnp.array([1.0, 3.0]))).round(2))
      [[0.5  0.  ]
       [0.   0.75]]
    """
    n = len(logits)
    return jnp.eye(n, dtype=jnp.float32).reshape(n, n, *(1,) * (logits.ndim - 1)) * jax.nn.sigmoid(logits)[None]


class Diagonal(DynamicConnection):
    r"""The connection dHC: mHC whose H_res is made by `diagonal_mixing`.  The projection phi is [nC, 3n].

    The decoder at initialisation is near a Pre-Norm decoder, and not equal to it: every sub-layer keeps $\sigma(8) = 0.99966$ of
    the streams, so that after L sub-layers the embedding has faded by $1 - 0.99966^L$, which is 0.2 % for 6 and 2 % for 60.
    """

    config_class = DiagonalConfig

    def res_logits(self) -> Array:
        """Return the initial logits [n] of H_res: 8 for each stream, and 0 (a share of 1/2) under `init=zeros`.

        With 8, the entries of H_res differ from the identity's by 3.4e-4, as those of a factor of KromHC do at the start.  The two
        sources do not publish how dHC starts.  mHC's +3 (`init=paper`) would keep 0.95 of a stream in each sub-layer, and 5 % of
        the embedding after 60.
        """
        return jnp.full(self.config.num_streams, 0.0 if self.config.init == "zeros" else 8.0)

    def mixing(self, logits: Float[Array, "n *tokens"]) -> Float[Array, "n n *tokens"]:
        """Make H_res, float32, from its logits by `diagonal_mixing`."""
        return diagonal_mixing(logits)
