r"""What a backend must provide, and the custom gradient of each operation, which all backends of the operation share.

A backend is a module `ops/<op>/<backend>.py` of plain functions on arrays of N tokens.  JAX does not differentiate them; each
backend has its own `backward`, in which g is the gradient of the result and dx is the gradient of x:

    sinkhorn      forward(logits[n, n, N], num_iters, eps) -> res[n, n, N]
                  backward(logits, g, num_iters, eps) -> dlogits
    coefficients  forward(x[N, nC], phi[nC, k], eps_norm) -> z[k, N], inverse[N]           (inverse = 1 / RMS)
                  backward(x, phi, z, inverse, g[k, N]) -> dx, dphi
    read          forward(x[N, nC], pre[n, N]) -> h[N, C]
                  backward(x, pre, g[N, C]) -> dx, dpre
    write         forward(x[N, nC], y[N, C], post[n, N], res[n, n, N]) -> x'[N, nC]
                  backward(x, y, post, res, g[N, nC]) -> dx, dy, dpost, dres
    write_read    forward(x, y, post, res, phi, alpha_pre[], bias_pre[n], eps_norm, eps) -> x', z, inverse, h
                  KEEPS_NEW: whether `backward` reads x'; otherwise it makes x' again from x and y
                  backward(saved, pre, slope[n, N], g_x', g_h, g_z[k, N]) -> dx, dy, dpost, dres, dphi, dpre

A backend also has `obstacle(num_streams, width, dtypes) -> str | None`, which returns why it cannot run such a call.  Coefficients
are float32; x, y, h and their gradients share one dtype.  XLA turns z into coefficients, outside the kernels.

The backward pass of `write_read` first makes the gradient of H_pre, $dH^{pre}_i = \langle x'_i, g_h \rangle$.  The first n rows
of g_z then grow by `slope` times dpre, where `slope` is the derivative of H_pre by z (`through_pre`).  After that it makes the
gradient G_i of each new stream x'_i once, as a sum over all uses of x'.  With the gradients g_x', g_h and g_z of the three results,
it is

    $G_i = g_{x'_i} + H^{pre}_i g_h + s\, (g_z \phi^\top)_i - \frac{s^2}{nC} \langle g_z, z \rangle x'_i$,  with s = `inverse`

    $dx_j = \sum_i H^{res}_{ij} G_i$,  $dy = \sum_i H^{post}_i G_i$,  $dH^{post}_i = \langle G_i, y \rangle$,
    $dH^{res}_{ij} = \langle G_i, x_j \rangle$,  $d\phi = s\, x'^\top g_z$
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from mhc_kernels.backend_choice import choose

BACKENDS: dict[str, tuple[str, ...]] = {
    "sinkhorn": ("pallas_tpu", "pallas_gpu", "triton"),
    "coefficients": ("pallas_tpu", "pallas_gpu"),
    "read": ("pallas_tpu", "pallas_gpu"),
    "write": ("pallas_tpu", "pallas_gpu"),
    "write_read": ("pallas_tpu", "pallas_gpu"),
}
"""For each operation, the names of the backends that have kernels for it."""


class Saved(NamedTuple):
    """Arrays that the forward pass of `write_read` keeps for its backward pass."""

    x: Array
    y: Array
    post: Array
    res: Array
    phi: Array
    new: Any
    """The new streams x' as an array, rounded to the dtype of x, or None if the backend makes them again."""
    z: Array
    inverse: Array


def _module(op: str, backend: str) -> Any:
    return importlib.import_module(f"mhc_kernels.ops.{op}.{backend}")


def pick(op: str, implementation: str | None, num_streams: int, width: int, dtypes: Any, refuse: str | None) -> str:
    """Return the name of the implementation that will run a call (see `choose`).

    `refuse` is a reason why no kernel can run the call, or None.
    """

    def obstacle(backend: str) -> str | None:
        return refuse or _module(op, backend).obstacle(num_streams, width, dtypes)

    return choose(op, implementation, {b: functools.partial(obstacle, b) for b in BACKENDS[op]})


STREAMS = -1
"""Stands for an array [*tokens, channels] where other arrays have the number of their axes in front of the token axes."""


def flat(a: Array, leading: int) -> Array:
    """Merge the token axes of an array: [*tokens, C] -> [N, C] if `leading` is `STREAMS`, else [k, ..., *tokens] -> [k, ..., N]."""
    return a.reshape(-1, a.shape[-1]) if leading == STREAMS else a.reshape(*a.shape[:leading], -1)


def _keeping_arguments(op: str, leading: tuple[int, ...], result: int, static: int = 0) -> Any:
    """Make an operation f(*arrays, *static, backend) whose custom gradient keeps nothing but the arguments *arrays.

    The arrays have token axes, which are merged for the backend.  The gradient keeps them as they came: an array that another
    operation made or keeps as well is then kept once, also where `jax.shard_map` hides that a merged copy is the same array.

    Args:
      op: name of the operation.
      leading: for each array `STREAMS`, or its number of axes in front of the token axes.
      result: the same for the result.
      static: number of further arguments, which are no arrays.
    """
    count = len(leading)

    def forward(*args):
        *rest, backend = args
        out = _module(op, backend).forward(*map(flat, rest[:count], leading), *rest[count:])
        first = rest[0].shape
        tokens = first[:-1] if leading[0] == STREAMS else first[leading[0] :]
        return out.reshape(*tokens, -1) if result == STREAMS else out.reshape(*out.shape[:result], *tokens)

    def backward(*args):
        *static, backend, saved, g = args
        gradients = _module(op, backend).backward(*map(flat, saved, leading), flat(g, result), *static)
        gradients = gradients if isinstance(gradients, tuple) else (gradients,)
        return tuple(d.reshape(a.shape) for d, a in zip(gradients, saved, strict=True))

    run = jax.custom_vjp(forward, nondiff_argnums=tuple(range(count, count + static + 1)))
    run.defvjp(lambda *args: (forward(*args), args[:count]), backward)
    return run


sinkhorn = _keeping_arguments("sinkhorn", (2,), 2, static=2)
read = _keeping_arguments("read", (STREAMS, 1), STREAMS)
write = _keeping_arguments("write", (STREAMS, STREAMS, 1, 2), STREAMS)


def _projection_fwd(x, phi, eps_norm, backend):
    z, inverse = _module("coefficients", backend).forward(flat(x, STREAMS), phi, eps_norm)
    return z, (x, phi, z, inverse)


def _projection_bwd(eps_norm, backend, saved, g):
    x, *others = saved
    dx, dphi = _module("coefficients", backend).backward(flat(x, STREAMS), *others, g)
    return dx.reshape(x.shape), dphi


projection: Any = jax.custom_vjp(lambda *args: _projection_fwd(*args)[0], nondiff_argnums=(2, 3))
"""The function f(x, phi, eps_norm, backend) that projects x[*tokens, nC] to z[k, N], with a custom gradient."""
projection.defvjp(_projection_fwd, _projection_bwd)


def _pre(z, alpha, bias, n, eps):
    return jax.nn.sigmoid(alpha[0] * z[:n] + bias[:n].reshape(n, *(1,) * (z.ndim - 1))) + eps


_BOUNDARY = (STREAMS, STREAMS, 1, 2)
"""How the token axes lie in x, y, post and res, the first arguments of `write_read`."""


def _merged(backend: str, arrays: Sequence[Array], leading: Sequence[int]) -> list[Array]:
    """Merge the token axes of arrays for a backend with kernels.  `xla` takes any token axes."""
    return list(arrays) if backend == "xla" else [flat(a, k) for a, k in zip(arrays, leading, strict=True)]


def _write_read_fwd(x, y, post, res, phi, alpha, bias, eps_norm, eps, backend):
    n = post.shape[0]
    kernel = _module("write_read", backend)
    merged = _merged(backend, (x, y, post, res), _BOUNDARY)
    new, z, inverse, h = kernel.forward(*merged, phi, alpha[0], bias[:n], eps_norm, eps)
    # The gradient keeps x and x' with all their token axes, as `_keeping_arguments` does.
    new = new.reshape(x.shape)
    kept = new if kernel.KEEPS_NEW else None
    return (new, z, h.reshape(y.shape)), (Saved(x, y, post, res, phi, kept, z, inverse), alpha, bias)


def through_pre(g_z: Array, slope: Array, dpre: Array) -> Array:
    """Return the gradient of z [k, N] with the part that reaches z through H_pre, for g_z without it, slope and dpre [n, N]."""
    n = len(dpre)
    return jnp.concatenate([g_z[:n] + slope * dpre, g_z[n:]])


def _write_read_bwd(eps_norm, eps, backend, kept, g):
    """Return the gradients of the arguments of `write_read`; those of alpha and bias follow from that of H_pre."""
    (saved, alpha, bias), (g_new, g_z, g_h) = kept, g
    arguments = saved[:4]
    kernel, n = _module("write_read", backend), len(saved.post)
    x, y, post, res = _merged(backend, arguments, _BOUNDARY)
    g_new, g_h = _merged(backend, (g_new, g_h), (STREAMS,) * 2)
    new = None if saved.new is None else _merged(backend, (saved.new,), (STREAMS,))[0]
    saved = Saved(x, y, post, res, saved.phi, new, saved.z, saved.inverse)
    pre, pull = jax.vjp(lambda z, alpha, bias: _pre(z, alpha, bias, n, eps), saved.z, alpha, bias)
    slope = pull(jnp.ones_like(pre))[0][:n]
    *each, dphi, dpre = kernel.backward(saved, pre, slope, g_new, g_h, g_z)
    return *(d.reshape(a.shape) for d, a in zip(each, arguments, strict=True)), dphi, *pull(dpre)[1:]


write_read: Any = jax.custom_vjp(lambda *args: _write_read_fwd(*args)[0], nondiff_argnums=(7, 8, 9))
"""The function f(x, y, post, res, phi, alpha, bias, eps_norm, eps, backend) -> x', z, h for the boundary, with a custom gradient.

The caller makes the coefficients of the next sub-layer from z, so their gradient reaches this function as the gradient of z.
"""
write_read.defvjp(_write_read_fwd, _write_read_bwd)
