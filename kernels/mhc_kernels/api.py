"""The public operations.  Each checks its arguments and runs a backend; `backends.py` states what backends must provide."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mhc_kernels import backends
from mhc_kernels.arguments import (
    alike,
    check_parameters,
    check_streams,
    check_write,
    require,
)
from mhc_kernels.backend_choice import platform
from mhc_kernels.layout import PARTS, Coefficients, columns
from mhc_kernels.ops.coefficients import xla as coefficients_xla
from mhc_kernels.ops.read import xla as read_xla
from mhc_kernels.ops.sinkhorn import xla as sinkhorn_xla
from mhc_kernels.ops.write import xla as write_xla
from mhc_kernels.sharded import over_tokens

# Number of axes in front of the token axes in pre [n, *tokens], in post [n, *tokens] and in res [n, n, *tokens].
_COEFFICIENTS = Coefficients._make((1, 1, 2))


@over_tokens(2, logits=2)
def sinkhorn(
    logits: Float[Array, "n n *tokens"], num_iters: int = 20, eps: float = 0.0, *, implementation: str | None = None
) -> Float[Array, "n n *tokens"]:
    r"""Turn matrices of logits into doubly stochastic matrices by Sinkhorn-Knopp iterations (mHC, arXiv 2512.24880, Eq. 9).

        $M^{(0)} = \exp(\tilde H)$,  $M^{(t)} = T_r(T_c(M^{(t-1)}))$,  $H^{res} = M^{(t_{max})}$

    $T_c$ divides each column by its sum, then $T_r$ divides each row by its sum.  Rows come last, so row sums are 1 up to
    rounding, and column sums are 1 only approximately.

    For 65,536 random 4x4 matrices of logits with standard deviation 1 / 2 / 4 / 8, the largest |column sum - 1| of a matrix after
    20 iterations is 5e-7 / 5e-4 / 9e-3 / 3e-2 on average and 5e-3 / 4e-2 / 8e-2 / 5e-1 in the worst matrix
    (`test_marginal_error_of_twenty_steps`).

    DeepSeek-V4 adds eps = 1e-6 to every entry after the first $T_c$, and to every divisor after that.  The matrix
    `comb` in DeepSeek's code is the transpose of H_res: rows of `comb` are columns of H_res.

    The gradient is that of the t_max iterations, not of their limit.  The backward pass computes them again from the logits.

    Args:
      logits: one n x n matrix for each token; any float dtype, computed in float32.  NaN or +inf in the matrix of a token
        makes the result of this token NaN, and of no other token.  With eps = 0, a logit of -inf gives an entry of 0, but a row
        or column of -inf alone gives NaN.
      num_iters: t_max, at least 1.
      eps: 0 in the paper, 1e-6 in DeepSeek-V4.
      implementation: `xla`, `pallas_tpu`, `pallas_gpu` or `triton`; None chooses the backend that fits the device.

    Returns:
      float32 matrices of the same shape.

    Raises:
      ValueError: matrices that are not square, no tokens, num_iters < 1, or an implementation that cannot run here.

    Memory traffic per token: reads n^2 and writes n^2 float32 numbers; backward reads 2 n^2 and writes n^2.

    Examples:
      >>> import jax.numpy as jnp
      >>> import numpy as np
      >>> from mhc_kernels import sinkhorn
      >>> logits = jnp.array([[[2.0], [0.0]], [[0.0], [0.0]]])  # one 2x2 matrix
      >>> print(np.asarray(sinkhorn(logits)[..., 0]).round(3))
      [[0.731 0.269]
       [0.269 0.731]]
      >>> print(np.asarray(sinkhorn(logits, num_iters=1).sum(0).ravel()).round(3))  # column sums, 1 iteration
      [0.83 1.17]
    """
    square = logits.ndim >= 2 and logits.shape[0] == logits.shape[1]
    require("sinkhorn", square, "the two leading axes must be one square matrix", logits=logits)
    require("sinkhorn", math.prod(logits.shape) > 0, "there are no matrices", logits=logits)
    require("sinkhorn", jnp.issubdtype(logits.dtype, jnp.floating), "logits must have a float dtype", logits=logits)
    require("sinkhorn", num_iters >= 1, f"num_iters is {num_iters}, it must be at least 1", logits=logits)
    chosen = backends.pick("sinkhorn", implementation, logits.shape[0], 1, (logits.dtype,), None)
    if chosen == "xla":
        return sinkhorn_xla.sinkhorn(logits, num_iters, eps)
    return backends.sinkhorn(logits.astype(jnp.float32), num_iters, eps, chosen)


@over_tokens(1, x=0)
def projection(
    x: Float[Array, "*tokens C"], phi: Float[Array, "C k"], eps_norm: float, *, implementation: str | None = None
) -> Float[Array, "k *tokens"]:
    r"""Multiply the RMS-normalised channels v of each token by phi, and divide by the RMS last (mHC Eq. 14-16).

        $z = (v \phi) / \sqrt{\mathrm{mean}(v^2) + \epsilon}$

    For mHC, v is all n C channels of a token.  For HC, v is the C channels of one stream.

    Args:
      x: the channels v of each token, any float dtype; computed in float32.
      phi: float32 projection matrix, with one row for each channel of v.
      eps_norm: epsilon of the RMSNorm, 1e-20 in the paper and 1e-6 in DeepSeek-V4.
      implementation: as in `sinkhorn`.

    Returns:
      Float32 z, tokens last.  If the sum of squares of a token overflows float32, z of this token is NaN, and so are its results
      of `coefficients` and `write_read`.  If the squares underflow, z is v phi / sqrt(eps_norm); see `inverse_rms`.

    Raises:
      ValueError: shapes that do not match, or an implementation that cannot run here.

    Examples:
      >>> import jax.numpy as jnp
      >>> import numpy as np
      >>> from mhc_kernels import projection
      >>> print(np.asarray(projection(jnp.array([[3.0, 4.0]]), jnp.array([[1.0], [0.0]]), 1e-20)).round(3))  # 3 / sqrt(12.5)
      [[0.849]]
    """
    check_streams("coefficients", x, 1)
    require("coefficients", phi.shape[0] == x.shape[-1], "phi must have a row a channel of x", x=x, phi=phi)
    chosen = backends.pick("coefficients", implementation, 1, x.shape[-1], (x.dtype,), None)
    if chosen == "xla":
        return coefficients_xla.projection(*alike(x, phi), eps_norm)
    z = backends.projection(*alike(x, phi.astype(jnp.float32)), eps_norm, chosen)
    return z.reshape(-1, *x.shape[:-1])


def gates(
    z: Float[Array, "k *tokens"],
    alpha: Float[Array, " parts"],
    bias: Float[Array, " k"],
    *,
    num_streams: int,
    parts: tuple[str, ...] = PARTS,
    eps: float = 0.0,
    mixing: Callable[[Float[Array, "n n *tokens"]], Float[Array, "n n *tokens"]] | None = None,
) -> Coefficients:
    r"""Make the coefficients H_pre, H_post and H_res from the projected streams z (mHC Eq. 7 and 8).

        $H^{pre} = \sigma(\alpha_{pre} z_{pre} + b_{pre}) + \epsilon$,  $H^{post} = 2 \sigma(\alpha_{post} z_{post} + b_{post})$
        $H^{res} = \mathrm{mixing}(\alpha_{res}\, \mathrm{mat}(z_{res}) + b_{res})$

    Args:
      z: the result of `projection`, tokens last.
      alpha, bias, num_streams, parts, eps: as in `coefficients`.
      mixing: function that makes H_res from the logits of H_res; None means `sinkhorn` with 20 iterations and this eps.

    Returns:
      Float32 coefficients, tokens last; a part that is not in `parts` is None.

    Memory traffic per token, which does not depend on C: reads n^2 + 2 n float32 numbers and writes as many.

    Examples:
      >>> import jax.numpy as jnp
      >>> import numpy as np
      >>> from mhc_kernels import gates
      >>> z, alpha, bias = jnp.array([[2.0], [0.0]]), jnp.array([0.5]), jnp.array([0.0, -1.0])
      >>> print(np.asarray(gates(z, alpha, bias, num_streams=2, parts=("pre",)).pre.ravel()).round(3))  # sigmoid(1), sigmoid(-1)
      [0.731 0.269]
    """
    n = num_streams
    mixing = mixing or functools.partial(sinkhorn, eps=eps)
    logits, each = {}, (slice(None), *(None,) * (z.ndim - 1))
    for k, (part, where) in enumerate(columns(n, parts).items()):
        logits[part] = alpha[k] * z[where] + bias[where][each]
    return Coefficients(
        pre=jax.nn.sigmoid(logits["pre"]) + eps if "pre" in parts else None,
        post=2 * jax.nn.sigmoid(logits["post"]) if "post" in parts else None,
        res=mixing(logits["res"].reshape(n, n, *z.shape[1:])) if "res" in parts else None,
    )


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
    r"""Compute H_pre, H_post and H_res of one sub-layer from its incoming streams (mHC, arXiv 2512.24880, Eq. 7 and 8).

        $z = \mathrm{RMSNorm}(\mathrm{vec}(x))\, \phi$
        $H^{pre} = \sigma(\alpha_{pre} z_{pre} + b_{pre})$,  $H^{post} = 2 \sigma(\alpha_{post} z_{post} + b_{post})$
        $H^{res} = \mathrm{Sinkhorn}(\alpha_{res}\, \mathrm{mat}(z_{res}) + b_{res})$

    DeepSeek-V4 adds eps to H_pre and inside Sinkhorn, and not to H_post.

    Args:
      x: flat streams, stream-major, any float dtype; computed in float32.
      phi: projection matrix with the columns [pre n | post n | res n*n, row-major] of the parts that exist (see `columns`).
      alpha: one gate for each part, in the order of `parts`.
      bias: static logits, one for each column of phi.
      num_streams: n.
      parts: which of pre, post and res exist; a part that is left out comes back as None.
      num_iters: t_max of Sinkhorn.
      eps_norm: epsilon of the RMSNorm, 1e-20 in the paper, 1e-6 in DeepSeek-V4.
      eps: epsilon of H_pre and Sinkhorn, 0 in the paper, 1e-6 in DeepSeek-V4.
      implementation: as in `sinkhorn`; the backend of the projection and of Sinkhorn.

    Returns:
      Float32 coefficients, tokens last.

    Raises:
      ValueError: shapes that do not match, or an implementation that cannot run here.

    Memory traffic per token: reads n C numbers, writes n^2 + 2 n (mHC Table 2).

    Examples:
      >>> import jax.numpy as jnp
      >>> from mhc_kernels import coefficients
      >>> c = coefficients(jnp.ones((1, 6)), jnp.zeros((6, 8)), jnp.ones(3), jnp.zeros(8), num_streams=2)
      >>> c.pre.ravel().tolist(), c.post.ravel().tolist(), c.res[..., 0].tolist()
      ([0.5, 0.5], [1.0, 1.0], [[0.5, 0.5], [0.5, 0.5]])
    """
    check_streams("coefficients", x, num_streams)
    check_parameters("coefficients", x, phi, alpha, bias, num_streams, parts)
    z = projection(x, phi, eps_norm, implementation=implementation)
    mixing = functools.partial(sinkhorn, num_iters=num_iters, eps=eps, implementation=implementation)
    return gates(z, alpha, bias, num_streams=num_streams, parts=parts, eps=eps, mixing=mixing)


@over_tokens(0, x=0, pre=1)
def read(
    x: Float[Array, "*tokens nC"],
    pre: Float[Array, "n *tokens"] | None,
    num_streams: int,
    *,
    implementation: str | None = None,
) -> Float[Array, "*tokens C"]:
    r"""Read the input of a branch from the streams (mHC Eq. 3): $h = H^{pre} x = \sum_i H^{pre}_i x_i$.

    Args:
      x: flat streams, any float dtype.
      pre: float32 H_pre, tokens last; None (the disabled part) means 1/n for every stream.
      num_streams: n.
      implementation: as in `sinkhorn`.

    Returns:
      h in the dtype of x, accumulated in float32.

    Raises:
      ValueError: shapes that do not match, or an implementation that cannot run here.

    Memory traffic per token: reads n C + n numbers, writes C (mHC Table 2, "apply H_pre"); backward moves (2 n + 1) C.

    Examples:
      >>> import jax.numpy as jnp
      >>> from mhc_kernels import read
      >>> x = jnp.array([[1.0, 2.0, 10.0, 20.0]])  # one token, streams [1, 2] and [10, 20]
      >>> read(x, jnp.array([[1.0], [0.5]]), 2).tolist(), read(x, None, 2).tolist()
      ([[6.0, 12.0]], [[5.5, 11.0]])
    """
    check_streams("read", x, num_streams)
    good = pre is None or pre.shape == (num_streams, *x.shape[:-1])
    require("read", good, f"pre must be [{num_streams}, *tokens of x]", x=x, pre=pre)
    refuse = "there is one stream and no pre" if pre is None and num_streams == 1 else None
    chosen = backends.pick("read", implementation, num_streams, x.shape[-1] // num_streams, (x.dtype,), refuse)
    if chosen == "xla":
        return read_xla.read(x, pre, num_streams)
    if pre is None:
        pre = jnp.full((num_streams, *x.shape[:-1]), 1 / num_streams, jnp.float32)
    return backends.read(*alike(x, pre), chosen)


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
    r"""Write the output of a branch to the streams (mHC Eq. 3): $x' = H^{res} x + (H^{post})^\top y$.

        $x'_i = \sum_j H^{res}_{ij} x_j + H^{post}_i y$

    Row i of `res` has the weights of the old streams in new stream i.  The matrix `comb` in DeepSeek's code is `res` transposed.

    Args:
      x: flat streams.
      y: branch output; any float dtype.
      post: float32 H_post, tokens last; None (the disabled part) means 1 for every stream.
      res: float32 H_res, tokens last; None (the disabled part) means the identity.
      num_streams: n.
      implementation: as in `sinkhorn`.

    Returns:
      x' in the dtype of x, accumulated in float32.

    Raises:
      ValueError: shapes that do not match, or an implementation that cannot run here.

    Memory traffic per token: reads (n + 1) C + n^2 + n numbers, writes n C (mHC section 4.3, where one kernel applies H_post and
    H_res and adds them).  Backward reads (2 n + 1) C and writes (n + 1) C.

    Examples:
      >>> import jax.numpy as jnp
      >>> from mhc_kernels import write
      >>> x, y = jnp.array([[1.0, 2.0, 10.0, 20.0]]), jnp.array([[100.0, 100.0]])
      >>> swap = jnp.array([[[0.0], [1.0]], [[1.0], [0.0]]])
      >>> write(x, y, jnp.array([[1.0], [2.0]]), swap, 2).tolist()
      [[110.0, 120.0, 201.0, 202.0]]
    """
    check_streams("write", x, num_streams)
    refuse = check_write("write", x, y, post, res, num_streams)
    chosen = backends.pick("write", implementation, num_streams, y.shape[-1], (x.dtype,), refuse)
    if chosen == "xla" or post is None or res is None:
        return write_xla.write(x, y, post, res, num_streams)
    return backends.write(*alike(x, y.astype(x.dtype), post, res), chosen)


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
    r"""Cross the boundary between two sub-layers: `write` of the first, then `coefficients` and `read` of the second.

        $x' = H^{res} x + (H^{post})^\top y$,  $(H'^{pre}, H'^{post}, H'^{res}) = \mathrm{coefficients}(x')$,  $h = H'^{pre} x'$

    In a backend with kernels, one kernel does all forward work on the streams, as mHC section 4.3 asks for.  For the gradient, see
    `backends.py`.

    Args:
      x: flat streams that the first sub-layer read from.
      c: coefficients of the first sub-layer.
      y: branch output of the first sub-layer.
      phi, alpha, bias: parameters of the second sub-layer.
      num_streams, parts, num_iters, eps_norm, eps: as in `coefficients`.
      implementation: as in `sinkhorn`.

    Returns:
      New streams x', coefficients of the second sub-layer, and the input h of its branch.

    Raises:
      ValueError: shapes that do not match, or an implementation that cannot run here.

    Memory traffic per token: one pass over the streams moves (2 n + 2) C numbers, the least possible, and the n^2 + 2 n
    coefficients a few times.  The three single operations, one after another, move at least (4 n + 2) C.

    Examples:
      >>> import jax.numpy as jnp
      >>> from mhc_kernels import Coefficients, write_read
      >>> x, y = jnp.array([[1.0, 2.0, 10.0, 20.0]]), jnp.array([[100.0, 100.0]])
      >>> c = Coefficients(pre=None, post=jnp.array([[1.0], [2.0]]), res=jnp.eye(2)[..., None])
      >>> new, _, h = write_read(x, c, y, jnp.zeros((4, 8)), jnp.ones(3), jnp.zeros(8), num_streams=2)
      >>> new.tolist(), h.tolist()  # H_pre is 0.5
      ([[101.0, 102.0, 210.0, 220.0]], [[155.5, 161.0]])
    """
    check_streams("write_read", x, num_streams)
    check_parameters("write_read", x, phi, alpha, bias, num_streams, parts)
    refuse = check_write("write_read", x, y, c.post, c.res, num_streams)
    if tuple(parts) != PARTS:
        refuse = "a component is disabled"
    chosen = backends.pick("write_read", implementation, num_streams, y.shape[-1], (x.dtype,), refuse)
    mixing = functools.partial(sinkhorn, num_iters=num_iters, eps=eps, implementation=chosen)
    finish = functools.partial(
        gates, alpha=alpha, bias=bias, num_streams=num_streams, parts=parts, eps=eps, mixing=mixing
    )
    if c.post is None or c.res is None or (chosen == "xla" and (refuse or platform() == "cpu")):
        new = write_xla.write(x, y, c.post, c.res, num_streams)
        c = finish(coefficients_xla.projection(*alike(new, phi), eps_norm))
        return new, c, read_xla.read(new, c.pre, num_streams)
    arrays = x, y.astype(x.dtype), c.post, c.res, phi.astype(jnp.float32), alpha, bias
    new, z, h = backends.write_read(*alike(*arrays), eps_norm, eps, chosen)
    return new, finish(z.reshape(-1, *x.shape[:-1])), h
