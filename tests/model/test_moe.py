"""DeepSeekMoE against loops in float64, its balancing, and decoders with experts: parameters, training, resuming."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import tiny_runs
from support.oracles_moe import moe_oracle
from support.tolerances import assert_close

from mhc_jax import connections
from mhc_jax.config import ModelConfig
from mhc_jax.errors import InputError
from mhc_jax.layers.moe import MoE, balanced_bias, mix_experts, route, router_health, score_entropy
from mhc_jax.loop import train
from mhc_jax.model import Decoder
from mhc_jax.train_step import init_state, make_train_step

E, K, F, C = 5, 2, 3, 6
EXPERTS: dict[str, Any] = {
    "num_experts": 4,
    "num_active_experts": 2,
    "num_shared_experts": 1,
    "expert_width": 8,
    "num_dense_layers": 1,
}
MODEL = ModelConfig(vocab_size=31, width=16, num_layers=3, num_heads=2, num_kv_heads=1, mlp_width=24, **EXPERTS)
TOKENS = jnp.arange(24).reshape(2, 12) % 31
SLOW = {kind: () if kind in ("residual", "mhc") else (pytest.mark.slow,) for kind in connections.KINDS}
KINDS = [pytest.param(kind, marks=marks) for kind, marks in SLOW.items()]


def setup(num_shared=2, dtype=jnp.float32, bias=None, tokens=7):
    layer = MoE(E, K, num_shared, F, 1.5, 1e-20, 1.0, dtype)
    h = jax.random.normal(jax.random.key(0), (2, tokens, C))
    p = layer.init(jax.random.key(1), h)["params"]
    p = {**p, "norm": {"weight": 1 + 0.1 * jnp.arange(C)}}
    return layer, h, {**p, "router_bias": jnp.zeros(E) if bias is None else jnp.asarray(bias, jnp.float32)}


UNEVEN = {
    "as it starts": None,
    "an expert without tokens": (0.0, 0.0, -9.0, 0.0, 0.0),
    "all tokens to two": (0.0, 9.0, 0.0, 9.0, 0.0),
}


@pytest.mark.parametrize("bias", UNEVEN.values(), ids=UNEVEN)
@pytest.mark.parametrize("num_shared", [0, 2])
def test_moe_against_loops(bias, num_shared):
    layer, h, p = setup(num_shared, bias=bias)
    y, aux = jax.jit(layer.apply)({"params": p}, h)
    expected, load = moe_oracle(p, np.asarray(h), K, 1.5)
    assert_close(y, expected, 5e-6)
    np.testing.assert_array_equal(aux["expert_load"], load)
    if bias == UNEVEN["an expert without tokens"]:
        assert load[2] == 0
    if bias == UNEVEN["all tokens to two"]:
        assert load[1] == load[3] == 14


@pytest.mark.parametrize("bias", UNEVEN.values(), ids=UNEVEN)
def test_moe_gradients_against_differences_of_the_loops(bias):
    """Central differences of the float64 loops along random directions, for every parameter and the input."""
    layer, h, p = setup(bias=bias, tokens=3)
    w = np.random.default_rng(0).normal(size=h.shape)
    grads = jax.jit(jax.grad(lambda p, h: (layer.apply({"params": p}, h)[0] * w.astype(np.float32)).sum(), (0, 1)))(
        p, h
    )
    np.testing.assert_array_equal(grads[0]["router_bias"], 0)
    p64, h64 = jax.tree.map(lambda a: np.asarray(a, np.float64), (p, h))
    r = np.random.default_rng(1)
    for name in [*(n for n in p if n not in ("router_bias", "norm")), "norm", "h"]:
        grad = {"h": grads[1], "norm": grads[0]["norm"]["weight"]}.get(name, grads[0].get(name))
        direction = r.normal(size=grad.shape)

        def loss(t, name=name, direction=direction):
            moved = {**p64, name: p64[name] + t * direction} if name not in ("norm", "h") else dict(p64)
            if name == "norm":
                moved["norm"] = {"weight": p64["norm"]["weight"] + t * direction}
            return (moe_oracle(moved, h64 + t * direction * (name == "h") if name == "h" else h64, K, 1.5)[0] * w).sum()

        slope = (loss(1e-6) - loss(-1e-6)) / 2e-6
        # float32 sums of up to 36 terms against differences exact to 1e-8.
        along = (np.asarray(grad, np.float64) * direction).sum()
        assert_close(along, slope, 2e-5, name, terms=np.asarray(grad) * direction)


def test_sorted_groups_equal_the_sum_over_chosen_experts():
    """`mix_experts` against a dense sum that masks, values and gradients."""
    r = [
        jax.random.normal(jax.random.key(s), shape) for s, shape in enumerate([(9, C), (E, C, F), (E, C, F), (E, F, C)])
    ]
    experts, gates, _ = route(r[0], jax.random.normal(jax.random.key(9), (C, E)), jnp.zeros(E), K, 1.0)

    def grouped(x, gates, *W):
        return mix_experts(x, experts, gates, *W)[0]

    def dense(x, gates, A, B, D):
        hidden = jax.nn.silu(jnp.einsum("nc,ecf->nef", x, A)) * jnp.einsum("nc,ecf->nef", x, B)
        mask = (jax.nn.one_hot(experts, E) * gates[:, :, None]).sum(1)
        return jnp.einsum("nef,efc,ne->nc", hidden, D, mask)

    args = (r[0], gates, *r[1:])
    assert_close(grouped(*args), dense(*args), 5e-6)
    got, expected = (jax.grad(lambda *a, f=f: (f(*a) ** 2).sum(), range(5))(*args) for f in (grouped, dense))
    for a, b in zip(got, expected, strict=True):
        assert_close(a, b, 1e-5)


def test_the_bias_chooses_and_does_not_weigh():
    x, W = jax.random.normal(jax.random.key(0), (8, C)), jax.random.normal(jax.random.key(1), (C, E))
    experts, gates, scores = route(x, W, jnp.array([5.0, 0, 0, 0, 0]), K, 2.0)
    np.testing.assert_array_equal(experts[:, 0], 0)
    np.testing.assert_allclose(gates.sum(-1), 2, rtol=1e-6)
    chosen = np.take_along_axis(np.asarray(scores), np.asarray(experts), -1)
    np.testing.assert_allclose(gates, 2 * chosen / chosen.sum(-1, keepdims=True), rtol=1e-6)


def test_balancing_evens_out_a_skewed_router():
    """A router that sends most tokens to a few experts: the load's coefficient of variation falls below 0.1."""
    x = jax.random.normal(jax.random.key(0), (2048, 8))
    W = jax.random.normal(jax.random.key(1), (8, 8))
    skew = jnp.linspace(-2.0, 2.0, 8)

    def load_of(bias):
        # Scores of x W + skew: the bias has to undo the skew.
        x1 = jnp.concatenate([x, jnp.ones((2048, 1))], 1)
        experts, _, _ = route(x1, jnp.concatenate([W, skew[None]]), bias, 2, 1.0)
        return jnp.bincount(experts.reshape(-1), length=8).astype(jnp.float32)[None]

    def cv(bias):
        load = load_of(bias)
        return float(router_health(load, jnp.ones(1), bias[None])["router_load_cv"][0])

    bias = jnp.zeros(8)
    assert cv(bias) > 0.4
    move = jax.jit(lambda b: balanced_bias(b[None], load_of(b), 2e-3)[0])
    for _ in range(400):
        bias = move(bias)
    assert cv(bias) < 0.1


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
    layer, h, p = setup()
    low = layer.clone(dtype=jnp.bfloat16)
    y, aux = low.apply({"params": p}, h)
    assert y.dtype == jnp.bfloat16
    full, full_aux = layer.apply({"params": p}, h)
    # The router is float32 in both.
    np.testing.assert_array_equal(aux["expert_load"], full_aux["expert_load"])
    np.testing.assert_array_equal(aux["router_entropy"], full_aux["router_entropy"])
    assert_close(y.astype(jnp.float32), full, 3e-2)  # bfloat16 rounds to 2^-8 = 4e-3, five times in a row


def test_nan_stays_visible_and_in_its_token():
    layer, h, p = setup()
    y, _ = layer.apply({"params": p}, h.at[0, 2, 1].set(jnp.nan))
    bad = np.asarray(np.isnan(y).all(-1))
    assert bad[0, 2]
    assert bad.sum() == 1
    assert not np.isnan(np.asarray(y)[~bad]).any()


def experiment(kind, **settings):
    model = dataclasses.replace(MODEL, connection=connections.parse(kind), **settings.pop("model", {}))
    return dataclasses.replace(tiny_runs.tiny(Path("unused.txt"), kind, **settings), model=model)


@pytest.mark.parametrize("kind", KINDS)
def test_every_connection_goes_round_experts(kind):
    """One train step of MLA and experts; the layer index goes on through both scans; only the routers' biases do not train."""
    config = experiment(kind, model={"attention_kind": "mla", "kv_rank": 8, "rope_width": 4})
    state = jax.jit(lambda: init_state(config))()
    assert jax.tree.leaves(state.params["dense_layers"])[0].shape[0] == 1
    assert state.params["layers"]["mlp"]["W_gate"].shape == (2, 4, 16, 8)
    if kind == "mhc":
        # Home streams of sub-layers 0, 1 | 2, 3, 4, 5: the largest of the first entries, b_pre.
        blocks = [state.params[name]["attention_connection"]["bias"][:, :4] for name in ("dense_layers", "layers")]
        np.testing.assert_array_equal(np.concatenate(blocks).argmax(-1), [0, 2, 0])
    batch = {"inputs": TOKENS, "targets": jnp.roll(TOKENS, -1, 1)}
    after, metrics = jax.jit(make_train_step(config))(state, batch)
    assert np.isfinite(metrics["loss"])
    assert metrics["grad_norm_per_layer"].shape == (3,)
    np.testing.assert_allclose(np.sqrt((metrics["grad_norm_per_layer"] ** 2).sum()) <= metrics["grad_norm"], True)
    _, router = jax.jit(Decoder(config.model).apply)({"params": state.params}, TOKENS)
    assert router["expert_load"].shape == (2, 4)
    np.testing.assert_array_equal(router["expert_load"].sum(-1), 2 * 24)
    expected = 1e-3 * np.sign(12 - np.asarray(router["expert_load"]))
    np.testing.assert_allclose(after.params["layers"]["mlp"]["router_bias"], expected, rtol=1e-6)
    moments = [
        m for m in jax.tree.leaves(after.opt_state, is_leaf=lambda a: isinstance(a, dict)) if isinstance(m, dict)
    ]
    assert len(moments) == 2
    for moment in moments:
        np.testing.assert_array_equal(moment["layers"]["mlp"]["router_bias"], 0)


@pytest.mark.slow
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


@pytest.mark.slow
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
    assert tiny_runs.measured(tmp_path / "whole") == tiny_runs.measured(other)
    states = [tiny_runs.final_state(folder) for folder in (tmp_path / "whole", other)]
    jax.tree.map(np.testing.assert_array_equal, *states)
    assert np.any(states[0]["params"]["layers"]["mlp"]["router_bias"])
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


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"num_experts": -1}, "model.num_experts is -1"),
        ({"num_active_experts": 5}, "model.num_active_experts is 5; it must lie between 1 and model.num_experts, 4"),
        ({"num_active_experts": 0}, "model.num_active_experts is 0"),
        ({"num_shared_experts": -1}, "model.num_shared_experts is -1"),
        ({"expert_width": 0}, "model.expert_width is 0"),
        ({"num_dense_layers": 3}, "model.num_dense_layers is 3; it must lie between 0 and model.num_layers - 1, 2"),
        ({"routed_scale": 0.0}, "model.routed_scale is 0.0"),
        ({"balancing_rate": -1.0}, "model.balancing_rate is -1.0"),
        (
            {"expert_buffer": 0.5},
            "model.expert_buffer is 0.5; use 0 .* or a multiple of the even share that is at least 1",
        ),
    ],
)
def test_experts_that_cannot_be_are_told(settings, sentence):
    with pytest.raises(InputError, match=sentence):
        dataclasses.replace(MODEL, **settings)
