"""The choice of a mesh for a slice, and the sentence about gathers that are compiled to all-reduces."""

import dataclasses
import json

import pytest
from support.in_process import run_here
from support.tiny_runs import ROOT

from mhc_jax.config import DataConfig, ExperimentConfig, MeshConfig, ModelConfig
from mhc_jax.connections import parse
from mhc_jax.errors import InputError
from mhc_jax.planning import compile_ahead, compile_table, mesh_choice, slices

MODEL = ModelConfig(64, 32, 3, num_heads=2, num_kv_heads=2, mlp_width=64, connection=parse("residual"))
CONFIG = ExperimentConfig(model=MODEL, data=DataConfig(sequence_length=16, batch_size=16))
EXPERTS = "4:active=2:shared=1:width=12:dense_layers=0"


def sizes(config, name):
    found = mesh_choice.candidates(config, slices.get_slice(name))
    return {tuple(getattr(mesh, axis) for axis in mesh_choice.CHOSEN) for mesh in found}


def test_candidates_divide_the_model_and_the_batch():
    assert sizes(CONFIG, "cpu:8") == {(8, 1, 1), (4, 2, 1), (2, 4, 1), (1, 8, 1)}
    assert sizes(CONFIG.with_settings(mesh={"tensor": 2}), "cpu:8") == {(4, 1, 1), (2, 2, 1), (1, 4, 1)}
    whole = {(4, 1, 1), (2, 2, 1), (1, 4, 1)}
    assert sizes(CONFIG.with_settings(model={"experts": EXPERTS}), "cpu:4") == whole, "room for the worst case"
    split = {(2, 1, 2), (1, 2, 2), (1, 1, 4)}
    assert sizes(CONFIG.with_settings(model={"experts": f"{EXPERTS}:buffer=1.5"}), "cpu:4") == whole | split
    assert sizes(CONFIG.with_settings(model={"width": 36}), "cpu:8") == {(8, 1, 1), (4, 2, 1), (2, 4, 1)}
    with pytest.raises(InputError, match="No mesh along data, fsdp and expert suits cpu:8"):
        sizes(CONFIG.with_settings(data={"batch_size": 4}), "cpu:8")


def test_candidates_lie_on_whole_sides_of_the_torus():
    pytest.importorskip("libtpu", reason="libtpu, the TPU compiler, is not installed")
    assert sizes(CONFIG, "v5p:2x2x4") == {(16, 1, 1), (4, 4, 1), (2, 8, 1), (8, 2, 1), (1, 16, 1)}


def test_candidates_must_hold_their_parts_of_the_state():
    where = slices.get_slice("cpu:8")
    small = dataclasses.replace(where, chip=dataclasses.replace(where.chip, hbm=175_000))
    assert [mesh.fsdp for mesh in mesh_choice.candidates(CONFIG, small)] == [8, 4]


@pytest.mark.parametrize(
    ("residual", "mhc", "chosen"),
    [
        ({2: 1.0, 4: 2.0, 8: 3.0}, {2: True, 4: True, 8: True}, 2),
        ({2: 1.0, 4: 2.0, 8: 3.0}, {2: False, 4: True, 8: True}, 4),
        ({2: None, 4: 3.0, 8: 2.0}, {2: True, 4: True, 8: True}, 8),
        ({2: 1.0, 4: 2.0, 8: 3.0}, {2: False, 4: False, 8: False}, 8),
    ],
    ids=["fastest", "fits for all", "the fastest does not fit", "none fits"],
)
def test_the_fastest_mesh_that_fits_is_taken(monkeypatch, residual, mhc, chosen):
    """Steps take the given seconds, or do not fit (None).  The larger fsdp is, the less memory they need."""
    meshes = [MeshConfig(data=8 // fsdp, fsdp=fsdp) for fsdp in residual]
    monkeypatch.setattr(mesh_choice, "candidates", lambda config, where: meshes)

    def compiled(config, kinds):
        def row(kind):
            fsdp = config.mesh.fsdp
            fits = residual[fsdp] is not None if kind == "residual" else mhc[fsdp]
            seconds = {"step": residual[fsdp], "compute": 1.0, "collectives": 0.5}
            memory = {"connection": kind, "fits": fits, "needs": 2**34 // fsdp, "hbm": 2**34}
            return memory | ({"seconds": seconds} if fits else {})

        return [row(kind) for kind in kinds]

    mesh, rows = mesh_choice.best_mesh(CONFIG, ["residual", "mhc"], slices.get_slice("cpu:8"), compiled)
    assert mesh == MeshConfig(data=8 // chosen, fsdp=chosen)
    text = mesh_choice.markdown(rows, slices.get_slice("cpu:8"))
    assert text.startswith("Meshes of cpu:8, by the whole step with residual:")
    assert "| data 2, fsdp 4 |" in text
    if residual[2] is None:
        assert text.index("| fsdp 8 | 2000.0 | 1000.0 | 500.0 | 2.00 of 16.00 | yes |") < text.index(
            "| data 4, fsdp 2 |"
        )
        assert text.endswith("| data 4, fsdp 2 | | | | 8.00 of 16.00 | no |")


def test_gathers_by_all_reduces_are_told():
    def over(kind, axes, count, size):
        return {"kind": kind, "axes": axes, "group": 4, "count": count, "bytes": size, "seconds": 0.25}

    slow = [
        over("all-reduce", "fsdp", 3, 10**9),
        over("all-gather", "fsdp", 1, 10**9),
        over("all-gather", "data", 9, 10**9),
    ]
    sentence = compile_table.gathers_by_sums({"connection": "mhc", "collectives": slow})
    assert "mhc: parameters are gathered over fsdp by all-reduces" in sentence
    assert "(3 GB, 250 ms a step)" in sentence
    assert "--mesh=best" in sentence
    fast = [over("all-reduce", "data+fsdp", 1, 10**9), over("all-gather", "fsdp", 2, 10**9)]
    assert compile_table.gathers_by_sums({"connection": "mhc", "collectives": fast}) == ""
    assert compile_table.gathers_by_sums({"connection": "mhc"}) == "", "a step that does not fit has no collectives"


def test_the_command_takes_the_best_mesh(tmp_path, monkeypatch):
    monkeypatch.setenv("MHC_JAX_CACHE", str(tmp_path / "cache"))
    sizes = {"vocab_size": 64, "width": 32, "num_heads": 2, "num_kv_heads": 2, "mlp_width": 64, "num_layers": 1}
    flags = [f"--config={ROOT}/experiments/configs/demo.py:mhc", "--config.data.batch_size=4"]
    flags += ["--config.data.sequence_length=16", *(f"--config.model.{key}={size}" for key, size in sizes.items())]
    command = ("compile", *flags, "--topology=cpu:2", "--mesh=best", "--connections=residual")
    status, out, err = run_here(*command, f"--json={tmp_path / 'out.json'}")
    assert status == 0, err
    assert "Meshes of cpu:2, by the whole step with residual:" in out
    written = json.loads((tmp_path / "out.json").read_text())
    first, second = written["meshes"]
    assert {first["mesh"], second["mesh"]} == {"data 2", "fsdp 2"}
    assert first["seconds"]["step"] <= second["seconds"]["step"]
    assert f"cpu:2, 2 devices, mesh {first['mesh']};" in out
    assert err.count("compiled (") == 2, "the chosen step is not compiled again"


def test_a_mesh_of_another_number_of_devices_is_told():
    config = dataclasses.replace(CONFIG, mesh=MeshConfig(data=2))
    with pytest.raises(InputError, match=r"mesh \(data 2\) has 2 devices and cpu:8 has 8; set --config\.mesh\.fsdp=8"):
        compile_ahead.lower(config, slices.get_slice("cpu:8"), None)
