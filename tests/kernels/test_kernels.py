"""Operations of mhc_kernels against float64 loops: forward, gradients, marginals, extreme logits, symmetries."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mhc_kernels import Coefficients, coefficients, columns, read, settings, sinkhorn, write, write_read
from support import oracles
from support.tolerances import FP32_RELATIVE, assert_close

STREAMS = (1, 2, 3, 4, 5, 8)


def rng(*key):
    return np.random.default_rng([hash(k) % 2**31 if isinstance(k, str) else int(k) for k in key])


@functools.partial(jax.jit, static_argnums=(2, 3))
def forward_and_gradient(logits, G, t_max=20, eps=0.0):
    out, vjp = jax.vjp(lambda L: sinkhorn(L, t_max, eps), logits)
    return out, vjp(G)[0]


@pytest.mark.parametrize("scale", [1.0, 4.0, 80.0])
@pytest.mark.parametrize("n", STREAMS)
def test_sinkhorn_forward_and_gradient(n, scale):
    r = rng(n, int(scale))
    logits = r.uniform(-scale, scale, (n, n, 7)) if scale == 80 else scale * r.normal(size=(n, n, 7))
    logits = logits.astype(np.float32)
    G = r.normal(size=logits.shape).astype(np.float32)
    out, grad = forward_and_gradient(jnp.asarray(logits), jnp.asarray(G))
    expected = np.stack([oracles.sinkhorn_log(logits[..., t]) for t in range(7)], -1)
    expected_grad = np.stack([oracles.sinkhorn_vjp(logits[..., t], G[..., t]) for t in range(7)], -1)
    assert_close(out, expected, what="H_res")
    # dL/dlogits is G * H_res less its projections on the marginals, which nearly cancel it where H_res is close to a permutation.
    assert_close(grad, expected_grad, what="gradient", terms=G * expected)
    assert np.abs(np.asarray(out).sum(1) - 1).max() < 1e-6, "rows come last: their sums are 1 to rounding"
    columns_off = np.abs(np.asarray(out, np.float64).sum(0) - 1).max()
    assert columns_off == pytest.approx(np.abs(expected.sum(0) - 1).max(), abs=2e-6), "the reported truncation error"


def test_log_oracle_agrees_with_the_textbook_loop():
    logits = rng(3).normal(size=(4, 4))
    assert_close(oracles.sinkhorn_log(logits), oracles.sinkhorn(logits), 1e-13)


def test_sinkhorn_gradient_oracle_agrees_with_differences():
    r = rng(5)
    logits, G = r.normal(size=(3, 3)), r.normal(size=(3, 3))
    (numeric,) = oracles.numerical_gradient(lambda L: (G * oracles.sinkhorn(L, 5)).sum(), [logits])
    assert_close(oracles.sinkhorn_vjp(logits, G, 5), numeric, 1e-8)


@pytest.mark.parametrize("t_max", [1, 2, 3, 40])
def test_sinkhorn_iteration_count(t_max):
    logits = (2 * rng(t_max).normal(size=(4, 4, 3))).astype(np.float32)
    expected = np.stack([oracles.sinkhorn(logits[..., t], t_max) for t in range(3)], -1)
    assert_close(sinkhorn(jnp.asarray(logits), t_max), expected)


# At eps = 0.05 the terms of its gradient that pass through eps are visible; at V4's 1e-6 they are rounding.
@pytest.mark.parametrize(("n", "t_max", "eps"), [(2, 1, 1e-6), (3, 2, 1e-6), (4, 20, 1e-6), (4, 5, 0.05)])
def test_sinkhorn_v4_convention(n, t_max, eps):
    r = rng(n, t_max)
    comb = (3 * r.normal(size=(n, n, 5))).astype(np.float32)
    G = r.normal(size=comb.shape).astype(np.float32)
    out, grad = forward_and_gradient(jnp.swapaxes(jnp.asarray(comb), 0, 1), jnp.asarray(G), t_max, eps)
    expected = np.stack([oracles.sinkhorn_v4(comb[..., t], t_max, eps).T for t in range(5)], -1)
    assert_close(out, expected, what="comb transposed")
    for t in range(2):
        (numeric,) = oracles.numerical_gradient(
            lambda L, t=t: (G[..., t] * oracles.sinkhorn_v4(L.T, t_max, eps).T).sum(),
            [comb[..., t].T.astype(np.float64)],
        )
        assert_close(grad[..., t], numeric, what="gradient", terms=G[..., t] * expected[..., t])


def test_sinkhorn_extreme_logits_stay_finite():
    logits = np.full((4, 4, 3), -80.0, np.float32)
    logits[:, 0] = 80.0  # one column holds all the mass: every other column must be lifted by 160 nats
    logits[0, :, 1] = -80.0  # a row and a column both far below the rest
    logits[..., 2] = 0.0
    out, grad = forward_and_gradient(jnp.asarray(logits), jnp.ones((4, 4, 3)))
    assert np.isfinite(out).all()
    assert np.isfinite(grad).all()
    for t in range(3):
        assert_close(out[..., t], oracles.sinkhorn_log(logits[..., t]))


def test_sinkhorn_nan_stays_in_its_token():
    logits = np.zeros((4, 4, 3), np.float32)
    logits[1, 2, 1] = np.nan
    out = np.asarray(sinkhorn(jnp.asarray(logits)))
    assert np.isnan(out[..., 1]).all()
    assert np.isfinite(out[..., [0, 2]]).all()


def test_sinkhorn_is_equivariant_to_permutations():
    r = rng(11)
    logits = (2 * r.normal(size=(5, 5, 2))).astype(np.float32)
    p, q = r.permutation(5), r.permutation(5)
    assert_close(sinkhorn(jnp.asarray(logits[p][:, q])), np.asarray(sinkhorn(jnp.asarray(logits)))[p][:, q], 1e-6)


def parameters(n, C, r):
    k = n * n + 2 * n
    return r.normal(size=(n * C, k)) / np.sqrt(n * C), np.array([0.5, 0.7, 0.9]), r.normal(size=k)


@pytest.mark.parametrize("n", STREAMS)
def test_coefficients_forward_and_gradients(n):
    r = rng(n, 1)
    C, T = 3, 2
    x = r.normal(size=(T, n, C))
    phi, alpha, bias = parameters(n, C, r)
    Gs = [r.normal(size=(n, T)), r.normal(size=(n, T)), r.normal(size=(n, n, T))]
    f32 = functools.partial(jnp.asarray, dtype=jnp.float32)

    def ours(x, phi, alpha, bias):
        c = coefficients(x, phi, alpha, bias, num_streams=n)
        return sum((f32(G) * a).sum() for G, a in zip(Gs, c, strict=True))

    args = (f32(x.reshape(T, n * C)), f32(phi), f32(alpha), f32(bias))
    c = coefficients(*args, num_streams=n)
    # The oracle starts from the same rounded inputs.
    exact_x, *exact = [np.asarray(a, np.float64) for a in args]
    Gs = [np.asarray(f32(G), np.float64) for G in Gs]
    tokens = [exact_x[t].reshape(n, C) for t in range(T)]
    expected = [oracles.mhc_coefficients(v, *exact) for v in tokens]
    for k, name in enumerate(("pre", "post", "res")):
        assert_close(c[k], np.stack([e[k] for e in expected], -1), what=name)

    dx, dphi, dalpha, dbias = jax.jit(jax.grad(ours, argnums=(0, 1, 2, 3)))(*args)
    parts = [oracles.mhc_coefficients_vjp(v, *exact, *(G[..., t] for G in Gs)) for t, v in enumerate(tokens)]
    assert_close(dx, np.stack([p[0].ravel() for p in parts]), what="gradient of x")
    assert_close(dphi, sum(p[1] for p in parts), what="gradient of phi")
    assert_close(dalpha, sum(p[2] for p in parts), what="gradient of alpha")
    assert_close(dbias, sum(p[3] for p in parts), what="gradient of bias")


def test_coefficient_gradient_oracle_agrees_with_differences():
    r = rng(6)
    n, C = 2, 3
    args = [r.normal(size=(n, C)), *parameters(n, C, r)]
    Gs = [r.normal(size=n), r.normal(size=n), r.normal(size=(n, n))]

    def scalar(*a):
        return sum((G * c).sum() for G, c in zip(Gs, oracles.mhc_coefficients(*a), strict=True))

    numeric = oracles.numerical_gradient(scalar, args)
    for a, b in zip(oracles.mhc_coefficients_vjp(*args, *Gs), numeric, strict=True):
        assert_close(a, b, 1e-7)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("with_res", [True, False])
@pytest.mark.parametrize("n", STREAMS)
def test_read_and_write_forward_and_gradients(n, with_res, dtype):
    r = rng(n, 2)
    C, T = 5, 3
    f32 = functools.partial(jnp.asarray, dtype=jnp.float32)
    x, y = jnp.asarray(r.normal(size=(T, n * C)), dtype), jnp.asarray(r.normal(size=(T, C)), dtype)
    pre, post = f32(r.normal(size=(n, T))), f32(r.normal(size=(n, T)))
    res = f32(r.normal(size=(n, n, T)))
    g_h, g_x = jnp.asarray(r.normal(size=(T, C)), dtype), jnp.asarray(r.normal(size=(T, n * C)), dtype)
    f64 = functools.partial(np.asarray, dtype=np.float64)
    H = [f64(res)[..., t] if with_res else np.eye(n) for t in range(T)]
    X = f64(x).reshape(T, n, C)
    G = f64(g_x).reshape(T, n, C)
    bound = FP32_RELATIVE if dtype == jnp.float32 else 2**-8  # one rounding to bfloat16

    h, vjp = jax.vjp(lambda x, pre: read(x, pre, n), x, pre)
    dx, dpre = vjp(g_h)
    assert h.dtype == dtype
    assert_close(h, [oracles.read(X[t], f64(pre)[:, t]) for t in range(T)], bound, "h")
    assert_close(dx, [np.outer(f64(pre)[:, t], f64(g_h)[t]).ravel() for t in range(T)], bound, "dx of read")
    assert_close(dpre, np.stack([X[t] @ f64(g_h)[t] for t in range(T)], -1), what="dpre")

    args = (x, y, post, res) if with_res else (x, y, post)
    out, vjp = jax.vjp(lambda x, y, post, res=None: write(x, y, post, res, n), *args)
    grads = vjp(g_x)
    assert out.dtype == dtype
    expected = [oracles.write(X[t], f64(y)[t], f64(post)[:, t], H[t]).ravel() for t in range(T)]
    assert_close(out, expected, bound, "x'")
    assert_close(grads[0], [(H[t].T @ G[t]).ravel() for t in range(T)], bound, "dx of write")
    assert_close(grads[1], [f64(post)[:, t] @ G[t] for t in range(T)], bound, "dy")
    assert_close(grads[2], np.stack([G[t] @ f64(y)[t] for t in range(T)], -1), what="dpost")
    if with_res:
        assert_close(grads[3], np.stack([G[t] @ X[t].T for t in range(T)], -1), what="dres")


def test_write_applies_h_res_untransposed():
    x = jnp.asarray([[1.0, 10.0]])  # two streams of width 1
    res = jnp.asarray([[0.0, 1.0], [0.0, 0.0]])[..., None]  # stream 0 receives stream 1, stream 1 receives nothing
    out = write(x, jnp.zeros((1, 1)), jnp.zeros((2, 1)), res, 2)
    np.testing.assert_array_equal(out, [[10.0, 0.0]])


def test_disabled_components():
    x = jnp.asarray([[1.0, 2.0, 3.0, 5.0]])  # n = 2, C = 2
    y = jnp.asarray([[10.0, 20.0]])
    np.testing.assert_array_equal(read(x, None, 2), [[2.0, 3.5]])
    np.testing.assert_array_equal(write(x, y, None, None, 2), [[11.0, 22.0, 13.0, 25.0]])
    swap = jnp.asarray([[0.0, 1.0], [1.0, 0.0]])[..., None]
    np.testing.assert_array_equal(write(x, y, None, swap, 2), [[13.0, 25.0, 11.0, 22.0]])
    c = coefficients(x, jnp.zeros((4, 2)), jnp.zeros(1), jnp.zeros(2), num_streams=2, parts=("post",))
    assert c.pre is None
    assert c.res is None
    np.testing.assert_array_equal(c.post, [[1.0], [1.0]])


@pytest.mark.parametrize("n", [2, 4])
def test_permuting_streams_permutes_results(n):
    r = rng(n, 3)
    C, T = 4, 3
    x, y = r.normal(size=(T, n, C)), jnp.asarray(r.normal(size=(T, C)), jnp.float32)
    phi, alpha, bias = parameters(n, C, r)
    p = r.permutation(n)
    where = columns(n)

    def permuted_columns(a):
        parts = [a[..., where["pre"]][..., p], a[..., where["post"]][..., p]]
        res = a[..., where["res"]].reshape(*a.shape[:-1], n, n)[..., p, :][..., p]
        return np.concatenate([*parts, res.reshape(*a.shape[:-1], -1)], -1)

    def run(x, phi, bias):
        as32 = [jnp.asarray(a, jnp.float32) for a in (x.reshape(T, -1), phi, alpha, bias)]
        c = coefficients(*as32, num_streams=n)
        out, c, h = write_read(as32[0], c, y, *as32[1:], num_streams=n)
        return np.asarray(out).reshape(T, n, C), c, h

    out, c, h = run(x, phi, bias)
    phi_p = permuted_columns(phi.reshape(n, C, -1)[p].reshape(n * C, -1))
    out_p, c_p, h_p = run(x[:, p], phi_p, permuted_columns(bias))
    assert_close(out_p, out[:, p], 1e-6, "streams")
    assert_close(h_p, h, 1e-6, "h")
    assert_close(c_p.res, np.asarray(c.res)[p][:, p], 1e-6, "H_res")


@pytest.mark.parametrize("transform", ["jit", "vmap", "remat", "shard_map"])
def test_write_read_under_transformations(transform):
    r = rng(17)
    n, C, B, T = 4, 8, 8, 4
    x, y = (jnp.asarray(r.normal(size=(B, T, k)), jnp.float32) for k in (n * C, C))
    params = [jnp.asarray(a, jnp.float32) for a in parameters(n, C, r)]

    def loss(x, y):
        c = coefficients(x, *params, num_streams=n)
        out, _, h = write_read(x, c, y, *params, num_streams=n)
        return (out**2).sum(-1) + (h**2).sum(-1)

    @functools.partial(jax.jit, static_argnums=0)
    def run(f):
        value, vjp = jax.vjp(f, x, y)
        return value, *vjp(jnp.ones_like(value))

    expected = run(loss)
    if transform == "shard_map":
        mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
        spec = jax.sharding.PartitionSpec("data")
        f = jax.shard_map(loss, mesh=mesh, in_specs=(spec, spec), out_specs=spec)
    else:
        f = {"jit": jax.jit, "vmap": jax.vmap, "remat": jax.checkpoint}[transform](loss)
    for a, b in zip(run(f), expected, strict=True):
        assert_close(a, b, 5e-6)


@pytest.mark.parametrize(("std", "mean", "most"), [(1, 5e-7, 5e-3), (2, 5e-4, 4e-2), (4, 9e-3, 8e-2), (8, 3e-2, 5e-1)])
def test_marginal_error_of_twenty_steps(std, mean, most):
    """The figures of the docstring, which maths and the choice of t_max rest on."""
    draws = [std * jax.random.normal(jax.random.key(seed), (4, 4, 16384)) for seed in range(4)]
    out = np.asarray(sinkhorn(jnp.concatenate(draws, -1), 20), np.float64)
    error = np.abs(out.sum(0) - 1).max(0)
    assert error.mean() == pytest.approx(mean, rel=0.3)
    assert error.max() == pytest.approx(most, rel=0.3)
    coarse = np.asarray(sinkhorn(jnp.concatenate(draws, -1), 3), np.float64)
    assert np.abs(coarse.sum(0) - 1).max(0).mean() > 3 * mean, "fewer steps leave more"


@pytest.mark.parametrize("eps", [0.0, 1e-3])
def test_the_form_for_tpus_and_gpus_is_the_form_for_cpus(eps):
    """XLA's reference has one form a platform; both are the same operation, gradients included."""
    n, C, N = 4, 32, 48
    k = n * n + 2 * n
    keys = iter(jax.random.split(jax.random.key(0), 6))
    x, y = (jax.random.normal(next(keys), (N, size)) for size in (n * C, C))
    post, res = jax.random.uniform(next(keys), (n, N)), jax.random.normal(next(keys), (n, n, N))
    phi, bias = 0.1 * jax.random.normal(next(keys), (n * C, k)), jax.random.normal(next(keys), (k,))
    alpha = jnp.array([0.3, 0.4, 0.5])

    def loss(x, y, post, res, phi, alpha, bias):
        new, c, h = write_read(x, Coefficients(None, post, res), y, phi, alpha, bias, num_streams=n, eps=eps)
        new = write(new, h, c.post, None, n) + write(new, h, c.post, c.res, n)
        return jnp.sin(new).sum() + (h**2).sum() + read(new, None, n).sum()

    def run(platform):
        with settings(platform=platform, implementation="xla"):
            return jax.value_and_grad(loss, tuple(range(7)))(x, y, post, res, phi, alpha, bias)

    for form, same in zip(jax.tree.leaves(run("tpu")), jax.tree.leaves(run("cpu")), strict=True):
        assert_close(form, same)
