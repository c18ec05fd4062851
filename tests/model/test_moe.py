"""DeepSeekMoE against loops in float64, its balancing, and decoders with experts: parameters, training, resuming."""

import dataclasses
import functools
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import decoders, tiny_runs
from support.decoders import EXPERTS, MLA, TOKENS, decoder_of, drawn, started
from support.oracles_moe import moe_oracle
from support.tolerances import assert_close

from mhc_jax import connections
from mhc_jax.layers.moe import MoE, balanced_bias, mix_experts, route, router_health, score_entropy
from mhc_jax.loop import train
from mhc_jax.model import Decoder
from mhc_jax.train_step import init_state, make_train_step

E, K, F, C = 5, 2, 3, 6
MODEL = dataclasses.replace(decoders.MODEL, **EXPERTS)


@functools.cache
def layer_of(num_shared=2, dtype=jnp.float32):
    """The layer, and its compiled (parameters, h, w) -> (y, aux, gradients of the sum of y w)."""
    layer = MoE(E, K, num_shared, F, 1.5, 1e-20, 1.0, dtype)

    def loss(p, h, w):
        y, aux = layer.apply({"params": p}, h)
        return (y * w).sum(), (y, aux)

    @jax.jit
    def run(p, h, w):
        grads, (y, aux) = jax.grad(loss, (0, 1), has_aux=True)(p, h, w)
        return y, aux, grads

    return layer, run


def setup(num_shared=2, bias=None):
    """(h, parameters, w): inputs of the layer, and random weights of its output."""
    random = np.random.default_rng(0)
    h, w = (jnp.asarray(random.normal(size=(2, 5, C)), jnp.float32) for _ in range(2))
    p = drawn(layer_of(num_shared)[0].init, h, spread=0.4)["params"]
    return h, {**p, "router_bias": jnp.zeros(E) if bias is None else jnp.asarray(bias, jnp.float32)}, w


UNEVEN = {
    "as it starts": None,
    "an expert without tokens": (0.0, 0.0, -9.0, 0.0, 0.0),
    "all tokens to two": (0.0, 9.0, 0.0, 9.0, 0.0),
}


@pytest.mark.parametrize(
    ("num_shared", "bias"), [(0, UNEVEN["as it starts"]), *((2, bias) for bias in UNEVEN.values())]
)
def test_moe_and_its_gradients_against_loops(num_shared, bias):
    """Values, and central differences of the float64 loops along random directions, for every parameter and the input."""
    h, p, w = setup(num_shared, bias)
    y, aux, grads = layer_of(num_shared)[1](p, h, w)
    expected, load = moe_oracle(p, np.asarray(h), K, 1.5)
    assert_close(y, expected, 5e-6)
    np.testing.assert_array_equal(aux["expert_load"], load)
    if bias == UNEVEN["an expert without tokens"]:
        assert load[2] == 0
    if bias == UNEVEN["all tokens to two"]:
        assert load[1] == load[3] == 10

    np.testing.assert_array_equal(grads[0]["router_bias"], 0)
    p64, h64 = jax.tree.map(lambda a: np.asarray(a, np.float64), (p, h))
    random = np.random.default_rng(1)
    for name in [*(name for name in p if name != "router_bias"), "h"]:
        grad = {"h": grads[1], "norm": grads[0]["norm"]["weight"]}.get(name, grads[0].get(name))
        direction = random.normal(size=grad.shape)

        def loss(t, name=name, direction=direction):
            step = t * direction
            moved = (
                {"norm": {"weight": p64["norm"]["weight"] + step}}
                if name == "norm"
                else {name: p64.get(name, 0) + step}
            )
            at, x = ({}, h64 + step) if name == "h" else (moved, h64)
            return (moe_oracle({**p64, **at}, x, K, 1.5)[0] * np.asarray(w, np.float64)).sum()

        slope = (loss(1e-6) - loss(-1e-6)) / 2e-6
        # float32 sums of up to 36 terms against differences exact to 1e-8.
        along = (np.asarray(grad, np.float64) * direction).sum()
        assert_close(along, slope, 2e-5, name, terms=np.asarray(grad) * direction)


def normal(seed, *shapes):
    random = np.random.default_rng(seed)
    return [jnp.asarray(random.normal(size=shape), jnp.float32) for shape in shapes]


def test_sorted_groups_equal_the_sum_over_chosen_experts():
    """`mix_experts` against a dense sum that masks, values and gradients."""
    x, *W, W_router = normal(0, (9, C), (E, C, F), (E, C, F), (E, F, C), (C, E))
    experts, gates, _ = jax.jit(route, static_argnums=(3, 4))(x, W_router, jnp.zeros(E), K, 1.0)

    def grouped(x, gates, *W):
        return mix_experts(x, experts, gates, *W)[0]

    def dense(x, gates, A, B, D):
        hidden = jax.nn.silu(jnp.einsum("nc,ecf->nef", x, A)) * jnp.einsum("nc,ecf->nef", x, B)
        mask = (jax.nn.one_hot(experts, E) * gates[:, :, None]).sum(1)
        return jnp.einsum("nef,efc,ne->nc", hidden, D, mask)

    def both(f, *args):
        out, pull = jax.vjp(f, *args)
        return out, pull(2 * out)

    (y, got), (y2, expected) = (jax.jit(both, static_argnums=0)(f, x, gates, *W) for f in (grouped, dense))
    assert_close(y, y2, 5e-6)
    for a, b in zip(got, expected, strict=True):
        assert_close(a, b, 1e-5)


def test_the_bias_chooses_and_does_not_weigh():
    experts, gates, scores = route(*normal(0, (8, C), (C, E)), jnp.array([5.0, 0, 0, 0, 0]), K, 2.0)
    np.testing.assert_array_equal(experts[:, 0], 0)
    np.testing.assert_allclose(gates.sum(-1), 2, rtol=1e-6)
    chosen = np.take_along_axis(np.asarray(scores), np.asarray(experts), -1)
    np.testing.assert_allclose(gates, 2 * chosen / chosen.sum(-1, keepdims=True), rtol=1e-6)


def test_gates_of_scores_that_all_underflow_are_zero():
    _, gates, scores = route(jnp.ones((1, C)), jnp.full((C, E), -100.0), jnp.zeros(E), K, 1.0)
    np.testing.assert_array_equal(scores, 0)
    np.testing.assert_array_equal(gates, 0)


def test_balancing_evens_out_a_skewed_router():
    """A router that sends most tokens to a few experts: the load's coefficient of variation falls below 0.1."""
    x, W = normal(0, (2048, 8), (8, 8))
    # Scores of x W + skew: the bias has to undo the skew.
    x1, W1 = jnp.concatenate([x, jnp.ones((2048, 1))], 1), jnp.concatenate([W, jnp.linspace(-2.0, 2.0, 8)[None]])

    @jax.jit
    def move(bias):
        experts, _, _ = route(x1, W1, bias, 2, 1.0)
        load = jnp.bincount(experts.reshape(-1), length=8).astype(jnp.float32)[None]
        health = router_health(load, jnp.ones(1), bias[None])
        return balanced_bias(bias[None], load, 4e-3)[0], health["router_load_cv"][0]

    bias, first = move(jnp.zeros(8))
    for _ in range(200):
        bias, last = move(bias)
    assert float(first) > 0.4
    assert float(last) < 0.1


def test_health_of_known_loads():
    health = router_health(
        jnp.array([[2.0, 2, 2], [6, 0, 0]]), jnp.array([1.0, 0]), jnp.array([[0.0, 0, 0], [1, -2, 0]])
    )
    np.testing.assert_allclose(health["router_load_cv"], [0, np.sqrt(2)], rtol=1e-6)
    np.testing.assert_allclose(health["router_max_load"], [1, 3])
    np.testing.assert_allclose(health["router_bias_range"], [0, 3])


def test_entropy_of_known_scores():
    """A mean over tokens: 1 for one that prefers nothing, 1/2 for one between two of four experts, 0 for one with one."""
    scores = jnp.array([[0.3, 0.3, 0.3, 0.3], [0.6, 0.6, 0, 0], [0.9, 0, 0, 0]])
    np.testing.assert_allclose(score_entropy(scores), (1 + 0.5 + 0) / 3, rtol=1e-6)


def test_bfloat16_stays_near_float32():
    h, p, w = setup()
    (y, aux, _), (full, full_aux, _) = (layer_of(2, dtype)[1](p, h, w) for dtype in (jnp.bfloat16, jnp.float32))
    assert y.dtype == jnp.bfloat16
    # The router is float32 in both.
    np.testing.assert_array_equal(aux["expert_load"], full_aux["expert_load"])
    np.testing.assert_array_equal(aux["router_entropy"], full_aux["router_entropy"])
    assert_close(y.astype(jnp.float32), full, 3e-2)  # bfloat16 rounds to 2^-8 = 4e-3, five times in a row


def test_nan_stays_visible_and_in_its_token():
    h, p, w = setup()
    y = np.asarray(layer_of()[1](p, h.at[0, 2, 1].set(jnp.nan), w)[0])
    bad = np.isnan(y).all(-1)
    assert bad[0, 2]
    assert bad.sum() == 1
    assert not np.isnan(y[~bad]).any()


def experiment(kind, **settings):
    model = dataclasses.replace(MODEL, connection=connections.parse(kind), **settings.pop("model", {}))
    return dataclasses.replace(tiny_runs.tiny(Path("unused.txt"), kind, **settings), model=model)


def test_the_layer_index_goes_on_through_both_scans():
    """Home streams of sub-layers 0, 1 | 2, 3, 4, 5: in the parameters, and in what diagnostics collect."""
    (_, told), params = started(decoder_of("mhc:t_max=2", MODEL), 4)
    blocks = [params[name]["attention_connection"]["bias"][:, :4] for name in ("dense_layers", "layers")]
    np.testing.assert_array_equal(np.concatenate(blocks).argmax(-1), [0, 2, 0])
    np.testing.assert_array_equal(np.asarray(told["pre"]).mean(1).argmax(-1), [0, 1, 2, 3, 0, 1])


MARKS = {"residual": (), "mhc": pytest.mark.full}


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=MARKS.get(kind, pytest.mark.slow)) for kind in connections.KINDS]
)
def test_every_connection_goes_round_experts(kind):
    """One train step of MLA and experts; only the routers' biases do not train."""
    config = experiment(kind, model=MLA)
    (_, told), params = started(config.model)
    shapes = jax.eval_shape(lambda: init_state(config))
    state = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes).replace(params=params)
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, shapes.params)
    assert jax.tree.leaves(params["dense_layers"])[0].shape[0] == 1
    assert params["layers"]["mlp"]["W_gate"].shape == (2, 4, 16, 8)
    batch = {"inputs": TOKENS, "targets": np.roll(TOKENS, -1, 1)}
    after, metrics = jax.jit(make_train_step(config))(state, batch)
    assert np.isfinite(metrics["loss"])
    assert metrics["grad_norm_per_layer"].shape == (3,)
    assert np.sqrt((np.asarray(metrics["grad_norm_per_layer"]) ** 2).sum()) <= metrics["grad_norm"]
    load = np.asarray(told["expert_load"])
    assert load.shape == (2, 4)
    np.testing.assert_array_equal(load.sum(-1), 2 * 24)
    bias = after.params["layers"]["mlp"]["router_bias"]
    np.testing.assert_allclose(bias, 1e-3 * np.sign(12 - load), rtol=1e-6)
    is_tree = lambda a: isinstance(a, dict)  # noqa: E731
    moments = [m for m in jax.tree.leaves(after.opt_state, is_leaf=is_tree) if is_tree(m)]
    assert len(moments) == 2
    for moment in moments:
        np.testing.assert_array_equal(moment["layers"]["mlp"]["router_bias"], 0)


@pytest.mark.full
def test_accumulation_sees_the_load_of_the_whole_batch():
    batch = {"inputs": TOKENS, "targets": TOKENS}
    moved = []
    for A in (1, 2):
        config = experiment("residual", optimizer={"accumulation_steps": A})
        state = jax.jit(lambda config=config: init_state(config))()
        moved.append(jax.jit(make_train_step(config))(state, batch)[0].params["layers"]["mlp"]["router_bias"])
    np.testing.assert_array_equal(*moved)
    assert np.any(moved[0])


def test_dense_models_keep_their_parameter_names():
    dense = dataclasses.replace(MODEL, num_experts=0)
    params = jax.eval_shape(lambda: Decoder(dense).init(jax.random.key(0), TOKENS))["params"]
    assert set(params) == {"embedding", "final_norm", "layers", "unembedding"}
    assert set(params["layers"]["mlp"]) == {"norm", "W_gate", "W_up", "W_down"}
    assert params["layers"]["mlp"]["W_up"].shape == (3, 16, 24)


@pytest.mark.full
def test_a_run_resumes_bitwise_and_records_the_routers(tmp_path):
    text = tiny_runs.write_text(tmp_path / "text.txt")
    model = {"num_layers": 2, **EXPERTS}
    whole = tiny_runs.tiny(text, "mhc", model=model, train={"steps": 6, "diagnostics_every": 3})
    train(whole, tmp_path / "whole")
    other = tmp_path / "other"
    train(whole, other)
    # As if it had been killed after step 3.
    (other / "summary.json").unlink()
    shutil.rmtree(other / "checkpoints" / "6")
    train(whole, other)
    tiny_runs.assert_same_run(tmp_path / "whole", other)
    assert np.any(tiny_runs.final_state(other)["params"]["layers"]["mlp"]["router_bias"])
    line = tiny_runs.lines(other, "train")[-1]
    assert line["router_bias_range"] > 0
    assert line["router_max_load"] >= 1
    assert 0 <= line["router_entropy"] <= 1
    assert len(tiny_runs.lines(other, "diagnostics")[-1]["router_load_cv"]) == 1
    # A configuration from before there were experts is the same as one that says there are none.
    dense = tiny_runs.tiny(text, "residual", train={"steps": 2})
    train(dense, tmp_path / "dense")
    saved = json.loads((tmp_path / "dense" / "config.json").read_text())
    for name in (*EXPERTS, "attention_kind", "kv_rank", "rope_width", "routed_scale", "balancing_rate"):
        del saved["model"][name]
    (tmp_path / "dense" / "config.json").write_text(json.dumps(saved))
    assert train(dense, tmp_path / "dense")["status"] == "finished"
