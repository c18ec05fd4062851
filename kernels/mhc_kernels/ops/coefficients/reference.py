r"""The coefficients of one sub-layer, as mHC (arXiv 2512.24880) writes them in Eq. 7 and 8.

    $\tilde x = \mathrm{RMSNorm}(\mathrm{vec}(x))$
    $H^{pre} = \sigma(\alpha_{pre}\, \tilde x \phi_{pre} + b_{pre})$
    $H^{post} = 2 \sigma(\alpha_{post}\, \tilde x \phi_{post} + b_{post})$
    $H^{res} = \mathrm{Sinkhorn}(\alpha_{res}\, \mathrm{mat}(\tilde x \phi_{res}) + b_{res})$

DeepSeek-V4 adds `eps` to $H^{pre}$ and inside Sinkhorn, and not to $H^{post}$ (`EPS_CONVENTIONS` in `mhc_family.py`).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from mhc_kernels.ops.sinkhorn.reference import sinkhorn


def coefficients(
    x: Array, phi: Array, alpha: Array, bias: Array, *, num_streams: int, eps_norm: float = 1e-20, eps: float = 0.0
) -> tuple[Array, Array, Array]:
    """Map streams x [N, nC], phi [nC, n^2 + 2n], alpha [3], bias [n^2 + 2n] -> pre [n, N], post [n, N], res [n, n, N]."""
    n = num_streams
    z = (x / jnp.sqrt(jnp.mean(x**2, -1, keepdims=True) + eps_norm)) @ phi
    z_pre, z_post, z_res = jnp.split(z.T, [n, 2 * n])
    b_pre, b_post, b_res = jnp.split(bias[:, None], [n, 2 * n])
    pre = jax.nn.sigmoid(alpha[0] * z_pre + b_pre) + eps
    post = 2 * jax.nn.sigmoid(alpha[1] * z_post + b_post)
    return pre, post, sinkhorn((alpha[2] * z_res + b_res).reshape(n, n, -1), eps=eps)
