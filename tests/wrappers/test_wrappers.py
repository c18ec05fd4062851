"""Connections around other people's blocks: the page's examples with every kind, equal numbers to the decoder."""

import functools
import os
import re
import subprocess
import sys

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from support.thinned import thin
from support.tiny_runs import ROOT
from support.tolerances import ANOTHER_PROGRAM, BF16_RELATIVE, assert_close

import mhc_jax
from mhc_jax import Wiring, connect
from mhc_jax import model as models
from mhc_jax.config import ModelConfig
from mhc_jax.connections import KINDS, parse
from mhc_jax.diagnostics import summarize

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


WHOLE = ("mhc", "single_pass", "attnres_block")
"""Kinds, one of each way to hold the state, that are tried with every framework.  Each other kind is tried with one of them."""
CASES = [(name, kind) for name in TRAINED for kind in WHOLE]
CASES += [(TRAINED[k % len(TRAINED)], kind) for k, kind in enumerate(KINDS) if kind not in WHOLE]
QUICK = [("Flax Linen", "mhc"), ("Flax NNX", "attnres_block"), ("Bare JAX", "scalar_gated"), ("Equinox", "mhc")]


@pytest.mark.parametrize(("name", "kind"), thin(CASES, QUICK.__contains__))
def test_examples_of_the_page_train_every_kind(name, kind):
    code, losses = EXAMPLES[name], []
    assert len(list(filter(None, code.splitlines()))) <= 25

    def steps():
        for _ in range(12):
            yield
            losses.append(float(values["loss"]))

    values = {"steps": steps}
    exec(code.replace("mhc:num_streams=4", kind).replace("range(20)", "steps()"), values)
    assert losses[11] < losses[1]


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
    assert_close(x @ params["unembedding"], expected, ANOTHER_PROGRAM)


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
    expected = wiring.apply(params, [lambda h: h @ jnp.eye(16)] * 3, half)
    assert_close(y, expected, 4 * BF16_RELATIVE)  # two units in the last place
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


def test_the_top_level_is_light_and_has_a_version():
    assert re.fullmatch(r"\d+\.\d+\.\d+", mhc_jax.__version__)
    assert f'version = "{mhc_jax.__version__}"' in (ROOT / "pyproject.toml").read_text()
    with pytest.raises(AttributeError, match="no attribute 'conect'"):
        _ = mhc_jax.conect
