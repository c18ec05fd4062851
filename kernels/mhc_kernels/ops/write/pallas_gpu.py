"""The write x' = H_res x + H_post^T y and its gradient as Pallas kernels for NVIDIA GPUs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from mhc_kernels import gpu
from mhc_kernels.gpu import Tile

obstacle = gpu.obstacle

WARPS = 4


def load_row(tile: Tile, post_ref: Any, res_ref: Any, i: Any) -> tuple[Array, list[Array]]:
    """Load post_i and the n entries of row i of res at the tokens of `tile`, as arrays [tokens, 1]."""
    n = post_ref.shape[0]
    return tile.column(post_ref, i)[:, None], [tile.column(res_ref, i, j)[:, None] for j in range(n)]


def mix(x: Sequence[Array], y: Array, post: Array, res: Sequence[Array]) -> Array:
    """Return new stream i, sum_j res_j x_j + post y, for some tokens; `res` is row i of H_res, and `post` is entry i of H_post."""
    new = post * y
    for r, xj in zip(res, x, strict=True):
        new += r * xj
    return new


def forward(
    x: Float[Array, "N nC"], y: Float[Array, "N C"], post: Float[Array, "n N"], res: Float[Array, "n n N"]
) -> Float[Array, "N nC"]:
    """Return x' = H_res x + H_post^T y in the dtype of x, accumulated in float32.

    Memory traffic per token: reads (n + 1) C + n^2 + n numbers, writes n C.
    """
    N, C = y.shape
    n = post.shape[0]
    tokens, wide = gpu.rows(C, n, x.dtype, WARPS)

    def kernel(x_ref, y_ref, post_ref, res_ref, new_ref):
        tile = Tile(pl.program_id(0) * tokens, tokens, N, pl.program_id(1) * wide, wide, C)
        x, y = [tile.load32(x_ref, j) for j in range(n)], tile.load32(y_ref)
        for i in range(n):
            tile.store(new_ref, mix(x, y, *load_row(tile, post_ref, res_ref, i)), i)

    grid = pl.cdiv(N, tokens), pl.cdiv(C, wide)
    return gpu.call(kernel, "mhc_write_forward", grid, [(x.shape, x.dtype)], x, y, post, res, num_warps=WARPS)[0]


def backward(
    x: Float[Array, "N nC"],
    y: Float[Array, "N C"],
    post: Float[Array, "n N"],
    res: Float[Array, "n n N"],
    g: Float[Array, "N nC"],
) -> tuple[Float[Array, "N nC"], Float[Array, "N C"], Float[Array, "n N"], Float[Array, "n n N"]]:
    """Return dx_j = sum_i res_ij g_i, dy = sum_i post_i g_i, dpost_i = <g_i, y>, dres_ij = <g_i, x_j>.

    g_i is the gradient of new stream i.  Each program of the kernel handles all channels of a block of tokens.

    Memory traffic per token: reads (2 n + 1) C + n^2 + n numbers, writes (n + 1) C + n^2 + n.
    """
    N, C = y.shape
    n = post.shape[0]
    tokens, wide = gpu.rows(C, n, x.dtype, WARPS)
    vector = gpu.VECTOR_BYTES // x.dtype.itemsize
    if n > 4 and vector > 4:
        # A thread holds n^2 + n sums and n vectors of g.  With 16-byte vectors, its registers would spill.
        tokens, vector = tokens // 2, 4

    def kernel(x_ref, y_ref, post_ref, res_ref, g_ref, dx_ref, dy_ref, dpost_ref, dres_ref):
        tile = Tile(pl.program_id(0) * tokens, tokens, N, 0, wide, C)
        # post (p) and res (H) are loaded before the loop.  Otherwise their addresses are kept, which take twice the registers.
        p, H = zip(*(load_row(tile, post_ref, res_ref, i) for i in range(n)), strict=True)

        def part(a):
            """Sum each vector of `a` that a thread holds to one number, to leave registers for the n^2 + n sums of the thread."""
            return a.reshape(tokens, wide // vector, vector).sum(2)

        def chunk(c, sums):
            at = tile.at(c * wide)
            g = [at.load32(g_ref, i) for i in range(n)]
            y = at.load32(y_ref)
            dy = jnp.zeros_like(y)
            sums = list(sums)
            for i in range(n):
                dy += p[i] * g[i]
                sums[i] += part(g[i] * y)
            at.store(dy_ref, dy)
            for j in range(n):
                x = at.load32(x_ref, j)
                dx = jnp.zeros_like(x)
                for i in range(n):
                    dx += H[i][j] * g[i]
                    sums[n + i * n + j] += part(g[i] * x)
                at.store(dx_ref, dx, j)
            return sums

        zeros = [jnp.zeros((tokens, wide // vector), jnp.float32)] * (n + n * n)
        sums = lax.fori_loop(0, pl.cdiv(C, wide), chunk, zeros)
        for i in range(n):
            tile.store_column(dpost_ref, sums[i].sum(1), i)
            for j in range(n):
                tile.store_column(dres_ref, sums[n + i * n + j].sum(1), i, j)

    out = [(a.shape, a.dtype) for a in (x, y, post, res)]
    args, grid = (x, y, post, res, g), (pl.cdiv(N, tokens),)
    dx, dy, dpost, dres = gpu.call(kernel, "mhc_write_backward", grid, out, *args, num_warps=WARPS)
    return dx, dy, dpost, dres
