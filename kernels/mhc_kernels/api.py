"""The public operations: checks, and the choice of a backend (`backends.py` has their contract and the VJPs they share)."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from mhc_kernels import backends
from mhc_kernels.arguments import (
    alike,
    check_parameters,
    check_streams,
    check_write,
    flatten,
    flatten_streams,
    require,
)
from mhc_kernels.choice import platform
from mhc_kernels.ops.coefficients import reference as coefficients_reference
from mhc_kernels.ops.coefficients.reference import PARTS, Coefficients, gates
from mhc_kernels.ops.read import reference as read_reference
from mhc_kernels.ops.sinkhorn import reference as sinkhorn_reference
from mhc_kernels.ops.write import reference as write_reference
from mhc_kernels.sharded import over_tokens

_COEFFICIENTS = Coefficients._make((1, 1, 2))  # axes in front of the tokens

# ----------------------------------------------------------------------------------------------------------- sinkhorn


@over_tokens(2, logits=2)
def sinkhorn(
    logits: Float[Array, "n n *tokens"], num_iters: int = 20, eps: float = 0.0, *, implementation: str | None = None
) -> Float[Array, "n n *tokens"]:
    r"""H_res = SK(logits): doubly stochastic in the limit, after `num_iters` = t_max column/row pairs in fact.

    Row sums are 1 to rounding (rows come last); column sums are approximate.  Measured over 65,536 random 4x4 logits of
    standard deviation 1 / 2 / 4 / 8, |column sum - 1| after 20 steps is 5e-7 / 5e-4 / 9e-3 / 3e-2 on average and 5e-3 / 4e-2 /
    8e-2 / 5e-1 at most.

    Args:
      logits: entry [i, j] of each matrix; any float dtype, computed in float32.  NaN or +inf in a token's matrix gives NaN
        there and nowhere else; -inf is an entry that stays 0, and NaN where it leaves a row or column empty.
      num_iters: t_max >= 1.
      eps: 0 for the paper; 1e-6 for DeepSeek-V4, which adds eps to the first column softmax and to every divisor.
        (V4's `comb` is H_res^T: its rows are our columns.)
      implementation: `xla`, `pallas_tpu`, `pallas_gpu`, `triton`, or None for what fits the device.

    Returns:
      float32 matrices of the same shape.

    Raises:
      ValueError: not square matrices, no tokens, num_iters < 1, or an implementation that cannot run here.

    Source: mHC (arXiv 2512.24880) Eq. 9; the gradient is that of the truncated iteration, recomputed from the logits.
    Traffic per token: n^2 float32 each way; backward 2 n^2 in, n^2 out.
    """
    square = logits.ndim >= 2 and logits.shape[0] == logits.shape[1]
    require("sinkhorn", square, "the two leading axes must be one square matrix", logits=logits)
    require("sinkhorn", math.prod(logits.shape) > 0, "there are no matrices", logits=logits)
    require("sinkhorn", jnp.issubdtype(logits.dtype, jnp.floating), "logits must have a float dtype", logits=logits)
    require("sinkhorn", num_iters >= 1, f"num_iters is {num_iters}, it must be at least 1", logits=logits)
    chosen = backends.pick("sinkhorn", implementation, logits.shape[0], 1, (logits.dtype,), None)
    if chosen == "xla":
        return sinkhorn_reference.sinkhorn(logits, num_iters, eps)
    flat = flatten(logits, 2).astype(jnp.float32)
    return backends.sinkhorn(flat, num_iters, eps, chosen).reshape(logits.shape)


@over_tokens(1, x=0)
def projection(
    x: Float[Array, "*tokens C"], phi: Float[Array, "C k"], eps_norm: float, *, implementation: str | None = None
) -> Float[Array, "k *tokens"]:
    """z = (v phi) rsqrt(mean(v^2) + eps_norm): an unweighted RMSNorm folded after the product (mHC Eq. 14-16), float32.

    For mHC the last axis is all n C channels of a token, for HC the C channels of one stream.  A token whose sum of squares
    overflows float32 gets NaN, one whose squares underflow v phi rsqrt(eps_norm); see `inverse_rms`.  `coefficients` and
    `write_read` hand the NaN on.

    Raises:
      ValueError: shapes that do not match, or an implementation that cannot run here.
    """
    check_streams("coefficients", x, 1)
    require("coefficients", phi.shape[0] == x.shape[-1], "phi must have a row a channel of x", x=x, phi=phi)
    chosen = backends.pick("coefficients", implementation, 1, x.shape[-1], (x.dtype,), None)
    if chosen == "xla":
        return coefficients_reference.projection(x, phi, eps_norm)
    z = backends.projection(*alike(flatten_streams(x), phi.astype(jnp.float32)), eps_norm, chosen)
    return z.reshape(-1, *x.shape[:-1])


@over_tokens(_COEFFICIENTS, x=0)
def coefficients(
    x: Float[Array, "*tokens nC"],
    phi: Float[Array, "nC k"],
    alpha: Float[Array, " parts"],
    bias: Float[Array, " k"],
    *,
    num_streams: int,
    parts: tuple[str, ...] = PARTS,
    num_iters: int = 20,
    eps_norm: float = 1e-20,
    eps: float = 0.0,
    implementation: str | None = None,
) -> Coefficients:
    r"""H_pre, H_post and H_res of one sub-layer from its incoming streams.

        z = RMSNorm(vec(x)) phi
        pre  = sigmoid(alpha_pre z_pre + b_pre) + eps
        post = 2 sigmoid(alpha_post z_post + b_post)
        res  = SK(alpha_res mat(z_res) + b_res)

    Args:
      x: flat streams, stream-major, any float dtype; computed in float32.
      phi: projection, columns [pre | post | res row-major] for the parts present.
      alpha: one gate a part, in the order of `parts`.
      bias: static term, laid out as the columns of phi.
      num_streams: n.
      parts: which of pre, post, res exist; the others come back as None.
      num_iters: t_max of Sinkhorn.
      eps_norm: of the RMSNorm; 1e-20 in the paper, 1e-6 in DeepSeek-V4.
      eps: 0 in the paper; 1e-6 in DeepSeek-V4, added to pre and inside Sinkhorn, not to post.
      implementation: as in `sinkhorn`; it names the backend of the projection and of Sinkhorn.

    Raises:
      ValueError: shapes that do not match, or an implementation that cannot run here.

    Traffic per token: reads n C, writes n^2 + 2 n (mHC Table 2).
    """
    check_streams("coefficients", x, num_streams)
    check_parameters("coefficients", x, phi, alpha, bias, num_streams, parts)
    z = projection(x, phi, eps_norm, implementation=implementation)
    return gates(
        z,
        alpha,
        bias,
        num_streams=num_streams,
        parts=parts,
        num_iters=num_iters,
        eps=eps,
        sinkhorn=_with(implementation),
    )


def _with(implementation: str | None) -> Any:
    return functools.partial(sinkhorn, implementation=implementation)


# --------------------------------------------------------------------------------------------------------------- read


@over_tokens(0, x=0, pre=1)
def read(
    x: Float[Array, "*tokens nC"],
    pre: Float[Array, "n *tokens"] | None,
    num_streams: int,
    *,
    implementation: str | None = None,
) -> Float[Array, "*tokens C"]:
    """What the branch reads: h = sum_i pre_i x_i, accumulated in float32, returned in the dtype of x.

    Args:
      x: flat streams, any float dtype.
      pre: float32 H_pre, tokens last; None: 1/n for every stream (the disabled component).
      num_streams: n.
      implementation: as in `sinkhorn`.

    Raises:
      ValueError: shapes that do not match, or an implementation that cannot run here.

    Traffic per token: reads n C + n, writes C (mHC Table 2, "apply H_pre"); backward (2 n + 1) C.
    """
    check_streams("read", x, num_streams)
    good = pre is None or pre.shape == (num_streams, *x.shape[:-1])
    require("read", good, f"pre must be [{num_streams}, *tokens of x]", x=x, pre=pre)
    refuse = "there is one stream and no pre" if pre is None and num_streams == 1 else None
    chosen = backends.pick("read", implementation, num_streams, x.shape[-1] // num_streams, (x.dtype,), refuse)
    if chosen == "xla":
        return read_reference.read(x, pre, num_streams)
    if pre is None:
        pre = jnp.full((num_streams, *x.shape[:-1]), 1 / num_streams, jnp.float32)
    h = backends.read(*alike(flatten_streams(x), flatten(pre, 1)), chosen)
    return h.reshape(*x.shape[:-1], -1)


# -------------------------------------------------------------------------------------------------------------- write


@over_tokens(0, x=0, y=0, post=1, res=2)
def write(
    x: Float[Array, "*tokens nC"],
    y: Float[Array, "*tokens C"],
    post: Float[Array, "n *tokens"] | None,
    res: Float[Array, "n n *tokens"] | None,
    num_streams: int,
    *,
    implementation: str | None = None,
) -> Float[Array, "*tokens nC"]:
    """New streams: x'_i = sum_j res_ij x_j + post_i y, accumulated in float32, returned in the dtype of x.

    H_res is applied untransposed: row i of `res` makes stream i (DeepSeek's `comb` is its transpose).

    Args:
      x: flat streams.
      y: branch output; any float dtype.
      post: float32 H_post, tokens last; None: 1 (the disabled component).
      res: float32 H_res, tokens last; None: the identity.
      num_streams: n.
      implementation: as in `sinkhorn`.

    Raises:
      ValueError: shapes that do not match, or an implementation that cannot run here.

    Traffic per token: reads (n + 1) C + n^2 + n, writes n C (mHC section 4.3, fused post, res and merge); backward reads
    (2 n + 1) C, writes (n + 1) C.
    """
    check_streams("write", x, num_streams)
    refuse = check_write("write", x, y, post, res, num_streams)
    chosen = backends.pick("write", implementation, num_streams, y.shape[-1], (x.dtype,), refuse)
    if chosen == "xla":
        return write_reference.write(x, y, post, res, num_streams)
    assert post is not None and res is not None  # noqa: PT018
    flat = backends.write(
        *alike(flatten_streams(x), flatten_streams(y).astype(x.dtype), flatten(post, 1), flatten(res, 2)),
        chosen,
    )
    return flat.reshape(x.shape)


# --------------------------------------------------------------------------------------------------------- write_read


@over_tokens((0, _COEFFICIENTS, 0), x=0, c=_COEFFICIENTS, y=0)
def write_read(
    x: Float[Array, "*tokens nC"],
    c: Coefficients,
    y: Float[Array, "*tokens C"],
    phi: Float[Array, "nC k"],
    alpha: Float[Array, " parts"],
    bias: Float[Array, " k"],
    *,
    num_streams: int,
    parts: tuple[str, ...] = PARTS,
    num_iters: int = 20,
    eps_norm: float = 1e-20,
    eps: float = 0.0,
    implementation: str | None = None,
) -> tuple[Float[Array, "*tokens nC"], Coefficients, Float[Array, "*tokens C"]]:
    """Write y with the coefficients of the sub-layer that made it, then coefficients and read of the next sub-layer.

    Args:
      x: streams the previous sub-layer read from.
      c: its coefficients.
      y: its branch output.
      phi: projection of the next sub-layer.
      alpha: its gates.
      bias: its static term.
      num_streams: n.
      parts, num_iters, eps_norm, eps: of `coefficients`.
      implementation: as in `sinkhorn`.

    Returns:
      (new streams, coefficients of the next sub-layer, what its branch reads).

    Raises:
      ValueError: shapes that do not match, or an implementation that cannot run here.

    Traffic per token: (2 n + 2) C in one pass is the floor, plus n^2 + 2 n float32 a few times; composed of the single
    operations XLA moves at least (4 n + 3) C.
    """
    check_streams("write_read", x, num_streams)
    check_parameters("write_read", x, phi, alpha, bias, num_streams, parts)
    refuse = check_write("write_read", x, y, c.post, c.res, num_streams)
    if tuple(parts) != PARTS:
        refuse = "a component is disabled"
    chosen = backends.pick("write_read", implementation, num_streams, y.shape[-1], (x.dtype,), refuse)
    rest = {"num_streams": num_streams, "parts": parts, "num_iters": num_iters, "eps": eps}
    if chosen == "xla" and (refuse or platform() == "cpu"):
        x = write_reference.write(x, y, c.post, c.res, num_streams)
        c = coefficients_reference.coefficients(x, phi, alpha, bias, eps_norm=eps_norm, **rest)
        return x, c, read_reference.read(x, c.pre, num_streams)
    assert c.post is not None and c.res is not None  # noqa: PT018
    arrays = (x, y.astype(x.dtype), c.post, c.res)
    if chosen == "xla":
        chosen = "flat"
    else:
        arrays = (
            flatten_streams(arrays[0]),
            flatten_streams(arrays[1]),
            flatten(c.post, 1),
            flatten(c.res, 2),
        )
    new, z, h = backends.write_read(*alike(*arrays, phi.astype(jnp.float32), alpha, bias), eps_norm, eps, chosen)
    z = z.reshape(-1, *x.shape[:-1])
    sinkhorn_backend = chosen if chosen in backends.BACKENDS["sinkhorn"] else "xla"
    c = gates(z, alpha, bias, sinkhorn=_with(sinkhorn_backend), **rest)
    return new.reshape(x.shape), c, h.reshape(*x.shape[:-1], -1)
