"""Sinkhorn-Knopp kernels in Triton; `ops/sinkhorn/triton.py` imports this module once it has found the package `triton`.

`ops/sinkhorn/steps.py` derives the steps and their gradient.  A program of a kernel is one warp, which holds the matrices of a
block of tokens, [n, n, TOKENS], in registers; n is a power of two.  The caller pads a matrix of any other size to a block-diagonal
matrix, whose first `real` rows and columns are the original.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _columns(K, r):
    return tl.sum(K * tl.expand_dims(r, 1), 0)


@triton.jit
def _rows(K, c):
    return tl.sum(K * tl.expand_dims(c, 0), 1)


@triton.jit
def _rescale(s, product, eps: tl.constexpr):
    return 1.0 / product if eps == 0.0 else s / (s * product + eps)


@triton.jit
def _first_step(logits, real: tl.constexpr, n: tl.constexpr, eps: tl.constexpr):
    """Return the fixed matrix K of the iteration, the first row scaling r_0, and Q.

    Q is the softmax over each column of the logits if eps > 0, or K if eps = 0.
    """
    most = tl.reduce(logits, 0, _larger)
    centred = logits - tl.expand_dims(most, 0)
    if eps == 0.0:
        b = tl.reduce(centred, 1, _larger)
        K = tl.exp(centred - tl.expand_dims(b, 1))
        r = tl.exp(b)
        Q = K
    else:
        e = tl.exp(centred)
        Q = e / tl.expand_dims(tl.sum(e, 0), 0)
        i = tl.arange(0, n)
        inside = (i < real)[:, None] & (i < real)[None, :]
        K = tl.where(tl.expand_dims(inside, 2), Q + eps, Q)
        r = 1.0 / (tl.sum(K, 1) + eps)
    return K, r, Q


@triton.jit
def _larger(a, b):
    """Return the larger of two numbers, or NaN if either is NaN."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _scalings(K, r, steps, eps: tl.constexpr):
    c = tl.full(r.shape, 1.0, tl.float32)
    for _ in range(steps):
        c = _rescale(c, _columns(K, r), eps)
        r = _rescale(r, _rows(K, c), eps)
    return r, c


@triton.jit
def _pointers(N, n: tl.constexpr, TOKENS: tl.constexpr):
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    entry = tl.arange(0, n)[:, None] * n + tl.arange(0, n)[None, :]
    offsets = tl.expand_dims(entry, 2).to(tl.int64) * N + token[None, None, :]
    return offsets, (token < N)[None, None, :]


@triton.jit
def mhc_sinkhorn_forward(
    logits_ptr, out_ptr, N: tl.constexpr, n: tl.constexpr, real: tl.constexpr, TOKENS: tl.constexpr,
    pairs: tl.constexpr, eps: tl.constexpr,
):  # fmt: skip
    """Store H_res = SK(logits), the result of the Sinkhorn iterations on logits [n, n, N], in `out` [n, n, N]."""
    offsets, inside = _pointers(N, n, TOKENS)
    K, r, _ = _first_step(tl.load(logits_ptr + offsets, inside, 0.0), real, n, eps)
    r, c = _scalings(K, r, pairs, eps)
    tl.store(out_ptr + offsets, tl.expand_dims(r, 1) * K * tl.expand_dims(c, 0), inside)


@triton.jit
def mhc_sinkhorn_backward(
    logits_ptr, g_ptr, out_ptr, N: tl.constexpr, n: tl.constexpr, real: tl.constexpr, TOKENS: tl.constexpr,
    pairs: tl.constexpr, eps: tl.constexpr,
):  # fmt: skip
    """Store the gradient of the logits in `out` [n, n, N], where `g` is the gradient of H_res.

    The loop undoes the pairs of steps (one over columns, one over rows) from the last to the first.  The scalings before each pair
    are computed again from the first step.
    """
    offsets, inside = _pointers(N, n, TOKENS)
    K, r0, Q = _first_step(tl.load(logits_ptr + offsets, inside, 0.0), real, n, eps)
    G = tl.load(g_ptr + offsets, inside, 0.0)
    # A power of two keeps the gradient in range, as `scale` in ops/sinkhorn/steps.py says.
    most = tl.max(tl.max(tl.abs(G), 1), 0)
    exponent = most.to(tl.int32, bitcast=True) >> 23
    exponent = tl.minimum(tl.maximum(exponent, 27), 227)
    G *= ((254 - exponent) << 23).to(tl.float32, bitcast=True)[None, None, :]
    r, c = _scalings(K, r0, pairs, eps)
    K_bar = G * tl.expand_dims(r, 1) * tl.expand_dims(c, 0)
    r_bar = _rows(G * K, c)
    c_bar = _columns(G * K, r)
    for k in range(pairs):
        r_old, c_old = _scalings(K, r0, pairs - 1 - k, eps)
        c = _rescale(c_old, _columns(K, r_old), eps)
        r = _rescale(r_old, _rows(K, c), eps)
        u_bar = -r_bar * r * r
        c_bar += _columns(K, u_bar)
        v_bar = -c_bar * c * c
        K_bar += tl.expand_dims(u_bar, 1) * tl.expand_dims(c, 0) + tl.expand_dims(r_old, 1) * tl.expand_dims(v_bar, 0)
        ratio_r = r / r_old
        ratio_c = c / c_old
        r_bar = _rows(K, v_bar) + eps * r_bar * (ratio_r * ratio_r)
        c_bar = eps * c_bar * (ratio_c * ratio_c)
    if eps == 0.0:
        out = K_bar * K
    else:
        S = (K_bar - tl.expand_dims(r_bar * r0 * r0, 1)) * Q
        out = S - tl.expand_dims(tl.sum(S, 0), 0) * Q
    out *= (exponent << 23).to(tl.float32, bitcast=True)[None, None, :]
    tl.store(out_ptr + offsets, out, inside)
