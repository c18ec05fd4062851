"""What lies between two stages as one array a dtype: one message for streams and y, one for all coefficients.

A TPU keeps few messages in flight, and small ones cost their latency.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Shaped

Tree = Any


class Boundary:
    """Packs a tree of arrays with token axes [B, T], wherever each has them, into one [B, T, width] a dtype."""

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
        self.widths = [leaf.size // tokens.size for leaf in leaves]
        self.like = jax.eval_shape(lambda: self.pack(self.zeros()))
        """Shapes of what `pack` makes."""

    def pack(self, tree: Tree) -> dict[str, Shaped[Array, "B T width"]]:
        """An array for each dtype, by its name."""
        parts: dict[str, list[Array]] = {}
        for a, axes in zip(jax.tree.leaves(tree), self.axes, strict=True):
            a = jnp.moveaxis(a, axes, (0, 1))
            parts.setdefault(a.dtype.name, []).append(a.reshape(*a.shape[:2], -1))
        return {name: jnp.concatenate(each, axis=2) for name, each in parts.items()}

    def unpack(self, packed: Mapping[str, Shaped[Array, "B T width"]]) -> Tree:
        """The tree again."""
        at = dict.fromkeys(packed, 0)
        out = []
        for like, width, axes in zip(self.leaves, self.widths, self.axes, strict=True):
            name = like.dtype.name
            a = jax.lax.slice_in_dim(packed[name], at[name], at[name] + width, axis=2)
            at[name] += width
            rest = tuple(size for k, size in enumerate(like.shape) if k not in axes)
            out.append(jnp.moveaxis(a.reshape(*a.shape[:2], *rest), (0, 1), axes))
        return jax.tree.unflatten(self.structure, out)

    def zeros(self) -> Tree:
        """Of the tree."""
        return jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), self.tree)


def _differing(shape: tuple[int, ...], other: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(k for k, sizes in enumerate(zip(shape, other, strict=True)) if len(set(sizes)) > 1)
