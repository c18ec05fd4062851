"""KromHC (arXiv 2601.21579): H_res is a Kronecker product of 2x2 doubly stochastic matrices, for n = 2^K streams."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mhc_jax.connections.mhc_family import DynamicConfig, DynamicConnection
from mhc_jax.errors import require


@dataclass(frozen=True)
class KromHCConfig(DynamicConfig):
    """Settings of KromHC.

    Deviation: H_pre and H_post start with mHC's logits (`init=paper`).  In the authors' code the logits of both start at +1 for the
    home stream and at -1 for all other streams.
    """

    kind: ClassVar[str] = "kromhc"

    def __post_init__(self) -> None:
        super().__post_init__()
        n = self.num_streams
        near = sorted({max(2, 1 << bits) for bits in (n.bit_length() - 1, n.bit_length())})
        require(
            n >= 2 and n & (n - 1) == 0,
            f"connection.num_streams is {n}; `kromhc` multiplies 2x2 factors and needs a power of two from 2 on: use "
            f"{' or '.join(map(str, near))}, or `mhc` or `circulant` for any number.",
        )


def kronecker_mixing(logits: Float[Array, "k *tokens"]) -> Float[Array, "n n *tokens"]:
    r"""Make H_res of KromHC from K pairs of logits z, float32.  H_res is doubly stochastic for any logits.

    $H^{res} = U_1 \otimes \dots \otimes U_K, \quad U_k = \begin{pmatrix} p_k & 1 - p_k \\ 1 - p_k & p_k \end{pmatrix}, \quad
    p_k = \mathrm{softmax}(z_{2k-1}, z_{2k})_1$

    There are n = 2^K streams and k = 2K logits.  Source: arXiv 2601.21579, with factors of 2x2, the smallest that the paper allows.

    Examples:
      For two streams there is one factor, here with p = 3/4.

      >>> import jax.numpy as jnp
      >>> print(kronecker_mixing(jnp.log(jnp.array([3.0, 1.0]))).round(2))
      [[0.75 0.25]
       [0.25 0.75]]
    """
    tokens = logits.shape[1:]
    H_res = jnp.ones((1, 1, *tokens), jnp.float32)
    for pair in logits.reshape(-1, 2, *tokens):
        p, q = jax.nn.softmax(pair, axis=0)
        U = jnp.stack([jnp.stack([p, q]), jnp.stack([q, p])])
        n = 2 * len(H_res)
        H_res = (H_res[:, None, :, None] * U[None, :, None, :]).reshape(n, n, *tokens)
    return H_res


class KromHC(DynamicConnection):
    """The connection KromHC: mHC whose H_res is made by `kronecker_mixing`.  The projection phi is [nC, 2n + 2 log2 n]."""

    config_class = KromHCConfig

    def res_logits(self) -> Array:
        """Return the initial logits [K, 2] of H_res, two for each of the K factors.

        Each pair is (0, -8), as in the authors' code, so that the entries of each factor differ from the identity's by 3.4e-4.
        Under `init=zeros` all logits are 0, and every entry of H_res is 1/n.
        """
        swap = 0.0 if self.config.init == "zeros" else -8.0
        return jnp.tile(jnp.asarray([[0.0, swap]]), (self.config.num_streams.bit_length() - 1, 1))

    def mixing(self, logits: Float[Array, "k *tokens"]) -> Float[Array, "n n *tokens"]:
        """Make H_res, float32, from its logits by `kronecker_mixing`."""
        return kronecker_mixing(logits)
