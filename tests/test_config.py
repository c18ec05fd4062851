"""Settings: every refused value is told with its name, its value and what is allowed."""

import dataclasses
import json

import pytest

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


@pytest.mark.parametrize(
    ("spec", "sentence"),
    [
        ("mch", "connection.kind is 'mch'.*Did you mean 'mhc'"),
        ("mhc:init", "'init' in the connection 'mhc:init' is not of the form key=value"),
        ("mhc:innit=paper", "'innit'.*Did you mean 'init'"),
        ("mhc:init=hme", "connection.init is 'hme'.*Did you mean 'home'"),
        ("mhc:t_max=many", "t_max is 'many'; it must be a int"),
        ("mhc:t_max=0", "connection.t_max is 0"),
        ("hc:dynamic=yes", "dynamic is 'yes'; it must be a bool"),
        ("hc:num_streams=0", "connection.num_streams is 0"),
        ("mhc:exit=last", "connection.exit is 'last'; it must be one of 'sum', 'mean', 'head'"),
        ("mhc:disable=pre+pots", "'pots'.*Did you mean 'post'"),
        ("mhc:disable=pre+post+res", "nothing of `mhc` is left"),
        ("hc:disable=pre+post+res", "nothing of `hc` is left"),
    ],
)
def test_a_connection_that_cannot_be_is_told(spec, sentence):
    with pytest.raises(InputError, match=sentence):
        connections.parse(spec)


def test_parse_reads_every_type():
    spec = "mhc:init=home:num_streams=2:alpha_init=0.5:disable=pre+post"
    assert connections.parse(spec) == connections.default_config(
        "mhc", init="home", num_streams=2, alpha_init=0.5, disable=("pre", "post")
    )
    assert connections.parse("hc:dynamic=False").dynamic is False
    assert connections.parse("hc:tanh=true").tanh is True
    for kind in connections.KINDS:
        assert connections.parse(kind) == connections.default_config(kind)


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
