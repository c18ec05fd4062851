"""Grouped matrix products: the rows of an array form E consecutive groups, and each group is multiplied by a matrix of its own.

On CPUs and GPUs this is `jax.lax.ragged_dot`.  On TPUs it is JAX's Pallas kernel `megablox` (Gale et al., arXiv 2211.15841), which
uses each row only in the products of its own group, also in the gradients.  In libtpu 0.0.42 the gradient of `ragged_dot` with
respect to the matrices instead uses every row in the products of all E groups, which is E times the work.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int
from mhc_kernels import backend_choice

from mhc_jax.parallel.sharding import current

ROWS = 512
"""Largest number of rows in a tile, the part of an array that the TPU kernel multiplies at once.

A tile of 512 rows and 512 columns takes 256 FLOPs for each byte of 16-bit input that is read for it.  A TPU v5p reaches its peak
from 166 FLOPs per byte on, and a TPU v5e from 240 on."""
VMEM = 12 * 2**20
"""Number of bytes of a TPU's vector memory that the tiles of one kernel may take.  XLA gives a kernel 16 MiB."""


def grouped_matmul(
    x: Float[Array, "M C"], weights: Float[Array, "E C F"], group_sizes: Int[Array, " E"]
) -> Float[Array, "M F"]:
    """Multiply each row of x by the matrix `weights[e]` of its group e.  The result has the dtype of x, and sums are in float32.

    Rows beyond the last group may have any values in the result, even NaN, and so may their gradients.  They do not affect the
    gradient of the weights.

    Args:
      x: rows sorted by group.
      weights: one matrix for each of E groups, in the dtype of x.
      group_sizes: number of rows of each group.  The first group begins at row 0.  A group may be empty.

    Examples:
      Two rows go to the first matrix, and one to the second.

      >>> import jax.numpy as jnp
      >>> print(grouped_matmul(jnp.ones((3, 1)), jnp.array([[[2.0]], [[5.0]]]), jnp.array([2, 1])).ravel())
      [2. 2. 5.]
    """
    if backend_choice.platform() != "tpu":
        return jax.lax.ragged_dot(x, weights, group_sizes)
    # Inside `jax.shard_map` the gradient of an array that is equal on all devices is a sum over devices.  JAX takes this sum only
    # if the array has been marked as differing between devices (`pcast`) before it is used.
    axes = _varying(x, weights)
    return _kernels(_spread(x, axes), _spread(weights, axes), group_sizes)


def _varying(*arrays: Array) -> frozenset[str]:
    """Return the mesh axes of the surrounding `jax.shard_map` along which at least one array may differ between devices."""
    return frozenset[str]().union(*(jax.typeof(a).manual_axis_type.varying for a in arrays))


def _spread(a: Array, axes: frozenset[str]) -> Array:
    """Return the array `a`, marked as differing between devices along the mesh axes `axes`."""
    missing = tuple(sorted(axes - _varying(a)))
    return jax.lax.pcast(a, missing, to="varying") if missing else a


def _megablox() -> Any:
    # Kernels for TPUs take time to import, which other devices need not spend.
    return importlib.import_module("jax.experimental.pallas.ops.tpu.megablox.gmm")


@jax.custom_vjp
def _kernels(x: Array, weights: Array, group_sizes: Array) -> Array:
    return _forward(x, weights, group_sizes)[0]


def _forward(x: Array, weights: Array, group_sizes: Array) -> tuple[Array, Any]:
    def product(x, weights, sizes):
        return _megablox().gmm(x, weights, sizes, x.dtype, tiling, interpret=backend_choice.interpret())

    return _on_each_device(product, x, weights, group_sizes), (x, weights, group_sizes)


def _backward(saved: Any, g: Array) -> tuple[Array, Array, None]:
    r"""Return the gradients $dx_e = g_e W_e^\top$ and $dW_e = x_e^\top g_e$ for each group e, from the gradient g of the result."""

    def of_x(g, weights, sizes):
        return _megablox().gmm(
            g, weights, sizes, g.dtype, tiling, transpose_rhs=True, interpret=backend_choice.interpret()
        )

    def of_weights(x, g, sizes):
        return _megablox().tgmm(x.T, g, sizes, x.dtype, tiling_of_gradient, interpret=backend_choice.interpret())

    x, weights, sizes = saved
    return _on_each_device(of_x, g, weights, sizes), _on_each_device(of_weights, x, g, sizes), None


_kernels.defvjp(_forward, _backward)


def _on_each_device(product: Callable[..., Array], a: Array, b: Array, group_sizes: Array) -> Array:
    """Return the result of the kernel `product` on `a` and `b`, whose rows are padded to a multiple of 128.

    `a` is [M, columns].  `b` is [M, columns] too, or the matrices [E, k, n], which are not padded.  Inside a `jax.shard_map` a
    kernel does not declare between which devices its result differs.  A second shard_map, which does not check this, therefore
    surrounds the kernel, and this function marks the result.  If XLA partitions arrays over a mesh, the kernel needs a shard_map
    too.  Every device then handles all rows.
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
    """Return the size along m, k and n of a tile for the grouped product [m, k] x [E, k, n].

    The size along k is k itself if the tiles then fit into `VMEM`, so that each matrix is read once.
    """
    rows = largest(m, ROWS)
    for depth in (k, largest(k, 1024), largest(k, 512)):
        # Vector memory holds two 16-bit tiles of each operand and of the result, and one float32 tile of sums.  `room` is the
        # largest number of columns with which they fit.
        room = (VMEM - 4 * rows * depth) // (4 * depth + 8 * rows)
        if room >= min(n, 256):
            return rows, depth, largest(n, min(room // 128 * 128, 1024))
    return rows, 128, 128


def tiling_of_gradient(m: int, k: int, n: int) -> tuple[int, int, int]:
    """Return the size along m, k and n of a tile for the gradient [E, k, n] of the matrices, which is a sum over m rows."""
    return largest(m, ROWS), largest(k, 1024), largest(n, 1024)


def largest(size: int, most: int) -> int:
    """Return the largest multiple of 128 that divides `size` and is at most `most`.

    If there is none, return the smaller of `size` and `most`.

    Examples:
      >>> largest(384, 512), largest(1280, 1024), largest(48, 512)
      (384, 640, 48)
    """
    return next((tile for tile in range(most, 127, -128) if size % tile == 0), min(size, most))
