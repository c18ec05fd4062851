"""KromHC (arXiv 2601.21579): H_res as a Kronecker product of 2x2 doubly stochastic factors, n = 2^K."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mhc_jax.connections.dynamic import DynamicConfig, DynamicConnection
from mhc_jax.errors import require


@dataclass(frozen=True)
class KromHCConfig(DynamicConfig):
    """Settings of KromHC.

    H_pre and H_post start with mHC's biases (`init=paper`).  The authors' code differs there: +1 on the home stream, -1 elsewhere,
    for both.
    """

    kind: ClassVar[str] = "kromhc"

    def __post_init__(self) -> None:
        super().__post_init__()
        n = self.num_streams
        require(
            n >= 2 and n & (n - 1) == 0,
            f"connection.num_streams is {n}; `kromhc` multiplies 2x2 factors and needs a power of two from 2 on: use "
            f"{max(2, 1 << (n.bit_length() - 1))} or {1 << n.bit_length()}, or `mhc` or `circulant` for any number.",
        )


def kronecker_mixing(logits: Float[Array, "k *tokens"]) -> Float[Array, "n n *tokens"]:
    """H_res = U_1 x ... x U_K (Kronecker), U_k = [[p, 1-p], [1-p, p]], p = softmax(two logits)_0; float32, n = 2^(k/2)."""
    tokens = logits.shape[1:]
    H_res = jnp.ones((1, 1, *tokens), jnp.float32)
    for pair in logits.reshape(-1, 2, *tokens):
        p, q = jax.nn.softmax(pair, axis=0)
        U = jnp.stack([jnp.stack([p, q]), jnp.stack([q, p])])
        n = 2 * len(H_res)
        H_res = (H_res[:, None, :, None] * U[None, :, None, :]).reshape(n, n, *tokens)
    return H_res


class KromHC(DynamicConnection):
    """mHC with `kronecker_mixing`; phi is [nC, 2n + 2 log2 n]."""

    config_class = KromHCConfig

    def res_logits(self) -> Array:
        """Each factor's (0, -8), the identity to 3.4e-4, as in the authors' code; preset `zeros`: all 0, H_res = 1/n."""
        K = self.config.num_streams.bit_length() - 1
        return jnp.zeros((K, 2)) if self.config.init == "zeros" else jnp.tile(jnp.asarray([[0.0, -8.0]]), (K, 1))

    def mixing(self, logits: Float[Array, "k *tokens"]) -> Float[Array, "n n *tokens"]:
        """See `kronecker_mixing`."""
        return kronecker_mixing(logits)
