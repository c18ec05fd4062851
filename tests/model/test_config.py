"""Settings: every refused value is told with its name, its value and what is allowed."""

import dataclasses
import json
import math

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mhc_jax import connections
from mhc_jax.analysis.run_reader import flatten
from mhc_jax.config import DataConfig, ExperimentConfig, ModelConfig, OptimizerConfig, PipelineConfig, TrainConfig
from mhc_jax.config.mapping import from_mapping, to_mapping
from mhc_jax.errors import InputError, shown

INF, NAN = math.inf, math.nan
ZERO = dict.fromkeys(("width", "num_layers", "num_kv_heads", "mlp_width", "unroll"), (0,))
LOOP = ("steps", "log_every", "validation_batches")
REFUSED = [
    (ModelConfig, ZERO | {"num_heads": (0, 3), "num_kv_heads": (0, 3), "vocab_size": (-1,), "head_width": (-1,)}),
    (ModelConfig, {"embedding_init_std": (0.0,), "compute_dtype": ("float64",), "stream_dtype": ("bf16",)}),
    (ModelConfig, {"attention": ("flash", "cudnn"), "attention_kind": ("mha",), "remat": ("True",), "experts": ("0",)}),
    (DataConfig, {"sequence_length": (1,), "batch_size": (0,), "tokenizer": ("bytes",)}),
    (DataConfig, {"validation_fraction": (0.0, 1.0)}),
    (OptimizerConfig, {"schedule": ("linear",), "learning_rate": (0.0, float("nan")), "warmup_steps": (-1,)}),
    (OptimizerConfig, {"final_fraction": (1.5,), "b1": (1.0,), "b2": (-0.1,), "grad_clip": (-1.0,)}),
    (OptimizerConfig, {"weight_decay": (-0.1,), "accumulation_steps": (0,), "connection_lr_multiplier": (-1.0,)}),
    (TrainConfig, dict.fromkeys(LOOP, (0,)) | {"seed": (-1,)}),
    (
        OptimizerConfig,
        dict.fromkeys(("eps", "weight_decay", "connection_lr_multiplier", "learning_rate"), (INF, NAN, 1e39)),
    ),
    (OptimizerConfig, {"grad_clip": (NAN, -INF), "final_fraction": (NAN,), "b1": (NAN,), "b2": (INF,)}),
    (ModelConfig, dict.fromkeys(("rope_theta", "norm_eps", "embedding_init_std"), (INF, NAN, 1e39))),
    (DataConfig, {"validation_fraction": (NAN,), "seed": (-1, 2**32, 2**63, 10**400)}),
    (TrainConfig, {"seed": (2**32, 2**63)}),
    (TrainConfig, dict.fromkeys(("validate_every", "checkpoint_every", "diagnostics_every"), (-1,))),
]
REFUSED += [
    (type(connections.default_config(kind)), {name: (INF, -INF, NAN)})
    for kind in connections.KINDS
    for name, value in vars(connections.default_config(kind)).items()
    if isinstance(value, float)
]
CASES = [(cls, name, value) for cls, refused in REFUSED for name, values in refused.items() for value in values]


def assert_a_sentence(text):
    assert text.endswith((".", "?"))
    assert "\n" not in text


@pytest.mark.parametrize(("cls", "name", "value"), CASES, ids=lambda v: getattr(v, "__name__", str(v)))
def test_a_refused_value_is_named(cls, name, value):
    with pytest.raises(InputError) as caught:
        cls(**{name: value})
    text = str(caught.value)
    assert name in text
    assert repr(value) in text or shown(value) in text
    assert_a_sentence(text)


LONG = "a" * 600


@pytest.mark.parametrize(
    ("message", "told"),
    [
        (f"{LONG}.json is no file", f"{'a' * 60}...{'a' * 25}.json is no file"),
        (f"the value '{LONG} b' is long", f"the value '{'a' * 59}...{'a' * 27} b' is long"),
        ("a short one " * 100, "a short one " * 100),
        (f"'a\n{'b ' * 300}'", f"'a\n{'b ' * 300}'"),
    ],
    ids=["no blanks", "quotes", "words", "lines"],
)
def test_long_values_are_cut_in_the_middle_of_a_message(message, told):
    assert str(InputError(message)) == told


GENERIC = {
    "int": st.sampled_from([-1, 0, 1, 2, 3, 4, 7, 64, 1000]),
    "float": st.sampled_from([-1.0, 0.0, 1e-3, 1 / 3, 0.5, 1.0, 2.0, float("inf")]) | st.floats(allow_nan=False),
    "bool": st.booleans(),
    "str": st.sampled_from(
        ["", "nowhere", "auto", "auto:0.1", "connection:3", "mla:kv_rank=3", "8:width=64:buffer=1.5"]
    ),
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
@example({"model": {"embedding_init_std": 1 / 3}, "optimizer": {"b1": 0.1 + 0.2}})
def test_an_accepted_configuration_comes_back_exactly_and_a_refused_one_is_named(mapping):
    try:
        config = from_mapping(mapping)
    except InputError as refused:
        sentence = str(refused)
        assert any(name in sentence for own in mapping.values() for name in own), sentence
        assert_a_sentence(sentence)
        return
    whole = to_mapping(config)
    if mapping.get("optimizer", {}).get("grad_clip") == INF:
        mapping["optimizer"]["grad_clip"] = 0.0  # both mean no clipping
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


def test_a_default_configuration_has_at_most_70_settings():
    """What a researcher does not change is a constant with a name, where it is used."""
    assert len(flatten(to_mapping(ExperimentConfig()))) <= 70


TEXTS = [
    ("attention_kind", "mla:rope_width=64:kv_rank=16", "mla:kv_rank=16"),
    ("attention_kind", "mla:kv_rank=512", "mla"),
    ("experts", "08:width=64:shared=2", "8:width=64"),
    ("experts", "64:buffer=1:active=3", "64:active=3:buffer=1.0"),
    ("remat", "connection:6", "connection:6"),
    ("remat", "auto:80.0", "auto:80"),
    ("remat", "auto:0.1", "auto:0.1"),
]


@pytest.mark.parametrize(("name", "given", "shortest"), TEXTS)
def test_a_text_is_stored_in_its_shortest_spelling(name, given, shortest):
    assert getattr(ModelConfig(**{name: given}), name) == shortest
    assert ModelConfig(**{name: given}) == ModelConfig(**{name: shortest})


def test_the_parts_of_a_text_are_properties():
    model = ModelConfig(experts="8:active=3:shared=1:width=5:dense_layers=2:buffer=1.5", attention_kind="mla:kv_rank=7")
    assert (model.num_experts, model.num_active_experts, model.num_shared_experts) == (8, 3, 1)
    assert (model.expert_width, model.num_dense_layers, model.num_leading, model.expert_buffer) == (5, 2, 2, 1.5)
    assert (model.uses_mla, model.kv_rank, model.rope_width) == (True, 7, 64)
    dense = ModelConfig(remat="connection:6")
    assert (dense.num_experts, dense.num_leading, dense.uses_mla) == (0, 0, False)
    assert (dense.remat_policy, dense.remat_block, dense.remat_budget_gb) == ("connection", 6, 0.0)
    assert ModelConfig(remat="auto:80").remat_budget_gb == 80.0
    for text, name, chunks in (("interleaved:4", "interleaved", 4), ("interleaved:2", "interleaved", 0)):
        pipeline = PipelineConfig(schedule=text)
        assert (pipeline.schedule_name, pipeline.chunks) == (name, chunks)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"num_heads": 128}, "is 1; rotary embeddings need an even one"),
        ({"experts": "x"}, "model.experts is 'x'; it must begin with the number of experts"),
        ({"experts": "8:widht=3"}, "A setting of model.experts '8' is 'widht'.*Did you mean 'width'"),
        ({"experts": "8:width"}, "'width' in model.experts '8:width' is not of the form key=value"),
        ({"experts": "8:width=wide"}, "model.experts '8:width=wide': width is 'wide'; it must be a int"),
        ({"experts": "8:width=0"}, "model.experts: width is 0; it must be at least 1"),
        ({"experts": "8:shared=-1"}, "model.experts: shared is -1; it must not be negative"),
        ({"experts": "4:active=5"}, "model.experts: active is 5; it must lie between 1 and the 4 experts"),
        (
            {"experts": "8:dense_layers=8"},
            "8:dense_layers=8'; dense_layers must lie between 0 and model.num_layers - 1, 7",
        ),
        ({"experts": "8:dense_layers=-1"}, "model.experts: dense_layers is -1; it must not be negative"),
        (
            {"experts": "8:buffer=0.5"},
            "model.experts: buffer is 0.5; use 0 .* multiple of the even share .* at least 1",
        ),
        (
            {"attention_kind": "mal"},
            "model.attention_kind is 'mal'; it must be one of 'gqa', 'mla'.*Did you mean 'mla'",
        ),
        ({"attention_kind": "gqa:kv_rank=3"}, "'gqa' has no settings"),
        ({"attention_kind": "mla:kv_rnak=3"}, "is 'kv_rnak'.*Did you mean 'kv_rank'"),
        ({"attention_kind": "mla:kv_rank=0"}, "model.attention_kind: kv_rank is 0; it must be at least 1"),
        (
            {"attention_kind": "mla:rope_width=5"},
            "model.attention_kind: rope_width is 5; rotary embeddings need an even",
        ),
        ({"attention_kind": "mla", "attention": "cudnn", "compute_dtype": "bfloat16"}, "is 'cudnn'.*'xla' or 'splash'"),
        ({"remat": "conection"}, "Did you mean 'connection'"),
        (
            {"remat": "connection:17"},
            "model.remat is 'connection:17'; the number of sub-layers must lie between 1 and 16",
        ),
        ({"remat": "connection:0"}, "model.remat is 'connection:0'; the number of sub-layers must be at least 1"),
        ({"remat": "connection:"}, "The number in model.remat 'connection:' is ''; it must be a int"),
        ({"remat": "full:2"}, "model.remat is 'full:2'; a number can follow 'connection' or 'auto', and not 'full'"),
        ({"remat": "auto:-1"}, "model.remat is 'auto:-1'; the memory of a device in GB must be above 0"),
    ],
)
def test_a_model_that_cannot_be_is_told(settings, sentence):
    with pytest.raises(InputError, match=sentence):
        ModelConfig(**settings)


def test_a_schedule_and_a_tracker_that_cannot_be_are_told():
    with pytest.raises(InputError, match=r"pipeline.schedule is 'interleavd'.*Did you mean 'interleaved'"):
        PipelineConfig(schedule="interleavd:4")
    with pytest.raises(InputError, match="a device holds at least 2 stages and at most 1024, or use '1f1b'"):
        PipelineConfig(schedule="interleaved:1")
    with pytest.raises(InputError, match=r"train.trackers is \('wandb', 'wandb'\); name each tracker once"):
        TrainConfig(trackers=("wandb", "wandb"))
    with pytest.raises(InputError, match=r"model.experts is '8:active=2:active=3', which sets active twice"):
        ModelConfig(experts="8:active=2:active=3")
    with pytest.raises(InputError, match=r"An entry of train.trackers is 'wandbb'.*Did you mean 'wandb'"):
        from_mapping({"train": {"trackers": ["tensorboard", "wandbb"]}})
