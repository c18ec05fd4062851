"""DeepSeek-V4's and HY-V4's connections by this library, and the comparison with their golden values."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from mhc_kernels import coefficients, read, write
from support.tolerances import GOLDEN, assert_close

from mhc_jax import connections
from mhc_jax.connections.base import head_weights
from mhc_jax.connections.mhc_family import EPS_CONVENTIONS

EPS_NORM, EPS = EPS_CONVENTIONS["v4"]
INPUTS = ("x", "y", "fn", "base", "scale")


def load(name):
    path = Path(__file__).parent / "golden" / f"{name}.npz"
    return {k: jnp.asarray(v) for k, v in np.load(path).items()}


def transposed_res(rows, n):
    """The rows [pre | post | comb row-major] with comb transposed, which is H_res."""
    comb = rows[2 * n :].reshape(n, n, *rows.shape[1:])
    return jnp.concatenate([rows[: 2 * n], jnp.swapaxes(comb, 0, 1).reshape(n * n, *rows.shape[1:])])


def flattened(x):
    return x.reshape(*x.shape[:2], -1)


def deepseek_v4(x, y, fn, base, scale, n):
    """DeepSeek-V4's connection in its own layouts: x [B, T, n, C], fn [k, n C]."""
    flat, phi, bias = flattened(x), transposed_res(fn, n).T, transposed_res(base, n)
    c = coefficients(flat, phi, scale, bias, num_streams=n, num_iters=20, eps_norm=EPS_NORM, eps=EPS)
    comb = {"comb": jnp.moveaxis(c.res, (0, 1), (-1, -2))}
    return comb | _of_link(c, read(flat, c.pre, n), write(flat, y, c.post, c.res, n).reshape(x.shape))


def hy_v4(x, y, fn, base, scale, n):
    """HY-V4's connection in its own layouts, by the module of kind `identity`."""
    config = connections.parse(f"identity:eps_convention=hy_v4:num_streams={n}")
    link, flat = connections.connection_module(config)(config, x.shape[-1], 2, 0), flattened(x)
    params = {"params": {"phi": fn.T, "alpha": scale, "bias": base}}
    c = link.apply(params, flat, method="coefficients")
    h = link.apply(params, flat, c, method="read")
    return _of_link(c, h, link.apply(params, flat, c, y, method="write").reshape(x.shape))


def _of_link(c, h, x_out):
    return {"post": jnp.moveaxis(c.post, 0, -1), "h": h, "x_out": x_out}


def _check(module, g, n):
    """Compare results and gradients of all inputs with the golden values g, from one program."""

    def loss(*inputs):
        out = module(*inputs, n)
        return (out["h"] * g["w_h"]).sum() + (out["x_out"] * g["w_x"]).sum(), out

    grads, out = jax.jit(jax.grad(loss, range(5), has_aux=True))(*(g[k] for k in INPUTS))
    for name, value in (out | {f"grad_{k}": grad for k, grad in zip(INPUTS, grads, strict=True)}).items():
        assert_close(value, g[name], GOLDEN, name)


check_deepseek_v4 = functools.partial(_check, deepseek_v4)
check_hy_v4 = functools.partial(_check, hy_v4)


def check_head(g, n):
    flat = flattened(g["x"])
    weights = head_weights(flat, g["hc_fn"].T, g["hc_scale"], g["hc_base"], eps_norm=EPS_NORM, eps=EPS)
    assert_close(read(flat, weights, n), g["out"], GOLDEN, "out")
