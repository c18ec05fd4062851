"""Sinkhorn-Knopp for plain XLA, as updates of two scaling vectors; `steps.py` derives the updates and their gradient.

The matrix axes come first and the token axes last, so that each operation is a full-width vector operation.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from mhc_kernels import backend_choice
from mhc_kernels.ops.sinkhorn.steps import Steps, column_softmax, largest, pairs_left, scale
from mhc_kernels.xla import once


def _steps(eps: float) -> Steps:
    """Return `Steps` that sum over an axis on TPUs, where a reduction is one fusion, and that use multiply-adds elsewhere.

    On CPUs, XLA's reduction over a leading axis of 4 is 20x slower than multiply-adds.
    """
    return Steps(eps, summed=backend_choice.platform() == "tpu", keep=once)


# JAX traces a pair of steps once for all pairs of a program, in place of once for each.  XLA inlines both functions.
_pair = jax.jit(Steps.pair, static_argnums=0)
_undo_pair = jax.jit(Steps.undo_pair, static_argnums=0)


def _tiled(a: Array) -> Array:
    """Convert `a` [n, n, *tokens] to float32, and on a TPU reshape it to [n, n, N / 128, 128] if 128 divides N.

    This shape fills the 8 x 128 memory tiles of a TPU.  Token axes of sizes [2, 4096] would fill only a quarter of each tile.
    """
    tokens = math.prod(a.shape[2:])
    a = a.reshape(*a.shape[:2], -1, 128) if backend_choice.platform() == "tpu" and tokens % 128 == 0 else a
    return a.astype(jnp.float32)


def _value(logits: Array, num_iters: int, eps: float) -> Array:
    """Return H_res of logits [n, n, *tokens]; the pairs of steps run in a loop, which keeps the program small."""
    steps = _steps(eps)
    K, r = steps.first_step(_tiled(logits))
    r, c = steps.scalings(K, r, pairs_left(num_iters, eps))
    return (r[:, None] * K * c[None]).reshape(logits.shape)


sinkhorn = jax.custom_vjp(_value, nondiff_argnums=(1, 2))


def _scalings(steps: Steps, logits: Array, pairs: int) -> tuple[Array, Any, Any]:
    """Return the matrix K, and the scalings R[t] of its rows and C[t] of its columns after t pairs of steps, t = 0 to `pairs`.

    R and C are lists or arrays, and C[0] is ones.  On a TPU, the steps run in a loop, because unrolled steps would be four times as
    many fusions.  Elsewhere they are unrolled.  XLA:CPU runs a loop that stacks R and C 4x slower, and if a program has both the
    value and its gradient, XLA:CPU computes unrolled steps only once.
    """
    K, r = steps.first_step(logits)
    start = r, jnp.ones_like(r)
    if backend_choice.platform() == "tpu":

        def step(scalings: Any, _: None) -> tuple[Any, Any]:
            scalings = _pair(steps, K, scalings)
            return scalings, scalings

        _, after = lax.scan(step, start, length=pairs)
        R, C = (jnp.concatenate([first[None], rest]) for first, rest in zip(start, after, strict=True))
        return K, R, C
    scalings = [start]
    for _ in range(pairs):
        scalings.append(_pair(steps, K, scalings[-1]))
    return K, *map(list, zip(*scalings, strict=True))


def _sinkhorn_fwd(logits, num_iters, eps):
    if backend_choice.platform() == "tpu":
        return _value(logits, num_iters, eps), logits
    K, R, C = _scalings(_steps(eps), _tiled(logits), pairs_left(num_iters, eps))
    return R[-1][:, None] * K * C[-1][None], logits


def _sinkhorn_bwd(num_iters, eps, logits, G):
    x, G, steps = _tiled(logits), _tiled(G), _steps(eps)
    up, down = map(once, scale(largest(G)))
    G = G * up[None, None]
    K, R, C = _scalings(steps, x, pairs_left(num_iters, eps))
    bars = steps.rows(G * K, C[-1]), steps.columns(G * K, R[-1])
    K_bar = G * R[-1][:, None] * C[-1][None]

    def undo(state, pair):
        (bars, K_bar), (r, c, r_before, c_before) = state, pair
        bars, more = _undo_pair(steps, K, bars, (r, c), (r_before, c_before))
        return (bars, K_bar + more), None

    state, pairs = (bars, K_bar), (R[1:], C[1:], R[:-1], C[:-1])
    if backend_choice.platform() == "tpu":
        state, _ = lax.scan(undo, state, pairs, reverse=True)
    else:
        for pair in reversed(list(zip(*pairs, strict=True))):
            state, _ = undo(state, pair)
    (r_bar, _), K_bar = state
    Q = K if eps == 0 else column_softmax(x)
    gradient = steps.logits_gradient(K, Q, R[0], K_bar, r_bar) * down[None, None]
    return (gradient.astype(logits.dtype).reshape(logits.shape),)


sinkhorn.defvjp(_sinkhorn_fwd, _sinkhorn_bwd)
