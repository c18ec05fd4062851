"""The decoder: oracles of its parts, the cost of `residual` and of diagnostics that are off, and stability at depth."""

import collections
import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import mhc_kernels
import numpy as np
import pytest
from support.decoders import EXPERTS, MLA, OPTIMIZED, TOKENS, decoder_of, drawn, drawn_decoder
from support.oracles import as_float64, assert_slopes
from support.oracles_moe import swiglu
from support.tolerances import ANOTHER_PROGRAM, BF16_CHAIN, FORMS_FP32, REORDERED, assert_close

from mhc_jax import model
from mhc_jax.config import DataConfig, ExperimentConfig, ModelConfig, OptimizerConfig, TrainConfig
from mhc_jax.cost.counts import model_cost
from mhc_jax.diagnostics import STREAM_MEASURES, summarize
from mhc_jax.errors import InputError
from mhc_jax.layers.attention import Attention, attend
from mhc_jax.layers.mla import LatentAttention
from mhc_jax.layers.mlp import SwiGLU, gated
from mhc_jax.layers.norm import rms_norm
from mhc_jax.layers.rope import rope
from mhc_jax.model import Decoder, branches
from mhc_jax.train_step import init_state, make_diagnostics_step, make_train_step

MODEL = ModelConfig(vocab_size=31, width=16, num_layers=3, num_heads=4, num_kv_heads=2, mlp_width=24)
BRANCH = {"norm_eps": 1e-20, "output_scale": 1.0, "dtype": jnp.float32}
ATTENTION = BRANCH | {"rope_theta": 1e4, "implementation": "xla"}


def test_rms_norm_against_numpy():
    r = np.random.default_rng(0)
    x, w = r.normal(size=(3, 4, 8)).astype(np.float32), r.normal(size=8).astype(np.float32)
    expected = x / np.sqrt((x.astype(np.float64) ** 2).mean(-1, keepdims=True)) * w
    assert_close(rms_norm(jnp.asarray(x), jnp.asarray(w), 1e-20), expected)


def test_gradient_of_rms_norm_keeps_its_arguments_and_a_number_a_token():
    draw = np.random.default_rng(0)
    x, w, g = (jnp.asarray(draw.normal(size=size), jnp.float32) for size in ((3, 5, 8), (8,), (3, 5, 8)))
    _, expected = jax.vjp(lambda x, w: x / jnp.sqrt((x**2).mean(-1, keepdims=True)) * w[None, None], x, w)
    for mine, autodiff in zip(jax.vjp(lambda *a: rms_norm(*a, 1e-20), x, w)[1](g), expected(g), strict=True):
        assert_close(mine, autodiff, ANOTHER_PROGRAM)
    _, pull = jax.vjp(lambda *a: rms_norm(*a, 1e-20), x.astype(jnp.bfloat16), w)
    kept = sorted((a.shape, str(a.dtype)) for a in jax.tree.leaves(pull))
    assert kept == [((3, 5, 1), "float32"), ((3, 5, 8), "bfloat16"), ((8,), "float32")]


@pytest.mark.parametrize(("tokens", "parts"), [(100, 1), (8, 3), (5, 6), (1, 24), (0, 24)])
def test_the_loss_in_parts_against_numpy(tokens, parts, monkeypatch):
    """Of 24 tokens as many parts are made as keep the logits of at most `tokens` of them, or of one, in memory."""
    r, V = np.random.default_rng(0), 11
    x, W, targets = r.normal(size=(4, 6, 8)), r.normal(size=(8, V)), r.integers(0, V, (4, 6))
    logits = x @ W
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    chosen = np.eye(V)[targets]
    of_logits = 3 * (p - chosen) / targets.size
    expected = -3 * np.log((p * chosen).sum(-1)).mean()
    gradients = of_logits @ W.T, np.einsum("btc,btv->cv", x, of_logits)

    monkeypatch.setattr(model, "LOGITS_BYTES", 4 * V * tokens)
    given = jnp.asarray(x, jnp.float32), jnp.asarray(W, jnp.float32), jnp.asarray(targets)
    jaxpr = jax.make_jaxpr(lambda *a: model.mean_loss(*a, given[2]))(*given[:2])
    assert (f"f32[{parts},1,1,{24 // parts},8]" in str(jaxpr)) == (parts > 1)
    assert_close(3 * model.mean_loss(*given), expected)
    loss, found = jax.value_and_grad(lambda x, W: 3 * model.mean_loss(x, W, given[2]), (0, 1))(*given[:2])
    assert_close(loss, expected)
    for a, b in zip(found, gradients, strict=True):
        assert_close(a, b, REORDERED)


def test_rope_keeps_norms_and_depends_on_distance_only():
    q, k = np.random.default_rng(0).normal(size=(2, 8)).astype(np.float32)
    both = jnp.broadcast_to(jnp.stack([q, k])[:, None, None], (2, 16, 1, 8))
    rotated_q, rotated_k = np.asarray(rope(both, 1e4))[:, :, 0]
    np.testing.assert_allclose(np.linalg.norm(rotated_q, axis=-1), np.linalg.norm(q), rtol=1e-6)
    scores = rotated_q @ rotated_k.T
    for distance in range(-5, 6):
        np.testing.assert_allclose(np.diagonal(scores, distance), np.diagonal(scores, distance)[0], atol=1e-5)
    assert abs(scores[0, 0] - scores[5, 0]) > 1e-3
    np.testing.assert_array_equal(rotated_q[0], q)


def applied(layer, shape):
    """(output of the layer, its normed input, its matrices), the latter two in float64; the norm's weight is 1."""
    h = jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)
    p = drawn(layer.init, h, spread=0.4)["params"] | {"norm": {"weight": jnp.ones(shape[-1])}}
    y, aux = jax.jit(layer.apply)({"params": p}, h)
    assert aux == {}
    x = np.asarray(h[0], np.float64)
    x = x / np.sqrt((x**2).mean(-1, keepdims=True))
    return y[0], x, {k: np.asarray(v, np.float64) for k, v in p.items() if k != "norm"}


def test_attention_against_numpy():
    H, K, D, C, T = 4, 2, 6, 10, 5
    y, x, p = applied(Attention(num_heads=H, num_kv_heads=K, head_dim=D, **ATTENTION), (1, T, C))
    rotate = lambda v: np.asarray(rope(jnp.asarray(v, jnp.float32)[None], 1e4)[0], np.float64)  # noqa: E731
    q, k = rotate((x @ p["W_q"]).reshape(T, H, D)), rotate((x @ p["W_k"]).reshape(T, K, D))
    v = (x @ p["W_v"]).reshape(T, K, D)
    out = np.zeros((T, H, D))
    for t in range(T):
        for head in range(H):
            group = head // (H // K)
            scores = np.array([q[t, head] @ k[s, group] / np.sqrt(D) for s in range(t + 1)])
            weights = np.exp(scores - scores.max())
            weights /= weights.sum()
            out[t, head] = sum(weights[s] * v[s, group] for s in range(t + 1))
    assert_close(y, out.reshape(T, H * D) @ p["W_o"], FORMS_FP32)


def test_swiglu_against_numpy():
    y, x, p = applied(SwiGLU(hidden=7, **BRANCH), (1, 3, 5))
    assert_close(y, swiglu(x, p["W_gate"], p["W_up"], p["W_down"]))


def test_gradient_of_gated_keeps_its_two_arguments_alone():
    gate, up, g = jnp.asarray(np.random.default_rng(0).normal(size=(3, 5, 7)) * 3, jnp.float32)
    _, pull = jax.vjp(gated, gate, up)
    _, expected = jax.vjp(lambda a, b: jax.nn.silu(a) * b, gate, up)
    for mine, autodiff in zip(pull(g), expected(g), strict=True):
        assert_close(mine, autodiff, ANOTHER_PROGRAM)
    assert [a.shape for a in jax.tree.leaves(pull)] == [(5, 7), (5, 7)]


@pytest.mark.parametrize(
    ("settings", "scaled"),
    [({}, True), (MLA, True), (EXPERTS, True), ({}, False)],
    ids=["gqa", "mla", "moe", "unscaled"],
)
def test_output_projections_start_at_the_depths_share(settings, scaled):
    """Output projections start at 1 / sqrt(L) times N(0, 1/in), with L = 2 num_layers; all other matrices at N(0, 1/in)."""
    config = dataclasses.replace(MODEL, width=64, mlp_width=96, **settings, depth_scaled_init=scaled)
    for layer in branches(config, settings != EXPERTS).values():
        p = jax.jit(layer.init)(jax.random.key(0), jnp.ones((1, 4, 64)))["params"]
        for name, W in p.items():
            if name.startswith("W_"):
                share = 1 / math.sqrt(6) if scaled and name in ("W_o", "W_down", "W_shared_down") else 1
                assert float(W.std() * math.sqrt(W.shape[-2])) == pytest.approx(share, rel=0.15), name


def opcodes(compiled):
    """Histogram of opcodes in an optimized program, without the bookkeeping of parameters and tuples."""
    names = re.findall(r"^\s*(?:ROOT )?%?[\w.-]+ = .*?\s([a-z][\w-]*)\(", compiled.as_text(), re.MULTILINE)
    free = {"parameter", "tuple", "get-tuple-element", "constant", "bitcast", "copy"}
    return {k: v for k, v in collections.Counter(names).items() if k not in free}


def test_residual_adds_no_op_over_hand_written_pre_norm():
    cfg = decoder_of("residual", MODEL, unroll=MODEL.num_layers)
    params = drawn_decoder(cfg)
    attention = Attention(num_heads=4, num_kv_heads=2, head_dim=4, **ATTENTION)
    mlp = SwiGLU(hidden=24, **BRANCH)

    def hand_written(params, tokens):
        x = jnp.take(params["embedding"], tokens, axis=0)
        for l in range(cfg.num_layers):
            layer = jax.tree.map(lambda a, l=l: a[l], params["layers"])
            x = x + attention.apply({"params": layer["attention"]}, x)[0]
            x = x + mlp.apply({"params": layer["mlp"]}, x)[0]
        x = rms_norm(x, params["final_norm"]["weight"], 1e-20)
        return jnp.einsum("btc,cv->btv", x, params["unembedding"])

    def ours(params, tokens):
        return Decoder(cfg).apply({"params": params}, tokens)[0]

    both = [jax.jit(f).lower(params, TOKENS).compile(OPTIMIZED) for f in (ours, hand_written)]
    assert_close(*(program(params, TOKENS) for program in both), REORDERED)
    programs = [opcodes(program) for program in both]
    total = [sum(p.values()) for p in programs]
    assert total[0] <= total[1], f"residual {programs[0]}, by hand {programs[1]}"


def experiment(kind, **train):
    return ExperimentConfig(
        model=decoder_of(kind, MODEL),
        data=DataConfig(sequence_length=12, batch_size=2),
        optimizer=OptimizerConfig(warmup_steps=0),
        train=TrainConfig(**train),
    )


@pytest.mark.parametrize("kind", ["residual", pytest.param("mhc", marks=pytest.mark.full)])
def test_train_step_is_the_same_program_with_diagnostics_on_or_off(kind):
    batch = {"inputs": TOKENS, "targets": TOKENS}
    texts = []
    for every in (0, 50):
        config = experiment(kind, diagnostics_every=every)
        state = jax.eval_shape(lambda c=config: init_state(c))
        texts.append(jax.jit(make_train_step(config)).lower(state, batch).as_text())
    assert texts[0] == texts[1]


def test_step_that_is_not_finite_changes_nothing():
    config = experiment("residual")
    state = jax.jit(lambda: init_state(config))()
    poisoned = state.replace(params={**state.params, "unembedding": state.params["unembedding"].at[0, 0].set(jnp.nan)})
    after, metrics = jax.jit(make_train_step(config))(poisoned, {"inputs": TOKENS, "targets": TOKENS})
    assert np.isnan(metrics["loss"])
    jax.tree.map(np.testing.assert_array_equal, after, poisoned)


@pytest.mark.parametrize(
    ("kind", "num_layers"),
    [
        ("mhc:t_max=2", 64),
        pytest.param("mhc", 512, marks=pytest.mark.full),
        pytest.param("hc", 512, marks=pytest.mark.slow),
    ],
)
def test_deep_decoders_are_stable(kind, num_layers):
    """1,024 sub-layers of width 32 (the fast suite: 128): activations and mHC's composite gain stay within 2x, at the start and
    after 20 steps."""
    shape = {"width": 32, "num_layers": num_layers, "num_heads": 2, "num_kv_heads": 1, "mlp_width": 64}
    config = dataclasses.replace(
        experiment(kind),
        model=decoder_of(kind, ModelConfig(vocab_size=64, embedding_init_std=1.0, **shape)),
        data=DataConfig(sequence_length=16, batch_size=1),
        # The paper's 4.0e-4 at 60 sub-layers, carried to 1,024 by 1 / sqrt(depth).  At 1e-3 Adam's steps outgrow the depth-scaled
        # initial values and the streams grow 13x in 20 steps, whatever the connection.
        optimizer=OptimizerConfig(learning_rate=1e-4, warmup_steps=10),
    )
    state = jax.jit(lambda: init_state(config))()
    tokens = np.random.default_rng(0).integers(0, 64, (1, 17), np.int32)
    batch = {"inputs": jnp.asarray(tokens[:, :-1]), "targets": jnp.asarray(tokens[:, 1:])}
    diagnostics_step, step = jax.jit(make_diagnostics_step(config)), jax.jit(make_train_step(config))
    records = {"start": summarize(diagnostics_step(state.params, batch["inputs"]))}
    for _ in range(20):
        state, metrics = step(state, batch)
    records["end"] = summarize(diagnostics_step(state.params, batch["inputs"]))
    assert np.isfinite(metrics["loss"])
    before, L = records["start"], 2 * num_layers
    assert (before["h_res"].shape, before["stream_rms"].shape) == ((L, 4, 4), (L, 4))
    for key in ("composite_forward", *STREAM_MEASURES) if kind != "hc" else ():
        np.testing.assert_allclose(before[key], 1, atol=1e-7 * L, err_msg="a rounding for every sub-layer")
    for at, record in records.items():
        ratio = np.mean(record["stream_rms"], -1).max() / np.mean(before["stream_rms"][0])
        gain = max(record["composite_forward"].max(), record["composite_backward"].max())
        print(f"{kind}, {at}: stream RMS over its start {ratio}, composite gain {gain}")
        if kind != "hc" or at == "start":
            assert ratio < 2
            assert gain < 2


@pytest.mark.parametrize(("heads", "keys", "values"), [(4, 128, 128), (2, 192, 128)], ids=["grouped", "MLA's widths"])
def test_flash_attention_of_tpus_is_attention(heads, keys, values):
    """JAX's splash kernel, interpreted, against plain softmax: outputs and gradients, for grouped heads and narrow values."""
    random = np.random.default_rng(0)
    shapes = ((heads, keys), (2, keys), (2, values), (heads, values))
    q, k, v, weights = (jnp.asarray(random.normal(size=(1, 128, *shape)), jnp.float32) for shape in shapes)

    def run(implementation):
        loss = lambda *a: (attend(*a, implementation) * weights).sum()  # noqa: E731
        return jax.jit(jax.value_and_grad(loss, (0, 1, 2)))(q, k, v)

    with mhc_kernels.settings(platform="tpu", interpret=True):
        flash = run("splash")
    for mine, expected in zip(jax.tree.leaves(flash), jax.tree.leaves(run("xla")), strict=True):
        assert_close(mine, expected, ANOTHER_PROGRAM)


@pytest.mark.parametrize(
    ("T", "D", "E", "implementation", "platform", "sentence"),
    [
        (4, 6, 4, "cudnn", "tpu", "attention 'cudnn' needs values as wide as keys, not 4 and 6"),
        (4, 4, 6, "xla", "tpu", "no wider than keys, not 6 and 4"),
        (128, 192, 64, "splash", "tpu", "multiples of 128 and keys that are multiples of 64, not 128, 64 and 192"),
        (128, 160, 128, "splash", "tpu", "not 128, 128 and 160"),
        (96, 128, 128, "splash", "tpu", "multiples of 128"),
        (128, 128, 128, "splash", "cpu", "TPUs only"),
    ],
)
def test_attention_is_refused_where_it_cannot_be(T, D, E, implementation, platform, sentence):
    q, v = jnp.ones((1, T, 2, D)), jnp.ones((1, T, 2, E))
    with mhc_kernels.settings(platform=platform), pytest.raises(InputError, match=sentence):
        attend(q, q, v, implementation)


H, D, R, RANK, C, T = 2, 6, 4, 5, 8, 5
SHAPES = {"W_q": (C, H * (D + R)), "W_kv_down": (C, RANK + R), "W_kv_up": (RANK, H * 2 * D), "W_o": (H * D, C)}


def rotated(v, t):
    """Pairs (d, d + R/2) turned by t 1e4^(-2d/R)."""
    R = len(v)
    out = np.zeros(R)
    for d in range(R // 2):
        angle = t * 1e4 ** (-2 * d / R)
        a, b = v[d], v[d + R // 2]
        out[d], out[d + R // 2] = a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)
    return out


def normed(v, weight):
    return v / np.sqrt((v**2).mean() + 1e-20) * weight


def mla_oracle(p, h, H):
    """One sequence [T, C], one position and one of H heads after another; float64."""
    RANK = len(p["kv_norm"])
    D, R = p["W_o"].shape[0] // H, p["W_kv_down"].shape[1] - RANK
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


@functools.cache
def latent():
    """The layer, an input, parameters, random weights of its output, and (output, gradients, sensitivity of position 2)."""
    layer = LatentAttention(num_heads=H, head_dim=D, rope_width=R, kv_rank=RANK, **ATTENTION)
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


def test_mla_and_its_gradients_against_loops():
    """Outputs, gradients by central differences of the loops along random directions, and causality."""
    _, h, p, w, (y, (grads, dh), sensitivity) = latent()
    assert {name: p[name].shape for name in SHAPES} == SHAPES
    assert set(p) == {*SHAPES, "norm", "kv_norm"}
    at = as_float64({**p, "h": h[0]})
    assert_close(y[0], mla_oracle(at, at["h"], H), FORMS_FP32)
    assert_slopes(lambda at: (mla_oracle(at, at["h"], H) * w).sum(), at, as_float64({**grads, "h": dh[0]}))
    seen = np.abs(sensitivity[0]).max(-1)
    assert (seen[:3] > 0).all()
    np.testing.assert_array_equal(seen[3:], 0)


def test_mla_in_bfloat16_stays_near_float32():
    layer, h, p, _, (full, _, _) = latent()
    y, _ = jax.jit(layer.clone(dtype=jnp.bfloat16).apply)({"params": p}, h)
    assert y.dtype == jnp.bfloat16
    assert_close(y.astype(jnp.float32), full, BF16_CHAIN)


def test_scores_cost_keys_of_d_and_r_columns_and_values_of_d():
    """Twice the length adds the FLOPs of the two products with T tokens: 2 a term, three times (forward and both gradients)."""
    config = ModelConfig(
        width=16, num_layers=3, num_heads=H, head_width=D, attention_kind=f"mla:kv_rank=5:rope_width={R}"
    )
    more = model_cost(config, 64).training_flops - model_cost(config, 32).training_flops
    assert more == 3 * 3 * 32 * H * (2 * (D + R) + 2 * D)
