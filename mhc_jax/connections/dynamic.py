r"""H_pre and H_post as mHC makes them: presets of the static logits, conventions of epsilons, and the base class of the family.

The kinds `mhc`, `identity`, `mhc_lite`, `kromhc`, `circulant` and `single_pass` share all of this.  They differ in H_res.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float
from mhc_kernels import Coefficients, gates, projection

from mhc_jax.connections.base import ALPHA_INIT, Connection, ConnectionConfig, home_stream
from mhc_jax.errors import one_of, require

PRESETS = ("paper", "residual", "zeros", "hc", "home")
EPS_CONVENTIONS = {"paper": (1e-20, 0.0), "v4": (1e-6, 1e-6), "hy_v4": (1e-6, 1e-6)}
"""Name of a convention -> (epsilon of the RMSNorm, epsilon that is added to pre and inside Sinkhorn).

`paper` is mHC Table 5, `v4` is DeepSeek-V4's code, and `hy_v4` (Hunyuan HY-V4) adds the second epsilon to post too.
"""


@dataclass(frozen=True)
class DynamicConfig(ConnectionConfig):
    """Settings of the kinds whose H_pre and H_post are those of mHC."""

    eps_conventions: ClassVar[tuple[str, ...]] = ("paper", "v4")
    """Allowed values of `eps_convention`."""

    exit: str = "mean"
    init: str = "paper"
    """Preset of the static logits, see `bias_init`.  The default of a kind is the start that its paper or its authors' code has."""
    eps_convention: str = "paper"
    """`paper` (1e-20 in the RMSNorm, none elsewhere) or `v4` (1e-6 in the RMSNorm, added to pre and inside Sinkhorn)."""
    alpha_init: float = ALPHA_INIT
    """Initial value of the gates alpha of the dynamic part."""

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("connection.init", self.init, PRESETS)
        one_of("connection.eps_convention", self.eps_convention, self.eps_conventions)
        self.require_parts()
        require(
            self.num_streams > 1 or self.init != "home",
            f"connection.num_streams is 1, where init 'home' has no other stream to tell apart and `{self.kind}` is a gated "
            "residual at most (H_res is the number 1): use init 'paper', more streams, or kind 'residual'.",
        )


def bias_init(preset: str, sublayer: int | Array | None, num_streams: int) -> dict[str, Array]:
    r"""Static logits b of sub-layer l at initialisation: {pre [n], post [n], res [n, n]}, float32.

    | preset | $b^{pre}$ | $b^{post}$ | $b^{res}$ | step 0 |
    | --- | --- | --- | --- | --- |
    | `paper` (mHC ICML appendix A.6) | +3 home, -3 else | 0 (post 1) | +3 diagonal, -3 off | Pre-Norm |
    | `residual` | $-\ln(n - 1)$ (pre 1/n) | 0 (post 1) | +3 diagonal, -3 off | Pre-Norm |
    | `zeros` | 0 (pre 1/2) | 0 (post 1) | 0 (H_res 1/n) | Pre-Norm |
    | `hc` | +16 home, -16 else (one-hot to 1e-7) | 0 (post 1) | +8 diagonal, -8 off (identity to 1e-6) | Pre-Norm |
    | `home` | +3 home, -3 else | +3 home, -3 else (post 1.9 and 0.1) | +3 diagonal, -3 off | not Pre-Norm |

    The home stream of sub-layer l is $(l - 1) \bmod n$ (`home_stream`).

    `paper` and `home` differ in $b^{post}$ alone.  Both read mostly the home stream.  `paper` writes all streams alike, as do all
    presets but `home`; `home` also writes mostly the home stream.  Streams enter as copies, so under equal writes they stay nearly
    equal, and an H_res with row sums of 1 then changes nothing.  Under `home` streams differ and H_res acts.

    `paper` is the default of mHC.  `home` is a preset of this project and of no paper.  `mhc_lite`, `kromhc` and `circulant` take
    $b^{pre}$ and $b^{post}$ from here and have other logits of H_res (`res_logits`).

    Args:
      preset: one of `PRESETS`.
      sublayer: the index l - 1; may be traced.
      num_streams: n.

    Examples:
      The home stream of sub-layer 2 is stream 1, counted from 0.

      >>> print(bias_init("paper", 1, 3)["pre"], bias_init("paper", 1, 3)["post"])
      [-3.  3. -3.] [0. 0. 0.]
      >>> print(bias_init("home", 1, 3)["pre"], bias_init("home", 1, 3)["post"])
      [-3.  3. -3.] [-3.  3. -3.]
    """
    n = num_streams
    home = 2 * home_stream(sublayer, n) - 1
    diagonal = 2 * jnp.eye(n) - 1
    zeros = jnp.zeros(n)
    # -ln(n - 1) has no value at n = 1, where the branch's norm removes the scale of H_pre; 3 is what `paper` has there.
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
    r"""Coefficients of one sub-layer with mHC's H_pre and H_post (mHC Eq. 7, 8) and any H_res, float32, tokens last.

    $z = \mathrm{RMSNorm}(\mathrm{vec}\, x)\, \phi$
    $H^{pre} = \sigma(\alpha^{pre} z^{pre} + b^{pre}) + \epsilon$
    $H^{post} = 2 \sigma(\alpha^{post} z^{post} + b^{post}) + \epsilon^{post}$
    $H^{res} = \mathrm{mixing}(\alpha^{res} z^{res} + b^{res})$

    The RMSNorm has no weight and is applied after the product with phi (mHC Eq. 14-16).  The paper has no epsilon in H_pre and
    H_post; those of DeepSeek-V4 and HY-V4 are in `EPS_CONVENTIONS`.

    Args:
      x: flat streams of any float dtype.
      phi: projection; columns [pre n | post n | res k_res] of the parts that exist, as in `bias`.
      alpha: one gate a part.
      bias: static logits b.
      mixing: function from the k_res logits of H_res to H_res.
      num_streams: n.
      parts: those of pre, post and res that exist; the others come back as None.
      eps_norm: epsilon of the RMSNorm.
      eps: $\epsilon$.
      eps_post: $\epsilon^{post}$.

    Examples:
      With phi = 0 the static logits alone decide: sigmoid(ln 3) = 3/4.

      >>> import jax.numpy as jnp
      >>> x, phi, bias = jnp.ones((1, 6)), jnp.zeros((6, 4)), jnp.log(jnp.array([3, 1 / 3, 1, 1]))
      >>> options = {"num_streams": 2, "parts": ("pre", "post"), "eps_norm": 1e-20, "eps": 0.0}
      >>> c = dynamic_coefficients(x, phi, jnp.array([0.01, 0.01]), bias, lambda logits: logits, **options)
      >>> print(c.pre[:, 0].round(2), c.post[:, 0], c.res)
      [0.75 0.25] [1. 1.] None
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
    """Base class of the kinds with mHC's H_pre and H_post.

    A kind says which static logits H_res has (`res_logits`) and how logits become H_res (`mixing`).
    """

    static_params = ("alpha", "bias", "head_bias", "head_alpha", "entry_scale")

    def static_logits(self) -> dict[str, Array]:
        """Initial static logits of each part."""
        cfg = self.config
        static = bias_init(cfg.init, self.sublayer, cfg.num_streams)
        return {**static, "res": self.res_logits()} if "res" in cfg.parts else static

    def res_logits(self) -> Array:
        """Initial static logits of H_res, of any shape."""
        raise NotImplementedError

    def mixing(self, logits: Float[Array, "k_res *tokens"]) -> Float[Array, "n n *tokens"]:
        """H_res, float32, from its logits."""
        raise NotImplementedError

    def setup_sublayer(self) -> None:
        """Declare phi [nC, k], alpha [parts] and bias [k]; columns are [pre n | post n | res k_res] of the learned parts."""
        cfg = self.config
        static = self.static_logits()
        k = sum(static[part].size for part in cfg.parts)
        # Zero as in HC, so that the dynamic part starts at zero and step 0 can equal Pre-Norm exactly.
        self.phi = self.param("phi", nn.initializers.zeros, (cfg.num_streams * self.width, k))
        self.alpha = self.param("alpha", nn.initializers.constant(cfg.alpha_init), (len(cfg.parts),))
        self.bias = self.param("bias", lambda _: jnp.concatenate([static[part].ravel() for part in cfg.parts]))

    def epsilons(self) -> dict[str, float]:
        """`eps_norm` and `eps` of the convention that the settings name."""
        return dict(zip(("eps_norm", "eps"), EPS_CONVENTIONS[self.config.eps_convention], strict=True))

    def coefficients(self, streams: Float[Array, "B T nC"]) -> Coefficients:
        """Coefficients of this sub-layer by `dynamic_coefficients`."""
        cfg, epsilons = self.config, self.epsilons()
        return dynamic_coefficients(
            streams,
            self.phi,
            self.alpha,
            self.bias,
            self.mixing,
            num_streams=cfg.num_streams,
            parts=cfg.parts,
            eps_post=epsilons["eps"] if cfg.eps_convention == "hy_v4" else 0.0,
            **epsilons,
        )
