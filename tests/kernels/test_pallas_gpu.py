"""The Pallas kernels for NVIDIA GPUs, interpreted, agree with the float64 loops: each operation, its gradients, transformed."""

import jax.numpy as jnp
import numpy as np
import pytest
from mhc_kernels import projection, read, settings, sinkhorn
from mhc_kernels.ops.coefficients import pallas_gpu as statistics
from support import kernel_checks
from support.kernel_checks import f64, value_and_pull
from support.thinned import thin
from support.tolerances import BF16_RELATIVE, FORMS_FP32, FP32_RELATIVE, SPLIT_SUMS, assert_close

F32, BF16 = jnp.float32, jnp.bfloat16
GPU = "pallas_gpu"


@pytest.fixture(autouse=True)
def interpreted():
    with settings(implementation=GPU, interpret=True):
        yield


@pytest.mark.parametrize(
    ("n", "t_max", "eps"),
    thin(
        [*((n, None, 0.0) for n in (1, 2, 3, 4, 8)), (4, 1, 0.0), (4, 20, 1e-6), (3, 2, 1e-6), (3, 7, 0.05)],
        lambda case: case[:2] not in ((2, None), (4, 20)),
    ),
)
def test_sinkhorn_and_its_gradient(n, t_max, eps):
    logits = 2 * np.random.default_rng([n, t_max or 20]).normal(size=(n, n, 70))  # one block and a ragged one
    groups = (logits, *kernel_checks.extreme_logits(n)) if eps == 0 else (logits,)
    kernel_checks.check_sinkhorn(*groups, t_max=t_max, eps=eps)


SHAPES = [(1, 16, 5), (2, 48, 9), (3, 512, 3), (4, 80, 13), (8, 32, 6)]
"""(n, C, tokens): widths that a block divides, also several times, and others; ragged tokens."""
EVERY = [(*shape, dtype) for shape in SHAPES for dtype in (F32, BF16)]


def cases(*full):
    """Each shape in one dtype in the fast suite, those of n in `full` not at all; n = 8 takes longest to trace."""
    kept = thin(EVERY, lambda case: case[0] not in full and (case[3] == BF16) == (case[0] in (2, 4, 8)))
    return [
        pytest.param(*case, marks=pytest.mark.slow) if case[0] == 8 and case[3] == F32 else p
        for case, p in zip(EVERY, kept, strict=True)
    ]


def two_units(dtype):
    """Of the last place; float32 has its own bound."""
    return FP32_RELATIVE if dtype == F32 else 2 * BF16_RELATIVE


@pytest.mark.parametrize(("n", "C", "T", "dtype"), cases())
def test_read_and_its_gradients(n, C, T, dtype):
    kernel_checks.check_read(n, C, T, dtype)


@pytest.mark.parametrize(("n", "C", "T", "dtype"), cases(8))
def test_write_and_its_gradients(n, C, T, dtype):
    kernel_checks.check_write(n, C, T, dtype)


@pytest.mark.parametrize(("n", "C", "T", "dtype"), cases())
def test_coefficients_and_their_gradients(n, C, T, dtype):
    kernel_checks.check_coefficients(n, C, T, dtype, streams=two_units(dtype))


@pytest.mark.parametrize(("n", "C", "T", "dtype"), cases(8))
def test_write_read_and_its_gradients(n, C, T, dtype):
    small = FP32_RELATIVE if dtype == F32 else SPLIT_SUMS
    bounds = {"streams": two_units(dtype), "small": small, "sums": small, "parameters": small}
    kernel_checks.check_write_read(n, C, T, dtype, **bounds, cancelling=True)


@pytest.mark.parametrize("programs", [statistics.PROGRAMS, 2])
def test_coefficients_over_many_blocks_of_tokens_and_channels(programs, monkeypatch):
    """A program has one block of tokens where programs are many, and walks over all three where they are few."""
    monkeypatch.setattr(statistics, "PROGRAMS", programs)
    T, C, k = 150, 160, 3  # three blocks of tokens, the last one ragged; three of channels
    a = kernel_checks.inputs(1, C, T, BF16)
    x, phi, g = a["x"], a["phi"], kernel_checks.inputs(k, 1, T)["pre"]
    z, (dx, dphi) = value_and_pull(lambda x, phi: projection(x, phi, 1e-6), (x, phi), g)
    X, P, G = f64(x), f64(phi), f64(g).T
    inverse = 1 / np.sqrt((X**2).mean(1, keepdims=True) + 1e-6)
    Z = X @ P * inverse
    assert_close(z, Z.T, what="z")
    assert_close(dphi, X.T @ (G * inverse), what="dphi")
    shrink = (G * Z).sum(1, keepdims=True) * inverse**2 / C
    assert_close(dx, (G * inverse) @ P.T - shrink * X, two_units(BF16), "dx")


@pytest.mark.parametrize("transform", thin(kernel_checks.OF_INTERPRETED, lambda name: name in kernel_checks.COVERING))
def test_transformations_change_nothing_and_bits_repeat(transform):
    kernel_checks.check_every_operation(kernel_checks.TRANSFORMED[transform], FORMS_FP32, 16, 8, 3, repeat=True)


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
    sentence = r"it needs a GPU and the program is traced for a CPU\. Here xla"
    with settings(interpret=False), pytest.raises(ValueError, match=sentence):
        read(jnp.ones((3, 32)), jnp.ones((2, 3)), 2)
