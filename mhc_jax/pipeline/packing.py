"""Packing of the streams between two stages into one array for each dtype, so that they travel in few messages.

Streams of most connections are one array [B, T, nC], which packing leaves as it is.  Some kinds have more: single-pass mHC sends
coefficients along, and others send outputs of earlier branches.  Few messages are better than many, because a TPU keeps few
messages in flight at once, and because every message costs the latency of the link.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Shaped

from mhc_jax.parallel.sharding import constrain

Tree = Any


class CarryPacker:
    """Packs a tree of arrays into one array [B, T, width] for each dtype.

    The token axes B and T may stand anywhere among the axes of an array.  An array without them is packed once for each token.
    """

    def __init__(self, enter: Callable[[Int[Array, "B T"]], Tree], tokens: Int[Array, "B T"]):
        """Find the token axes of every array of the tree.

        Args:
          enter: a function from tokens [B, T] to a tree of the form that is packed.
          tokens: an array with the shape of the tokens of one microbatch.
        """
        self.tree: Tree = jax.eval_shape(enter, tokens)
        """Shapes and dtypes of the arrays of the tree."""
        self.leaves, self.structure = jax.tree.flatten(self.tree)
        # The token axes of an array are the axes that grow if B and T are doubled.
        larger = jax.ShapeDtypeStruct(tuple(2 * size for size in tokens.shape), tokens.dtype)
        grown = jax.tree.leaves(jax.eval_shape(enter, larger))
        self.axes = [
            tuple(k for k, size in enumerate(a.shape) if size != b.shape[k])
            for a, b in zip(self.leaves, grown, strict=True)
        ]
        """The positions of the axes B and T in every leaf of the tree, or none."""
        self.tokens = tokens.shape
        """The sizes of the axes B and T."""
        self.widths = [
            leaf.size // tokens.size if axes else leaf.size for leaf, axes in zip(self.leaves, self.axes, strict=True)
        ]
        self.like = jax.eval_shape(lambda: self.pack(self.zeros()))
        """Shapes and dtypes of the packed arrays, as `pack` returns them."""

    def pack(self, tree: Tree) -> dict[str, Shaped[Array, "B T width"]]:
        """Return a dict from the name of each dtype to one array that has all leaves of this dtype side by side."""
        parts: dict[str, list[Array]] = {}
        for a, axes in zip(jax.tree.leaves(tree), self.axes, strict=True):
            a = jnp.moveaxis(a, axes, (0, 1)) if axes else jnp.broadcast_to(a[None, None], (*self.tokens, *a.shape))
            parts.setdefault(a.dtype.name, []).append(a.reshape(*a.shape[:2], -1))
        return placed({name: jnp.concatenate(each, axis=2) for name, each in parts.items()})

    def unpack(self, packed: Mapping[str, Shaped[Array, "B T width"]]) -> Tree:
        """Return the tree that `pack` packed."""
        start = dict.fromkeys(packed, 0)
        out = []
        for like, width, axes in zip(self.leaves, self.widths, self.axes, strict=True):
            name = like.dtype.name
            a = jax.lax.slice_in_dim(packed[name], start[name], start[name] + width, axis=2)
            start[name] += width
            if not axes:
                out.append(a[0, 0].reshape(like.shape))
                continue
            rest = tuple(size for k, size in enumerate(like.shape) if k not in axes)
            out.append(jnp.moveaxis(a.reshape(*a.shape[:2], *rest), (0, 1), axes))
        return jax.tree.unflatten(self.structure, out)

    def zeros(self) -> Tree:
        """Return a tree of the form that is packed, filled with zeros."""
        return jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), self.tree)


def placed(packed: Mapping[str, Shaped[Array, "B T width"]]) -> dict[str, Shaped[Array, "B T width"]]:
    """Return packed arrays, sharded over the mesh like all tokens.  All branches of a conditional need the same sharding."""
    return {name: constrain(a, "batch", "sequence", None) for name, a in packed.items()}
