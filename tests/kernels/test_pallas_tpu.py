"""The Pallas TPU kernels, interpreted on CPU, against float64 loops: forward, every gradient, transformations, bad input."""

import functools

import jax
import jax.numpy as jnp
import mhc_kernels
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from mhc_kernels import Coefficients, coefficients, projection, read, sinkhorn, tpu, write, write_read
from support import oracles
from support.tolerances import FP32_RELATIVE, assert_close

C = 128
DTYPES = [jnp.float32, jnp.bfloat16]
# Every n in float32, and the paper's in bfloat16: dtypes differ in the projection and in rounding, not in how n enters.
CASES = [*((n, jnp.float32) for n in (1, 2, 3, 4, 8)), (4, jnp.bfloat16), (3, jnp.bfloat16)]
TPU = {"implementation": "pallas_tpu"}


@pytest.fixture(autouse=True)
def _interpret():
    with mhc_kernels.settings(interpret=True):
        yield


def f32(a):
    return jnp.asarray(a, jnp.float32)


def f64(a):
    return np.asarray(a, np.float64)


def bound(dtype):
    """One rounding to bfloat16, for what is stored in it."""
    return FP32_RELATIVE if dtype == jnp.float32 else 2**-8


def inputs(n, tokens, dtype, *key):
    """x, y, post, res, phi, alpha, bias."""
    r = np.random.default_rng([n, tokens, *key])
    k = n * n + 2 * n
    x, y = jnp.asarray(r.normal(size=(tokens, n * C)), dtype), jnp.asarray(r.normal(size=(tokens, C)), dtype)
    phi = f32(r.normal(size=(n * C, k)) / np.sqrt(n * C))
    return (
        x,
        y,
        f32(r.normal(size=(n, tokens))),
        f32(r.normal(size=(n, n, tokens))),
        phi,
        f32([0.5, 0.7, 0.9]),
        f32(r.normal(size=k)),
    )


@functools.partial(jax.jit, static_argnums=0)
def value_and_pull(f, args, g):
    out, vjp = jax.vjp(f, *args)
    return out, vjp(g)


@pytest.mark.parametrize(("n", "tokens"), [(1, 7), (2, 7), (3, 1030), (4, 7), (8, 7)])
def test_sinkhorn(n, tokens):
    r = np.random.default_rng(n)
    logits, G = f32(2 * r.normal(size=(n, n, tokens))), f32(r.normal(size=(n, n, tokens)))
    out, (grad,) = value_and_pull(functools.partial(sinkhorn, **TPU), (logits,), G)
    some = [0, 3, tokens - 1]
    expected = np.stack([oracles.sinkhorn_log(logits[..., t]) for t in some], -1)
    expected_grad = np.stack([oracles.sinkhorn_vjp(logits[..., t], G[..., t]) for t in some], -1)
    assert_close(out[..., some], expected, what="H_res")
    assert_close(grad[..., some], expected_grad, what="gradient", terms=G[..., some] * expected)


@pytest.mark.parametrize("t_max", [1, 5])
@pytest.mark.parametrize("eps", [1e-6, 0.05])
def test_sinkhorn_with_eps(eps, t_max):
    r = np.random.default_rng(t_max)
    logits, G = f32(3 * r.normal(size=(4, 4, 5))), f32(r.normal(size=(4, 4, 5)))
    out, (grad,) = value_and_pull(lambda L: sinkhorn(L, t_max, eps, **TPU), (logits,), G)
    expected = np.stack([oracles.sinkhorn_v4(f64(logits[..., t]).T, t_max, eps).T for t in range(5)], -1)
    assert_close(out, expected)
    (numeric,) = oracles.numerical_gradient(
        lambda L: (f64(G[..., 1]) * oracles.sinkhorn_v4(L.T, t_max, eps).T).sum(), [f64(logits[..., 1])]
    )
    assert_close(grad[..., 1], numeric, terms=G[..., 1] * expected[..., 1])


def test_sinkhorn_extreme_logits():
    logits = np.zeros((4, 4, 4), np.float32)
    logits[..., 0], logits[:, 0, 0] = -80.0, 80.0
    logits[1, 2, 1] = np.nan
    logits[1, 2, 2] = -np.inf
    out = np.asarray(sinkhorn(jnp.asarray(logits), **TPU))
    assert_close(out[..., 0], oracles.sinkhorn_log(logits[..., 0]))
    assert np.isnan(out[..., 1]).all()
    assert out[1, 2, 2] == 0
    assert np.isfinite(out[..., 2:]).all()


@pytest.mark.parametrize(("n", "dtype"), CASES)
def test_read(n, dtype):
    tokens = 130  # a second block, of two tokens
    x, g, pre, *_ = inputs(n, tokens, dtype)
    h, (dx, dpre) = value_and_pull(lambda x, pre: read(x, pre, n, **TPU), (x, pre), g)
    X, P, G = f64(x).reshape(tokens, n, C), f64(pre), f64(g)
    assert h.dtype == dx.dtype == dtype
    assert_close(h, [oracles.read(X[t], P[:, t]) for t in range(tokens)], bound(dtype), "h")
    assert_close(dx, [np.outer(P[:, t], G[t]).ravel() for t in range(tokens)], bound(dtype), "dx")
    assert_close(dpre, np.stack([X[t] @ G[t] for t in range(tokens)], -1), what="dpre")


@pytest.mark.parametrize(("n", "dtype"), CASES)
def test_write(n, dtype):
    tokens = 130
    x, y, post, res, *_ = inputs(n, tokens, dtype)
    g = inputs(n, tokens, dtype, 1)[0]
    out, grads = value_and_pull(lambda *a: write(*a, n, **TPU), (x, y, post, res), g)
    X, Y, P, H, G = f64(x).reshape(tokens, n, C), f64(y), f64(post), f64(res), f64(g).reshape(tokens, n, C)
    every = range(tokens)
    assert out.dtype == grads[0].dtype == grads[1].dtype == dtype
    assert_close(out, [oracles.write(X[t], Y[t], P[:, t], H[..., t]).ravel() for t in every], bound(dtype), "x'")
    assert_close(grads[0], [(H[..., t].T @ G[t]).ravel() for t in every], bound(dtype), "dx")
    assert_close(grads[1], [P[:, t] @ G[t] for t in every], bound(dtype), "dy")
    assert_close(grads[2], np.stack([G[t] @ Y[t] for t in every], -1), what="dpost")
    assert_close(grads[3], np.stack([G[t] @ X[t].T for t in every], -1), what="dres")


@pytest.mark.parametrize(("n", "dtype"), CASES)
def test_coefficients(n, dtype):
    tokens = 130
    x, _, _, _, *params = inputs(n, tokens, dtype)
    r = np.random.default_rng(n)
    G = Coefficients(*(f32(r.normal(size=(*s, tokens))) for s in [(n,), (n,), (n, n)]))
    c, grads = value_and_pull(lambda *a: coefficients(*a, num_streams=n, **TPU), (x, *params), G)
    X, exact = f64(x).reshape(tokens, n, C), [f64(a) for a in params]
    expected = [oracles.mhc_coefficients(v, *exact) for v in X]
    for k, name in enumerate(("pre", "post", "res")):
        assert_close(c[k], np.stack([e[k] for e in expected], -1), what=name)
    parts = [oracles.mhc_coefficients_vjp(v, *exact, *(f64(a)[..., t] for a in G)) for t, v in enumerate(X)]
    assert_close(grads[0], np.stack([p[0].ravel() for p in parts]), bound(dtype), "dx")
    for k, name in enumerate(("dphi", "dalpha", "dbias"), 1):
        # A sum over tokens is rounded against its largest partial sums.
        terms = max(np.abs(sum(np.abs(p[k]) for p in parts)).max() / np.sqrt(tokens), 1e-30)
        assert_close(grads[k], sum(p[k] for p in parts), what=name, terms=terms)


@pytest.mark.parametrize("dtype", DTYPES)
def test_projection_of_one_stream(dtype):
    """HC projects a stream at a time onto a few columns."""
    x, _, _, _, phi, *_ = inputs(4, 9, dtype)
    z, (dx, dphi) = value_and_pull(lambda x, phi: projection(x, phi, 1e-6, **TPU), (x, phi[:, :6]), jnp.ones((6, 9)))
    v, W = f64(x), f64(phi[:, :6])
    scale = np.array([oracles.rms(row, 1e-6) for row in v])[:, None]
    assert_close(z, ((v @ W) / scale).T, what="z")
    d = W.sum(1) / scale - ((v @ W).sum(1, keepdims=True) / scale**3) * v / v.shape[1]
    assert_close(dx, d, bound(dtype), "dx")
    assert_close(dphi, np.repeat((v / scale).sum(0)[:, None], 6, 1), what="dphi")


def boundary_oracle(n, x, y, post, res, phi, alpha, bias, new, g_new, g_c, g_h):
    """Coefficients and h from the streams `new` as they were rounded, then all gradients; sums of the chain rule, per token."""
    tokens = x.shape[0]
    X, Y, P, H, New = f64(x).reshape(tokens, n, C), f64(y), f64(post), f64(res), f64(new).reshape(tokens, n, C)
    exact = [f64(a) for a in (phi, alpha, bias)]
    G, g_h = f64(g_new).reshape(tokens, n, C), f64(g_h)
    values, grads, sums = [], [], [0.0, 0.0, 0.0]
    for t in range(tokens):
        pre, post_next, res_next = oracles.mhc_coefficients(New[t], *exact)
        values.append((pre, post_next, res_next, oracles.read(New[t], pre)))
        g = [f64(a)[..., t] for a in g_c]
        d_v, *d_params = oracles.mhc_coefficients_vjp(New[t], *exact, g[0] + New[t] @ g_h[t], *g[1:])
        D = G[t] + np.outer(pre, g_h[t]) + d_v
        grads.append(((H[..., t].T @ D).ravel(), P[:, t] @ D, D @ Y[t], D @ X[t].T))
        sums = [s + d for s, d in zip(sums, d_params, strict=True)]
    stack = lambda rows, axis: [np.stack(a, axis) for a in zip(*rows, strict=True)]  # noqa: E731
    return stack(values, -1), stack(grads, -1), sums


@pytest.mark.parametrize(("n", "dtype"), CASES)
def test_write_read(n, dtype):
    tokens = 130
    x, y, post, res, *params = inputs(n, tokens, dtype)
    r = np.random.default_rng(n)
    g_new, g_h = (jnp.asarray(r.normal(size=(tokens, w)), dtype) for w in (n * C, C))
    g_c = Coefficients(*(f32(r.normal(size=(*s, tokens))) for s in [(n,), (n,), (n, n)]))

    def f(x, y, post, res, *params):
        return write_read(x, Coefficients(None, post, res), y, *params, num_streams=n, **TPU)

    (new, c, h), grads = value_and_pull(f, (x, y, post, res, *params), (g_new, g_c, g_h))
    X, Y = f64(x).reshape(tokens, n, C), f64(y)
    written = [oracles.write(X[t], Y[t], f64(post)[:, t], f64(res)[..., t]).ravel() for t in range(tokens)]
    assert_close(new, written, bound(dtype), "x'")
    values, expected, sums = boundary_oracle(n, x, y, post, res, *params, new, g_new, g_c, g_h)
    for k, name in enumerate(("pre", "post", "res")):
        assert_close(c[k], values[k], 2 * FP32_RELATIVE, what=name)
    assert_close(h, values[3].T, bound(dtype), "h")
    for k, name in enumerate(("dx", "dy", "dpost", "dres")):
        exact = expected[k].T if k < 2 else expected[k]
        # In bfloat16 the gradient of x' has terms to 2^-16, see `_PIECES` of the coefficients.
        assert_close(grads[k], exact, bound(dtype) if k < 2 else {2: 1e-5, 4: 4e-6}[x.dtype.itemsize], name)
    for k, name in enumerate(("dphi", "dalpha", "dbias")):
        assert_close(grads[4 + k], sums[k], 1e-5, name)


def loss(x, y, post, res, phi, alpha, bias):
    """Touches every operation; one number a token."""
    rest = {"num_streams": post.shape[0]}
    new, c, h = write_read(x, Coefficients(None, post, res), y, phi, alpha, bias, **rest)
    c = coefficients(new, phi, alpha, bias, **rest)
    new = write(new, h, c.post, c.res, post.shape[0])
    return (new**2).sum(-1) + (read(new, c.pre, post.shape[0]) ** 2).sum(-1)


ARGUMENTS = ("x", "y", "post", "res", "phi", "alpha", "bias")


def gradients(f, args, **settings):
    with mhc_kernels.settings(**settings):
        return jax.jit(jax.grad(lambda *a: f(*a).sum(), argnums=tuple(range(7))))(*args)


@pytest.fixture(scope="module")
def sample():
    args = inputs(2, 24, jnp.float32)
    return args, gradients(loss, args, implementation="xla")


def shard_mapped(args):
    """Without check_vma, which the interpreter of jax does not know; `test_tpu_aot` compiles with it."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    P = PartitionSpec
    specs = (P("data"), P("data"), P(None, "data"), P(None, None, "data"), P(), P(), P())
    return jax.shard_map(loss, mesh=mesh, in_specs=specs, out_specs=P("data"), check_vma=False)(*args)


def vmapped(x, y, post, res, *params):
    def one(x, y, post, res):
        return loss(x, y, post, res, *params)

    split = lambda a, axis: jnp.stack(jnp.split(a, 3, axis))  # noqa: E731
    return jax.vmap(one)(split(x, 0), split(y, 0), split(post, 1), split(res, 2))


def scanned(x, y, post, res, *params):
    split = lambda a, axis: jnp.stack(jnp.split(a, 3, axis))  # noqa: E731
    xs = (split(x, 0), split(y, 0), split(post, 1), split(res, 2))
    return jax.lax.scan(lambda _, a: (None, loss(*a, *params)), None, xs)[1]


@pytest.mark.parametrize(
    "transformed",
    [
        pytest.param(loss, id="jit"),
        pytest.param(jax.checkpoint(loss), id="remat"),
        pytest.param(scanned, id="scan"),
        pytest.param(vmapped, id="vmap"),
        pytest.param(lambda *a: shard_mapped(a), id="shard_map"),
    ],
)
def test_transformations(transformed, sample):
    args, expected = sample
    for name, a, b in zip(ARGUMENTS, gradients(transformed, args, **TPU), expected, strict=True):
        assert_close(a, b, 1e-5, name)


def test_kernels_are_what_runs():
    args = inputs(2, 24, jnp.float32)
    with mhc_kernels.settings(**TPU):
        program = str(jax.make_jaxpr(jax.grad(lambda *a: loss(*a).sum(), argnums=range(7)))(*args))
    kernels = ["write_read", "write_read_products", "write_read_backward", "coefficients", "coefficients_backward"]
    kernels += ["write", "write_backward", "read", "read_backward", "sinkhorn", "sinkhorn_backward"]
    for name in kernels:
        assert f"name=mhc_{name}\n" in program or f"mhc_{name} " in program, name


@pytest.mark.parametrize(
    ("tokens", "block"),
    [
        pytest.param(24, 32, id="four steps share a block of coefficients"),
        pytest.param(300, 128, id="three blocks one after the other"),
        pytest.param(500, 64, id="two cores, two blocks of two steps each"),
    ],
)
def test_blocks(tokens, block, monkeypatch):
    args = inputs(2, tokens, jnp.float32)
    expected = gradients(loss, args, implementation="xla")
    monkeypatch.setattr(tpu, "block_tokens", lambda *_: block)
    for name, a, b in zip(ARGUMENTS, gradients(loss, args, **TPU), expected, strict=True):
        assert_close(a, b, 1e-5, name)


def test_block_tokens():
    assert tpu.block_tokens(4096, 1000, 2000, 0) == 512
    assert tpu.block_tokens(128 * 3, 1000, 2000, 0) == 128, "it divides N"
    assert tpu.block_tokens(4096, 50_000, 100_000, 0) == 128, "4 MiB a step are enough"
    assert tpu.block_tokens(4096, 300_000, 600_000, 0) == 64, "56 MiB hold 97"
    assert tpu.block_tokens(4096, 300_000, 600_000, 50 * 2**20) is None


def test_pieces_are_exact_in_bfloat16_and_add_up():
    a = f32(np.random.default_rng(0).normal(size=(8, 5)))
    parts = jax.jit(lambda a: tpu.pieces(a, (0, 1, 2), 0))(a)
    np.testing.assert_array_equal(parts, parts.astype(jnp.bfloat16).astype(jnp.float32))
    np.testing.assert_array_equal(f64(parts).reshape(3, 8, 5).sum(0), f64(a))


@pytest.mark.parametrize(
    ("x", "n", "reason"),
    [
        (jnp.ones((2, 18 * 128)), 18, "it needs 1 to 8 streams, n is 18"),
        (jnp.ones((2, 192)), 2, "C must be a multiple of 128, it is 96"),
        (jnp.ones((2, 256), jnp.float16), 2, "streams must be bfloat16 or float32, not float16"),
        (jnp.ones((2, 2**21)), 8, r"16 tokens need 544 MiB of VMEM, more than the 56 MiB there are"),
    ],
)
def test_what_it_cannot_run(x, n, reason):
    with pytest.raises(
        ValueError, match=f"read: implementation 'pallas_tpu' cannot run this: {reason}.*Here xla.* can"
    ):
        read(x, jnp.ones((n, 2)), n, **TPU)


def test_wrong_device():
    with (
        mhc_kernels.settings(interpret=False),
        pytest.raises(ValueError, match=r"it needs a TPU and the program is traced for a CPU\. Here xla.* can"),
    ):
        sinkhorn(jnp.ones((2, 2, 3)), **TPU)
