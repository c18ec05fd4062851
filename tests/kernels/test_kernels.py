"""Operations as XLA runs them agree with float64 loops, bad input is refused, and the right implementation runs."""

import functools

import hypothesis
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from mhc_kernels import Coefficients, coefficients, columns, projection, read, settings, sinkhorn, write, write_read
from mhc_kernels.backend_choice import choose
from mhc_kernels.ops.sinkhorn import reference
from support import kernel_checks, oracles
from support.golden_values import check_deepseek_v4, check_head, check_hy_v4, load
from support.kernel_checks import f64
from support.thinned import thin
from support.tolerances import BF16_RELATIVE, DIFFERENCES, FLOAT64, FORMS_FP32, FP32_RELATIVE, REORDERED, assert_close

STREAMS = (1, 2, 3, 4, 5, 8)
# The paper's 20 iterations, which are also the default, take seconds to compile.
ITERATIONS = thin(
    [(4, None), *((n, 3) for n in STREAMS), *((n, None) for n in STREAMS if n != 4)], lambda c: c[1] or c[0] == 4
)
every_implementation = pytest.mark.parametrize("implementation", ["xla", "pallas_tpu", "pallas_gpu"])


@pytest.mark.parametrize(("n", "t_max"), ITERATIONS)
def test_sinkhorn_and_its_gradient(n, t_max):
    r = np.random.default_rng(n)
    groups = r.normal(size=(n, n, 7)), 4 * r.normal(size=(n, n, 7)), r.uniform(-80, 80, (n, n, 7))
    kernel_checks.check_sinkhorn(*groups, *kernel_checks.extreme_logits(n), t_max=t_max)


# At eps = 0.05 the terms of its gradient that pass through eps are visible; at V4's 1e-6 they are rounding.
@pytest.mark.parametrize(
    ("n", "t_max", "eps"), thin([(2, 1, 1e-6), (3, 2, 1e-6), (4, 5, 0.05), (4, 20, 1e-6)], lambda case: case[1] < 20)
)
def test_sinkhorn_in_the_convention_of_v4(n, t_max, eps):
    logits = 3 * np.random.default_rng([n, t_max]).normal(size=(n, n, 5))
    kernel_checks.check_sinkhorn(logits, t_max=t_max, eps=eps)


@pytest.mark.parametrize("eps", [0.0, 0.05])
def test_the_reference_of_sinkhorn_is_the_loop_of_the_paper_and_of_v4(eps):
    logits = np.random.default_rng(3).normal(size=(3, 3)).astype(np.float32)
    expected = oracles.sinkhorn_v4(logits.T, 4, eps).T if eps else oracles.sinkhorn(logits, 4)
    assert_close(reference.sinkhorn(jnp.asarray(logits), 4, eps), expected)


settled = jax.jit(sinkhorn, static_argnums=1)
EIGHTHS = st.integers(-640, 640).map(lambda k: k / 8)
"""Between -80 and 80; sums of two are exact."""


@hypothesis.settings(max_examples=40)
@hypothesis.given(st.data(), st.sampled_from((2, 3, 5)), st.sampled_from((1, 2, 40)))
def test_sinkhorn_of_any_logits_has_the_marginals_and_symmetries_of_the_iteration(data, n, t_max):
    logits = data.draw(arrays(np.float32, (n, n), elements=EIGHTHS, fill=st.nothing()), "logits")
    shift = data.draw(arrays(np.float32, n, elements=EIGHTHS), "shift")
    p, q = (np.array(data.draw(st.permutations(range(n)), "order")) for _ in range(2))
    out, permuted, shifted = np.moveaxis(settled(np.stack([logits, logits[p][:, q], logits + shift], -1), t_max), -1, 0)
    expected = oracles.sinkhorn_log(logits, t_max)
    assert_close(out, expected, what="H_res")
    assert np.abs(out.sum(1) - 1).max() < 1e-6, "rows come last: their sums are 1 to rounding"
    np.testing.assert_allclose(f64(out).sum(0), expected.sum(0), 0, 2e-6, err_msg="the truncation error of the columns")
    assert_close(permuted, out[p][:, q], REORDERED, "rows and columns in another order")
    np.testing.assert_array_equal(shifted, out, "what is added to a whole column is taken out first")


def test_oracles_agree_with_the_textbook_loop_and_with_differences():
    r = np.random.default_rng(6)
    logits, G = r.normal(size=(3, 3)), r.normal(size=(3, 3))
    assert_close(oracles.sinkhorn_log(logits), oracles.sinkhorn(logits), FLOAT64)
    (numeric,) = oracles.numerical_gradient(lambda L: (G * oracles.sinkhorn(L, 5)).sum(), [logits])
    assert_close(oracles.sinkhorn_vjp(logits, G, 5), numeric, DIFFERENCES)
    args = [r.normal(size=s) for s in ((2, 3), (6, 8), 3, 8)]
    Gs = [r.normal(size=s) for s in (2, 2, (2, 2))]

    def scalar(*a):
        return sum((G * c).sum() for G, c in zip(Gs, oracles.mhc_coefficients(*a), strict=True))

    numeric = oracles.numerical_gradient(scalar, args)
    for a, b in zip(oracles.mhc_coefficients_vjp(*args, *Gs), numeric, strict=True):
        assert_close(a, b, DIFFERENCES)


@every_implementation
def test_a_bad_logit_spoils_its_own_matrix_only(implementation):
    logits = np.zeros((3, 3, 4), np.float32)
    logits[1, 2, 1:3] = np.nan, np.inf
    logits[0, 1:, 3] = -np.inf  # an entry that stays zero
    with settings(implementation=implementation, interpret=True):
        out = np.asarray(jax.jit(lambda L: sinkhorn(L, 200))(logits))
    assert np.isnan(out[..., 1:3]).all()
    np.testing.assert_allclose(out[..., 0], 1 / 3, rtol=1e-6)
    np.testing.assert_allclose(out[0, :, 3], [1, 0, 0], rtol=1e-6)
    np.testing.assert_allclose(out[1:, :, 3], [[0, 0.5, 0.5]] * 2, atol=0.01)  # the limit is approached as 1 / t


@pytest.mark.parametrize(("std", "mean", "most"), [(1, 5e-7, 5e-3), (2, 5e-4, 4e-2), (4, 9e-3, 8e-2), (8, 3e-2, 5e-1)])
def test_marginal_error_of_twenty_steps(std, mean, most):
    """The docstring of `sinkhorn` quotes these figures."""
    twenty, three = (f64(settled(std * standard_logits(), t_max)) for t_max in (20, 3))
    error = np.abs(twenty.sum(0) - 1).max(0)
    assert (error.mean(), error.max()) == pytest.approx((mean, most), rel=0.3)
    assert np.abs(three.sum(0) - 1).max(0).mean() > 3 * mean, "fewer steps leave more"


@functools.cache
def standard_logits():
    draw = jax.jit(lambda key: jax.random.normal(key, (4, 4, 16384)))
    return np.concatenate([draw(jax.random.key(seed)) for seed in range(4)], -1)


@pytest.mark.parametrize(("n", "t_max"), ITERATIONS)
def test_coefficients_and_their_gradients(n, t_max):
    kernel_checks.check_coefficients(n, 3, 2, t_max=t_max)


@pytest.mark.parametrize(
    ("n", "with_res", "dtype"),
    thin(
        [(n, with_res, dtype) for n in STREAMS for with_res in (True, False) for dtype in (jnp.float32, jnp.bfloat16)],
        lambda case: case[0] == 4 or case[1] == (case[2] == jnp.bfloat16),
    ),
)
def test_read_and_write_and_their_gradients(n, with_res, dtype):
    if with_res:
        kernel_checks.check_read(n, 5, 3, dtype)
    kernel_checks.check_write(n, 5, 3, dtype, with_res)


@pytest.mark.parametrize(
    ("platform", "dtype"),
    thin(
        [(platform, dtype) for platform in ("cpu", "tpu") for dtype in (jnp.float32, jnp.bfloat16)],
        lambda case: case in (("cpu", jnp.float32), ("tpu", jnp.bfloat16)),
    ),
)
def test_write_read_and_its_gradients(platform, dtype):
    """t_max is not the default, and coefficients are those of the streams as they are handed on."""
    # XLA's gradient of x' is rounded before the sums that make dpost and dres; on CPUs so are the two that it is the sum of.
    rounding = FP32_RELATIVE if dtype == jnp.float32 else BF16_RELATIVE * (2 if platform == "cpu" else 1)
    bounds = {"streams": rounding, "sums": rounding, "small": FP32_RELATIVE, "parameters": FP32_RELATIVE}
    with settings(platform=platform, implementation="xla"):
        kernel_checks.check_write_read(4, 24, 5, dtype, 2, **bounds, cancelling=True)


@pytest.mark.parametrize("eps", [0.0, 0.05])
def test_the_form_for_tpus_and_gpus_is_the_form_for_cpus(eps):
    """XLA has a form for CPUs and one for accelerators; both are the same operation, gradients included."""
    n, options = 4, {"num_streams": 4, "num_iters": 3, "eps": eps}
    a = {name: value for name, value in kernel_checks.inputs(n, 32, 48).items() if name != "pre"}

    def loss(x, y, post, res, phi, alpha, bias):
        new, c, h = write_read(x, Coefficients(None, post, res), y, phi, alpha, bias, **options)
        new = write(new, h, c.post, None, n) + write(new, h, c.post, c.res, n)
        first = jnp.sin(new).sum() + (h**2).sum() + read(new, None, n).sum()
        c, z = coefficients(new, phi, alpha, bias, **options), projection(new, phi, 1e-6)
        return first + (read(new, c.pre, n) ** 2).sum() + (c.res**2).sum() + jnp.cos(z).sum()

    def run(platform):
        with settings(platform=platform, implementation="xla"):
            return jax.jit(jax.value_and_grad(lambda a: loss(**a)))(a)

    jax.tree.map(assert_close, run("tpu"), run("cpu"))


def test_disabled_components_and_the_order_of_h_res():
    x, y = np.float32([[1, 2, 3, 5]]), np.float32([[10, 20]])  # n = 2, C = 2
    move = np.float32([[0, 1], [0, 0]])[..., None]  # stream 0 receives stream 1, stream 1 receives nothing

    @jax.jit
    def run(x, y):
        return read(x, None, 2), write(x, y, None, None, 2), write(x, y, None, jnp.asarray(move), 2)

    for actual, expected in zip(run(x, y), ([[2, 3.5]], [[11, 22, 13, 25]], [[13, 25, 10, 20]]), strict=True):
        np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize("parts", [("post",), ("post", "res"), ("pre", "res")])
def test_the_rest_of_the_coefficients_is_as_if_none_were_disabled(parts):
    a, order = kernel_checks.inputs(2, 4, 3), ("pre", "post", "res")
    chosen = np.concatenate([np.arange(8)[columns(2)[part]] for part in parts])

    @jax.jit
    def run(x, phi, alpha, bias):
        some = phi[:, chosen], alpha[np.array([order.index(part) for part in parts])], bias[chosen]
        whole = coefficients(x, phi, alpha, bias, num_streams=2, num_iters=2)
        return whole, coefficients(x, *some, num_streams=2, num_iters=2, parts=parts)

    whole, some = run(a["x"], *(a[name] for name in kernel_checks.PARAMETERS))
    assert [part for part in order if getattr(some, part) is not None] == list(parts)
    for part in parts:
        assert_close(getattr(some, part), getattr(whole, part), what=part)


@every_implementation
def test_a_read_without_pre_is_the_mean_of_the_streams(implementation):
    x = kernel_checks.inputs(2, 128, 3)["x"]
    with settings(implementation=implementation, interpret=True):
        h = jax.jit(lambda x: read(x, None, 2))(x)
    assert_close(h, f64(x).reshape(3, 2, 128).mean(1))


@pytest.mark.parametrize(
    "transform", thin(["remat", "vmap", "shard_map", "scan_of_remat"], lambda name: name != "remat")
)
def test_transformations_change_nothing(transform):
    kernel_checks.check_every_operation(kernel_checks.TRANSFORMED[transform], FORMS_FP32, 8, 8, 4)


GOLDEN = {"deepseek_v4": check_deepseek_v4, "deepseek_v4_head": check_head, "hy_v4": check_hy_v4}
CASES = [(module, n) for module in GOLDEN for n in (2, 4, 8)]


@pytest.mark.parametrize(
    ("module", "n"), thin(CASES, lambda case: case[1] == {"deepseek_v4": 4, "hy_v4": 2}.get(case[0], case[1]))
)
def test_modules_of_deepseek_v4_and_hy_v4_are_their_golden_values(module, n):
    """The same modules run live where torch and transformers are installed (`pip install -e .[hf]`)."""
    GOLDEN[module](load(f"{module}_n{n}"), n)


X = jnp.ones((3, 8))
PHI, ALPHA, BIAS = jnp.ones((8, 8)), jnp.ones(3), jnp.ones(8)
boundary = functools.partial(coefficients, X, PHI, ALPHA, BIAS, num_streams=2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sinkhorn(jnp.ones((2, 2, 3)), 0), r"num_iters is 0, .*float32\[2, 2, 3\]"),
        (lambda: sinkhorn(jnp.ones((2, 2, 0))), "there are no matrices"),
        (lambda: read(jnp.ones((3, 9)), jnp.ones((2, 3)), 2), r"n = 2 does not divide the last axis of x .*\[3, 9\]"),
        (lambda: read(X, jnp.ones((2, 4)), 2), r"pre must be \[2, \*tokens of x\] .*pre float32\[2, 4\]"),
        (lambda: read(jnp.ones((0, 8)), jnp.ones((2, 0)), 2), "there are no tokens"),
        (lambda: read(X, jnp.ones((0, 3)), 0), "num_streams is 0"),
        (lambda: read(X.astype(int), jnp.ones((2, 3)), 2), r"streams must have a float dtype \(got x int32\[3, 8\]\)"),
        (lambda: write_read(X, boundary(), X, PHI, ALPHA, BIAS, num_streams=2), "y must have the tokens of x"),
        (lambda: write(X, jnp.ones((3, 8)), None, None, 2), "y must have the tokens of x and 1/n of its channels"),
        (lambda: write(X, X[:, :4], jnp.ones((2, 2)), None, 2), r"post must be \[2, \*tokens of x\]"),
        (lambda: write(X, X[:, :4], None, jnp.ones((2, 1, 3)), 2), r"res must be \[2, 2, \*tokens of x\]"),
        (lambda: projection(X, jnp.ones((7, 2)), 1e-6), "phi must have a row a channel of x"),
        (
            lambda: coefficients(X, PHI, ALPHA, BIAS[:7], num_streams=2),
            r"phi must be \[8, 8\], bias \[8\] and alpha \[3\] for parts pre, post, res .*bias float32\[7\]",
        ),
        (lambda: boundary(parts=("pre",)), r"phi must be \[8, 2\], bias \[2\] and alpha \[1\]"),
        (lambda: sinkhorn(jnp.ones((2, 2, 3)), implementation="cuda"), "is 'cuda'; it must be None or one of"),
    ],
)
def test_bad_input_is_refused_with_shapes(call, message):
    """Annotations are not checked, as for a user."""
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        with pytest.raises(ValueError, match=message):
            call()
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)


def test_a_named_implementation_runs_or_raises():
    obstacles = {"pallas_tpu": lambda: None, "pallas_gpu": lambda: "C must be a multiple of 16"}
    with pytest.raises(ValueError, match=r"read: implementation 'pallas_tpu' cannot run this: it needs a TPU and the "):
        choose("read", "pallas_tpu", obstacles)
    with settings(platform="tpu"):
        assert choose("read", "pallas_tpu", obstacles) == "pallas_tpu"
        assert choose("read", None, obstacles) == "pallas_tpu"
        assert choose("read", "xla", obstacles) == "xla"
        with settings(implementation="pallas_tpu"), settings(implementation="xla"):
            assert choose("read", None, obstacles) == "xla", "the inner setting counts"
        with pytest.raises(ValueError, match=r"'triton' .* does not have this operation. Here xla, pallas_tpu"):
            choose("read", "triton", obstacles)
    with settings(interpret=True):
        assert choose("read", "pallas_tpu", obstacles) == "pallas_tpu"
        with pytest.raises(ValueError, match="C must be a multiple of 16"):
            choose("read", "pallas_gpu", obstacles)
    assert choose("read", None, obstacles) == "xla"


def test_falling_back_is_said_once(monkeypatch):
    monkeypatch.setattr("mhc_kernels.backend_choice._warned", set())
    obstacles = {"pallas_gpu": lambda: "C must be a multiple of 48"}
    with settings(platform="gpu"):
        with pytest.warns(UserWarning, match=r"read runs as plain XLA, not pallas_gpu: C must be a multiple of 48"):
            assert choose("read", None, obstacles) == "xla"
        assert choose("read", None, obstacles) == "xla"  # a second warning would be an error here


@pytest.mark.parametrize("name", ["platform", "implementation"])
def test_settings_refuse_what_they_do_not_know(name):
    with pytest.raises(ValueError, match=f"{name} is 'mars'"), settings(**{name: "mars"}):
        pass
