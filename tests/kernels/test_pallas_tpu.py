"""The Pallas TPU kernels, interpreted, agree with the float64 loops: forward, every gradient, transformations, bad input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mhc_kernels import projection, read, settings, sinkhorn, tpu
from support import kernel_checks, oracles
from support.kernel_checks import f64, value_and_pull
from support.thinned import thin
from support.tolerances import BF16_RELATIVE, FP32_RELATIVE, SPLIT_SUMS, assert_close

F32, BF16 = jnp.float32, jnp.bfloat16
C, TOKENS = 128, 130
"""A second block, of two tokens."""
# Every n in float32, and the paper's in bfloat16: dtypes differ in the projection and in rounding, not in how n enters.
CASES = [*((n, F32) for n in (1, 2, 3, 4, 8)), (4, BF16), (3, BF16)]


@pytest.fixture(autouse=True)
def interpreted():
    with settings(implementation="pallas_tpu", interpret=True):
        yield


def cases(*fast):
    return pytest.mark.parametrize(("n", "dtype"), thin(CASES, lambda case: case in fast))


def rounding(dtype):
    """Of what is stored in it."""
    return FP32_RELATIVE if dtype == F32 else BF16_RELATIVE


@pytest.mark.parametrize(("n", "tokens"), [(1, 7), (2, 7), (3, 7), (4, 1030), (8, 1030)])
def test_sinkhorn_and_its_gradient(n, tokens):
    """1030 tokens are two blocks at n = 8, and fill one more than half at n = 4."""
    logits = 2 * np.random.default_rng(n).normal(size=(n, n, tokens))
    kernel_checks.check_sinkhorn(logits, *kernel_checks.extreme_logits(n))


@pytest.mark.parametrize(("eps", "t_max"), [(1e-6, 1), (1e-6, 5), (0.05, 1), (0.05, 5)])
def test_sinkhorn_in_the_convention_of_v4(eps, t_max):
    kernel_checks.check_sinkhorn(3 * np.random.default_rng(t_max).normal(size=(4, 4, 5)), t_max=t_max, eps=eps)


@cases((1, F32), (3, F32), (4, BF16))
def test_read_and_its_gradients(n, dtype):
    kernel_checks.check_read(n, C, TOKENS, dtype)


def test_read_where_passes_of_the_loop_do_not_divide_the_channels():
    kernel_checks.check_read(1, 12 * C, 2)  # 12 chunks, of which a pass has up to 10


@cases((2, F32), (4, BF16), (3, BF16))
def test_write_and_its_gradients(n, dtype):
    kernel_checks.check_write(n, C, TOKENS, dtype)


@cases((2, F32), (8, F32), (3, BF16))
def test_coefficients_and_their_gradients(n, dtype):
    kernel_checks.check_coefficients(n, C, TOKENS, dtype, streams=rounding(dtype))


@cases((1, F32), (2, F32), (4, BF16))
def test_write_read_and_its_gradients(n, dtype):
    # In bfloat16 the gradient of x' has terms to 2^-16, see `_PIECES` of the coefficients.
    bounds = {"streams": rounding(dtype), "small": 2 * FP32_RELATIVE, "parameters": SPLIT_SUMS}
    bounds["sums"] = 2 * FP32_RELATIVE if dtype == F32 else SPLIT_SUMS
    kernel_checks.check_write_read(n, C, TOKENS, dtype, **bounds, cancelling=False)


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_projection_of_one_stream_and_its_gradients(dtype):
    """HC projects a stream at a time onto a few columns.  Numbers are as small as the root of eps."""
    a = kernel_checks.inputs(4, C, 9)
    x, phi = (1e-3 * a["x"]).astype(dtype), a["phi"][:, :6]
    z, (dx, dphi) = value_and_pull(lambda x, phi: projection(x, phi, 1e-6), (x, phi), np.ones((6, 9), np.float32))
    v, W = f64(x), f64(phi)
    scale = np.array([oracles.rms(row, 1e-6) for row in v])[:, None]
    assert_close(z, ((v @ W) / scale).T, what="z")
    d = W.sum(1) / scale - ((v @ W).sum(1, keepdims=True) / scale**3) * v / v.shape[1]
    assert_close(dx, d, rounding(dtype), "dx")
    assert_close(dphi, np.repeat((v / scale).sum(0)[:, None], 6, 1), what="dphi")


@pytest.mark.parametrize("transform", thin(kernel_checks.OF_INTERPRETED, lambda name: name in kernel_checks.COVERING))
def test_transformations_change_nothing(transform):
    kernel_checks.check_every_operation(kernel_checks.TRANSFORMED[transform], SPLIT_SUMS, C, 8, 3)


def test_kernels_are_what_runs():
    gradient = jax.grad(lambda *a: kernel_checks.every_operation(*a).sum(), argnums=range(5))
    program = str(jax.make_jaxpr(gradient)(*(jnp.asarray(a) for a in kernel_checks.arguments(C, 24))))
    kernels = ["write_read", "write_read_products", "write_read_backward", "coefficients", "coefficients_backward"]
    kernels += ["write", "write_backward", "read", "read_backward", "sinkhorn", "sinkhorn_backward"]
    for name in kernels:
        assert f"name=mhc_{name}\n" in program or f"mhc_{name} " in program, name


# Four steps share a block of coefficients; three blocks one after the other; two cores, two blocks of two steps each.
@pytest.mark.parametrize(("tokens", "block"), thin([(24, 32), (300, 128), (500, 64)], lambda case: case[0] == 500))
def test_results_do_not_depend_on_the_blocks(tokens, block, monkeypatch):
    monkeypatch.setattr(tpu, "block_tokens", lambda *_: block)
    kernel_checks.check_every_operation(kernel_checks.every_operation, SPLIT_SUMS, C, tokens)


def test_a_block_is_as_large_as_its_traffic_asks_and_vmem_holds():
    assert tpu.block_tokens(4096, 1000, 2000, 0) == 512
    assert tpu.block_tokens(128 * 3, 1000, 2000, 0) == 128, "it divides N"
    assert tpu.block_tokens(4096, 50_000, 100_000, 0) == 128, "4 MiB a step are enough"
    assert tpu.block_tokens(4096, 300_000, 600_000, 0) == 64, "56 MiB hold 97"
    assert tpu.block_tokens(4096, 300_000, 600_000, 50 * 2**20) is None


def test_pieces_are_exact_in_bfloat16_and_add_up():
    a = np.random.default_rng(0).normal(size=(8, 5)).astype(np.float32)
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
def test_what_the_kernels_cannot_run_is_refused(x, n, reason):
    with pytest.raises(ValueError, match=f"implementation 'pallas_tpu' cannot run this: {reason}.*Here xla.* can"):
        read(x, jnp.ones((n, 2)), n)


def test_the_kernels_are_refused_on_another_device():
    sentence = r"it needs a TPU and the program is traced for a CPU\. Here xla.* can"
    with settings(interpret=False), pytest.raises(ValueError, match=sentence):
        sinkhorn(jnp.ones((2, 2, 3)))
