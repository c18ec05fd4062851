"""The decoder in parts is the decoder; what is said of its streams equals edits of the whole decoder, NumPy and models by hand."""

import functools
import math
import re
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.decoders import EXPERTS, TOKENS, decoder_of, drawn_decoder
from support.thinned import thin
from support.tiny_runs import ROOT, tiny
from support.tolerances import ANOTHER_PROGRAM, FLOAT64, STEP_ZERO, WHOLE_GRADIENT, assert_close

from mhc_jax.analysis import streams
from mhc_jax.config import MeshConfig
from mhc_jax.connections import KINDS, Connection
from mhc_jax.data.tokenizers import load_tokenizer
from mhc_jax.errors import InputError
from mhc_jax.model import Decoder
from mhc_jax.parallel.sharding import make_mesh
from mhc_jax.runs.trained import Trained

SPEC = "mhc:num_streams=3:t_max=2:init=home"
L, N, V = 6, 3, 31
NO_LOSS = math.log(V)
"""Loss of logits that are all 0, in nats."""


@functools.cache
def model_of(spec, **settings):
    config = decoder_of(spec, **settings)
    return config, drawn_decoder(config)


def logits_of_decoder(model):
    config, params = model
    return jax.jit(lambda p: Decoder(config).apply({"params": p}, TOKENS)[0])(params)


def losses_of(logits):
    """-ln p of the next token by float64 NumPy, [B, T - 1]."""
    logits, tokens = np.asarray(logits, np.float64), np.asarray(TOKENS)
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    return -np.log([[p[b, t, tokens[b, t + 1]] for t in range(tokens.shape[1] - 1)] for b in range(len(tokens))])


CASES = [(kind, more) for kind in KINDS for more in ("dense", "experts")]
FAST = {("hc", "documents"), ("mhc", "experts"), ("single_pass", "dense"), ("attnres_block", "dense")}


@pytest.mark.parametrize(
    ("spec", "blocks"), thin([*CASES, ("mhc:num_streams=1", "dense"), ("hc", "documents")], FAST.__contains__)
)
def test_without_edits_it_is_the_decoder(spec, blocks):
    """Also when a visitor returns what it saw, where streams can be replaced."""
    given = {"experts": EXPERTS, "documents": {"attention_scope": "document:5", "norm_eps": 0.1, "qk_norm": True}}
    model = model_of(spec, **given.get(blocks, {}))
    n, expected = model[0].connection.num_streams, logits_of_decoder(model)
    shapes = []
    found = streams.run(model, TOKENS, lambda b, x: shapes.append((b, x.shape)))
    assert_close(found, expected, ANOTHER_PROGRAM)
    assert shapes == [(b, (n, 2, 12, 16)) for b in range(L + 1)]
    if spec == "attnres_block":
        with pytest.raises(InputError, match="no stream that could be replaced"):
            streams.run(model, TOKENS, lambda b, x: x)
    else:
        np.testing.assert_array_equal(streams.run(model, TOKENS, lambda b, x: x), found)


@functools.cache
def seen(spec=SPEC):
    """The streams at all boundaries, [L + 1, n, B, T, C] in float64."""
    out = []
    streams.run(model_of(spec), TOKENS, lambda b, x: out.append(np.asarray(x, np.float64)))
    return np.stack(out)


def test_the_visitor_sees_the_streams_of_the_diagnostics():
    config, params = model_of(SPEC)
    _, collected = jax.jit(lambda p: Decoder(config).apply({"params": p}, TOKENS, TOKENS.size))(params)
    assert_close(np.sqrt((seen()[:-1] ** 2).mean((2, 3, 4))), collected["stream_rms"], ANOTHER_PROGRAM)
    assert_close(seen()[0], np.stack([np.asarray(params["embedding"])[TOKENS]] * N))


def edited(change):
    """Losses of the whole decoder, in its own scan over depth, after change(b, x [B, T, n, C]) of its streams; b may be traced."""
    config, params = model_of(SPEC)

    def intercept(call, args, kwargs, context):
        link = context.module
        if not isinstance(link, Connection) or context.method_name not in ("write_read", "collapse"):
            return call(*args, **kwargs)
        x = args[0] if context.method_name == "collapse" else link.write(*args)
        b = L if link.sublayer is None else link.sublayer
        x = change(b, x.reshape(2, 12, N, 16)).reshape(2, 12, N * 16)
        if context.method_name == "collapse":
            return call(x, *args[1:])
        c = link.coefficients(x)
        return x, c, link.read(x, c)

    with nn.intercept_methods(intercept):
        return losses_of(jax.jit(lambda p: Decoder(config).apply({"params": p}, TOKENS)[0])(params))


def put(x, i, value):
    """x with `value` in place of stream i."""
    return x.at[:, :, i].set(jnp.broadcast_to(value, x[:, :, i].shape).astype(x.dtype))


def unchanged():
    return losses_of(logits_of_decoder(model_of(SPEC)))


@pytest.mark.parametrize(
    ("by", "boundaries", "i"),
    thin([("zero", None, 1), ("mean", (2, 3), 2), ("mean", (6,), 0)], lambda c: c[1] == (2, 3)),
)
def test_an_ablation_is_that_edit_of_the_whole_decoder(by, boundaries, i):
    means = jnp.asarray(seen().mean((2, 3)) * (by == "mean"), jnp.float32)
    inside = jnp.isin(jnp.arange(L + 1), jnp.array(range(L + 1) if boundaries is None else boundaries))
    expected = edited(lambda b, x: jnp.where(inside[b], put(x, i, means[b, i]), x)) - unchanged()
    found = streams.ablate(model_of(SPEC), TOKENS, by, boundaries)
    assert found.shape == (N, 2, 11)
    assert_close(found[i], expected, STEP_ZERO, terms=NO_LOSS)
    assert np.abs(expected).max() > 0.01


def test_a_rescue_is_those_edits_of_the_whole_decoder():
    """Streams 0 and 2 are at their means at boundary 1, and stream 2 is clean again at boundary 3; two sub-layers lie between."""
    clean = jnp.asarray(np.moveaxis(seen(), 1, 3), jnp.float32)
    means = clean.mean((1, 2))

    def corrupt(b, x):
        return jnp.where(b == 1, put(put(x, 0, means[1, 0]), 2, means[1, 2]), x)

    damaged = edited(corrupt).mean()
    rescued = edited(lambda b, x: jnp.where(b == 3, put(x, 2, clean[3, :, :, 2]), corrupt(b, x))).mean()
    found = streams.rescue(model_of(SPEC), TOKENS, "mean", [0, 2], 1)
    assert [found.clean, found.corrupted] == pytest.approx([unchanged().mean(), damaged], abs=STEP_ZERO)
    assert found.share[3, 2] == pytest.approx((damaged - rescued) / (damaged - unchanged().mean()), rel=1e-3)
    assert np.isnan(found.share[0]).all()
    assert np.isfinite(found.share[1:]).all()
    assert len(set(found.share[1:].round(4).flat)) > 10


def test_the_lens_is_the_final_norm_and_the_unembedding_of_each_stream():
    config, params = model_of(SPEC)
    lens = streams.logit_lens((config, params), TOKENS)
    scale, U = (np.asarray(a, np.float64) for a in (params["final_norm"]["weight"], params["unembedding"]))

    def logits(x):
        return x / np.sqrt((x**2).mean(-1, keepdims=True)) * scale @ U

    for b in range(L + 1):
        for i in range(N):
            assert_close(lens.loss[b, i], losses_of(logits(seen()[b, i])), ANOTHER_PROGRAM)
            np.testing.assert_array_equal(lens.top[b, i], logits(seen()[b, i]).argmax(-1))
        mean = logits(seen()[b].mean(0))  # mHC's exit
        assert_close(lens.collapsed_loss[b], losses_of(mean), ANOTHER_PROGRAM)
        np.testing.assert_array_equal(lens.collapsed_top[b], mean.argmax(-1))
    whole = logits_of_decoder((config, params))
    assert_close(lens.collapsed_loss[L], losses_of(whole), ANOTHER_PROGRAM)
    np.testing.assert_array_equal(lens.collapsed_top[L], whole.argmax(-1))
    one = jnp.asarray(seen()[2, 1], jnp.float32)
    assert_close(streams.unembed((config, params), one), logits(seen()[2, 1]), ANOTHER_PROGRAM)


def dominance_by_hand(sizes):
    """Shares of the tokens, and the mean share of the largest stream in the squares, for sizes [n, tokens]."""
    n, count = sizes.shape
    share, largest = [0.0] * n, 0.0
    for token in sizes.T:
        first = [i for i in range(n) if token[i] == max(token)]
        for i in first:
            share[i] += 1 / len(first) / count
        total = sum(s * s for s in token)
        largest += (max(token) ** 2 / total if total else 1 / n) / count
    return share, largest


def test_dominance_by_hand():
    random = np.random.default_rng(0).uniform(0, 1, (4, N, 2, 12))
    random[0, :, 0, 0] = 0  # a token of zeros
    random[1, :2, 1, 3] = 2  # a tie of two streams
    random[2] *= 1e30
    found = streams.dominance(random)
    for b in range(4):
        share, largest = dominance_by_hand(random[b].reshape(N, -1))
        assert_close(found.share[b], share, FLOAT64)
        assert_close(found.largest[b], largest, FLOAT64)
    for bad in (np.nan, np.inf):
        random[3, 1, 0, 5] = bad
        lost = streams.dominance(random)
        assert np.isnan(lost.share[3]).all()
        assert np.isnan(lost.largest).tolist() == [False, False, False, True]
    sizes = np.sqrt((seen() ** 2).sum(-1))
    model = streams.dominant_share(model_of(SPEC), TOKENS)
    for b in range(1, L + 1):
        share, largest = dominance_by_hand(sizes[b].reshape(N, -1))
        np.testing.assert_allclose(model.share[b], share, atol=1e-12)
        assert model.largest[b] == pytest.approx(largest, rel=1e-5)
    np.testing.assert_allclose(model.share[0], 1 / N, atol=1e-12)  # copies of the embedding
    assert model.largest[0] == pytest.approx(1 / N, rel=1e-6)


def by_hand(entry, pre, post):
    """Static HC of three streams with these factors at the entry, the read and the write of every sub-layer, and H_res = I."""
    config, params = model_of("hc:num_streams=3:dynamic=False:entry=scaled")
    params = jax.tree.map(lambda a: a, params)
    params["ends"]["entry_scale"] = jnp.broadcast_to(jnp.array(entry, jnp.float32)[:, None], (3, 16))
    for name in ("attention_connection", "mlp_connection"):
        for key, value in (("A_m", pre), ("B", post), ("A_r", np.eye(3))):
            params["layers"][name][key] = jnp.broadcast_to(jnp.array(value, jnp.float32), (3, *np.shape(value)))
    return config, params


def test_one_stream_that_carries_everything():
    model = by_hand([0, 1, 0], [0, 1, 0], [0, 1, 0])
    clean = losses_of(logits_of_decoder(model))
    found = streams.ablate(model, TOKENS)
    np.testing.assert_array_equal(found[[0, 2]], 0)
    assert_close(found[1], NO_LOSS - clean, ANOTHER_PROGRAM, terms=NO_LOSS)
    found = streams.rescue(model, TOKENS)
    assert found.corrupted == pytest.approx(NO_LOSS, rel=1e-6)
    np.testing.assert_allclose(found.share, np.broadcast_to([0, 1, 0], (L + 1, 3)), atol=1e-6)
    found = streams.rescue(model, TOKENS, streams=[0, 2])
    assert np.isnan(found.share).all()
    assert found.corrupted == found.clean
    found = streams.dominant_share(model, TOKENS)
    np.testing.assert_array_equal(found.share, np.broadcast_to([0, 1, 0], (L + 1, 3)))
    np.testing.assert_array_equal(found.largest, 1)
    found = streams.logit_lens(model, TOKENS)
    assert_close(found.loss[:, 1], found.collapsed_loss)
    assert_close(found.loss[:, [0, 2]], np.full((L + 1, 2, 2, 11), NO_LOSS))


def test_equal_streams():
    """Every stream is the whole model, so that none is missed, and at the exit any of them brings everything back."""
    model = by_hand([1, 1, 1], [1, 1, 1], [1, 1, 1])
    assert np.abs(streams.ablate(model, TOKENS)).max() < STEP_ZERO
    assert np.isnan(streams.rescue(model, TOKENS, streams=[1], boundary=L).share).all()
    np.testing.assert_allclose(streams.rescue(model, TOKENS).share[L], 1, atol=WHOLE_GRADIENT)
    found = streams.dominant_share(model, TOKENS)
    np.testing.assert_allclose(found.share, 1 / 3, atol=1e-12)
    np.testing.assert_allclose(found.largest, 1 / 3, rtol=1e-12)
    lens = streams.logit_lens(model, TOKENS)
    assert_close(lens.loss, np.repeat(lens.collapsed_loss[:, None], 3, 1), ANOTHER_PROGRAM)
    single = streams.rescue(model_of("residual"), TOKENS, "mean", boundary=2)
    np.testing.assert_allclose(single.share[2:], 1, atol=WHOLE_GRADIENT)


def test_an_ablated_stream_stays_ablated_in_its_range():
    """Sub-layers write to it, and yet the exit reads zeros."""
    model = model_of("residual")
    found = streams.ablate(model, TOKENS, boundaries=range(3, L + 1))
    assert_close(found[0], NO_LOSS - losses_of(logits_of_decoder(model)), ANOTHER_PROGRAM, terms=NO_LOSS)


def test_a_trained_model_on_a_mesh(tmp_path):
    config, params = model_of(SPEC)
    run = tiny(tmp_path / "text.txt", SPEC)
    run = type(run)(config, run.data, run.optimizer, run.train, MeshConfig(data=2))
    trained = Trained(Path("run"), 1, run, params, load_tokenizer("byte"), make_mesh(run.mesh))
    assert_close(streams.run(trained, TOKENS), logits_of_decoder((config, params)), ANOTHER_PROGRAM)
    assert_close(
        streams.ablate(trained, np.asarray(TOKENS)), streams.ablate((config, params), TOKENS), STEP_ZERO, terms=1
    )


REFUSED = [
    (
        lambda m: streams.run((m[0], {"params": m[1]}), TOKENS),
        "model is a pair of ModelConfig and dict; give a `Trained`, or",
    ),
    (
        lambda m: streams.run(m, TOKENS[0]),
        r"tokens is an array \(12,\) of int32; give integers \[B, T\] with T of at least 1",
    ),
    (lambda m: streams.ablate(m, TOKENS[:, :1]), r"T of at least 2"),
    (lambda m: streams.run(m, TOKENS + 8), "tokens has ids from 8 to 31; the model's vocabulary has 0 to 30"),
    (
        lambda m: streams.ablate(m, TOKENS, "means"),
        "by is 'means'; it must be one of 'zero', 'mean'. Did you mean 'mean'?",
    ),
    (
        lambda m: streams.ablate(m, TOKENS, boundaries=[7]),
        r"boundaries is \[7\]; give at least one number, each from 0 to 6",
    ),
    (lambda m: streams.ablate(m, TOKENS, boundaries=[]), r"boundaries is \[\]"),
    (lambda m: streams.rescue(m, TOKENS, streams=[3]), r"streams is \[3\]; give at least one number, each from 0 to 2"),
    (
        lambda m: streams.run(m, TOKENS, lambda b, x: x[:1]),
        r"shape \(1, 2, 12, 16\) at boundary 0; it must return one of shape \(3,",
    ),
]


@pytest.mark.parametrize(("call", "sentence"), REFUSED, ids=range(len(REFUSED)))
def test_refusals(call, sentence):
    with pytest.raises(InputError, match=sentence):
        call(model_of(SPEC))


def test_the_example_of_the_page():
    page = (ROOT / "docs" / "looking_inside.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    values = {"model": model_of(SPEC), "tokens": TOKENS}
    exec(code, values)
    assert [values[name].shape for name in ("loss", "late", "share")] == [(N,), (N, 2, 11), (L + 1, N)]
    assert sorted(values["norms"]) == list(range(L + 1))
    np.testing.assert_allclose(values["norms"][2], np.linalg.norm(seen()[2], axis=-1), rtol=1e-5)
    before, after = (losses_of(logits).mean() for logits in (logits_of_decoder(model_of(SPEC)), values["logits"]))
    assert abs(before - after) > 1e-3
    functions = set(re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE))
    assert all(callable(getattr(streams, name)) for name in functions)
    assert len(functions) == 6
