"""Decoding over a cache against the decoder on the whole sequence, for every connection; sampling; the script and its errors."""

import dataclasses
import functools
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import tiny_runs
from support.decoders import EXPERTS, decoder_of, drawn_decoder

from mhc_jax import connections
from mhc_jax.config import MeshConfig, ModelConfig
from mhc_jax.data import ByteTokenizer, train_bpe
from mhc_jax.errors import InputError
from mhc_jax.generation import Generator, Sampling, bucket, draw
from mhc_jax.kv_cache import empty_cache, grown
from mhc_jax.loop import train
from mhc_jax.model import Decoder
from mhc_jax.parallel.sharding import make_mesh, state_shardings
from mhc_jax.runs.checkpoint import saved_tokenizer
from mhc_jax.runs.trained import load_trained

MODEL = ModelConfig(vocab_size=67, width=32, num_layers=2, num_heads=4, num_kv_heads=2, mlp_width=32)
ATTENTION = {"gqa": {}, "mla": {"attention_kind": "mla:kv_rank=12:rope_width=6"}}
LONG = (("mhc", "gqa"), ("single_pass", "mla"))
PROMPTS = (np.arange(5), np.arange(7, 30))
DRAW = jax.jit(draw)
parameters = functools.partial(drawn_decoder, spread=0.25)
"""Random parameters, with which coefficients differ between tokens."""
each_attention = pytest.mark.parametrize("attention", ATTENTION.values(), ids=ATTENTION)


@pytest.mark.parametrize(
    ("kind", "settings", "length"),
    [
        ("mhc:t_max=2", {}, (40, 64)),
        ("single_pass:t_max=2", ATTENTION["mla"], (40, 64)),
        ("residual", {"attention_scope": "document:11"}, (40, 64)),  # the second prompt and its answer hold token 11
        pytest.param("mhc", ATTENTION["mla"] | EXPERTS, (200, 256), marks=pytest.mark.full, id="mhc with experts"),
        *(
            pytest.param(
                kind, settings, (200, 256), marks=pytest.mark.full if (kind, name) in LONG else pytest.mark.slow
            )
            for kind in connections.KINDS
            for name, settings in ATTENTION.items()
        ),
    ],
)
def test_decoding_with_cache_equals_decoding_without(kind, settings, length):
    """Greedy tokens over a cache are, token for token, those of the decoder on the whole sequence."""
    config, (steps, slots) = decoder_of(kind, MODEL, **settings), length
    params = parameters(config)
    generator = Generator(config, params, slots, shortest=slots)
    made = generator.generate(PROMPTS, steps)
    assert len(generator.programs) == 2, "one prefill and one decode program"
    sequences = np.zeros((2, slots), np.int32)
    for row, prompt in enumerate(PROMPTS):
        sequences[row, : len(prompt) + steps] = np.concatenate([prompt, made[row]])
    logits = jax.jit(lambda p, t: Decoder(config).apply({"params": p}, t)[0])(params, sequences)
    for row, prompt in enumerate(PROMPTS):
        # The most likely token after each prefix; by induction over prefixes that is decoding without a cache.
        expected = np.asarray(logits)[row].argmax(-1)[len(prompt) - 1 : len(prompt) + steps - 1]
        np.testing.assert_array_equal(made[row], expected)
        assert len(set(made[row])) > 5, "a sequence of several tokens shows more"


@pytest.mark.parametrize("scope", ["window", "document:0"])
@each_attention
def test_logits_over_a_cache_are_those_of_the_whole_sequence(attention, scope):
    """Several tokens a call, rows of different lengths and stale slots behind them: each logit within 1e-5 of the largest.

    Within documents, one begins among the first tokens of the first row, one among its stale tokens, and two among its new ones.
    """
    config = decoder_of("hc:num_streams=2", MODEL, **attention, attention_scope=scope)
    params, model = parameters(config), Decoder(config)
    tokens = jnp.asarray(np.random.default_rng(1).integers(0, 67, (2, 24)), jnp.int32)
    if scope != "window":
        tokens = tokens.at[0, jnp.asarray([5, 11, 15])].set(0)
    lengths = jnp.asarray([9, 14])

    @jax.jit
    def run(params):
        whole = model.apply({"params": params}, tokens)[0]
        out, aux = model.apply({"params": params}, tokens[:, :16], cache=empty_cache(config, 2), at=lengths - 1)
        cache = grown(aux["cache"], 32)
        cache = dataclasses.replace(cache, position=lengths)  # what lies behind is stale
        rest = jnp.stack([jax.lax.dynamic_slice_in_dim(tokens[b], lengths[b], 10) for b in range(2)])
        later, aux = model.apply({"params": params}, rest, cache=cache)
        return whole, out, later, aux["cache"].position

    whole, out, later, position = map(np.asarray, run(params))
    np.testing.assert_array_equal(position, [19, 24])
    for b, n in enumerate((9, 14)):
        np.testing.assert_allclose(out[b, 0], whole[b, n - 1], atol=1e-5 * np.abs(whole).max())
        np.testing.assert_allclose(later[b], whole[b, n : n + 10], atol=1e-5 * np.abs(whole).max())


def test_an_answer_does_not_depend_on_the_batch_or_on_buckets():
    config = decoder_of("residual", MODEL, num_layers=1)
    params, sampling = parameters(config), Sampling(0.9, 0.9, seed=3)
    together = Generator(config, params, 128, shortest=64).generate(PROMPTS, 40, sampling)
    alone = Generator(config, params, 128, shortest=16)
    [second] = alone.generate(PROMPTS[1:], 40, sampling, rows=[1])
    assert second == together[1]
    assert {name for name, *_ in alone.programs} == {"prefill", "decode", "grow"}
    [redrawn] = alone.generate(PROMPTS[1:], 40, sampling, rows=[2])
    assert redrawn != second, "rows draw differently"


def test_rows_and_positions_draw_independently():
    """With equally likely tokens, two rows with the same prompt never agree for long, not even shifted."""
    config = decoder_of("residual", MODEL, num_layers=1)
    params = parameters(config)
    params["unembedding"] = jnp.zeros_like(params["unembedding"])
    first, second = map(np.array, Generator(config, params, 64).generate([np.arange(5)] * 2, 40, Sampling(1.0)))
    for shift in range(-8, 9):
        a, b = first[max(shift, 0) : 40 + min(shift, 0)], second[max(-shift, 0) : 40 - max(shift, 0)]
        assert (a == b).mean() < 0.25, "1/67 of them by chance"


def test_the_context_ends_an_answer_and_refuses_a_prompt_that_fills_it():
    config = decoder_of("residual", MODEL, num_layers=1)
    generator = Generator(config, parameters(config), 30, shortest=32)
    assert [len(made) for made in generator.generate(PROMPTS, 100)] == [25, 7]
    with pytest.raises(InputError, match="The prompt has 30 tokens and the context 30"):
        generator.generate([np.arange(30)], 5)
    with pytest.raises(InputError, match="prompt is empty"):
        generator.generate([np.arange(0)], 5)


@pytest.mark.parametrize(
    ("temperature", "top_p", "nucleus"),
    [
        (1.0, 0.7, [0, 2]),  # 0.5 alone is less than 0.7, 0.5 + 0.3 is not
        (1.0, 1.0, [0, 1, 2, 3, 4]),
        (1.0, 0.01, [0]),
        (0.5, 0.7, [0]),  # p^2: 0.70, 0.25, ...
        (2.0, 0.7, [0, 1, 2]),  # p^0.5: 0.35, 0.27, 0.16, ...
    ],
)
def test_draw_keeps_to_the_nucleus_of_what_it_draws_from(temperature, top_p, nucleus):
    p = np.array([0.5, 0.1, 0.3, 0.06, 0.04])
    keys = jax.random.split(jax.random.key(0), 1500)
    logits = jnp.asarray(np.tile(np.log(p), (1500, 1)), jnp.float32)
    drawn = np.asarray(DRAW(logits, keys, jnp.float32(temperature), jnp.float32(top_p)))
    expected = np.where(np.isin(np.arange(5), nucleus), p ** (1 / temperature), 0)
    assert set(drawn) == set(nucleus)
    np.testing.assert_allclose(np.bincount(drawn, minlength=5) / 1500, expected / expected.sum(), atol=0.05)


@pytest.mark.parametrize(("name", "value"), [("temperature", -1.0), ("top_p", 0.0), ("seed", -1), ("seed", 2**32)])
def test_sampling_refuses_what_it_cannot_do(name, value):
    with pytest.raises(InputError, match=f"{name}.* is {value}"):
        Sampling(**{name: value})


def test_buckets():
    assert [bucket(n) for n in (1, 32, 33, 64, 65, 1000)] == [32, 32, 64, 64, 128, 1024]


@pytest.mark.slow
@each_attention
def test_decoding_on_a_mesh(attention):
    """Rows over data, heads over tensor: the same tokens as on one device."""
    config = decoder_of("mhc", MODEL, **attention)
    params = parameters(config)
    expected = Generator(config, params, 128, shortest=64).generate(PROMPTS, 40)
    mesh = make_mesh(MeshConfig(data=2, tensor=2))
    placed = jax.device_put(params, state_shardings(mesh, params))
    assert Generator(config, placed, 128, mesh=mesh, shortest=64).generate(PROMPTS, 40) == expected


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A text, and the folder of a run of 3 steps on it."""
    root = tmp_path_factory.mktemp("trained")
    text = tiny_runs.write_text(root / "text.txt")
    train(tiny_runs.tiny(text, "residual", train={"steps": 3}), root / "run")
    return text, root / "run"


def generate(run, *flags):
    return tiny_runs.run_script("generate", f"--checkpoint={run}", "--context=64", "--max_new=20", *flags)


def test_generate_script(trained):
    status, out, err = generate(trained[1], "--prompt=the stream", "--temperature=0")
    assert status == 0, err
    assert out.startswith("the stream")
    assert "20 tokens" in err
    assert "is full" not in err
    assert err.count("compiling; the first answer takes longer ...") == 1
    status, out, err = generate(trained[1], "--prompt=" + "stream " * 8, "--temperature=0")
    assert err.splitlines()[-1].startswith(f"[{64 - 56} tokens in ")
    assert err.splitlines()[-1].endswith("; the context of 64 tokens is full]")


@pytest.mark.full
def test_generate_script_tells_mistakes_in_a_sentence(trained):
    status, _, err = generate(trained[1], "--prompt=" + "x" * 70)
    assert status == 2
    assert "The prompt has 70 tokens and the context 64" in err
    assert len(err.splitlines()) == 2
    assert err.startswith("run was trained on sequences of 16 tokens and reads up to 64 here")


def test_a_run_is_loaded_with_its_own_tokenizer_and_no_other(trained, tmp_path):
    text, run = trained
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
    steps = {"steps": 3, "checkpoint_every": 2}
    config = tiny_runs.tiny(text, "residual", data={"tokenizer": f"bpe:{file}"}, train=steps)
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
