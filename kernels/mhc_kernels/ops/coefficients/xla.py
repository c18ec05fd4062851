"""The RMS and the projection z of each token for plain XLA, with a hand-written gradient."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import Array

from mhc_kernels import backend_choice
from mhc_kernels.ops.rms_norm import inverse_rms


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def projection(x: Array, phi: Array, eps_norm: float) -> Array:
    """Project x [*tokens, C] with phi [C, k] to z [k, *tokens]; `mhc_kernels.projection` has the formula."""
    return _projection_fwd(x, phi, eps_norm)[0]


def _projection_fwd(x, phi, eps_norm):
    """Return z, and the arrays that the gradient needs: x, phi, 1 / RMS and z.

    On CPUs, all token axes are merged into one, and z is kept for the gradient as [tokens, k] instead of [k, *tokens].
    """
    if backend_choice.platform() != "cpu":
        v = x.astype(jnp.float32)
        inverse = inverse_rms(jnp.mean(v * v, axis=-1), eps_norm)
        z = jnp.einsum("...c,ck->k...", v, phi, precision="highest") * inverse[None]
        return z, (x, phi, inverse, z)
    v = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
    inverse = inverse_rms(jnp.einsum("tc,tc->t", v, v, precision="highest") / v.shape[-1], eps_norm)
    z = jnp.matmul(v, phi, precision="highest") * inverse[:, None]
    return z.T.reshape(-1, *x.shape[:-1]), (x, phi, inverse, z)


def _projection_bwd(_, saved, g):
    r"""Return the gradients of x and phi for $z = s\, v \phi$ with v = x and $s = (\mathrm{mean}(v^2) + \epsilon)^{-1/2}$.

    With a bar for the gradient of a quantity,
    $\bar v = s\, \bar z \phi^\top - (\bar z \cdot z)\, s^2 v / C$ and $\bar \phi = v^\top (s\, \bar z)$.
    """
    x, phi, inverse, z = saved
    if backend_choice.platform() != "cpu":
        v, scaled = x.astype(jnp.float32), g * inverse[None]
        shrink = jnp.sum(scaled * z, axis=0) * inverse / x.shape[-1]
        dv = jnp.einsum("k...,ck->...c", scaled, phi, precision="highest") - shrink[..., None] * v
        return dv.astype(x.dtype), jnp.einsum("...c,k...->ck", v, scaled, precision="highest")
    v = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
    scaled = g.reshape(g.shape[0], -1) * inverse[None]
    shrink = jnp.einsum("kt,tk->t", scaled, z, precision="highest") * inverse / v.shape[-1]
    dv = jnp.matmul(scaled.T, phi.T, precision="highest") - shrink[:, None] * v
    # On CPUs the product [k, t] [t, C] takes a fifth of the time of its transpose, the product [C, t] [t, k].  The barrier keeps
    # XLA from computing the transpose.
    dphi = jax.lax.optimization_barrier(jnp.matmul(scaled, v, precision="highest")).T
    return dv.reshape(x.shape).astype(x.dtype), dphi


projection.defvjp(_projection_fwd, _projection_bwd)
