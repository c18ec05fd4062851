"""What `connect` and `Wiring` refuse in a sentence: blocks, input, parameters of another connection."""

import functools

import equinox as eqx
import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import jaxtyping
import pytest
from flax import nnx
from support.tolerances import assert_close

from mhc_jax import Wiring, connect
from mhc_jax.connections import KINDS, parse
from mhc_jax.errors import InputError

BRANCHES = [jnp.tanh, jnp.sin, jnp.cos]


@pytest.fixture
def x():
    return jax.random.normal(jax.random.key(1), (2, 5, 16))


class LinenBlock(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(x.shape[-1])(x)


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
ONE_STREAM |= {"go_mhc": "2 or more", "identity_mix": "2 or more", "lanes": "use 2, or"}


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
