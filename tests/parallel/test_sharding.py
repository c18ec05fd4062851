"""Steps on meshes of simulated devices equal those of one device; what they communicate; checkpoints between meshes."""

import collections
import dataclasses
import math
import re
import shutil

import jax
import jax.numpy as jnp
import mhc_kernels
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from support import meshes, tiny_runs
from support.meshes import B, T, assert_same_step, compiled_gradients, lowered_gradients, name_of, tiny
from support.thinned import thin
from support.tiny_runs import data_of, final_state, lines, write_text
from support.tolerances import ANOTHER_PROGRAM, assert_close

from mhc_jax import connections, loop, model
from mhc_jax.config import MeshConfig
from mhc_jax.config.mapping import to_mapping
from mhc_jax.connections.parameter_paths import path_of
from mhc_jax.cost import counts
from mhc_jax.data import resolve_tokenizer
from mhc_jax.errors import InputError
from mhc_jax.files.json_files import read_json
from mhc_jax.layers.attention import attend
from mhc_jax.parallel.sharding import RULES, Rules, constrain, logical_axes, make_mesh, state_shardings, using
from mhc_jax.runs.checkpoint import Checkpoints
from mhc_jax.train_step import init_state

FULL, SLOW = pytest.mark.full, pytest.mark.slow
FSDP, MIXED = {"data": 2, "fsdp": 4}, {"data": 2, "tensor": 2, "sequence": 2}
MESHES = [{"data": 8}, FSDP, {"tensor": 2}, {"sequence": 2}, {"data": 2, "fsdp": 2, "tensor": 2}, MIXED]
MHC = "mhc:t_max=2"  # fewer steps of Sinkhorn, which a device does by itself, compile in less time
FAST = (("residual", FSDP), ("residual", MIXED), (MHC, MIXED))
CASES = thin([(kind, mesh) for kind in ("residual", MHC) for mesh in MESHES], FAST.__contains__)
CASES += [pytest.param("hc", mesh, marks=FULL if mesh is MIXED else SLOW) for mesh in MESHES]
CASES += [pytest.param(kind, MIXED, marks=SLOW) for kind in sorted({*connections.KINDS} - {"residual", "hc", "mhc"})]


@pytest.mark.parametrize(("kind", "mesh"), CASES, ids=name_of)
def test_a_step_is_that_of_one_device(kind, mesh):
    assert_same_step(tiny(kind, mesh))


@pytest.mark.parametrize("mesh", [MIXED, pytest.param(FSDP, marks=FULL)], ids=name_of)
def test_a_loss_in_parts_is_that_of_one_device(mesh, monkeypatch):
    """Each of eight devices makes the logits of a few tokens at a time, and sums the gradient of the unembedding once."""
    config = tiny("residual", mesh, size=(16, 24))
    meshes.on_one_device(config)
    monkeypatch.setattr(model, "LOGITS_BYTES", 4 * 56 * 12)
    assert_same_step(config)
    text = lowered_gradients(config)[1].as_text()
    b, t = (2, 2) if mesh is MIXED else (8, 1)
    assert f"tensor<{b}x{t}x12x56xf32>" in text
    assert "tensor<16x24x56xf32>" not in text


LATENT = {"attention_kind": "mla:kv_rank=8:rope_width=4"}
OTHERS = {
    # 57 words, which tensor does not divide; blocks computed again in the backward pass.
    "mla, tied, odd vocabulary": (MHC, MIXED, {"vocab_size": 57, "tied_embeddings": True, "remat": "full", **LATENT}),
    "accumulated gradients": (MHC, {"data": 2, "fsdp": 2}, {"accumulation_steps": 2}),
}


@SLOW
@pytest.mark.parametrize(("kind", "mesh", "settings"), OTHERS.values(), ids=OTHERS)
def test_other_models_are_those_of_one_device(kind, mesh, settings):
    assert_same_step(tiny(kind, mesh, **settings))


@pytest.mark.parametrize("settings", thin([{}, LATENT | {"remat": "connection"}], {}.__eq__), ids=["gqa", "mla"])
def test_attention_inside_documents_is_that_of_one_device(settings):
    config = tiny("residual", MIXED, attention_scope="document:3", **settings)
    assert (meshes.batch(config)["inputs"] == 3).any(1).sum() >= 2
    assert_same_step(config)


def collectives(config):
    """How often each (kind, shape) of a collective occurs in the compiled gradient."""
    found = collections.Counter()
    for kind, result in meshes.collectives(compiled_gradients(config)):
        for shape in re.findall(r"\w+\[([\d,]*)\]", result):
            found[kind, tuple(int(size) for size in shape.split(",") if size)] += 1
    return found


@pytest.mark.parametrize("mesh", thin(MESHES, MIXED.__eq__), ids=name_of)
def test_mhc_communicates_the_gradients_of_its_parameters_and_nothing_else(mesh):
    residual, mhc = (collectives(tiny(kind, mesh)) for kind in ("residual", MHC))
    assert residual
    assert not residual - mhc
    n, C = 4, 32
    k = n * n + 2 * n
    # The body of the scan over blocks has two sub-layers; over tensor alone every device has all tokens.
    own = [] if set(mesh) == {"tensor"} else [(3,), (k,), (n * C, k)]
    assert mhc - residual == {("all-reduce", shape): 2 for shape in own}


@pytest.mark.parametrize("kind", ["residual", pytest.param(MHC, marks=FULL)])
def test_weights_are_gathered_layer_by_layer_and_activations_never(kind):
    """Over `data` each device's part of all blocks is gathered once, before, and over `fsdp` the weights of one block."""
    config = tiny(kind, FSDP)
    parameters = meshes.shapes(config)
    placed = state_shardings(make_mesh(config.mesh), parameters, spread=False)
    parts = jax.tree.map(lambda a, s: s.shard_shape(a.shape), parameters, placed)
    over_data = {tuple(shape) for shape in jax.tree.leaves(parts, is_leaf=lambda a: isinstance(a, tuple))}
    over_fsdp = {a.shape[-2:] for a in jax.tree.leaves(parameters) if len(a.shape) > 1}
    gathered = {shape for kind, shape in collectives(config) if kind == "all-gather"}
    assert gathered & over_data
    assert gathered & over_fsdp
    assert gathered <= over_data | over_fsdp


def test_a_device_stores_a_part_of_each_matrix_over_data_too():
    config = tiny(MHC, {"data": 2, "fsdp": 2, "expert": 2}, **meshes.EXPERTS, **LATENT)
    state, mesh = jax.eval_shape(lambda: init_state(config)), make_mesh(config.mesh)
    stored, computed = (
        {path_of(path): s.spec for path, s in jax.tree_util.tree_leaves_with_path(state_shardings(mesh, state, spread))}
        for spread in (True, False)
    )
    for name, expected in {
        "/embedding": (("data",), ("fsdp",)),
        "layers/attention/W_q": (None, ("fsdp",), ("data",)),
        "layers/attention/W_kv_up": (None, ("data",), None),
        "layers/mlp/W_down": (None, ("expert",), ("data",), ("fsdp",)),
    }.items():
        assert {stored[path] for path in stored if path.endswith(name)} == {PartitionSpec(*expected)}, name
    assert not any("data" in str(spec) for spec in computed.values())
    small = [path for path, spec in stored.items() if "data" not in str(spec)]
    assert all("_connection/" in p or "ends/" in p or re.search(r"norm/|bias$|step$|count$", p) for p in small), small


def test_matrices_are_cast_before_they_are_gathered_over_data():
    """The step gathers over `data` in the compute dtype what the model casts, and in float32 what it does not."""
    config = tiny("residual", {"data": 2}, compute_dtype="bfloat16", **meshes.EXPERTS)
    text = lowered_gradients(config)[1].as_text()
    whole = set(re.findall(r"sharding_constraint %\S+ <@mesh, \[[{}, ]*\]> : tensor<(\S+)>", text))
    assert {"2x4x32x12xbf16", "2x4x12x32xbf16", "2x32x32xbf16", "32x56xbf16", "2x32x4xf32", "56x32xf32"} <= whole
    assert not {"2x4x32x12xf32", "2x32x32xf32", "32x56xf32", "2x32x4xbf16"} & whole


@pytest.mark.parametrize("kind", ["residual", pytest.param(MHC, marks=FULL)])
def test_over_sequence_only_keys_and_values_are_gathered(kind):
    config = tiny(kind, {"sequence": 2})
    K, D = config.model.num_kv_heads, config.model.head_dim
    moved = [(kind, math.prod(shape)) for kind, shape in collectives(config).elements() if kind != "all-reduce"]
    assert moved == [("all-gather", B * T * K * D)] * 2


def test_streams_lie_over_batch_and_sequence():
    text = lowered_gradients(tiny(MHC, MIXED))[1].as_text()
    streams = re.findall(r"sharding_constraint %\S+ <@mesh, (\[.*?\])> : tensor<8x32x32xf32>", text)
    assert set(streams) == {'[{"data"}, {"sequence"}, {}]'}
    # Inside the operations: a device's 4 sequences of 16 tokens, and all channels of all streams.
    assert "tensor<4x16x128xf32>" in text
    assert not re.search(r"tensor<8x32x(64|32)xf32>.*manual_computation", text)


def test_flops_are_those_of_one_device():
    split, alone = (counts.jaxpr_flops(lowered_gradients(tiny(MHC, mesh))[0].jaxpr) for mesh in (MIXED, {}))
    assert split == pytest.approx(alone, rel=1e-3)


def all_operations(x, y, post, res, phi, alpha, bias):
    settings = {"num_streams": post.shape[0], "num_iters": 3}
    given = mhc_kernels.Coefficients(None, post, res)
    new, c, h = mhc_kernels.write_read(x, given, y, phi, alpha, bias, **settings)
    c = mhc_kernels.coefficients(new, phi, alpha, bias, **settings)
    new = mhc_kernels.write(new, h, c.post, mhc_kernels.sinkhorn(c.res, 3), post.shape[0])
    z = mhc_kernels.projection(new, phi, 1e-20)
    return (mhc_kernels.read(new, c.pre, post.shape[0]) ** 2).sum() + (new**2).sum() + (z**2).sum()


@pytest.mark.parametrize("implementation", thin(["xla", "pallas_tpu"], "pallas_tpu".__eq__))
def test_operations_run_on_own_tokens(implementation):
    """Values and gradients of every operation, the kernels included, on a mesh of data and sequence."""
    n, C, B, T = 2, 128, 2, 16
    r, k = np.random.default_rng(0), n * n + 2 * n
    sizes = [(B, T, n * C), (B, T, C), (n, B, T), (n, n, B, T), (n * C, k), (3,), (k,)]
    arguments = [np.float32(0.3 * r.normal(size=size)) for size in sizes]
    program = jax.value_and_grad(all_operations, argnums=tuple(range(7)))
    with mhc_kernels.settings(implementation="xla"):
        expected = jax.jit(program)(*arguments)
    how = {"implementation": implementation, "interpret": implementation == "pallas_tpu"}
    with (
        using(make_mesh(MeshConfig(data=2, sequence=2))),
        mhc_kernels.settings(**how, token_axes=PartitionSpec("data", "sequence")),
    ):
        traced = jax.jit(program).trace(*arguments)
        actual = traced.lower().compile()(*arguments)
    jax.tree.map(lambda mine, theirs: assert_close(mine, theirs, ANOTHER_PROGRAM), actual, expected)
    primitives = [eqn.primitive.name for eqn in traced.jaxpr.eqns]
    assert primitives.count("shard_map") >= 12, "six operations and their gradients"


def test_the_backward_pass_keeps_all_streams_once():
    """Those that one operation makes and those that the next one keeps are one array, although each operation merges its tokens."""
    n, C, B, T = 2, 128, 2, 16
    sizes = [(B, T, n * C), (B, T, C), (n, B, T), (n, n, B, T), (n * C, n * n + 2 * n), (3,), (n * n + 2 * n,)]

    def several(x, y, post, res, phi, alpha, bias):
        given, how = mhc_kernels.Coefficients(None, post, res), {"num_streams": n, "num_iters": 3}
        new, _, h = mhc_kernels.write_read(x, given, y, phi, alpha, bias, **how)
        c = mhc_kernels.coefficients(new, phi, alpha, bias, **how)
        last = mhc_kernels.write(new, h, c.post, c.res, n)
        return last, mhc_kernels.read(last, c.pre, n)

    how = {"implementation": "pallas_tpu", "interpret": True, "token_axes": PartitionSpec("data", "sequence")}
    with using(make_mesh(MeshConfig(data=2, sequence=2))), mhc_kernels.settings(**how):
        arguments = [jnp.zeros(size) for size in sizes]
        jaxpr = jax.make_jaxpr(lambda *a: jax.tree.leaves(jax.vjp(several, *a)[1]))(*arguments).jaxpr
    kept = {v for v in jaxpr.outvars if v.aval.size == B * T * n * C}
    assert len(kept) == 3, "x, the streams after the boundary, and those after the write"
    assert jaxpr.invars[0] in kept


@pytest.mark.parametrize("packed", [False, True])
def test_flash_attention_runs_on_own_sequences_and_heads(packed):
    r = np.random.default_rng(0)
    *given, weights = (np.float32(r.normal(size=(2, 128, heads, 128))) for heads in (4, 2, 2, 4))
    documents = jnp.asarray(np.cumsum(r.integers(0, 30, (2, 128)) == 0, 1), jnp.int32) if packed else None

    def run(implementation):
        return jax.jit(
            jax.value_and_grad(lambda *a: (attend(*a, implementation, documents) * weights).sum(), (0, 1, 2))
        )

    with using(make_mesh(MeshConfig(data=2, tensor=2))), mhc_kernels.settings(platform="tpu", interpret=True):
        compiled = run("splash").lower(*given).compile()
        flash = compiled(*given)
    assert "1,128,2,128" in compiled.as_text()
    jax.tree.map(lambda mine, expected: assert_close(mine, expected, ANOTHER_PROGRAM), flash, run("xla")(*given))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(configuration, folder) of a run on (data 2, fsdp 4)."""
    folder = tmp_path_factory.mktemp("run")
    text, settings = write_text(folder / "text.txt"), {"data": {"batch_size": 8}, "train": {"diagnostics_every": 4}}
    config = tiny_runs.tiny(text, "hc:dynamic=False", **settings)
    config = dataclasses.replace(config, mesh=MeshConfig(data=2, fsdp=4))
    loop.train(config, folder / "run")
    return config, folder / "run"


def test_a_run_names_its_mesh(run):
    _, folder = run
    for file in ("env.json", "summary.json"):
        assert read_json(folder / file)["mesh"] == "data 2, fsdp 4"
    assert [line["step"] for line in lines(folder, "diagnostics")] == [0, 4, 8]


@pytest.mark.parametrize("mesh", [{"data": 8}, {}], ids=["data8", "one device"])
def test_a_checkpoint_is_restored_onto_another_mesh(run, mesh):
    config, folder = run
    config = resolve_tokenizer(config, data_of(config))
    state, here = jax.eval_shape(lambda: init_state(config)), jax.sharding.SingleDeviceSharding(jax.devices()[0])
    mesh = make_mesh(MeshConfig(**mesh))
    shardings = state_shardings(mesh, state) if mesh else jax.tree.map(lambda _: here, state)
    wanted = jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), state, shardings)
    with Checkpoints(folder, 3) as checkpoints:
        restored, _, _ = checkpoints.restore_newest(wanted, to_mapping(config))
    assert all(jax.tree.leaves(jax.tree.map(lambda a, s: a.sharding == s, restored, shardings)))
    saved = final_state(folder)
    for mine, theirs in ((restored.params, saved["params"]), (restored.opt_state, saved["opt_state"])):
        for a, b in zip(jax.tree.leaves(mine), jax.tree.leaves(theirs), strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.full
def test_a_run_goes_on_on_another_mesh(run, tmp_path):
    config, before = run
    folder = shutil.copytree(before, tmp_path / "run")
    shutil.rmtree(folder / "checkpoints" / "8")
    (folder / "summary.json").unlink()
    loop.train(dataclasses.replace(config, mesh=MeshConfig(data=2, sequence=2)), folder)
    assert [(e["event"], e["step"], e["mesh"]) for e in lines(folder, "event")] == [
        ("resumed", 6, "data 2, sequence 2")
    ]
    losses = [[line["loss"] for line in lines(each, "train")] for each in (before, folder)]
    assert losses[0][:6] == losses[1][:6]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_one_device_is_no_mesh():
    assert make_mesh(MeshConfig()) is None
    x = jnp.ones((2, 4))
    assert constrain(x, "batch", "sequence") is x
    assert not re.search("sdy|sharding|manual", lowered_gradients(tiny(MHC))[1].as_text())


def test_a_mesh_axis_is_used_once():
    assert RULES.spec("batch", "sequence", None) == PartitionSpec(("data", "fsdp", "expert"), ("sequence",), None)
    for rules, names, axis in (
        (RULES, ("batch", "heads", "hidden"), "tensor"),
        (RULES, ("batch", "sequence", "embed"), "fsdp"),
        (Rules(batch=("data", "sequence")), ("batch", "sequence"), "sequence"),
    ):
        with pytest.raises(ValueError, match=f"would use the mesh axis {axis} more than once"):
            rules.spec(*names)


def test_every_parameter_has_logical_axes_and_an_unknown_one_raises():
    assert logical_axes("layers/mlp/W_gate", 3) == ("layer", "embed", "hidden")
    assert logical_axes("layers/mlp/W_gate", 4) == ("layer", "expert", "embed", "hidden")
    assert logical_axes("unembedding", 2) == ("embed", "rows")
    assert logical_axes("layers/mlp_connection/W_gate", 3) == ("connection",) * 3
    for path, ndim in (("layers/attention/W_new", 3), ("layers/mlp/W_gate", 2), ("embedding", 3), ("weight", 1)):
        with pytest.raises(ValueError, match=f"The parameter {path} with {ndim} axes has no logical axes"):
            logical_axes(path, ndim)


def test_moments_lie_like_their_parameters_and_connections_everywhere():
    config = tiny("mhc", {"fsdp": 2, "tensor": 2})
    state = jax.eval_shape(lambda: init_state(config))
    specs = state_shardings(make_mesh(config.mesh), state)
    by_path = {path_of(path): s.spec for path, s in jax.tree_util.tree_leaves_with_path(specs)}
    moments = [path for path in by_path if re.search("[mn]u/layers/attention/W_q", path)]
    assert len(moments) == 2
    for path in (".params/layers/attention/W_q", *moments):
        assert by_path[path] == PartitionSpec(None, ("fsdp",), ("tensor",))
    assert all(not any(spec) for path, spec in by_path.items() if "_connection/" in path)


@pytest.mark.parametrize(
    ("mesh", "settings", "sentence"),
    [
        ({"tensor": 4}, {}, "model.num_kv_heads is 2, which mesh.tensor 4 does not divide"),
        ({"tensor": 3}, {}, "model.num_heads is 4, which mesh.tensor 3 does not divide"),
        ({"tensor": 2}, {"mlp_width": 49}, "model.mlp_width is 49, which mesh.tensor 2 does not divide"),
        ({"fsdp": 8}, {"width": 36, "num_heads": 2}, "model.width is 36, which mesh.fsdp 8 does not divide"),
        ({"data": 3}, {}, r"accumulation_steps is 8, which mesh.data x mesh.fsdp x mesh.expert = 3 does not divide"),
        ({"data": 4}, {"accumulation_steps": 4}, "accumulation_steps is 2, which .* = 4 does not divide"),
        ({"sequence": 5}, {}, "data.sequence_length is 32, which mesh.sequence 5 does not divide"),
        (
            {"expert": 4},
            {"experts": "6"},
            "number of experts in model.experts is 6, which mesh.expert 4 does not divide",
        ),
        ({"sequence": 2}, {"attention": "splash"}, "mesh.sequence is 2 and model.attention 'splash'.*use 'xla'"),
        ({}, {"attention": "splash"}, "'splash', which needs .* multiples of 64, not 32, 8 and 8; use 'xla'"),
        ({"data": 0}, {}, "mesh.data is 0; it must be at least 1"),
    ],
)
def test_what_does_not_fit_is_told_when_the_configuration_is_built(mesh, settings, sentence):
    with pytest.raises(InputError, match=sentence):
        tiny("mhc", mesh, **settings)


def test_a_mesh_of_experts_splits_the_batch_and_has_no_more_devices_than_there_are():
    assert MeshConfig(data=2, fsdp=3, tensor=5, expert=7, sequence=11).batch == 2 * 3 * 7
    with pytest.raises(InputError, match=r"The mesh \(data 4, tensor 4\) asks for 16 devices, and there are 8"):
        make_mesh(MeshConfig(data=4, tensor=4))
