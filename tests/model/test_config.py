"""Settings: every refused value is told with its name, its value and what is allowed."""

import contextlib
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


OTHER = {
    "num_streams": (2,),
    "exit": ("mean", "head"),
    "entry": ("scaled",),
    "disable": (("post",), ("pre", "post")),
    "init": ("paper", "home"),
    "eps_convention": ("v4", "hy_v4"),
    **{
        name: (0.1, 1 / 3, 1e-30)
        for name in ("alpha_init", "phi_init_std", "gate_init", "init_std", "eps_norm", "beta")
    },
    **{name: (7,) for name in ("t_max", "rank", "block_size")},
    **{name: (False,) for name in ("dynamic", "tanh")},
}
"""Values of each setting, of which at least one is no kind's default."""


def every_setting():
    """Every setting of every kind, each at a value of its own, where the kind takes it; then all of mHC's together."""
    for kind in connections.KINDS:
        for field in dataclasses.fields(connections.config_class(kind)):
            for value in OTHER[field.name]:
                with contextlib.suppress(InputError):
                    connections.default_config(kind, **{field.name: value})
                    yield kind, {field.name: value}
    yield "mhc", {name: OTHER[name][-1] for name in ("num_streams", "exit", "entry", "disable", "alpha_init", "t_max")}


@pytest.mark.parametrize(("kind", "settings"), list(every_setting()))
def test_a_connection_is_spelled_as_it_is_read(kind, settings):
    config = connections.default_config(kind, **settings)
    assert connections.parse(connections.spec(config)) == config
    # As config.json holds it, whole and with nothing but what was set.
    saved = json.loads(json.dumps(to_mapping(config)))
    assert connections.spec_of_mapping(saved) == connections.spec(config)
    assert connections.spec_of_mapping({"kind": kind, **settings}) == connections.spec(config)


@pytest.mark.parametrize(
    ("given", "canonical"),
    [
        ("residual", "residual"),
        ("hc", "hc"),
        ("hc:tanh=False", "hc:tanh=False"),
        ("hc:tanh=True:num_streams=4", "hc"),
        ("mhc", "mhc:init=paper"),
        ("mhc:t_max=5:init=home", "mhc:init=home:t_max=5"),
        ("mhc:alpha_init=1:disable=pre+post", "mhc:disable=pre+post:init=paper:alpha_init=1.0"),
        ("mhc_lite", "mhc_lite:init=paper"),
        ("kromhc", "kromhc:init=paper"),
        ("circulant", "circulant:init=residual"),
        ("single_pass", "single_pass:init=paper"),
        ("identity", "identity:init=residual"),
    ],
)
def test_a_label_says_the_start_and_what_is_not_a_default(given, canonical):
    assert connections.spec(connections.parse(given)) == canonical


def test_a_record_of_another_version_has_a_label():
    """Settings that have no default here are named; nothing is refused."""
    assert connections.spec_of_mapping({"kind": "mhc", "alpha_init": 1}) == "mhc:init=paper:alpha_init=1.0"
    assert connections.spec_of_mapping({"kind": "mhc", "gone": 3}) == "mhc:init=paper:gone=3"
    assert connections.spec_of_mapping({"kind": "mine", "size": 0.5, "parts": ["a", "b"]}) == "mine:size=0.5:parts=a+b"


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
