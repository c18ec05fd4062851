"""Bad input is refused with its shapes, and the backend that runs is the one that was named or that fits the platform."""

import functools

import jax.numpy as jnp
import jaxtyping
import pytest
from mhc_kernels import coefficients, projection, read, settings, sinkhorn, write, write_read
from mhc_kernels.choice import choose

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
    """As a user meets it, who does not check the annotations."""
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


def test_falling_back_is_said_once():
    obstacles = {"pallas_gpu": lambda: "C must be a multiple of 48"}
    with settings(platform="gpu"):
        with pytest.warns(UserWarning, match=r"read runs as plain XLA, not pallas_gpu: C must be a multiple of 48"):
            assert choose("read", None, obstacles) == "xla"
        assert choose("read", None, obstacles) == "xla"  # a second warning would be an error here


@pytest.mark.parametrize("name", ["platform", "implementation"])
def test_settings_refuse_what_they_do_not_know(name):
    with pytest.raises(ValueError, match=f"{name} is 'mars'"), settings(**{name: "mars"}):
        pass
