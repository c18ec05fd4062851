"""The parts of a pipelined step: the split of a backward pass, weights that are cast once, and packed boundary tensors."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_name
from support.in_process import run_here
from support.meshes import tiny
from support.thinned import thin

from mhc_jax import connections
from mhc_jax.config import PipelineConfig
from mhc_jax.connections.parameter_paths import path_of
from mhc_jax.cost.hlo import Program, flops
from mhc_jax.errors import InputError
from mhc_jax.model import Decoder
from mhc_jax.pipeline.casts import cast, computed_in
from mhc_jax.pipeline.packing import CarryPacker
from mhc_jax.pipeline.split import EXACT, split
from mhc_jax.pipeline.stage import Stage, Work
from mhc_jax.planning import pipeline_simulations
from mhc_jax.planning.compile_table import pipelines
from mhc_jax.planning.slices import get_slice
from mhc_jax.planning.stage_costs import from_compiled
from mhc_jax.planning.step_estimate import estimate

SIZES = {"vocab_size": 40, "num_layers": 4, "num_heads": 2, "mlp_width": 64}
TOKENS = jnp.zeros((2, 16), jnp.int32)


def model_of(kind, **changes):
    return tiny(kind, **SIZES | changes).model


def params_of(model):
    """(random parameters outside the stacked blocks, those of the stacked blocks), as NumPy arrays."""
    r = np.random.default_rng(0)
    params = jax.eval_shape(Decoder(model).init, jax.random.key(0), TOKENS)["params"]
    params = jax.tree.map(lambda a: (0.3 * r.normal(size=a.shape)).astype(a.dtype), params)
    return params, params.pop("layers")


def leaves_of(*trees):
    return zip(*map(jax.tree.leaves, trees), strict=True)


def stage_of(model):
    """(a `Stage` of a model of two stages, (parameters of its blocks, its number, no documents))."""
    params, layers = params_of(model)
    layers = jax.tree.map(lambda a: jnp.asarray(a.reshape(2, 2, *a.shape[1:])), layers)
    stage = Stage(model, 2, jax.tree.map(jnp.asarray, params), TOKENS, layers, halves=True)
    return stage, (jax.tree.map(lambda a: a[0], stage.layers), jnp.int32(1), None)


def multiplied(function, *arguments):
    """(results of a function, FLOPs of its matrix products)."""
    program = jax.jit(function).lower(*arguments).compile()
    return program(*arguments), flops(Program(program.as_text()), lambda one: 0.0)


MHC = "mhc:t_max=2"
EVERY = [(kind, remat) for kind in ("residual", MHC) for remat in ("none", "full", "connection")]
FAST = (("residual", "full"), (MHC, "connection"))


@pytest.mark.parametrize(("kind", "remat"), thin(EVERY, FAST.__contains__))
def test_the_halves_of_a_backward_pass_do_its_work_once(kind, remat):
    """The two halves give the gradients of the whole, and together have as many FLOPs."""
    stage, free = stage_of(model_of(kind, remat=remat))
    r = np.random.default_rng(1)
    random = functools.partial(jax.tree.map, lambda a: jnp.asarray(r.normal(size=a.shape), a.dtype))

    def kept(layers, x, at):
        batch = {"inputs": TOKENS, "targets": TOKENS}
        work = Work(False, layers, batch, at)
        return stage.forward(work, lambda: x, stage.outer, {}, lambda gradients, g: gradients)[0]["activations"]

    held = jax.jit(kept)(free[0], random(stage.packer.like), jnp.int32(0))
    given, halves = (held, random(stage.packer.tree)), stage.halves[False]
    whole, all_of_it = multiplied(lambda f, g: stage.pulled(False, f, g), free, given)
    (now, between), first = multiplied(halves.now, free, given)
    later, second = multiplied(halves.later, free, given, between)
    for name, a, b in zip(("input", "weights"), (now, later), whole, strict=True):
        # Some gradients cancel to nothing: one scale for all.
        scale = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(b))
        jax.tree.map(lambda x, y, s=scale, n=name: np.testing.assert_allclose(x, y, atol=1e-6 * s, err_msg=n), a, b)
    assert first + second == pytest.approx(all_of_it, rel=0.02)
    assert second > 0.25 * all_of_it, "W is a good part of it"


def test_what_lies_between_is_little():
    """Operations on weights alone run twice, casts are not kept, and of a shared chain the smallest value is kept."""

    def function(W, x):
        y = jnp.dot(x.astype(jnp.float32), W)  # wanted, and needed later
        wide = jnp.broadcast_to(y[:, None], (4, 8, 3))
        return (wide * 2).sum(), jax.jit(lambda a: a + jnp.sin(W).sum())(wide)

    W, x = jnp.ones((4, 3)), jnp.ones((4, 4), jnp.bfloat16)
    halves = split(lambda W, x: function(W, x), W, x)
    assert [a.size for a in halves.between] == [12]
    now, between = jax.jit(halves.now)(W, x)
    expected = jax.jit(function)(W, x)
    np.testing.assert_array_equal(jax.jit(halves.later)(W, x, between), expected[1])
    np.testing.assert_array_equal(now, expected[0])


def test_unrolled_loops_are_opened_and_others_are_not():
    def function(unroll, W, x):
        def turn(x, w):
            return x @ w, x.sum()

        x, sums = jax.lax.scan(turn, x, W, reverse=True, unroll=unroll)
        return x, sums * 2

    W, x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 4, 4)), jnp.float32), jnp.ones((2, 4))
    for unroll, between in ((3, [(2, 4)] * 2), (1, [(3,)])):
        halves = split(functools.partial(function, unroll), W, x)
        now, kept = halves.now(W, x)
        assert sorted(a.shape for a in kept) == between
        np.testing.assert_allclose(now, function(unroll, W, x)[0], rtol=1e-6)
        np.testing.assert_allclose(halves.later(W, x, kept), function(unroll, W, x)[1], rtol=1e-6)


def test_what_elementwise_operations_make_again_is_not_kept():
    """A gated feed-forward behind a norm, in bfloat16, keeps x, two numbers of its norm, and both halves of the hidden layer."""

    def function(W, x):
        scale = jax.lax.rsqrt(jnp.square(x.astype(jnp.float32)).mean(-1, keepdims=True))
        h = (x * scale).astype(jnp.bfloat16) @ W[0]
        h = checkpoint_name(jax.nn.silu(h[:, :8]) * h[:, 8:], "hidden")
        return h @ W[1]

    def whole(W, x):
        y, pull = jax.vjp(function, W, x)
        return y, jax.tree.leaves(pull)

    def backward(W, x, leaves, g):
        _, pull = jax.vjp(function, W, x)
        return jax.tree.unflatten(jax.tree.structure(pull), leaves)(g)

    r = np.random.default_rng(0)
    W = [jnp.asarray(r.normal(size=shape), jnp.bfloat16) for shape in ((4, 16), (8, 4))]
    x, g = (jnp.asarray(r.normal(size=(6, 4)), jnp.bfloat16) for _ in range(2))
    assert len(split(whole, W, x, at_once=True, recompute=EXACT).between) == 11, "products are kept"
    cut = split(whole, W, x, at_once=True)
    y, kept = cut.now(W, x)
    assert sorted(a.shape for a in kept) == [(6, 1), (6, 1), (6, 4), (6, 8), (6, 8)]
    assert all(a.dtype == jnp.bfloat16 for a in kept if a.shape != (6, 1)), "no float32 copies"
    np.testing.assert_array_equal(y, function(W, x))
    leaves, (_, own) = cut.later(W, None, kept), whole(W, x)
    pulled = (backward(W, 0 * x, each, g) for each in (leaves, own))
    for a, b in (*leaves_of(leaves, own), *leaves_of(*pulled)):
        np.testing.assert_array_equal(a, b)


CAST = [(kind, remat) for kind in ("hc", MHC) for remat in ("none", "full", "connection")]


@pytest.mark.parametrize(("kind", "remat"), thin(CAST[2:], ("hc", "connection").__eq__))
def test_weights_that_are_cast_are_cast_before_the_first_tick(kind, remat):
    """Matrices of the branches are cast; norms, the router and the connections compute in float32."""
    types = {"compute_dtype": "bfloat16", "stream_dtype": "bfloat16"}
    model = model_of(kind, remat=remat, **types, experts="4:active=2:shared=1:width=12")

    def made(params, layers):
        layers = jax.tree.map(lambda a: jnp.concatenate([a[:1], a]).reshape(2, 2, *a.shape[1:]), layers)
        stage = Stage(model, 2, params, TOKENS, layers)
        return stage.layers, stage.outer

    for path, a in jax.tree_util.tree_leaves_with_path(jax.eval_shape(made, *params_of(model))):
        name = path_of(path)
        wide = re.search("norm|router|connection|ends|embedding", name) and "unembedding" not in name
        assert a.dtype == (jnp.float32 if wide else jnp.bfloat16), name


def test_dense_blocks_may_fill_the_first_stage():
    model = model_of("residual", experts="4:active=2:shared=1:width=12:dense_layers=2")
    params, layers = params_of(model)

    @jax.jit
    def told(params, layers):
        stage = Stage(model, 2, params, TOKENS, jax.tree.map(lambda a: a[None], layers))
        carry, own = stage.enter(stage.head(stage.outer), TOKENS), jax.tree.map(lambda a: a[0], stage.layers)
        first = stage.blocks(True, own, stage.dense(stage.outer, True), carry, jnp.int32(0))
        return first[1], stage.blocks(False, own, {}, carry, jnp.int32(1))[1]

    aux, other = told(params, layers)
    assert all(a.shape == b.shape and not a.any() for a, b in leaves_of(aux, other))
    assert any(a.any() for a in jax.tree.leaves(other))


def test_a_weight_that_has_another_use_is_not_cast():
    def scanned(W, x):
        return jax.lax.scan(lambda x, W: (x @ W.astype(jnp.bfloat16), None), x, W)[0]

    def function(p, x):
        y = jax.jit(jax.checkpoint(lambda W, x: x @ W[0].astype(jnp.bfloat16)))(p["called"], x)
        y = scanned(p["scanned"], y) + p["wider"].astype(jnp.float32).sum().astype(y.dtype)
        y = y @ p["twice"].astype(y.dtype) + p["twice"].mean().astype(y.dtype)
        return y + p["given back"].astype(y.dtype)[None], p["given back"]

    shapes = {"called": (1, 4, 4), "scanned": (3, 4, 4), "twice": (4, 4), "given back": (4,)}
    params = {name: jnp.ones(shape) for name, shape in shapes.items()} | {"wider": jnp.ones(4, jnp.bfloat16)}
    params["unused"] = jnp.ones(3, jnp.int32)
    found = computed_in(function, params, jnp.ones((2, 4), jnp.bfloat16))
    changed = {name for name, dtype in found.items() if dtype != params[name].dtype}
    assert changed == {"called", "scanned"}
    assert {a.dtype.name for a in cast(params, found).values()} == {"bfloat16", "float32", "int32"}


DTYPES = [(kind, dtype) for kind in connections.KINDS for dtype in ("float32", "bfloat16")]
DTYPES += [("mhc:write_rank=2", "float32")]  # one array of its coefficients has no axes of tokens


@pytest.mark.parametrize(
    ("kind", "dtype"), thin(DTYPES, lambda case: (case[0] in ("hc", DTYPES[-1][0])) == (case[1] == "float32"))
)
def test_a_boundary_is_packed_bit_by_bit(kind, dtype):
    """With B = T = n = 4 the token axes cannot be told by their sizes."""
    stage = object.__new__(Stage)
    stage.model = model_of(kind, stream_dtype=dtype, compute_dtype=dtype)
    params = jax.tree.map(jnp.asarray, params_of(stage.model)[0])
    packer = CarryPacker(lambda tokens: stage.enter(params, tokens), jnp.zeros((4, 4), jnp.int32))
    r = np.random.default_rng(0)
    tree = jax.tree.map(lambda a: jnp.asarray(r.normal(size=a.shape), a.dtype), packer.tree)
    packed = packer.pack(tree)
    assert set(packed) == {a.dtype.name for a in jax.tree.leaves(tree)}
    assert all(a.shape[:2] == (4, 4) for a in packed.values())
    back = packer.unpack(packed)
    assert jax.tree.structure(back) == jax.tree.structure(tree)
    for a, b in leaves_of(back, tree):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)
    one = packer.unpack(jax.tree.map(lambda a: a.at[1, 2].set(0), packed))
    for (a, b), axes in zip(leaves_of(one, tree), packer.axes, strict=True):
        changed = np.argwhere(np.asarray(a) != np.asarray(b))
        assert {tuple(row[list(axes)]) for row in changed} == ({(1, 2)} if axes else set()), "one token is one row"


@pytest.mark.parametrize("kind", [*connections.KINDS, "mhc:exit=head"])
def test_the_exit_needs_streams_alone(kind):
    """Stages send no coefficients, so the loss takes zeros for them."""
    stage = object.__new__(Stage)
    stage.model = model_of(kind)
    params = jax.tree.map(jnp.asarray, params_of(stage.model)[0])
    carry = jax.eval_shape(lambda: stage._enter(params, TOKENS))
    r = np.random.default_rng(0)
    streams, c, _ = jax.tree.map(lambda a: jnp.asarray(r.normal(size=a.shape), a.dtype), carry)
    ends, zeros = stage.ends(params), jax.tree.map(jnp.zeros_like, c)
    np.testing.assert_array_equal(ends.collapse(streams, zeros), ends.collapse(streams, c))


@pytest.fixture(scope="module")
def row():
    """A step of four stages, ZB1P, eight microbatches, two copies."""
    pipeline = PipelineConfig(schedule="zb1p", overlap=True)
    config = tiny("residual", {"stage": 4, "data": 2}, 8, (32, 16), pipeline, **SIZES)
    return {**estimate(config, get_slice("cpu:8"), None), "connection": "residual"}


def test_operations_count_as_often_as_a_device_does_them(row):
    assert row["flops over model_cost"] == pytest.approx(1, rel=0.1), "no branch twice, no pass twice"
    messages, seconds = row["pipeline"]["messages"], row["seconds"]
    # x of two sequences, up and down
    assert (messages["a tick"], messages["bytes"]) == (2, 2 * 2 * 16 * 32 * 4)
    assert seconds["step"] == pytest.approx(seconds["compute"] + seconds["collectives"] + seconds["waiting"])
    assert seconds["waiting"] == row["pipeline"]["bubble"] > 0
    assert all((one["kind"], one["axes"]) != ("collective-permute", "stage") for one in row["collectives"])


def test_costs_of_a_compiled_step(row):
    found = row["pipeline"]["seconds"]
    assert found["F"][1] == found["F"][2] != found["F"][0] == pytest.approx(found["F"][1], rel=0.1), "looks tokens up"
    assert found["F"][3] > 1.05 * found["F"][1], "the loss"
    assert found["B"][1] == found["B"][2] > found["W"][1] > found["tick"] > 0
    (zb1p,), (dualpipe,) = (pipeline_simulations.schedules([name], 4, 8) for name in ("zb1p", "dualpipe"))
    (short,) = pipeline_simulations.schedules(["zb1p"], 2, 8)
    costs = from_compiled([row], zb1p, blocks=4)
    np.testing.assert_allclose(costs.F, found["F"])
    np.testing.assert_allclose(costs.B, [found["B"][1]] * 4)
    more = from_compiled([row], short, blocks=12)
    assert more.F[0] - costs.F[0] == pytest.approx(5 * (costs.F[1] - found["tick"]))
    assert from_compiled([row], dualpipe, blocks=4).send == pytest.approx(2 * costs.send), "F and B share a link"

    def with_times(**times):
        return {**row, "pipeline": {**row["pipeline"], "seconds": {**found, **times}}}

    loss = 3 * (found["F"][1] + found["B"][1] - 2 * found["tick"])  # as dear as 3 blocks
    leveled = from_compiled([with_times(F=[*found["F"][:3], found["F"][1] + loss])], zb1p, blocks=41)
    assert leveled.W[-1] == pytest.approx(8 * (found["W"][1] - found["tick"]) + found["tick"])
    once, twice = (with_times(**{kind: [times * found[kind][1]] * 4 for kind in "FBW"}) for times in (1, 1.75))
    twice["pipeline"]["blocks"] = 2
    line = from_compiled([once, twice], short, blocks=6)
    assert from_compiled([twice, once], short, blocks=6) == line
    for kind in "FBW":  # a quarter of the time of one block is that of the stage
        assert getattr(line, kind)[1] == pytest.approx((0.25 + 3 * 0.75) * found[kind][1])
    files = {
        f"{remat}.json": {"config": {"model": {"remat": remat}}, "rows": [row]} for remat in ("none", "connection")
    }
    run, other = pipeline_simulations.of_compiled([zb1p], files, 4)
    assert (run.label, other.label, other.over) == ("residual", "residual, remat connection", 0.0)
    assert run.run.makespan > 8 * (costs.F[1] + costs.B[1])
    for wrong, sentence in (
        ({"a.json": {"env": {}}}, r"a.json is not of experiments/compile\.py"),
        (dict.fromkeys(("a", "b"), files["none.json"]), "have 1, 1 blocks a stage"),
    ):
        with pytest.raises(InputError, match=sentence):
            pipeline_simulations.of_compiled([zb1p], wrong, 4)
    told = "error: --compiled and --chip cannot be given together; choose one source of costs.\n"
    assert run_here("pipeline", "--compiled=a.json", "--chip=v5p")[::2] == (2, told)
    whole = {"schedule": "1f1b", "seconds": {**found, "W": [0.0] * 4}}
    for wrong, sentence in (
        ({"connection": "mhc"}, "compile it with --config.mesh.stage=4"),
        ({"pipeline": row["pipeline"] | {"stages": 2}}, "2 stages, so none in the middle"),
        ({"pipeline": row["pipeline"] | whole}, "'1f1b' has no W of its own; compile 'zb1p' or 'dualpipe'"),
    ):
        with pytest.raises(InputError, match=sentence):
            from_compiled([wrong], zb1p, 4)
    assert "| residual | zb1p | 4 |" in "\n".join(pipelines([row]))
