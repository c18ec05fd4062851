"""Schedules at exact steps, which parameters decay, and what the multiplier and the clipping touch."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support.tiny_runs import tiny

from mhc_jax.config import OptimizerConfig
from mhc_jax.connections import connection_module
from mhc_jax.optim import CONNECTION, describe, mask, optimizer, path_of, schedule
from mhc_jax.train_step import gradients, init_state

PEAK = 1e-2


def rates(name, steps, warmup, **more):
    rate = schedule(OptimizerConfig(learning_rate=PEAK, schedule=name, warmup_steps=warmup, **more), steps)
    return np.array([float(rate(step)) for step in range(steps)]) / PEAK


def test_warm_up_moves_from_the_first_step_to_the_peak():
    np.testing.assert_allclose(rates("constant", 10, 4), [0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1, 1], rtol=1e-6)
    np.testing.assert_allclose(rates("constant", 3, 1), 1, rtol=1e-6)
    np.testing.assert_allclose(rates("constant", 3, 0), 1, rtol=1e-6)
    np.testing.assert_allclose(rates("cosine", 4, 4), [0.25, 0.5, 0.75, 1], rtol=1e-6)


FINAL = 0.2
LENGTHS = [(100, 0), (100, 20), (100, 85), (100, 99), (35, 3), (10, 2), (7, 0), (5, 4), (2, 1), (2, 0)]


def by_hand(name, step, steps, warmup):
    """Factor of the peak at a step counted from 1, after warm-up, in float64."""
    if name == "step":
        return 0.1 if step / steps > 0.9 else 0.316 if step / steps > 0.8 else 1.0
    begin = max(warmup, 1) if name == "cosine" else max(warmup, 1, steps - max(steps // 5, 1))
    part = max(step - begin, 0) / (steps - begin)
    falling = {"cosine": (1 + math.cos(math.pi * part)) / 2, "wsd": 1 - part}[name]
    return FINAL + (1 - FINAL) * falling


@pytest.mark.parametrize(("steps", "warmup"), LENGTHS)
@pytest.mark.parametrize("name", ["cosine", "wsd", "step"])
def test_every_step_of_every_schedule(name, steps, warmup):
    got = rates(name, steps, warmup, final_fraction=FINAL)
    wanted = [step / warmup if step <= warmup else by_hand(name, step, steps, warmup) for step in range(1, steps + 1)]
    np.testing.assert_allclose(got, wanted, rtol=1e-5)


@pytest.mark.parametrize(("steps", "warmup"), LENGTHS)
@pytest.mark.parametrize("name", ["constant", "cosine", "wsd", "step"])
def test_the_first_step_the_peak_and_the_last_step(name, steps, warmup):
    got = rates(name, steps, warmup, final_fraction=FINAL)
    np.testing.assert_allclose(got[0], 1 / max(warmup, 1), rtol=1e-6)
    np.testing.assert_allclose(got[max(warmup, 1) - 1], 1, rtol=1e-6)
    np.testing.assert_allclose(got[-1], {"constant": 1, "step": 0.1}.get(name, FINAL), rtol=1e-6)
    assert got.max() == got[max(warmup, 1) - 1]


def test_the_table_of_the_paper_and_the_last_fifth_in_a_hundred_steps():
    got = rates("step", 100, 10)
    assert got[10:] == pytest.approx([1.0] * 70 + [0.316] * 10 + [0.1] * 10, rel=1e-6)
    got = rates("wsd", 100, 10, final_fraction=0.2)
    assert got[10:] == pytest.approx([1.0] * 70 + [1 - 0.04 * k for k in range(1, 21)], rel=1e-6)


def shapes(kind):
    config = tiny_config(kind)
    return jax.eval_shape(lambda: init_state(config)).params


def tiny_config(kind, **settings):
    from pathlib import Path

    settings["model"] = {"vocab_size": 32, **settings.get("model", {})}
    return tiny(Path("unused.txt"), kind, **settings)


def paths(tree):
    return {path_of(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def ones(kind, value=1.0):
    return jax.tree.map(lambda a: jnp.full(a.shape, value, a.dtype), shapes(kind))


NORMS = {"final_norm/weight", "layers/attention/norm/weight", "layers/mlp/norm/weight"}
BOTH = ("layers/attention_connection", "layers/mlp_connection")
STATIC = {
    "residual": set(),
    "hc": {f"{link}/{name}" for link in BOTH for name in ("A_m", "B", "A_r", "s_a", "s_b")},
    "mhc": {f"{link}/{name}" for link in BOTH for name in ("alpha", "bias")},
    "mhc:exit=head": {f"{link}/{name}" for link in BOTH for name in ("alpha", "bias")}
    | {"ends/head_bias", "ends/head_alpha"},
}
OWN = {
    "residual": set(),
    "hc": STATIC["hc"] | {f"{link}/W" for link in BOTH},
    "mhc": STATIC["mhc"] | {f"{link}/phi" for link in BOTH},
    "mhc:exit=head": STATIC["mhc:exit=head"] | {f"{link}/phi" for link in BOTH} | {"ends/head_phi"},
}


@pytest.mark.parametrize("decay_static", [False, True])
@pytest.mark.parametrize("kind", STATIC)
def test_what_decays(kind, decay_static):
    """With no gradient, Adam does nothing and a decayed parameter shrinks by learning rate x decay."""
    config = OptimizerConfig(
        learning_rate=0.5, schedule="constant", warmup_steps=0, weight_decay=0.25, decay_static=decay_static
    )
    module = connection_module(tiny_config(kind).model.connection)
    tx, params = optimizer(config, 10, module), ones(kind)
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    kept = {path for path, update in paths(updates).items() if not np.any(update)}
    assert kept == NORMS | (set() if decay_static else STATIC[kind])
    for path, update in paths(updates).items():
        np.testing.assert_array_equal(update, 0.0 if path in kept else -0.125)
    said = describe(params, config, module)
    assert said.count("norm/weight") == 3
    assert f"none on {', '.join(p for p in paths(params) if p in kept)}" in said


@pytest.mark.parametrize("kind", OWN)
def test_the_multiplier_touches_connections_alone(kind):
    module = connection_module(tiny_config(kind).model.connection)
    params, grads = ones(kind), ones(kind, 0.5)
    updates = []
    for multiplier in (1.0, 4.0):
        config = OptimizerConfig(warmup_steps=0, schedule="constant", connection_lr_multiplier=multiplier)
        tx = optimizer(config, 10, module)
        updates.append(paths(tx.update(grads, tx.init(params), params)[0]))
    for path in updates[0]:
        np.testing.assert_array_equal(
            updates[1][path], updates[0][path] * (4 if path in OWN[kind] else 1), err_msg=path
        )
    assert {path for path, own in paths(mask(params, CONNECTION)).items() if own} == OWN[kind]


@pytest.mark.parametrize(("clip", "size", "factor"), [(1.0, 8.0, 1 / 8), (1.0, 0.5, 1.0), (0.0, 8.0, 1.0)])
def test_clipping_is_by_global_norm_and_zero_is_off(clip, size, factor):
    config = OptimizerConfig(grad_clip=clip, b1=0.5)
    tx, params = optimizer(config, 10, connection_module(tiny_config("residual").model.connection)), ones("residual")
    grads = ones("residual")
    grads = jax.tree.map(lambda g: g * size / optax.tree.norm(grads), grads)
    _, state = tx.update(grads, tx.init(params), params)
    mean = optax.tree_utils.tree_get(state, "mu")
    jax.tree.map(lambda m, g: np.testing.assert_allclose(m, 0.5 * factor * g, rtol=1e-5), mean, grads)


def test_accumulated_gradients_are_those_of_the_full_batch():
    rng = np.random.default_rng(0)
    batch = {k: rng.integers(0, 32, (4, 16)).astype(np.int32) for k in ("inputs", "targets")}
    config = tiny_config("residual")
    params = jax.jit(lambda: init_state(config))().params
    ((loss, _), grads), ((loss_4, _), grads_4) = (
        jax.jit(gradients(tiny_config("residual", optimizer={"accumulation_steps": A})))(params, batch) for A in (1, 4)
    )
    np.testing.assert_allclose(loss, loss_4, rtol=1e-6)
    for path, grad in paths(grads).items():
        # Both sum the same 64 float32 terms in different order: error relative to the largest entry.
        np.testing.assert_allclose(paths(grads_4)[path], grad, rtol=0, atol=1e-6 * np.abs(grad).max(), err_msg=path)
