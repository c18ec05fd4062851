"""Sinkhorn-Knopp as Pallas kernels for NVIDIA GPUs: a warp keeps the matrices of a block of tokens in registers.

`steps.py` has the iteration and derives its gradient.  The matrices of a block are one value [n, n, tokens] in the kernel.  If each
entry were a value [tokens] of its own, Triton would take 5 times as long to compile the gradient at n = 4, because the cost of its
search for coalesced layouts grows with the square of the size of the program.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float

from mhc_kernels import gpu
from mhc_kernels.ops.sinkhorn.steps import Scalings, Steps, pairs_left, scale


def obstacle(num_streams: int, width: int, dtypes: Sequence[Any]) -> str | None:
    """Return why the kernel cannot run a call, or None if n is small enough for a warp to hold its matrices in registers."""
    del width, dtypes
    return None if num_streams <= gpu.MAX_STREAMS else f"n must be 1 to {gpu.MAX_STREAMS}, not {num_streams}"


def tokens(n: int) -> int:
    """Return the number of tokens of a kernel's block, so that a thread holds at most 16 numbers of an array [n, n, tokens]."""
    return {1: 32, 2: 32, 3: 16, 4: 16}.get(n, 8)


def padded(a: Array, diagonal: float, off: float) -> Array:
    """Pad the matrices `a` [n, n, N] with rows and columns, until their size n is a power of two.

    New entries on the diagonal are `diagonal`, and new entries elsewhere are `off`.
    """
    n, size = a.shape[0], gpu.power_of_two(a.shape[0])
    if n == size:
        return a
    entries = jnp.where(jnp.eye(size, dtype=bool), diagonal, off)[..., None]
    return jnp.broadcast_to(entries, (size, size, a.shape[-1])).at[:n, :n].set(a)


def _first_step(logits: Array, n: int, eps: float) -> tuple[Array, Array, Array]:
    """Return the matrix K and row scaling r of `Steps.first_step`, and Q, for padded logits with n real rows and columns.

    eps is added to the entries of the real rows and columns only.  Q is the softmax over each column if eps > 0, or K if eps = 0.
    """
    centred = logits - logits.max(0)[None]
    if eps == 0:
        b = centred.max(1)
        K = jnp.exp(centred - b[:, None, :])
        return K, jnp.exp(b), K
    e = jnp.exp(centred)
    Q = e / e.sum(0)[None]
    index = [lax.broadcasted_iota(jnp.int32, Q.shape, axis) for axis in (0, 1)]
    K = jnp.where((index[0] < n) & (index[1] < n), Q + eps, Q)
    return K, 1 / (K.sum(1) + eps), Q


def _call(kernel: Any, name: str, n: int, *args: Array) -> Array:
    """Run `kernel`, a function from blocks [n, n, tokens] of arrays [n, n, N] to a block of the result, on all tokens of `args`."""
    size, N = args[0].shape[0], args[0].shape[-1]
    block = tokens(n)

    def whole(*refs):
        start = pl.program_id(0) * block
        at = slice(None), slice(None), pl.ds(start, block)
        mask = start + lax.broadcasted_iota(jnp.int32, (size, size, block), 2) < N if N % block else None
        blocks = [plgpu.load(ref.at[at], mask=mask, other=None if mask is None else 0.0) for ref in refs[:-1]]
        plgpu.store(refs[-1].at[at], kernel(*blocks), mask=mask)

    out = [(args[0].shape, jnp.float32)]
    return gpu.call(whole, name, (pl.cdiv(N, block),), out, *args, num_warps=1)[0][:n, :n]


def forward(logits: Float[Array, "n n N"], num_iters: int, eps: float) -> Float[Array, "n n N"]:
    """Return H_res = SK(logits), the result of the Sinkhorn iterations.

    Memory traffic per token: reads and writes n^2 float32 numbers.
    """
    n, steps = logits.shape[0], Steps(eps, summed=True)

    def mhc_sinkhorn_forward(logits):
        K, r, _ = _first_step(logits, n, eps)
        r, c = steps.scalings(K, r, pairs_left(num_iters, eps))
        return r[:, None, :] * K * c[None]

    return _call(mhc_sinkhorn_forward, "mhc_sinkhorn_forward", n, padded(logits, 0.0, -jnp.inf))


def backward(
    logits: Float[Array, "n n N"], g: Float[Array, "n n N"], num_iters: int, eps: float
) -> Float[Array, "n n N"]:
    """Return the gradient of the logits through the num_iters iterations, where `g` is the gradient of H_res.

    The backward pass needs the scalings r_t and c_t of every iteration t, from the last to the first.  All of them, 2 n num_iters
    numbers for each token, do not fit into registers.  So they are made in segments of `size` pairs of steps (one over columns, one
    over rows), and for every segment the iteration runs from its start again.  This adds num_iters^2 / (2 size) pairs.  A pair is
    2 n^2 multiply-adds in registers, which cost less than loads from memory.

    Memory traffic per token: reads 2 n^2, writes n^2 float32 numbers.
    """
    n, steps, pairs = logits.shape[0], Steps(eps, summed=True), pairs_left(num_iters, eps)
    size = 4 if n <= 4 else 2

    def reverse(K: Array, start: Scalings, count: int, carry: Any) -> Any:
        """Undo `count` pairs of steps, the first of which begins at the scalings `start`; `carry` holds the gradients."""
        scalings, (K_bar, bars) = [start], carry
        for _ in range(count):
            scalings.append(steps.pair(K, scalings[-1]))
        for t in range(count, 0, -1):
            bars, more = steps.undo_pair(K, bars, scalings[t], scalings[t - 1])
            K_bar = K_bar + more
        return K_bar, bars

    def mhc_sinkhorn_backward(logits, G):
        up, down = scale(jnp.abs(G).max(1).max(0))
        G = G * up[None, None]
        K, r0, Q = _first_step(logits, n, eps)
        r, c = steps.scalings(K, r0, pairs)

        def segment(k, carry):
            return reverse(K, steps.scalings(K, r0, pairs - (k + 1) * size), size, carry)

        carry = G * r[:, None, :] * c[None], (steps.rows(G * K, c), steps.columns(G * K, r))
        carry = lax.fori_loop(0, pairs // size, segment, carry)
        K_bar, (r_bar, _) = reverse(K, (r0, jnp.ones_like(r0)), pairs % size, carry)
        return steps.logits_gradient(K, Q, r0, K_bar, r_bar) * down[None, None]

    args = padded(logits, 0.0, -jnp.inf), padded(g, 0.0, 0.0)
    return _call(mhc_sinkhorn_backward, "mhc_sinkhorn_backward", n, *args)
