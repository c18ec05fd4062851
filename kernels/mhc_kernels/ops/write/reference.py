"""x' = H_res x + H_post^T y on flat streams, with a hand-written VJP.  The semantics of the op."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mhc_kernels import choice
from mhc_kernels.ops import flat
from mhc_kernels.ops.once import once
from mhc_kernels.ops.read.reference import split


def write(
    x: Float[Array, "*tokens nC"],
    y: Float[Array, "*tokens C"],
    post: Float[Array, "n *tokens"] | None,
    res: Float[Array, "n n *tokens"] | None,
    num_streams: int,
) -> Float[Array, "*tokens nC"]:
    """See `mhc_kernels.write`, whose meaning this is."""
    if post is None and res is None:
        if num_streams == 1:
            return x + y.astype(x.dtype)
        return (x.astype(jnp.float32) + jnp.tile(y.astype(jnp.float32), num_streams)).astype(x.dtype)
    if post is None:
        post = jnp.ones((num_streams, *y.shape[:-1]), jnp.float32)
    return _write_identity(x, y, post) if res is None else _write(x, y, post, res)


def _spread(a: Array) -> Array:
    """[n, *tokens] -> [*tokens, n, 1]."""
    return jnp.moveaxis(a, 0, -1)[..., None]


def _outer(a: Array, b: Array) -> Array:
    """a_i b for every stream i: [n, *tokens], [*tokens, C] -> [*tokens, n, C], as a broadcast.

    A stack of n products makes XLA's CPU fusions branch for every element.
    """
    return _spread(a) * b.astype(jnp.float32)[..., None, :]


def _add(terms) -> Array:
    return functools.reduce(jnp.add, terms)


def _as_streams(x: Array, n: int) -> Array:
    return x.reshape(*x.shape[:-1], n, x.shape[-1] // n).astype(jnp.float32)


@jax.custom_vjp
def _write(x, y, post, res):
    if choice.platform() != "cpu":
        return flat.write(x, y, post, res)
    n = post.shape[0]
    mixed = _add(_outer(res[:, j], xj) for j, xj in enumerate(split(x, n)))
    return once(mixed + _outer(post, y)).reshape(x.shape).astype(x.dtype)


def _write_bwd(saved, g):
    x, y, post, res = saved
    if choice.platform() != "cpu":
        return flat.write_gradients(x, y, post, res, g)
    n = post.shape[0]
    g = once(g)  # a sum of three gradients: of the projection, the read and the next write
    # Products a token: XLA:CPU has a library for these, and takes 3x as long for the same sums as a fusion of broadcasts.
    streams = _as_streams(g, n)
    dx = jnp.einsum("ij...,...ic->...jc", res, streams, precision="highest").reshape(x.shape).astype(x.dtype)
    dres = jnp.einsum("...ic,...jc->ij...", streams, _as_streams(x, n), precision="highest")
    return dx, *_post_gradients(y, post, g), dres


def _post_gradients(y, post, g):
    """Gradients of post_i y with respect to y and post."""
    if choice.platform() != "cpu":
        return flat.post_gradients(y, post, g)
    n = post.shape[0]
    dy = _add(post[i][..., None] * gi.astype(jnp.float32) for i, gi in enumerate(split(g, n)))
    dy = once(dy).astype(
        y.dtype
    )  # or it is computed again, column by column, in the transpose a weight's gradient needs
    dpost = jnp.einsum("...ic,...c->...i", _as_streams(g, n), y.astype(jnp.float32), precision="highest")
    return dy, jnp.moveaxis(dpost, -1, 0)


_write.defvjp(lambda *a: (_write(*a), a), _write_bwd)


@jax.custom_vjp
def _write_identity(x, y, post):
    if choice.platform() != "cpu":
        return flat.add_written(x, y, post)
    return once(_as_streams(x, post.shape[0]) + _outer(post, y)).reshape(x.shape).astype(x.dtype)


_write_identity.defvjp(
    lambda x, y, post: (_write_identity(x, y, post), (y, post)),
    lambda saved, g: (g, *_post_gradients(saved[0], saved[1], g)),
)
