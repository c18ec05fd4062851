"""The report of a device: what a cut, a crash and a failure leave, what was predicted, and PyTorch's steps against ours."""

import importlib
import json
import os
import re
import signal
import types

import pytest
from mhc_kernels.gpu_inspect import Resources
from mhc_kernels.ops.arg_specs import OPS, SPECS, ArgSpec, floor_bytes
from support.tiny_runs import ROOT, run_script

from mhc_jax.cost import memory_io
from mhc_jax.timing import device_report, predictions, step_times, torch_steps

ENVIRONMENT = {"device": "cpu", "commit": "c", "packages": {"jax": "1"}, "date": "d", "python": "3", "dirty": False}
PREDICTED = json.loads((ROOT / "experiments" / "records" / "first-light-predictions" / "predictions.json").read_text())


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "experiments"))
    return importlib.import_module("device_report")


class FakeWorker:
    """Answers at once, on a clock by which a part takes 200 s; a part fails if its name is in `failing`."""

    now = 0.0
    failing: tuple[str, ...] = ()
    started = 0

    def __init__(self, args, seconds=0.0):
        type(self).started += 1
        self.environment, self.alive = ENVIRONMENT, True

    def can_measure(self, key):
        return self.alive

    def ask(self, key, report, seconds):
        type(self).now += 200.0
        if key in self.failing:
            self.alive = False
            raise importlib.import_module("device_report").PartError("out of registers")
        report["copy_bytes_per_s"] = 1e9
        return []

    def end(self):
        self.alive = False


def test_a_report_goes_on_after_a_cut_and_tries_what_failed_again(script, tmp_path, monkeypatch, capsys):
    """Each call has time for three parts.  The second part fails, in the first call only, and is tried again at the end."""
    monkeypatch.setattr(script, "Worker", FakeWorker)
    monkeypatch.setattr(script, "time", types.SimpleNamespace(monotonic=lambda: FakeWorker.now))
    plan = [key for key in device_report.plan(True) if key.startswith(("correct", "bench"))]
    monkeypatch.setattr(device_report, "plan", lambda tiny: plan)
    monkeypatch.setattr(FakeWorker, "failing", (plan[1],))
    monkeypatch.setattr(FakeWorker, "started", 0)
    call = ["--tiny", "--rounds=1", f"--workdir={tmp_path}"]
    tried = []
    for turn in range(-(-len(plan) // 3) + 1):
        assert script.main(call) == 0
        report = json.loads((tmp_path / "report.json").read_text())
        tried.append(list(report["parts"]))
        text = (tmp_path / "README.md").read_text()
        if not turn:
            assert tried[0] == plan[:3]
            assert FakeWorker.started == 2, "the part that failed ended its process"
            assert report["left"] == [*plan[3:], plan[1]]
            assert "Not done within the budget: " + ", ".join(plan[3:]) in text
            assert f"`{plan[1]}`:\n\n```\nout of registers" in text
            monkeypatch.setattr(FakeWorker, "failing", ())
    assert report["left"] == []
    assert set(tried[-1]) == set(plan)
    assert "Parts that failed" not in text
    (tmp_path / "report.json").write_text(json.dumps({**report, "tiny": False}))
    with pytest.raises(SystemExit) as end:
        script.main(call)
    assert end.value.code == 2
    assert "holds the report of another device, commit or size" in capsys.readouterr().err


def test_a_part_begins_only_if_the_budget_has_its_time(script, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "Worker", FakeWorker)
    monkeypatch.setattr(script, "time", types.SimpleNamespace(monotonic=lambda: FakeWorker.now))
    monkeypatch.setattr(device_report, "plan", lambda tiny: ["train/one_gpu", "correct/27b/read"])
    script.main(["--budget=120", f"--workdir={tmp_path}"])
    assert list(json.loads((tmp_path / "report.json").read_text())["parts"]) == ["correct/27b/read"]


@pytest.mark.full
def test_a_worker_tells_why_a_part_failed_and_that_it_was_killed(script):
    worker = script.Worker(types.SimpleNamespace(rounds=1))
    try:
        assert worker.environment["device"].startswith("cpu")
        with pytest.raises(script.PartError, match="KeyError: 'unknown'"):
            worker.ask("correct/unknown/read", {"parts": {}}, 100)
        assert worker.can_measure("bench/tiny/read")
        assert not worker.can_measure("train/tiny"), "training wants a process of its own"
        os.kill(worker.process.pid, signal.SIGKILL)
        with pytest.raises(script.PartError, match="the process ended with status -9"):
            worker.ask("correct/tiny/read", {"parts": {}}, 100)
        assert not worker.can_measure("correct/tiny/read")
    finally:
        worker.end()


@pytest.mark.slow
def test_device_report_of_this_cpu(tmp_path):
    status, _, err = run_script("device_report", "--tiny", "--rounds=2", f"--workdir={tmp_path}")
    assert status == 0, err
    report = json.loads((tmp_path / "report.json").read_text())
    assert set(report["left"]) <= {"peer/tiny"}  # if there is no torch
    assert report["parts"]["train/tiny"]["max_composite_forward"] == pytest.approx(1, abs=1e-3)
    steps = {row["name"]: row for row in report["parts"]["step/tiny"]["steps"]}
    assert {name for name, row in steps.items() if row["status"] == "ok"} == {
        "residual",
        "identity:init=residual",
        "mhc:init=paper xla",
        "hc xla",
    }
    assert steps["residual"]["overhead"] == 0
    assert steps["mhc:init=paper xla"]["overhead"] == pytest.approx(
        steps["mhc:init=paper xla"]["ms"] / steps["residual"]["ms"] - 1
    )
    assert steps["mhc:init=paper pallas_gpu"]["status"].startswith("it needs a GPU")
    assert report["parts"]["gradient/tiny"] == {"mhc:init=paper xla": []}
    assert report["parts"]["repeat/tiny/write_read"] == {"xla": []}
    headings = re.findall(r"^## ([^:\n]*)", (tmp_path / "README.md").read_text(), re.MULTILINE)
    assert set(headings) >= {"Against float64", "Operations", "Train step", "Repeated calls"}


def test_device_report_names_only_known_parts_and_the_papers_layers():
    for keys in map(device_report.plan, (True, False)):
        assert len(set(keys)) == len(keys)
        for key in keys:
            what, name, op = (*key.split("/"), "")[:3]
            if what == "train":
                assert name == "tiny" or (ROOT / "experiments" / "configs" / f"{name}.py").exists()
                continue
            known = step_times.LAYERS if what in ("step", "gradient", "peer") else SPECS
            assert name in known
            assert op in (("",) if known is step_times.LAYERS else OPS)
    for name, width, expert in (("3b", 1280, 896), ("27b", 2560, 1536)):
        model = step_times.config_of(step_times.LAYERS[name], "mhc", 1).model
        assert (model.width, model.mlp_width, model.head_dim) == (width, 8 * expert, 128)
        assert (model.compute_dtype, model.stream_dtype) == ("bfloat16", "bfloat16")

    blocks = step_times.LAYERS["304m"]
    attention, feed_forward = (
        4 * blocks.width * blocks.num_heads * blocks.head_width,
        3 * blocks.width * blocks.mlp_width,
    )
    assert round(blocks.num_layers * (attention + feed_forward) / 1e6) == 304


def test_programs_that_fit_a_multiprocessor():
    made = {"name": "k", "spills": 0, "moved": 0, "loads": {}, "stores": {}}
    fits = lambda **given: Resources(**made, **given).programs  # noqa: E731
    assert fits(registers=255, warps=4, shared=0) == 2  # 256 x 128 of 65,536 registers
    assert fits(registers=32, warps=4, shared=0) == 16
    assert fits(registers=32, warps=4, shared=56 * 1024) == 4  # 57 of 228 KiB each
    assert fits(registers=16, warps=1, shared=0) == 32


def test_predicted_times_of_kernels():
    spec = ArgSpec("by hand", 1000, 4, 1024)
    seconds = lambda name, moved: predictions.kernel_seconds({"name": name, "moved": moved}, spec)  # noqa: E731
    assert seconds("mhc_write_forward", 3e12 * 0.85) == pytest.approx(1 + 3e-6)
    # 3 products of 1000 x 4096 by 4096 x 32, at 400 TFLOP/s.
    assert seconds("mhc_coefficients_forward", 0) == pytest.approx(3 * 2 * 1000 * 4096 * 32 / 4e14 + 3e-6)
    # 20 pairs to the last scalings; 50 = 20^2 / (2 4) to the beginnings of segments; 20 inside segments, and 20 back.
    assert seconds("mhc_sinkhorn_backward", 0) == pytest.approx((20 + 50 + 20 + 20) * 0.3e-6 + 3e-6)
    larger = ArgSpec("by hand", 16384, 4, 2560)
    again = 2 * 16384 * 4 * 2560 - 50e6  # bytes of x' that the cache does not hold
    forward = predictions.kernel_seconds({"name": "mhc_write_read_forward", "moved": 0}, larger)
    assert forward == pytest.approx(again / (3e12 * 0.85) + 3e-6)


def test_predicted_elements_are_those_of_the_kernels():
    for n in (2, 4, 8):
        one_pass = memory_io.boundary(n, 1)["one pass"]
        assert predictions.elements("mhc:init=paper pallas_gpu", n) == one_pass + n + 5 * n + 4
        spec = ArgSpec("s", 10**6, n, 1000)
        apart = sum(floor_bytes(op, spec, True) for op in ("coefficients", "read", "write")) / (2 * 10**6 * 1000)
        assert predictions.elements("mhc:init=paper xla", n) == pytest.approx(
            apart + 6 * n, rel=0.15
        )  # without coefficients


def test_the_committed_predictions_are_those_of_the_formulas():
    """The kernels of the table were compiled by two versions of Triton; times follow from what they move."""
    assert set(PREDICTED["operations"]) == {"3.6.0", "3.9.0"}
    for rows in PREDICTED["operations"].values():
        assert {(row["spec"]["name"], row["op"]) for row in rows} >= {("27b", op) for op in OPS}
        for row in rows:
            spec = ArgSpec(**row["spec"])
            seconds = sum(predictions.kernel_seconds(kernel, spec) for kernel in row["kernels"])
            assert row["ms"] == pytest.approx(1e3 * seconds)
            assert row["copy_share"] <= predictions.STREAMING
            for kernel in row["kernels"]:
                assert kernel["spills"] == 0
                if "sinkhorn" not in kernel["name"]:
                    assert kernel["loads"]["128"] >= 1
    for name, rows in PREDICTED["steps"].items():
        shape = step_times.LAYERS[name]
        assert rows == predictions.steps(shape, [row["name"] for row in rows[1:]])
        assert rows[0] == {
            "name": "residual",
            "ms": pytest.approx(rows[0]["ms"]),
            "overhead": 0.0,
            "wrong_overhead": None,
        }
    assert PREDICTED["others"] == predictions.others()
    text = (ROOT / "experiments" / "records" / "first-light-predictions" / "README.md").read_text()
    assert text == predictions.readme(PREDICTED)
    assert "not measured" in text.splitlines()[0]


def test_a_report_of_an_h100_has_the_predictions_beside_it(tmp_path):
    row = next(r for r in PREDICTED["operations"]["3.6.0"] if r["op"] == "write" and r["pass"] == "forward")
    measured = {"op": "write", "spec": row["spec"], "pass": "forward", "implementation": "pallas_gpu", "status": "ok"}
    measured |= {"ms": 3 * row["ms"], "bytes": 1e9, "copy_share": 0.3, "errors": {"x'": 0.0}, "worst": "x'"}
    report = {"env": ENVIRONMENT | {"device": "NVIDIA H100", "command": "c"}, "left": [], "copy_bytes_per_s": 3e12}
    report["parts"] = {"bench/27b/write": [measured]}
    device_report.write(tmp_path, report, ROOT / "experiments" / "records" / "first-light-predictions")
    lines = (tmp_path / "README.md").read_text().splitlines()
    (line,) = (line for line in lines if line.endswith("| slower than expected |"))
    assert line.endswith(f"| {3 * row['ms']:.3f} | {row['ms']:.3f} | 3.00 | slower than expected |")
    report["env"]["device"] = "NVIDIA B200"
    device_report.write(tmp_path, report, ROOT / "experiments" / "records" / "first-light-predictions")
    assert "predicted" not in (tmp_path / "README.md").read_text()
    assert device_report.wrong(
        {"parts": {"a": [{"status": "FAILED"}], "b": {"failed": "x"}, "c": [{"status": "ok"}]}}
    ) == ["a"]


def test_steps_of_pytorch_are_ours(monkeypatch):
    """Loss and gradient of residual, HC and mHC in float32 and bfloat16; timing them gives a row for each."""
    pytest.importorskip("torch", reason="torch is not installed")
    monkeypatch.syspath_prepend(str(ROOT / "kernels"))
    peer_steps = importlib.import_module("peer_steps")
    errors = torch_steps.step_errors(peer_steps)
    assert torch_steps.equal(errors), errors
    assert not torch_steps.equal({**errors, "float32": {**errors["float32"], "mhc:init=paper": [1e-7, 2e-5]}})
    rows = peer_steps.rows({"residual": [1.0, 3.0, 2.0], "mhc": [4.0, 4.0, 5.0]})
    assert [(row["ms"], row["overhead"]) for row in rows] == [(2000.0, 0.0), (4000.0, 1.0)]
