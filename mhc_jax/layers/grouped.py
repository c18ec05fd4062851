"""Grouped matrix products: consecutive groups of rows, each times a matrix of its own.

On CPUs and GPUs this is `jax.lax.ragged_dot`.  On TPUs it is JAX's Pallas kernel `megablox` (Gale et al., arXiv 2211.15841), which
does each row once in all three products.  libtpu 0.0.42 multiplies all rows with all groups for the gradient of `ragged_dot`'s
matrices, which is E times the work.
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
"""Largest number of rows of a tile.  With as many columns it does 256 FLOPs a byte; a v5p computes at its peak from 166 on, a v5e
from 240."""
VMEM = 12 * 2**20
"""Bytes that the tiles of one kernel may take; XLA gives a kernel 16 MiB."""


def grouped_matmul(
    x: Float[Array, "M C"], weights: Float[Array, "E C F"], group_sizes: Int[Array, " E"]
) -> Float[Array, "M F"]:
    """The rows of each group e times weights_e, in the dtype of x with sums in float32.

    Rows beyond the groups may come out as anything, even NaN, and so may their gradients.  They reach no gradient of the weights.

    Args:
      x: rows sorted by group.
      weights: one matrix for each group, in the dtype of x.
      group_sizes: rows of each group, from the first row on; a group may be empty.

    Examples:
      Two rows go to the first matrix, and one to the second.

      >>> import jax.numpy as jnp
      >>> print(grouped_matmul(jnp.ones((3, 1)), jnp.array([[[2.0]], [[5.0]]]), jnp.array([2, 1])).ravel())
      [2. 2. 5.]
    """
    if choice.platform() != "tpu":
        return jax.lax.ragged_dot(x, weights, group_sizes)
    # An array that several devices share gets the sum of their gradients only once it is marked as differing between them.
    axes = _varying(x, weights)
    return _kernels(_spread(x, axes), _spread(weights, axes), group_sizes)


def _varying(*arrays: Array) -> frozenset[str]:
    """Axes of `jax.shard_map` along which any of the arrays differs between devices."""
    return frozenset[str]().union(*(jax.typeof(a).manual_axis_type.varying for a in arrays))


def _spread(a: Array, axes: frozenset[str]) -> Array:
    """The array marked as differing along `axes`."""
    missing = tuple(sorted(axes - _varying(a)))
    return jax.lax.pcast(a, missing, to="varying") if missing else a


@jax.custom_vjp
def _kernels(x: Array, weights: Array, group_sizes: Array) -> Array:
    return _forward(x, weights, group_sizes)[0]


def _forward(x: Array, weights: Array, group_sizes: Array) -> tuple[Array, Any]:
    def product(x, weights, sizes):
        return gmm(x, weights, sizes, x.dtype, tiling, interpret=choice.interpret())

    return _on_each_device(product, x, weights, group_sizes), (x, weights, group_sizes)


def _backward(saved: Any, g: Array) -> tuple[Array, Array, None]:
    r"""$dx = g W_e^\top$ and $dW_e = x_e^\top g_e$."""

    def of_x(g, weights, sizes):
        return gmm(g, weights, sizes, g.dtype, tiling, transpose_rhs=True, interpret=choice.interpret())

    def of_weights(x, g, sizes):
        return tgmm(x.T, g, sizes, x.dtype, tiling_of_gradient, interpret=choice.interpret())

    x, weights, sizes = saved
    return _on_each_device(of_x, g, weights, sizes), _on_each_device(of_weights, x, g, sizes), None


_kernels.defvjp(_forward, _backward)


def _on_each_device(product: Callable[..., Array], a: Array, b: Array, group_sizes: Array) -> Array:
    """The kernel `product` of rows a, padded to whole tiles, with b.

    Within `jax.shard_map` the kernels do not say between which devices their results differ.  A second shard_map without that check
    surrounds them, and the result is marked here.  Where XLA partitions arrays over a mesh, the kernels need a shard_map too, and
    every device then does all rows.
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
    """Rows, depth and columns of a tile of [m, k] x [E, k, n].

    The depth is all of k where `VMEM` holds it, so that each matrix is read once.
    """
    rows = largest(m, ROWS)
    for depth in (k, largest(k, 1024), largest(k, 512)):
        # Two buffers of each operand and of the result in 16 bits, and the sum in float32.
        room = (VMEM - 4 * rows * depth) // (4 * depth + 8 * rows)
        if room >= min(n, 256):
            return rows, depth, largest(n, min(room // 128 * 128, 1024))
    return rows, 128, 128


def tiling_of_gradient(m: int, k: int, n: int) -> tuple[int, int, int]:
    """Rows, and the two sides of the block of a matrix, of one tile of the gradient [E, k, n]."""
    return largest(m, ROWS), largest(k, 1024), largest(n, 1024)


def largest(size: int, most: int) -> int:
    """The largest multiple of 128 up to `most` that divides `size`; without one the smaller of `size` and `most`.

    Examples:
      >>> largest(384, 512), largest(1280, 1024), largest(48, 512)
      (384, 640, 48)
    """
    return next((tile for tile in range(most, 127, -128) if size % tile == 0), min(size, most))
