"""Every registered kind keeps the contract, alone and in a decoder."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import oracles
from support.decoders import TOKENS, decoder_of, drawn, logits_of, randomized
from support.thinned import thin
from support.tolerances import ANOTHER_PROGRAM, REORDERED, STEP_ZERO, WHOLE_GRADIENT, assert_close, cancelling

from mhc_jax import connections
from mhc_jax.connections.parameter_paths import path_of
from mhc_jax.diagnostics import summarize
from mhc_jax.model import Decoder

C, B, T, L = 8, 2, 5, 6
SPECS = [
    "residual",
    *("hc", "hc:dynamic=False", "hc:tanh=False:num_streams=2", "hc:disable=res"),
    *("mhc", "mhc:num_streams=1:t_max=2", "mhc:num_streams=3:exit=head:t_max=2", "mhc:disable=pre+post:t_max=2"),
    "mhc:init=home:eps_convention=v4:exit=sum:t_max=2",
    "mhc:num_streams=3:t_max=2:write_rank=3",
    "mhc:dynamic=False:num_streams=3:t_max=2",
    "scalar_gated",
    *("identity", "identity:eps_convention=hy_v4:exit=head"),
    *("mhc_lite", "kromhc:num_streams=8:exit=sum", "circulant:num_streams=3"),
    *("diagonal", "identity_mix:num_streams=3:t_max=2", "go_mhc:num_streams=3", "lanes"),
    "single_pass:t_max=2",
    "gated:rank=3",
    *("attnres_block:block_size=2", "attnres_block:block_size=1:heads=4", "delta_attnres:block_size=1:heads=2"),
    *("mudd:block_size=1", "mudd:block_size=1:norms=False"),
]
NO_READ_MATRIX = ("gated", "attnres_block", "delta_attnres", "mudd")
"""Kinds whose read is not a mix of the streams that diagnostics see."""
NO_WRITE_MATRIX = ("mudd", "write_rank")
"""Parts of the specs whose write adds more to these streams than a mix of them and the branch output."""
MULTIPLIED = {"phi", "head_phi", "write_phi", "W", "down", "up", "inject", "w", "W1", "W2"}
"""Parameters that streams are multiplied with; all others are static."""


def make(spec, sublayer=1):
    """The module of one sub-layer (`sublayer` is its index), or of the ends."""
    config = connections.parse(spec)
    return connections.connection_module(config)(config, C, L, sublayer)


@functools.cache
def evaluated(spec):
    """(module of sub-layer 2, its streams, y, results of every method of the contract by name), from one compiled program."""
    link, ends = make(spec), make(spec, None)
    draw = np.random.default_rng(1)
    x, y, weights = (jnp.asarray(draw.normal(size=(B, T, C)), jnp.float32) for _ in range(3))
    streams, c = jax.eval_shape(ends.start, x)
    streams = jax.tree.map(lambda s: jnp.asarray(draw.normal(size=s.shape), s.dtype), streams)
    params = drawn(functools.partial(link.init, method="write_read"), streams, c, y)
    ends_params = drawn(functools.partial(ends.init, method="collapse"), streams, c, seed=1)

    def loss(params, ends_params):
        out = {"params": params, "ends": ends_params, "start": ends.start(x)}
        out["unwritten"] = ends.write(*out["start"], jnp.zeros_like(x))
        out["c"] = c = link.apply(params, streams, method="coefficients")
        out["h"] = h = link.apply(params, streams, c, method="read")
        out["written"] = written = link.apply(params, streams, c, y, method="write")
        out["collapsed"] = collapsed = ends.apply(ends_params, written, c, method="collapse")
        out["boundary"] = link.apply(params, streams, c, y, method="write_read")
        after = link.apply(params, written, method="coefficients")
        out["in parts"] = written, after, link.apply(params, written, after, method="read")
        out["dense"] = link.dense(c, y)
        out["logits"] = link.apply(params, streams, method="mixing_logits")
        return (h * weights).sum() + (collapsed**2).sum() + (link.flat(written) ** 3).sum(), out

    grads, out = jax.jit(jax.grad(loss, (0, 1), has_aux=True))(params, ends_params)
    return link, streams, y, {**out, "gradient": grads}


def test_every_kind_is_in_the_specs():
    assert {s.split(":")[0] for s in SPECS} == set(connections.KINDS)


@pytest.mark.parametrize("spec", SPECS)
def test_contract_shapes_and_dtypes(spec):
    link, streams, y, out = evaluated(spec)
    c, params = out["c"], out["params"]
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(c))
    shapes = [jax.tree.map(jnp.shape, a) for a in (c, out["start"][1])]
    assert shapes[0] == shapes[1], "a scan carries c, so that start must have the same shapes"
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(out["start"][1]))
    assert (out["h"].shape, out["h"].dtype) == ((B, T, C), jnp.float32)
    assert jax.tree.map(jnp.shape, out["written"]) == jax.tree.map(jnp.shape, streams)
    assert out["collapsed"].shape == (B, T, C)
    half = jax.tree.map(lambda s: s.astype(jnp.bfloat16), streams)
    run = lambda method, *a: jax.eval_shape(lambda: link.apply(params, half, c, *a, method=method))  # noqa: E731
    assert run("read").dtype == jnp.bfloat16
    assert jax.tree.leaves(run("write", y))[0].dtype == jnp.bfloat16
    start, _ = jax.eval_shape(lambda: make(spec, None).start(y.astype(jnp.bfloat16)))
    assert jax.tree.leaves(start)[0].dtype == jnp.bfloat16


@pytest.mark.parametrize("spec", SPECS)
def test_boundary_is_write_coefficients_read_and_start_writes_nothing(spec):
    *_, out = evaluated(spec)
    jax.tree.map(np.testing.assert_array_equal, out["unwritten"], out["start"][0])
    for a, b in zip(jax.tree.leaves(out["boundary"]), jax.tree.leaves(out["in parts"]), strict=True):
        assert_close(a, b, REORDERED)


@pytest.mark.parametrize("spec", SPECS)
def test_every_parameter_has_a_gradient(spec):
    *_, out = evaluated(spec)
    for path, g in jax.tree_util.tree_leaves_with_path(out["gradient"]):
        if spec.startswith("mhc:num_streams=1") and "alpha" not in jax.tree_util.keystr(path):
            continue  # H_res is the number 1 there
        assert float(np.abs(g).max()) > 0, f"{jax.tree_util.keystr(path)} has no gradient"


@pytest.mark.parametrize("spec", SPECS)
def test_dense_fills_in_disabled_components(spec):
    """The coefficients that diagnostics see are those that are applied: the oracles' read and write of every token agree."""
    link, streams, y, out = evaluated(spec)
    n = link.config.num_streams
    assert [a.shape for a in out["dense"]] == [(n, B, T), (n, B, T), (n, n, B, T)]
    pre, post, res = (np.asarray(a, np.float64).reshape(*a.shape[:-2], -1) for a in out["dense"])
    x = np.asarray(link.flat(streams), np.float64).reshape(B * T, n, C)
    outputs = np.asarray(y, np.float64).reshape(B * T, C)
    if link.config.kind not in NO_READ_MATRIX:
        expected = [oracles.read(x[t], pre[:, t]) for t in range(B * T)]
        assert_close(out["h"].reshape(B * T, C), expected, what="read")
    if not any(part in spec for part in NO_WRITE_MATRIX):
        expected = [oracles.write(x[t], outputs[t], post[:, t], res[..., t]) for t in range(B * T)]
        assert_close(link.flat(out["written"]).reshape(B * T, n, C), expected, what="write")


FROM_LOGITS = ("mhc", "mhc_lite", "kromhc", "circulant", "diagonal", "identity_mix", "go_mhc", "single_pass")
"""Kinds that make H_res from logits."""


@pytest.mark.parametrize("spec", SPECS)
def test_logits_of_h_res_are_the_last_columns_of_the_projection(spec):
    """In float64: alpha times the RMS-normed streams times phi, plus the static logits.  Other kinds report none."""
    link, streams, _, out = evaluated(spec)
    config, params = (
        link.config,
        {name: np.asarray(a, np.float64) for name, a in out["params"].get("params", {}).items()},
    )
    if config.kind not in FROM_LOGITS or "res" in config.disable:
        assert out["logits"] is None
        return
    n = config.num_streams
    k = {"mhc_lite": math.factorial(n), "kromhc": 2 * int(math.log2(n)), "circulant": n, "diagonal": n}
    k = {**k, "go_mhc": n * (2 * n - 1)}.get(config.kind, n**2)
    x = np.asarray(link.flat(streams), np.float64)
    eps = 1e-6 if "v4" in spec else 0
    z = np.zeros((*x.shape[:-1], k))
    if config.dynamic:
        z = params["alpha"][-1] * (x @ params["phi"][:, -k:]) / np.sqrt((x**2).mean(-1, keepdims=True) + eps)
    assert_close(out["logits"], np.moveaxis(z + params["bias"][-k:], -1, 0))
    if config.kind in ("mhc", "single_pass") and not eps:
        tokens = np.moveaxis(out["logits"], 0, -1).reshape(-1, config.num_streams, config.num_streams)
        H_res = np.moveaxis(out["dense"][2], (0, 1), (-2, -1)).reshape(tokens.shape)
        assert_close(H_res, [oracles.sinkhorn(token, config.t_max) for token in tokens], what="H_res of these logits")


@pytest.mark.parametrize("spec", SPECS)
def test_static_parameters_are_those_that_the_streams_are_not_multiplied_with(spec):
    """They take no weight decay, which would close gates and fade streams."""
    link, *_, out = evaluated(spec)
    names = {path[-1].key for path, _ in jax.tree_util.tree_leaves_with_path((out["params"], out["ends"]))}
    assert names - set(link.static_params) == names & MULTIPLIED


@pytest.mark.parametrize("spec", ["mhc:exit=sum:t_max=2", "hc:exit=mean", "single_pass:t_max=2", *SPECS])
def test_streams_leave_as_the_exit_says(spec):
    """The exits sum, mean and last_read against NumPy; other tests hold heads and gates."""
    link, *_, out = evaluated(spec)
    streams = np.asarray(link.flat(out["written"]), np.float64).reshape(B, T, -1, C)
    if link.config.exit == "last_read":
        assert_close(out["collapsed"], np.einsum("nbt,btnc->btc", np.asarray(out["c"].next_pre, np.float64), streams))
    elif link.config.exit in ("sum", "mean"):
        assert_close(out["collapsed"], getattr(streams, link.config.exit)(2))


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
    assert_close(value2, value, ANOTHER_PROGRAM)
    of, of2 = ({path_of(path): g for path, g in jax.tree_util.tree_leaves_with_path(tree)} for tree in (grads, grads2))
    assert of.keys() == of2.keys()
    terms = cancelling(of)
    for path, g in of.items():
        assert_close(of2[path], g, WHOLE_GRADIENT, path, terms[path])


PRE_NORM = [
    *("hc", "mhc", "mhc:init=zeros:t_max=2", "mhc:init=hc:t_max=2:exit=head", "attnres_block", "mhc_lite:init=zeros"),
    *(
        "mhc:init=residual:num_streams=1:t_max=2",
        "identity:num_streams=2",
        "kromhc",
        "circulant",
        "single_pass:t_max=2",
    ),
    *("go_mhc", "lanes", "delta_attnres", "mudd", "mudd:norms=False"),
]
REST = [
    *(f"{spec}:num_streams={n}" for spec in ("hc", "mhc", "mhc:init=residual") for n in (1, 2, 4, 8)),
    *("hc:dynamic=False", "mhc:exit=head", "mhc:init=hc", "mhc:init=zeros", "scalar_gated", "identity", "mhc_lite"),
    *("identity:num_streams=1", "identity:init=paper", "single_pass", "single_pass:num_streams=1"),
    *("identity_mix", "identity_mix:init=zeros:t_max=2", "go_mhc:num_streams=3:s=1:init=hc", "lanes:exit=head"),
    *("mhc:write_rank=2:t_max=2", "mhc:write_rank=4:t_max=2:init=hc:exit=head"),
    *("attnres_block:block_size=1:heads=4", "delta_attnres:block_size=1", "mudd:block_size=1"),
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


BROKEN = {"mhc:t_max=2:init=home": 1e-2, "gated": 1e-4, "identity:init=home": 1e-4}
LIKE_IDENTITY = {
    f"{kind}:init=home": 1e-4 for kind in ("mhc_lite", "kromhc", "circulant", "single_pass", "identity_mix", "go_mhc")
}


@pytest.mark.parametrize(("spec", "least"), thin([*(BROKEN | LIKE_IDENTITY).items()], lambda case: case[0] in BROKEN))
def test_step_zero_with_broken_symmetry_is_not_pre_norm(spec, least):
    """Under `home`, and with the random gates of `gated`, streams differ from the start."""
    assert float(np.abs(logits_of(spec)[0] - logits_of("residual")[0]).max()) > least


@pytest.mark.full
def test_step_zero_of_diagonal_is_near_pre_norm():
    """Each of six sub-layers keeps 0.99966 of the streams, and the logits move by 1e-3 of the largest, which is 4.6."""
    pre_norm = logits_of("residual")[0]
    moved = np.abs(logits_of("diagonal")[0] - pre_norm).max()
    np.testing.assert_allclose(moved, 4.38e-3, rtol=0.01)


@pytest.mark.parametrize(
    ("spec", "branch", "name", "home"),
    [
        ("hc", "attention", "A_m", [0, 2, 0]),  # sub-layers 1, 3, 5 with 4 streams
        ("hc", "mlp", "A_m", [1, 3, 1]),
        ("single_pass:t_max=2", "mlp", "bias", [2, 0, 2]),  # sub-layers 2, 4, 6 predict the reads of 3, 5, 7
    ],
)
def test_initialisers_that_depend_on_the_layer_are_scanned(spec, branch, name, home):
    layers = logits_of(spec)[1]["layers"]
    np.testing.assert_array_equal(layers[f"{branch}_connection"][name][:, :4].argmax(-1), home)


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


SENTENCE = jnp.arange(12)[None]
"""A sequence without repetitions, so that each position has another embedding row."""
EVERY = [f"{kind}:t_max=2" if kind in ("mhc", "single_pass", "identity_mix") else kind for kind in connections.KINDS]
ALIKE = ("identity", "mhc_lite", "kromhc", "circulant", "go_mhc", "diagonal", "identity_mix")
"""Kinds with much code in common: in the fast suite `identity` stands for the others."""
DECODERS = thin(EVERY, lambda spec: spec.split(":")[0] not in (*ALIKE[1:], "residual", "scalar_gated", "lanes"))


@functools.cache
def program(spec):
    """The compiled function from parameters to (gradient of the logits of position 5, (logits, diagnostics))."""

    def loss(params):
        logits, collected = Decoder(decoder_of(spec)).apply({"params": params}, SENTENCE, 5)
        return (logits[0, 5] ** 2).sum(), (logits, collected)

    return jax.jit(jax.grad(loss, has_aux=True))


@functools.cache
def run(spec):
    """Gradient and diagnostics at randomly moved parameters."""
    gradient, (_, collected) = program(spec)(randomized(logits_of(spec)[1], spread=0.1))
    return gradient, collected


@pytest.mark.parametrize("spec", DECODERS)
def test_no_logit_depends_on_a_later_token(spec):
    """The gradient of position t with respect to embeddings after t is exactly zero."""
    gradient, _ = run(spec)
    per_token = np.abs(gradient["embedding"]).max(-1)
    assert (per_token[:6] > 0).all(), "position 5 sees tokens 0 to 5"
    np.testing.assert_array_equal(per_token[6:12], 0)


@pytest.mark.parametrize("spec", DECODERS)
def test_every_kind_gives_the_diagnostics(spec):
    _, collected = run(spec)
    config = connections.parse(spec)
    n = config.num_streams
    assert collected["res"].shape == (6, 5, n, n)
    record = summarize(collected)
    assert record["stream_rms"].shape == (6, n)
    assert all(np.isfinite(v).all() for v in record.values())
    if config.kind in (*ALIKE[:-2], "lanes", "gated", "attnres_block", "delta_attnres"):
        np.testing.assert_allclose(record["composite_forward"], 1, atol=1e-5)
        np.testing.assert_allclose(record["composite_backward"], 1, atol=1e-5)


def test_h_res_is_applied_and_streams_persist():
    """Two faults would silently void a comparison: an H_res that is made and not used, and streams collapsed in every block."""
    spec = "mhc:init=home:t_max=2"
    params = randomized(logits_of(spec)[1])
    link = params["layers"]["attention_connection"]
    res = np.random.default_rng(1).normal(size=16).astype(np.float32)
    moved = {**link, "bias": link["bias"].at[1, 8:].set(res)}  # H_res of block 1 alone
    _, (base, diagnostics) = program(spec)(params)
    _, (changed, _) = program(spec)({**params, "layers": {**params["layers"], "attention_connection": moved}})
    assert float(np.abs(changed - base).max()) > 1e-3
    assert diagnostics["stream_rms"].shape == (6, 4)
    assert float(diagnostics["stream_rms"].std(-1).max()) > 1e-2, "streams differ between blocks"


@pytest.mark.parametrize("spec", ["mhc:init=home:t_max=2", "mhc:entry=scaled:disable=pre+post:t_max=2"])
def test_step_zero_gradient_of_h_res_logits_is_alive_once_streams_differ(spec):
    """Streams differ because of where branches write (`home`), or because of the scaled entry, whose scales learn too."""
    gradient, _ = program(spec)(logits_of(spec)[1])
    bias = gradient["layers"]["mlp_connection"]["bias"][:, -16:]
    assert float(np.abs(bias).max()) > 1e-6
    if "scaled" in spec:
        assert float(np.abs(gradient["ends"]["entry_scale"]).max()) > 0
