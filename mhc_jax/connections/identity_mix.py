"""Identity-mix Hyper-Connections: H_res is a blend of the identity and of mHC's H_res.

The identity keeps most of each stream, and one learned number of each sub-layer says how much the streams mix.  The source is a
branch of github.com/tokenbender/mHC-manifold-constrained-hyper-connections, feat/mhc-residual-identity-mix.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
from mhc_kernels import sinkhorn

from mhc_jax.connections.mhc_family import MOST_ITERATIONS, DynamicConfig, DynamicConnection, bias_init
from mhc_jax.errors import require

SHARE_INIT = 0.01
"""Initial value of the share a of mHC's H_res, as in the authors' code."""


@dataclass(frozen=True)
class IdentityMixConfig(DynamicConfig):
    r"""Settings of identity-mix.

    Deviations: the authors' code is static, takes 10 Sinkhorn iterations on logits divided by 0.05, starts them at 0 on the
    diagonal and at -8 elsewhere, and makes H_pre and H_post by softmax.  Here the logits, presets, H_pre and H_post are mHC's, so
    that `mhc` and `identity_mix` differ in H_res alone.  The authors apply the transpose of their matrix, whose rows they normalise
    first; mHC's H_res is that transpose, and its columns are normalised first, so that both are the same matrix.
    """

    kind: ClassVar[str] = "identity_mix"

    t_max: int = 20
    """Number of Sinkhorn-Knopp iterations, from 1 to 1000."""

    def __post_init__(self) -> None:
        super().__post_init__()
        n = self.num_streams
        require(n >= 2, f"connection.num_streams is {n}; `identity_mix` needs 2 or more.")
        require(
            1 <= self.t_max <= MOST_ITERATIONS,
            f"connection.t_max is {self.t_max}; Sinkhorn needs at least 1 iteration, and at most {MOST_ITERATIONS} are allowed.",
        )


def identity_mixing(
    logits: Float[Array, "n n *tokens"], share_logit: Float[Array, ""], num_iters: int, eps: float
) -> Float[Array, "n n *tokens"]:
    r"""Make H_res of identity-mix, float32: $H^{res} = (1 - a) I + a\, \mathrm{SinkhornKnopp}(\exp z), \quad a = \sigma(s)$.

    The eigenvalues of H_res are 1 - a plus a times those of the Sinkhorn matrix.  Its rows sum to 1, and its columns do as far as
    the iterations have converged.

    Args:
      logits: the logits z.
      share_logit: the number s.
      num_iters: number of Sinkhorn-Knopp iterations.
      eps: epsilon of Sinkhorn, 0 in mHC and 1e-6 in DeepSeek-V4.

    Examples:
      Equal logits spread the share a = 1/2 evenly over all streams.

      >>> import jax.numpy as jnp
      >>> print(identity_mixing(jnp.zeros((2, 2, 1)), jnp.float32(0.0), 20, 0.0)[..., 0])
      [[0.75 0.25]
       [0.25 0.75]]
    """
    a = jax.nn.sigmoid(share_logit)
    eye = jnp.eye(len(logits), dtype=jnp.float32).reshape(*logits.shape[:2], *(1,) * (logits.ndim - 2))
    return (1 - a) * eye + a * sinkhorn(logits, num_iters, eps)


class IdentityMix(DynamicConnection):
    """The connection identity-mix: mHC whose H_res is made by `identity_mixing`.  The projection phi is [nC, n^2 + 2n].

    Under every preset but `home` the decoder at initialisation equals a Pre-Norm decoder, as mHC's does.
    """

    config_class = IdentityMixConfig
    static_params = ("share_logit", *DynamicConnection.static_params)

    def setup_sublayer(self) -> None:
        """Declare phi, alpha and bias of `DynamicConnection`, and share_logit [], whose sigmoid is the share a."""
        super().setup_sublayer()
        if "res" in self.config.parts:
            start = nn.initializers.constant(math.log(SHARE_INIT / (1 - SHARE_INIT)))
            self.share_logit = self.param("share_logit", start, ())

    def res_logits(self) -> Array:
        """Return the initial static logits [n, n] of Sinkhorn for the preset that the setting `init` names, which are mHC's."""
        return bias_init(self.config.init, self.sublayer, self.config.num_streams)["res"]

    def mixing(self, logits: Float[Array, "k *tokens"]) -> Float[Array, "n n *tokens"]:
        """Make H_res, float32, from its logits by `identity_mixing`."""
        n = self.config.num_streams
        square = logits.reshape(n, n, *logits.shape[1:])
        return identity_mixing(square, self.share_logit, self.config.t_max, self.epsilons()["eps"])
