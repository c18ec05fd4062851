"""mHC-lite (arXiv 2601.05732): H_res is a convex combination of the n! permutation matrices.

Every doubly stochastic matrix is such a combination (Birkhoff's theorem), so that no Sinkhorn iterations are needed.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from mhc_jax.connections.mhc_family import DynamicConfig, DynamicConnection
from mhc_jax.errors import require


@dataclass(frozen=True)
class MHCLiteConfig(DynamicConfig):
    """Settings of mHC-lite.

    Deviation: H_pre and H_post start with mHC's logits (`init=paper`).  In the authors' code the logits of both start at +1 for the
    home stream and at -1 for all other streams.
    """

    kind: ClassVar[str] = "mhc_lite"

    def __post_init__(self) -> None:
        super().__post_init__()
        n = self.num_streams
        require(n >= 2, f"connection.num_streams is {n}; `mhc_lite` mixes streams and needs 2 to 5 of them.")
        require(
            n <= 5,
            f"connection.num_streams is {n}; `mhc_lite` has a logit for each of the {n}! = {math.factorial(min(n, 20)):,}"
            f"{' or more' if n > 20 else ''} permutations, and 5 streams (120) are the most it takes: use `kromhc` "
            "(powers of two), `circulant` or `mhc`.",
        )


def permutations(num_streams: int) -> Float[np.ndarray, "k n n"]:
    """Return the k = n! permutation matrices, float32, in lexicographic order of the permutations.  The identity comes first."""
    orders = list(itertools.permutations(range(num_streams)))
    return np.eye(num_streams, dtype=np.float32)[np.asarray(orders)]


def permutation_mixing(logits: Float[Array, "k *tokens"], num_streams: int) -> Float[Array, "n n *tokens"]:
    r"""Make H_res of mHC-lite from n! logits z, float32.  H_res is doubly stochastic for any logits.

    $H^{res} = \sum_{k=1}^{n!} \mathrm{softmax}(z)_k\, P_k$ with the permutation matrices $P_k$ of `permutations`

    Source: arXiv 2601.05732.

    Examples:
      For two streams there are two permutations, here with weights 3/4 and 1/4.

      >>> import jax.numpy as jnp
      >>> print(permutation_mixing(jnp.log(jnp.array([3.0, 1.0])), 2).round(2))
      [[0.75 0.25]
       [0.25 0.75]]
    """
    weights = jax.nn.softmax(logits, axis=0)
    return jnp.einsum("kij,k...->ij...", permutations(num_streams), weights, precision="highest")


class MHCLite(DynamicConnection):
    """The connection mHC-lite: mHC whose H_res is made by `permutation_mixing`.  The projection phi is [nC, 2n + n!]."""

    config_class = MHCLiteConfig

    def res_logits(self) -> Array:
        """Return the initial logits [n!] of H_res, one for each permutation.

        The logit of the identity is 0 and all others are -8, as in the paper.  With n = 4 streams the entries of H_res then differ
        from those of the identity by at most 0.008.  Under `init=zeros` all logits are 0, and every entry of H_res is 1/n.
        """
        others = 0.0 if self.config.init == "zeros" else -8.0
        return jnp.full(math.factorial(self.config.num_streams), others).at[0].set(0.0)

    def mixing(self, logits: Float[Array, "k *tokens"]) -> Float[Array, "n n *tokens"]:
        """Make H_res, float32, from its logits by `permutation_mixing`."""
        return permutation_mixing(logits, self.config.num_streams)
