"""Products of consecutive groups of rows, each with its own matrix: `jax.lax.ragged_dot`, on TPUs as Pallas kernels.

libtpu 0.0.42 multiplies for the gradient of `ragged_dot`'s matrices all rows with all groups, E times the work.  JAX's grouped
kernels for TPUs (`megablox`: Gale et al., arXiv 2211.15841) do each row once, in all three products.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm, tgmm
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int
from mhc_kernels import choice

from mhc_jax.parallel.sharding import current

ROWS = 512
"""Of a tile.  With as many columns, 256 FLOPs a byte: v5p wants 166, v5e 240."""
VMEM = 12 * 2**20
"""Bytes of the tiles of one kernel; XLA gives it 16 MiB."""


def grouped_matmul(
    x: Float[Array, "M C"], weights: Float[Array, "E C F"], group_sizes: Int[Array, " E"]
) -> Float[Array, "M F"]:
    """Rows of group e times weights_e, in their dtype; sums in float32.

    Rows beyond the groups hold anything, NaN too, as do their gradients; they reach no gradient of the weights.

    Args:
      x: rows sorted by group.
      weights: one matrix a group, in the dtype of x.
      group_sizes: rows of each group, from the first row on; a group may be empty.
    """
    if choice.platform() != "tpu":
        return jax.lax.ragged_dot(x, weights, group_sizes)
    # What is one for several devices gets the sum of their gradients.
    both = _varying(x, weights)
    return _kernels(*(_spread(a, both) for a in (x, weights)), group_sizes)


def _varying(*arrays: Array) -> frozenset[str]:
    """Axes of `jax.shard_map` along which any of them differs."""
    return frozenset[str]().union(*(jax.typeof(a).manual_axis_type.varying for a in arrays))


def _spread(a: Array, axes: frozenset[str]) -> Array:
    """`a`, said to differ along `axes`."""
    missing = tuple(sorted(axes - _varying(a)))
    return jax.lax.pcast(a, missing, to="varying") if missing else a


@jax.custom_vjp
def _kernels(x: Array, weights: Array, group_sizes: Array) -> Array:
    return _forward(x, weights, group_sizes)[0]


def _forward(x: Array, weights: Array, group_sizes: Array) -> tuple[Array, Any]:
    def product(x, weights, sizes):
        return gmm(x, weights, sizes, x.dtype, tiling, interpret=choice.interpret())

    return _apart(product, x, weights, group_sizes), (x, weights, group_sizes)


def _backward(saved: Any, g: Array) -> tuple[Array, Array, None]:
    """dx = g W_e^T, dW_e = x_e^T g_e."""

    def of_x(g, weights, sizes):
        return gmm(g, weights, sizes, g.dtype, tiling, transpose_rhs=True, interpret=choice.interpret())

    def of_weights(x, g, sizes):
        return tgmm(x.T, g, sizes, x.dtype, tiling_of_gradient, interpret=choice.interpret())

    x, weights, sizes = saved
    return _apart(of_x, g, weights, sizes), _apart(of_weights, x, g, sizes), None


_kernels.defvjp(_forward, _backward)


def _apart(product: Callable[..., Array], a: Array, b: Array, group_sizes: Array) -> Array:
    """`product` of rows a, of as many as tiles need, b and the sizes; the rows there were.

    Within `jax.shard_map` the kernels do not say between which devices their results differ: a second one around them does not
    ask, and it is said here.  On a mesh that XLA splits arrays over they have to be in one too; every device then does all rows.
    """
    M = a.shape[0]
    by_rows = b.ndim == 2
    a = jnp.pad(a, ((0, -M % 128), (0, 0)))
    b = jnp.pad(b, ((0, -M % 128), (0, 0))) if by_rows else b
    varying = _varying(a, b, group_sizes)
    if varying or current() is not None:
        whole = PartitionSpec()
        product = jax.shard_map(product, in_specs=(whole,) * 3, out_specs=whole, check_vma=False)
    out = product(a, b, group_sizes)
    out = _spread(out, varying)
    return out if by_rows else out[:M]


def tiling(m: int, k: int, n: int) -> tuple[int, int, int]:
    """Rows, depth and columns of a tile of [m, k] x [E, k, n]: all of k where VMEM holds it, so that a matrix is read once."""
    rows = largest(m, ROWS)
    for depth in (k, largest(k, 1024), largest(k, 512)):
        # Two of each operand and of the result in 16 bits, and the sum in float32.
        room = (VMEM - 4 * rows * depth) // (4 * depth + 8 * rows)
        if room >= min(n, 256):
            return rows, depth, largest(n, min(room // 128 * 128, 1024))
    return rows, 128, 128


def tiling_of_gradient(m: int, k: int, n: int) -> tuple[int, int, int]:
    """Rows, and the block [k, n] of a matrix, of one tile of the gradient [E, k, n]."""
    return largest(m, ROWS), largest(k, 1024), largest(n, 1024)


def largest(size: int, most: int) -> int:
    """The largest multiple of 128 up to `most` that divides `size`; where none does `size` itself, or `most` if that is less."""
    return next((tile for tile in range(most, 127, -128) if size % tile == 0), min(size, most))
