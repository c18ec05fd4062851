"""What lies between two stages as one array: one message instead of one for streams, coefficients and y each.

A TPU keeps few messages in flight, and small ones cost their latency.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Shaped

Tree = Any


class Boundary:
    """Packs a tree of arrays with token axes [B, T], wherever each has them, into one [B, T, width]."""

    def __init__(self, enter: Callable[[Int[Array, "B T"]], Tree], tokens: Int[Array, "B T"]):
        """Args: the function that makes such a tree of tokens, and tokens of the right shape."""
        self.tree: Tree = jax.eval_shape(enter, tokens)
        """Shapes and dtypes of what is packed."""
        leaves, self.structure = jax.tree.flatten(self.tree)
        larger = jax.ShapeDtypeStruct(tuple(2 * size for size in tokens.shape), tokens.dtype)
        grown = jax.tree.leaves(jax.eval_shape(enter, larger))
        self.leaves = list(leaves)
        self.axes = [_differing(a.shape, b.shape) for a, b in zip(leaves, grown, strict=True)]
        """Of each leaf, where B and T are."""
        dtypes = {leaf.dtype for leaf in leaves}
        smallest = min(dtype.itemsize for dtype in dtypes)
        self.dtype = dtypes.pop() if len(dtypes) == 1 else jnp.dtype(f"uint{8 * smallest}")
        self.widths = [
            leaf.size // tokens.size * leaf.dtype.itemsize // jnp.dtype(self.dtype).itemsize for leaf in leaves
        ]
        self.like = jax.ShapeDtypeStruct((*tokens.shape, sum(self.widths)), self.dtype)

    def pack(self, tree: Tree) -> Shaped[Array, "B T width"]:
        """One array; the bits are those of the leaves."""
        parts = []
        for a, axes in zip(jax.tree.leaves(tree), self.axes, strict=True):
            a = jnp.moveaxis(a, axes, (0, 1))
            a = a if a.dtype == self.dtype else jax.lax.bitcast_convert_type(a, self.dtype)
            parts.append(a.reshape(*a.shape[:2], -1))
        return jnp.concatenate(parts, axis=2)

    def unpack(self, packed: Shaped[Array, "B T width"]) -> Tree:
        """The tree again."""
        out = []
        for a, axes, like in zip(
            jnp.split(packed, np.cumsum(self.widths)[:-1], axis=2), self.axes, self.leaves, strict=True
        ):
            rest = tuple(size for k, size in enumerate(like.shape) if k not in axes)
            ratio = like.dtype.itemsize // a.dtype.itemsize
            a = a.reshape(*a.shape[:2], *rest, *((ratio,) if ratio > 1 else ()))
            a = a if a.dtype == like.dtype else jax.lax.bitcast_convert_type(a, like.dtype)
            out.append(jnp.moveaxis(a, (0, 1), axes))
        return jax.tree.unflatten(self.structure, out)

    def zeros(self) -> Tree:
        """Of the tree."""
        return jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), self.tree)


def _differing(shape: tuple[int, ...], other: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(k for k, sizes in enumerate(zip(shape, other, strict=True)) if len(set(sizes)) > 1)
