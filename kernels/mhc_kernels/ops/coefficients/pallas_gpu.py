"""The RMS and the projection z of each token as Pallas kernels for NVIDIA GPUs; XLA makes the coefficients from z.

Tensor cores multiply bfloat16 numbers exactly.  A float32 array (phi, the gradient of z, or float32 streams) is cut into three
bfloat16 pieces whose sum is exact (`gpu.pieces`).  The format tf32 would keep only 10 bits.
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
from mhc_kernels.gpu import Tile
from mhc_kernels.ops.rms_norm import inverse_rms

obstacle = gpu.obstacle

CHANNELS = 64
"""Largest number of channels of a block."""
PROGRAMS = 1024
"""Approximate number of programs of the backward kernel: several for each of the 132 multiprocessors of an H100."""


def pad_columns(a: Float[Array, "rows k"]) -> Float[Array, "rows K"]:
    """Pad the k columns of `a` with zeros to K columns, a power of two of at least 16, which tensor cores need."""
    return jnp.pad(a, ((0, 0), (0, max(gpu.power_of_two(a.shape[1]), 16) - a.shape[1])))


def _tokens(K: int, dtype: Any) -> int:
    """Return the number of tokens of a block of x: fewer in float32, whose three pieces would spill."""
    return 64 if dtype == jnp.bfloat16 else 32 if K <= 64 else 16


def _warps(K: int) -> int:
    """Return the number of warps of a program for K columns of phi; with n = 8, K is 128, and four warps would spill."""
    return 4 if K <= 64 else 8


def load_rows(refs: Sequence[Any], start: Any, rows: int, end: Any, ragged: bool) -> list[Array]:
    """Load rows `start` to `start + rows` of each array in `refs`, with all its columns.

    If `ragged`, these rows may reach beyond row `end`, and rows from `end` on are loaded as zeros.
    """
    K = refs[0].shape[1]
    block = Tile(start, rows, end, 0, K, K, ragged)
    return [block.load(ref) for ref in refs]


def store_rows(tile: Tile, ref: Any, z: Array) -> None:
    """Store the transpose of z [tokens, K] in the array `ref` [K, N], at the tokens of `tile`."""
    inside = tile.inside()
    mask = None if inside is None else jnp.broadcast_to(inside[None], z.T.shape)
    plgpu.store(ref.at[:, pl.ds(tile.token, tile.tokens)], z.T, mask=mask)


def forward(
    x: Float[Array, "N W"], phi: Float[Array, "W k"], eps_norm: float
) -> tuple[Float[Array, "k N"], Float[Array, " N"]]:
    """Return z = (v phi) inverse and inverse = `inverse_rms` of mean(v^2), where v is the row of x of one token.

    Each program of the kernel handles all channels of a block of tokens.

    Memory traffic per token: reads W numbers, writes k + 1 float32 numbers.  Each block reads phi, with k padded to K, once from
    the L2 cache: 6 W K bytes, shared by its tokens.
    """
    N, W = x.shape
    k = phi.shape[1]
    wide = gpu.channels(W, CHANNELS)
    parts = gpu.pieces(pad_columns(phi))
    K = parts[0].shape[1]
    tokens = _tokens(K, x.dtype)

    def kernel(x_ref, *refs):
        *phi_refs, z_ref, inverse_ref = refs
        tile = Tile(pl.program_id(0) * tokens, tokens, N, 0, wide, W)

        def chunk(c, sums):
            z, squares = sums
            v = tile.at(c * wide).load(x_ref)
            v32 = v.astype(jnp.float32)
            p = load_rows(phi_refs, c * wide, wide, W, bool(W % wide))
            return z + gpu.split_dot(gpu.pieces(v), p, (1, 0), terms=3), squares + (v32 * v32).sum(1)

        zeros = jnp.zeros((tokens, K), jnp.float32), jnp.zeros((tokens,), jnp.float32)
        z, squares = lax.fori_loop(0, pl.cdiv(W, wide), chunk, zeros)
        inverse = inverse_rms(squares / W, eps_norm)
        tile.store_column(inverse_ref, inverse)
        store_rows(tile, z_ref, z * inverse[:, None])

    out = [((K, N), jnp.float32), ((N,), jnp.float32)]
    grid = (pl.cdiv(N, tokens),)
    z, inverse = gpu.call(
        kernel, "mhc_coefficients_forward", grid, out, x, *parts, num_warps=_warps(K), num_stages=3 if K <= 64 else 2
    )
    return z[:k], inverse


def token_splits(N: int, tokens: int, others: int) -> tuple[int, int]:
    """Return into how many shares the N tokens are split, and the number of blocks of `tokens` tokens in a share.

    `others` programs work on one share, each on a different part of the channels.  The number of shares is chosen so that there are
    about `PROGRAMS` programs in all.
    """
    blocks = pl.cdiv(N, tokens)
    each = pl.cdiv(blocks, min(blocks, pl.cdiv(PROGRAMS, others)))
    return pl.cdiv(blocks, each), each


def backward(
    x: Float[Array, "N W"],
    phi: Float[Array, "W k"],
    z: Float[Array, "k N"],
    inverse: Float[Array, " N"],
    g: Float[Array, "k N"],
) -> tuple[Float[Array, "N W"], Float[Array, "W k"]]:
    """Return dv = (inverse g) phi^T - (g . z) inverse^2 v / W and dphi = v^T (inverse g), where g is the gradient of z.

    Each program of the kernel handles a block of channels for a share of the tokens, and sums dphi over this share.  The sums of
    all shares are then added in a fixed order.

    Memory traffic per token: reads W numbers, writes W, and moves 2 k a few times.  dphi adds 4 K bytes for each channel and share,
    where K is k padded to a power of two.
    """
    scaled = g * inverse[None]
    shrink = (g * z).sum(0) * inverse**2 / x.shape[1]
    return _backward(x, phi, scaled, shrink)


def dphi(x: Float[Array, "N W"], scaled: Float[Array, "k N"]) -> Float[Array, "W k"]:
    """Return dphi = v^T scaled alone, where v is x, and `scaled` is the gradient of z divided by the RMS.

    Memory traffic per token: reads W numbers.
    """
    return _backward(x, None, scaled, scaled[0])[1]


def _backward(x: Array, phi: Array | None, scaled: Array, shrink: Array) -> tuple[Array, Array]:
    N, W = x.shape
    k = scaled.shape[0]
    wide = gpu.channels(W, CHANNELS)
    grads = gpu.pieces(pad_columns(scaled.T))
    parts = [] if phi is None else gpu.pieces(pad_columns(phi))
    K = grads[0].shape[1]
    tokens = _tokens(K, x.dtype)
    shares, each = token_splits(N, tokens, pl.cdiv(W, wide))
    # Two terms leave out products of relative size 2^-16, which the rounding of dx to bfloat16 would lose anyway.
    terms = 2 if x.dtype == jnp.bfloat16 else 3

    def kernel(x_ref, shrink_ref, *refs):
        grad_refs, phi_refs, out_refs = refs[:3], refs[3 : 3 + len(parts)], refs[3 + len(parts) :]
        channel, share = pl.program_id(0) * wide, pl.program_id(1)

        def block(b, dphi):
            tile = Tile(b * tokens, tokens, N, channel, wide, W)
            v = tile.load(x_ref)
            s = load_rows(grad_refs, b * tokens, tokens, N, bool(N % tokens))
            if phi is not None:
                p = load_rows(phi_refs, channel, wide, W, bool(W % wide))
                dv = gpu.split_dot(s, p, (1, 1), terms)
                tile.store(out_refs[0], dv - tile.column(shrink_ref)[:, None] * v.astype(jnp.float32))
            return dphi + gpu.split_dot(gpu.pieces(v), s, (0, 0), terms=3)

        last = jnp.minimum((share + 1) * each, pl.cdiv(N, tokens))
        dphi = lax.fori_loop(share * each, last, block, jnp.zeros((wide, K), jnp.float32))
        Tile(share * rounded + channel, wide, shares * rounded, 0, K, K, ragged=False).store(out_refs[-1], dphi)

    grid = pl.cdiv(W, wide), shares
    rounded = grid[0] * wide
    dphi = (shares * rounded, K), jnp.float32
    name = "mhc_coefficients_dphi" if phi is None else "mhc_coefficients_backward"
    out = [dphi] if phi is None else [(x.shape, x.dtype), dphi]
    args = x, shrink, *grads, *parts
    *dx, dphi = gpu.call(kernel, name, grid, out, *args, num_warps=_warps(K), num_stages=2 if K <= 64 else 1)
    return dx[0] if dx else x, dphi.reshape(shares, rounded, K).sum(0)[:W, :k]
