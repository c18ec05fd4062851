"""The Pallas kernels for NVIDIA GPUs, interpreted, against the float64 loops: every operation, its gradients, transformations."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mhc_kernels import Coefficients, coefficients, projection, read, settings, sinkhorn, write, write_read
from support import oracles
from support.tolerances import FP32_RELATIVE, assert_close

STREAMS = (1, 2, 3, 4, 8)
BF16_RELATIVE = 2**-7
"""Two units in the last place of bfloat16."""
GPU = "pallas_gpu"


@pytest.fixture(autouse=True)
def interpreted():
    with settings(implementation=GPU, interpret=True):
        yield


def rng(*key):
    return np.random.default_rng(list(key))


def f64(a):
    return np.asarray(a, np.float64)


def f32(a):
    return jnp.asarray(a, jnp.float32)


def value_and_vjp(f, args, cotangent):
    """Compiled, as a user runs it."""

    @jax.jit
    def run(args, cotangent):
        out, vjp = jax.vjp(f, *args)
        return out, vjp(cotangent)

    return run(args, cotangent)


@pytest.mark.parametrize(
    ("n", "t_max", "eps"), [(n, 20, 0.0) for n in STREAMS] + [(4, 1, 0.0), (4, 20, 1e-6), (3, 2, 1e-6)]
)
def test_sinkhorn(n, t_max, eps):
    r = rng(n, t_max)
    logits, G = (f32(r.normal(size=(n, n, 70)) * s) for s in (2, 1))  # 70 tokens: one block and a ragged one
    out, (grad,) = value_and_vjp(lambda L: sinkhorn(L, t_max, eps), (logits,), G)
    if eps == 0:
        expected = np.stack([oracles.sinkhorn_log(f64(logits)[..., t], t_max) for t in range(70)], -1)
        expected_grad = np.stack([oracles.sinkhorn_vjp(f64(logits)[..., t], G[..., t], t_max) for t in range(70)], -1)
    else:
        expected = np.stack([oracles.sinkhorn_v4(f64(logits)[..., t].T, t_max, eps).T for t in range(70)], -1)
        some = [0, 69]
        expected_grad = np.stack(
            [
                oracles.numerical_gradient(
                    lambda L, t=t: (f64(G)[..., t] * oracles.sinkhorn_v4(L.T, t_max, eps).T).sum(),
                    [f64(logits)[..., t]],
                )[0]
                for t in some
            ],
            -1,
        )
        grad = grad[..., np.asarray(some)]
    assert_close(out, expected, what="H_res")
    assert_close(grad, expected_grad, what="gradient", terms=f64(G) * expected)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_sinkhorn_spoils_a_bad_matrix_only(bad):
    logits = np.zeros((3, 3, 5), np.float32)
    logits[1, 2, 3] = bad
    out = np.asarray(sinkhorn(jnp.asarray(logits)))
    assert np.isnan(out[..., 3]).all()
    np.testing.assert_allclose(out[..., [0, 1, 2, 4]], 1 / 3, rtol=1e-6)


def test_sinkhorn_extreme_logits_stay_finite():
    logits = np.full((4, 4, 2), -80.0, np.float32)
    logits[:, 0] = 80.0
    logits[0, :, 1] = -80.0
    out, (grad,) = value_and_vjp(sinkhorn, (jnp.asarray(logits),), jnp.ones((4, 4, 2)))
    assert np.isfinite(grad).all()
    assert_close(out, np.stack([oracles.sinkhorn_log(logits[..., t]) for t in range(2)], -1))


def streams(n, C, T, dtype, *key):
    r = rng(n, C, T, *key)
    x, y = jnp.asarray(r.normal(size=(T, n * C)), dtype), jnp.asarray(r.normal(size=(T, C)), dtype)
    return r, x, y


SHAPES = [(1, 16, 5), (2, 48, 9), (3, 128, 3), (4, 80, 13), (8, 32, 6)]
"""(n, C, tokens): widths that a block divides and others, ragged tokens."""
EVERY = [(*shape, dtype) for shape in SHAPES for dtype in (jnp.float32, jnp.bfloat16)]
CASES = [
    pytest.param(*case, marks=pytest.mark.slow) if case[0] == 8 and case[3] == jnp.float32 else case for case in EVERY
]
"""n = 8 takes longest to trace: both dtypes in the long run only."""


@pytest.mark.parametrize(("n", "C", "T", "dtype"), CASES)
def test_read(n, C, T, dtype):
    r, x, _ = streams(n, C, T, dtype)
    pre, g = f32(r.normal(size=(n, T))), jnp.asarray(r.normal(size=(T, C)), dtype)
    bound = FP32_RELATIVE if dtype == jnp.float32 else BF16_RELATIVE
    h, (dx, dpre) = value_and_vjp(lambda x, pre: read(x, pre, n), (x, pre), g)
    X = f64(x).reshape(T, n, C)
    assert h.dtype == dx.dtype == dtype
    assert_close(h, [oracles.read(X[t], f64(pre)[:, t]) for t in range(T)], bound, "h")
    assert_close(dx, [np.outer(f64(pre)[:, t], f64(g)[t]).ravel() for t in range(T)], bound, "dx")
    assert_close(dpre, np.stack([X[t] @ f64(g)[t] for t in range(T)], -1), what="dpre")


@pytest.mark.parametrize(("n", "C", "T", "dtype"), CASES)
def test_write(n, C, T, dtype):
    r, x, y = streams(n, C, T, dtype)
    post, res = f32(r.normal(size=(n, T))), f32(r.normal(size=(n, n, T)))
    g = jnp.asarray(r.normal(size=(T, n * C)), dtype)
    bound = FP32_RELATIVE if dtype == jnp.float32 else BF16_RELATIVE
    out, (dx, dy, dpost, dres) = value_and_vjp(lambda *a: write(*a, n), (x, y, post, res), g)
    X, G = f64(x).reshape(T, n, C), f64(g).reshape(T, n, C)
    P, H = f64(post).T, np.moveaxis(f64(res), -1, 0)
    assert out.dtype == dx.dtype == dy.dtype == dtype
    assert_close(out, [oracles.write(X[t], f64(y)[t], P[t], H[t]).ravel() for t in range(T)], bound, "x'")
    assert_close(dx, [(H[t].T @ G[t]).ravel() for t in range(T)], bound, "dx")
    assert_close(dy, [P[t] @ G[t] for t in range(T)], bound, "dy")
    assert_close(dpost, np.stack([G[t] @ f64(y)[t] for t in range(T)], -1), what="dpost")
    assert_close(dres, np.stack([G[t] @ X[t].T for t in range(T)], -1), what="dres")


def parameters(n, C, r):
    k = n * n + 2 * n
    return f32(r.normal(size=(n * C, k)) / np.sqrt(n * C)), f32([0.5, 0.7, 0.9]), f32(r.normal(size=k))


@pytest.mark.parametrize(("n", "C", "T", "dtype"), CASES)
def test_coefficients(n, C, T, dtype):
    r, x, _ = streams(n, C, T, dtype, 1)
    params = parameters(n, C, r)
    Gs = [f32(r.normal(size=s)) for s in ((n, T), (n, T), (n, n, T))]
    f = functools.partial(coefficients, num_streams=n)
    c, (dx, dphi, dalpha, dbias) = value_and_vjp(lambda *a: tuple(f(*a)), (x, *params), tuple(Gs))
    X, exact, Gs = f64(x).reshape(T, n, C), [f64(a) for a in params], [f64(G) for G in Gs]
    expected = [oracles.mhc_coefficients(v, *exact) for v in X]
    for k, name in enumerate(("pre", "post", "res")):
        assert_close(c[k], np.stack([e[k] for e in expected], -1), what=name)
    parts = [oracles.mhc_coefficients_vjp(v, *exact, *(G[..., t] for G in Gs)) for t, v in enumerate(X)]
    bound = FP32_RELATIVE if dtype == jnp.float32 else BF16_RELATIVE
    assert_close(dx, np.stack([p[0].ravel() for p in parts]), bound, "dx")
    assert_close(dphi, sum(p[1] for p in parts), what="dphi")
    assert_close(dalpha, sum(p[2] for p in parts), what="dalpha")
    assert_close(dbias, sum(p[3] for p in parts), what="dbias")


def test_coefficients_over_many_blocks_of_tokens_and_channels():
    T, C, k = 150, 160, 3  # three blocks of tokens, the last one ragged; three of channels
    r, x, _ = streams(1, C, T, jnp.bfloat16, 2)
    phi, g = f32(r.normal(size=(C, k))), f32(r.normal(size=(k, T)))
    z, (dx, dphi) = value_and_vjp(lambda x, phi: projection(x, phi, 1e-6), (x, phi), g)
    X, P, G = f64(x), f64(phi), f64(g).T
    inverse = 1 / np.sqrt((X**2).mean(1, keepdims=True) + 1e-6)
    Z = X @ P * inverse
    assert_close(z, Z.T, what="z")
    assert_close(dphi, X.T @ (G * inverse), what="dphi")
    shrink = (G * Z).sum(1, keepdims=True) * inverse**2 / C
    assert_close(dx, (G * inverse) @ P.T - shrink * X, BF16_RELATIVE, "dx")


def oracle_write_read(X, y, P, H, phi, alpha, bias, G_new, G_h, Gs, stored):
    """One token: outputs and gradients of the boundary by the chain rule; `stored` is x' as the next sub-layer sees it."""
    pre, post, res = oracles.mhc_coefficients(stored, phi, alpha, bias)
    h = oracles.read(stored, pre)
    c_bar = oracles.mhc_coefficients_vjp(stored, phi, alpha, bias, Gs[0] + stored @ G_h, Gs[1], Gs[2])
    total = G_new + np.outer(pre, G_h) + c_bar[0]
    grads = (H.T @ total).ravel(), P @ total, total @ y, total @ X.T, *c_bar[1:]
    return (oracles.write(X, y, P, H).ravel(), pre, post, res, h), grads


@pytest.mark.parametrize(("n", "C", "T", "dtype"), CASES)
def test_write_read(n, C, T, dtype):
    r, x, y = streams(n, C, T, dtype, 3)
    post, res = f32(r.normal(size=(n, T))), f32(r.normal(size=(n, n, T)))
    params = parameters(n, C, r)
    g_new, g_h = (jnp.asarray(r.normal(size=s), dtype) for s in (x.shape, y.shape))
    g_c = [f32(r.normal(size=s)) for s in ((n, T), (n, T), (n, n, T))]

    def f(x, y, post, res, *params):
        new, c, h = write_read(x, Coefficients(None, post, res), y, *params, num_streams=n)
        return (new, *c, h)

    out, grads = value_and_vjp(f, (x, y, post, res, *params), (g_new, *g_c, g_h))
    X, P, H = f64(x).reshape(T, n, C), f64(post).T, np.moveaxis(f64(res), -1, 0)
    stored, exact = f64(out[0]).reshape(T, n, C), [f64(a) for a in params]
    tokens = [
        oracle_write_read(
            X[t],
            f64(y)[t],
            P[t],
            H[t],
            *exact,
            f64(g_new)[t].reshape(n, C),
            f64(g_h)[t],
            [f64(g)[..., t] for g in g_c],
            stored[t],
        )
        for t in range(T)
    ]
    streams_bound, sums_bound = (FP32_RELATIVE, FP32_RELATIVE) if dtype == jnp.float32 else (BF16_RELATIVE, 1e-5)
    for k, name in enumerate(("x'", "pre", "post", "res", "h")):
        expected = np.stack([o[k] for o, _ in tokens], 0 if k in (0, 4) else -1)
        assert_close(out[k], expected, streams_bound if k in (0, 4) else sums_bound, name)
    for k, name in enumerate(("dx", "dy", "dpost", "dres")):
        expected = np.stack([g[k] for _, g in tokens], 0 if k < 2 else -1)
        assert_close(grads[k], expected, streams_bound if k < 2 else sums_bound, name)
    for k, name in enumerate(("dphi", "dalpha", "dbias"), 4):
        parts = [g[k] for _, g in tokens]
        assert_close(grads[k], sum(parts), sums_bound, name, terms=parts)


def boundary(x, y, params, n):
    c = coefficients(x, *params, num_streams=n)
    new, _, h = write_read(x, c, y, *params, num_streams=n)
    return (new**2).sum(-1) + (h**2).sum(-1)


N_STREAMS, WIDTH = 4, 16


@functools.cache
def example():
    r = rng(17)
    x, y = (f32(r.normal(size=(8, 3, k))) for k in (N_STREAMS * WIDTH, WIDTH))
    return x, y, parameters(N_STREAMS, WIDTH, r)


def compiled(f):
    """Values and gradients of x, y and phi."""

    @jax.jit
    def run(x, y, params):
        value, vjp = jax.vjp(f, x, y, params)
        dx, dy, (dphi, *_) = vjp(jnp.ones_like(value))
        return value, dx, dy, dphi

    return run


@functools.cache
def expected():
    with settings(implementation="xla"):
        return compiled(functools.partial(boundary, n=N_STREAMS))(*example())


def scanned(x, y, params):
    def step(_, xy):
        return None, boundary(*xy, params, N_STREAMS)

    return jax.lax.scan(step, None, (x, y))[1]


def sharded(x, y, params):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("data")
    f = functools.partial(boundary, n=N_STREAMS)
    # jax's interpreter does not track what varies between shards; `test_gpu_compile` has the check on.
    specs = spec, spec, jax.sharding.PartitionSpec()
    return jax.shard_map(f, mesh=mesh, in_specs=specs, out_specs=spec, check_vma=False)(x, y, params)


TRANSFORMED = {
    "jit": functools.partial(boundary, n=N_STREAMS),
    "scan": scanned,
    "remat": jax.checkpoint(functools.partial(boundary, n=N_STREAMS)),
    "vmap": jax.vmap(functools.partial(boundary, n=N_STREAMS), in_axes=(0, 0, None)),
    "shard_map": sharded,
}


@pytest.mark.parametrize("transform", TRANSFORMED)
def test_transformations(transform):
    out = compiled(TRANSFORMED[transform])(*example())
    for name, a, b in zip(("value", "dx", "dy", "dphi"), out, expected(), strict=True):
        assert_close(a, b, 5e-6, name)


def test_gradients_are_the_same_bits_every_time():
    run = compiled(TRANSFORMED["jit"])
    for a, b in zip(run(*example()), run(*example()), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: read(jnp.ones((3, 36)), jnp.ones((2, 3)), 2), "C must be a multiple of 16 .*, not 18. Here xla"),
        (lambda: read(jnp.ones((3, 144)), jnp.ones((9, 3)), 9), "n must be 1 to 8, not 9"),
        (lambda: read(jnp.ones((3, 32), jnp.float16), jnp.ones((2, 3)), 2), "bfloat16 or float32, not float16"),
        (lambda: sinkhorn(jnp.ones((9, 9, 3))), "n must be 1 to 8, not 9"),
    ],
)
def test_what_the_kernels_cannot_run_is_refused(call, message):
    with pytest.raises(ValueError, match=f"implementation 'pallas_gpu' cannot run this: .*{message}"):
        call()


def test_the_kernels_are_refused_on_another_device():
    with (
        settings(interpret=False),
        pytest.raises(ValueError, match=r"it needs a GPU and the program is traced for a CPU\. Here xla"),
    ):
        read(jnp.ones((3, 32)), jnp.ones((2, 3)), 2)
