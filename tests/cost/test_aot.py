"""A train step compiled ahead of time: estimate on CPU devices, prices of kernels and links, largest batch, and the command."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import types
from typing import Any

import pytest
from support.in_process import run_here
from support.tiny_runs import ROOT

from mhc_jax import aot, cost, pod, topology
from mhc_jax.compiled import Collective, Instruction, Program, arrays
from mhc_jax.config import DataConfig, ExperimentConfig, ModelConfig, OptimizerConfig, PipelineConfig
from mhc_jax.connections import parse
from mhc_jax.errors import InputError
from mhc_jax.pipeline.estimates import Step
from mhc_jax.pipeline.executor import schedule_of
from mhc_jax.sharding import MeshConfig

MODEL = ModelConfig(
    vocab_size=64, width=32, num_layers=3, num_heads=2, num_kv_heads=2, mlp_width=64, connection=parse("residual")
)
CONFIG = ExperimentConfig(
    model=MODEL, data=DataConfig(sequence_length=16, batch_size=16), mesh=MeshConfig(data=2, fsdp=4)
)
V5P = topology.CHIPS["v5p"]


def test_a_mesh_in_words():
    assert aot.parse_mesh("data=2,fsdp=4", 8) == MeshConfig(data=2, fsdp=4)
    assert aot.parse_mesh("", 8) == MeshConfig(fsdp=8)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("fdsp=8", "An axis of --mesh is 'fdsp'.*Did you mean 'fsdp'"),
        ("fsdp", "write axis=size"),
        ("fsdp=4", "4 devices, and the topology has 8"),
    ],
)
def test_a_mesh_that_is_none_is_told(text, sentence):
    with pytest.raises(InputError, match=sentence):
        aot.parse_mesh(text, 8)


def test_attention_of_a_tpu_is_splash_where_it_can_be():
    wide = dataclasses.replace(MODEL, head_width=128, attention_kind="mla", compute_dtype="bfloat16")
    config = dataclasses.replace(CONFIG, model=wide, data=DataConfig(sequence_length=256, batch_size=8))
    assert aot.best_attention(config, "tpu").model.attention == "splash"
    assert aot.best_attention(config, "cpu").model.attention == "xla"
    for model in (dataclasses.replace(wide, rope_width=32), dataclasses.replace(wide, head_width=64)):
        assert aot.best_attention(dataclasses.replace(config, model=model), "tpu").model.attention == "xla"
    assert aot.best_attention(CONFIG, "tpu").model.attention == "xla", "16 tokens"


@pytest.fixture(scope="module")
def row():
    return aot.estimate(CONFIG, topology.get_slice("cpu:8"), None)


def test_estimate_holds_what_shapes_and_shardings_say(row):
    shapes, total = row["by_shape"], cost.model_cost(MODEL, 16).total * 4
    norms = 7 * 32 * 4
    assert shapes["parameters"] == (total - norms) / 4 + norms, "fsdp splits all but the norms"
    assert shapes["gradients"] == shapes["parameters"]
    assert shapes["optimizer state"] == pytest.approx(2 * shapes["parameters"], abs=100)
    # 2 of 16 sequences on a device; 6 sub-layers of one stream of 32, float32.
    assert shapes["streams"] == 2 * 16 * 6 * 32 * 4
    assert shapes["logits"] == 2 * 16 * 64 * 4
    assert row["memory"]["arguments"] == pytest.approx(shapes["parameters"] + shapes["optimizer state"], abs=2000)
    assert row["needs"] == row["memory"]["total"] > shapes["parameters"] * 3
    assert row["fits"]


def test_estimate_counts_the_flops_of_the_model(row):
    assert row["flops over model_cost"] == pytest.approx(1, rel=0.15)
    assert row["seconds"]["step"] == row["seconds"]["compute"] + row["seconds"]["collectives"]
    seconds = {key: row["seconds"][key] for key in ("compute", "collectives")}
    work = cost.model_cost(MODEL, 16).training_flops * 16 * 16 / (8 * topology.CPU.flops)
    assert row["mfu"] == pytest.approx(work / sum(seconds.values()))
    assert row["mfu, collectives hidden"] == pytest.approx(work / max(seconds.values()))


def test_estimate_names_the_axes_of_collectives(row):
    """Weights are gathered over fsdp layer by layer; gradients are summed over data too."""
    gathered = [one for one in row["collectives"] if one["kind"] == "all-gather"]
    assert {one["axes"] for one in gathered} == {"fsdp"}
    assert sum(one["count"] for one in gathered) >= 3 * 7, "seven weights of three layers"
    assert any("data" in one["axes"] for one in row["collectives"] if one["kind"] == "all-reduce")


@pytest.mark.parametrize(("remat", "kept"), [("none", 6), ("full", 3), ("connection", 3)])
def test_streams_that_are_kept(remat, kept):
    """Four streams of bfloat16, on 2 of 16 sequences, in two accumulation steps."""
    model = dataclasses.replace(MODEL, connection=parse("mhc:t_max=2"), stream_dtype="bfloat16", remat=remat)
    config = dataclasses.replace(CONFIG, model=model, optimizer=OptimizerConfig(accumulation_steps=2))
    nothing = types.SimpleNamespace(params={}, opt_state={})
    sizes = aot.by_shape(config, aot.Step(None, None, nothing))
    assert sizes["streams"] == kept * 16 * 4 * 32 * 2
    assert sizes["logits"] == 16 * 64 * 4


def kernel(line):
    name = line.split(" = ")[0]
    return Instruction(name, line.split(" = ")[1].split(" ")[0], "custom-call", (), line)


def test_kernels_are_priced():
    # 2 sequences a device, 2 heads: keys and values of 16; half of T x T.
    forward = kernel("splash_mqa_fwd_residuals.1 = bf16[2,16,16] custom-call()")
    assert aot.kernel_cost(CONFIG, forward) == (2 * 16 * 16 * 2 * 32, 0.0)
    own = kernel('mhc_read.1 = bf16[1] custom-call(), backend_config={"flops":"8","bytes_accessed":"6"}')
    assert aot.kernel_cost(CONFIG, own) == (8.0, 6.0)
    assert aot.kernel_cost(CONFIG, kernel("other.1 = bf16[1] custom-call()")) is None
    assert aot.kernel_cycles(V5P, (459e12, 1.0)) == V5P.clock
    assert aot.kernel_cycles(V5P, (1.0, 2.765e12)) == V5P.clock
    assert aot.kernel_cycles(V5P, None) == 0


@dataclasses.dataclass
class Device:
    id: int
    coords: list[int]


def test_links_are_those_of_the_torus():
    places = [[x, y, z] for z in range(4) for y in range(4) for x in range(4)]
    devices = tuple(Device(k, at) for k, at in enumerate(places))
    where = topology.Slice("v5p:4x4x4", V5P, (4, 4, 4), devices)

    class Mesh:
        class devices:  # noqa: N801
            flat = where.devices

    def seconds(kind, group):
        return aot.collective_seconds(Collective(kind, "", tuple(group), 1, 8_000_000), where, Mesh)

    assert seconds("all-gather", range(4)) == pytest.approx(6e6 / 200e9), "one ring, both ways"
    assert seconds("all-gather", range(16)) == pytest.approx(7.5e6 / 400e9)
    assert seconds("all-reduce", range(64)) == pytest.approx(2 * 8e6 * 63 / 64 / 600e9)
    assert seconds("all-to-all", range(4)) == pytest.approx(8e6 * 4 / 8 / 100e9)
    assert seconds("collective-permute", (0, 16)) == pytest.approx(8e6 / 200e9)


def test_what_does_not_fit_says_how_much_it_needs():
    text = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 120.50G of 95.74G hbm. Exceeded hbm capacity by 24.76G."
    error = aot.DoesNotFitError(text)
    assert (error.needs, error.has) == (int(120.5 * 2**30), int(95.74 * 2**30))
    assert aot.DoesNotFitError("RESOURCE_EXHAUSTED").needs is None


def test_a_result_is_kept_until_something_changes(tmp_path, monkeypatch):
    calls = []

    def work():
        calls.append(1)
        return {"needs": len(calls)}

    assert aot.cached({"a": 1}, tmp_path, work) == ({"needs": 1}, False)
    assert aot.cached({"a": 1}, tmp_path, work) == ({"needs": 1}, True)
    assert aot.cached({"a": 2}, tmp_path, work) == ({"needs": 2}, False)
    monkeypatch.setattr(aot, "sources", lambda: "changed")
    assert aot.cached({"a": 1}, tmp_path, work) == ({"needs": 3}, False)


@pytest.mark.parametrize(
    ("base", "slope", "extra", "expected"),
    [(10, 7, 0, 12), (10, 7, 8, 11), (95, 7, 0, 0), (90, 7, 0, 1), (10, 7, 200, 1)],
    ids=["linear", "more than linear", "none", "one", "far more"],
)
def test_the_largest_batch(base, slope, extra, expected):
    """`extra` bytes come on top from three sequences a device on."""
    asked = []

    def one(config):
        k = config.data.batch_size // (8 * 2)
        asked.append(k)
        needs = base + slope * k + (extra if k > 2 else 0)
        return {"needs": needs, "fits": needs <= 100}

    config = dataclasses.replace(CONFIG, optimizer=OptimizerConfig(accumulation_steps=2))
    found = pod.largest_batch(config, 100, one)
    assert found["per_device"] == expected
    assert found["sequences"] == 16 * expected
    assert expected < 2 or expected in asked, "it is compiled"
    assert len(asked) == 2 + bool(base + slope * 3 <= 100) + bool(expected == 11), "and nothing that need not be"


FLAGS = [f"--config={ROOT}/experiments/configs/demo.py:mhc", "--config.data.batch_size=4"]
FLAGS += ["--config.model.vocab_size=64", "--config.model.width=32", "--config.model.num_heads=2"]
FLAGS += ["--config.model.num_kv_heads=2", "--config.model.mlp_width=64", "--config.model.num_layers=1"]
FLAGS += ["--config.data.sequence_length=16"]


def test_the_table():
    def timed(kind, *seconds, **more):
        seconds = dict(zip(("compute", "collectives", "waiting", "step"), seconds, strict=True))
        return row | {"connection": kind, "seconds": seconds} | more

    shapes = dict.fromkeys(("parameters", "optimizer state", "gradients", "streams", "logits"), 2**29)
    memory = {"by_shape": shapes, "hbm": 4 * 2**30}
    row = memory | {"needs": 3 * 2**30, "fits": True, "flops": 5e12, "bytes": 6e9, "mfu": 0.4}
    row |= {"mfu, collectives hidden": 0.5, "kernels": {"splash": 1, "other (no estimate)": 2}}
    gather = {"kind": "all-gather", "axes": "fsdp", "group": 4, "count": 3, "bytes": 10**9, "seconds": 0.002}
    largest = {"sequences": 12, "per_device": 3, "predicted": 1, "needs": 2**30}
    gathers = [gather, {**gather, "bytes": 10**8}]
    rows = [
        timed("residual", 0.01, 0.01, 0.0, 0.02, collectives=[]),
        timed("mhc", 0.011, 0.008, 0.003, 0.022, collectives=gathers, largest_batch=largest),
        {"connection": "hc", **memory, "needs": None, "fits": False},
    ]
    text = pod.table(rows, topology.get_slice("cpu:8"))
    half = "0.50 | 0.50 | 0.50 | 0.50 | 0.50"
    assert (
        f"| mhc | {half} | 3.00 of 4.00 | yes | 5.00 | 6.0 | 11.0 | 8.0 | 3.0 | 22.0 | +10.0 % | 40.0 to 50.0 % |"
        in text
    )
    assert f"| hc | {half} | ? of 4.00 | no | | | | | | | | |" in text
    assert "| mhc | all-gather | fsdp | 4 | 6 | 3.30 | 4.0 |" in text
    assert "mhc: at most 12 sequences a step (3 a device and accumulation step), 1.00 GiB." in text
    assert "Kernels that count as no time: other (no estimate)." in text


def test_the_command(tmp_path, monkeypatch):
    monkeypatch.setenv("MHC_JAX_CACHE", str(tmp_path / "cache"))
    command = ("compile", *FLAGS, "--topology=cpu:2", "--connections=residual", f"--json={tmp_path / 'out.json'}")
    status, out, err = run_here(*command)
    assert status == 0, err
    assert "cpu:2, 2 devices, mesh fsdp 2; 4 x 16 tokens in 1 accumulation steps, attention xla" in out
    assert "| residual | all-gather | fsdp | 2 |" in out
    written = json.loads((tmp_path / "out.json").read_text())
    assert [row["connection"] for row in written["rows"]] == ["residual"]
    assert "compile: residual, 4 sequences: fits (" in err
    status, again, err = run_here(*command)
    assert (status, again) == (0, out)
    assert err.count("known (") == 1
    assert "compiled (" not in err


def test_mistakes_in_the_command_are_told(tmp_path, monkeypatch):
    monkeypatch.setenv("MHC_JAX_CACHE", str(tmp_path))
    status, _, err = run_here("compile", *FLAGS, "--topology=cpu:2", "--connections=residual,mch")
    assert status == 2
    assert "'mch'" in err
    assert "Did you mean 'mhc'" in err
    assert list(tmp_path.glob("compiled/*")) == []


STUCK = """
import runpy, sys, threading, types
from mhc_jax import aot
class Lowered:
    def compile(self, compiler_options):
        print("compiling", file=sys.stderr, flush=True)
        threading.Event().wait()
aot.lower = lambda *_: types.SimpleNamespace(lowered=Lowered())
aot.by_shape = lambda *_: {}
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_ctrl_c_is_answered_while_it_compiles(usual_sigint, tmp_path):
    """However long that takes: the compiler of this process never comes back."""
    env = {**os.environ, "XLA_FLAGS": "", "MHC_JAX_CACHE": str(tmp_path)}
    command = [sys.executable, "-c", STUCK, f"{ROOT}/experiments/compile.py", *FLAGS, "--connections=mhc"]
    process = subprocess.Popen([*command, "--topology=cpu:1"], cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True)
    assert any(line == "compiling\n" for line in process.stderr)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 130
    assert "interrupted" in err
    assert list(tmp_path.glob("compiled/*")) == []


def test_a_mesh_that_is_no_part_of_the_torus_is_told():
    pytest.importorskip("libtpu", reason="libtpu, the TPU compiler, is not installed")
    config = dataclasses.replace(
        CONFIG, mesh=MeshConfig(data=4, fsdp=16), data=DataConfig(sequence_length=16, batch_size=64)
    )
    with pytest.raises(InputError, match=r"mesh \(data 4, fsdp 16\) cannot be laid on v6e:8x8.*whole sides of 8 x 8"):
        aot.lower(config, topology.get_slice("v6e:8x8"), None)


TPU: dict[str, Any] = {"vocab_size": 256, "width": 128, "num_layers": 2, "num_heads": 1, "num_kv_heads": 1}
TPU |= {"head_width": 128, "mlp_width": 256, "compute_dtype": "bfloat16", "stream_dtype": "bfloat16"}


def tpu_row(name, implementation, sequence_length, batch_size, mesh, model, **more):
    """The estimate of these layers on a slice."""
    pytest.importorskip("libtpu", reason="libtpu, the TPU compiler, is not installed")
    data = DataConfig(sequence_length=sequence_length, batch_size=batch_size)
    config = ExperimentConfig(model=dataclasses.replace(MODEL, **TPU | model), data=data, mesh=mesh, **more)
    return config, aot.estimate(config, topology.get_slice(name), implementation)


def test_a_step_for_tpus():
    """Two layers on four v6e: Pallas kernels of mHC and of attention, priced, and estimated cycles."""
    _, row = tpu_row("v6e:2x2", None, 128, 4, MeshConfig(fsdp=4), {"connection": parse("mhc")})
    assert row["fits"]
    assert row["cycles"] > 0
    assert row["kernels"]["mhc_write_read"] >= 4
    assert not any("no estimate" in name for name in row["kernels"])
    assert {one["axes"] for one in row["collectives"]} == {"fsdp"}


def test_experts_for_tpus_multiply_each_row_once():
    """Of 16 experts a token sees 2: the FLOPs of a step are those of the active parameters, not of all."""
    experts = {"num_experts": 16, "num_active_experts": 2, "num_shared_experts": 0, "expert_width": 128}
    experts |= {"num_dense_layers": 0, "expert_buffer": 1.0}
    _, row = tpu_row("v6e:2x2", "xla", 256, 4, MeshConfig(fsdp=2, expert=2), experts)
    kernels = {name: times for name, times in row["kernels"].items() if "gmm" in name}
    assert kernels == {"gmm": 2 * 6, "tgmm": 2 * 3}, "three products forward, six backward, a layer"
    assert row["flops over model_cost"] == pytest.approx(1, rel=0.2)


@pytest.mark.parametrize("schedule", ["1f1b", "dualpipe"])
def test_a_pipeline_on_v5p(schedule, monkeypatch):
    """Messages, one up and one down a tick, are under way while the operation computes; sums and buffers are changed in place."""
    texts: list[Program] = []

    class Remembered(Program):
        def __init__(self, text):
            super().__init__(text)
            texts.append(self)

    monkeypatch.setattr(aot, "Program", Remembered)
    more = {"optimizer": OptimizerConfig(accumulation_steps=8)}
    more |= {"pipeline": PipelineConfig(schedule=schedule, overlap=True)}
    config, row = tpu_row("v5p:2x2x1", "xla", 128, 8, MeshConfig(stage=4), {"num_layers": 4}, **more)
    assert row["flops over model_cost"] == pytest.approx(1, rel=0.1)
    found = row["pipeline"]["messages"]
    assert (found["a tick"], found["asynchronous"], found["hidden"]) == (2, 2, 2)
    step = Step(texts[0], schedule_of(config), leading=False)
    for conditional in step.phases:
        for branch in conditional.branches():
            assert passed_on_as_copies(texts[0].bodies[branch]) == [], branch


def passed_on_as_copies(body):
    """Arrays of 64 KiB or more that a branch gives back as they came, in another place; to another layout is another matter."""
    told = {name for one in body.values() if one.line.lstrip().startswith("ROOT") for name in one.operands}
    copies = [
        one for name, one in body.items() if name in told and one.opcode == "copy" and arrays(one.shape)[0] >= 2**16
    ]
    sources = [body[one.operands[0]] for one in copies]
    return [source.shape for source, one in zip(sources, copies, strict=True) if source.shape == one.shape]
