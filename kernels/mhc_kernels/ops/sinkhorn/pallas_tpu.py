"""Sinkhorn-Knopp as Pallas kernels for TPUs (Mosaic), which process blocks of at least 1,024 tokens.

The tokens of a block are arranged in rows of 128.  For each i and j, the entries [i, j] of the matrices of all these tokens then
fill one or a few registers [8, 128], and a sum over i or j adds whole registers.  `steps.py` has the iteration and derives its
gradient.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from mhc_kernels import backend_choice, tpu
from mhc_kernels.ops.sinkhorn.steps import Steps, column_softmax, largest, pairs_left, scale


def _steps(eps: float) -> Steps:
    """Return the Sinkhorn iteration, with sums over an axis on a TPU, and multiply-adds where a CPU interprets the kernel."""
    return Steps(eps, summed=backend_choice.platform() == "tpu")


def obstacle(num_streams: int, width: int, dtypes: Sequence[Any]) -> str | None:
    """Return why the kernels cannot run a call, or None if n is at most 8; `width` and `dtypes` do not matter."""
    return tpu.obstacle(num_streams, tpu.LANES, (jnp.float32,))


def forward(logits: Array, num_iters: int, eps: float) -> Array:
    """Map logits [n, n, N] -> res [n, n, N] in float32.  Memory traffic per token: reads n^2 numbers, writes n^2."""
    n = logits.shape[0]
    kernel = functools.partial(_forward_kernel, num_iters, eps)
    return _call(kernel, "mhc_sinkhorn", [logits], flops=2 * n * n * (2 * num_iters + 1), roots=n * (2 * num_iters + n))


def _forward_kernel(num_iters, eps, logits, res):
    steps = _steps(eps)
    K, r = steps.first_step(logits[...])
    r, c = steps.scalings(K, r, pairs_left(num_iters, eps))
    res[...] = r[:, None] * K * c[None]


def backward(logits: Array, g: Array, num_iters: int, eps: float) -> Array:
    """Map logits and the gradient g of res, [n, n, N] each, -> the gradient of the logits.

    The scalings of all iterations are computed again and stay in VMEM.

    Memory traffic per token: reads 2 n^2 numbers, writes n^2.
    """
    n, history = logits.shape[0], pairs_left(num_iters, eps) + 1
    kernel = functools.partial(_backward_kernel, num_iters, eps)
    flops, roots = 2 * n * n * (6 * num_iters + 6), n * (2 * num_iters + n)
    return _call(kernel, "mhc_sinkhorn_backward", [logits, g], flops, roots, history)


def _backward_kernel(num_iters, eps, logits, g, dlogits, R, C):
    """Store the gradient of the logits of a block in `dlogits`, which first holds the gradient of the matrix K of `steps.py`.

    R and C are scratch arrays for the scalings of rows and columns after each iteration (a pair of steps).
    """
    x, G, steps = logits[...], g[...], _steps(eps)
    up, down = scale(largest(G))
    G = G * up[None, None]
    K, r = steps.first_step(x)
    R[0], C[0] = r, jnp.ones_like(r)
    pairs = pairs_left(num_iters, eps)

    def forth(t, scalings):
        R[t + 1], C[t + 1] = scalings = steps.pair(K, scalings)
        return scalings

    r, c = lax.fori_loop(0, pairs, forth, (r, jnp.ones_like(r)))
    dlogits[...] = G * r[:, None] * c[None]

    def back(step, bars):
        t = pairs - step
        bars, more = steps.undo_pair(K, bars, (R[t], C[t]), (R[t - 1], C[t - 1]))
        dlogits[...] += more
        return bars

    r_bar, _ = lax.fori_loop(0, pairs, back, (steps.rows(G * K, c), steps.columns(G * K, r)))
    Q = K if eps == 0 else column_softmax(x)
    dlogits[...] = steps.logits_gradient(K, Q, R[0], dlogits[...], r_bar) * down[None, None]


def _call(kernel, name, arrays, flops, roots, history=0):
    """Run a kernel over blocks [n, n, rows, 128] of the arrays [n, n, N], and return its result [n, n, N].

    The kernel gets two scratch arrays in VMEM, for `history` scalings of rows and as many of columns; 0 means no scratch arrays.
    `flops` and `roots` are numbers of operations for each token.
    """
    n, N = arrays[0].shape[0], arrays[0].shape[2]
    padded = tpu.up(N, 8 * tpu.LANES)
    # The rows of tokens are independent, so several rows hide the latency of divisions, as long as the matrices fit into registers.
    most = 32 if n <= 4 else 8
    rows = max(r for r in (8, 16, 32) if r <= most and padded % (r * tpu.LANES) == 0)
    tiled = [tpu.pad(a, padded, 2).reshape(n, n, -1, tpu.LANES) for a in arrays]
    spec = pl.BlockSpec((n, n, rows, tpu.LANES), lambda t: (0, 0, t, 0))
    scaling = pltpu.VMEM((history, n, rows, tpu.LANES), jnp.float32)
    mat = tpu.manual_axes(*arrays)
    out = pl.pallas_call(
        kernel,
        grid=(padded // tpu.LANES // rows,),
        in_specs=[spec] * len(arrays),
        out_specs=spec,
        out_shape=jax.ShapeDtypeStruct(tiled[0].shape, jnp.float32, manual_axis_type=mat),
        scratch_shapes=[scaling, scaling] if history else [],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",), vmem_limit_bytes=min(tpu.vmem_budget(), 32 * 2**20)
        ),
        cost_estimate=pl.CostEstimate(
            flops=flops * padded,
            bytes_accessed=(len(arrays) + 1) * tiled[0].size * 4,
            transcendentals=roots * padded,
        ),
        interpret=backend_choice.interpret(),
        name=name,
    )(*tiled)
    return out.reshape(n, n, -1)[..., :N]
