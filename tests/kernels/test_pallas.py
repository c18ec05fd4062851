"""Pallas kernels for TPUs and NVIDIA GPUs, interpreted, agree with the float64 loops: values, gradients, transformations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mhc_kernels import projection, read, settings, sinkhorn, tpu
from mhc_kernels.ops.coefficients import pallas_gpu as statistics
from support import kernel_checks, oracles
from support.kernel_checks import f64, pulled
from support.thinned import thin
from support.tolerances import BF16_RELATIVE, FORMS_FP32, FP32_RELATIVE, SPLIT_SUMS, assert_close

F32, BF16 = jnp.float32, jnp.bfloat16
GPU, TPU = "pallas_gpu", "pallas_tpu"
on_gpus, on_tpus = (pytest.mark.parametrize("backend", [backend]) for backend in (GPU, TPU))


@pytest.fixture(autouse=True)
def interpreted(backend):
    with settings(implementation=backend, interpret=True):
        yield


# One block and a ragged one on GPUs; on TPUs 1030 tokens are two blocks at n = 8, and fill one more than half at n = 4.
DEFAULT = [*((GPU, n, 70, None, 0.0) for n in (1, 2, 3, 4, 8)), *((TPU, n, 7, None, 0.0) for n in (1, 2, 3))]
DEFAULT += [(TPU, 4, 1030, None, 0.0), (TPU, 8, 1030, None, 0.0), (GPU, 4, 70, 1, 0.0)]
V4 = [(GPU, 4, 70, 20, 1e-6), (GPU, 3, 70, 2, 1e-6), (GPU, 3, 70, 7, 0.05)]
V4 += [(TPU, 4, 5, t_max, eps) for t_max in (1, 5) for eps in (1e-6, 0.05)]


@pytest.mark.parametrize(
    ("backend", "n", "tokens", "t_max", "eps"),
    thin(DEFAULT + V4, lambda case: case[:2] != (GPU, 2) and case[3] != 20),
)
def test_sinkhorn_and_its_gradient(backend, n, tokens, t_max, eps):
    logits = (3 if eps else 2) * np.random.default_rng([n, t_max or 20]).normal(size=(n, n, tokens))
    kernel_checks.check_sinkhorn(logits, *([] if eps else kernel_checks.extreme_logits(n)), t_max=t_max, eps=eps)


@pytest.mark.parametrize("eps", [0.0, 1e-6])
@pytest.mark.parametrize("backend", [GPU, TPU, "xla"])
def test_the_gradient_of_sinkhorn_is_proportional_for_cotangents_of_any_size(backend, eps):
    """Tokens of one block have cotangents of different sizes; the kernels bring each near 1 and back."""
    logits, G = np.random.default_rng(5).normal(size=(2, 3, 3, 9)).astype(np.float32)
    size = np.resize([-90, 0, 90], 9)
    gradient_of = pulled(lambda L: sinkhorn(L, eps=eps))
    (gradient,), (far,) = (gradient_of((logits,), cotangent)[1] for cotangent in (G, np.ldexp(G, size)))
    np.testing.assert_array_equal(np.ldexp(far, -size), gradient)
    # Scalings of hard problems reach the ends of float32.  Only what is not denormal before and after has all digits.
    hard, G = np.random.default_rng(6).normal(size=(2, 6, 6, 64)).astype(np.float32)
    (gradient,), (far,) = (gradient_of((100 * hard,), np.ldexp(G, k))[1] for k in (0, -38))
    whole = np.abs(gradient) > 2.0**-82
    assert whole.sum() > 300
    np.testing.assert_array_equal(np.ldexp(far, 38)[whole], gradient[whole])


# n, C, tokens: widths that a block divides, also several times, and others; ragged tokens.
GPU_SHAPES = [(1, 16, 5), (2, 48, 9), (3, 512, 3), (4, 80, 13), (8, 32, 6)]
# Every n in float32, and the paper's in bfloat16: dtypes differ in the projection and in rounding, not in how n enters.
TPU_CASES = [*((n, F32) for n in (1, 2, 3, 4, 8)), (4, BF16), (3, BF16)]
C, TOKENS = 128, 130
"""Channels and tokens on TPUs: there is a second block, of two tokens."""


def cases(*on_tpu, full=()):
    """Parametrize a test: each GPU shape in one dtype, but no n of `full`, and `on_tpu`; the full suite has the rest.

    n = 8 takes longest to trace.
    """
    every = [(GPU, *shape, dtype) for shape in GPU_SHAPES for dtype in (F32, BF16) if shape[0] != 8 or dtype == BF16]
    fast = [case for case in every if case[1] not in full and (case[4] == BF16) == (case[1] in (2, 4, 8))]
    every += [(TPU, n, C, TOKENS, dtype) for n, dtype in TPU_CASES]
    fast += [(TPU, n, C, TOKENS, dtype) for n, dtype in on_tpu]
    slow = pytest.param(GPU, 8, 32, 6, F32, marks=pytest.mark.slow)
    return pytest.mark.parametrize(("backend", "n", "C", "T", "dtype"), [*thin(every, fast.__contains__), slow])


def rounding(dtype, backend):
    """Relative rounding error of what is stored in a dtype: one unit of the last place of bfloat16, two on GPUs."""
    return FP32_RELATIVE if dtype == F32 else BF16_RELATIVE * (2 if backend == GPU else 1)


@cases((1, F32), (3, F32), (4, BF16))
def test_read_and_its_gradients(backend, n, C, T, dtype):
    kernel_checks.check_read(n, C, T, dtype)


@on_tpus
def test_read_where_passes_of_the_loop_do_not_divide_the_channels(backend):
    kernel_checks.check_read(1, 12 * C, 2)  # 12 chunks, of which a pass has up to 10


@cases((2, F32), (4, BF16), (3, BF16), full=(8,))
def test_write_and_its_gradients(backend, n, C, T, dtype):
    kernel_checks.check_write(n, C, T, dtype)


@cases((2, F32), (8, F32), (3, BF16))
def test_coefficients_and_their_gradients(backend, n, C, T, dtype):
    kernel_checks.check_coefficients(n, C, T, dtype, streams=rounding(dtype, backend))


@cases((1, F32), (2, F32), (4, BF16), full=(8,))
def test_write_read_and_its_gradients(backend, n, C, T, dtype):
    # On TPUs the gradient of x' has terms to 2^-16 in bfloat16, see `_PIECES` of the coefficients.
    if backend == GPU:
        bounds = dict.fromkeys(("small", "sums", "parameters"), FP32_RELATIVE if dtype == F32 else SPLIT_SUMS)
    else:
        sums = 2 * FP32_RELATIVE if dtype == F32 else SPLIT_SUMS
        bounds = {"small": 2 * FP32_RELATIVE, "sums": sums, "parameters": SPLIT_SUMS}
    bounds["streams"] = rounding(dtype, backend)
    kernel_checks.check_write_read(n, C, T, dtype, **bounds, cancelling=backend == GPU)


@on_gpus
@pytest.mark.parametrize(
    ("n", "T", "dtype"), thin([(2, 21, BF16), (2, 32, BF16), (4, 37, F32)], lambda case: case[1] == 21)
)
def test_the_last_block_of_the_boundary_ends_at_the_last_token(backend, n, T, dtype):
    """Blocks of the gradient have 16 tokens; 21 and 37 tokens make two and three, of which the last two overlap."""
    exact = FP32_RELATIVE if dtype == F32 else SPLIT_SUMS
    bounds = dict.fromkeys(("small", "sums", "parameters"), exact) | {"streams": rounding(dtype, GPU)}
    kernel_checks.check_write_read(n, 32, T, dtype, **bounds, cancelling=True)


@on_gpus
@pytest.mark.parametrize("programs", [statistics.PROGRAMS, 2])
def test_coefficients_over_many_blocks_of_tokens_and_channels(backend, programs, monkeypatch):
    """With many programs each has one block of tokens; with few a program walks over all three."""
    monkeypatch.setattr(statistics, "PROGRAMS", programs)
    T, C, k = 150, 160, 3  # three blocks of tokens, the last one ragged; three of channels
    a = kernel_checks.inputs(1, C, T, BF16)
    check_projection(a["x"], a["phi"], kernel_checks.inputs(k, 1, T)["pre"], rounding(BF16, GPU))


@on_tpus
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_projection_of_one_stream_and_its_gradients(backend, dtype):
    """HC projects one stream at a time onto a few columns.  Here numbers are as small as the root of eps."""
    a = kernel_checks.inputs(4, C, 9)
    x, g = (1e-3 * a["x"]).astype(dtype), np.ones((6, 9), np.float32)
    check_projection(x, a["phi"][:, :6], g, rounding(dtype, TPU))


def check_projection(x, phi, g, bound):
    z, (dx, dphi) = pulled(lambda x, phi: projection(x, phi, 1e-6))((x, phi), g)
    X, P, G = f64(x), f64(phi), f64(g).T
    inverse = 1 / np.array([oracles.rms(row, 1e-6) for row in X])[:, None]
    Z = X @ P * inverse
    assert_close(z, Z.T, what="z")
    assert_close(dphi, X.T @ (G * inverse), what="dphi")
    shrink = (G * Z).sum(1, keepdims=True) * inverse**2 / X.shape[1]
    assert_close(dx, (G * inverse) @ P.T - shrink * X, bound, "dx")


@pytest.mark.parametrize("transform", thin(kernel_checks.OF_INTERPRETED, lambda name: name in kernel_checks.COVERING))
@pytest.mark.parametrize(("backend", "C", "bound"), [(GPU, 16, FORMS_FP32), (TPU, 128, SPLIT_SUMS)])
def test_transformations_change_nothing_and_bits_repeat(backend, C, bound, transform):
    kernel_checks.check_every_operation(kernel_checks.TRANSFORMED[transform], bound, C, 8, 3, repeat=True)


@on_tpus
def test_kernels_are_what_runs(backend):
    gradient = jax.grad(lambda *a: kernel_checks.every_operation(*a).sum(), argnums=range(5))
    program = str(jax.make_jaxpr(gradient)(*(jnp.asarray(a) for a in kernel_checks.arguments(C, 24))))
    kernels = ["write_read", "write_read_backward", "coefficients", "coefficients_backward"]
    kernels += ["write", "write_backward", "read", "read_backward", "sinkhorn", "sinkhorn_backward"]
    for name in kernels:
        assert f"name=mhc_{name}\n" in program or f"mhc_{name} " in program, name


# Four steps share a block of coefficients; three blocks one after the other; two cores, two blocks of two steps each.
@on_tpus
@pytest.mark.parametrize(("tokens", "block"), thin([(24, 32), (300, 128), (500, 64)], lambda case: case[0] == 500))
def test_results_do_not_depend_on_the_blocks(backend, tokens, block, monkeypatch):
    monkeypatch.setattr(tpu, "block_tokens", lambda *_: block)
    kernel_checks.check_every_operation(kernel_checks.every_operation, SPLIT_SUMS, C, tokens)


@on_tpus
def test_a_block_is_as_large_as_its_traffic_asks_and_vmem_holds(backend):
    assert tpu.block_tokens(4096, 1000, 2000, 0) == 512
    assert tpu.block_tokens(128 * 3, 1000, 2000, 0) == 128, "it divides N"
    assert tpu.block_tokens(4096, 50_000, 100_000, 0) == 128, "4 MiB a step are enough"
    assert tpu.block_tokens(4096, 300_000, 600_000, 0) == 64, "56 MiB hold 97"
    assert tpu.block_tokens(4096, 300_000, 600_000, 50 * 2**20) is None


@on_tpus
def test_pieces_are_exact_in_bfloat16_and_add_up(backend):
    a = np.random.default_rng(0).normal(size=(8, 5)).astype(np.float32)
    parts = jax.jit(lambda a: tpu.pieces(a, (0, 1, 2), 0))(a)
    np.testing.assert_array_equal(parts, parts.astype(jnp.bfloat16).astype(jnp.float32))
    np.testing.assert_array_equal(f64(parts).reshape(3, 8, 5).sum(0), f64(a))


@pytest.mark.parametrize(
    ("backend", "n", "C", "dtype", "reason"),
    [
        (GPU, 2, 18, F32, "C must be a multiple of 16 .*, not 18. Here xla"),
        (GPU, 9, 16, F32, "n must be 1 to 8, not 9"),
        (GPU, 2, 16, jnp.float16, "bfloat16 or float32, not float16"),
        (TPU, 18, 128, F32, "it needs 1 to 8 streams, n is 18"),
        (TPU, 2, 96, F32, "C must be a multiple of 128, it is 96.*Here xla.* can"),
        (TPU, 2, 128, jnp.float16, "streams must be bfloat16 or float32, not float16"),
        (TPU, 8, 2**18, F32, "16 tokens need 544 MiB of VMEM, more than the 56 MiB there are"),
    ],
)
def test_what_the_kernels_cannot_run_is_refused(backend, n, C, dtype, reason):
    with pytest.raises(ValueError, match=f"read: implementation '{backend}' cannot run this: .*{reason}"):
        read(jnp.ones((2, n * C), dtype), jnp.ones((n, 2)), n)


@on_gpus
def test_a_sinkhorn_that_the_kernel_cannot_run_is_refused(backend):
    with pytest.raises(ValueError, match=r"'pallas_gpu' cannot run this: .*n must be 1 to 8, not 9"):
        sinkhorn(jnp.ones((9, 9, 3)))


@pytest.mark.parametrize(("backend", "device"), [(GPU, "GPU"), (TPU, "TPU")])
def test_the_kernels_are_refused_on_another_device(backend, device):
    sentence = rf"it needs a {device} and the program is traced for a CPU\. Here xla.* can"
    with settings(interpret=False), pytest.raises(ValueError, match=sentence):
        read(jnp.ones((3, 256)), jnp.ones((2, 3)), 2)
