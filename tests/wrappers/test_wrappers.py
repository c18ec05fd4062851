"""Connections around other people's blocks: the page's examples with every kind, equal numbers to the decoder, refusals."""

import functools
import os
import re
import subprocess
import sys

import equinox as eqx
import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from flax import nnx
from support.thinned import thin
from support.tiny_runs import ROOT
from support.tolerances import assert_close

import mhc_jax
from mhc_jax import Wiring, connect
from mhc_jax import model as models
from mhc_jax.config import ModelConfig
from mhc_jax.connections import KINDS, parse
from mhc_jax.diagnostics import summarize
from mhc_jax.errors import InputError

PAGE = ROOT / "docs" / "your_model.md"
EXAMPLES = dict(re.findall(r"^## (.*?)\n.*?```python\n(.*?)```", PAGE.read_text(), re.DOTALL | re.MULTILINE))
TRAINED = ["Flax Linen", "Flax NNX", "Images, inside a larger module", "Bare JAX", "Equinox"]
BRANCHES = [jnp.tanh, jnp.sin, jnp.cos]


@pytest.fixture
def x():
    return jax.random.normal(jax.random.key(1), (2, 5, 16))


@pytest.fixture(autouse=True)
def as_users_have_it():
    """The examples are those of users, whose arrays may be promoted in rank."""
    with jax.numpy_rank_promotion("allow"):
        yield


CASES = [(name, kind) for name in TRAINED for kind in KINDS]
QUICK = [("Flax Linen", "mhc"), ("Flax NNX", "attnres_block"), ("Bare JAX", "hc"), ("Equinox", "hc")]


@pytest.mark.parametrize(("name", "kind"), thin(CASES, QUICK.__contains__))
def test_examples_of_the_page_train_every_kind(name, kind):
    code = EXAMPLES[name]
    assert len(list(filter(None, code.splitlines()))) <= 25
    values = {}
    exec(code.replace("mhc:num_streams=4", kind).replace("range(20)", "range(2)"), values)
    first = float(values["loss"])
    again = {}
    exec(code.replace("mhc:num_streams=4", kind).replace("range(20)", "range(12)"), again)
    assert float(again["loss"]) < first


def test_a_scan_over_depth_is_the_list_of_branches(x):
    values = {}
    exec(EXAMPLES["Your own loop, or a scan over depth"], values)
    wiring, params, weights = values["wiring"], values["params"], values["weights"]
    branches = [lambda h, W=W: jnp.tanh(h) @ W for W in weights]
    assert_close(values["y"], wiring.apply(params, branches, values["x"]))
    gains = {}
    exec(EXAMPLES["Gains and streams"], gains)
    assert gains["gains"].shape == (3,)


class Body(eqx.Module):
    module: nn.Module = eqx.field(static=True)
    params: dict

    def __call__(self, h):
        return self.module.apply({"params": self.params}, h)[0]


class Held(eqx.Module):
    wiring: Wiring = eqx.field(static=True)
    connection: dict
    blocks: list

    def __call__(self, x):
        return self.wiring.apply(self.connection, self.blocks, x)


@pytest.mark.parametrize("spec", thin(list(KINDS), ("mhc", "attnres_block", "single_pass").__contains__))
def test_it_is_the_decoder_at_the_same_parameters(spec):
    """Our decoder's own branches under `Wiring`, as functions and in an Equinox module, between its embedding and its logits."""
    config = ModelConfig(
        vocab_size=11, width=16, num_layers=3, num_heads=2, num_kv_heads=2, mlp_width=32, connection=parse(spec)
    )
    decoder, tokens = models.Decoder(config), jnp.arange(10).reshape(2, 5) % 11
    params = decoder.init(jax.random.key(0), tokens)["params"]
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(2), len(leaves))
    params = structure.unflatten([a + 0.1 * jax.random.normal(k, a.shape) for a, k in zip(leaves, keys, strict=True)])
    expected, _ = decoder.apply({"params": params}, tokens)

    wiring, inside, own = Wiring(spec, 16, 6), params["layers"], []
    branches, bodies = [], []
    for layer in range(3):
        of_layer = jax.tree.map(lambda a, layer=layer: a[layer], inside)
        for name, branch in models.branches(config, dense=True).items():
            own.append(of_layer.get(f"{name}_connection", {}))
            unbound = branch.clone(parent=None, name=None)
            branches.append(lambda h, b=unbound, p=of_layer[name]: b.apply({"params": p}, h)[0])
            bodies.append((unbound, of_layer[name]))
    given = {"ends": params.get("ends", {}), "branches": own}
    x = wiring.apply(given, branches, params["embedding"][tokens])
    held = Held(wiring, given, [Body(b, p) for b, p in bodies])
    assert_close(eqx.filter_jit(held)(params["embedding"][tokens]), x)
    x = models.RMSNorm(config.norm_eps).apply({"params": params["final_norm"]}, x)
    assert_close(x @ params["unembedding"], expected, 1e-6)


def test_transformations(x):
    wiring = Wiring("mhc:num_streams=2", 16, 3)
    params = wiring.init(jax.random.key(0))

    def run(x, params=params):
        return wiring.apply(params, BRANCHES, x)

    plain = run(x)
    assert_close(jax.jit(run)(x), plain)
    assert_close(jax.vmap(run)(x[:, None])[:, 0], plain)
    assert_close(run(x[0]), plain[0])
    assert_close(run(x[0, 0]), plain[0, 0])
    image = x.reshape(2, 5, 2, 2, 4)[..., :4].reshape(2, 5, 2, 8)
    assert Wiring("hc", 8, 3).apply(Wiring("hc", 8, 3).init(jax.random.key(0)), BRANCHES, image).shape == image.shape
    gradient = jax.grad(lambda p: run(x, p).sum())
    jax.tree.map(assert_close, jax.grad(jax.checkpoint(lambda p: run(x, p).sum()))(params), gradient(params))
    mesh = jax.make_mesh((2,), ("data",))
    shared = jax.device_put(x, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data")))
    assert_close(jax.jit(run)(shared), plain)


def test_half_precision_in_an_own_loop(x):
    """Branches with float32 weights return float32; the state keeps the dtype of x, so that a scan has one carry type."""
    wiring, W = Wiring("mhc:num_streams=2", 16, 3), jnp.eye(16)[None].repeat(3, 0)
    params, half = wiring.init(jax.random.key(0), stacked=True), x.astype(jnp.bfloat16)

    def layer(state, own):
        state, h = wiring.boundary(own[1], state)
        return wiring.put(state, h @ own[0]), None

    state, _ = jax.lax.scan(layer, wiring.start(params, half), (W, params["branches"]))
    y = wiring.finish(params, state)
    assert y.dtype == jnp.bfloat16
    assert_close(y, wiring.apply(params, [lambda h: h @ jnp.eye(16)] * 3, half), 2e-2)
    assert {a.dtype for a in jax.tree.leaves(params)} == {jnp.dtype("float32")}


def test_one_stream_adds_no_work(x):
    wiring = Wiring("residual", 16, 3)
    assert jax.tree.leaves(wiring.init(jax.random.key(0))) == []

    def plain(x):
        for branch in BRANCHES:
            x = x + branch(x)
        return x

    ours = jax.jit(lambda x: wiring.apply(wiring.init(jax.random.key(0)), BRANCHES, x)).lower(x).compile()
    costs = [program.cost_analysis() for program in (ours, jax.jit(plain).lower(x).compile())]
    assert [cost["flops"] for cost in costs] == [costs[1]["flops"]] * 2
    assert costs[0]["bytes accessed"] == costs[1]["bytes accessed"]
    assert_close(ours(x), plain(x))


def test_diagnostics_are_those_of_the_coefficients(x):
    model = connect("hc:num_streams=3:dynamic=False", BRANCHES)
    params = model.init(jax.random.key(0), x)
    params = jax.tree.map(lambda a: a + 0.3, params)
    out, collected = model.apply(params, x, sample=4)
    assert_close(out, model.apply(params, x))
    found, expected = summarize(collected), np.eye(3)
    for branch in range(3):
        own = params["params"]["connection"][f"branches_{branch}"]
        expected = np.asarray(own["A_r"], np.float64) @ expected
    assert found["composite_forward"][-1] == pytest.approx(np.abs(expected.sum(1)).max(), rel=1e-5)


def test_diagnostics_of_an_image_are_those_of_its_pixels(x):
    """A block that mixes neighbours sees the image; the connection and its diagnostics see a list of pixels."""
    values = {}
    exec(EXAMPLES["Images, inside a larger module"].partition("class Classifier")[0], values)
    model = connect("mhc:num_streams=2:init=home", [values["Spatial"](), jnp.tanh])
    image = jax.random.normal(jax.random.key(2), (2, 3, 4, 8))
    params = jax.tree.map(lambda a: a + 0.1, model.init(jax.random.key(0), image))
    out, collected = jax.jit(functools.partial(model.apply, sample=12))(params, image)
    assert out.shape == image.shape
    own, wiring = params["params"], Wiring(model.spec, 8, 2)

    def mixed(pixels):
        return values["Spatial"]().apply({"params": own["blocks_0"]}, pixels.reshape(image.shape)).reshape(pixels.shape)

    given = {"ends": {}, "branches": [own["connection"][f"branches_{i}"] for i in range(2)]}
    flat, expected = wiring.apply(given, [mixed, jnp.tanh], image.reshape(2, 12, 8), sample=12)
    assert_close(out.reshape(2, 12, 8), flat)
    jax.tree.map(assert_close, collected, expected)
    assert summarize(collected)["h_res"].shape == (2, 2, 2)
    assert not np.allclose(collected["pre"][:, 0], collected["pre"][:, 5])


X64 = """
import jax, jax.numpy as jnp
from mhc_jax import Wiring
for spec in ("hc", "mhc"):
    wiring, x = Wiring(spec, 8, 2), jax.random.normal(jax.random.key(1), (2, 3, 8), "float64")
    params = wiring.init(jax.random.key(0), stacked=True)
    def layer(state, own):
        state, h = wiring.boundary(own, state)
        return wiring.put(state, jnp.tanh(h)), None
    def run(params):
        state, _ = jax.lax.scan(layer, wiring.start(params, x), params["branches"])
        y = wiring.finish(params, state)
        return y.sum(), y
    gradient, y = jax.jit(jax.grad(run, has_aux=True))(params)
    assert y.dtype == x.dtype and jnp.allclose(wiring.apply(params, [jnp.tanh] * 2, x), y, 1e-5, 1e-6), spec
    assert {a.dtype.name for a in jax.tree.leaves([params, gradient])} == {"float32"}, spec
"""


def test_x64_mode():
    environment = os.environ | {"JAX_ENABLE_X64": "1"}
    done = subprocess.run([sys.executable, "-c", X64], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


class LinenBlock(nn.Module):
    @nn.compact
    def __call__(self, x, scale=1.0):
        return scale * nn.Dense(x.shape[-1])(x)


def test_parameters_are_where_users_of_the_framework_expect_them(x):
    model = connect("mhc", [LinenBlock(), LinenBlock()])
    params = model.init(jax.random.key(0), x)["params"]
    assert set(params) == {"blocks_0", "blocks_1", "connection"}
    assert set(params["connection"]) == {"ends", "branches_0", "branches_1"}
    assert set(params["connection"]["branches_0"]) == {"phi", "alpha", "bias"}
    scaled = model.apply({"params": params}, x, 2.0)
    assert not jnp.allclose(scaled, model.apply({"params": params}, x))
    assert_close(model.apply({"params": params}, x, scale=2.0), scaled)
    assert hash(model) == hash(connect("mhc", [LinenBlock(), LinenBlock()]))
    rngs = nnx.Rngs(0)
    module = connect("mhc", [nnx.Linear(16, 16, rngs=rngs) for _ in range(2)], width=16, rngs=rngs)
    state = nnx.to_pure_dict(nnx.state(module, nnx.Param))
    assert set(state) == {"blocks", "connection"}
    graph, values = nnx.split(module)
    assert_close(nnx.merge(graph, values)(x), module(x))


def test_a_block_may_use_a_name_that_is_assigned_later(x):
    def block(h):
        return later(h)

    model = connect("residual", [block])
    later = jnp.tanh
    assert_close(model.apply({}, x), x + jnp.tanh(x))


@pytest.fixture
def unchecked():
    """Annotations are not checked, as for a user."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def refused(function):
    with pytest.raises(InputError) as error:
        function()
    return str(error.value)


@pytest.mark.usefixtures("unchecked")
def test_refused_blocks(x):
    rngs = nnx.Rngs(0)
    linear = nnx.Linear(16, 16, rngs=rngs)
    assert "Did you mean 'mhc'?" in refused(lambda: connect("mch", BRANCHES))
    assert "connection is of type ResidualConfig" in refused(lambda: connect(parse("residual"), BRANCHES))
    assert refused(lambda: connect("mhc", [])) == "blocks is empty; give at least one block."
    for blocks in (LinenBlock(), nn.Sequential([LinenBlock()]), nnx.Sequential(linear), iter(BRANCHES), "mhc", None):
        assert "; give a list of blocks." in refused(lambda blocks=blocks: connect("mhc", blocks))
    assert refused(lambda: connect("mhc", [jnp.tanh, 3])) == "blocks[1] is of type int; give functions or Flax modules."
    assert "blocks[0] is of type list;" in refused(lambda: connect("mhc", [[LinenBlock()]]))
    assert "the class LinenBlock; give an instance" in refused(lambda: connect("mhc", [LinenBlock]))
    assert "holds arrays, which would not be trained; use `Wiring`" in refused(
        lambda: connect("mhc", [eqx.nn.Linear(16, 16, key=jax.random.key(0))])
    )
    for block in (lambda h, sample: h, LinenSample(), NNXSample()):
        assert "has an argument `sample`" in refused(lambda block=block: connect("mhc", [block], width=16, rngs=rngs))
    assert "NNX modules; give width and rngs" in refused(lambda: connect("mhc", [linear]))
    assert "give both width and rngs" in refused(lambda: connect("mhc", [linear], width=16))
    assert "rngs is of type int; give nnx.Rngs(0)" in refused(lambda: connect("mhc", [linear], width=16, rngs=0))
    assert "width is '16'; it must be" in refused(lambda: connect("mhc", [linear], width="16", rngs=rngs))
    assert "A block is a Linen module" in refused(lambda: connect("mhc", [LinenBlock()], width=16, rngs=rngs))
    model = connect("mhc", [nn.Sequential([LinenBlock(), nn.gelu]), nn.Dense(16)])  # a sequence is one block
    assert model.apply(model.init(jax.random.key(0), x), x).shape == x.shape


class LinenSample(nn.Module):
    def __call__(self, h, sample=0):
        return h


class NNXSample(nnx.Module):
    def __call__(self, h, sample=0):
        return h


class Holder:
    def __init__(self, **held):
        self.__dict__.update(held)

    def method(self, h):
        return self.inner(h)

    def __call__(self, h):
        return self.inner(h)

    def outer(self, h):
        return self.size * h


def test_functions_around_nnx_modules_are_refused():
    linear = nnx.Linear(16, 16, rngs=nnx.Rngs(0))
    holder, pair, named, weight = Holder(inner=linear, size=2.0), [linear, jnp.tanh], {"in": linear}, nnx.Param(1.0)

    def around(h):
        return linear(h)

    reaching = [linear.__call__, around, functools.partial(lambda m, h: m(h), linear), lambda h, m=linear: m(h)]
    reaching += [lambda h: pair[0](h), lambda h: named["in"](h), lambda h: around(h), jax.jit(around)]
    reaching += [holder, holder.method, lambda h: holder.inner(h), lambda h: weight * h]
    for options in ({}, {"width": 16, "rngs": nnx.Rngs(0)}):
        for block in reaching:
            assert "uses an NNX module without being one" in refused(
                lambda b=block, o=options: connect("mhc", [b], **o)
            )
    for block in (holder.outer, lambda h: holder.size * h, jax.nn.gelu, nnx.gelu, jax.jit(jnp.tanh)):
        connect("mhc", [block])


ONE_STREAM = {"mhc_lite": "2 to 5", "kromhc": "use 2, or", "circulant": "2 or more", "gated": "2 or more"}


def test_one_stream_is_refused_in_a_sentence_or_works(x):
    for kind in KINDS:
        spec = f"{kind}:num_streams=1"
        if kind in ONE_STREAM:
            assert ONE_STREAM[kind] in refused(lambda spec=spec: connect(spec, BRANCHES))
        else:
            wiring = Wiring(spec, 16, 3)
            params = jax.eval_shape(wiring.init, jax.random.key(0))
            assert jax.eval_shape(lambda p, w=wiring: w.apply(p, BRANCHES, x), params).shape == x.shape


@pytest.mark.usefixtures("unchecked")
def test_refused_input(x):
    wiring = Wiring("mhc", 16, 2)
    params, given = wiring.init(jax.random.key(0)), BRANCHES[:2]
    model = connect("mhc", given)

    def ours(x, branches=given, **options):
        return refused(lambda: wiring.apply(params, branches, x, **options))

    def theirs(x):
        return refused(lambda: model.init(jax.random.key(0), x))

    for shape in ((0, 5, 16), (2, 0, 16), (0, 16), (2, 0, 3, 16)):
        assert f"has the shape {shape}; every axis" in ours(jnp.zeros(shape))
        assert f"has the shape {shape}; every axis" in theirs(jnp.zeros(shape))
    assert "width is 0" in theirs(jnp.zeros((2, 0)))
    assert "has the dtype int32; give floating-point channels" in ours(x.astype(int))
    assert "has the dtype complex64" in theirs(x.astype(complex))
    assert "its last axis must be 16" in ours(x[..., :4])
    assert "its last axis must be 16" in ours(jnp.float32(1))
    assert "give an array of shape [..., 16]" in ours([1.0] * 16)
    for scalar in (jnp.float32(1), 1.0):
        assert "give an array [..., C], channels last" in theirs(scalar)
    for sample in (-1, 2.0, True, x):
        assert "it is the number of tokens for diagnostics" in ours(x, sample=sample)
    assert "There are 3 branches, not 2" in ours(x, BRANCHES)
    assert ours(x, [jnp.tanh, lambda h: h[..., :8]]) == (
        "branches[1] returns an array of dtype float32 and shape (2, 5, 8); it must return one floating-point array of the shape "
        "of its input, (2, 5, 16)."
    )
    for wrong in (lambda h: (h, h), lambda h: None, lambda h: h > 0, lambda h: h.astype(int), lambda h: h * 1j):
        said = (
            ours(x, [wrong, jnp.tanh]),
            refused(lambda wrong=wrong: connect("mhc", [wrong]).init(jax.random.key(0), x)),
        )
        assert said[0].startswith("branches[0] returns ")
        assert said[1] == said[0].replace("branches", "blocks")
    state, _ = wiring.boundary(params["branches"][0], wiring.start(params, x))
    assert refused(lambda: wiring.put(state, x > 0)).startswith("A branch returns an array of dtype bool")
    for width in (0, 16.0, "16", None):
        assert f"width is {width!r}; it must be a whole number" in refused(lambda width=width: Wiring("mhc", width, 2))
    assert "num_branches is 0" in refused(lambda: Wiring("mhc", 16, 0))


@pytest.mark.usefixtures("unchecked")
def test_refused_parameters(x):
    key, two = jax.random.key(0), BRANCHES[:2]
    wiring, model = Wiring("mhc", 16, 2), connect("mhc", two)

    def ours(params):
        return refused(lambda: wiring.apply(params, two, x))

    def theirs(params, spec="mhc"):
        return refused(lambda: connect(spec, two).apply(params, x))

    for stacked in (False, True):
        assert "are those of 3 branches, not of 2" in ours(Wiring("mhc", 16, 3).init(key, stacked))
        assert ours(Wiring("mhc:num_streams=2", 16, 2).init(key, stacked)) == (
            "The parameters of the connection at a branch are alpha (3,), bias (8,), phi (32, 8); `mhc` of width 16 has "
            "alpha (3,), bias (24,), phi (64, 24), and `init` makes them."
        )
        for other in (Wiring("hc", 16, 2), Wiring("mhc", 8, 2), Wiring("residual", 16, 2)):
            assert "`mhc` of width 16 has alpha" in ours(other.init(key, stacked))
    assert "at entry and exit are head_alpha" in ours(Wiring("mhc:exit=head", 16, 2).init(key))
    for params in ({}, None, [], {"branches": wiring.init(key)["branches"]}):
        assert "give the dict that `init` made" in ours(params)
    assert "are those of 3 blocks, not of 2" in theirs(connect("mhc", BRANCHES).init(key, x))
    params = model.init(key, x)
    assert "at a block are alpha (3,)" in theirs(params, "mhc:num_streams=2")
    assert "`residual` of width 16 has none" in theirs(params, "residual")
    assert "at a block are none" in theirs({"params": {}})
    assert_close(model.apply(flax.core.freeze(params), x), model.apply(params, x))


def test_the_top_level_is_light_and_has_a_version():
    assert re.fullmatch(r"\d+\.\d+\.\d+", mhc_jax.__version__)
    assert f'version = "{mhc_jax.__version__}"' in (ROOT / "pyproject.toml").read_text()
    with pytest.raises(AttributeError, match="no attribute 'conect'"):
        _ = mhc_jax.conect
