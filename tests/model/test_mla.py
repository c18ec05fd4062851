"""Multi-head latent attention against loops in float64: values, gradients, causality."""

import dataclasses

import jax
import jax.numpy as jnp
import mhc_kernels
import numpy as np
import pytest
from support.tolerances import assert_close

from mhc_jax.config import ModelConfig
from mhc_jax.errors import InputError
from mhc_jax.layers.attention import attend
from mhc_jax.layers.mla import LatentAttention

H, D, R, RANK, C, T = 2, 6, 4, 5, 8, 5
SHAPES = {
    "W_q": (C, H * (D + R)),
    "W_kv_down": (C, RANK + R),
    "W_kv_up": (RANK, H * 2 * D),
    "W_o": (H * D, C),
}


def rotated(v, t):
    """Pairs (d, d + R/2) turned by t 1e4^(-2d/R)."""
    out = np.zeros(R)
    for d in range(R // 2):
        angle = t * 1e4 ** (-2 * d / R)
        a, b = v[d], v[d + R // 2]
        out[d], out[d + R // 2] = a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)
    return out


def normed(v, weight):
    return v / np.sqrt((v**2).mean() + 1e-20) * weight


def mla_oracle(p, h):
    """One sequence [T, C], one position and one head after another; float64."""
    x = [normed(row, p["norm"]) for row in h]
    latent = [normed((row @ p["W_kv_down"])[:RANK], p["kv_norm"]) for row in x]
    k_R = [rotated((row @ p["W_kv_down"])[RANK:], t) for t, row in enumerate(x)]
    out = np.zeros((len(h), H * D))
    for t, row in enumerate(x):
        for head in range(H):
            q = (row @ p["W_q"])[head * (D + R) : (head + 1) * (D + R)]
            kv = [(c @ p["W_kv_up"])[head * 2 * D : (head + 1) * 2 * D] for c in latent]
            scores = np.array([(q[:D] @ kv[s][:D] + rotated(q[D:], t) @ k_R[s]) / np.sqrt(D + R) for s in range(t + 1)])
            weights = np.exp(scores - scores.max())
            weights /= weights.sum()
            out[t, head * D : (head + 1) * D] = sum(weights[s] * kv[s][D:] for s in range(t + 1))
    return out @ p["W_o"]


def setup(dtype=jnp.float32):
    layer = LatentAttention(H, D, R, RANK, 1e4, 1e-20, 1.0, dtype)
    h = jax.random.normal(jax.random.key(0), (1, T, C))
    p = layer.init(jax.random.key(1), h)["params"]
    p = {
        **p,
        "norm": {"weight": 1 + 0.1 * jnp.arange(C)},
        "kv_norm": {"weight": 1 - 0.1 * jnp.arange(RANK)},
    }
    return layer, h, p


def as_float64(p):
    plain = {name: value["weight"] if isinstance(value, dict) else value for name, value in p.items()}
    return {name: np.asarray(value, np.float64) for name, value in plain.items()}


def test_mla_against_loops():
    layer, h, p = setup()
    assert {name: p[name].shape for name in SHAPES} == SHAPES
    assert set(p) == {*SHAPES, "norm", "kv_norm"}
    y, aux = jax.jit(layer.apply)({"params": p}, h)
    assert aux == {}
    assert_close(y[0], mla_oracle(as_float64(p), np.asarray(h[0], np.float64)), 5e-6)


def test_mla_gradients_against_differences_of_the_loops():
    """Central differences of the float64 loops along a random direction, for every parameter and the input."""
    layer, h, p = setup()
    r = np.random.default_rng(0)
    w = r.normal(size=(T, C))
    grads = jax.jit(jax.grad(lambda p, h: (layer.apply({"params": p}, h)[0][0] * w.astype(np.float32)).sum(), (0, 1)))(
        p, h
    )
    got = {**as_float64(grads[0]), "h": np.asarray(grads[1][0], np.float64)}
    at = {**as_float64(p), "h": np.asarray(h[0], np.float64)}
    for name, grad in got.items():
        direction = r.normal(size=grad.shape)

        def loss(t, name=name, direction=direction):
            moved = {**at, name: at[name] + t * direction}
            return (mla_oracle(moved, moved["h"]) * w).sum()

        slope = (loss(1e-6) - loss(-1e-6)) / 2e-6
        # float32 sums of up to 100 terms.
        assert_close((grad * direction).sum(), slope, 2e-5, name, terms=grad * direction)


def test_causality_by_gradient():
    layer, h, p = setup()
    sensitivity = np.abs(jax.grad(lambda h: (layer.apply({"params": p}, h)[0][0, 2] ** 2).sum())(h)[0]).max(-1)
    assert (sensitivity[:3] > 0).all()
    np.testing.assert_array_equal(sensitivity[3:], 0)


def test_bfloat16_stays_near_float32():
    layer, h, p = setup()
    y, _ = layer.clone(dtype=jnp.bfloat16).apply({"params": p}, h)
    assert y.dtype == jnp.bfloat16
    # bfloat16 rounds to 2^-8 = 4e-3, at six products in a row.
    assert_close(y.astype(jnp.float32), layer.apply({"params": p}, h)[0], 4e-2)


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


def test_splash_is_attention_with_narrow_values():
    """JAX's splash kernel at MLA's widths (keys 128 + 64, values 128), interpreted, against plain softmax; and its gradients."""
    keys = jax.random.split(jax.random.key(0), 4)
    widths = (192, 192, 128, 128)
    q, k, v, weights = (jax.random.normal(key, (1, 128, 2, width)) for key, width in zip(keys, widths, strict=True))

    def run(implementation):
        return jax.value_and_grad(lambda *a: (attend(*a, implementation) * weights).sum(), (0, 1, 2))(q, k, v)

    with mhc_kernels.settings(platform="tpu", interpret=True):
        flash = run("splash")
    for mine, expected in zip(jax.tree.leaves(flash), jax.tree.leaves(run("xla")), strict=True):
        assert_close(mine, expected, 1e-5)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"attention_kind": "mha"}, "model.attention_kind is 'mha'; it must be one of 'gqa', 'mla'"),
        ({"kv_rank": 0}, "model.kv_rank is 0"),
        ({"rope_width": 5}, "model.rope_width is 5; rotary embeddings need an even width"),
        ({"attention": "cudnn", "compute_dtype": "bfloat16"}, "model.attention is 'cudnn'.*'xla' or 'splash'"),
    ],
)
def test_mla_that_cannot_be_is_told(settings, sentence):
    with pytest.raises(InputError, match=sentence):
        dataclasses.replace(ModelConfig(attention_kind="mla"), **settings)
