"""Train steps compiled ahead of time: slices, estimates on CPU devices, prices of kernels and links, and the command."""

import dataclasses
import importlib.util
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import types
from typing import Any

import jax
import pytest
from support.in_process import run_here
from support.tiny_runs import PATIENCE_S, ROOT

from mhc_jax.config import DataConfig, ExperimentConfig, MeshConfig, ModelConfig, OptimizerConfig, PipelineConfig
from mhc_jax.connections import parse
from mhc_jax.cost import counts
from mhc_jax.cost.hlo import Collective, Instruction, Program, arrays
from mhc_jax.errors import InputError
from mhc_jax.pipeline.executor import schedule_of
from mhc_jax.planning import compile_ahead, compile_table, estimate_cache, slices, step_estimate
from mhc_jax.planning.compiled_pipeline import CompiledPipeline
from mhc_jax.train_step import TPU_OPTIONS

MODEL = ModelConfig(64, 32, 3, num_heads=2, num_kv_heads=2, mlp_width=64, connection=parse("residual"))
DATA = DataConfig(sequence_length=16, batch_size=16)
CONFIG = ExperimentConfig(model=MODEL, data=DATA, mesh=MeshConfig(data=2, fsdp=4))
V5P = slices.CHIPS["v5p"]
WRONG = {
    "v5f:4x4": "chip of --topology is 'v5f'; it must be one of 'v4', 'v5e', 'v5p', 'v6e', 'cpu'. Did you mean 'v5",
    "v5p": "--topology is 'v5p'; v5p has 3 sides, as in v5p:4x4x4",
    "v5p:16x16": "--topology is 'v5p:16x16'; v5p has 3 sides",
    "v5e:4x4x4": "v5e has 2 sides, as in v5e:8x8",
    "v6e:0x8": "v6e has 2 sides",
    "v5e:16x32": "512 chips; the largest slice of v5e has 256",
    "cpu:999": "this process has 8 CPU devices; set XLA_FLAGS=--xla_force_host_platform_device_count=999",
}


@pytest.mark.parametrize(("platform", "options"), [("cpu", None), ("gpu", None), ("tpu", TPU_OPTIONS)])
def test_a_train_step_is_compiled_with_the_options_of_its_platform(platform, options, monkeypatch):
    given, jit = [], jax.jit
    monkeypatch.setattr(jax, "jit", lambda *args, **named: given.append(named.get("compiler_options", 0)) or jit(*args))
    where = slices.get_slice("cpu:8")
    monkeypatch.setattr(slices.Slice, "platform", platform)
    compile_ahead.lower(CONFIG, where, "xla")
    assert [one for one in given if one != 0] == [options]


@pytest.mark.parametrize("name", WRONG)
def test_unknown_topologies_are_refused(name):
    jax.devices()  # from here on there are 8, and no setting makes more
    with pytest.raises(InputError, match=WRONG[name].replace("(", r"\(")):
        slices.get_slice(name)


def test_without_libtpu_it_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="libtpu, the TPU compiler, is not installed; run `make aot`"):
        slices.get_slice("v6e:2x2")


@pytest.mark.parametrize("chip", slices.CHIPS.values(), ids=lambda chip: chip.name)
def test_clock_is_the_peak_over_the_matrix_units(chip):
    units = {"v4": 4 * 128**2, "v5e": 4 * 128**2, "v5p": 8 * 128**2, "v6e": 4 * 256**2}[chip.name]
    assert chip.flops / (2 * units) == pytest.approx(chip.clock, rel=3e-3)
    assert chip.flops_cycles(chip.flops) == chip.clock == chip.bytes_cycles(chip.bandwidth)


def test_bandwidth_is_that_of_the_ports_a_group_spans():
    slice_ = slices.Slice("v5p:4x8x2", V5P, (4, 8, 2), ())
    assert slice_.bandwidth((4, 1, 1)) == pytest.approx(200e9)
    assert slice_.bandwidth((4, 8, 1)) == pytest.approx(400e9)
    assert slice_.bandwidth((1, 1, 2)) == pytest.approx(100e9), "a side of 2 is a line"
    v6e = slices.Slice("v6e:8x8", slices.CHIPS["v6e"], (8, 8), ())
    assert v6e.bandwidth((8, 1)) == pytest.approx(112e9), "only sides of 16 close"


SLICES = [("cpu:4", 4), ("v5p:2x2x2", 8), ("v4:2x2x1", 8), ("v6e:1x1", 1), ("v5e:2x4", 8)]


@pytest.mark.parametrize(("name", "devices"), SLICES)
def test_devices_of_a_slice(name, devices):
    platform = "cpu" if name == "cpu:4" else "tpu"
    if platform == "tpu":
        pytest.importorskip("libtpu", reason="libtpu, the TPU compiler, is not installed")
    slice_ = slices.get_slice(name)
    assert (slice_.platform, len(slice_.devices)) == (platform, devices)
    chips = {slice_.coordinates(device) for device in slice_.devices}
    assert len(chips) * slice_.chip.devices == devices
    assert max(chips) == tuple(side - 1 for side in slice_.sides)


def test_attention_of_a_tpu_is_splash_where_it_can_be():
    wide = dataclasses.replace(MODEL, head_width=128, attention_kind="mla", compute_dtype="bfloat16")
    config = dataclasses.replace(CONFIG, model=wide, data=DataConfig(sequence_length=256, batch_size=8))
    assert compile_ahead.best_attention(config, "tpu").model.attention == "splash"
    assert compile_ahead.best_attention(config, "cpu").model.attention == "xla"
    for model in (
        dataclasses.replace(wide, attention_kind="mla:rope_width=32"),
        dataclasses.replace(wide, head_width=64),
    ):
        assert compile_ahead.best_attention(dataclasses.replace(config, model=model), "tpu").model.attention == "xla"
    assert compile_ahead.best_attention(CONFIG, "tpu").model.attention == "xla", "16 tokens"


@pytest.fixture(scope="module")
def row():
    return step_estimate.estimate(CONFIG, slices.get_slice("cpu:8"), None)


def test_estimate_holds_what_shapes_and_shardings_say(row):
    shapes, total = row["by_shape"], counts.model_cost(MODEL, 16).total * 4
    norms = 7 * 32 * 4
    assert shapes["gradients"] == shapes["parameters"] == (total - norms) / 8 + norms, "all is split but the norms"
    assert shapes["optimizer state"] == pytest.approx(2 * shapes["parameters"], abs=100)
    # 2 of 16 sequences on a device; 6 sub-layers of one stream of 32, float32.
    assert (shapes["streams"], shapes["logits"]) == (2 * 16 * 6 * 32 * 4, 2 * 16 * 64 * 4)
    assert row["memory"]["arguments"] == pytest.approx(shapes["parameters"] + shapes["optimizer state"], abs=2000)
    assert row["needs"] == row["memory"]["total"] > shapes["parameters"] * 3
    assert row["fits"]
    # Weights are gathered over data once and over fsdp layer by layer; gradients are summed over data too.
    counted = dict.fromkeys(("data", "fsdp"), 0)
    for one in row["collectives"]:
        if one["kind"] == "all-gather":
            counted[one["axes"]] += one["count"]
    assert counted["data"] == 7 + 2, "seven stacked weights and both embeddings"
    assert counted["fsdp"] >= 3 * 7, "seven weights of three layers"
    assert any("data" in one["axes"] for one in row["collectives"] if one["kind"] == "all-reduce")


def test_estimate_counts_the_flops_of_the_model(row):
    assert row["flops over model_cost"] == pytest.approx(1, rel=0.15)
    assert row["seconds"]["step"] == row["seconds"]["compute"] + row["seconds"]["collectives"]
    seconds = {key: row["seconds"][key] for key in ("compute", "collectives")}
    work = counts.model_cost(MODEL, 16).training_flops * 16 * 16 / (8 * slices.CPU.flops)
    assert row["mfu"] == pytest.approx(work / sum(seconds.values()))
    assert row["mfu, collectives hidden"] == pytest.approx(work / max(seconds.values()))


@pytest.mark.parametrize(("remat", "kept"), [("none", 6), ("full", 3), ("connection", 3)])
def test_streams_that_are_kept(remat, kept):
    """A device has 1 of 16 sequences in each of two accumulation steps, with four streams of bfloat16."""
    model = dataclasses.replace(MODEL, connection=parse("mhc:t_max=2"), stream_dtype="bfloat16", remat=remat)
    config = dataclasses.replace(CONFIG, model=model, optimizer=OptimizerConfig(accumulation_steps=2))
    sizes = step_estimate.by_shape(config, types.SimpleNamespace(params={}, opt_state={}))
    assert (sizes["streams"], sizes["logits"]) == (kept * 16 * 4 * 32 * 2, 16 * 64 * 4)


def test_kernels_are_priced():
    """Attention computes q k and P v, and backward q k, dO v, P dO, dS k and dS q, each over half of T x T; heads are 16 wide."""

    def kernel(name, rest=""):
        return Instruction(name, "bf16[1]", "custom-call", (), f"{name} = bf16[1] custom-call(){rest}")

    for name, products in (("fwd_residuals", 2), ("dkv_fused", 5)):  # 2 sequences a device, 2 heads
        flops = 2 * 2 * products * 2 * (16 * 16 / 2) * 16
        assert step_estimate.kernel_cost(CONFIG, kernel(f"splash_mqa_{name}.1")) == (flops, 0.0)
    own = kernel("mhc_read.1", ', backend_config={"flops":"8","bytes_accessed":"6"}')
    assert step_estimate.kernel_cost(CONFIG, own) == (8.0, 6.0)
    assert step_estimate.kernel_cost(CONFIG, kernel("other.1")) is None
    assert (
        step_estimate.kernel_cycles(V5P, (459e12, 1.0))
        == step_estimate.kernel_cycles(V5P, (1.0, 2.765e12))
        == V5P.clock
    )
    assert step_estimate.kernel_cycles(V5P, None) == 0


def test_links_are_those_of_the_torus():
    places = [(x, y, z) for z, y, x in itertools.product(range(4), repeat=3)]
    devices = tuple(types.SimpleNamespace(id=k, coords=list(at)) for k, at in enumerate(places))
    where = slices.Slice("v5p:4x4x4", V5P, (4, 4, 4), devices)
    mesh = types.SimpleNamespace(devices=types.SimpleNamespace(flat=devices))

    def seconds(kind, group):
        return step_estimate.collective_seconds(Collective(kind, "", tuple(group), 1, 8_000_000), where, mesh)

    assert seconds("all-gather", range(4)) == pytest.approx(6e6 / 200e9), "one ring, both ways"
    assert seconds("all-gather", range(16)) == pytest.approx(7.5e6 / 400e9)
    assert seconds("all-reduce", range(64)) == pytest.approx(2 * 8e6 * 63 / 64 / 600e9)
    assert seconds("all-to-all", range(4)) == pytest.approx(8e6 * 4 / 8 / 100e9)
    assert seconds("collective-permute", (0, 16)) == pytest.approx(8e6 / 200e9)


def test_what_does_not_fit_says_how_much_it_needs():
    error = compile_ahead.DoesNotFitError("RESOURCE_EXHAUSTED: Ran out of memory. Used 120.50G of 95.74G hbm.")
    assert (error.needs, error.has) == (int(120.5 * 2**30), int(95.74 * 2**30))
    assert compile_ahead.DoesNotFitError("RESOURCE_EXHAUSTED").needs is None


def test_a_result_is_kept_until_something_changes(tmp_path, monkeypatch):
    calls = itertools.count(1)

    def work():
        return {"needs": next(calls)}

    assert estimate_cache.cached({"a": 1}, tmp_path, work) == ({"needs": 1}, False)
    assert estimate_cache.cached({"a": 1}, tmp_path, work) == ({"needs": 1}, True)
    assert estimate_cache.cached({"a": 2}, tmp_path, work) == ({"needs": 2}, False)
    monkeypatch.setattr(estimate_cache, "sources", lambda: "changed")
    assert estimate_cache.cached({"a": 1}, tmp_path, work) == ({"needs": 3}, False)


@pytest.mark.parametrize(
    ("base", "slope", "extra", "expected"),
    [(10, 7, 0, 12), (10, 7, 8, 11), (95, 7, 0, 0), (90, 7, 0, 1), (10, 7, 200, 1)],
    ids=["linear", "more than linear", "none", "one", "far more"],
)
def test_the_largest_batch(base, slope, extra, expected):
    """From three sequences per device on, a step needs `extra` bytes more than the line."""
    asked = []

    def one(config):
        k = config.data.batch_size // (8 * 2)
        asked.append(k)
        needs = base + slope * k + (extra if k > 2 else 0)
        return {"needs": needs, "fits": needs <= 100}

    config = dataclasses.replace(CONFIG, optimizer=OptimizerConfig(accumulation_steps=2))
    found = compile_table.largest_batch(config, 100, one)
    assert (found["per_device"], found["sequences"]) == (expected, 16 * expected)
    assert expected < 2 or expected in asked, "it is compiled"
    assert len(asked) == 2 + bool(base + slope * 3 <= 100) + bool(expected == 11), "and nothing that need not be"


FLAGS = [f"--config={ROOT}/experiments/configs/demo.py:mhc"]
SIZES = {"vocab_size": 64, "width": 32, "num_heads": 2, "num_kv_heads": 2, "mlp_width": 64, "num_layers": 1}
FLAGS += [f"--config.model.{key}={size}" for key, size in SIZES.items()]
FLAGS += ["--config.data.batch_size=4", "--config.data.sequence_length=16"]


def test_the_table():
    def timed(kind, *seconds, **more):
        seconds = dict(zip(("compute", "collectives", "waiting", "step"), seconds, strict=True))
        return row | {"connection": kind, "seconds": seconds} | more

    shapes = dict.fromkeys(("parameters", "optimizer state", "gradients", "streams", "logits"), 2**29)
    memory = {"by_shape": shapes, "hbm": 4 * 2**30}
    row = memory | {"needs": 3 * 2**30, "fits": True, "flops": 5e12, "bytes": 6e9, "mfu": 0.4}
    row |= {"mfu, collectives hidden": 0.5, "kernels": {"splash": 1, "other (no estimate)": 2}}
    gather = {"kind": "all-gather", "axes": "fsdp", "group": 4, "count": 3, "seconds": 0.002}
    gathers = [{**gather, "bytes": size} for size in (10**9, 10**8)]
    largest = {"sequences": 12, "per_device": 3, "needs": 2**30}
    rows = [
        timed("residual", 0.01, 0.01, 0.0, 0.02, collectives=[]),
        timed("mhc", 0.011, 0.008, 0.003, 0.022, collectives=gathers, largest_batch=largest),
        {"connection": "hc", **memory, "needs": None, "fits": False},
    ]
    text = compile_table.markdown(rows, slices.get_slice("cpu:8"))
    half = "0.50 | 0.50 | 0.50 | 0.50 | 0.50"
    for part in (
        f"| mhc | {half} | 3.00 of 4.00 | yes | 5.00 | 6.0 | 11.0 | 8.0 | 3.0 | 22.0 | +10.0 % | 40.0 to 50.0 % |",
        f"| hc | {half} | ? of 4.00 | no | | | | | | | | |",
        "| mhc | all-gather | fsdp | 4 | 6 | 3.30 | 4.0 |",
        "mhc: at most 12 sequences a step (3 a device and accumulation step), 1.00 GiB.",
        "Kernels that count as no time: other (no estimate).",
    ):
        assert part in text


def test_the_command(tmp_path, monkeypatch):
    monkeypatch.setenv("MHC_JAX_CACHE", str(tmp_path / "cache"))
    command = (
        "compile",
        *FLAGS,
        "--topology=cpu:2",
        "--config.mesh.fsdp=2",
        "--connections=residual",
        f"--json={tmp_path / 'out.json'}",
    )
    status, out, err = run_here(*command)
    assert status == 0, err
    assert "cpu:2, 2 devices, mesh fsdp 2; 4 x 16 tokens in 1 accumulation steps, attention xla" in out
    assert "| residual | all-gather | fsdp | 2 |" in out
    assert [row["connection"] for row in json.loads((tmp_path / "out.json").read_text())["rows"]] == ["residual"]
    assert "compile: residual, 4 sequences: fits (" in err
    status, again, err = run_here(*command)
    assert (status, again) == (0, out)
    assert err.count("known (") == 1
    assert "compiled (" not in err


def test_mistakes_in_the_command_are_told(tmp_path, monkeypatch):
    monkeypatch.setenv("MHC_JAX_CACHE", str(tmp_path))
    status, _, err = run_here("compile", *FLAGS, "--topology=cpu:2", "--connections=residual,mch")
    assert status == 2
    assert re.search("'mch'.*Did you mean 'mhc'", err)
    status, _, err = run_here("compile", *FLAGS, "--topology=cpu:2", "--mesh=best", "--connections=")
    assert (status, "--connections is empty; name at least one" in err) == (2, True)
    status, _, err = run_here("compile", *FLAGS, "--topology=cpu:2", f"--json={tmp_path}/none/file.json")
    assert (status, "none' for the file of --json; make it first" in err) == (2, True)
    assert list(tmp_path.glob("compiled/*")) == []


STUCK = """
import runpy, sys, threading, types
from mhc_jax.planning import step_estimate
class Lowered:
    def compile(self):
        print("compiling", file=sys.stderr, flush=True)
        threading.Event().wait()
step_estimate.lower = lambda *_: types.SimpleNamespace(lowered=Lowered(), state=None)
step_estimate.by_shape = lambda *_: {}
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_ctrl_c_is_answered_while_it_compiles(usual_sigint, tmp_path):
    """The compiler of this process never returns."""
    env = {**os.environ, "XLA_FLAGS": "", "MHC_JAX_CACHE": str(tmp_path)}
    command = [sys.executable, "-c", STUCK, f"{ROOT}/experiments/compile.py", *FLAGS, "--connections=mhc"]
    process = subprocess.Popen([*command, "--topology=cpu:1"], cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True)
    try:
        assert any(line == "compiling\n" for line in process.stderr)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=PATIENCE_S)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "interrupted" in err
    assert list(tmp_path.glob("compiled/*")) == []


def test_a_mesh_that_is_no_part_of_the_torus_is_told():
    pytest.importorskip("libtpu", reason="libtpu, the TPU compiler, is not installed")
    data = dataclasses.replace(DATA, batch_size=64)
    config = dataclasses.replace(CONFIG, mesh=MeshConfig(data=4, fsdp=16), data=data)
    with pytest.raises(InputError, match=r"mesh \(data 4, fsdp 16\) cannot be laid on v6e:8x8.*whole sides of 8 x 8"):
        compile_ahead.lower(config, slices.get_slice("v6e:8x8"), None)


TPU: dict[str, Any] = {"vocab_size": 256, "width": 128, "num_layers": 2, "num_heads": 1, "num_kv_heads": 1}
TPU |= {"head_width": 128, "mlp_width": 256, "compute_dtype": "bfloat16", "stream_dtype": "bfloat16"}


def tpu_row(name, implementation, sequence_length, batch_size, mesh, model, **more):
    """Configuration of two layers, and its estimate on a slice."""
    pytest.importorskip("libtpu", reason="libtpu, the TPU compiler, is not installed")
    data = DataConfig(sequence_length=sequence_length, batch_size=batch_size)
    config = ExperimentConfig(model=dataclasses.replace(MODEL, **TPU | model), data=data, mesh=mesh, **more)
    return config, step_estimate.estimate(config, slices.get_slice(name), implementation)


def test_a_step_for_tpus():
    """Two layers on four v6e have priced Pallas kernels of mHC and of attention, and estimated cycles."""
    _, row = tpu_row("v6e:2x2", None, 128, 4, MeshConfig(fsdp=4), {"connection": parse("mhc")})
    assert row["fits"]
    assert row["cycles"] > 0
    assert row["kernels"]["mhc_write_read"] >= 4
    assert not any("no estimate" in name for name in row["kernels"])
    assert {one["axes"] for one in row["collectives"]} == {"fsdp"}


def test_experts_for_tpus_multiply_each_row_once():
    """A token sees 2 of 16 experts, so the FLOPs of a step are those of the active parameters."""
    experts = {"experts": "16:active=2:shared=0:width=128:dense_layers=0:buffer=1"}
    _, row = tpu_row("v6e:2x2", "xla", 256, 4, MeshConfig(fsdp=2, expert=2), experts)
    kernels = {name: times for name, times in row["kernels"].items() if "gmm" in name}
    assert kernels == {"gmm": 2 * 6, "tgmm": 2 * 3}, "three products forward, six backward, a layer"
    assert row["flops over model_cost"] == pytest.approx(1, rel=0.2)


@pytest.mark.parametrize("schedule", ["1f1b", "dualpipe"])
def test_a_pipeline_on_v5p(schedule, monkeypatch):
    """The messages of a tick (DualPipe: two each way) travel while it computes; sums and buffers are changed in place."""
    programs = []

    class Remembered(Program):
        def __init__(self, text):
            super().__init__(text)
            programs.append(self)

    monkeypatch.setattr(step_estimate, "Program", Remembered)
    more = {"optimizer": OptimizerConfig(accumulation_steps=8)}
    more |= {"pipeline": PipelineConfig(schedule=schedule, overlap=True)}
    config, row = tpu_row("v5p:2x2x1", "xla", 128, 8, MeshConfig(stage=4), {"num_layers": 4}, **more)
    assert row["flops over model_cost"] == pytest.approx(1, rel=0.1)
    found = row["pipeline"]["messages"]
    count = 4 if schedule == "dualpipe" else 2
    assert (found["a tick"], found["asynchronous"], found["hidden"]) == (count, count, count)
    for conditional in CompiledPipeline(programs[0], schedule_of(config), leading=False).phases:
        for branch in conditional.branches():
            assert passed_on_as_copies(programs[0].bodies[branch]) == [], branch


def passed_on_as_copies(body):
    """Arrays of 64 KiB or more that a branch returns unchanged as a copy in the same layout."""
    told = {name for one in body.values() if one.line.lstrip().startswith("ROOT") for name in one.operands}
    copies = [one for name, one in body.items() if name in told and one.opcode == "copy"]
    same = [one.shape for one in copies if one.shape == body[one.operands[0]].shape]
    return [shape for shape in same if arrays(shape)[0] >= 2**16]
