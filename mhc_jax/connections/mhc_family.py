r"""How mHC makes H_pre and H_post: presets of the initial static logits, conventions of epsilons, and a base class of connections.

The kinds `mhc`, `identity`, `diagonal`, `identity_mix`, `mhc_lite`, `kromhc`, `circulant` and `go_mhc` use this file and differ in
H_res.  `single_pass` uses it too, and differs from `mhc` in the read.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float
from mhc_kernels import Coefficients, gates, projection

from mhc_jax.connections.base import ALPHA_INIT, Connection, ConnectionConfig, home_stream
from mhc_jax.errors import one_of, require

PRESETS = ("paper", "residual", "zeros", "hc", "home")
MOST_ITERATIONS = 1000
"""Largest number of Sinkhorn iterations.  More change nothing in float32, and a program would become very long."""
EPS_CONVENTIONS = {"paper": (1e-20, 0.0), "v4": (1e-6, 1e-6), "hy_v4": (1e-6, 1e-6)}
"""Conventions of epsilons, by name: `eps_norm`, then `eps`.  `paper` follows mHC Table 5, and `v4` follows DeepSeek-V4's code.

`eps_norm` is added to the mean of squares in the RMSNorm of the streams.  `eps` is added to H_pre after the sigmoid, to each entry
after the first column step of Sinkhorn and to each later divisor of Sinkhorn, and to the weights of the exit `head`.  H_post gets
no epsilon, except under `hy_v4` (Hunyuan HY-V4), which adds `eps` to it too.
"""


@dataclass(frozen=True)
class DynamicConfig(ConnectionConfig):
    """Settings of all kinds of connection that make H_pre and H_post as mHC does."""

    eps_conventions: ClassVar[tuple[str, ...]] = ("paper", "v4")
    """Allowed values of the setting `eps_convention`."""

    exit: str = "mean"
    init: str = "paper"
    """Preset of the initial static logits, `paper`, `residual`, `zeros`, `hc` or `home` (`bias_init` has their values)."""
    eps_convention: str = "paper"
    """Convention of epsilons, `paper` or `v4` (`EPS_CONVENTIONS`).  Only the kind `identity` takes `hy_v4`."""
    alpha_init: float = ALPHA_INIT
    """Initial value of the gates alpha, which scale the dynamic part of the logits."""
    dynamic: bool = True
    """Whether the logits depend on the token, as in mHC.  False: they are the static logits b alone, as in static HC."""

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
    r"""Return the static logits b of sub-layer l at initialisation: {pre [n], post [n], res [n, n]}, float32.

    | preset | $b^{pre}$ | $b^{post}$ | $b^{res}$ | the decoder then equals |
    | --- | --- | --- | --- | --- |
    | `paper` (mHC ICML appendix A.6) | +3 home, -3 others | 0 (post 1) | +3 on the diagonal, -3 elsewhere | Pre-Norm |
    | `residual` | $-\ln(n - 1)$ (pre 1/n) | 0 (post 1) | +3 on the diagonal, -3 elsewhere | Pre-Norm |
    | `zeros` | 0 (pre 1/2) | 0 (post 1) | 0 (all entries 1/n) | Pre-Norm |
    | `hc` | +16 home, -16 others (one-hot to 1e-7) | 0 (post 1) | +8 and -8 (identity to 1e-6) | Pre-Norm |
    | `home` | +3 home, -3 others | +3 home, -3 others (post 1.9 and 0.1) | +3 on the diagonal, -3 elsewhere | not Pre-Norm |

    "Home" is the logit of the home stream $(l - 1) \bmod n$ (`home_stream`), and "others" are those of all other streams.

    `paper` and `home` differ in $b^{post}$ alone.  Under both, a sub-layer reads mostly its home stream.  Under `home` it also
    writes mostly to its home stream, and under every other preset it writes to all streams alike.  Streams that start as copies
    (entry `copy`) stay nearly equal under equal writes, so that an H_res with row sums of 1 changes nothing.  Under `home` the
    streams differ, so that H_res has an effect.

    `paper` is the default of mHC.  `home` is a preset of this project, and no paper has it.  Kinds that make H_res in
    another way use $b^{pre}$ and $b^{post}$ of this function, and other logits of H_res (`res_logits`).

    Args:
      preset: one of `PRESETS`.
      sublayer: index l - 1 of the sub-layer, which may be traced.
      num_streams: number n of streams.

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
    # -ln(n - 1) is undefined for n = 1.  3, the value of `paper`, serves as well: the branch's norm removes the scale of H_pre.
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
    r"""Make the coefficients of one sub-layer, float32: H_pre and H_post as in mHC (Eq. 7, 8), and H_res by the function `mixing`.

    $z = \mathrm{RMSNorm}(\mathrm{vec}\, x)\, \phi$
    $H^{pre} = \sigma(\alpha^{pre} z^{pre} + b^{pre}) + \epsilon$
    $H^{post} = 2 \sigma(\alpha^{post} z^{post} + b^{post}) + \epsilon^{post}$
    $H^{res} = \mathrm{mixing}(\alpha^{res} z^{res} + b^{res})$

    The RMSNorm has no weight and divides after the product with phi (mHC Eq. 14-16).  In the paper $\epsilon$ and
    $\epsilon^{post}$ are 0.  `EPS_CONVENTIONS` has their values in DeepSeek-V4 and HY-V4.  Axes of tokens come last.

    Args:
      x: flat streams of any float dtype.
      phi: projection, with n columns for pre, n for post and k_res for res, in this order.  Only names in `parts` have columns.
      alpha: one gate for each name in `parts`.
      bias: static logits b, in the order of the columns of phi.
      mixing: function from the k_res logits of H_res to H_res.
      num_streams: number n of streams.
      parts: names of the coefficients to make, among pre, post and res.  All others are None in the result.
      eps_norm: epsilon of the RMSNorm.
      eps: the $\epsilon$ added to H_pre.
      eps_post: the $\epsilon^{post}$ added to H_post.

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
    """The base class of connections that make H_pre and H_post as mHC does.

    A subclass defines the initial static logits of H_res (`res_logits`), and how logits become H_res (`mixing`).
    """

    static_params = ("alpha", "bias", "head_bias", "head_alpha", "entry_scale")

    def static_logits(self) -> dict[str, Array]:
        """Return the initial static logits of pre, post and res by name.  Those that are not learned have no effect."""
        cfg = self.config
        static = bias_init(cfg.init, self.sublayer, cfg.num_streams)
        return {**static, "res": self.res_logits()} if "res" in cfg.parts else static

    def res_logits(self) -> Array:
        """Return the initial static logits of H_res.  Their shape is free, because `setup_sublayer` flattens them."""
        raise NotImplementedError

    def mixing(self, logits: Float[Array, "k_res *tokens"]) -> Float[Array, "n n *tokens"]:
        """Make H_res, float32, from its logits."""
        raise NotImplementedError

    def setup_sublayer(self) -> None:
        """Declare the projection phi [nC, k], one gate in alpha for each learned coefficient (pre, post, res), and bias [k].

        The k logits are n of pre, n of post and k_res of res, in this order, without those of coefficients that are not learned.
        Under `dynamic=False` there is bias alone, and nothing if no coefficient is learned.
        """
        cfg = self.config
        if not cfg.parts:
            return
        static = self.static_logits()
        k = sum(static[part].size for part in cfg.parts)
        if cfg.dynamic:
            # phi starts at zero, as HC's W does.  The dynamic part is then zero, and the first decoder can exactly equal Pre-Norm.
            self.phi = self.param("phi", nn.initializers.zeros, (cfg.num_streams * self.width, k))
            self.alpha = self.param("alpha", nn.initializers.constant(cfg.alpha_init), (len(cfg.parts),))
        self.bias = self.param("bias", lambda _: jnp.concatenate([static[part].ravel() for part in cfg.parts]))

    def epsilons(self) -> dict[str, float]:
        """Return `eps_norm` and `eps`, the epsilons in `EPS_CONVENTIONS` that the setting `eps_convention` names."""
        return dict(zip(("eps_norm", "eps"), EPS_CONVENTIONS[self.config.eps_convention], strict=True))

    def coefficients(self, streams: Float[Array, "B T nC"]) -> Coefficients:
        """Make the coefficients of this sub-layer by `dynamic_coefficients`.

        Under `dynamic=False` they are made for one token, whose streams do not count, and repeated for every token.
        """
        cfg, epsilons = self.config, self.epsilons()
        if not cfg.parts:
            return Coefficients(None, None, None)
        x, phi, alpha = (streams, self.phi, self.alpha) if cfg.dynamic else self.without_dynamic_part()
        c = dynamic_coefficients(
            x,
            phi,
            alpha,
            self.bias,
            self.mixing,
            num_streams=cfg.num_streams,
            parts=cfg.parts,
            eps_post=epsilons["eps"] if cfg.eps_convention == "hy_v4" else 0.0,
            **epsilons,
        )
        if cfg.dynamic:
            return c
        tokens = streams.shape[:-1]
        return Coefficients(*(a if a is None else jnp.broadcast_to(a, (*a.shape[: -len(tokens)], *tokens)) for a in c))

    def without_dynamic_part(self) -> tuple[Array, Array, Array]:
        """Return the streams of one token, a projection phi and gates alpha with which the static logits alone count."""
        n = self.config.num_streams
        return jnp.ones((1, 1, n)), jnp.zeros((n, len(self.bias))), jnp.zeros(len(self.config.parts))

    def mixing_logits(self, streams: Any) -> Float[Array, "k_res B T"] | None:
        r"""Return the logits of H_res, $\alpha^{res} z^{res} + b^{res}$, float32, as `dynamic_coefficients` makes them.

        None means that H_res is not learned.
        """
        cfg = self.config
        if "res" not in cfg.parts:
            return None
        first = cfg.num_streams * (len(cfg.parts) - 1)
        if not cfg.dynamic:
            logits = self.bias[first:, None, None]
            return jnp.broadcast_to(logits, (len(logits), *self.flat(streams).shape[:-1]))
        z = projection(self.flat(streams), self.phi[:, first:], self.epsilons()["eps_norm"])
        return self.alpha[-1] * z + self.bias[first:, None, None]
