"""Connections as text and as mappings come back exactly or are refused in a sentence; presets start as `bias_init` says."""

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support import oracles

from mhc_jax import connections
from mhc_jax.config.mapping import from_mapping, to_mapping
from mhc_jax.connections.mhc_family import PRESETS, bias_init
from mhc_jax.errors import InputError
from mhc_jax.plots.style import LOOKS

FIELDS = {kind: dataclasses.fields(connections.config_class(kind)) for kind in connections.KINDS}
NAMES = (*connections.mhc_family.PRESETS, *connections.mhc_family.EPS_CONVENTIONS)
EXITS = ("sum", "mean", "head", "gate", "last_read", "attention", "mix", "copy", "scaled")
VALUES = {
    "int": st.integers(-1, 9),
    "float": st.sampled_from([0.0, 0.01, 1 / 3, 1e-30, -2.5, 4.0, 100.0]) | st.floats(allow_nan=False),
    "bool": st.booleans(),
    "str": st.sampled_from([*NAMES, *EXITS, "nowhere"]),
    "tuple[str, ...]": st.lists(st.sampled_from(["pre", "post", "res"] * 3 + ["prre"]), min_size=1, max_size=3).map(
        tuple
    ),
}
FITTING = {
    "init": st.sampled_from(connections.mhc_family.PRESETS),
    "eps_convention": st.sampled_from([*connections.mhc_family.EPS_CONVENTIONS]),
    "exit": st.sampled_from(EXITS),
    "entry": st.sampled_from(["copy", "scaled"]),
    "num_streams": st.sampled_from([1, 2, 3, 4, 8]),
}


@st.composite
def any_settings(draw):
    """A kind and some of its settings, most of which are accepted."""
    kind = draw(st.sampled_from([*connections.KINDS]))
    fields = draw(st.lists(st.sampled_from(FIELDS[kind]), max_size=4))
    return kind, {f.name: draw(FITTING.get(f.name, VALUES[f.type]) | VALUES[f.type]) for f in fields}


@settings(max_examples=400)
@given(any_settings())
@example(("circulant", {"beta": 1 / 3}))
@example(("hc", {"dynamic": False}))
@example(("mhc", {"init": "home", "num_streams": 2, "disable": ("pre", "post"), "alpha_init": 1e-30}))
def test_a_connection_is_read_as_it_is_spelled_or_refused_in_a_sentence(case):
    kind, chosen = case
    text = ":".join([kind, *(f"{key}={'+'.join(v) if isinstance(v, tuple) else v}" for key, v in chosen.items())])
    try:
        config = connections.default_config(kind, **chosen)
    except InputError as refused:
        sentence = str(refused)
        assert any(name in sentence for name in chosen), "it names the setting"
        assert sentence.endswith((".", "?"))
        assert "\n" not in sentence
        with pytest.raises(InputError) as again:
            connections.parse(text)
        assert str(again.value) == sentence
        return
    spec = connections.spec(config)
    assert connections.parse(spec) == config == connections.parse(text)
    # The mappings of config.json: with all settings, and with the chosen ones alone.
    saved = json.loads(json.dumps(to_mapping(config)))
    assert connections.spec_of_mapping(saved) == connections.spec_of_mapping({"kind": kind, **chosen}) == spec
    assert from_mapping({"model": {"connection": saved}}).model.connection == config


NOTHING_LEFT = (("hc", "pre+post+res"), ("scalar_gated", "post+res"), ("identity", "pre+post"))
REFUSED = [
    *((f"{kind}:disable={parts}", f"nothing of `{kind}` is left") for kind, parts in NOTHING_LEFT),
    *(
        (f"{kind}:num_streams=1", "needs 2 (or more|to 5)")
        for kind in ("circulant", "gated", "go_mhc", "identity_mix", "mhc_lite")
    ),
    *(
        (f"{kind}=0", "at least 1")
        for kind in ("gated:rank", "attnres_block:block_size", "delta_attnres:heads", "mudd:block_size")
    ),
    *((f"{kind}:num_streams=1:init=home", f"`{kind}` is a gated residual") for kind in ("mhc", "identity")),
    ("scalar_gated:exit=head", "connection.exit is 'head'"),
    ("attnres_block:exit=sum", "connection.exit is 'sum'"),
    ("mhcc", "connection.kind is 'mhcc'.*Did you mean 'mhc'"),
    ("mhc:innit=paper", "'innit'.*Did you mean 'init'"),
    ("mhc:init=pper", "connection.init is 'pper'.*Did you mean 'paper'"),
    ("mhc:init", "'init' in connection 'mhc:init' is not of the form key=value"),
    ("mhc:exit=mena", "Did you mean 'mean'"),
    ("mhc:exit=last", "connection.exit is 'last'; it must be one of 'sum', 'mean', 'head'"),
    ("mhc:num_streams=0", "connection.num_streams is 0; a connection needs at least 1 stream"),
    ("mhc:num_streams=1:disable=pre+post", "nothing is learned"),
    ("mhc:t_max=0", "connection.t_max is 0; Sinkhorn needs at least 1 iteration"),
    ("mhc:t_max=many", "t_max is 'many'; it must be a int"),
    ("mhc:eps_convention=hy_v4", "connection.eps_convention is 'hy_v4'"),
    ("mhc:disable=pre+pots", "'pots'.*Did you mean 'post'"),
    ("mhc:disable=pre+post+res", "nothing of `mhc` is left: use kind 'residual'"),
    ("hc:tanh=maybe", "tanh is 'maybe'; it must be a bool"),
    ("residual:num_streams=4", "use `hc` or `mhc`"),
    ("residual:exit=head", "nothing to weigh"),
    ("residual:entry=scaled", "entry"),
    ("scalar_gated:num_streams=2", "has one stream"),
    ("identity:disable=res", "'res'; it must be one of 'pre', 'post'"),
    ("mhc_lite:num_streams=6", "6! = 720 permutations.*use `kromhc`"),
    ("kromhc:num_streams=6", "a power of two from 2 on: use 4 or 8"),
    ("kromhc:num_streams=1", "a power of two from 2 on: use 2, or `mhc`"),
    ("circulant:beta=0", "kind 'identity' has no mixing"),
    ("mhc:write_rank=5", "connection.write_rank is 5; what 4 streams are given has rank 1 to 4"),
    ("mhc:write_rank=0", "use such a rank"),
    ("mhc:write_rank=2:disable=post", "connection.write_rank is 2 with post disabled.*use 1"),
    ("mhc:write_rank=2:dynamic=False", "connection.write_rank is 2 with dynamic=False.*use 1"),
    ("mhc:disable=pre+post+res:entry=scaled", "nothing of `mhc` is left"),
    ("mhc:disable=pre+post+res:dynamic=False", "nothing of `mhc` is left"),
    ("single_pass:write_rank=2", "with rank 1: use `mhc` for more"),
    ("identity_mix:t_max=0", "connection.t_max is 0; Sinkhorn needs at least 1 iteration"),
    ("go_mhc:s=0", "connection.s is 0; a block has at least 1 row"),
    *(
        (f"mudd:eps_norm={eps}", "connection.eps_norm is .*; it must be (at least 1e-20|a finite number)")
        for eps in (0, -1, "inf", 1e-30)
    ),
    ("lanes:num_streams=4", "use 2, or `hc` or `mhc` for any number"),
    ("lanes:disable=post", "use kind 'residual'"),
    ("diagonal:disable=pre+post+res", "nothing of `diagonal` is left: use kind 'residual'"),
    ("single_pass:disable=pre", "use `mhc:disable=pre`"),
    ("gated:init_std=0", "no gradient"),
    ("gated:disable=pre", "share their norm"),
    ("attnres_block:num_streams=4", "set block_size"),
    ("attnres_block:heads=0", "connection.heads is 0; it must be at least 1"),
    ("delta_attnres:exit=attention", "connection.exit is 'attention'; it must be one of 'sum'"),
    ("delta_attnres:disable=pre", "`delta_attnres` has only its read: use kind 'residual'"),
    ("mudd:num_streams=2", "`mudd` keeps sources, not streams: set block_size"),
    ("mudd:exit=sum", "connection.exit is 'sum'; it must be one of 'mix'"),
]


@pytest.mark.parametrize(("spec", "sentence"), REFUSED)
def test_a_connection_that_cannot_be_is_told(spec, sentence):
    with pytest.raises(InputError, match=sentence):
        connections.parse(spec)


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        *((kind, kind) for kind in ("residual", "hc")),
        *(
            (kind, f"{kind}:init=paper")
            for kind in ("mhc", "mhc_lite", "kromhc", "diagonal", "identity_mix", "go_mhc", "single_pass")
        ),
        *((kind, f"{kind}:init=residual") for kind in ("circulant", "identity")),
        ("hc:tanh=true:num_streams=4", "hc"),
        ("hc:tanh=False", "hc:tanh=False"),
        ("mhc:t_max=5:init=home", "mhc:init=home:t_max=5"),
        ("mhc:alpha_init=1:disable=pre+post", "mhc:disable=pre+post:init=paper:alpha_init=1.0"),
    ],
)
def test_a_label_says_the_start_and_what_is_not_a_default(text, canonical):
    assert connections.spec(connections.parse(text)) == canonical


def test_a_record_of_another_version_has_a_label():
    """A label names settings that have no default here, and refuses nothing."""
    assert connections.spec_of_mapping({"kind": "mhc", "alpha_init": 1}) == "mhc:init=paper:alpha_init=1.0"
    assert connections.spec_of_mapping({"kind": "mhc", "gone": 3}) == "mhc:init=paper:gone=3"
    assert connections.spec_of_mapping({"kind": "mine", "size": 0.5, "parts": ["a", "b"]}) == "mine:size=0.5:parts=a+b"


def test_every_kind_has_a_look_of_its_own():
    looks = [LOOKS[kind] for kind in connections.KINDS]
    assert len({(color, dashes) for color, dashes, _ in looks}) == len(looks)
    assert len({marker for *_, marker in looks}) == len(looks)


@pytest.mark.parametrize("preset", PRESETS)
def test_preset_marginals(preset):
    """Static logits of sub-layer 7 with 4 streams: which streams it reads and writes, and how far H_res is from the identity."""
    static = {part: np.asarray(logits, np.float64) for part, logits in bias_init(preset, 6, 4).items()}
    H = oracles.sinkhorn(static["res"])
    np.testing.assert_allclose(H.sum(0), 1, atol=1e-6)
    off = {"zeros": 1.0, "hc": np.exp(-16)}.get(preset, np.exp(-6))
    np.testing.assert_allclose(np.abs(H - np.eye(4)).max(), 3 * off / (1 + 3 * off), rtol=1e-5)
    pre, post = oracles.sigmoid(static["pre"]), 2 * oracles.sigmoid(static["post"])
    home, rest = {"hc": (1, 0), "residual": (0.25, 0.25), "zeros": (0.5, 0.5)}.get(preset, (0.952574, 0.047426))
    np.testing.assert_allclose(pre, [rest, rest, home, rest], atol=1e-6)
    np.testing.assert_allclose(post, 2 * pre if preset == "home" else 1)
