"""Prepare the arguments of all operations: check shapes, merge token axes into one, and match types under `shard_map`."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import Array

from mhc_kernels.layout import columns


def require(op: str, condition: bool, problem: str, **arrays: Array | None) -> None:
    """If `condition` is false, raise ValueError with the name `op` of the operation, the `problem`, and the shapes of `arrays`."""
    if not condition:
        shapes = ", ".join(f"{name} {a.dtype}{list(a.shape)}" for name, a in arrays.items() if a is not None)
        raise ValueError(f"{op}: {problem} (got {shapes}).")


def check_streams(op: str, x: Array, num_streams: int) -> None:
    """Raise ValueError unless the streams x have a float dtype, a last axis that `num_streams` divides, and at least one token."""
    require(op, jnp.issubdtype(x.dtype, jnp.floating), "streams must have a float dtype", x=x)
    require(op, num_streams >= 1, f"num_streams is {num_streams}, it must be at least 1", x=x)
    require(
        op, x.ndim >= 1 and x.shape[-1] % num_streams == 0, f"n = {num_streams} does not divide the last axis of x", x=x
    )
    require(op, math.prod(x.shape) > 0, "there are no tokens", x=x)


def alike(*arrays: Array) -> tuple[Array, ...]:
    """Cast the arrays so that the type of each varies over every mesh axis over which any of them varies.

    Under `jax.shard_map`, phi has the same value on all shards, and x differs from shard to shard.  With the cast, the gradient of
    phi is summed over the shards.
    """
    varying = [jax.typeof(a).manual_axis_type.varying for a in arrays]
    missing = [tuple(frozenset().union(*varying) - v) for v in varying]
    return tuple(jax.lax.pcast(a, m, to="varying") if m else a for a, m in zip(arrays, missing, strict=True))


def check_parameters(
    op: str, x: Array, phi: Array, alpha: Array, bias: Array, num_streams: int, parts: tuple[str, ...]
) -> None:
    """Raise ValueError unless phi, alpha and bias have the shapes that follow from x, n and the existing `parts`."""
    k = columns(num_streams, parts)[parts[-1]].stop
    good = phi.shape == (x.shape[-1], k) and bias.shape == (k,) and alpha.shape == (len(parts),)
    wanted = f"phi must be [{x.shape[-1]}, {k}], bias [{k}] and alpha [{len(parts)}] for parts {', '.join(parts)}"
    require(op, good, wanted, x=x, phi=phi, alpha=alpha, bias=bias)


def check_write(op: str, x: Array, y: Array, post: Array | None, res: Array | None, num_streams: int) -> str | None:
    """Check the shapes of the arguments of a write, and return why no kernel can run this write, or None if a kernel can.

    Raises:
      ValueError: shapes that do not match.
    """
    n, tokens = num_streams, x.shape[:-1]
    arrays = {"x": x, "y": y, "post": post, "res": res}
    require(op, y.shape == (*tokens, x.shape[-1] // n), "y must have the tokens of x and 1/n of its channels", **arrays)
    require(op, post is None or post.shape == (n, *tokens), f"post must be [{n}, *tokens of x]", **arrays)
    require(op, res is None or res.shape == (n, n, *tokens), f"res must be [{n}, {n}, *tokens of x]", **arrays)
    return "post or res is None" if post is None or res is None else None
