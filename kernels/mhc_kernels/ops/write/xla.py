"""The write x' = H_res x + H_post^T y on flat streams for plain XLA, with a hand-written gradient."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array

from mhc_kernels import backend_choice
from mhc_kernels.layout import split
from mhc_kernels.xla import add, dots, join, once, streams, weighted


def write(x: Array, y: Array, post: Array | None, res: Array | None, num_streams: int) -> Array:
    """Map x [*tokens, nC], y [*tokens, C], post [n, *tokens], res [n, n, *tokens] -> x', as `mhc_kernels.write` does."""
    if post is None and res is None:
        if num_streams == 1:
            return x + y.astype(x.dtype)
        return (x.astype(jnp.float32) + jnp.tile(y.astype(jnp.float32), num_streams)).astype(x.dtype)
    if post is None:
        post = jnp.ones((num_streams, *y.shape[:-1]), jnp.float32)
    return _write_identity(x, y, post) if res is None else _write(x, y, post, res)


def mixed(x: Array, y: Array, post: Array, res: Array) -> list[Array]:
    """Return the n new streams x'_i of a write as a list of float32 arrays [*tokens, C]."""
    xs, y32 = streams(x, len(post)), y.astype(jnp.float32)
    return [weighted(row, xs) + p[..., None] * y32 for row, p in zip(res, post, strict=True)]


def pull(gs: Sequence[Array], x: Array, y: Array, post: Array, res: Array) -> tuple[Array, Array, Array, Array]:
    """Return dx, dy, dpost and dres of a write from `gs`, the gradients of the n new streams, float32 [*tokens, C] each."""
    n = len(post)
    dx = join([weighted(res[:, j], gs) for j in range(n)], x)
    dres = jnp.stack([dots(gs, xj) for xj in streams(x, n)], axis=1)
    return dx, *_pull_post(gs, y, post), dres


def _pull_post(gs: Sequence[Array], y: Array, post: Array) -> tuple[Array, Array]:
    return weighted(post, gs).astype(y.dtype), dots(gs, y.astype(jnp.float32))


def _outer(a: Array, b: Array) -> Array:
    """Return a_i b for every stream i, made by broadcasting: a [n, *tokens], b [*tokens, C] -> [*tokens, n, C].

    If n products were stacked instead, XLA's CPU fusions would branch for every element.
    """
    return jnp.moveaxis(a, 0, -1)[..., None] * b.astype(jnp.float32)[..., None, :]


def _as_streams(x: Array, n: int) -> Array:
    return x.reshape(*x.shape[:-1], n, x.shape[-1] // n).astype(jnp.float32)


@jax.custom_vjp
def _write(x, y, post, res):
    if backend_choice.platform() != "cpu":
        return join(mixed(x, y, post, res), x)
    total = add(_outer(res[:, j], xj) for j, xj in enumerate(split(x, len(post))))
    return once(total + _outer(post, y)).reshape(x.shape).astype(x.dtype)


def _write_bwd(saved, g):
    """Return dx_j = sum_i res_ij g_i, dy = sum_i post_i g_i, dpost_i = <g_i, y>, dres_ij = <g_i, x_j>; g is the gradient of x'."""
    x, y, post, res = saved
    n = len(post)
    if backend_choice.platform() != "cpu":
        return pull(streams(g, n), x, y, post, res)
    # `once` makes XLA compute g a single time.  g is the sum of the gradients from the next projection, read and write.
    g = once(g)
    # On CPUs einsum calls a library for small matrix products.  As a fusion of broadcasts, the same sums take 3x as long.
    gs = _as_streams(g, n)
    dx = jnp.einsum("ij...,...ic->...jc", res, gs, precision="highest").reshape(x.shape).astype(x.dtype)
    dres = jnp.einsum("...ic,...jc->ij...", gs, _as_streams(x, n), precision="highest")
    return dx, *_post_gradients(y, post, g), dres


def _post_gradients(y, post, g):
    """Return the gradients dy and dpost of a write, where g is the gradient of x'."""
    n = len(post)
    if backend_choice.platform() != "cpu":
        return _pull_post(streams(g, n), y, post)
    dy = weighted(post, streams(g, n))
    # Without `once`, XLA:CPU computes dy again, column by column, where it transposes dy for the gradient of a weight.
    dy = once(dy).astype(y.dtype)
    dpost = jnp.einsum("...ic,...c->...i", _as_streams(g, n), y.astype(jnp.float32), precision="highest")
    return dy, jnp.moveaxis(dpost, -1, 0)


_write.defvjp(lambda *args: (_write(*args), args), _write_bwd)


@jax.custom_vjp
def _write_identity(x, y, post):
    """Return the new streams x' = x + H_post^T y of a write whose H_res is the identity."""
    if backend_choice.platform() == "cpu":
        return once(_as_streams(x, len(post)) + _outer(post, y)).reshape(x.shape).astype(x.dtype)
    y32 = y.astype(jnp.float32)
    return join([xi + p[..., None] * y32 for xi, p in zip(streams(x, len(post)), post, strict=True)], x)


_write_identity.defvjp(
    lambda x, y, post: (_write_identity(x, y, post), (y, post)),
    lambda saved, g: (g, *_post_gradients(saved[0], saved[1], g)),
)
