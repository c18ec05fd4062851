"""Numbers of cost, as they are printed: tables of pipelines, slices, kernels and steps against counts by hand."""

import dataclasses
import importlib
import itertools
import re
import time

import pytest
from mhc_kernels.ops.arg_specs import SPECS
from support.in_process import run_here, script_here
from support.tiny_runs import ROOT, flags_of, tiny, write_text

from mhc_jax import cost, device_record, pod, remat_plan, topology
from mhc_jax.config import DataConfig, ExperimentConfig, ModelConfig
from mhc_jax.connections import parse
from mhc_jax.pipeline import tables
from mhc_jax.pipeline.costs import Rates
from mhc_jax.plots.pipeline import timeline

SIZES = {"vocab_size": 8, "width": 256, "num_layers": 8, "num_heads": 2, "num_kv_heads": 2, "mlp_width": 512}
PAPER = ModelConfig(**SIZES, stream_dtype="bfloat16", connection=parse("mhc"))
RATES = Rates(flops=1e12, bandwidth=1e11, link=1e9)


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def printed(text):
    """Heading to cell, of every row of the first table of a text."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    end = next((k for k, line in enumerate(lines[2:], 2) if set(line) <= set("| -")), len(lines) + 1)
    return [dict(zip(cells(lines[0]), cells(line), strict=True)) for line in lines[2 : end - 1]]


def test_a_row_of_a_pipeline_by_hand():
    """1F1B on 4 devices: 8 microbatches of F + B = 3 each, and 3 (F + B) that a device waits; at most 4 are alive."""
    rows = tables.of_hand(["1f1b"], 4, 8, 1.0, 2.0, 1.0, 1.0, 0.0)
    (row,) = printed(tables.markdown(rows))
    expected = {"schedule": "1f1b", "connection": "", "devices x stages": "4 x 4", "step": f"{8 * 3 + 3 * 3}"}
    expected |= {"longest wait": f"{3 * 3}", "waiting (%)": f"{100 * 9 / 33:.1f}", "messages exposed": "0"}
    assert row == {**expected, "activations (stages)": "4", "kept by connections (GB)": "", "over the first": ""}
    axis = timeline([rows[0].run], ["one"], rows[0].unit).axes[0]
    assert axis.get_xlabel() == "time"
    assert sorted(cell.get_width() for cell in axis.patches) == pytest.approx([1.0] * 32 + [2.0] * 32)
    (many,) = printed(tables.markdown(tables.of_hand(["gpipe"], 2, 1500, 1.0, 2.0, 1.0, 1.0, 0.0)))
    assert (many["activations (stages)"], many["kept by connections (GB)"]) == ("1500", "")


def test_a_row_of_a_pipeline_of_a_model_has_seconds_and_bytes():
    config = ExperimentConfig(model=PAPER, data=DataConfig(sequence_length=4096))
    rows = tables.of_model(["1f1b"], 4, 8, config, ["residual", "mhc:t_max=2"], RATES, 1.0)
    residual, mhc, _ = printed(tables.markdown(rows))
    assert mhc["step (s)"] == f"{rows[1].run.makespan:.4g}"
    assert mhc["over the first"] == f"{100 * (rows[1].run.makespan / rows[0].run.makespan - 1):+.2f} %"
    assert timeline([rows[0].run], ["one"], rows[0].unit).axes[0].get_xlabel() == "time (s)"
    # Four microbatches on the first device: two blocks of two sub-layers, each keeps n streams, h and y of 4096 tokens.
    assert mhc["kept by connections (GB)"] == f"{4 * 2 * 2 * 6 * 256 * 2 * 4096 / 1e9:.2f}"
    assert float(residual["kept by connections (GB)"]) < float(mhc["kept by connections (GB)"])


def test_operations_of_a_compiled_pipeline():
    seconds = {"F": [0.001, 0.004], "B": [0.002, 0.0], "W": [0.0005, 0.0], "message": 0.0003, "tick": 0.0}
    found = {"schedule": "zb1p", "stages": 4, "seconds": seconds, "pair": 0.94, "bubble_fraction": 0.125}
    found["messages"] = {"a tick": 2, "asynchronous": 1, "hidden": 0, "bytes": 10}
    (row,) = printed("\n".join(pod.pipelines([{"connection": "mhc", "pipeline": found}])))
    assert list(row.values()) == ["mhc", "zb1p", "4", "4.00", "2.00", "0.50", "0.94", "0.30", "12.5", "2", "1", "0"]
    assert "waiting (%)" in row


def test_chips_are_those_of_the_published_pages():
    """Of a chip: bfloat16 TFLOP/s, GB/s and GiB of memory, Gbit/s of all its ports; ports; devices."""
    published = {
        "v4": (275, 1200, 32, 2400, 6, 2),
        "v5e": (197, 819, 16, 1600, 4, 1),
        "v5p": (459, 2765, 95, 4800, 6, 1),
        "v6e": (918, 1640, 32, 3584, 4, 1),
    }
    assert set(published) == set(topology.CHIPS)
    for name, (flops, bandwidth, memory, bits, ports, devices) in published.items():
        chip = topology.CHIPS[name]
        assert (chip.devices, 2 * chip.dimensions, chip.hbm * devices) == (devices, ports, memory * 2**30)
        rates = [devices * rate for rate in (chip.flops, chip.bandwidth, chip.link * ports * 8)]
        assert rates == pytest.approx([flops * 1e12, bandwidth * 1e9, bits * 1e9])


def test_estimated_cycles_of_attention_are_those_of_the_chip():
    with script_here("tpu_estimate", "--topology=v6e:2x2") as tpu_estimate:
        cycles = tpu_estimate.attention_cycles(topology.CHIPS["v6e"])
    # Two layers of 32 heads of 128, 2 x 4096 tokens: seven products over half of T x T, at 918 TFLOP/s and 1.75 GHz.
    assert cycles == pytest.approx(2 * 7 * 2 * 2 * 32 * 4096**2 / 2 * 128 / 918e12 * 1.75e9)


def test_the_textbook_table_has_medians_and_their_ratio(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "kernels"))
    bench = importlib.import_module("bench")
    times = {"ours": [0.002, 0.001, 0.004], "textbook": [0.006, 0.005, 0.009]}
    monkeypatch.setattr(bench, "alternating", lambda batches, rounds: {name: times[name] for name in batches})
    rows = bench.textbook_rows(2, 16, 3)
    for row in rows:
        assert (row["ours_ms"], row["textbook_ms"], row["ratio"]) == pytest.approx((2, 6, 3))
        assert row["largest_relative_error"] < 1e-5
    row = cells(bench.textbook_table(rows).splitlines()[2])
    assert row == ["sinkhorn", "forward", "2", "16", "2.00", "6.00", "3.0"]


def test_the_page_of_a_device():
    """Two layers, 2 x 4096 tokens: 4 x 8192 sub-layers and tokens."""
    step = {"shape": {"name": "27b", "width": 2560, "num_heads": 32, "mlp_width": 12288}, "batch_size": 2}
    mhc = {"name": "mhc xla", "status": "ok", "ms": 105.0, "overhead": 0.05, "memory_bytes": 3 * 2**30, "loss": 6.93}
    mhc["us_per_sublayer_token"] = 1e6 * 0.005 / (4 * 8192)
    gate = {"errors": {"h": 3e-6, "dx": 8e-3}, "allowed": {"h": 1e-5, "dx": 2.0**-6}}
    correct = {"op": "read", "spec": dataclasses.asdict(SPECS["27b"]), "implementation": "xla", "status": "ok"} | gate
    env = {"device": "D", "command": "c", "date": "d", "commit": "0", "dirty": False, "python": "3", "packages": {}}
    parts = {"correct/27b/read": [correct], "step/27b": {**step, "attention": "cudnn", "steps": [mhc]}}
    text = device_record.readme({"env": env, "parts": parts, "left": []})
    assert "| read | 27b (16384 x 4 x 2560, bfloat16) | xla | ok | 8.0e-03 (dx, 2e-02) |" in text
    (row,) = printed(text[text.index("## Train step") :])
    expected = {"connection": "mhc xla", "step (ms)": "105.00", "over residual": "+5.0 %"}
    expected |= {"adds (ns a sub-layer and token)": f"{1e9 * 0.005 / (4 * 8192):.2f}", "compiled memory (GiB)": "3.0"}
    assert row == {**expected, "loss of step 2 (nats/token)": "6.9300"}


def test_the_sentence_about_recompute_says_its_estimates():
    config = dataclasses.replace(PAPER, connection=parse("mhc:t_max=2"), remat="auto", remat_budget_gb=1e-9)
    found = remat_plan.plan(config, 4096, 128)
    listed = dict(re.findall(r"(\w+) ([\d.]+) GB", found.sentence.partition("estimates: ")[2]))
    assert set(listed) == {"none", "connection", "full"}
    for name, size in listed.items():
        assert float(size) == pytest.approx(found.estimates[name] / 1e9, rel=5e-3)
    assert f"more than the {1e-9:g} GB there are" in found.sentence
    free = remat_plan.plan(dataclasses.replace(config, remat_budget_gb=0.0), 4096, 128)
    assert f"with L_r = {free.L_r} of 16 sub-layers" in free.sentence


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    text = write_text(tmp_path_factory.mktemp("text") / "text.txt")
    return [flag for flag in flags_of(tiny(text)) if ".vocab_size" not in flag]


@pytest.fixture
def clock(monkeypatch):
    """Reads a quarter of a second later at every look: no printed time depends on the machine, and none is rounded to 0."""
    looks = itertools.count()
    monkeypatch.setattr(time, "perf_counter", lambda: next(looks) / 4)


def test_the_table_of_step_times(flags, clock):
    status, out, err = run_here("steptime", *flags, "--connections=residual,mhc:t_max=2", "--rounds=1")
    assert status == 0, err
    rows = printed(out)
    assert [row["connection"] for row in rows] == ["residual", "mhc:init=paper:t_max=2"]
    base = float(rows[0]["step (ms)"])
    for row, kind in zip(rows, ("residual", "mhc:t_max=2"), strict=True):
        assert float(row["ratio"]) == pytest.approx(float(row["step (ms)"]) / base, abs=0.01 + 0.06 / base)
        model = ModelConfig(264, 16, 1, num_heads=2, num_kv_heads=1, mlp_width=16, connection=parse(kind))
        counted, size = cost.model_cost(model, 16), re.fullmatch(r"([\d.]+)M", row["FLOPs/token"])
        # Products by hand; AdamW's and the norms' operations come on top, at most 25 a parameter and step of 64 tokens.
        assert counted.training_flops < float(size[1]) * 1e6 < counted.training_flops * 1.6 + 25 * counted.total / 64
        assert int(row["fusions"]) > 0
    assert rows[0]["ratio"] == "1.00"


def test_the_table_of_decoding(flags, clock):
    status, out, err = run_here("decodetime", *flags, "--connections=residual,mhc:t_max=2", "--tokens=64", "--rounds=1")
    assert status == 0, err
    rows = printed(out)
    assert rows[0]["ratio"] == "1.00"
    assert "one sequence of 64 tokens" in out
    for row in rows:
        cached, plain = float(row["with cache (ms/token)"]), float(row["without (ms/token)"])
        rounding = 0.06 / plain + 0.006 / cached + 0.06 * cached / plain
        assert float(row["without / with"]) == pytest.approx(plain / cached, rel=rounding)
