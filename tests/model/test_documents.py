"""Attention inside documents: a packed window gives each document the logits that it has alone, and nothing passes between them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import mhc_kernels
import numpy as np
import pytest
from support.decoders import MLA, MODEL, decoder_of, drawn_decoder
from support.tolerances import ANOTHER_PROGRAM, BF16_CHAIN, WHOLE_GRADIENT, assert_close

from mhc_jax.config import DataConfig, ExperimentConfig, ModelConfig
from mhc_jax.config.mapping import from_mapping, to_mapping
from mhc_jax.errors import InputError
from mhc_jax.layers.attention import attend
from mhc_jax.model import Decoder, documents_of

END, T = 30, 12
WITHIN = {"attention_scope": f"document:{END}"}
PACKED = np.array([[1, 2, 3, END, 4, 5, 6, 7, END, END, 8, 9], [END, 10, 11, 12, 13, 14, 15, END, 16, 17, 18, 19]])
"""Every token but END occurs once, so that a gradient with respect to its embedding is one with respect to its place."""
PLACES = [(0, 0, 3), (0, 3, 8), (0, 8, 9), (0, 9, 12), (1, 0, 7), (1, 7, 12)]
"""(row, first, last + 1) of every document: the end-of-document token is the first token of the document that follows it."""


def test_numbers_of_documents():
    numbers = documents_of(dataclasses.replace(MODEL, **WITHIN), jnp.asarray(PACKED))
    expected = np.full(PACKED.shape, -1)
    for row, first, last in PLACES:
        expected[row, first:last] = (PACKED[row, : first + 1] == END).sum()
    np.testing.assert_array_equal(numbers, expected)
    assert documents_of(MODEL, jnp.asarray(PACKED)) is None


@pytest.mark.parametrize(("attention", "sample"), [({}, 0), (MLA, 4)], ids=["gqa", "mla, with diagnostics"])
def test_logits_of_a_packed_window_are_those_of_each_document_alone(attention, sample):
    """Alone, a document begins at position 0, with its end-of-document token, and attention has no other limit."""
    config = decoder_of("hc:num_streams=2", MODEL, num_layers=2, **attention)
    params = drawn_decoder(config)
    alone = np.zeros((len(PLACES), T), np.int32)
    for k, (row, first, last) in enumerate(PLACES):
        alone[k, : last - first] = PACKED[row, first:last]

    @functools.partial(jax.jit, static_argnums=1)
    def run(tokens, own):
        return Decoder(own).apply({"params": params}, tokens, sample)[0]

    packed, by_itself, window = (
        run(PACKED, dataclasses.replace(config, **WITHIN)),
        run(alone, config),
        run(PACKED, config),
    )
    for k, (row, first, last) in enumerate(PLACES):
        assert_close(packed[row, first:last], by_itself[k, : last - first], ANOTHER_PROGRAM)
        others = np.abs(window[row, first:last] - packed[row, first:last]).max()
        assert (others > 1e-2) == (first > 0), "without the option later documents see earlier ones"


def second_document(config, params):
    """(a loss of the logits of the second document of the first row, its gradient)."""

    def loss(params):
        return (Decoder(config).apply({"params": params}, jnp.asarray(PACKED[:1]))[0][0, 3:8] ** 2).sum()

    return jax.jit(jax.value_and_grad(loss))(params)


@pytest.mark.parametrize(("kind", "attention"), [("residual", {}), ("hc", MLA)], ids=["gqa", "mla"])
def test_no_gradient_passes_between_documents_however_it_is_recomputed(kind, attention):
    config = decoder_of(kind, MODEL, **attention, **WITHIN)
    params = drawn_decoder(config)
    expected = second_document(config, params)
    moved = np.abs(expected[1]["embedding"]).max(-1) > 0
    assert set(np.flatnonzero(moved)) == {END, 4, 5, 6, 7}, "only embeddings of its own tokens have a gradient"
    for remat in ("connection:4", "full"):
        actual = second_document(dataclasses.replace(config, remat=remat), params)
        jax.tree.map(lambda a, b: assert_close(a, b, WHOLE_GRADIENT), actual, expected)


def attended(implementation, documents, q, k, v):
    """(sum of weighted outputs, its gradients) of `attend`."""
    weights = jnp.cos(jnp.arange(q.shape[0] * q.shape[1] * q.shape[2] * v.shape[-1], dtype=jnp.float32))

    def loss(*a):
        out = attend(*a, implementation, documents)
        return (out * weights.reshape(out.shape)).sum()

    return jax.jit(jax.value_and_grad(loss, (0, 1, 2)))(q, k, v)


def drawn(length, heads, keys, values):
    random = np.random.default_rng(0)
    shapes = ((heads, keys), (2, keys), (2, values))
    q, k, v = (jnp.asarray(random.normal(size=(2, length, *shape)), jnp.float32) for shape in shapes)
    starts = random.integers(0, 20, (2, length)) == 0
    return jnp.asarray(starts.cumsum(1), jnp.int32), q, k, v


@pytest.mark.parametrize(("heads", "keys", "values"), [(4, 128, 128), (2, 192, 128)], ids=["grouped", "MLA's widths"])
def test_flash_attention_of_tpus_stays_inside_documents(heads, keys, values):
    given = drawn(128, heads, keys, values)
    assert (given[0][:, -1] >= 2).all()
    with mhc_kernels.settings(platform="tpu", interpret=True):
        flash = attended("splash", *given)
    jax.tree.map(lambda a, b: assert_close(a, b, WHOLE_GRADIENT), flash, attended("xla", *given))


def test_cudnn_gets_the_mask(monkeypatch):
    """cuDNN runs on GPUs alone.  In its place stands the implementation of XLA, with the arguments that cuDNN gets."""
    given, real, asked = drawn(16, 4, 8, 8), jax.nn.dot_product_attention, []

    def stand_in(*a, implementation, **options):
        asked.append(implementation)
        return real(*a, implementation="xla", **options)

    expected = attended("xla", *given)
    monkeypatch.setattr(jax.nn, "dot_product_attention", stand_in)
    actual = attended("cudnn", *given)
    jax.tree.map(lambda a, b: assert_close(a, b, ANOTHER_PROGRAM), actual, expected)
    assert set(asked) == {"cudnn"}


@pytest.mark.gpu
def test_cudnn_stays_inside_documents():
    documents, *given = drawn(128, 4, 64, 64)
    half = [a.astype(jnp.bfloat16) for a in given]
    cudnn, xla = (attended(implementation, documents, *half) for implementation in ("cudnn", "xla"))
    jax.tree.map(lambda a, b: assert_close(a.astype(jnp.float32), b.astype(jnp.float32), BF16_CHAIN), cudnn, xla)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"attention_scope": "documents"}, "model.attention_scope is 'documents'.*Did you mean 'document'"),
        ({"attention_scope": "window:3"}, "a number can follow 'document', and not 'window'"),
        ({"attention_scope": "document:-1"}, "the id of the end-of-document token must lie between 0 and"),
        ({"attention_scope": "document:30", "vocab_size": 30}, "'document:30'; the id .* model.vocab_size - 1"),
    ],
)
def test_a_scope_that_cannot_be_is_told(settings, sentence):
    with pytest.raises(InputError, match=sentence):
        ModelConfig(**settings)


def test_a_scope_without_its_token_is_refused_where_no_tokenizer_tells_it():
    config = ModelConfig(vocab_size=31, attention_scope="document")
    assert from_mapping(to_mapping(ExperimentConfig(model=config))).model == config
    for use in (config.require_resolved, lambda: documents_of(config, jnp.asarray(PACKED))):
        with pytest.raises(InputError, match=r"is the tokenizer's; set --config.model.attention_scope=document:ID"):
            use()


def test_cudnn_needs_an_even_length_for_its_mask():
    model = ModelConfig(attention="cudnn", compute_dtype="bfloat16", attention_scope="document")
    ExperimentConfig(model=model, data=DataConfig(sequence_length=64))
    ExperimentConfig(model=dataclasses.replace(model, attention_scope="window"), data=DataConfig(sequence_length=63))
    with pytest.raises(InputError, match=r"data.sequence_length is 63; .* needs an even one, or use 'xla'"):
        ExperimentConfig(model=model, data=DataConfig(sequence_length=63))
