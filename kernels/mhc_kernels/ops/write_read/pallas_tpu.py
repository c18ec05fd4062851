"""The boundary between two sub-layers as Pallas kernels for TPUs (Mosaic), in one pass over the streams.

The kernels have the least memory traffic that is possible: (2n + 2) C numbers for each token forward, and (3n + 3) C backward.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl

from mhc_kernels import tpu
from mhc_kernels.backends import Saved
from mhc_kernels.ops.coefficients.pallas_tpu import (
    folded,
    gradient_columns,
    gradients,
    normalise,
    project,
    put_pieces,
    resident,
    rows_of_phi,
)
from mhc_kernels.ops.write.pallas_tpu import coefficient_columns, mixer, pull

KEEPS_NEW = False


def obstacle(num_streams: int, width: int, dtypes: Sequence[Any]) -> str | None:
    """Return why the kernels cannot run a call, or None if they can.

    n must be at most 8, C a multiple of 128, and streams bfloat16 or float32.  VMEM must hold 16 tokens of the backward pass.
    """
    n, itemsize = num_streams, max(jnp.dtype(d).itemsize for d in dtypes)
    per_token = (2 * (3 * n + 3) + n) * width * itemsize + 4 * n * width
    return tpu.obstacle(n, width, dtypes, per_token, resident(n * n + 2 * n, n * width, itemsize))


def forward(
    x: Array, y: Array, post: Array, res: Array, phi: Array, alpha: Array, bias: Array, eps_norm: float, eps: float
) -> tuple[Array, Array, Array, Array]:
    """Map x [N, nC], y [N, C], phi [nC, k] -> x' [N, nC], z = x' phi / RMS [k, N], inverse = 1 / RMS [N], h [N, C].

    alpha [] and bias [n] are the gate and the static logits of H_pre of the second sub-layer, whose branch input is h.

    Memory traffic per token: reads (n + 1) C numbers, writes (n + 1) C.
    """
    n, C, k = post.shape[0], y.shape[1], phi.shape[1]
    rows = tpu.up(k, 8)
    # Row 0 of `gate` is the gate alpha, and row 1 is the bias: logit i of pre is gate[0, i] z_i + gate[1, i].
    gate = tpu.pad(jnp.stack([jnp.broadcast_to(alpha, (n,)), bias]).astype(jnp.float32), 8, 0)
    new, h, out = tpu.call(
        functools.partial(_forward, n, C, rows, eps_norm, eps),
        "mhc_write_read",
        numbers=[post, res.reshape(n * n, -1)],
        streams=[x, y],
        whole=[folded(phi, x.dtype), tpu.pad(gate, tpu.LANES, 1)],
        out_streams=[n * C, C],
        out_numbers=rows + 1,
        scratch=[((n + n * n) * tpu.LANES, jnp.float32)],
        flops=2 * n * C * (n + k + 3),
        transcendentals=n + 1,
    )
    return new, out[:k], out[rows], h


def _forward(n, C, k, eps_norm, eps, numbers, x, y, phi, gate, new, h, out, wide):
    """Store x', z, 1 / RMS and h of a block of tokens.  In one loop, the vector units make x' while the matrix units project it."""
    tokens, lanes = x.shape[0], tpu.LANES
    R = min(tokens, 64 // x.dtype.itemsize)

    def spread(rows, _):
        small = numbers[rows, :]
        for q in range(n + n * n):
            wide[rows, q * lanes : (q + 1) * lanes] = tpu.column(small, q)

    def channels(c, carry):
        products, squares = carry
        mixed, sums = [], []
        for r in range(0, tokens, R):
            rows = slice(r, r + R)
            streams = [tpu.piece(x, rows, j * C, c) for j in range(n)]
            yc, total = tpu.piece(y, rows, 0, c), squares[rows]
            post, *res = [
                [wide[rows, (n * i + j) * lanes : (n * i + j + 1) * lanes] for j in range(n)] for i in range(n + 1)
            ]
            values = []
            for i in range(n):
                terms = [post[i] * yc, *(a * s for a, s in zip(res[i], streams, strict=True))]
                values.append(tpu.add(terms).astype(new.dtype))
                tpu.put(new, rows, i * C, c, values[i])
                total += values[i].astype(jnp.float32) * values[i].astype(jnp.float32)
            mixed.append(values)
            sums.append(total)
        for i, parts in enumerate(zip(*mixed, strict=True)):
            where = pl.ds(i * C + c.base, c.width)
            products += project(phi.at[:, where][:, c.at : c.at + lanes], jnp.concatenate(parts))
        return products, jnp.concatenate(sums)

    tpu.for_rows(x, spread)
    zeros = jnp.zeros((phi.shape[0], tokens), jnp.float32), jnp.zeros((tokens, lanes), jnp.float32)
    # With this `unroll` one iteration of the loop has about a thousand instruction bundles, for any n and number of tokens.
    unroll = max(1, 16 * lanes // (n * tokens))
    products, squares = tpu.for_channels(C, channels, zeros, unroll)
    normalise(products, squares, out, k, n * C, eps_norm)

    def read(rows, R):
        pre = jax.nn.sigmoid(gate[0:1, :n] * out[rows, :n] + gate[1:2, :n]) + eps
        weights = [tpu.column(pre, i) for i in range(n)]

        def channels(c, carry):
            tpu.put(h, rows, 0, c, tpu.add(w * tpu.piece(new, rows, i * C, c) for i, w in enumerate(weights)))
            return carry

        tpu.for_channels(C, channels, 0)

    tpu.for_rows(x, read)


def backward(saved: Saved, pre: Array, slope: Array, g_new: Array, g_h: Array, g_z: Array) -> tuple[Array, ...]:
    """Return dx, dy, dpost, dres, dphi and dpre by the formulas in `backends.py`, in one pass over the streams.

    The kernel makes x' again from x and y.  Neither x' nor its gradient reaches HBM.

    Memory traffic per token: reads (2n + 2) C numbers, writes (n + 1) C.
    """
    x, y, post, res, phi, _, z, inverse = saved
    n, C = post.shape[0], y.shape[1]
    channels, k = phi.shape
    rows = tpu.up(k, 8)
    small = [post, res.reshape(n * n, -1), pre, slope, inverse[None], tpu.pad(z, rows, 0), tpu.pad(g_z, rows, 0)]
    dx, dy, sums, dphi = tpu.call(
        functools.partial(_backward, n, C),
        "mhc_write_read_backward",
        numbers=small,
        streams=[x, y, g_new, g_h],
        whole=[rows_of_phi(phi, x.dtype)],
        out_streams=[channels, C],
        out_numbers=n + n * n + n,
        out_sum=(rows, channels),
        scratch=[
            (gradient_columns(rows, x.dtype) + 1, jnp.float32),
            (channels, jnp.float32),
            (channels, x.dtype),
        ],
        flops=4 * channels * (n + k + 3) + 2 * channels * (n + 2),
    )
    dpost, dres, dpre = jnp.split(sums, [n, n + n * n])
    return dx, dy, dpost, dres.reshape(n, n, -1), dphi[:k].T, dpre


def _backward(n, C, numbers, x, y, g_new, g_h, phi, dx, dy, out, dphi, parts, dv, new):
    k, first_pre = dphi.shape[0], n + n * n
    first_z = first_pre + 2 * n + 1

    def write_again(rows, R):
        mix = mixer(n, C, numbers[rows, :], x, y, rows)

        def channels(c, sums):
            g, values = tpu.piece(g_h, rows, 0, c), mix(c)
            for i, value in enumerate(values):
                tpu.put(new, rows, i * C, c, value)
            return [s + g * v.astype(new.dtype).astype(jnp.float32) for s, v in zip(sums, values, strict=True)]

        zeros = [jnp.zeros((R, tpu.LANES), jnp.float32)] * n
        tpu.put_sums(out, rows, tpu.for_channels(C, channels, zeros), first_pre)

    tpu.for_rows(x, write_again)

    # The first n columns of the gradient of z grow by what reaches z through H_pre (`backends.through_pre`).
    small, inverse = numbers[...], numbers[:, first_z - 1 : first_z]
    scaled = small[:, first_z + k : first_z + 2 * k] * inverse
    through = small[:, first_pre + n : first_pre + 2 * n] * out[:, first_pre : first_pre + n] * inverse
    scaled += jnp.concatenate([through, jnp.zeros((x.shape[0], k - n), jnp.float32)], axis=1)
    put_pieces(parts, scaled, x.dtype)
    at = gradient_columns(k, x.dtype)
    dot = jnp.sum(scaled * small[:, first_z : first_z + k], axis=1, keepdims=True)
    parts[:, at : at + 1] = dot * inverse / (n * C)

    def keep(where, value):
        dv[:, where] = value

    gradients(parts, new, phi, dphi, keep)

    def rows_of(rows, R):
        small, shrink = numbers[rows, :], tpu.column(parts[rows, :], at)
        pre = [tpu.column(small, first_pre + i) for i in range(n)]

        def gradient(c):
            g = tpu.piece(g_h, rows, 0, c)
            total = []
            for i in range(n):
                through_z = tpu.piece(dv, rows, i * C, c) - shrink * tpu.piece(new, rows, i * C, c)
                total.append(tpu.piece(g_new, rows, i * C, c) + pre[i] * g + through_z)
            return total

        pull(n, C, coefficient_columns(n, small), x, y, dx, dy, out, rows, R, gradient)

    tpu.for_rows(x, rows_of)
