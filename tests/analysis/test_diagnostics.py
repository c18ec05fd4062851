"""What sees that the streams of a token have become one: oracles, values known by hand, and sizes at the ends of the dtypes."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import oracles
from support.thinned import thin
from support.tolerances import FP32_RELATIVE, assert_close

from mhc_jax.diagnostics import STREAM_MEASURES, rank_one, root_mean_square, stream_measures

measure = jax.jit(stream_measures)
U, V, W, Z = np.eye(4, 16)
"""Four orthogonal directions."""
DIRECTION = np.linspace(-1, 2, 16)


def measured(x, dtype=jnp.float32):
    """(signed cosine, absolute cosine, rank) of streams [n, C] of one token or [S, n, C] of several."""
    x = jnp.asarray(np.asarray(x, np.float64).reshape(-1, *np.shape(x)[-2:]), dtype)
    values = measure(x)
    assert all(value.dtype == jnp.float32 for value in values.values())
    return [float(values[key]) for key in STREAM_MEASURES]


KNOWN = {
    "equal": ([U, U, U, U], (1, 1, 1)),
    "equal up to sign": ([U, U, U, -U], (0, 1, 1)),
    "equal up to scale": ([U, 2 * U, 1e-3 * U, 7 * U], (1, 1, 1)),
    "equal up to sign and scale": ([DIRECTION, 2 * DIRECTION, DIRECTION / 3, -5 * DIRECTION], (0, 1, 1)),
    "two pairs": ([U, U, V, V], (1 / 3, 1 / 3, 2)),
    "two pairs up to sign": ([U, -U, V, V], (0, 1 / 3, 2)),
    "orthogonal": ([U, V, W, Z], (0, 0, 4)),
    "orthogonal, norms 1 and 2": ([U, 2 * V], (0, 0, 25 / 17)),
    "60 degrees apart": ([U, U / 2 + np.sqrt(3) / 2 * V], (1 / 2, 1 / 2, 8 / 5)),
    "one outweighs the others": ([1e6 * U, V, W, Z], (0, 0, 1)),
    "one stream": ([U], (1, 1, 1)),
    "a zero stream": ([U, -U, 0 * U], (-1, 1, 1)),
    "one that is not zero": ([U, 0 * U, 0 * U], (1, 1, 1)),
    "tiny ones beside a zero": ([1e-30 * U, 1e-30 * V, 0 * U], (0, 0, 2)),
    "all zero": ([0 * U, 0 * U, 0 * U], (1, 1, 1)),
    "two tokens": ([[U, V], [U, -U]], (-1 / 2, 1 / 2, 3 / 2)),
    "a token of zeros beside another": ([[U, V], [0 * U, 0 * U]], (0, 0, 3 / 2)),
}


@pytest.mark.parametrize("name", KNOWN)
def test_values_known_by_hand(name):
    streams, expected = KNOWN[name]
    np.testing.assert_allclose(measured(streams), expected, atol=FP32_RELATIVE)
    np.testing.assert_allclose(oracles.stream_measures(streams), expected, atol=1e-9)


DTYPES = {"float32": (1, 4), "bfloat16": (2,), "float16": (4,)}
"""Dtype to the numbers of streams that the fast suite tries it with."""


@pytest.mark.parametrize(
    ("dtype", "n"), thin(itertools.product(DTYPES, (1, 2, 4)), lambda case: case[1] in DTYPES[case[0]])
)
def test_random_streams_are_the_oracle(dtype, n):
    sizes = 10.0 ** np.random.default_rng(n).uniform(-2, 2, (5, n, 1))
    x = np.asarray(jnp.asarray(np.random.default_rng(n).normal(size=(5, n, 24)) * sizes, dtype), np.float64)
    assert_close(measured(x, dtype), oracles.stream_measures(x))


def test_independent_gaussian_streams():
    """In C dimensions E|cos| is close to sqrt(2 / (pi C)); E(tr G)^2 / E tr(G^2) = (n C + 2) / (C + n + 1)."""
    S, n, C = 400, 4, 256
    signed, absolute, rank = measured(np.random.default_rng(0).normal(size=(S, n, C)))
    assert abs(signed) < 0.005
    assert absolute == pytest.approx(np.sqrt(2 / (np.pi * C)), rel=0.03)
    assert rank == pytest.approx((n * C + 2) / (C + n + 1), rel=1e-3)


@pytest.mark.parametrize("size", [1e15, 1e38, 1e-19, 1e-30])
def test_size_changes_no_measure(size):
    """Squares of 1e38 and of 1e-30 leave float32; bfloat16 streams reach both."""
    x = np.asarray(jnp.asarray(np.random.default_rng(1).uniform(-1, 1, (3, 4, 16)), jnp.bfloat16), np.float64)
    expected = oracles.stream_measures(x)
    for dtype in (jnp.float32, jnp.bfloat16):
        scaled = np.asarray(jnp.asarray(size * x, dtype), np.float64)
        assert_close(measured(scaled, dtype), oracles.stream_measures(scaled))
    mixed = x * np.array([1, size, 1, 1])[:, None]
    assert_close(measured(mixed), oracles.stream_measures(np.float32(mixed)))
    assert_close(measured(mixed)[:2], expected[:2])
    rms = jax.jit(root_mean_square, static_argnums=1)(jnp.asarray(size * x, jnp.float32), (0, 2))
    assert_close(np.asarray(rms, np.float64) / size, np.sqrt((x**2).mean((0, 2))))


@pytest.mark.parametrize("bad", [np.inf, np.nan])
def test_streams_that_are_not_finite_have_no_measure(bad):
    assert np.isnan(measured([[U, V], [U, bad * (V + 1)]])).all()
    assert not np.isfinite(root_mean_square(jnp.asarray([1, bad]), (0,)))


def test_rank_one_is_the_best_approximation_and_leaves_collapsed_streams_alone():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(5, 4, 16)).astype(np.float32)
    found = np.asarray(rank_one(jnp.asarray(x.reshape(5, 64)), 4)).reshape(5, 4, 16)
    u, s, v = np.linalg.svd(x.astype(np.float64), full_matrices=False)
    np.testing.assert_allclose(found, u[:, :, :1] * s[:, None, :1] @ v[:, :1], atol=2e-5)
    collapsed = (np.asarray([1, -2, 0.5, 3])[None, :, None] * x[:, :1]).astype(np.float32).reshape(5, 64)
    np.testing.assert_allclose(rank_one(jnp.asarray(collapsed), 4), collapsed, atol=1e-5)
    np.testing.assert_allclose(rank_one(jnp.asarray(1e30 * collapsed), 4), 1e30 * collapsed, rtol=1e-4, atol=1e25)
