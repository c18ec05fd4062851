"""Every registered kind is held to the contract, and the presets to what they promise."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mhc_kernels import Coefficients
from support import oracles
from support.contract import B, C, L, T, found, make
from support.decoders import TOKENS, decoder_of, drawn, logits_of, randomized
from support.thinned import thin
from support.tolerances import STEP_ZERO, assert_close

from mhc_jax import connections
from mhc_jax.connections.dynamic import PRESETS, bias_init
from mhc_jax.model import Decoder

SPECS = [
    "residual",
    "hc",
    "hc:dynamic=False",
    "hc:tanh=False:num_streams=2",
    "hc:disable=res",
    "mhc",
    "mhc:num_streams=1:t_max=2",
    "mhc:num_streams=3:exit=head:t_max=2",
    "mhc:disable=pre+post:t_max=2",
    "mhc:init=home:eps_convention=v4:exit=sum:t_max=2",
    "scalar_gated",
    "identity",
    "identity:eps_convention=hy_v4:exit=head",
    "mhc_lite",
    "kromhc:num_streams=8:exit=sum",
    "circulant:num_streams=3",
    "single_pass:t_max=2",
    "gated:rank=3",
    "attnres_block:block_size=2",
]
NO_READ_MATRIX = ("gated", "attnres_block")
"""Kinds whose read is not a mix of what diagnostics see; their `dense` says what stands for it."""
MULTIPLIED = {"phi", "head_phi", "W", "down", "up", "inject", "w"}
"""Parameters that the streams are multiplied with; all others are static."""


def test_every_kind_is_in_the_specs():
    assert {s.split(":")[0] for s in SPECS} == set(connections.KINDS)


@pytest.mark.parametrize("spec", SPECS)
def test_contract_shapes_and_dtypes(spec):
    link, streams, y, out = found(spec)
    c, params = out["c"], out["params"]
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(c))
    shapes = [jax.tree.map(jnp.shape, a) for a in (c, out["start"][1])]
    assert shapes[0] == shapes[1], "a scan carries c: start must look like it"
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(out["start"][1]))
    assert (out["h"].shape, out["h"].dtype) == ((B, T, C), jnp.float32)
    assert jax.tree.map(jnp.shape, out["written"]) == jax.tree.map(jnp.shape, streams)
    assert out["left"].shape == (B, T, C)
    half = jax.tree.map(lambda s: s.astype(jnp.bfloat16), streams)
    run = lambda method, *a: jax.eval_shape(lambda: link.apply(params, half, c, *a, method=method))  # noqa: E731
    assert run("read").dtype == jnp.bfloat16
    assert jax.tree.leaves(run("write", y))[0].dtype == jnp.bfloat16
    start, _ = jax.eval_shape(lambda: make(spec, None).start(y.astype(jnp.bfloat16)))
    assert jax.tree.leaves(start)[0].dtype == jnp.bfloat16


@pytest.mark.parametrize("spec", SPECS)
def test_boundary_is_write_coefficients_read(spec):
    *_, out = found(spec)
    for a, b in zip(jax.tree.leaves(out["boundary"]), jax.tree.leaves(out["in parts"]), strict=True):
        assert_close(a, b, 1e-6)


@pytest.mark.parametrize("spec", SPECS)
def test_start_writes_nothing(spec):
    *_, out = found(spec)
    jax.tree.map(np.testing.assert_array_equal, out["unwritten"], out["start"][0])


@pytest.mark.parametrize("spec", SPECS)
def test_every_parameter_has_a_gradient(spec):
    *_, out = found(spec)
    for path, g in jax.tree_util.tree_leaves_with_path(out["gradient"]):
        if spec.startswith("mhc:num_streams=1") and "alpha" not in jax.tree_util.keystr(path):
            continue  # H_res is the number 1 there
        assert float(np.abs(g).max()) > 0, f"{jax.tree_util.keystr(path)} has no gradient"


@pytest.mark.parametrize("spec", SPECS)
def test_dense_fills_in_disabled_components(spec):
    """What diagnostics see is what is applied, by the oracles' read and write of every token."""
    link, streams, y, out = found(spec)
    n = link.config.num_streams
    assert [a.shape for a in out["dense"]] == [(n, B, T), (n, B, T), (n, n, B, T)]
    pre, post, res = (np.asarray(a, np.float64).reshape(*a.shape[:-2], -1) for a in out["dense"])
    x = np.asarray(link.flat(streams), np.float64).reshape(B * T, n, C)
    outputs = np.asarray(y, np.float64).reshape(B * T, C)
    if link.config.kind not in NO_READ_MATRIX:
        expected = [oracles.read(x[t], pre[:, t]) for t in range(B * T)]
        assert_close(out["h"].reshape(B * T, C), expected, what="read")
    expected = [oracles.write(x[t], outputs[t], post[:, t], res[..., t]) for t in range(B * T)]
    assert_close(link.flat(out["written"]).reshape(B * T, n, C), expected, what="write")


@pytest.mark.parametrize("spec", SPECS)
def test_static_parameters_are_those_that_the_streams_are_not_multiplied_with(spec):
    """They take no weight decay: towards 0 it would close gates and fade streams."""
    link, *_, out = found(spec)
    names = {path[-1].key for path, _ in jax.tree_util.tree_leaves_with_path((out["params"], out["ends"]))}
    assert names - set(link.static_params) == names & MULTIPLIED


LEAVE = {"sum": np.sum, "mean": np.mean}


@pytest.mark.parametrize("spec", ["mhc:exit=sum:t_max=2", "hc:exit=mean", "single_pass:t_max=2", *SPECS])
def test_streams_leave_as_the_exit_says(spec):
    """Sum, mean, or what the last sub-layer predicted for a next one; heads and gates have tests of their own."""
    link, *_, out = found(spec)
    streams = np.asarray(link.flat(out["written"]), np.float64).reshape(B, T, -1, C)
    if link.config.exit == "last_read":
        assert_close(out["left"], np.einsum("nbt,btnc->btc", np.asarray(out["c"].next_pre, np.float64), streams))
    elif link.config.exit in LEAVE:
        assert_close(out["left"], LEAVE[link.config.exit](streams, 2))


EVERY_HC = [f"hc:num_streams={n}:tanh={tanh}" for n in (1, 2, 3, 4, 5, 8) for tanh in (True, False)]
EVERY_MHC = ["mhc:num_streams=3:t_max=1", "mhc:num_streams=4:t_max=3"]


@pytest.mark.parametrize("spec", thin([*EVERY_HC, *EVERY_MHC], lambda spec: spec not in EVERY_HC[1::4]))
def test_coefficients_against_the_oracle(spec):
    config = connections.parse(spec)
    link, n = connections.connection_module(config)(config, C, L, 1), config.num_streams
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 3, n * C)), jnp.float32)
    params = drawn(functools.partial(link.init, method="coefficients"), x, spread=0.5)
    c = jax.jit(lambda p: link.apply(p, x, method="coefficients"))(params)
    p = {k: np.asarray(v, np.float64) for k, v in params["params"].items()}
    for t, token in enumerate(np.asarray(x[0], np.float64).reshape(3, n, C)):
        if config.kind == "hc":
            W = p["W"]
            args = p["A_m"], p["B"], p["A_r"], W[:, 0], W[:, 1], W[:, 2:], p["s_a"], p["s_b"], config.tanh
            expected = oracles.hc_coefficients(token, *args)
        else:
            expected = oracles.mhc_coefficients(token, p["phi"], p["alpha"], p["bias"], config.t_max)
        for k, name in enumerate(Coefficients._fields):
            assert_close(c[k][..., 0, t], expected[k], what=name)


CHANGES = {
    "unroll": {"unroll": 3, "remat": "full"},
    "connection": {"remat": "connection"},
    "bfloat16": {"compute_dtype": "bfloat16", "stream_dtype": "bfloat16"},
}
FAST = {("hc", "unroll"), ("attnres_block", "connection"), ("mhc", "bfloat16")}
COMPILED = ("residual", "hc", "mhc", "attnres_block")
"""Kinds whose decoders are compiled short of `make test-slow`; the others share their code."""


def marks(kind, change):
    return () if (kind, change) in FAST else pytest.mark.full if kind in COMPILED else pytest.mark.slow


@pytest.mark.parametrize(
    ("kind", "change"),
    [pytest.param(kind, change, marks=marks(kind, change)) for kind in connections.KINDS for change in CHANGES],
)
def test_a_decoder_under_unroll_remat_and_bfloat16_is_the_same(kind, change):
    spec = "mhc:t_max=2" if kind == "mhc" else kind
    config, params = decoder_of(spec), randomized(logits_of(spec)[1])
    changed = dataclasses.replace(config, **CHANGES[change])

    def loss(params, config):
        logits, _ = Decoder(config).apply({"params": params}, TOKENS)
        return (logits**2).mean()

    with_grad = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    value2, grads2 = with_grad(params, changed)
    if change == "bfloat16":
        # Eight bits of mantissa through six sub-layers.
        assert_close(value2, jax.jit(loss, static_argnums=1)(params, config), 0.1)
        assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads2))
        return
    value, grads = with_grad(params, config)
    assert_close(value2, value, 1e-5)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(grads), jax.tree.leaves(grads2), strict=True):
        assert_close(b, a, 1e-4, jax.tree_util.keystr(path))


PRE_NORM = [
    *(
        "hc",
        "mhc",
        "mhc:init=zeros:t_max=2",
        "mhc:init=hc:t_max=2:exit=head",
        "mhc:init=residual:num_streams=1:t_max=2",
    ),
    *("attnres_block", "identity:num_streams=2", "mhc_lite:init=zeros", "kromhc", "circulant", "single_pass:t_max=2"),
]
REST = [
    *(f"{spec}:num_streams={n}" for spec in ("hc", "mhc", "mhc:init=residual") for n in (1, 2, 4, 8)),
    *("hc:dynamic=False", "mhc:exit=head", "mhc:init=hc", "mhc:init=zeros", "scalar_gated", "identity", "mhc_lite"),
    *("identity:num_streams=1", "identity:init=paper", "single_pass", "single_pass:num_streams=1"),
]


@pytest.mark.parametrize("spec", thin([*PRE_NORM, *REST], PRE_NORM.__contains__))
def test_step_zero_equals_pre_norm(spec):
    assert float(np.abs(logits_of(spec)[0] - logits_of("residual")[0]).max()) <= STEP_ZERO


@functools.cache
def initial(kind):
    """Parameters of a decoder as `init` gives them."""
    return jax.jit(Decoder(decoder_of(kind)).init)(jax.random.key(0), TOKENS)["params"]


@pytest.mark.parametrize("kind", thin(connections.KINDS, lambda kind: kind in ("hc", "gated")))
def test_branches_start_with_the_same_values_whatever_the_connection(kind):
    reference = initial("residual")
    assert "ends" not in reference
    params = {name: tree for name, tree in initial(kind).items() if name != "ends"}
    params["layers"] = {name: tree for name, tree in params["layers"].items() if not name.endswith("_connection")}
    assert set(params["layers"]) == {"attention", "mlp"}
    jax.tree.map(np.testing.assert_array_equal, params, reference)


BROKEN = {"mhc:t_max=2:init=home": 1e-2, "gated": 1e-4}
BROKEN |= {f"{kind}:init=home": 1e-4 for kind in ("identity", "mhc_lite", "kromhc", "circulant", "single_pass")}


@pytest.mark.parametrize(
    "spec", thin(BROKEN, lambda spec: spec in ("mhc:t_max=2:init=home", "gated", "identity:init=home"))
)
def test_step_zero_with_broken_symmetry_is_not_pre_norm(spec):
    """`home` and the random gates of `gated` tell the streams apart from the start."""
    assert float(np.abs(logits_of(spec)[0] - logits_of("residual")[0]).max()) > BROKEN[spec]


@pytest.mark.parametrize("preset", PRESETS)
def test_preset_marginals(preset):
    """Where the static logits of sub-layer 6 of 4 streams read, and how far from the identity its H_res is."""
    static = {part: np.asarray(logits, np.float64) for part, logits in bias_init(preset, 6, 4).items()}
    H = oracles.sinkhorn(static["res"])
    np.testing.assert_allclose(H.sum(0), 1, atol=1e-6)
    off = {"zeros": 1.0, "hc": np.exp(-16)}.get(preset, np.exp(-6))
    np.testing.assert_allclose(np.abs(H - np.eye(4)).max(), 3 * off / (1 + 3 * off), rtol=1e-5)
    pre, post = oracles.sigmoid(static["pre"]), 2 * oracles.sigmoid(static["post"])
    home, other = {"hc": (1, 0), "residual": (0.25, 0.25), "zeros": (0.5, 0.5)}.get(preset, (0.952574, 0.047426))
    np.testing.assert_allclose(pre, [other, other, home, other], atol=1e-6)
    np.testing.assert_allclose(post, 2 * pre if preset == "home" else 1)


def test_layer_dependent_initialisers_are_scanned():
    layers = initial("hc")["layers"]
    A_m = {name: layers[f"{name}_connection"]["A_m"].argmax(-1) for name in ("attention", "mlp")}
    np.testing.assert_array_equal(A_m["attention"], [0, 2, 0])  # sub-layers 0, 2, 4 of 4 streams
    np.testing.assert_array_equal(A_m["mlp"], [1, 3, 1])


def test_scaled_entry_tells_streams_apart_in_their_dtype():
    ends = make("mhc:entry=scaled", None)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(B, T, C)), jnp.float32)
    expand = functools.partial(ends.apply, method="expand")
    variables = ends.init(jax.random.key(1), x, method="expand")
    s = variables["params"]["entry_scale"]
    assert s.shape == (4, C)
    assert abs(float(s.mean()) - 0.6) < 0.3
    expected = np.concatenate([np.asarray(x) * np.asarray(row) for row in s], axis=-1)
    assert_close(jax.jit(expand)(variables, x), expected)
    assert jax.eval_shape(expand, variables, x.astype(jnp.bfloat16)).dtype == jnp.bfloat16
