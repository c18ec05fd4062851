"""What mHC and its relatives share: presets of static logits, epsilons, and H_pre and H_post from the streams."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float
from mhc_kernels import Coefficients, gates, projection

from mhc_jax.connections.base import Connection, ConnectionConfig, home_stream
from mhc_jax.errors import one_of, require

PRESETS = ("paper", "residual", "zeros", "hc", "home")
EPS_CONVENTIONS = {"paper": (1e-20, 0.0), "v4": (1e-6, 1e-6), "hy_v4": (1e-6, 1e-6)}
"""(eps of the RMSNorm, eps of pre and Sinkhorn); `hy_v4` (Hunyuan HY-V4) adds the second to post too."""


@dataclass(frozen=True)
class DynamicConfig(ConnectionConfig):
    """Settings of the kinds whose H_pre and H_post are those of mHC."""

    eps_conventions: ClassVar[tuple[str, ...]] = ("paper", "v4")

    exit: str = "mean"
    init: str = "paper"
    """Preset of the static biases; see `bias_init`.  A kind that is named after a paper starts as that paper says."""
    eps_convention: str = "paper"
    """`paper` (1e-20 in the norm, none elsewhere) or `v4` (1e-6 in the norm, added to pre and inside Sinkhorn)."""
    alpha_init: float = 0.01
    """Gate of the dynamic part."""

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("connection.init", self.init, PRESETS)
        one_of("connection.eps_convention", self.eps_convention, self.eps_conventions)
        *head, tail = self.learnable
        require(
            len(self.parts) > 0,
            f"connection.disable switches off {', '.join(head)} and {tail}; nothing of `{self.kind}` is left: use kind "
            "'residual'.",
        )
        require(
            self.num_streams > 1 or self.init != "home",
            f"connection.num_streams is 1, where init 'home' has no other stream to tell apart and `{self.kind}` is a gated "
            "residual at most (H_res is the number 1): use init 'paper', more streams, or kind 'residual'.",
        )


def bias_init(preset: str, sublayer: int | Array | None, num_streams: int) -> dict[str, Array]:
    """Static logits {pre [n], post [n], res [n, n]} of a preset; home stream = l mod n.

    | preset | b_pre | b_post | b_res | step 0 |
    | --- | --- | --- | --- | --- |
    | `paper` (mHC ICML A.6) | +3 home, -3 else | 0 (post 1) | +3 diagonal, -3 off | Pre-Norm |
    | `residual` | -ln(n-1) (pre 1/n) | 0 | +3 diagonal, -3 off | Pre-Norm |
    | `zeros` | 0 (pre 1/2) | 0 | 0 (H_res 1/n) | Pre-Norm |
    | `hc` | +16 home, -16 else (one-hot to 1e-7) | 0 | +8 diagonal, -8 off (identity to 1e-6) | Pre-Norm |
    | `home` | +3 home, -3 else | +3 home, -3 else (post 1.9 / 0.1) | +3 diagonal, -3 off | not Pre-Norm |

    `paper` is mHC's own preset and the default.  Like every preset but `home` it writes all streams alike.  Streams enter as
    copies, so they stay nearly equal, and an H_res with row sums of 1 then changes nothing.  `home` is this project's preset: it
    writes mostly to the home stream, so that streams differ and H_res acts.  It is no paper's, and a run that uses it says
    `init=home`.  experiments/LOG.md has the measured losses and stream cosines of both.

    b_res is mHC's.  `mhc_lite`, `kromhc` and `circulant` have logits of their own for H_res (`res_logits`).
    """
    n = num_streams
    home = 2 * home_stream(sublayer, n) - 1
    diagonal = 2 * jnp.eye(n) - 1
    zeros = jnp.zeros(n)
    # -ln(n - 1) has no value at n = 1, where the branch's own norm removes the gate's scale; 3 is what `paper` has there.
    uniform = jnp.full(n, -math.log(n - 1) if n > 1 else 3.0)
    pre, post, res = {
        "paper": (3 * home, zeros, 3 * diagonal),
        "residual": (uniform, zeros, 3 * diagonal),
        "zeros": (zeros, zeros, jnp.zeros((n, n))),
        "hc": (16 * home, zeros, 8 * diagonal),
        "home": (3 * home, 3 * home, 3 * diagonal),
    }[preset]
    return {"pre": pre, "post": post, "res": res}


def dynamic_coefficients(
    x: Float[Array, "*tokens nC"],
    phi: Float[Array, "nC k"],
    alpha: Float[Array, " parts"],
    bias: Float[Array, " k"],
    mixing: Callable[[Float[Array, "k_res *tokens"]], Float[Array, "n n *tokens"]],
    *,
    num_streams: int,
    parts: tuple[str, ...],
    eps_norm: float,
    eps: float,
    eps_post: float = 0.0,
) -> Coefficients:
    r"""Coefficients of one sub-layer, float32, tokens last.

        z = RMSNorm(vec(x)) phi
        pre = sigmoid(alpha_pre z_pre + b_pre) + eps;  post = 2 sigmoid(alpha_post z_post + b_post) + eps_post
        res = mixing(alpha_res z_res + b_res)

    Args:
      x: flat streams.
      phi: columns [pre n | post n | res k_res] for the parts present; `alpha` and `bias` likewise.
      alpha: one gate a part.
      bias: static logits.
      mixing: from k_res logits to H_res.
      num_streams: n.
      parts: which of pre, post, res exist; the others come back as None.
      eps_norm: of the RMSNorm.
      eps: added to pre.
      eps_post: added to post.
    """
    z = projection(x, phi, eps_norm)
    ends = tuple(part for part in parts if part != "res")
    m = num_streams * len(ends)
    c = gates(z[:m], alpha[: len(ends)], bias[:m], num_streams=num_streams, parts=ends, eps=eps)
    if c.post is not None and eps_post:
        c = c._replace(post=c.post + eps_post)
    if "res" in parts:
        c = c._replace(res=mixing(alpha[-1] * z[m:] + bias[m:].reshape(-1, *(1,) * (z.ndim - 1))))
    return c


class DynamicConnection(Connection):
    """mHC's H_pre and H_post.  A kind says how many logits H_res has (`res_logits`) and what it makes of them (`mixing`)."""

    static_params = ("alpha", "bias", "head_bias", "head_alpha", "entry_scale")

    def static_logits(self) -> dict[str, Array]:
        """Static logits of each part."""
        cfg = self.config
        static = bias_init(cfg.init, self.sublayer, cfg.num_streams)
        return {**static, "res": self.res_logits()} if "res" in cfg.parts else static

    def res_logits(self) -> Array:
        """Static logits of H_res, any shape."""
        raise NotImplementedError

    def mixing(self, logits: Float[Array, "k_res *tokens"]) -> Float[Array, "n n *tokens"]:
        """H_res from its logits."""
        raise NotImplementedError

    def setup_sublayer(self) -> None:
        """phi [nC, k], alpha [parts], bias [k]; columns [pre n | post n | res k_res] for the parts not disabled."""
        cfg = self.config
        static = self.static_logits()
        k = sum(static[part].size for part in cfg.parts)
        # Zero as in HC, so that the dynamic part starts at zero and step 0 can equal Pre-Norm exactly.
        self.phi = self.param("phi", nn.initializers.zeros, (cfg.num_streams * self.width, k))
        self.alpha = self.param("alpha", nn.initializers.constant(cfg.alpha_init), (len(cfg.parts),))
        self.bias = self.param("bias", lambda _: jnp.concatenate([static[part].ravel() for part in cfg.parts]))

    def head_options(self) -> dict[str, float]:
        """Epsilons of the exit head, by convention."""
        eps_norm, eps = EPS_CONVENTIONS[self.config.eps_convention]
        return {"eps_norm": eps_norm, "eps": eps}

    def coefficients(self, streams: Float[Array, "B T nC"]) -> Coefficients:
        """See `dynamic_coefficients`."""
        cfg = self.config
        eps_norm, eps = EPS_CONVENTIONS[cfg.eps_convention]
        return dynamic_coefficients(
            streams,
            self.phi,
            self.alpha,
            self.bias,
            self.mixing,
            num_streams=cfg.num_streams,
            parts=cfg.parts,
            eps_norm=eps_norm,
            eps=eps,
            eps_post=eps if cfg.eps_convention == "hy_v4" else 0.0,
        )
