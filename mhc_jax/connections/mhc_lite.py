"""mHC-lite (arXiv 2601.05732): H_res as a convex combination of the n! permutation matrices, doubly stochastic without Sinkhorn."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from mhc_jax.connections.dynamic import DynamicConfig, DynamicConnection
from mhc_jax.errors import require


@dataclass(frozen=True)
class MHCLiteConfig(DynamicConfig):
    """Settings of mHC-lite.

    H_pre and H_post start with mHC's biases (`init=paper`).  The authors' code differs there: +1 on the home stream, -1 elsewhere,
    for both.
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
    """All n! permutation matrices, lexicographic: the identity comes first."""
    orders = list(itertools.permutations(range(num_streams)))
    return np.eye(num_streams, dtype=np.float32)[np.asarray(orders)]


def permutation_mixing(logits: Float[Array, "k *tokens"], num_streams: int) -> Float[Array, "n n *tokens"]:
    """H_res = sum_k softmax(logits)_k P_k, float32."""
    weights = jax.nn.softmax(logits, axis=0)
    return jnp.einsum("kij,k...->ij...", permutations(num_streams), weights, precision="highest")


class MHCLite(DynamicConnection):
    """mHC with `permutation_mixing`; phi is [nC, 2n + n!]."""

    config_class = MHCLiteConfig

    def res_logits(self) -> Array:
        """Identity 0, others -8, as in the paper (H_res within 0.008 of I at n = 4); preset `zeros`: all 0, H_res = 1/n."""
        k = math.factorial(self.config.num_streams)
        return jnp.zeros(k) if self.config.init == "zeros" else jnp.full(k, -8.0).at[0].set(0.0)

    def mixing(self, logits: Float[Array, "k *tokens"]) -> Float[Array, "n n *tokens"]:
        """See `permutation_mixing`."""
        return permutation_mixing(logits, self.config.num_streams)
