"""The RMS and the projection z of each token as Pallas kernels for TPUs (Mosaic), in one pass over the streams.

The MXU multiplies bfloat16 numbers exactly.  For bfloat16 streams, the float32 phi is cut into three bfloat16 pieces.  Float32
streams are multiplied with precision HIGHEST.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl

from mhc_kernels import tpu
from mhc_kernels.ops.rms_norm import inverse_rms

_PIECES = {2: ((2, 0, 1, 0), (0, 0, 1)), 4: ((2, 0, 1, 0, 1, 0), (0, 0, 0, 1, 1, 2))}
"""Pieces of g / RMS and of phi whose products make dx, for x with entries of 2 bytes (bfloat16) and of 4 bytes (float32).

g is the gradient of z.  `tpu.pieces` cuts a float32 array into the pieces 0, 1 and 2; piece 0 has the leading bits.  The first
tuple lists pieces of g / RMS, and the second tuple lists m pieces of phi.  The last m pieces of the first tuple are multiplied, one
by one, with the m pieces of phi, and the products are added.  The sum is exact to 2^-16 for bfloat16, where dx is rounded to 2^-9,
and to 2^-24 for float32.  The first three pieces of the first tuple make up the whole gradient, which dphi needs.
"""


def obstacle(num_streams: int, width: int, dtypes: Sequence[Any]) -> str | None:
    """Return why the kernels cannot run a call, or None if they can.

    n C must be a multiple of 128, streams must be bfloat16 or float32, and VMEM must hold phi, its gradient and 16 tokens.
    """
    itemsize, channels = max(jnp.dtype(d).itemsize for d in dtypes), num_streams * width
    return tpu.obstacle(1, channels, dtypes, 4 * channels * itemsize, resident(24, channels, itemsize))


def resident(k: int, channels: int, itemsize: int) -> int:
    """Return the bytes of VMEM that the pieces of phi [channels, k] and the gradient of phi take in the backward kernel."""
    return (2 * len(_PIECES[itemsize][1]) + 4) * tpu.up(k, 8) * channels


def folded(phi: Array, dtype: Any) -> Array:
    """Return phi [nC, k] transposed for the forward kernel, with k padded to a multiple of 8.

    `dtype` is that of the streams.  For bfloat16, the result is [3 k, nC], the three pieces of phi below each other in bfloat16.
    For float32, it is [k, nC].
    """
    turned = tpu.pad(phi.T, tpu.up(phi.shape[1], 8), 0)
    return turned if dtype == jnp.float32 else tpu.pieces(turned, (0, 1, 2), 0).astype(jnp.bfloat16)


def forward(x: Array, phi: Array, eps_norm: float) -> tuple[Array, Array]:
    """Map x [N, nC], phi [nC, k] -> z = x phi / RMS [k, N], inverse = 1 / RMS [N].  Memory traffic per token: nC numbers."""
    (channels, k), rows = phi.shape, tpu.up(phi.shape[1], 8)
    out = tpu.call(
        functools.partial(_forward, rows, eps_norm),
        "mhc_coefficients",
        numbers=[],
        streams=[x],
        whole=[folded(phi, x.dtype)],
        out_numbers=rows + 1,
        flops=2 * channels * (k + 1),
        transcendentals=1,
    )[0]
    return out[:k], out[rows]


def _forward(k, eps_norm, x, phi, out):
    """Store z and 1 / RMS of a block of tokens in `out`; the vector units sum squares while the matrix unit multiplies."""
    width = chunk(x.shape[1], 1024)

    def step(s, carry):
        products, squares = carry
        where = pl.ds(pl.multiple_of(s * width, width), width)
        v = x[:, where]
        products += project(phi[:, where], v)
        for c in range(0, width, tpu.LANES):
            lanes = v[:, c : c + tpu.LANES].astype(jnp.float32)
            squares += lanes * lanes
        return products, squares

    zeros = jnp.zeros((phi.shape[0], x.shape[0]), jnp.float32), jnp.zeros((x.shape[0], tpu.LANES), jnp.float32)
    products, squares = lax.fori_loop(0, x.shape[1] // width, step, zeros)
    normalise(products, squares, out, k, x.shape[1], eps_norm)


def project(phi, v):
    """Return phi v^T [rows of phi, tokens], with tokens on the lanes, for phi [rows, channels] and v [tokens, channels].

    In this order the matrix unit holds tiles of v while rows of phi stream past; there are fewer rows than tokens.
    """
    return tpu.dot(phi, v, 1, 1)


def normalise(products, squares, out, k, channels, eps_norm):
    """Store z in the first k columns of `out` [tokens, columns], and 1 / RMS in the next column.

    `products` is the sum of `project` over all channels.  `squares` [tokens, 128] has sums of squares, still one for each lane.
    """
    inverse = inverse_rms(jnp.sum(squares, axis=1, keepdims=True) / channels, eps_norm)
    out[:, k : k + 1] = inverse
    out[:, :k] = tpu.add(products[p : p + k] for p in range(0, products.shape[0], k)).T * inverse


def chunk(channels: int, most: int) -> int:
    """Return the largest multiple of 128 that divides `channels` and is at most `most`."""
    return max(w for w in range(tpu.LANES, max(most, tpu.LANES) + 1, tpu.LANES) if channels % w == 0)


def backward(x: Array, phi: Array, z: Array, inverse: Array, g: Array) -> tuple[Array, Array]:
    """Map x [N, nC], phi [nC, k], z and its gradient g [k, N], inverse [N] -> dx, dphi.  Memory traffic per token: 2 nC numbers."""
    channels, k = phi.shape
    parts, shrink, rows_of_phi = gradient_operands(x, phi, z, inverse, g)
    dx, dphi = tpu.call(
        _backward,
        "mhc_coefficients_backward",
        numbers=[parts, shrink],
        streams=[x],
        whole=[rows_of_phi],
        out_streams=[channels],
        out_sum=(tpu.up(k, 8), channels),
        flops=2 * channels * (2 * k + 1),
    )
    return dx, dphi[:k].T


def _backward(numbers, x, phi, dx, dphi):
    at = gradient_columns(dphi.shape[0], x.dtype)
    shrink = numbers[:, at : at + 1]

    def finish(where, dv):
        dx[:, where] = (dv - shrink * x[:, where].astype(jnp.float32)).astype(dx.dtype)

    gradients(numbers, x, phi, dphi, finish)


def gradient_columns(k: int, dtype: Any) -> int:
    """Return how many columns the pieces of g / RMS (`gradient_operands`) take in a kernel, for k padded to a multiple of 8."""
    return k * len(_PIECES[jnp.dtype(dtype).itemsize][0])


def gradient_operands(x, phi, z, inverse, g) -> tuple[Array, Array, Array]:
    """Return the small operands of the backward kernel, where g [k, N] is the gradient of z.

    They are pieces of g / RMS below each other [rows, N], the factor (g . z) / (RMS^2 nC) of x in dx [1, N], and pieces of phi^T
    [rows, nC].  `_PIECES` explains the pieces.
    """
    scaled = g * inverse[None]
    shrink = (jnp.sum(scaled * z, 0) * inverse / x.shape[1])[None]
    padded = tpu.pad(scaled, tpu.up(g.shape[0], 8), 0)
    return tpu.pieces(padded, _PIECES[x.dtype.itemsize][0], 0), shrink, rows_of_phi(phi, x.dtype)


def rows_of_phi(phi: Array, dtype: Any) -> Array:
    """Return the pieces of phi^T [rows, nC] that `gradients` needs, in bfloat16, where `dtype` is that of the streams."""
    turned = tpu.pad(phi.T, tpu.up(phi.shape[1], 8), 0)
    return tpu.pieces(turned, _PIECES[jnp.dtype(dtype).itemsize][1], 0).astype(jnp.bfloat16)


def put_pieces(out: Any, scaled: Array, dtype: Any) -> None:
    """Store the pieces of g / RMS, for `scaled` = g / RMS [tokens, k], in the columns of `out` where `gradients` reads them.

    k is a multiple of 8, and `dtype` is that of the streams.
    """
    k, parts, rest = scaled.shape[1], [], scaled
    for _ in range(3):
        parts.append(tpu.rounded(rest))
        rest = rest - parts[-1]
    for column, piece in enumerate(_PIECES[jnp.dtype(dtype).itemsize][0]):
        out[:, column * k : (column + 1) * k] = parts[piece]


def gradients(numbers, x, phi, dphi, finish):
    """Add what a block of tokens contributes to dphi [k, nC], and call finish(channels, dv) for each slice of channels.

    dv = g phi^T / RMS [tokens, channels] in float32, where g is the gradient of z.  The first columns of
    `numbers` [tokens, columns] are the pieces of g / RMS, and `phi` holds the pieces of phi^T (`gradient_operands`).
    """
    k, last = dphi.shape[0], gradient_columns(dphi.shape[0], x.dtype)
    left = numbers[:, last - phi.shape[0] : last].astype(jnp.bfloat16)
    whole = numbers[:, : 3 * k].T
    exact = x.dtype == jnp.bfloat16
    whole = whole.astype(jnp.bfloat16) if exact else whole[:k] + whole[k : 2 * k] + whole[2 * k :]
    width = chunk(x.shape[1], 2**16 // x.shape[0])

    def step(s, carry):
        where = pl.ds(pl.multiple_of(s * width, width), width)
        parts = tpu.dot(whole, x[:, where], 1, 0)
        dphi[:, where] += tpu.add(parts[p : p + k] for p in range(0, parts.shape[0], k))
        finish(where, tpu.dot(left, phi[:, where], 1, 0))
        return carry

    lax.fori_loop(0, x.shape[1] // width, step, 0)
