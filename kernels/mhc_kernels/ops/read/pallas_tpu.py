"""The read h = H_pre x and its gradient as Pallas kernels for TPUs (Mosaic), each in one pass over the streams."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array

from mhc_kernels import tpu


def obstacle(num_streams: int, width: int, dtypes: Sequence[Any]) -> str | None:
    """Return why the kernels cannot run a call; None if n is at most 8, C a multiple of 128, and x is bfloat16 or float32."""
    itemsize = max(jnp.dtype(d).itemsize for d in dtypes)
    return tpu.obstacle(num_streams, width, dtypes, 2 * (2 * num_streams + 1) * width * itemsize)


def forward(x: Array, pre: Array) -> Array:
    """Map x [N, nC], pre [n, N] -> h [N, C].  Memory traffic per token: (n + 1) C numbers."""
    n, C = pre.shape[0], x.shape[1] // pre.shape[0]
    kernel = functools.partial(_forward, n, C)
    return tpu.call(kernel, "mhc_read", numbers=[pre], streams=[x], out_streams=[C], flops=2 * n * C)[0]


def _forward(n, C, pre, x, h):
    def rows_of(rows, R):
        weights = [tpu.column(pre[rows, :], i) for i in range(n)]

        def channels(c, carry):
            total = tpu.add(w * tpu.piece(x, rows, i * C, c) for i, w in enumerate(weights))
            tpu.put(h, rows, 0, c, total)
            return carry

        tpu.for_channels(C, channels, 0)

    tpu.for_rows(x, rows_of)


def backward(x: Array, pre: Array, g: Array) -> tuple[Array, Array]:
    """Map x [N, nC], pre [n, N] and the gradient g [N, C] of h -> dx, dpre.  Memory traffic per token: (2n + 1) C numbers."""
    n, C = pre.shape[0], g.shape[1]
    dx, dpre = tpu.call(
        functools.partial(_backward, n, C),
        "mhc_read_backward",
        numbers=[pre],
        streams=[x, g],
        out_streams=[n * C],
        out_numbers=n,
        flops=3 * n * C,
    )
    return dx, dpre


def _backward(n, C, pre, x, g, dx, dpre):
    """Store dx and dpre of a block of tokens; g is the gradient of h."""

    def rows_of(rows, R):
        weights = [tpu.column(pre[rows, :], i) for i in range(n)]

        def channels(c, sums):
            gc = tpu.piece(g, rows, 0, c)
            for i, w in enumerate(weights):
                tpu.put(dx, rows, i * C, c, w * gc)
            return [s + gc * tpu.piece(x, rows, i * C, c) for i, s in enumerate(sums)]

        zeros = [jnp.zeros((R, tpu.LANES), jnp.float32)] * n
        tpu.put_sums(dpre, rows, tpu.for_channels(C, channels, zeros))

    tpu.for_rows(x, rows_of)
