"""Checks that compare each operation of mhc_kernels, its value and every gradient, with the float64 loops."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from mhc_kernels import Coefficients, coefficients, read, settings, sinkhorn, write, write_read
from support import oracles
from support.tolerances import FP32_RELATIVE, assert_close, assert_rounded

PARAMETERS = ("phi", "alpha", "bias")


def f64(a):
    """Copy to float64 on the host."""
    return np.asarray(a, np.float64)


def inputs(n, C, T, dtype=jnp.float32, seed=0):
    """Draw normal arguments of the operations, by name: streams in `dtype`, coefficients and parameters float32."""
    r, k = np.random.default_rng([n, C, T, seed]), n * n + 2 * n
    shapes = dict(x=(T, n * C), y=(T, C), pre=(n, T), post=(n, T), res=(n, n, T), phi=(n * C, k), bias=(k,))
    made = {name: r.normal(size=s).astype(dtype if name in "xy" else np.float32) for name, s in shapes.items()}
    return made | {"phi": made["phi"] / np.float32(np.sqrt(n * C)), "alpha": np.array([0.5, 0.7, 0.9], np.float32)}


def pulled(f):
    """Make the function (arguments, cotangent) -> (value, gradients of the arguments): one program, as a user runs it."""

    def run(args, cotangent):
        out, pull = jax.vjp(f, *args)
        return out, pull(cotangent)

    return jax.jit(run)


def sinkhorn_oracle(logits, G, t_max, eps):
    """Return H_res and the gradient of sum(G * H_res) for one matrix."""
    if eps == 0:
        return oracles.sinkhorn_log(logits, t_max), oracles.sinkhorn_vjp(logits, G, t_max)

    def value(L):
        return oracles.sinkhorn_v4(L.T, t_max, eps).T  # DeepSeek's comb is the transpose of H_res

    return value(logits), oracles.numerical_gradient(lambda L: (G * value(L)).sum(), [logits])[0]


def check_sinkhorn(*groups, t_max=None, eps=0.0):
    """Check value and gradient of each group of logits [n, n, T]: all tokens of a small group, three of a large one."""
    logits = np.concatenate(groups, -1).astype(np.float32)
    G = np.random.default_rng(len(logits)).normal(size=logits.shape).astype(np.float32)
    named = {} if t_max is None else {"num_iters": t_max}
    out, (grad,) = pulled(lambda L: sinkhorn(L, eps=eps, **named))((logits,), G)
    first, t_max = 0, t_max or 20
    for group in groups:
        T = group.shape[-1]
        some = first + np.array(range(T) if T <= 70 and eps == 0 else sorted({0, min(3, T - 1), T - 1}))
        pairs = [sinkhorn_oracle(f64(logits[..., t]), f64(G[..., t]), t_max, eps) for t in some]
        value, gradient = (np.stack(a, -1) for a in zip(*pairs, strict=True))
        for at in np.arange(len(some))[:, None] if eps else [slice(None)]:  # with eps each matrix has its bound
            t, H_res = some[at], value[..., at]
            assert_close(out[..., t], H_res, what="H_res")
            # The gradient is G * H_res less its projections on the marginals, which nearly cancel it near a permutation.
            assert_close(grad[..., t], gradient[..., at], what="gradient", terms=G[..., t] * H_res)
        first += T


def extreme_logits(n):
    """Make three groups of one matrix: a column has all the mass, a row has no share in it, a row lies 200 below the others."""
    logits = np.full((n, n, 3), -80.0)
    logits[:, 0] = 80.0
    logits[0, :, 1] = -80.0
    logits[..., 2] = 0.0
    logits[0, :, 2] = -200.0
    return np.split(logits, 3, -1)


def check_read(n, C, T, dtype=jnp.float32):
    a, g = inputs(n, C, T, dtype), inputs(n, C, T, dtype, 1)["y"]
    h, (dx, dpre) = pulled(lambda x, pre: read(x, pre, n))((a["x"], a["pre"]), g)
    X, pre, G = f64(a["x"]).reshape(T, n, C), f64(a["pre"]).T, f64(g)
    close = assert_close if dtype == jnp.float32 else assert_rounded
    assert h.dtype == dx.dtype == dtype
    close(h, [oracles.read(X[t], pre[t]) for t in range(T)], what="h")
    close(dx, [np.outer(pre[t], G[t]).ravel() for t in range(T)], what="dx")
    assert_close(dpre, np.stack([X[t] @ G[t] for t in range(T)], -1), what="dpre")


def check_write(n, C, T, dtype=jnp.float32, with_res=True):
    a, g = inputs(n, C, T, dtype), inputs(n, C, T, dtype, 1)["x"]
    args = [a["x"], a["y"], a["post"], a["res"] if with_res else None]
    new, (dx, dy, dpost, dres) = pulled(lambda *args: write(*args, n))(args, g)
    X, G, Y, post = f64(a["x"]).reshape(T, n, C), f64(g).reshape(T, n, C), f64(a["y"]), f64(a["post"]).T
    res = [f64(a["res"])[..., t] if with_res else np.eye(n) for t in range(T)]
    close = assert_close if dtype == jnp.float32 else assert_rounded
    assert new.dtype == dx.dtype == dy.dtype == dtype
    close(new, [oracles.write(X[t], Y[t], post[t], res[t]).ravel() for t in range(T)], what="x'")
    close(dx, [(res[t].T @ G[t]).ravel() for t in range(T)], what="dx")
    close(dy, [post[t] @ G[t] for t in range(T)], what="dy")
    assert_close(dpost, np.stack([G[t] @ Y[t] for t in range(T)], -1), what="dpost")
    if with_res:
        assert_close(dres, np.stack([G[t] @ X[t].T for t in range(T)], -1), what="dres")


def cotangents(n, T):
    """Draw cotangents of pre, post and res."""
    made = inputs(n, 1, T, seed=2)
    return made["pre"], made["post"], made["res"]


def check_coefficients(n, C, T, dtype=jnp.float32, t_max=None, streams=FP32_RELATIVE):
    """Check the coefficients; `streams` bounds the gradient of x.  A sum over tokens is rounded relative to its largest parts."""
    a, Gs = inputs(n, C, T, dtype), cotangents(n, T)
    named = {} if t_max is None else {"num_iters": t_max}

    def f(*args):
        return tuple(coefficients(*args, num_streams=n, **named))

    c, grads = pulled(f)([a[name] for name in ("x", *PARAMETERS)], Gs)
    X, exact, t_max = f64(a["x"]).reshape(T, n, C), [f64(a[name]) for name in PARAMETERS], t_max or 20
    expected = [oracles.mhc_coefficients(v, *exact, t_max) for v in X]
    parts = [oracles.mhc_coefficients_vjp(v, *exact, *(f64(G[..., t]) for G in Gs), t_max) for t, v in enumerate(X)]
    for k, name in enumerate(("pre", "post", "res")):
        assert_close(c[k], np.stack([e[k] for e in expected], -1), what=name)
    assert_close(grads[0], np.stack([p[0].ravel() for p in parts]), streams, "dx")
    for k, name in enumerate(PARAMETERS, 1):
        largest = sum(np.abs(p[k]) for p in parts).max() / np.sqrt(T)
        assert_close(grads[k], sum(p[k] for p in parts), what=f"d{name}", terms=largest if T > 100 else 0.0)


def check_write_read(n, C, T, dtype, t_max=None, *, streams, small, sums, parameters, cancelling):
    """Check the boundary with bounds of relative errors.

    `streams` is for x', h and their gradients, `small` for coefficients, `sums` for dpost and dres, `parameters` for theirs.  With
    `cancelling`, gradients of parameters are compared relative to the largest contribution of a token.
    """
    a, g, Gs = inputs(n, C, T, dtype), inputs(n, C, T, dtype, 1), cotangents(n, T)
    named = {} if t_max is None else {"num_iters": t_max}

    def f(x, y, post, res, *params):
        new, c, h = write_read(x, Coefficients(None, post, res), y, *params, num_streams=n, **named)
        return new, *c, h

    names = ("x", "y", "post", "res", *PARAMETERS)
    (new, *c, h), grads = pulled(f)([a[name] for name in names], (g["x"], *Gs, g["y"]))
    X, G, stored = (f64(b).reshape(T, n, C) for b in (a["x"], g["x"], new))
    Y, post, res, G_h = f64(a["y"]), f64(a["post"]).T, np.moveaxis(f64(a["res"]), -1, 0), f64(g["y"])
    exact, values, parts = [f64(a[name]) for name in PARAMETERS], [], []
    for t in range(T):  # coefficients and h come from the streams as they were rounded
        pre, *rest = oracles.mhc_coefficients(stored[t], *exact, t_max or 20)
        values.append((oracles.write(X[t], Y[t], post[t], res[t]).ravel(), oracles.read(stored[t], pre), pre, *rest))
        bars = [f64(b[..., t]) for b in Gs]
        bars[0] = bars[0] + stored[t] @ G_h[t]
        d_v, *d_params = oracles.mhc_coefficients_vjp(stored[t], *exact, *bars, t_max or 20)
        D = G[t] + np.outer(pre, G_h[t]) + d_v
        parts.append(((res[t].T @ D).ravel(), post[t] @ D, D @ Y[t], D @ X[t].T, *d_params))
    for k, (name, actual) in enumerate(zip(("x'", "h", "pre", "post", "res"), (new, h, *c), strict=True)):
        assert_close(actual, np.stack([v[k] for v in values], -1 if k > 1 else 0), small if k > 1 else streams, name)
    for k, name in enumerate(names):
        of_tokens = [p[k] for p in parts]
        if name in PARAMETERS:
            terms = of_tokens if cancelling else 0.0
            assert_close(grads[k], sum(of_tokens), parameters, f"d{name}", terms)
        else:
            assert_close(grads[k], np.stack(of_tokens, -1 if k > 1 else 0), sums if k > 1 else streams, f"d{name}")


N_STREAMS, T_MAX, EPS = 2, 3, 0.05
"""EPS is large enough that an H_pre without it, or a lost term of its gradient, is seen."""


def every_operation(x, y, phi, alpha, bias):
    """Run two sub-layers with every operation in them; the result is one number a token."""
    rest = {"num_streams": N_STREAMS, "num_iters": T_MAX, "eps": EPS}
    c = coefficients(x, phi, alpha, bias, **rest)
    new, c, h = write_read(x, c, y, phi, alpha, bias, **rest)
    new = write(new, h, c.post, c.res, N_STREAMS)
    return (new**2).sum(-1) + (read(new, c.pre, N_STREAMS) ** 2).sum(-1)


def _scanned(f, x, y, *parameters):
    return jax.lax.scan(lambda _, xy: (None, f(*xy, *parameters)), None, (x, y))[1]


def _sharded(f, check_vma, *args):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    specs = P("data"), P("data"), P(), P(), P()
    return jax.shard_map(f, mesh=mesh, in_specs=specs, out_specs=P("data"), check_vma=check_vma)(*args)


TRANSFORMED = {
    "jit": every_operation,
    "remat": jax.checkpoint(every_operation),
    "scan": functools.partial(_scanned, every_operation),
    "scan_of_remat": functools.partial(_scanned, jax.checkpoint(every_operation)),
    "vmap": jax.vmap(every_operation, in_axes=(0, 0, None, None, None)),
    "shard_map": functools.partial(_sharded, every_operation, True),
    # Jax's interpreter does not track what varies between shards; `test_gpu_compile` and `test_tpu_aot` have the check on.
    "shard_map_of_interpreted": functools.partial(_sharded, every_operation, False),
}
"""Functions of x [8, T, nC], y [8, T, C], phi, alpha, bias."""
OF_INTERPRETED = [name for name in TRANSFORMED if name != "shard_map"]
COVERING = ("scan_of_remat", "vmap", "shard_map_of_interpreted")
"""Transformations that cover every kind."""


def arguments(C, *tokens):
    """Arguments of `every_operation`."""
    a = inputs(N_STREAMS, C, int(np.prod(tokens)))
    return a["x"].reshape(*tokens, -1), a["y"].reshape(*tokens, -1), *(a[name] for name in PARAMETERS)


@functools.cache
def by_xla(C, *tokens):
    """Compute value and gradients of `every_operation` in XLA's form for CPUs."""
    with settings(implementation="xla"):
        return jax.tree.leaves(pulled(every_operation)(arguments(C, *tokens), np.ones(tokens, np.float32)))


def check_every_operation(f, bound, C, *tokens, repeat=False):
    """Compare `f`, a form of `every_operation`, with XLA's; with `repeat`, a second call must give the same bits."""
    run, args = pulled(f), (arguments(C, *tokens), np.ones(tokens, np.float32))
    out, names = run(*args), ("value", "dx", "dy", "dphi", "dalpha", "dbias")
    for name, a, b in zip(names, jax.tree.leaves(out), by_xla(C, *tokens), strict=True):
        assert_close(a, b, bound, name)
    if repeat:
        jax.tree.map(np.testing.assert_array_equal, out, run(*args))
