"""Multi-head latent attention against loops in float64: values, gradients, causality."""

import functools

import jax
import jax.numpy as jnp
import mhc_kernels
import numpy as np
import pytest
from support.decoders import drawn
from support.oracles_mla import mla_oracle
from support.tolerances import assert_close

from mhc_jax.config import ModelConfig
from mhc_jax.cost import model_cost
from mhc_jax.errors import InputError
from mhc_jax.layers.attention import attend
from mhc_jax.layers.mla import LatentAttention

H, D, R, RANK, C, T = 2, 6, 4, 5, 8, 5
SHAPES = {"W_q": (C, H * (D + R)), "W_kv_down": (C, RANK + R), "W_kv_up": (RANK, H * 2 * D), "W_o": (H * D, C)}


def as_float64(p):
    plain = {name: value["weight"] if isinstance(value, dict) else value for name, value in p.items()}
    return {name: np.asarray(value, np.float64) for name, value in plain.items()}


@functools.cache
def setup():
    """The layer, an input, parameters, random weights of its output, and (output, gradients, sensitivity of position 2)."""
    layer = LatentAttention(H, D, R, RANK, 1e4, 1e-20, 1.0, jnp.float32)
    random = np.random.default_rng(0)
    h, w = (jnp.asarray(random.normal(size=(1, T, C)), jnp.float32) for _ in range(2))
    p = drawn(layer.init, h, spread=0.4)["params"]

    def loss(p, h):
        y, aux = layer.apply({"params": p}, h)
        assert aux == {}
        return (y * w).sum(), y

    @jax.jit
    def run(p, h):
        grads, y = jax.grad(loss, (0, 1), has_aux=True)(p, h)
        return y, grads, jax.grad(lambda h: (loss(p, h)[1][0, 2] ** 2).sum())(h)

    return layer, h, p, np.asarray(w[0], np.float64), run(p, h)


def test_mla_against_loops():
    _, h, p, _, (y, _, _) = setup()
    assert {name: p[name].shape for name in SHAPES} == SHAPES
    assert set(p) == {*SHAPES, "norm", "kv_norm"}
    assert_close(y[0], mla_oracle(as_float64(p), np.asarray(h[0], np.float64), H), 5e-6)


def test_mla_gradients_against_differences_of_the_loops():
    """Central differences of the float64 loops along a random direction, for every parameter and the input."""
    _, h, p, w, (_, grads, _) = setup()
    random = np.random.default_rng(1)
    got = {**as_float64(grads[0]), "h": np.asarray(grads[1][0], np.float64)}
    at = {**as_float64(p), "h": np.asarray(h[0], np.float64)}
    for name, grad in got.items():
        direction = random.normal(size=grad.shape)

        def loss(t, name=name, direction=direction):
            moved = {**at, name: at[name] + t * direction}
            return (mla_oracle(moved, moved["h"], H) * w).sum()

        slope = (loss(1e-6) - loss(-1e-6)) / 2e-6
        # float32 sums of up to 100 terms.
        assert_close((grad * direction).sum(), slope, 2e-5, name, terms=grad * direction)


def test_no_position_sees_a_later_one():
    sensitivity = np.abs(setup()[-1][-1][0]).max(-1)
    assert (sensitivity[:3] > 0).all()
    np.testing.assert_array_equal(sensitivity[3:], 0)


def test_bfloat16_stays_near_float32():
    layer, h, p, _, (full, _, _) = setup()
    y, _ = jax.jit(layer.clone(dtype=jnp.bfloat16).apply)({"params": p}, h)
    assert y.dtype == jnp.bfloat16
    # bfloat16 rounds to 2^-8 = 4e-3, at six products in a row.
    assert_close(y.astype(jnp.float32), full, 4e-2)


def test_scores_cost_keys_of_d_and_r_columns_and_values_of_d():
    """Training FLOPs at twice the length: the two products with T tokens, each 2 FLOPs a term, three times over."""
    config = ModelConfig(
        width=16, num_layers=3, num_heads=H, head_width=D, attention_kind="mla", rope_width=R, kv_rank=5
    )
    more = model_cost(config, 64).training_flops - model_cost(config, 32).training_flops
    assert more == 3 * 3 * 32 * H * (2 * (D + R) + 2 * D)


@pytest.mark.parametrize(
    ("T", "D", "E", "implementation", "sentence"),
    [
        (4, 6, 4, "cudnn", "attention 'cudnn' needs values as wide as keys, not 4 and 6"),
        (4, 4, 6, "xla", "no wider than keys, not 6 and 4"),
        (128, 192, 64, "splash", "multiples of 128 and keys that are multiples of 64, not 128, 64 and 192"),
        (128, 160, 128, "splash", "not 128, 128 and 160"),
    ],
)
def test_values_are_refused_where_they_cannot_be(T, D, E, implementation, sentence):
    q, v = jnp.ones((1, T, 2, D)), jnp.ones((1, T, 2, E))
    with mhc_kernels.settings(platform="tpu"), pytest.raises(InputError, match=sentence):
        attend(q, q, v, implementation)
