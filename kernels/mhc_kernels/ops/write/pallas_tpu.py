"""The write x' = H_res x + H_post^T y and its gradient as Pallas kernels for TPUs (Mosaic), each in one pass over the streams."""

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
    return tpu.obstacle(num_streams, width, dtypes, 2 * (3 * num_streams + 2) * width * itemsize)


def forward(x: Array, y: Array, post: Array, res: Array) -> Array:
    """Map x [N, nC], y [N, C], post [n, N], res [n, n, N] -> x' [N, nC].  Memory traffic per token: (2n + 1) C numbers."""
    n, C = post.shape[0], y.shape[1]
    return tpu.call(
        functools.partial(_forward, n, C),
        "mhc_write",
        numbers=[post, res.reshape(n * n, -1)],
        streams=[x, y],
        out_streams=[n * C],
        flops=2 * n * (n + 1) * C,
    )[0]


def _forward(n, C, numbers, x, y, new):
    def rows_of(rows, R):
        mix = mixer(n, C, numbers[rows, :], x, y, rows)

        def channels(c, carry):
            for i, value in enumerate(mix(c)):
                tpu.put(new, rows, i * C, c, value)
            return carry

        tpu.for_channels(C, channels, 0)

    tpu.for_rows(x, rows_of)


def coefficient_columns(n, numbers):
    """Load post and res from `numbers` [tokens, columns], which begins with n columns of post and n * n of res."""
    post = [tpu.column(numbers, i) for i in range(n)]
    return post, [[tpu.column(numbers, n + n * i + j) for j in range(n)] for i in range(n)]


def mixer(n, C, numbers, x, y, rows):
    """Return a function mix(c) that returns the n new streams at the 128 channels c and the tokens `rows`.

    `numbers` begins with columns of post and res, see `coefficient_columns`.
    """
    post, res = coefficient_columns(n, numbers)

    def mix(c):
        streams = [tpu.piece(x, rows, j * C, c) for j in range(n)]
        yc = tpu.piece(y, rows, 0, c)
        return [tpu.add([post[i] * yc, *(r * s for r, s in zip(res[i], streams, strict=True))]) for i in range(n)]

    return mix


def backward(x: Array, y: Array, post: Array, res: Array, g: Array) -> tuple[Array, Array, Array, Array]:
    """Return dx, dy, dpost and dres, where g [N, nC] is the gradient of x'.

    Memory traffic per token: reads (2n + 1) C numbers, writes (n + 1) C.
    """
    n, C = post.shape[0], y.shape[1]
    dx, dy, sums = tpu.call(
        functools.partial(_backward, n, C),
        "mhc_write_backward",
        numbers=[post, res.reshape(n * n, -1)],
        streams=[x, y, g],
        out_streams=[n * C, C],
        out_numbers=n + n * n,
        flops=4 * n * (n + 1) * C,
    )
    return dx, dy, sums[:n], sums[n:].reshape(n, n, -1)


def _backward(n, C, numbers, x, y, g, dx, dy, out):
    def rows_of(rows, R):
        def gradient(c):
            return [tpu.piece(g, rows, i * C, c) for i in range(n)]

        pull(n, C, coefficient_columns(n, numbers[rows, :]), x, y, dx, dy, out, rows, R, gradient)

    tpu.for_rows(x, rows_of)


def pull(n, C, coefficients, x, y, dx, dy, out, rows, R, gradient):
    """Store the gradients of a write for the R tokens `rows`.

    gradient(c) returns the gradients of the n new streams at the 128 channels c.  `coefficients` are (post, res).  `out` receives
    dpost and dres, with one column for each entry.
    """
    post, res = coefficients

    def channels(c, sums):
        G = gradient(c)
        yc = tpu.piece(y, rows, 0, c)
        tpu.put(dy, rows, 0, c, tpu.add(p * Gi for p, Gi in zip(post, G, strict=True)))
        dpost = [s + Gi * yc for s, Gi in zip(sums[:n], G, strict=True)]
        dres = list(sums[n:])
        for j in range(n):
            xj = tpu.piece(x, rows, j * C, c)
            tpu.put(dx, rows, j * C, c, tpu.add(res[i][j] * G[i] for i in range(n)))
            for i in range(n):
                dres[n * i + j] = dres[n * i + j] + G[i] * xj
        return [*dpost, *dres]

    zeros = [jnp.zeros((R, tpu.LANES), jnp.float32)] * (n + n * n)
    tpu.put_sums(out, rows, tpu.for_channels(C, channels, zeros))
