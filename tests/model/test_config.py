"""Settings: every refused value is told with its name, its value and what is allowed."""

import dataclasses
import json

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support import decoders

from mhc_jax.config import DataConfig, ExperimentConfig, ModelConfig, OptimizerConfig, TrainConfig
from mhc_jax.config.mapping import from_mapping, to_mapping
from mhc_jax.errors import InputError

EXPERTS = decoders.EXPERTS | {"num_layers": 3}
LATENT = {"attention_kind": "mla"}
ZERO = dict.fromkeys(("width", "num_layers", "num_kv_heads", "mlp_width", "unroll"), (0,))
LOOP = ("steps", "log_every", "keep_checkpoints", "validation_batches", "diagnostics_tokens", "spike_window")
REFUSED = [
    (ModelConfig, {}, ZERO | {"num_heads": (0, 3), "num_kv_heads": (0, 3), "vocab_size": (-1,), "head_width": (-1,)}),
    (ModelConfig, {}, {"embedding_init_std": (0.0,), "compute_dtype": ("float64",), "stream_dtype": ("bf16",)}),
    (ModelConfig, {}, {"attention": ("flash", "cudnn")}),
    (ModelConfig, EXPERTS, {"num_experts": (-1,), "num_active_experts": (0,), "num_shared_experts": (-1,)}),
    (ModelConfig, EXPERTS, {"expert_width": (0,), "routed_scale": (0.0,), "balancing_rate": (-1.0,)}),
    (ModelConfig, LATENT, {"kv_rank": (0,)}),
    (ModelConfig, {"remat": "connection"}, {"remat_block": (-1,)}),
    (DataConfig, {}, {"sequence_length": (1,), "batch_size": (0,), "tokenizer": ("bytes",)}),
    (DataConfig, {}, {"validation_fraction": (0.0, 1.0)}),
    (OptimizerConfig, {}, {"schedule": ("linear",), "learning_rate": (0.0, float("nan")), "warmup_steps": (-1,)}),
    (OptimizerConfig, {}, {"final_fraction": (1.5,), "b1": (1.0,), "b2": (-0.1,), "grad_clip": (-1.0,)}),
    (OptimizerConfig, {}, {"weight_decay": (-0.1,), "accumulation_steps": (0,), "connection_lr_multiplier": (-1.0,)}),
    (TrainConfig, {}, dict.fromkeys(LOOP, (0,)) | {"divergence_loss": (-1.0,), "spike_threshold": (0.0,)}),
    (TrainConfig, {}, dict.fromkeys(("validate_every", "checkpoint_every", "diagnostics_every"), (-1,))),
]
CASES = [(cls, base, {name: value}) for cls, base, own in REFUSED for name, values in own.items() for value in values]


def assert_a_sentence(text):
    assert text.endswith((".", "?"))
    assert "\n" not in text


@pytest.mark.parametrize(("cls", "base", "refused"), CASES, ids=lambda v: getattr(v, "__name__", str(v)))
def test_a_refused_value_is_named(cls, base, refused):
    with pytest.raises(InputError) as caught:
        cls(**base | refused)
    text, [(name, value)] = str(caught.value), refused.items()
    assert name in text
    assert repr(value) in text or str(value) in text
    assert_a_sentence(text)


GENERIC = {
    "int": st.sampled_from([-1, 0, 1, 2, 3, 4, 7, 64, 1000]),
    "float": st.sampled_from([-1.0, 0.0, 1e-3, 1 / 3, 0.5, 1.0, 2.0, float("inf")]) | st.floats(allow_nan=False),
    "bool": st.booleans(),
    "str": st.sampled_from(["", "nowhere", "auto"]),
}
SECTIONS = {"model": ModelConfig, "data": DataConfig, "optimizer": OptimizerConfig, "train": TrainConfig}
LEAVES = [
    (section, field) for section, cls in SECTIONS.items() for field in dataclasses.fields(cls) if field.type in GENERIC
]


@st.composite
def any_mapping(draw):
    """A few settings of a config file, of the right types."""
    out = {}
    for section, field in draw(st.lists(st.sampled_from(LEAVES), max_size=4)):
        value = GENERIC[field.type] if field.type == "bool" else GENERIC[field.type] | st.just(field.default)
        out.setdefault(section, {})[field.name] = draw(value)
    return out


@settings(max_examples=400)
@given(any_mapping())
@example({"model": {"rope_theta": 1 / 3}, "optimizer": {"b1": 0.1 + 0.2}})
def test_an_accepted_configuration_comes_back_exactly_and_a_refused_one_is_named(mapping):
    try:
        config = from_mapping(mapping)
    except InputError as refused:
        sentence = str(refused)
        assert any(name in sentence for own in mapping.values() for name in own), sentence
        assert_a_sentence(sentence)
        return
    whole = to_mapping(config)
    for section, own in mapping.items():
        assert whole[section] == {**whole[section], **own}, "nothing that was set is lost"
    assert from_mapping(json.loads(json.dumps(whole))) == config
    assert from_mapping(whole) == config


def test_a_mapping_has_every_setting_in_its_order():
    mapping = to_mapping(ExperimentConfig())
    for section, cls in SECTIONS.items():
        assert [*mapping[section]] == [field.name for field in dataclasses.fields(cls)]
    assert mapping["model"]["connection"]["kind"] == "mhc"


def test_missing_keys_have_their_defaults_a_text_is_a_tuple_and_an_int_a_float():
    assert from_mapping({}) == ExperimentConfig()
    assert from_mapping({"train": {"steps": 30}}).train == TrainConfig(steps=30)
    mapping = {"model": {"connection": {"kind": "mhc", "disable": "pre"}}}
    assert from_mapping(mapping).model.connection.disable == ("pre",)
    assert isinstance(from_mapping({"optimizer": {"learning_rate": 1}}).optimizer.learning_rate, float)


@pytest.mark.parametrize(
    ("mapping", "sentence"),
    [
        ({"modle": {}}, "A key of config is 'modle'.*Did you mean 'model'"),
        ({"model": {"widht": 8}}, "A key of config.model is 'widht'.*Did you mean 'width'"),
        ({"model": {"connection": {"kind": "hcc"}}}, "connection.kind is 'hcc'.*Did you mean 'hc'"),
        ({"model": {"connection": {"kind": "hc", "t_max": 3}}}, "A key of config.model.connection is 't_max'"),
        ({"model": {"width": 8.5}}, "config.model.width is 8.5, a float; it must be a int"),
        ({"model": {"width": True}}, "config.model.width is True, a bool; it must be a int"),
        ({"model": {"width": "8"}}, "config.model.width is '8', a str; it must be a int"),
        ({"model": {"remat": True}}, "config.model.remat is True, a bool; it must be a str"),
        ({"model": {"tied_embeddings": 1}}, "config.model.tied_embeddings is 1, a int; it must be a bool"),
        ({"data": {"source": ""}}, "data.source is empty"),
        ({"model": 3}, "config.model is 3; it must be a mapping"),
        ({"model": {"connection": {"kind": "mhc", "disable": 3}}}, "disable is 3; it must be a list"),
        ({"optimizer": {"learning_rate": True}}, "learning_rate is True, a bool; it must be a float"),
        ({"optimizer": {"learning_rate": None}}, "learning_rate is None, a NoneType; it must be a float"),
        ({"optimizer": {"accumulation_steps": 3}}, "data.batch_size is 8, which optimizer.accumulation_steps 3"),
        ({"optimizer": {"warmup_steps": 300}}, "optimizer.warmup_steps is 300, more than train.steps 200"),
    ],
)
def test_a_mapping_that_does_not_fit_is_told(mapping, sentence):
    with pytest.raises(InputError, match=sentence):
        from_mapping(mapping)


BLOCKS = {"num_layers": 4}


@pytest.mark.parametrize(
    ("base", "settings", "sentence"),
    [
        ({}, {"num_heads": 128}, "is 1; rotary embeddings need an even one"),
        (EXPERTS, {"num_active_experts": 5}, "num_active_experts is 5; it must lie between 1 and model.num_experts, 4"),
        (EXPERTS, {"num_dense_layers": 3}, "num_dense_layers is 3; it must lie between 0 and model.num_layers - 1, 2"),
        (EXPERTS, {"expert_buffer": 0.5}, "expert_buffer is 0.5; use 0 .* multiple of the even share .* at least 1"),
        (LATENT, {"attention_kind": "mha"}, "model.attention_kind is 'mha'; it must be one of 'gqa', 'mla'"),
        (LATENT, {"rope_width": 5}, "model.rope_width is 5; rotary embeddings need an even width"),
        (LATENT, {"attention": "cudnn", "compute_dtype": "bfloat16"}, "model.attention is 'cudnn'.*'xla' or 'splash'"),
        (BLOCKS, {"remat": "True"}, "model.remat is 'True'; it must be one of 'none', 'connection', 'full', 'auto'"),
        (BLOCKS, {"remat": "conection"}, "Did you mean 'connection'"),
        (BLOCKS, {"remat": "connection", "remat_block": 9}, "model.remat_block is 9; it must lie between 1 and the 8"),
        (BLOCKS, {"remat": "full", "remat_block": 2}, "remat_block is 2, and model.remat 'full' has no use for it"),
        (BLOCKS, {"remat": "full", "remat_budget_gb": 1.0}, "model.remat 'full' has no use for it"),
        (BLOCKS, {"remat": "auto", "remat_budget_gb": -1.0}, "it must not be negative"),
    ],
)
def test_a_model_that_cannot_be_is_told(base, settings, sentence):
    with pytest.raises(InputError, match=sentence):
        ModelConfig(**base | settings)
