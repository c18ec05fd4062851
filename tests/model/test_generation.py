"""Decoding over a cache against the decoder on the whole sequence, for every connection; sampling; what a person meets."""

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import tiny_runs

from mhc_jax import connections
from mhc_jax.cache import empty_cache, grown
from mhc_jax.checkpoint import saved_tokenizer
from mhc_jax.config import MeshConfig, ModelConfig
from mhc_jax.data import ByteTokenizer, train_bpe
from mhc_jax.errors import InputError
from mhc_jax.generation import Generator, Sampling, bucket, draw
from mhc_jax.loop import train
from mhc_jax.model import Decoder
from mhc_jax.sharding import make_mesh, state_shardings
from mhc_jax.trained import load_trained

MODEL = ModelConfig(vocab_size=67, width=32, num_layers=2, num_heads=4, num_kv_heads=2, mlp_width=32)
MLA = {"attention_kind": "mla", "kv_rank": 12, "rope_width": 6}
MOE = {"num_experts": 4, "num_active_experts": 2, "num_shared_experts": 1, "expert_width": 16, "num_dense_layers": 1}
PROMPTS = (np.arange(5), np.arange(7, 30))


def parameters(config):
    """Random everywhere, so that coefficients differ between tokens; nothing is compiled for it."""
    shapes = jax.eval_shape(Decoder(config).init, jax.random.key(0), jnp.zeros((1, 8), jnp.int32))["params"]
    random = np.random.default_rng(0)

    def draw_one(path, a):
        centre = 1.0 if "norm" in jax.tree_util.keystr(path) else 0.0
        return jnp.asarray(centre + random.normal(size=a.shape) * (0.2 if centre else 0.25), a.dtype)

    return jax.tree_util.tree_map_with_path(draw_one, shapes)


def assert_decodes_alike(config, steps=200):
    """`steps` greedy tokens over a cache are, token for token, those of the decoder on the whole sequence."""
    params = parameters(config)
    generator = Generator(config, params, 256, shortest=256)
    made = generator.generate(PROMPTS, steps)
    assert len(generator.programs) == 2, "one prefill and one decode program"
    sequences = np.zeros((2, 256), np.int32)
    for row, prompt in enumerate(PROMPTS):
        sequences[row, : len(prompt) + steps] = np.concatenate([prompt, made[row]])
    logits = jax.jit(lambda p, t: Decoder(config).apply({"params": p}, t)[0])(params, sequences)
    for row, prompt in enumerate(PROMPTS):
        # The most likely token after each prefix; by induction over prefixes that is decoding without a cache.
        expected = np.asarray(logits)[row].argmax(-1)[len(prompt) - 1 : len(prompt) + steps - 1]
        np.testing.assert_array_equal(made[row], expected)
        assert len(set(made[row])) > 5, "a sequence that shows something"


@pytest.mark.parametrize(("kind", "attention"), [("mhc", {}), ("single_pass", MLA)])
def test_decoding_with_cache_equals_decoding_without(kind, attention):
    assert_decodes_alike(dataclasses.replace(MODEL, connection=connections.parse(kind), **attention))


@pytest.mark.slow
@pytest.mark.parametrize("attention", [{}, MLA], ids=["gqa", "mla"])
@pytest.mark.parametrize("kind", connections.KINDS)
def test_decoding_with_cache_equals_decoding_without_for_every_kind(kind, attention):
    assert_decodes_alike(dataclasses.replace(MODEL, connection=connections.parse(kind), **attention))


@pytest.mark.slow
def test_decoding_with_experts_and_a_leading_dense_block():
    assert_decodes_alike(dataclasses.replace(MODEL, connection=connections.parse("mhc"), **MLA, **MOE))


@pytest.mark.parametrize("attention", [{}, MLA], ids=["gqa", "mla"])
def test_logits_over_a_cache_are_those_of_the_whole_sequence(attention):
    """Several tokens a call, rows of different lengths, stale slots behind them: every logit to 1e-5 of the largest."""
    config = dataclasses.replace(MODEL, connection=connections.parse("hc"), **attention)
    params, model = parameters(config), Decoder(config)
    tokens = jnp.asarray(np.random.default_rng(1).integers(0, 67, (2, 24)), jnp.int32)
    lengths = jnp.asarray([9, 14])
    whole = np.asarray(jax.jit(model.apply)({"params": params}, tokens)[0])

    @jax.jit
    def both(params):
        out, aux = model.apply({"params": params}, tokens[:, :16], cache=empty_cache(config, 2), only=lengths - 1)
        cache = grown(aux["cache"], 32)
        cache = dataclasses.replace(cache, position=lengths)  # what lies behind is stale
        rest = jnp.stack([jax.lax.dynamic_slice_in_dim(tokens[b], lengths[b], 10) for b in range(2)])
        later, aux = model.apply({"params": params}, rest, cache=cache)
        return out, later, aux["cache"].position

    out, later, position = map(np.asarray, both(params))
    np.testing.assert_array_equal(position, [19, 24])
    for b, n in enumerate((9, 14)):
        np.testing.assert_allclose(out[b, 0], whole[b, n - 1], atol=1e-5 * np.abs(whole).max())
        np.testing.assert_allclose(later[b], whole[b, n : n + 10], atol=1e-5 * np.abs(whole).max())


def test_an_answer_does_not_depend_on_the_batch_or_on_buckets():
    config = dataclasses.replace(MODEL, num_layers=1, connection=connections.parse("residual"))
    params, sampling = parameters(config), Sampling(0.9, 0.9, seed=3)
    together = Generator(config, params, 128, shortest=64).generate(PROMPTS, 40, sampling)
    alone = Generator(config, params, 128, shortest=16)
    [second] = alone.generate(PROMPTS[1:], 40, sampling, rows=[1])
    assert second == together[1]
    assert {name for name, *_ in alone.programs} == {"prefill", "decode", "grow"}
    [other] = alone.generate(PROMPTS[1:], 40, sampling, rows=[2])
    assert other != second, "rows draw differently"


def test_the_context_ends_an_answer_and_refuses_a_prompt_that_fills_it():
    config = dataclasses.replace(MODEL, num_layers=1, connection=connections.parse("residual"))
    generator = Generator(config, parameters(config), 30, shortest=32)
    assert [len(made) for made in generator.generate(PROMPTS, 100)] == [25, 7]
    with pytest.raises(InputError, match="The prompt has 30 tokens and the context 30"):
        generator.generate([np.arange(30)], 5)
    with pytest.raises(InputError, match="prompt is empty"):
        generator.generate([np.arange(0)], 5)


def test_draw_keeps_to_the_nucleus():
    p = jnp.asarray([0.5, 0.1, 0.3, 0.06, 0.04])
    keys = jax.random.split(jax.random.key(0), 1500)
    logits = jnp.broadcast_to(jnp.log(p), (1500, 5))
    drawn = np.bincount(np.asarray(draw(logits, keys, jnp.float32(1.0), jnp.float32(0.7))), minlength=5) / 1500
    assert set(np.flatnonzero(drawn)) == {0, 2}, "0.5 alone is less than 0.7, 0.5 + 0.3 is not"
    np.testing.assert_allclose(drawn[[0, 2]], [0.625, 0.375], atol=0.05)
    everything = np.bincount(np.asarray(draw(logits, keys, jnp.float32(1.0), jnp.float32(1.0))), minlength=5) / 1500
    np.testing.assert_allclose(everything, p, atol=0.05)
    only = np.asarray(draw(logits, keys, jnp.float32(1.0), jnp.float32(0.01)))
    np.testing.assert_array_equal(only, 0)


def test_sampling_refuses_what_it_cannot_do():
    with pytest.raises(InputError, match="temperature is -1"):
        Sampling(temperature=-1.0)
    with pytest.raises(InputError, match="top_p is 0"):
        Sampling(top_p=0.0)


def test_buckets():
    assert [bucket(n) for n in (1, 32, 33, 64, 65, 1000)] == [32, 32, 64, 64, 128, 1024]


@pytest.mark.slow
@pytest.mark.parametrize("attention", [{}, MLA], ids=["gqa", "mla"])
def test_decoding_on_a_mesh(attention):
    """Rows over data, heads over tensor: the same tokens as on one device."""
    config = dataclasses.replace(MODEL, connection=connections.parse("mhc"), **attention)
    params = parameters(config)
    expected = Generator(config, params, 128, shortest=64).generate(PROMPTS, 40)
    mesh = make_mesh(MeshConfig(data=2, tensor=2))
    placed = jax.device_put(params, state_shardings(mesh, params))
    assert Generator(config, placed, 128, mesh=mesh, shortest=64).generate(PROMPTS, 40) == expected


def test_generate_script(tmp_path):
    """A person talks to a run; mistakes are told in one sentence."""
    text = tiny_runs.write_text(tmp_path / "text.txt")
    run = tmp_path / "run"
    train(tiny_runs.tiny(text, train={"steps": 3}), run)
    ask = ("generate", f"--checkpoint={run}", "--context=64", "--max_new=20")
    status, out, err = tiny_runs.run_script(*ask, "--prompt=the stream", "--temperature=0")
    assert status == 0, err
    assert out.startswith("the stream")
    assert "20 tokens" in err
    status, _, err = tiny_runs.run_script(*ask, "--prompt=" + "x" * 70)
    assert status == 2
    assert "The prompt has 70 tokens and the context 64" in err
    assert len(err.splitlines()) == 2
    assert err.startswith("run was trained on sequences of 16 tokens and reads up to 64 here")


def test_a_run_is_loaded_with_its_own_tokenizer_and_no_other(tmp_path):
    text = tiny_runs.write_text(tmp_path / "text.txt")
    run = tmp_path / "run"
    train(tiny_runs.tiny(text, train={"steps": 3}), run)
    model = load_trained(run)
    assert (model.step, model.tokenizer.fingerprint) == (3, ByteTokenizer.fingerprint)
    assert saved_tokenizer(run) == {"kind": "byte", "fingerprint": ByteTokenizer.fingerprint}
    train_bpe([text.read_text()], 300, tmp_path / "bpe.json")
    with pytest.raises(InputError, match=r"not the one that .* was trained with"):
        load_trained(run, f"bpe:{tmp_path / 'bpe.json'}")
    with pytest.raises(InputError, match="holds no checkpoint"):
        load_trained(tmp_path)
    with pytest.raises(InputError, match="There is no folder"):
        load_trained(tmp_path / "nowhere")


def test_a_bpe_run_needs_its_file_no_more_and_does_not_go_on_with_another(tmp_path):
    text, file = tiny_runs.write_text(tmp_path / "text.txt"), tmp_path / "bpe.json"
    original = train_bpe([text.read_text()], 270, file)
    config = tiny_runs.tiny(text, data={"tokenizer": f"bpe:{file}"}, train={"steps": 3, "checkpoint_every": 2})
    train(config, tmp_path / "run")
    (tmp_path / "run" / "summary.json").unlink()
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "3")  # as if it had been stopped
    file.unlink()
    model = load_trained(tmp_path / "run")
    assert model.tokenizer.fingerprint == original.fingerprint
    np.testing.assert_array_equal(model.tokenizer.encode("stream gate norm"), original.encode("stream gate norm"))
    train_bpe([text.read_text()[::-1]], 270, file)
    with pytest.raises(InputError, match=r"not the one that .* was trained with"):
        train(config, tmp_path / "run")
