"""The boundary between two sub-layers as Pallas kernels for NVIDIA GPUs: the write, the RMS and projection, and the read."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float

from mhc_kernels import backend_choice, gpu
from mhc_kernels.backends import Saved, through_pre
from mhc_kernels.gpu import Tile
from mhc_kernels.ops.coefficients import pallas_gpu as statistics
from mhc_kernels.ops.read import pallas_gpu as read
from mhc_kernels.ops.rms_norm import inverse_rms
from mhc_kernels.ops.write.pallas_gpu import load_row, mix

obstacle = gpu.obstacle
KEEPS_NEW = True


@dataclasses.dataclass(frozen=True)
class _Block:
    """The numbers of tokens and channels of a tile, and of warps of a program, chosen so that no registers spill.

    This was seen on sm_90, under Triton 3.6 and 3.9.
    """

    tokens: int
    channels: int
    warps: int


def _forward_block(n: int, dtype: Any) -> _Block:
    """Return the sizes for the forward kernel: mostly 64 tokens, the height of a Hopper matrix instruction.

    Up to n = 4, two programs fit on a multiprocessor and overlap.
    """
    half = dtype == jnp.bfloat16
    return _Block(64, 32 if half else 16, 4) if n <= 4 else _Block(64 if half else 32, 16, 8)


def _backward_block(n: int, dtype: Any) -> _Block:
    """Return the sizes for the backward kernel: few tokens, because x and dx of all n streams are in registers at once."""
    return _Block(16, 64 if dtype == jnp.bfloat16 else 32, 4 if n <= 4 else 8)


def forward(
    x: Float[Array, "N nC"],
    y: Float[Array, "N C"],
    post: Float[Array, "n N"],
    res: Float[Array, "n n N"],
    phi: Float[Array, "nC k"],
    alpha_pre: Float[Array, ""],
    bias_pre: Float[Array, " n"],
    eps_norm: float,
    eps: float,
) -> tuple[Float[Array, "N nC"], Float[Array, "k N"], Float[Array, " N"], Float[Array, "N C"]]:
    """Return x', z = x' phi / RMS, inverse = 1 / RMS and h.

    Each program of the kernel handles a block of tokens.  In a first pass over the channels it writes x' and sums z.  Then it makes
    pre from z.  In a second pass it reads x' and makes h.

    Memory traffic per token: reads (n + 1) C numbers, writes (n + 1) C, and reads n C of x' again.  The second pass begins with the
    channels that were written last, of which the L2 cache still has a part.  So the total is between (2 n + 2) C and (3 n + 2) C.

    A count of bytes says that smaller blocks would not help.  L2 would have to hold x' of all programs that run at once, and on an
    H100 at n C = 10,240 it holds some 1,500 tokens.  Blocks would then be so small that their reads of phi from L2, 6 n K bytes for
    each channel and block, cost more than is saved; K is k padded to a power of two.
    """
    N, C = y.shape
    n, k = bias_pre.shape[0], phi.shape[1]
    block = _forward_block(n, x.dtype)
    tokens, wide = block.tokens, gpu.channels(C, block.channels)
    parts = gpu.pieces(statistics.pad_columns(phi))
    K = parts[0].shape[1]
    chunks = pl.cdiv(C, wide)

    def kernel(x_ref, y_ref, post_ref, res_ref, gate_ref, *refs):
        phi_refs, (new_ref, z_ref, inverse_ref, h_ref) = refs[:3], refs[3:]
        tile = Tile(pl.program_id(0) * tokens, tokens, N, 0, wide, C)

        def write_chunk(c, sums):
            at = tile.at(c * wide)
            xs, y = [at.load32(x_ref, j) for j in range(n)], at.load32(y_ref)

            # The loop over streams is not unrolled: addresses and operands of all streams would take too many registers.
            def stream(i, sums):
                z, squares = sums
                p, H = load_row(tile, post_ref, res_ref, i)
                v = mix(xs, y, p, H).astype(x.dtype)
                at.store(new_ref, v, i)
                v32 = v.astype(jnp.float32)
                rows = statistics.load_rows(phi_refs, i * C + c * wide, wide, (i + 1) * C, bool(C % wide))
                return z + gpu.split_dot(gpu.pieces(v), rows, (1, 0), terms=3), squares + (v32 * v32).sum(1)

            return lax.fori_loop(0, n, stream, sums)

        zeros = jnp.zeros((tokens, K), jnp.float32), jnp.zeros((tokens,), jnp.float32)
        z, squares = lax.fori_loop(0, chunks, write_chunk, zeros)
        inverse = inverse_rms(squares / (n * C), eps_norm)
        z = z * inverse[:, None]
        tile.store_column(inverse_ref, inverse)
        statistics.store_rows(tile, z_ref, z)

        column = lax.broadcasted_iota(jnp.int32, (tokens, K), 1)
        pre = []
        for i in range(n):
            zi = jnp.where(column == i, z, 0.0).sum(1)
            pre.append(1 / (1 + jnp.exp(-(gate_ref[np.int32(n)] * zi + gate_ref[np.int32(i)]))) + eps)
        if not backend_choice.interpret():
            plgpu.debug_barrier()  # below, a thread reads parts of x' that other threads wrote

        def read_chunk(c, carry):
            at = tile.at((chunks - 1 - c) * wide)
            h = jnp.zeros((tokens, wide), jnp.float32)
            for i in range(n):
                h += pre[i][:, None] * at.load32(new_ref, i)
            at.store(h_ref, h)
            return carry

        lax.fori_loop(0, chunks, read_chunk, 0)

    gate = jnp.append(bias_pre, alpha_pre).astype(jnp.float32)
    out = [(x.shape, x.dtype), ((K, N), jnp.float32), ((N,), jnp.float32), (y.shape, y.dtype)]
    args = x, y, post, res, gate, *parts
    grid = (pl.cdiv(N, tokens),)
    new, z, inverse, h = gpu.call(
        kernel, "mhc_write_read_forward", grid, out, *args, num_warps=block.warps, num_stages=2
    )
    return new, z[:k], inverse, h


def backward(
    saved: Saved,
    pre: Float[Array, "n N"],
    slope: Float[Array, "n N"],
    g_new: Float[Array, "N nC"],
    g_h: Float[Array, "N C"],
    g_z: Float[Array, "k N"],
) -> tuple[Array, ...]:
    """Return dx, dy, dpost, dres, dphi and dpre by the formulas in `backends.py`, in which G is the whole gradient of x'.

    Each program of the kernel handles a block of channels of all streams for a share of the tokens, so that phi comes from the L1
    cache.  The program makes x' again from x and y instead of reading x'.  Each block of channels has its own sums for dpost and
    dres, which are added in a fixed order.  A kernel of `coefficients` makes dphi, whose sums would spill in this kernel.

    Memory traffic per token: reads (2 n + 2) C numbers, writes (n + 1) C.  The sums for dpost and dres add 4 (n^2 + n) / 64 bytes
    for each channel, written and read.  dphi reads n C, and dpre (n + 1) C.  The whole gradient moves (5 n + 4) C.
    """
    x, y, post, res, phi, new, z, inverse = saved
    N, C = y.shape
    n = post.shape[0]
    dpre = read.products(new, g_h)
    g_z = through_pre(g_z, slope, dpre)
    size = _backward_block(n, x.dtype)
    tokens, wide = size.tokens, gpu.channels(C, size.channels)
    scaled = g_z * inverse[None]
    shrink = (g_z * z).sum(0) * inverse**2 / x.shape[1]
    grads = gpu.pieces(statistics.pad_columns(scaled.T))
    parts = gpu.pieces(statistics.pad_columns(phi))
    terms = 2 if x.dtype == jnp.bfloat16 else 3
    chunks = pl.cdiv(C, wide)
    shares, each = statistics.token_splits(N, tokens, chunks)
    ragged = tokens > N

    def kernel(x_ref, y_ref, post_ref, res_ref, pre_ref, shrink_ref, g_new_ref, g_h_ref, *refs):
        grad_refs, phi_refs, (dx_ref, dy_ref, sums_ref) = refs[:3], refs[3:6], refs[6:]
        chunk, share = pl.program_id(0), pl.program_id(1)

        def block(b, carry):
            # The last block ends at token N.  Where it repeats tokens of the block before, both write the same numbers.  Without
            # the minimum, Triton 3.6 needs fewer registers up to n = 4, and more above.
            whole = ragged or (N % tokens == 0 and n <= 4)
            start = b * tokens if whole else jnp.minimum(b * tokens, N - tokens)
            at = Tile(start, tokens, N, chunk * wide, wide, C, ragged)
            xs, y = [at.load32(x_ref, j) for j in range(n)], at.load32(y_ref)
            g_h, shrink = at.load32(g_h_ref), at.column(shrink_ref)[:, None]
            s = statistics.load_rows(grad_refs, start, tokens, N, ragged)

            def stream(i, sums):
                dy, dxs = sums
                p, H = load_row(at, post_ref, res_ref, i)
                v = mix(xs, y, p, H).astype(x.dtype)
                rows = statistics.load_rows(phi_refs, i * C + chunk * wide, wide, (i + 1) * C, bool(C % wide))
                G = at.load32(g_new_ref, i) + at.column(pre_ref, i)[:, None] * g_h
                G += gpu.split_dot(s, rows, (1, 1), terms) - shrink * v.astype(jnp.float32)
                at.store_column(sums_ref, (G * y).sum(1), chunk, i)
                for j in range(n):
                    at.store_column(sums_ref, (G * xs[j]).sum(1), chunk, n + i * n + j)
                return dy + p * G, [dx + h * G for dx, h in zip(dxs, H, strict=True)]

            dy, dxs = lax.fori_loop(0, n, stream, (jnp.zeros_like(y), [jnp.zeros_like(y)] * n))
            at.store(dy_ref, dy)
            for j in range(n):
                at.store(dx_ref, dxs[j], j)
            return carry

        last = jnp.minimum((share + 1) * each, pl.cdiv(N, tokens))
        lax.fori_loop(share * each, last, block, 0)

    out = [(x.shape, x.dtype), (y.shape, y.dtype), ((chunks, n + n * n, N), jnp.float32)]
    args = x, y, post, res, pre, shrink, g_new, g_h, *grads, *parts
    grid = chunks, shares
    dx, dy, sums = gpu.call(kernel, "mhc_write_read_backward", grid, out, *args, num_warps=size.warps, num_stages=2)
    sums = sums.sum(0)
    return dx, dy, sums[:n], sums[n:].reshape(n, n, N), statistics.dphi(new, scaled), dpre
