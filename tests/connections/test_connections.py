"""The contract, over every registered kind, and what the presets promise."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mhc_kernels import Coefficients
from support import oracles
from support.decoders import MODEL, TOKENS, logits_of, randomized
from support.tolerances import STEP_ZERO, assert_close

from mhc_jax import connections
from mhc_jax.connections.dynamic import PRESETS, bias_init
from mhc_jax.errors import InputError
from mhc_jax.model import Decoder

C, B, T, L = 8, 2, 5, 6
SPECS = [
    "residual",
    "hc",
    "hc:dynamic=False",
    "hc:tanh=False:num_streams=2",
    "hc:disable=res",
    "mhc",
    "mhc:num_streams=1",
    "mhc:num_streams=3:exit=head",
    "mhc:disable=pre+post",
    "mhc:init=home:eps_convention=v4:exit=sum",
    "scalar_gated",
    "identity",
    "identity:eps_convention=hy_v4:exit=head",
    "mhc_lite",
    "kromhc:num_streams=8:exit=sum",
    "circulant:num_streams=3",
    "single_pass",
    "gated:rank=3",
    "attnres_block:block_size=2",
]
NO_READ_MATRIX = ("gated", "attnres_block")
"""Kinds whose read is not a mix of what diagnostics see; their `dense` says what stands for it."""


def test_every_kind_is_in_the_specs():
    assert {s.split(":")[0] for s in SPECS} == set(connections.KINDS)


def make(spec, sublayer=1):
    config = connections.parse(spec)
    return connections.connection_module(config)(config, C, L, sublayer)


def setup(spec, seed=0):
    """(module of sub-layer 1, its parameters, module of the ends, its parameters, streams, y)."""
    link, ends = make(spec), make(spec, None)
    x, y = (jax.random.normal(jax.random.key(k), (B, T, C)) for k in (1, 2))
    streams, c = ends.start(x)
    streams = jax.tree.map(lambda s: s + jax.random.normal(jax.random.key(3), s.shape), streams)
    params = randomized(jax.jit(functools.partial(link.init, method="write_read"))(jax.random.key(seed), streams, c, y))
    ends_params = randomized(jax.jit(functools.partial(ends.init, method="collapse"))(jax.random.key(seed), streams, c))
    return link, params, ends, ends_params, streams, y


@pytest.mark.parametrize("spec", SPECS)
def test_contract_shapes_and_dtypes(spec):
    link, params, ends, ends_params, streams, y = setup(spec)
    c = link.apply(params, streams, method="coefficients")
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(c))
    _, start = ends.start(y)
    shapes = jax.tree.map(lambda a: (a.shape, a.dtype), c)
    assert shapes == jax.tree.map(lambda a: (a.shape, a.dtype), start), "a scan carries c: start must look like it"
    h = link.apply(params, streams, c, method="read")
    assert (h.shape, h.dtype) == ((B, T, C), jnp.float32)
    written = link.apply(params, streams, c, y, method="write")
    assert jax.tree.map(jnp.shape, written) == jax.tree.map(jnp.shape, streams)
    out = ends.apply(ends_params, written, c, method="collapse")
    assert out.shape == (B, T, C)
    half = jax.tree.map(lambda s: s.astype(jnp.bfloat16), streams)
    assert link.apply(params, half, c, method="read").dtype == jnp.bfloat16
    assert jax.tree.leaves(link.apply(params, half, c, y, method="write"))[0].dtype == jnp.bfloat16


@pytest.mark.parametrize("spec", SPECS)
def test_boundary_is_write_coefficients_read(spec):
    link, params, _, _, streams, y = setup(spec)
    before = link.apply(params, streams, method="coefficients")
    streams2, c, h = link.apply(params, streams, before, y, method="write_read")
    expected = link.apply(params, streams, before, y, method="write")
    assert_close(jax.tree.leaves(streams2)[0], jax.tree.leaves(expected)[0], 1e-6)
    c2 = link.apply(params, expected, method="coefficients")
    for a, b in zip(jax.tree.leaves(c), jax.tree.leaves(c2), strict=True):
        assert_close(a, b, 1e-6)
    assert_close(h, link.apply(params, expected, c2, method="read"), 1e-6)


@pytest.mark.parametrize("spec", SPECS)
def test_start_writes_nothing(spec):
    ends = make(spec, None)
    x = jax.random.normal(jax.random.key(0), (B, T, C))
    streams, c = ends.start(x)
    jax.tree.map(np.testing.assert_array_equal, ends.write(streams, c, jnp.zeros_like(x)), streams)


@pytest.mark.parametrize("spec", SPECS)
def test_every_parameter_has_a_gradient(spec):
    link, params, ends, ends_params, streams, y = setup(spec)
    weights = jax.random.normal(jax.random.key(5), (B, T, C))

    def loss(params, ends_params):
        c = link.apply(params, streams, method="coefficients")
        h = link.apply(params, streams, c, method="read")
        mixed = link.apply(params, streams, c, y, method="write")
        out = ends.apply(ends_params, mixed, c, method="collapse")
        return (h * weights).sum() + (out**2).sum() + (link.flat(mixed) ** 3).sum()

    grads = jax.jit(jax.grad(loss, argnums=(0, 1)))(params, ends_params)
    for path, g in jax.tree_util.tree_leaves_with_path(grads):
        if spec == "mhc:num_streams=1" and "alpha" not in jax.tree_util.keystr(path):
            continue  # H_res is the number 1 there
        assert float(jnp.abs(g).max()) > 0, f"{jax.tree_util.keystr(path)} has no gradient"


@pytest.mark.parametrize("spec", SPECS)
def test_dense_fills_in_disabled_components(spec):
    link, params, _, _, streams, y = setup(spec)
    c = link.apply(params, streams, method="coefficients")
    dense = link.dense(c, y)
    n = link.config.num_streams
    assert [a.shape for a in dense] == [(n, B, T), (n, B, T), (n, n, B, T)]
    x = link.flat(streams).reshape(B * T, n, C)
    for name, computed in (
        ("read", link.apply(params, streams, c, method="read")),
        ("write", link.flat(link.apply(params, streams, c, y, method="write"))),
    ):
        if name == "read" and link.config.kind in NO_READ_MATRIX:
            continue
        flat = [np.asarray(a, np.float64).reshape(*a.shape[:-2], -1) for a in dense]
        for t in range(B * T):
            token = np.asarray(x[t], np.float64)
            if name == "read":
                expected = oracles.read(token, flat[0][..., t])
            else:
                expected = oracles.write(
                    token, np.asarray(y.reshape(-1, C)[t]), flat[1][..., t], flat[2][..., t]
                ).ravel()
            assert_close(computed.reshape(B * T, -1)[t], expected, what=name)


@pytest.mark.parametrize("tanh", [True, False])
@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 8])
def test_hc_coefficients_against_the_oracle(n, tanh):
    config = connections.default_config("hc", num_streams=n, tanh=tanh)
    link = connections.connection_module(config)(config, C, L, 1)
    x = jax.random.normal(jax.random.key(0), (1, 3, n * C))
    params = randomized(link.init(jax.random.key(0), x, method="coefficients"))
    c = link.apply(params, x, method="coefficients")
    p = {k: np.asarray(v, np.float64) for k, v in params["params"].items()}
    W = p["W"]
    for t in range(3):
        expected = oracles.hc_coefficients(
            np.asarray(x[0, t], np.float64).reshape(n, C),
            p["A_m"], p["B"], p["A_r"], W[:, 0], W[:, 1], W[:, 2:], p["s_a"], p["s_b"], tanh,
        )  # fmt: skip
        for k, name in enumerate(Coefficients._fields):
            assert_close(c[k][..., 0, t], expected[k], what=name)


ALWAYS = ("residual", "hc", "mhc", "attnres_block")
"""Kinds whose decoders are compiled in the default run; the others share their code."""


@pytest.mark.parametrize(
    "spec", [k if k in ALWAYS else pytest.param(k, marks=pytest.mark.slow) for k in connections.KINDS]
)
@pytest.mark.parametrize(
    "change",
    [
        {"unroll": 3, "remat": "full"},
        {"remat": "connection"},
        {"compute_dtype": "bfloat16", "stream_dtype": "bfloat16"},
    ],
)
def test_decoder_under_unroll_remat_and_bfloat16(spec, change):
    config = dataclasses.replace(MODEL, connection=connections.parse(spec))
    params = randomized(jax.jit(Decoder(config).init)(jax.random.key(0), TOKENS))

    def loss(params, config):
        logits, _ = Decoder(config).apply(params, TOKENS)
        return (logits**2).mean()

    value_and_grad = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    value, grads = value_and_grad(params, config)
    value2, grads2 = value_and_grad(params, dataclasses.replace(config, **change))
    if "compute_dtype" in change:
        assert_close(value2, value, 0.1)  # eight bits of mantissa through six sub-layers
        assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads2))
        return
    assert_close(value2, value, 1e-5)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(grads), jax.tree.leaves(grads2), strict=True):
        assert_close(b, a, 1e-4, jax.tree_util.keystr(path))


PROMISED = [f"{spec}:num_streams={n}" for spec in ("hc", "mhc", "mhc:init=residual") for n in (1, 2, 4, 8)]


@pytest.mark.parametrize("spec", [*PROMISED, "hc:dynamic=False", "mhc:init=zeros", "mhc:init=hc", "mhc:exit=head"])
def test_step_zero_equals_pre_norm(spec):
    expected, reference = logits_of("residual")
    actual, params = logits_of(spec)
    own = {"attention_connection", "mlp_connection"}
    shared = {k: v for k, v in params["params"]["layers"].items() if k not in own}
    jax.tree.map(np.testing.assert_array_equal, shared, reference["params"]["layers"])
    assert float(jnp.abs(actual - expected).max()) <= STEP_ZERO


def test_home_preset_is_not_pre_norm():
    assert float(jnp.abs(logits_of("mhc:init=home")[0] - logits_of("residual")[0]).max()) > 1e-2


def test_residual_has_no_parameters():
    _, params = logits_of("residual")
    assert set(params["params"]["layers"]) == {"attention", "mlp"}
    assert "ends" not in params["params"]


@pytest.mark.parametrize("preset", PRESETS)
def test_preset_marginals(preset):
    static = bias_init(preset, 6, 4)
    H = oracles.sinkhorn(np.asarray(static["res"]))
    np.testing.assert_allclose(H.sum(0), 1, atol=1e-6)
    pre = oracles.sigmoid(np.asarray(static["pre"], np.float64))
    home = {"paper": 2, "home": 2, "hc": 2}.get(preset)
    if home is not None:
        assert pre.argmax() == home, "sub-layer 6 of 4 streams calls stream 2 home"
    if preset == "residual":
        np.testing.assert_allclose(pre, 0.25, rtol=1e-6)
    if preset == "zeros":
        np.testing.assert_allclose(H, 0.25)


def test_layer_dependent_initialisers_are_scanned():
    _, params = logits_of("hc")
    A_m = params["params"]["layers"]["attention_connection"]["A_m"]
    np.testing.assert_array_equal(A_m.argmax(-1), [0, 2, 0])  # sub-layers 0, 2, 4 of 4 streams
    np.testing.assert_array_equal(params["params"]["layers"]["mlp_connection"]["A_m"].argmax(-1), [1, 3, 1])


def test_h_res_is_applied_and_streams_persist():
    """The bugs that silently void a comparison: a computed but unused H_res, streams collapsed in every block."""
    model = Decoder(dataclasses.replace(MODEL, connection=connections.parse("mhc:init=home")))
    apply = jax.jit(model.apply, static_argnums=2)
    params = randomized(logits_of("mhc:init=home")[1])
    base = apply(params, TOKENS)[0]
    where = params["params"]["layers"]["attention_connection"]["bias"]
    moved = where.at[1, 8:].set(jax.random.normal(jax.random.key(1), (16,)))  # H_res of block 1 alone
    params["params"]["layers"]["attention_connection"]["bias"] = moved
    assert float(jnp.abs(apply(params, TOKENS)[0] - base).max()) > 1e-3
    _, diagnostics = apply(params, TOKENS, 4)
    assert diagnostics["stream_rms"].shape == (6, 4)
    assert float(diagnostics["stream_rms"].std(-1).max()) > 1e-2, "streams differ between blocks"


def test_step_zero_gradient_of_h_res_logits_is_alive_once_streams_differ():
    model = Decoder(dataclasses.replace(MODEL, connection=connections.parse("mhc:init=home")))
    _, params = logits_of("mhc:init=home")
    grads = jax.jit(jax.grad(lambda p: (model.apply(p, TOKENS)[0] ** 2).mean()))(params)
    bias = grads["params"]["layers"]["mlp_connection"]["bias"][:, 8:]
    assert float(jnp.abs(bias).max()) > 1e-8


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("mhcc", "Did you mean 'mhc'"),
        ("mhc:init=pper", "Did you mean 'paper'"),
        ("mhc:exit=mena", "Did you mean 'mean'"),
        ("mhc:num_streams=0", "at least 1 stream"),
        ("mhc:num_streams=1:init=home", "gated residual"),
        ("mhc:num_streams=1:disable=pre+post", "nothing is learned"),
        ("mhc:t_max=0", "at least 1 iteration"),
        ("mhc:disable=pre+post+res", "use kind 'residual'"),
        ("hc:disable=prre", "Did you mean 'pre'"),
        ("hc:tanh=maybe", "must be a bool"),
        ("hc:gate", "not of the form key=value"),
        ("residual:num_streams=4", "use `hc` or `mhc`"),
        ("residual:exit=head", "nothing to weigh"),
    ],
)
def test_refused_settings(spec, words):
    with pytest.raises(InputError, match=words.replace("(", "\\(")):
        connections.parse(spec)


def test_scaled_entry_tells_streams_apart():
    ends = make("mhc:entry=scaled", None)
    x = jax.random.normal(jax.random.key(0), (B, T, C))
    variables = ends.init(jax.random.key(1), x, method="expand")
    s = variables["params"]["entry_scale"]
    assert s.shape == (4, C)
    assert abs(float(s.mean()) - 0.6) < 0.3
    expected = np.concatenate([np.asarray(x) * np.asarray(row) for row in s], axis=-1)
    assert_close(ends.apply(variables, x, method="expand"), expected)


def test_scaled_entry_in_the_decoder():
    """H_res alone has something to mix, and the scales learn."""
    spec = "mhc:entry=scaled:disable=pre+post"
    model = Decoder(dataclasses.replace(MODEL, connection=connections.parse(spec)))
    params = jax.jit(model.init)(jax.random.key(0), TOKENS)["params"]
    gradient = jax.jit(jax.grad(lambda p: jnp.square(model.apply({"params": p}, TOKENS)[0]).sum()))(params)
    assert float(jnp.abs(gradient["ends"]["entry_scale"]).max()) > 0
    mixing = gradient["layers"]["mlp_connection"]["bias"]
    assert float(jnp.abs(mixing).max()) > 1e-6, "with equal streams H_res is inert"


def test_scaled_entry_needs_streams():
    with pytest.raises(InputError, match="entry"):
        connections.parse("residual:entry=scaled")
