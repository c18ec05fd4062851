"""DeepSeekMoE against loops in float64, its balancing, decoders with experts, and the grouped products of TPUs (interpreted)."""

import dataclasses
import functools
import shutil
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import mhc_kernels
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, PartitionSpec
from support import decoders, tiny_runs
from support.decoders import EXPERTS, MLA, TOKENS, decoder_of, drawn, started
from support.oracles import as_float64, assert_slopes
from support.oracles_moe import moe_oracle
from support.thinned import thin
from support.tolerances import ANOTHER_PROGRAM, BF16_CHAIN, FORMS_FP32, assert_close

import mhc_jax.layers.grouped_matmul as module_of_products
from mhc_jax import connections
from mhc_jax.config import MeshConfig
from mhc_jax.layers.grouped_matmul import grouped_matmul, largest, tiling, tiling_of_gradient
from mhc_jax.layers.moe import MoE, balanced_bias, route, router_health, score_entropy
from mhc_jax.loop import train
from mhc_jax.model import Decoder
from mhc_jax.parallel.sharding import make_mesh, using
from mhc_jax.train_step import init_state, make_train_step

E, K, F, C = 5, 2, 3, 6
MODEL = dataclasses.replace(decoders.MODEL, **EXPERTS)


@functools.cache
def layer_of(num_shared=2, dtype=jnp.float32):
    """The layer, and its compiled (parameters, h, w) -> (y, aux, gradients of the sum of y w)."""
    layer = MoE(
        num_experts=E,
        num_active=K,
        num_shared=num_shared,
        hidden=F,
        routed_scale=1.5,
        norm_eps=1e-20,
        output_scale=1.0,
        dtype=dtype,
    )

    def loss(p, h, w):
        y, aux = layer.apply({"params": p}, h)
        return (y * w).sum(), (y, aux)

    @jax.jit
    def run(p, h, w):
        grads, (y, aux) = jax.grad(loss, (0, 1), has_aux=True)(p, h, w)
        return y, aux, grads

    return layer, run


def normal(*shapes):
    random = np.random.default_rng(0)
    return [jnp.asarray(random.normal(size=shape), jnp.float32) for shape in shapes]


def setup(num_shared=2, bias=(0.0,) * E):
    """(parameters, h, w): inputs of the layer, and random weights of its output."""
    h, w = normal((2, 5, C), (2, 5, C))
    p = drawn(layer_of(num_shared)[0].init, h, spread=0.4)["params"]
    return {**p, "router_bias": jnp.asarray(bias)}, h, w


@pytest.mark.parametrize(
    ("num_shared", "bias", "loads"),
    [
        (0, (0.0,) * E, {}),
        (2, (0.0,) * E, {}),
        *((num, (0.0, 0.0, -9.0, 0.0, 0.0), {2: 0}) for num in (0, 2)),
        *((num, (0.0, 9.0, 0.0, 9.0, 0.0), {1: 10, 3: 10}) for num in (0, 2)),
    ],
)
def test_moe_and_its_gradients_against_loops(num_shared, bias, loads):
    """Values, and central differences of the float64 loops along random directions, for every parameter and the input."""
    p, h, w = setup(num_shared, bias)
    y, aux, (grads, dh) = layer_of(num_shared)[1](p, h, w)
    expected, load = moe_oracle(p, np.asarray(h), K, 1.5)
    assert_close(y, expected, FORMS_FP32)
    np.testing.assert_array_equal(aux["expert_load"], load)
    assert {e: load[e] for e in loads} == loads

    def loss(at):
        return (moe_oracle(at | {"norm": {"weight": at["norm"]}}, at["h"], K, 1.5)[0] * np.asarray(w, np.float64)).sum()

    assert_slopes(loss, as_float64({**p, "h": h}), as_float64({**grads, "h": dh}))


def test_gates_of_scores_that_all_underflow_are_zero():
    _, gates, scores = route(jnp.ones((1, C)), jnp.full((C, E), -100.0), jnp.zeros(E), K, 1.0)
    np.testing.assert_array_equal(scores, 0)
    np.testing.assert_array_equal(gates, 0)


def test_balancing_evens_out_a_skewed_router():
    """A router that sends most tokens to a few experts: the load's coefficient of variation falls below 0.1."""
    x, W = normal((2048, 8), (8, 8))
    # Scores of x W + skew: the bias has to undo the skew.
    x1, W1 = jnp.concatenate([x, jnp.ones((2048, 1))], 1), jnp.concatenate([W, jnp.linspace(-2.0, 2.0, 8)[None]])

    @jax.jit
    def move(bias):
        experts, _, _ = route(x1, W1, bias, 2, 1.0)
        load = jnp.bincount(experts.reshape(-1), length=8).astype(jnp.float32)[None]
        health = router_health(load, jnp.ones(1), bias[None])
        return balanced_bias(bias[None], load, 4e-3)[0], health["router_load_cv"][0]

    bias, first = move(jnp.zeros(8))
    for _ in range(200):
        bias, last = move(bias)
    assert float(first) > 0.4
    assert float(last) < 0.1


def test_health_and_entropy_of_known_loads_and_scores():
    health = router_health(
        jnp.array([[2.0, 2, 2], [6, 0, 0]]), jnp.array([1.0, 0]), jnp.array([[0.0, 0, 0], [1, -2, 0]])
    )
    np.testing.assert_allclose(health["router_load_cv"], [0, np.sqrt(2)], rtol=1e-6)
    np.testing.assert_allclose(health["router_max_load"], [1, 3])
    np.testing.assert_allclose(health["router_bias_range"], [0, 3])
    # Entropy is a mean over tokens: 1 for one that prefers nothing, 1/2 for one between two of four experts, 0 for one with one.
    scores = jnp.array([[0.3, 0.3, 0.3, 0.3], [0.6, 0.6, 0, 0], [0.9, 0, 0, 0]])
    np.testing.assert_allclose(score_entropy(scores), (1 + 0.5 + 0) / 3, rtol=1e-6)


def test_bfloat16_stays_near_float32():
    (y, aux, _), (full, full_aux, _) = (layer_of(2, dtype)[1](*setup()) for dtype in (jnp.bfloat16, jnp.float32))
    assert y.dtype == jnp.bfloat16
    # The router is float32 in both.
    np.testing.assert_array_equal(aux["expert_load"], full_aux["expert_load"])
    np.testing.assert_array_equal(aux["router_entropy"], full_aux["router_entropy"])
    assert_close(y.astype(jnp.float32), full, BF16_CHAIN)


def test_nan_stays_visible_and_in_its_token():
    p, h, w = setup()
    y = np.asarray(layer_of()[1](p, h.at[0, 2, 1].set(jnp.nan), w)[0])
    bad = np.isnan(y).all(-1)
    assert np.argwhere(bad).tolist() == [[0, 2]]
    assert not np.isnan(y[~bad]).any()


def experiment(kind, **settings):
    model = decoder_of(kind, MODEL, **settings.pop("model", {}))
    return dataclasses.replace(tiny_runs.tiny(Path("unused.txt"), kind, **settings), model=model)


def test_the_layer_index_goes_on_through_both_scans():
    """Home streams of sub-layers 1, 2 (dense) and 3 to 6 (experts), in the parameters and in diagnostics."""
    (_, aux), params = started(decoder_of("mhc:t_max=2", MODEL), 4)
    blocks = [params[name]["attention_connection"]["bias"][:, :4] for name in ("dense_layers", "layers")]
    np.testing.assert_array_equal(np.concatenate(blocks).argmax(-1), [0, 2, 0])
    np.testing.assert_array_equal(np.asarray(aux["pre"]).mean(1).argmax(-1), [0, 1, 2, 3, 0, 1])


MARKS = {"residual": (), "mhc": pytest.mark.full}


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=MARKS.get(kind, pytest.mark.slow)) for kind in connections.KINDS]
)
def test_every_connection_goes_round_experts(kind):
    """One train step with MLA and experts: all parameters train but the routers' biases, which balancing moves."""
    config = experiment(kind, model=MLA)
    (_, aux), params = started(config.model)
    shapes = jax.eval_shape(lambda: init_state(config))
    state = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes).replace(params=params)
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, shapes.params)
    assert jax.tree.leaves(params["dense_layers"])[0].shape[0] == 1
    assert params["layers"]["mlp"]["W_gate"].shape == (2, 4, 16, 8)
    batch = {"inputs": TOKENS, "targets": np.roll(TOKENS, -1, 1)}
    after, metrics = jax.jit(make_train_step(config))(state, batch)
    assert np.isfinite(metrics["loss"])
    assert metrics["grad_norm_per_layer"].shape == (3,)
    assert np.sqrt((np.asarray(metrics["grad_norm_per_layer"]) ** 2).sum()) <= metrics["grad_norm"]
    load = np.asarray(aux["expert_load"])
    assert load.shape == (2, 4)
    np.testing.assert_array_equal(load.sum(-1), 2 * 24)
    bias = after.params["layers"]["mlp"]["router_bias"]
    np.testing.assert_allclose(bias, 1e-3 * np.sign(12 - load), rtol=1e-6)
    is_tree = lambda a: isinstance(a, dict)  # noqa: E731
    moments = [m for m in jax.tree.leaves(after.opt_state, is_leaf=is_tree) if is_tree(m)]
    assert len(moments) == 2
    for moment in moments:
        np.testing.assert_array_equal(moment["layers"]["mlp"]["router_bias"], 0)


@pytest.mark.full
def test_accumulation_sees_the_load_of_the_whole_batch():
    batch = {"inputs": TOKENS, "targets": TOKENS}
    moved = []
    for A in (1, 2):
        config = experiment("residual", optimizer={"accumulation_steps": A})
        state = jax.jit(lambda config=config: init_state(config))()
        moved.append(jax.jit(make_train_step(config))(state, batch)[0].params["layers"]["mlp"]["router_bias"])
    np.testing.assert_array_equal(*moved)
    assert np.any(moved[0])


def test_dense_models_keep_their_parameter_names():
    dense = dataclasses.replace(MODEL, experts="")
    params = jax.eval_shape(lambda: Decoder(dense).init(jax.random.key(0), TOKENS))["params"]
    assert set(params) == {"embedding", "final_norm", "layers", "unembedding"}
    assert set(params["layers"]["mlp"]) == {"norm", "W_gate", "W_up", "W_down"}
    assert params["layers"]["mlp"]["W_up"].shape == (3, 16, 24)


@pytest.mark.full
def test_a_run_resumes_bitwise_and_records_the_routers(tmp_path):
    text = tiny_runs.write_text(tmp_path / "text.txt")
    model = {"num_layers": 2, **EXPERTS}
    whole = tiny_runs.tiny(text, "mhc", model=model, train={"steps": 6, "diagnostics_every": 3})
    train(whole, tmp_path / "whole")
    resumed = tmp_path / "resumed"
    train(whole, resumed)
    # As if it had been killed after step 3.
    (resumed / "summary.json").unlink()
    shutil.rmtree(resumed / "checkpoints" / "6")
    train(whole, resumed)
    tiny_runs.assert_same_run(tmp_path / "whole", resumed)
    assert np.any(tiny_runs.final_state(resumed)["params"]["layers"]["mlp"]["router_bias"])
    line = tiny_runs.lines(resumed, "train")[-1]
    assert line["router_bias_range"] > 0
    assert line["router_max_load"] >= 1
    assert 0 <= line["router_entropy"] <= 1
    assert len(tiny_runs.lines(resumed, "diagnostics")[-1]["router_load_cv"]) == 1


def arguments(sizes, M, C=256, F=128):
    x, W, g = normal((M, C), (len(sizes), C, F), (M, F))
    return x, W, jnp.asarray(sizes, jnp.int32), g


def both(x, W, sizes, g):
    """(rows, dx, dW) of the groups."""
    inside = (jnp.arange(len(x)) < sizes.sum())[:, None]
    y, pull = jax.vjp(lambda x, W: grouped_matmul(x, W, sizes), x, W)
    dx, dW = pull(jnp.where(inside, g, 0))
    return jnp.where(inside, y, 0), jnp.where(inside, dx, 0), dW


GROUPS = {
    "ragged": ([100, 1, 155], 256),
    "empty ones": ([0, 0, 130, 0, 126, 0], 256),
    "all to one": ([0, 384, 0], 384),
    "rows beyond the groups": ([70, 0, 90], 256),
    "rows that fill no tile": ([40, 33, 2], 75),
    "none": ([0, 0], 128),
}


@pytest.mark.parametrize("groups", thin(GROUPS, lambda name: name in ("empty ones", "rows that fill no tile")))
def test_kernels_are_ragged_dot(groups):
    args = arguments(*GROUPS[groups])
    expected = jax.jit(both)(*args)
    with mhc_kernels.settings(platform="tpu", interpret=True):
        actual = jax.jit(lambda *a: both(*a))(*args)
    for name, a, b in zip(("y", "dx", "dW"), expected, actual, strict=True):
        assert_close(b, a, ANOTHER_PROGRAM, name)


def test_devices_that_share_weights_add_up_their_gradients(monkeypatch):
    """Rows differ along `data` and weights do not.  Kernels within `shard_map` cannot be interpreted: plain products stand in."""

    def product(a, b, sizes, dtype, tiling, transpose_rhs=False, interpret=False):
        return jax.lax.ragged_dot(a, b.swapaxes(1, 2) if transpose_rhs else b, sizes).astype(dtype)

    def of_weights(a, b, sizes, dtype, tiling, interpret=False):
        group = jnp.searchsorted(jnp.cumsum(sizes), jnp.arange(len(b)), side="right")
        return jnp.einsum("cm,me,mf->ecf", a, jax.nn.one_hot(group, len(sizes)), b).astype(dtype)

    kernels = SimpleNamespace(gmm=product, tgmm=of_weights)
    monkeypatch.setattr(module_of_products, "_megablox", lambda: kernels)
    x, W, sizes, g = arguments([100, 28], 128)
    rows, whole = PartitionSpec("data"), PartitionSpec()
    mesh = Mesh(np.array(jax.devices()[:2]), ("data",), axis_types=(AxisType.Auto,))

    def gradients(x, W, sizes, g):
        def local(x, W, sizes, g):
            return jax.lax.psum((grouped_matmul(x, W, sizes) * g).sum(), "data")

        product = jax.shard_map(local, mesh=mesh, in_specs=(rows, whole, whole, rows), out_specs=whole)
        return jax.grad(lambda x, W: product(x, W, sizes, g), (0, 1))(x, W)

    twice = jnp.concatenate([x, -x]), W, sizes, jnp.concatenate([g, 2 * g])
    expected = jax.jit(gradients)(*twice)
    with mhc_kernels.settings(platform="tpu", interpret=True):
        actual = jax.jit(lambda *a: gradients(*a))(*twice)
    for name, a, b in zip(("dx", "dW"), expected, actual, strict=True):
        assert_close(b, a, ANOTHER_PROGRAM, name)
    assert_close(actual[1], -jax.jit(both)(x, W, sizes, g)[2], ANOTHER_PROGRAM, "(1 - 2) times that of one device")


@pytest.mark.parametrize("sizes", [{"tensor": 2}, {"stage": 2}, {"data": 2}], ids=str)
def test_kernels_lower_where_a_mesh_does_not_divide_the_rows(sizes):
    """XLA's partitioner refuses them, as for the one sequence of diagnostics or in a pipeline whose devices share no batch."""
    x, W, groups, _ = arguments([60, 40], 100)

    def gradient(x, W):
        return jax.grad(lambda x, W: grouped_matmul(x, W, groups).sum(), (0, 1))(x, W)

    mesh = make_mesh(MeshConfig(**sizes))
    with using(mesh), mhc_kernels.settings(platform="tpu"):
        specs = {"in_specs": PartitionSpec(), "out_specs": PartitionSpec(), "check_vma": False}
        run = jax.shard_map(gradient, axis_names={"stage"}, **specs) if "stage" in sizes else gradient
        text = jax.jit(run).trace(x, W).lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("tpu_custom_call") >= 2, "dx and dW"


def test_a_gradient_of_the_weights_sees_its_group_alone():
    """NaN in rows of other groups, or beyond the groups, stays out of dW."""
    x, W, sizes, g = arguments([60, 68], 256)
    x = x.at[:60].set(jnp.nan).at[128:].set(jnp.nan)
    with mhc_kernels.settings(platform="tpu", interpret=True):
        (dW,) = jax.jit(lambda W, g: jax.vjp(lambda W: grouped_matmul(x, W, sizes), W)[1](g))(W, g)
    assert np.isnan(dW[0]).all()
    expected = np.asarray(x[60:128], np.float64).T @ np.asarray(g[60:128], np.float64)
    assert_close(dW[1], expected, ANOTHER_PROGRAM, "dW")


@pytest.mark.parametrize(("k", "n"), [(1280, 896), (896, 1280), (2560, 1536), (1536, 2560), (64, 48), (7168, 2048)])
def test_tiles_fill_vmem_and_no_more(k, n):
    rows, depth, columns = tiling(98304, k, n)
    assert (rows, k % depth, n % columns) == (512, 0, 0)
    assert 4 * (rows * depth + depth * columns + rows * columns) + 4 * rows * columns <= 12 * 2**20
    assert depth == k or k > 2560
    _, down, across = tiling_of_gradient(98304, k, n)
    assert 4 * 512 * (down + across) + 4 * down * across + 4 * down * across <= 14 * 2**20


def test_the_largest_tile():
    """`largest` divides where it can; the last tile of 1000 rows is cut."""
    for size, limit, tile in ((98304, 512, 512), (384, 512, 384), (1280, 1024, 640), (48, 512, 48), (1000, 512, 512)):
        assert largest(size, limit) == tile
