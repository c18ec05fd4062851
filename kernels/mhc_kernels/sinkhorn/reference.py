"""Sinkhorn-Knopp in scaling-vector form, with the exact VJP of the truncated iteration.  The semantics of the op.

mHC Eq. 9 alternates M_t = T_r(T_c(M_{t-1})) from M_0 = exp(logits): columns first, rows last.  Every M_t has the form
diag(r) K diag(c) with K fixed, so the state of the iteration is 2n numbers a token instead of n^2:

    c <- c / (c (K^T r) + eps),    r <- r / (r (K c) + eps)            (eps = 0: c = 1 / K^T r, r = 1 / K c)

K is M_1, reached through two log-sum-exps: every row of it sums to 1 and no row or column underflows, whatever the logits.
The matrix axes lead and the tokens trail ([n, n, ...]), so that each operation is a full-width vector operation.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def sinkhorn(logits: Float[Array, "n n *tokens"], num_iters: int = 20, eps: float = 0.0) -> Float[Array, "n n *tokens"]:
    r"""H_res = SK(logits): doubly stochastic in the limit, after `num_iters` = t_max column/row pairs in fact.

    Row sums are 1 to rounding (rows come last); column sums are approximate.  Measured over random 4x4 logits of standard
    deviation 1 / 2 / 4 / 8, the largest |column sum - 1| after 20 steps is about 1e-3 / 1e-2 / 4e-2 / 6e-2.

    Args:
      logits: entry [i, j] of each matrix; any float dtype, computed in float32.  NaN in a token's matrix gives NaN there.
      num_iters: t_max >= 1.
      eps: 0 for the paper; 1e-6 for DeepSeek-V4, which adds eps to the first column softmax and to every divisor.
        (V4's `comb` is H_res^T: its rows are our columns.)

    Returns:
      float32 matrices of the same shape.

    Source: mHC (arXiv 2512.24880) Eq. 9; the gradient is derived here and equals autodiff of the loop to rounding.
    """
    return _forward(logits.astype(jnp.float32), num_iters, eps)


def _columns(K: Array, r: Array) -> Array:
    """K^T r, [n, ...], as n fused multiply-adds: XLA's reduction over a leading axis of 4 is 20x slower on CPUs."""
    return functools.reduce(jnp.add, (K[i] * r[i][None] for i in range(K.shape[0])))


def _rows(K: Array, c: Array) -> Array:
    """K c, [n, ...]."""
    return functools.reduce(jnp.add, (K[:, j] * c[j][None] for j in range(K.shape[1])))


def _softmax_columns(logits: Array) -> tuple[Array, Array]:
    """(softmax over i, log-sum-exp over i [n, ...])."""
    top = functools.reduce(jnp.maximum, logits)
    e = jnp.exp(logits - top[None])
    total = functools.reduce(jnp.add, e)
    return e / total[None], top + jnp.log(total)


def _first_step(logits: Array, eps: float) -> tuple[Array, Array, Array]:
    """Column-softmax Q, the fixed matrix K and the first row scaling r_1.

    eps = 0: K = M_1 with r_1 = 1, by a second log-sum-exp, since a row of Q may be all zero in float32.
    eps > 0: K = Q + eps, r_1 = 1 / (K 1 + eps).
    """
    Q, lse = _softmax_columns(logits)
    ones = jnp.ones_like(lse)
    if eps == 0:
        K = jnp.swapaxes(_softmax_columns(jnp.swapaxes(logits - lse[None], 0, 1))[0], 0, 1)
        return Q, K, ones
    K = Q + eps
    return Q, K, 1 / (_rows(K, ones) + eps)


def _rescale(s: Array, product: Array, eps: float) -> Array:
    """S / (s * product + eps), the normalisation of one marginal in scaling-vector form."""
    return 1 / product if eps == 0 else s / (s * product + eps)


def _forward(logits: Array, num_iters: int, eps: float) -> Array:
    _, K, r = _first_step(logits, eps)

    def step(_, rc):
        r, c = rc
        c = _rescale(c, _columns(K, r), eps)
        return _rescale(r, _rows(K, c), eps), c

    r, c = lax.fori_loop(1, num_iters, step, (r, jnp.ones_like(r)))
    return r[:, None] * K * c[None]


def _sinkhorn_fwd(logits, num_iters, eps):
    return sinkhorn(logits, num_iters, eps), logits


def _sinkhorn_bwd(num_iters, eps, logits, G):
    """Recompute (r_t, c_t) from the logits, then walk the iteration backwards.

    With M = diag(r) K diag(c), u = K c and r' = r / (r u + eps):  d r'/d u = -r'^2,  d r'/d r = eps r'^2 / r^2.
    Unrolled on purpose: XLA's CPU backend runs the same steps 4x slower inside a while loop that stacks r and c.
    """
    x = logits.astype(jnp.float32)
    n = x.shape[0]
    Q, K, r = lax.optimization_barrier(_first_step(x, eps))
    ones = jnp.ones_like(r)
    R, C = [r], [ones]
    for _ in range(1, num_iters):
        C.append(lax.optimization_barrier(_rescale(C[-1], _columns(K, R[-1]), eps)))
        R.append(lax.optimization_barrier(_rescale(R[-1], _rows(K, C[-1]), eps)))

    r_bar, c_bar = _rows(G * K, C[-1]), _columns(G * K, R[-1])
    K_bar = [G[i] * R[-1][i][None] * C[-1] for i in range(n)]
    for t in range(num_iters - 1, 0, -1):
        u_bar = -r_bar * R[t] * R[t]
        c_bar = c_bar + _columns(K, u_bar)
        v_bar = -c_bar * C[t] * C[t]
        u_bar, v_bar = lax.optimization_barrier((u_bar, v_bar))
        K_bar = lax.optimization_barrier(
            [K_bar[i] + (u_bar[i][None] * C[t] + R[t - 1][i][None] * v_bar) for i in range(n)]
        )
        through_r = 0.0 if eps == 0 else eps * r_bar * (R[t] / R[t - 1]) ** 2
        through_c = 0.0 if eps == 0 else eps * c_bar * (C[t] / C[t - 1]) ** 2
        r_bar = _rows(K, v_bar) + through_r
        c_bar = jnp.zeros_like(c_bar) + through_c
    K_bar = jnp.stack(K_bar)

    if eps == 0:
        S = K_bar * K  # adjoint of log K; K is a row softmax of logits - lse
        S = S - _rows(S, ones)[:, None] * K
    else:
        u_bar = -r_bar * R[0] * R[0]
        S = (K_bar + u_bar[:, None]) * Q
    S = S - _columns(S, ones)[None] * Q
    return (S.astype(logits.dtype),)


sinkhorn.defvjp(_sinkhorn_fwd, _sinkhorn_bwd)
