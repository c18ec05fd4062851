"""What a backend is, and the custom VJP that all backends of an operation share.

A backend is a module `ops/<op>/<backend>.py` of plain functions on flat arrays (N tokens), without autodiff of its own:

    sinkhorn      forward(logits[n, n, N], num_iters, eps) -> res[n, n, N]
                  backward(logits, g, num_iters, eps) -> dlogits
    coefficients  forward(x[N, nC], phi[nC, k], eps_norm) -> z[k, N], inverse[N]           (inverse = 1 / RMS)
                  backward(x, phi, z, inverse, g[k, N]) -> dx, dphi
    read          forward(x[N, nC], pre[n, N]) -> h[N, C]
                  backward(x, pre, g[N, C]) -> dx, dpre
    write         forward(x[N, nC], y[N, C], post[n, N], res[n, n, N]) -> x'[N, nC]
                  backward(x, y, post, res, g[N, nC]) -> dx, dy, dpost, dres
    write_read    forward(x, y, post, res, phi, alpha_pre[], bias_pre[n], eps_norm, eps) -> x', z, inverse, h
                  read_products(x'[N, nC], g_h[N, C]) -> dpre[n, N] = <x'_i, g_h>
                  backward(x, y, post, res, x', pre, phi, z, inverse, g_x', g_h, g_z[k, N]) -> dx, dy, dpost, dres, dphi

and `obstacle(num_streams, width, dtypes) -> str | None`: why it cannot run such a call.  Coefficients are float32; x, y, h
and their gradients share one dtype.  What is small (gates, and everything per token) is XLA's, around the kernels.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import jax

from mhc_kernels.choice import choose

BACKENDS: dict[str, tuple[str, ...]] = {
    "sinkhorn": ("pallas_tpu", "pallas_gpu", "triton"),
    "coefficients": ("pallas_tpu", "pallas_gpu"),
    "read": ("pallas_tpu", "pallas_gpu"),
    "write": ("pallas_tpu", "pallas_gpu"),
    "write_read": ("pallas_tpu", "pallas_gpu"),
}
"""Backends of each operation beside `xla`."""


def _module(op: str, backend: str) -> Any:
    return importlib.import_module(f"mhc_kernels.ops.{op}.{backend}")


def pick(op: str, implementation: str | None, num_streams: int, width: int, dtypes: Any, refuse: str | None) -> str:
    """See `choose`; `refuse` is a reason that holds for every kernel."""

    def obstacle(backend: str) -> str | None:
        return refuse or _module(op, backend).obstacle(num_streams, width, dtypes)

    return choose(op, implementation, {b: functools.partial(obstacle, b) for b in BACKENDS[op]})


def _custom_vjp(*static: int) -> Callable[[Callable[..., Any]], Any]:
    return lambda function: jax.custom_vjp(function, nondiff_argnums=static)


@_custom_vjp(1, 2, 3)
def sinkhorn(logits, num_iters, eps, backend):
    """H_res of `logits`[n, n, N]; only the logits are kept."""
    return _module("sinkhorn", backend).forward(logits, num_iters, eps)


def _sinkhorn_bwd(num_iters, eps, backend, logits, g):
    return (_module("sinkhorn", backend).backward(logits, g, num_iters, eps),)


sinkhorn.defvjp(lambda logits, *static: (sinkhorn(logits, *static), logits), _sinkhorn_bwd)


@_custom_vjp(2, 3)
def projection(x, phi, eps_norm, backend):
    """z[k, N] of x[N, nC]."""
    return _module("coefficients", backend).forward(x, phi, eps_norm)[0]


def _projection_fwd(x, phi, eps_norm, backend):
    z, inverse = _module("coefficients", backend).forward(x, phi, eps_norm)
    return z, (x, phi, z, inverse)


projection.defvjp(
    _projection_fwd, lambda eps_norm, backend, saved, g: _module("coefficients", backend).backward(*saved, g)
)


@_custom_vjp(2)
def read(x, pre, backend):
    """h[N, C] of x[N, nC]."""
    return _module("read", backend).forward(x, pre)


read.defvjp(
    lambda x, pre, backend: (read(x, pre, backend), (x, pre)),
    lambda backend, saved, g: _module("read", backend).backward(*saved, g),
)


@_custom_vjp(4)
def write(x, y, post, res, backend):
    """x'[N, nC] of x[N, nC] and y[N, C]."""
    return _module("write", backend).forward(x, y, post, res)


write.defvjp(
    lambda x, y, post, res, backend: (write(x, y, post, res, backend), (x, y, post, res)),
    lambda backend, saved, g: _module("write", backend).backward(*saved, g),
)


def _pre(z, alpha, bias, n, eps):
    return jax.nn.sigmoid(alpha[0] * z[:n] + bias[:n].reshape(n, *(1,) * (z.ndim - 1))) + eps


@_custom_vjp(7, 8, 9)
def write_read(x, y, post, res, phi, alpha, bias, eps_norm, eps, backend):
    """(x', z, h); z carries the gradient of the coefficients, and h that of the read."""
    return _write_read_fwd(x, y, post, res, phi, alpha, bias, eps_norm, eps, backend)[0]


def _write_read_fwd(x, y, post, res, phi, alpha, bias, eps_norm, eps, backend):
    n = post.shape[0]
    kernel = _module("write_read", backend)
    new, z, inverse, h = kernel.forward(x, y, post, res, phi, alpha[0], bias[:n], eps_norm, eps)
    return (new, z, h), (x, y, post, res, phi, alpha, bias, new, z, inverse)


def _write_read_bwd(eps_norm, eps, backend, saved, g):
    """Two phases over the streams: <x'_i, g_h>, which the gates need, then everything else in one pass."""
    x, y, post, res, phi, alpha, bias, new, z, inverse = saved
    g_new, g_z, g_h = g
    n = post.shape[0]
    kernel = _module("write_read", backend)
    pre, pull = jax.vjp(lambda z, alpha, bias: _pre(z, alpha, bias, n, eps), z, alpha, bias)
    dz, dalpha, dbias = pull(kernel.read_products(new, g_h))
    dx, dy, dpost, dres, dphi = kernel.backward(x, y, post, res, new, pre, phi, z, inverse, g_new, g_h, g_z + dz)
    return dx, dy, dpost, dres, dphi, dalpha, dbias


write_read.defvjp(_write_read_fwd, _write_read_bwd)
