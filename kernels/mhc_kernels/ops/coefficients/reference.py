"""Token-wise coefficients of mHC (Eq. 7 and 8).  The semantics of the op."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mhc_kernels import choice
from mhc_kernels.ops import flat
from mhc_kernels.ops.rms import inverse_rms
from mhc_kernels.ops.sinkhorn.reference import sinkhorn

PARTS = ("pre", "post", "res")


class Coefficients(NamedTuple):
    """Float32 coefficients of one sub-layer, small axes first and tokens last.

    None stands for the disabled component: pre 1/n, post 1, res the identity.
    """

    pre: Float[Array, "n *tokens"] | None
    """H_pre: what the branch reads is sum_i pre_i x_i."""
    post: Float[Array, "n *tokens"] | None
    """H_post: stream i receives post_i y."""
    res: Float[Array, "n n *tokens"] | None
    """H_res: stream i receives sum_j res_ij x_j."""


def columns(num_streams: int, parts: tuple[str, ...] = PARTS) -> dict[str, slice]:
    """Columns of phi (and entries of bias) for each part: [pre n | post n | res n*n, row-major]."""
    sizes = {"pre": num_streams, "post": num_streams, "res": num_streams**2}
    out, start = {}, 0
    for part in parts:
        out[part] = slice(start, start + sizes[part])
        start += sizes[part]
    return out


def projection(x: Float[Array, "*tokens C"], phi: Float[Array, "C k"], eps_norm: float) -> Float[Array, "k *tokens"]:
    """See `mhc_kernels.projection`, whose meaning this is."""
    # Under shard_map phi is one value for all shards and x is not: the cast makes its gradient the sum over shards.
    varying = tuple(jax.typeof(x).manual_axis_type.varying - jax.typeof(phi).manual_axis_type.varying)
    return _projection(x, jax.lax.pcast(phi, varying, to="varying") if varying else phi, eps_norm)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _projection(x: Array, phi: Array, eps_norm: float) -> Array:
    return _projection_fwd(x, phi, eps_norm)[0]


def _projection_fwd(x, phi, eps_norm):
    if choice.platform() != "cpu":
        return flat.projection(x, phi, eps_norm)
    v = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
    inverse = inverse_rms(jnp.einsum("tc,tc->t", v, v, precision="highest") / v.shape[-1], eps_norm)
    z = jnp.matmul(v, phi, precision="highest") * inverse[:, None]
    return z.T.reshape(-1, *x.shape[:-1]), (x, phi, inverse, z)


def _projection_bwd(_, saved, g):
    """z = r v phi with r = (mean(v^2) + eps)^-1/2, so dv = r g phi^T - (g . z) r^2 v / C."""
    x, phi, inverse, z = saved
    if choice.platform() != "cpu":
        return flat.projection_gradients(x, phi, inverse, z, g)
    v = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
    scaled = g.reshape(g.shape[0], -1) * inverse[None]
    shrink = jnp.einsum("kt,tk->t", scaled, z, precision="highest") * inverse / v.shape[-1]
    dv = jnp.matmul(scaled.T, phi.T, precision="highest") - shrink[:, None] * v
    # [k, t] [t, C] takes a fifth of the time of [C, t] [t, k] on CPUs; without the barrier XLA turns it round.
    dphi = jax.lax.optimization_barrier(jnp.matmul(scaled, v, precision="highest")).T
    return dv.reshape(x.shape).astype(x.dtype), dphi


_projection.defvjp(_projection_fwd, _projection_bwd)


def gates(
    z: Float[Array, "k *tokens"],
    alpha: Float[Array, " parts"],
    bias: Float[Array, " k"],
    *,
    num_streams: int,
    parts: tuple[str, ...] = PARTS,
    num_iters: int = 20,
    eps: float = 0.0,
    sinkhorn: Callable[..., Any] = sinkhorn,
) -> Coefficients:
    """Coefficients from the projected statistics z; arguments as those of `coefficients`.

    Traffic per token: reads and writes n^2 + 2 n float32, whatever C.
    """
    n = num_streams
    where = columns(n, parts)
    tokens = (None,) * (z.ndim - 1)
    logits = {
        part: alpha[k] * z[where[part]] + bias[where[part]][(slice(None), *tokens)] for k, part in enumerate(parts)
    }
    return Coefficients(
        pre=jax.nn.sigmoid(logits["pre"]) + eps if "pre" in parts else None,
        post=2 * jax.nn.sigmoid(logits["post"]) if "post" in parts else None,
        res=sinkhorn(logits["res"].reshape(n, n, *z.shape[1:]), num_iters, eps) if "res" in parts else None,
    )


def coefficients(
    x: Float[Array, "*tokens nC"],
    phi: Float[Array, "nC k"],
    alpha: Float[Array, " parts"],
    bias: Float[Array, " k"],
    *,
    num_streams: int,
    eps_norm: float = 1e-20,
    **options: Any,
) -> Coefficients:
    """`projection`, then `gates`.  See `mhc_kernels.coefficients`."""
    return gates(projection(x, phi, eps_norm), alpha, bias, num_streams=num_streams, **options)
