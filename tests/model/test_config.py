"""Settings: every refused value is told with its name, its value and what is allowed."""

import dataclasses
import json

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mhc_jax import connections
from mhc_jax.config import DataConfig, ExperimentConfig, ModelConfig, OptimizerConfig, TrainConfig
from mhc_jax.errors import InputError
from mhc_jax.mapping import from_mapping, to_mapping

REFUSED = [
    *((ModelConfig, name, 0) for name in ("width", "num_layers", "num_heads", "num_kv_heads", "mlp_width", "unroll")),
    (ModelConfig, "num_heads", 3),
    (ModelConfig, "num_heads", 128),
    (ModelConfig, "num_kv_heads", 3),
    (ModelConfig, "vocab_size", -1),
    (ModelConfig, "embedding_init_std", 0.0),
    (ModelConfig, "compute_dtype", "float64"),
    (ModelConfig, "stream_dtype", "bf16"),
    (ModelConfig, "head_width", -1),
    (ModelConfig, "attention", "flash"),
    (ModelConfig, "attention", "cudnn"),
    (DataConfig, "sequence_length", 1),
    (DataConfig, "batch_size", 0),
    (DataConfig, "validation_fraction", 0.0),
    (DataConfig, "validation_fraction", 1.0),
    (DataConfig, "source", ""),
    (DataConfig, "tokenizer", "bytes"),
    (OptimizerConfig, "schedule", "linear"),
    (OptimizerConfig, "learning_rate", 0.0),
    (OptimizerConfig, "learning_rate", float("nan")),
    (OptimizerConfig, "warmup_steps", -1),
    (OptimizerConfig, "final_fraction", 1.5),
    (OptimizerConfig, "b1", 1.0),
    (OptimizerConfig, "b2", -0.1),
    (OptimizerConfig, "grad_clip", -1.0),
    (OptimizerConfig, "weight_decay", -0.1),
    (OptimizerConfig, "accumulation_steps", 0),
    (OptimizerConfig, "connection_lr_multiplier", -1.0),
    *((TrainConfig, name, 0) for name in ("steps", "log_every", "keep_checkpoints", "validation_batches")),
    *((TrainConfig, name, 0) for name in ("diagnostics_tokens", "spike_window")),
    *((TrainConfig, name, -1) for name in ("validate_every", "checkpoint_every", "diagnostics_every")),
    (TrainConfig, "divergence_loss", -1.0),
    (TrainConfig, "spike_threshold", 0.0),
]


@pytest.mark.parametrize(("cls", "name", "value"), REFUSED, ids=lambda v: getattr(v, "__name__", str(v)))
def test_a_refused_value_is_named(cls, name, value):
    with pytest.raises(InputError) as caught:
        cls(**{name: value})
    text = str(caught.value)
    assert name in text or (name, value) == ("num_heads", 128)  # head width 1 is odd
    assert (repr(value) in text) or str(value) in text or (name, value) in (("num_heads", 128), ("source", ""))
    assert text.endswith((".", "?"))
    assert "\n" not in text


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


@settings(max_examples=400, deadline=None, derandomize=True, database=None)
@given(any_mapping())
@example({"model": {"rope_theta": 1 / 3}, "optimizer": {"b1": 0.1 + 0.2}})
def test_an_accepted_configuration_comes_back_exactly_and_a_refused_one_is_named(mapping):
    try:
        config = from_mapping(mapping)
    except InputError as refused:
        sentence = str(refused)
        assert any(name in sentence for own in mapping.values() for name in own), sentence
        assert sentence.endswith((".", "?"))
        assert "\n" not in sentence
        return
    whole = to_mapping(config)
    for section, own in mapping.items():
        assert whole[section] == {**whole[section], **own}, "nothing that was set is lost"
    assert from_mapping(json.loads(json.dumps(whole))) == config
    assert from_mapping(whole) == config


@pytest.mark.parametrize("kind", connections.KINDS)
def test_mapping_and_back_through_json(kind):
    config = ExperimentConfig(
        model=ModelConfig(width=64, connection=connections.default_config(kind)),
        optimizer=OptimizerConfig(learning_rate=1e-3),
        train=TrainConfig(seed=5),
    )
    mapping = to_mapping(config)
    assert mapping["model"]["connection"]["kind"] == kind
    assert from_mapping(json.loads(json.dumps(mapping))) == config
    leaves = [f.name for part in (DataConfig, OptimizerConfig, TrainConfig) for f in dataclasses.fields(part)]
    assert leaves == [key for part in ("data", "optimizer", "train") for key in mapping[part]]


def test_missing_keys_have_their_defaults():
    assert from_mapping({}) == ExperimentConfig()
    assert from_mapping({"train": {"steps": 30}}).train == TrainConfig(steps=30)
    assert from_mapping({"model": {"connection": {"kind": "mhc", "disable": "pre"}}}).model.connection.disable == (
        "pre",
    )


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


def test_an_int_is_a_float():
    assert isinstance(from_mapping({"optimizer": {"learning_rate": 1}}).optimizer.learning_rate, float)
