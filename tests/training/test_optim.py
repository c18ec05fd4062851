"""Schedules at exact steps, which parameters decay, and what the multiplier and the clipping touch."""

import dataclasses
import functools
import math
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.tiny_runs import tiny

from mhc_jax import train_step
from mhc_jax.config import OptimizerConfig
from mhc_jax.connections import connection_module
from mhc_jax.connections.parameter_paths import CONNECTION, path_of
from mhc_jax.optim import groups, optimizer, schedule
from mhc_jax.train_step import gradients, init_state, make_train_step

PEAK = 1e-2


def by_hand(name, step, steps, warmup, final):
    """Factor of the peak at a step counted from 1, in float64."""
    if step <= warmup or name == "constant":
        return step / warmup if step <= warmup else 1.0
    if name == "step":
        return 0.1 if step / steps > 0.9 else 0.316 if step / steps > 0.8 else 1.0
    begin = max(warmup, 1) if name == "cosine" else max(warmup, 1, steps - max(steps // 5, 1))
    part = max(step - begin, 0) / max(steps - begin, 1)
    return final + (1 - final) * {"cosine": (1 + math.cos(math.pi * part)) / 2, "wsd": 1 - part}[name]


@given(
    name=st.sampled_from(["constant", "cosine", "wsd", "step"]),
    lengths=st.integers(1, 120).flatmap(lambda steps: st.tuples(st.just(steps), st.integers(0, steps))),
    final=st.floats(0, 1),
)
@example("step", (100, 10), 0.2)  # the table of the paper
@example("wsd", (100, 10), 0.2)  # the last fifth
@example("cosine", (4, 4), 0.0)  # warm-up alone
@example("constant", (3, 1), 0.0)
@example("constant", (3, 0), 0.0)
@example("wsd", (7, 0), 0.2)  # shorter than five steps after the decay has begun
@example("wsd", (2, 1), 0.2)
@example("cosine", (100, 99), 0.2)
@settings(max_examples=40)
def test_every_step_of_every_schedule(name, lengths, final):
    """It rises to the peak, is never above it, falls without a jump (but the table's), and ends at its fraction."""
    steps, warmup = lengths
    config = OptimizerConfig(learning_rate=PEAK, schedule=name, warmup_steps=warmup, final_fraction=final)
    got = np.asarray(schedule(config, steps)(np.arange(120)))[:steps] / PEAK  # one shape: one program for every length
    wanted = [by_hand(name, step, steps, warmup, final) for step in range(1, steps + 1)]
    near_zero = 0 if final >= 0.1 else 1e-7  # a difference of numbers near one
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=near_zero)
    if name == "step":
        return
    top = max(warmup, 1) - 1
    np.testing.assert_allclose(got[[0, top]], [1 / max(warmup, 1), 1], rtol=1e-6)
    assert got.max() <= got[top] * (1 + 2**-22)  # two roundings of float32
    if steps > max(warmup, 1):
        np.testing.assert_allclose(got[-1], 1 if name == "constant" else final, rtol=1e-6, atol=near_zero)
        span = min(max(steps // 5, 1), steps - top - 1) if name == "wsd" else steps - top - 1
        assert np.abs(np.diff(got[top:])).max() <= math.pi / 2 / span + 1e-6


def tiny_config(kind, **sections):
    return tiny(Path("unused.txt"), kind, model={"vocab_size": 32}, **sections)


def paths(tree):
    return {path_of(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


@functools.cache
def ones(kind, value=1.0):
    shapes = jax.eval_shape(lambda: init_state(tiny_config(kind))).params
    return jax.tree.map(lambda a: np.full(a.shape, value, a.dtype), shapes)


def updates(config, kind, gradient):
    """Path -> first update of parameters that are all one, from gradients that are all alike."""
    tx = optimizer(config, 10, connection_module(tiny_config(kind).model.connection))
    return paths(jax.jit(lambda g, p: tx.update(g, tx.init(p), p)[0])(ones(kind, gradient), ones(kind)))


NORMS = {"final_norm/weight", "layers/attention/norm/weight", "layers/mlp/norm/weight"}


def of_links(*names):
    return {f"layers/{link}_connection/{name}" for link in ("attention", "mlp") for name in names}


STATIC = {
    "residual": set(),
    "hc": of_links("A_m", "B", "A_r", "s_a", "s_b"),
    "mhc": of_links("alpha", "bias"),
    "mhc:exit=head": of_links("alpha", "bias") | {"ends/head_bias", "ends/head_alpha"},
}
DYNAMIC = {"hc": of_links("W"), "mhc": of_links("phi"), "mhc:exit=head": of_links("phi") | {"ends/head_phi"}}
OWN = {kind: static | DYNAMIC.get(kind, set()) for kind, static in STATIC.items()}


@pytest.mark.parametrize("kind", STATIC)
def test_what_decays(kind):
    """With no gradient, Adam does nothing and a decayed parameter shrinks by learning rate x decay."""
    config = OptimizerConfig(learning_rate=0.5, schedule="constant", warmup_steps=0, weight_decay=0.25)
    found = updates(config, kind, 0.0)
    kept = {path for path, update in found.items() if not np.any(update)}
    assert kept == NORMS | STATIC[kind]
    for path, update in found.items():
        np.testing.assert_array_equal(update, 0.0 if path in kept else -0.125)
    found = groups(ones(kind), config, connection_module(tiny_config(kind).model.connection))
    assert {path for group in found if group.weight_decay == 0 for path in group.arrays} == kept


@pytest.mark.parametrize("kind", OWN)
def test_the_multiplier_touches_connections_alone(kind):
    config = OptimizerConfig(warmup_steps=0, schedule="constant")
    one = updates(config, kind, 0.5)
    for path, four in updates(dataclasses.replace(config, connection_lr_multiplier=4.0), kind, 0.5).items():
        np.testing.assert_array_equal(four, one[path] * (4 if path in OWN[kind] else 1), err_msg=path)
    assert {path for path in one if re.search(CONNECTION, path)} == OWN[kind]


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


@pytest.mark.parametrize("clip", [0.0, 5e-4, 1e-3, 1.0])  # none, of all three gradients, of the last, of none
def test_three_updates_are_adamw_by_hand(clip):
    """In float64, from gradients so small that epsilon matters; `clip` bounds the norm over all arrays; 0 turns it off."""
    config = OptimizerConfig(
        learning_rate=0.1,
        schedule="constant",
        warmup_steps=0,
        weight_decay=0.25,
        b1=0.7,
        b2=0.9,
        eps=1e-3,
        grad_clip=clip,
    )
    tx = optimizer(config, 10, connection_module(tiny_config("residual").model.connection))
    by_hand, m, v = np.array([1.0, -2.0, 0.5]), 0.0, 0.0
    params = {"w": np.float32(by_hand[:1]), "v": np.float32(by_hand[1:])}
    state, update = tx.init(params), jax.jit(tx.update)
    for t, gradient in enumerate(np.random.default_rng(0).normal(0, 1e-3, (3, 3)), 1):
        grads = {"w": np.float32(gradient[:1]), "v": np.float32(gradient[1:])}
        updates, state = update(grads, state, params)
        params = jax.tree.map(np.add, params, updates)
        gradient = gradient * (min(1, clip / np.linalg.norm(gradient)) if clip else 1)
        m, v = 0.7 * m + 0.3 * gradient, 0.9 * v + 0.1 * gradient**2
        adam = m / (1 - 0.7**t) / (np.sqrt(v / (1 - 0.9**t)) + 1e-3)
        by_hand = by_hand - 0.1 * (adam + 0.25 * by_hand)
        np.testing.assert_allclose(np.concatenate([params["w"], params["v"]]), by_hand, rtol=1e-5)


def test_the_first_parameters_follow_the_seed_of_training_alone():
    def embedding(train_seed, data_seed):
        config = tiny_config("residual", train={"seed": train_seed}, data={"seed": data_seed})
        return jax.jit(lambda: init_state(config).params["embedding"])()

    first = embedding(0, 1)
    np.testing.assert_array_equal(first, embedding(0, 2))
    assert not np.array_equal(first, embedding(2, 1))


def test_a_gradient_that_is_not_finite_changes_nothing_though_the_loss_is_finite(monkeypatch):
    def infinite(config):
        return lambda params, batch: ((jnp.float32(1), {}), jax.tree.map(lambda p: jnp.full_like(p, jnp.inf), params))

    monkeypatch.setattr(train_step, "gradients", infinite)
    config = tiny_config("residual")
    zeros = jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), jax.eval_shape(lambda: init_state(config)))
    state, metrics = jax.jit(make_train_step(config))(zeros, {})
    assert (metrics["loss"], metrics["grad_norm"]) == (1, np.inf)
    jax.tree.map(np.testing.assert_array_equal, state, zeros)
