"""The pipeline on simulated devices: losses and gradients are those of the decoder without one; memory, checkpoints, refusals."""

import dataclasses
import re
import shutil

import jax
import numpy as np
import pytest
from support import meshes, tiny_runs
from support.meshes import EXPERTS, assert_same_step, batch, on_one_device, random_params, run_gradients
from support.thinned import thin
from support.tiny_runs import lines, write_text
from support.tolerances import ANOTHER_PROGRAM, assert_close

from mhc_jax import connections, loop
from mhc_jax.config import MeshConfig, PipelineConfig
from mhc_jax.connections.parameter_paths import path_of
from mhc_jax.errors import InputError
from mhc_jax.parallel.sharding import batch_sharding, make_mesh, state_shardings, using
from mhc_jax.pipeline.executor import pipelined
from mhc_jax.pipeline.program import compile_table
from mhc_jax.pipeline_schedules.tables import SCHEDULES, Place, Plan, lay_out, make, stage_count
from mhc_jax.pipeline_schedules.validate import validate
from mhc_jax.train_step import gradients

T, MHC = 8, "mhc:t_max=2"
DENSE_FIRST, COPIES = {"experts": "4:active=2:shared=1:width=12"}, {"data": 2, "expert": 2}


def tiny(kind, schedule, stages, microbatches, mesh=None, sequences=1, overlap=False, **model):
    """A configuration of one block a stage, with `sequences` in each microbatch."""
    blocks, pipeline = stage_count(schedule, stages), PipelineConfig(schedule=schedule, overlap=overlap)
    sizes = {"vocab_size": 40, "width": 16, "num_heads": 2, "num_kv_heads": 1, "mlp_width": 16, "num_layers": blocks}
    mesh, size = {"stage": stages, **(mesh or {})}, (microbatches * sequences, T)
    return meshes.tiny(kind, mesh, microbatches, size, pipeline, **sizes | model)


CASES = {
    "dualpipe": ("residual", 2, 4, {"mesh": {"data": 2}, "sequences": 2, "overlap": True}),
    "zb1p": ("attnres_block", 2, 3, EXPERTS),  # its blocks count themselves
    "1f1b": (MHC, 2, 2, {}),
}


@pytest.mark.parametrize("schedule", thin(CASES, "1f1b".__ne__))
def test_a_pipeline_changes_nothing(schedule):
    kind, stages, microbatches, others = CASES[schedule]
    assert_same_step(tiny(kind, schedule, stages, microbatches, **others))


PIPELINED = ["diagonal", "identity_mix:t_max=2", "go_mhc:num_streams=3", "lanes", "mhc:t_max=2:write_rank=2"]
PIPELINED += ["attnres_block:block_size=1:heads=2", "delta_attnres:block_size=1", "mudd"]


@pytest.mark.full
@pytest.mark.parametrize("kind", PIPELINED)
def test_a_pipeline_of_the_kind_changes_nothing(kind):
    assert_same_step(tiny(kind, "zb1p", 2, 3))


WITHIN = {"attention_scope": "document:5", "vocab_size": 8}
PACKED = [
    ("zb1p", {}),
    ("1f1b", {"mesh": {"sequence": 2}, "remat": "connection"}),
    ("dualpipe", {"attention_kind": "mla:kv_rank=8:rope_width=4", "remat": "full"}),
]


@pytest.mark.parametrize(("schedule", "others"), thin(PACKED, lambda case: case[0] == "zb1p"), ids=str)
def test_every_stage_knows_the_documents_of_its_microbatch(schedule, others):
    config = tiny("residual", schedule, 2, 4, **others, **WITHIN)
    starts = batch(config)["inputs"][:, 1:] == 5
    assert starts.any()
    assert len({tuple(row) for row in starts.tolist()}) > 2, "microbatches differ in their documents"
    assert_same_step(config)


@pytest.mark.full
def test_stages_copies_and_owners_of_experts():
    """The first stage begins with a dense block, and has fewer blocks with experts than the second."""
    assert_same_step(tiny("residual", "zb1p", 2, 3, COPIES, sequences=4, **DENSE_FIRST, num_layers=4))


ALL_CASES = [
    (kind, schedule, stages, times * (2 * stages if schedule.startswith("dual") else stages), {})
    for schedule in SCHEDULES
    for kind in ("residual", "hc", MHC)
    for stages in (2, 4, 8)
    for times in (1, 2)
    if kind != "hc"
    or stage_count(schedule, stages) <= 8  # through 32 sub-layers HC leaves float32 no gradient to compare
]
ALL_CASES += [(kind, "zb1p", 2, 3, {}) for kind in sorted({*connections.KINDS} - {"residual", "hc", "mhc"})]
ALL_CASES += [(MHC, "1f1b", 2, 4, {"num_layers": 4, "remat": remat}) for remat in ("full", "connection")]
TIED = {"tied_embeddings": True, "attention_kind": "mla:kv_rank=8:rope_width=4"}
ALL_CASES += [(MHC, "dualpipev", 2, 4, TIED)]
ALL_CASES += [("residual", "dualpipe", 2, 4, {"mesh": COPIES, "sequences": 4, **DENSE_FIRST})]
for mesh in ({"fsdp": 2}, {"tensor": 2}, {"sequence": 2}, {"data": 2, "fsdp": 2}):
    ALL_CASES += [(MHC, "1f1b", 2, 4, {"mesh": mesh, "sequences": 4, "num_kv_heads": 2})]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "schedule", "stages", "microbatches", "others"), ALL_CASES, ids=str)
def test_a_pipeline_of_any_schedule_and_kind_changes_nothing(kind, schedule, stages, microbatches, others):
    """Every schedule, kind, axis of the mesh beside stages, and way to recompute."""
    assert_same_step(tiny(kind, schedule, stages, microbatches, **others))


@pytest.mark.parametrize("schedule", thin(["zb1p", "1f1b"], "zb1p".__eq__))
def test_streams_that_overflow_are_seen(schedule):
    """The squares of these streams overflow, and rsqrt(inf) = 0 would hide that."""
    kind, stages, microbatches, others = CASES[schedule]
    config = tiny(kind, schedule, stages, microbatches, **others)
    params = random_params(config)
    params["embedding"] *= np.float32(1e25)
    placed = jax.device_put((params, batch(config)), meshes.lowered_gradients(config)[2])
    (loss, _), _ = meshes.compiled_gradients(config)(*placed)
    assert np.isnan(loss)


def test_embeddings_are_sharded_over_stages():
    """4 stages share 40 rows; 41 rows are replicated; 42 rows are sharded over the two devices of tensor alone."""
    for rows, mesh, spec in ((40, {}, "stage"), (41, {}, None), (42, {"tensor": 2}, "tensor")):
        config = tiny("residual", "1f1b", 4, 4, mesh, vocab_size=rows, num_kv_heads=2)
        own = state_shardings(make_mesh(config.mesh), meshes.shapes(config))
        assert own["embedding"].spec[0] == own["unembedding"].spec[1] == spec, rows


BFLOAT16 = {"compute_dtype": "bfloat16", "stream_dtype": "bfloat16"}


def test_sums_of_gradients_are_float32():
    config = tiny("residual", "1f1b", 2, 2, **BFLOAT16)
    with using(make_mesh(config.mesh)):
        _, grads = jax.eval_shape(gradients(config), random_params(config), batch(config))
    assert {a.dtype for a in jax.tree.leaves(grads)} == {np.dtype("float32")}


@pytest.mark.full
def test_in_bfloat16_a_pipeline_rounds_no_worse():
    """The gradients are no further from those of float32 than without a pipeline."""
    config, exactly = tiny(MHC, "zb1p", 2, 2, **BFLOAT16), on_one_device(tiny(MHC, "zb1p", 2, 2))[2]

    def errors(found):
        return np.array([np.linalg.norm(found[path] - g) / np.linalg.norm(g) for path, g in exactly.items()])

    staged, without = (errors(run(config)[2]) for run in (run_gradients, on_one_device))
    assert 1e-3 < np.median(without) < 3e-2
    assert (staged < 1.5 * without + 1e-3).all()
    assert np.median(staged) < 1.1 * np.median(without)


@pytest.mark.slow
def test_a_table_written_by_hand():
    """The first stage is on the second device, and the second microbatch begins when the first has ended."""
    config = tiny("residual", "gpipe", 2, 2)
    orders = [[[(kind, m, 0)] for m in (0, 1) for kind in "FB"]] * 2
    schedule = lay_out("mine", Plan(orders, [[Place(1, 0), Place(0, 0)]], [0, 0], [1, 1]))
    validate(schedule)
    mesh, params = make_mesh(config.mesh), random_params(config)
    with using(mesh):
        own = jax.device_put((params, batch(config)), (state_shardings(mesh, params), batch_sharding(mesh)))
        (loss, _), grads = jax.jit(pipelined(config, schedule))(*own)
    expected_loss, _, expected_grads = on_one_device(config)
    assert float(loss) == pytest.approx(expected_loss, rel=1e-6)
    for path, g in jax.tree_util.tree_leaves_with_path(grads):
        assert_close(g, expected_grads[path_of(path)], ANOTHER_PROGRAM, path_of(path))


@pytest.mark.slow
def test_50_steps_give_the_curve_without_a_pipeline():
    """With clipping and balancing; the norm of the first step is clipped."""
    config = tiny("residual", "1f1b", 2, 2, {"data": 2}, sequences=2, **EXPERTS)
    config = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, warmup_steps=2))
    (found, bias), (expected, expected_bias) = meshes.trained(config, 50), meshes.trained(meshes.alone(config), 50)
    assert found[0]["grad_norm"] > config.optimizer.grad_clip > 0
    assert expected[-1]["loss"] < expected[0]["loss"] - 0.3
    for name, rtol in (("loss", 2e-5), ("grad_norm", 2e-3)):
        np.testing.assert_allclose([m[name] for m in found], [m[name] for m in expected], rtol=rtol)
    np.testing.assert_allclose(bias, expected_bias, atol=1e-7)
    assert np.any(bias)


def temporary(schedule, microbatches):
    """(bytes the compiled step needs beside its arguments and results, its program)."""
    step = meshes.compiled_gradients(tiny("residual", schedule, 2, microbatches, sequences=64))
    return step.memory_analysis().temp_size_in_bytes, compile_table(make(schedule, 2, microbatches))


@pytest.mark.slow
def test_the_activations_of_1f1b_do_not_grow_with_microbatches_and_those_of_gpipe_do():
    """The difference of two gpipe steps is the size of a slot; 1f1b has as many slots as its bound, whatever the microbatches."""
    boundary = 64 * T * 2 * 16 * 4  # x and y of 64 sequences
    (few, a), (many, b) = temporary("gpipe", 4), temporary("gpipe", 8)
    assert [(one.activations, one.gradients, one.inputs) for one in (a, b)] == [(4, 4, 1), (8, 8, 1)]
    slot = (many - few) / 4 - boundary
    assert slot > boundary
    (short, c), (long, d) = temporary("1f1b", 4), temporary("1f1b", 8)
    assert [(one.activations, one.gradients, one.inputs) for one in (c, d)] == [(2, 1, 1), (2, 1, 1)]
    assert abs(long - short) < 0.1 * slot
    assert few - short == pytest.approx(2 * slot + 3 * boundary, rel=0.1)


@pytest.mark.slow
def test_a_run_goes_on_with_and_without_stages(tmp_path):
    """A checkpoint has all blocks in one array."""
    settings = {"model": {"num_layers": 2}, "optimizer": {"accumulation_steps": 2}}
    settings |= {"train": {"steps": 6, "checkpoint_every": 2, "validate_every": 0}}
    config = tiny_runs.tiny(write_text(tmp_path / "text.txt"), "residual", **settings)
    staged = dataclasses.replace(config, mesh=MeshConfig(stage=2))
    loop.train(config, tmp_path / "whole")
    for step, other, name, source in ((2, staged, "staged", "whole"), (4, config, "again", "staged")):
        folder, copy = tmp_path / source, shutil.copytree(tmp_path / source, tmp_path / name)
        for later in range(step + 2, 8, 2):
            shutil.rmtree(copy / "checkpoints" / str(later))
        (copy / "summary.json").unlink()
        summary = loop.train(other, copy)
        assert (summary["status"], summary["steps"]) == ("finished", 6)
        assert [event["step"] for event in lines(copy, "event")][-1] == step
        before, after = ([line["loss"] for line in lines(each, "train")] for each in (folder, copy))
        assert after == pytest.approx(before, rel=1e-5)


REFUSED = {
    "blocks": ({"num_layers": 3}, {}, "model.num_layers is 3, which does not divide into the 2 stages of '1f1b'"),
    "dense": ({"num_layers": 4, "experts": "6:dense_layers=3"}, {}, "3, more than the 2 blocks of the first stage."),
    "schedule": ({}, {"schedule": "1f2b"}, "pipeline.schedule is '1f2b'"),
    "microbatches": ({}, {"schedule": "dualpipe"}, "2 microbatches are too few for 'dualpipe' on 2 devices"),
    "chunks": ({}, {"schedule": "1f1b:3"}, "a number can follow 'interleaved', and not '1f1b'"),
}


@pytest.mark.parametrize(("model", "pipeline", "sentence"), REFUSED.values(), ids=REFUSED)
def test_what_does_not_fit_is_told_when_the_configuration_is_built(model, pipeline, sentence):
    config = tiny("residual", "1f1b", 2, 2)
    model = dataclasses.replace(config.model, **model)
    with pytest.raises(InputError, match=re.escape(sentence)):
        dataclasses.replace(config, model=model, pipeline=PipelineConfig(**{"schedule": "1f1b"} | pipeline))


def test_a_mesh_without_the_axis_of_stages():
    config = tiny("residual", "1f1b", 2, 2)
    params, run = random_params(config), pipelined(config, make("1f1b", 2, 2))
    for mesh, has in ((MeshConfig(), "no such axis"), (MeshConfig(data=2), "1"), (MeshConfig(stage=4), "4")):
        with using(make_mesh(mesh)), pytest.raises(InputError, match=f"the mesh has {has}. Set mesh.stage to 2"):
            run(params, batch(config))
