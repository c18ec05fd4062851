"""The read h = H_pre x and its gradient as Pallas kernels for NVIDIA GPUs."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from mhc_kernels import gpu
from mhc_kernels.gpu import Tile

obstacle = gpu.obstacle

WARPS = 4


def forward(x: Float[Array, "N nC"], pre: Float[Array, "n N"]) -> Float[Array, "N C"]:
    """Return h = H_pre x in the dtype of x, accumulated in float32.

    Memory traffic per token: reads n C + n numbers, writes C.
    """
    n, N = pre.shape
    C = x.shape[1] // n
    tokens, wide = gpu.rows(C, n, x.dtype, WARPS)

    def kernel(x_ref, pre_ref, h_ref):
        tile = Tile(pl.program_id(0) * tokens, tokens, N, pl.program_id(1) * wide, wide, C)
        h = jnp.zeros((tokens, wide), jnp.float32)
        for i in range(n):
            h += tile.column(pre_ref, i)[:, None] * tile.load32(x_ref, i)
        tile.store(h_ref, h)

    grid = pl.cdiv(N, tokens), pl.cdiv(C, wide)
    return gpu.call(kernel, "mhc_read_forward", grid, [((N, C), x.dtype)], x, pre, num_warps=WARPS)[0]


def backward(
    x: Float[Array, "N nC"], pre: Float[Array, "n N"], g: Float[Array, "N C"]
) -> tuple[Float[Array, "N nC"], Float[Array, "n N"]]:
    """Return dx_i = pre_i g and dpre_i = <x_i, g>, where g is the gradient of h.

    Each program of the kernel handles all channels of a block of tokens.

    Memory traffic per token: reads (n + 1) C + n numbers, writes n C + n.
    """
    return _backward(x, pre, g)


def products(x: Float[Array, "N nC"], g: Float[Array, "N C"]) -> Float[Array, "n N"]:
    """Return dpre_i = <x_i, g> alone, with g the gradient of h.  Memory traffic per token: reads (n + 1) C numbers, writes n."""
    return _backward(x, None, g)[1]


def _backward(x: Array, pre: Array | None, g: Array) -> Any:
    N, C = g.shape
    n = x.shape[1] // C
    tokens, wide = gpu.rows(C, n, x.dtype, WARPS)

    def kernel(x_ref, g_ref, *refs):
        pre_ref, dx_ref = refs[:2] if pre is not None else (None, None)
        tile = Tile(pl.program_id(0) * tokens, tokens, N, 0, wide, C)
        scale = [] if pre is None else [tile.column(pre_ref, i)[:, None] for i in range(n)]

        def chunk(c, sums):
            at = tile.at(c * wide)
            grad = at.load32(g_ref)
            sums = [s + at.load32(x_ref, i) * grad for i, s in enumerate(sums)]
            for i, p in enumerate(scale):
                at.store(dx_ref, p * grad, i)
            return sums

        zeros = [jnp.zeros((tokens, wide), jnp.float32)] * n
        sums = lax.fori_loop(0, pl.cdiv(C, wide), chunk, zeros)
        for i in range(n):
            tile.store_column(refs[-1], sums[i].sum(1), i)

    grid, dpre = (pl.cdiv(N, tokens),), ((n, N), jnp.float32)
    if pre is None:
        return None, gpu.call(kernel, "mhc_read_products", grid, [dpre], x, g, num_warps=WARPS)[0]
    out = [(x.shape, x.dtype), dpre]
    return tuple(gpu.call(kernel, "mhc_read_backward", grid, out, x, g, pre, num_warps=WARPS))
