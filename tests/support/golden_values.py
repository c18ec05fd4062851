"""DeepSeek-V4's and HY-V4's connections through ours, and the checks of their golden values."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from mhc_kernels import coefficients, read, write
from support.tolerances import GOLDEN, assert_close

from mhc_jax import connections
from mhc_jax.connections.base import head_weights
from mhc_jax.connections.dynamic import EPS_CONVENTIONS

EPS_NORM, EPS = EPS_CONVENTIONS["v4"]
FOLDER = Path(__file__).parent / "golden"


def transposed_res(rows, n):
    """Rows [pre | post | comb row-major] -> the same with comb^T, which is H_res."""
    comb = rows[2 * n :].reshape(n, n, *rows.shape[1:])
    return jnp.concatenate([rows[: 2 * n], jnp.swapaxes(comb, 0, 1).reshape(n * n, *rows.shape[1:])])


def connection(x, y, fn, base, scale, n):
    """V4's layouts in, V4's results out: x [B, T, n, C], fn [k, n C]."""
    flat = x.reshape(*x.shape[:2], -1)
    phi, bias = transposed_res(fn, n).T, transposed_res(base, n)
    c = coefficients(flat, phi, scale, bias, num_streams=n, num_iters=20, eps_norm=EPS_NORM, eps=EPS)
    x_out = write(flat, y, c.post, c.res, n).reshape(x.shape)
    return c, read(flat, c.pre, n), x_out


def load(name):
    return {k: jnp.asarray(v) for k, v in np.load(FOLDER / f"{name}.npz").items()}


def results(module, inputs, g):
    """(coefficients, h and x' of a module, the gradients of its inputs), from one program."""

    def loss(*a):
        c, h, x_out = module(*a)
        return (h * g["w_h"]).sum() + (x_out * g["w_x"]).sum(), (c, h, x_out)

    grads, out = jax.jit(jax.grad(loss, argnums=range(len(inputs)), has_aux=True))(*inputs)
    return out, grads


def check_deepseek_v4(g, n):
    inputs = [g[k] for k in ("x", "y", "fn", "base", "scale")]
    (c, h, x_out), grads = results(lambda *a: connection(*a, n), inputs, g)
    assert_close(jnp.moveaxis(c.post, 0, -1), g["post"], GOLDEN, "post")
    assert_close(jnp.moveaxis(c.res, (0, 1), (-1, -2)), g["comb"], GOLDEN, "comb")
    assert_close(h, g["h"], GOLDEN, "h")
    assert_close(x_out, g["x_out"], GOLDEN, "x_out")
    for name, grad in zip(("x", "y", "fn", "base", "scale"), grads, strict=True):
        assert_close(grad, g[f"grad_{name}"], GOLDEN, f"gradient of {name}")


def check_head(g, n):
    flat = g["x"].reshape(*g["x"].shape[:2], -1)
    weights = head_weights(flat, g["hc_fn"].T, g["hc_scale"], g["hc_base"], eps_norm=EPS_NORM, eps=EPS)
    assert_close(read(flat, weights, n), g["out"], GOLDEN, "out")


def identity(x, y, fn, base, scale, n):
    """HY-V4's layouts in and out, through the module of kind `identity`."""
    config = connections.parse(f"identity:eps_convention=hy_v4:num_streams={n}")
    link = connections.connection_module(config)(config, x.shape[-1], 2, 0)
    flat = x.reshape(*x.shape[:2], -1)
    params = {"params": {"phi": fn.T, "alpha": scale, "bias": base}}
    c = link.apply(params, flat, method="coefficients")
    h = link.apply(params, flat, c, method="read")
    return c, h, link.apply(params, flat, c, y, method="write").reshape(x.shape)


def check_hy_v4(g, n):
    inputs = [g[k] for k in ("x", "y", "fn", "base", "scale")]
    (c, h, x_out), grads = results(lambda *a: identity(*a, n), inputs, g)
    assert_close(jnp.moveaxis(c.post, 0, -1), g["post"], GOLDEN, "post")
    assert_close(h, g["h"], GOLDEN, "h")
    assert_close(x_out, g["x_out"], GOLDEN, "x_out")
    for name, grad in zip(("x", "y", "fn", "base", "scale"), grads, strict=True):
        assert_close(grad, g[f"grad_{name}"], GOLDEN, f"gradient of {name}")
