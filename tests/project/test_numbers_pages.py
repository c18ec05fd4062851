"""Numbers that stand in the documentation and in the committed notebooks, against the files of the records they are taken from."""

import csv
import json
import math
import re

import nbformat
import numpy as np
import pytest
from scipy import stats
from support.tiny_runs import ROOT

from mhc_jax.reports.record import read_record

RECORDS = ROOT / "experiments" / "records"


def read(path):
    return json.loads(path.read_text())


def newest(name):
    return max(RECORDS.glob(f"????-??-??-sweep-{name}"))


def connection(record, run):
    """Kind of a run's connection, with its init where it has one."""
    settings = {f"model.connection.{key}": value for key, value in record["config"]["model"]["connection"].items()}
    settings |= run["config"]
    init = settings.get("model.connection.init")
    return settings["model.connection.kind"] + (f":init={init}" if init else "")


def summaries(name):
    """Connection to the summaries of its runs, by seed."""
    found, record = {}, read(newest(name) / "runs.json")
    for run in record["runs"]:
        found.setdefault(connection(record, run), []).append(run["summary"])
    return found


def rows_of(text):
    """Cells of the lines of all tables of a text."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip(" *") for cell in line.strip("|").split("|")] for line in lines]


def row(text, name):
    return next(cells[1:] for cells in rows_of(text) if cells[0] == name)


def page(name):
    return (ROOT / "docs" / f"{name}.md").read_text()


def outputs(name):
    """Texts and Markdown that a committed notebook shows."""
    notebook = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)
    found = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return "\n".join("".join(o.get("text") or o.get("data", {}).get("text/markdown", "")) for o in found)


def test_the_demos_table_is_its_record():
    text = page("demo")
    (record,) = set(re.findall(r"experiments/records/([\w-]+)/", text))
    names = [name.lower().replace(", init=", "-init-") for name in row(text, "")]
    found = {run.name: run.summary for run in read_record(RECORDS / record)}
    runs = [found[name] for name in names]
    first, *rest = (run["parameters"] for run in runs)
    more = [f"{count / 1e6:.3f}M (+{100 * (count / first - 1):.1f} %)" for count in rest]
    assert row(text, "parameters") == [f"{first / 1e6:.3f}M", *more]
    for name, shown in {
        "training FLOPs per token": lambda run: f"{run['flops_per_token'] / 1e6:.2f}M",
        "compiled peak memory": lambda run: f"{run['peak_memory_bytes'] / 2**20:.0f} MiB",
        "final training loss (mean of the last 10 steps)": lambda run: f"{run['train_loss']:.4f}",
        "validation loss": lambda run: f"{run['validation_loss']:.4f}",
        "bits per byte": lambda run: f"{run['bits_per_byte']:.3f}",
        "loss spikes": lambda run: str(run["spikes"]),
    }.items():
        assert row(text, name) == [shown(run) for run in runs]
    cosines = [f"{run['final_stream_cosine_abs']:.3f}" for run in runs[1:]]
    assert row(text, "mean absolute cosine of the streams at the end") == ["–", *cosines]
    ranks = [f"{run['final_stream_rank']:.2f}" for run in runs[1:]]
    assert row(text, "rank of the streams at the end (1: one vector, 4: orthogonal)") == ["–", *ranks]
    for side in ("forward", "backward"):
        for cell, run in zip(row(text, f"largest composite gain, {side}"), runs, strict=True):
            places = len(cell.partition(".")[2])
            assert cell == f"{run[f'max_composite_{side}']:.{places}f}"


def test_the_table_of_the_27b_is_its_record():
    text = page("cost")
    (record,) = set(re.findall(r"`experiments/records/([\w-]+compile-paper-27b[\w-]+)/`", text))
    found = {one["connection"]: one for one in read(RECORDS / record / "compiled.json")["rows"]}
    base = found["residual"]["seconds"]
    for name, one in found.items():
        memory, step, over = row(text, {"residual": "residual", "mhc:init=paper": "mHC, init=paper"}[name])
        assert memory == f"{one['needs'] / 2**30:.1f} GiB"
        assert step == f"{one['seconds']['step']:.1f} s"
        if name != "residual":
            whole, alone = (f"+{100 * (one['seconds'][key] / base[key] - 1):.1f} %" for key in ("step", "compute"))
            assert re.findall(r"\+[\d.]+ %", over) == [whole, alone]


@pytest.mark.parametrize("stages", [8, 16])
@pytest.mark.parametrize(
    ("label", "record", "connection", "schedules"),
    [
        (" stages, {} microbatches", "pipeline", "mhc:init=home, recompute", ("1f1b", "zb1p", "dualpipe")),
        (
            " stages, costs of the compiler",
            "pipeline-compiled",
            "mhc:init=paper",
            ("gpipe", "1f1b", "zb1p", "dualpipe"),
        ),
    ],
    ids=["assumed", "compiled"],
)
def test_the_tables_of_pipelines_are_their_records(label, record, connection, schedules, stages):
    """The newest record counts, and in it the first table, which is that of stages of several blocks."""
    text = page("pipelines")
    folder = max(re.findall(rf"`experiments/records/([\d-]+-{record})/`", text))
    found = rows_of((RECORDS / folder / "README.md").read_text())
    over = {cells[0]: cells[-1] for cells in found[::-1] if cells[1:3] == [connection, f"{stages} x {stages}"]}
    expected = [float(over[name].removesuffix(" %")) for name in schedules]
    shown = [float(cell.removesuffix(" %")) for cell in row(text, f"{stages}{label}".format(4 * stages))]
    np.testing.assert_allclose(shown, expected, atol=0.055)  # the record's are rounded too


def test_the_row_of_connections_is_its_record():
    """Means and Student's intervals of three differences, by hand."""
    with (newest("connections") / "results.csv").open() as file:
        runs = list(csv.DictReader(file))
    losses = {(r["connection"], r["seed"]): float(r["validation_loss"]) for r in runs}
    text = page("findings")
    names = {"HC": "hc", "mHC, init=paper": "mhc:init=paper", "mHC, init=home": "mhc:init=home"}
    shown = [cells for cells in rows_of(text) if cells[1:2] and cells[1] in names][:3]
    assert [cells[1] for cells in shown] == list(names)
    for (_, name, difference, gains), kind in zip(shown, names.values(), strict=True):
        d = np.array([losses[kind, seed] - losses["residual", seed] for seed in "012"])
        half = stats.t.ppf(0.975, 2) * d.std(ddof=1) / math.sqrt(3)
        assert difference == f"{d.mean():+.3f} [{d.mean() - half:+.3f}, {d.mean() + half:+.3f}]", name
        own = [run for run in runs if run["connection"] == kind]
        largest = [max(float(run[f"max_composite_{side}"]) for run in own) for side in ("forward", "backward")]
        assert gains == " / ".join(f"{gain:.{0 if kind == 'hc' else 2}f}" for gain in largest)


QUOTED = r"""
29.7 % more cycles than residual with plain XLA <- 2026-11-29-compile-two-blocks-v5p: \+29.7 %
and 9.1 % with the kernels <- 2026-11-29-compile-two-blocks-v5p: \+9.1 %
The 3B takes +7.5 % with mHC on 256 v5e <- 2026-11-29-compile-paper-3b: mhc:init=paper .* \+7.5 %
and +3.4 % on 64 v6e <- 2026-11-29-compile-paper-3b: mhc:init=paper .* \+3.4 %
F and B of a block take 6.1 % longer with mHC <- 2026-11-29-pipeline-compiled: \| 7.81 \| 18.65 \| \+6.1 %
+6.0, +8.0, +7.5 and +8.5 % at 8 stages <- 2026-11-29-pipeline-compiled: remat connection \| 8 x 8 .* \+7.50 %
changes the loss from 2.3800 to 2.3807; over the whole depth it costs 0.023 <- 2026-11-29-sweep-demo: 2.3800 \| 2.4026 \| 2.3807
1.8e-6 of an array's largest gradient <- LOG: 1.8e-6 of an array's largest entry
"""


@pytest.mark.parametrize(("sentence", "place"), [line.split(" <- ") for line in QUOTED.strip().split("\n")])
def test_what_a_page_quotes_is_recorded(sentence, place):
    name, pattern = place.split(": ", 1)
    file = RECORDS.parent / "LOG.md" if name == "LOG" else RECORDS / name / "README.md"
    texts = [path.read_text() for path in (ROOT / "docs").glob("*.md")]
    assert any(sentence in " ".join(text.split()) for text in texts)
    assert re.search(pattern, file.read_text())


def test_step_times_are_those_of_the_log():
    """The page of the demo has the ranges of the newest three runs, notebook 04 the medians of three runs at 2ba8085."""
    log = (ROOT / "experiments" / "LOG.md").read_text()

    def runs(commit):
        """The ratios of mHC and of HC over residual in three runs, from the smallest to the largest."""
        (found,) = re.findall(rf"at {commit} ([\d., ]+)x, HC ([\d., ]+)x", log)
        return [sorted(map(float, numbers.split(", "))) for numbers in found]

    mhc, hc = runs("80f9fbe")
    shown = row(page("demo"), "step time over residual's (`steptime.py`; [cost](cost.md))")
    assert shown == ["1", f"{hc[0]:.2f}-{hc[-1]:.2f}", *[f"{mhc[0]:.2f}-{mhc[-1]:.2f}"] * 2]
    mhc, hc = runs("2ba8085")
    notebook = (ROOT / "notebooks" / "04_cost.py").read_text()
    assert f"({hc[1]}, {mhc[1]})" in notebook


def test_notebook_01_has_the_gains_of_the_record():
    runs = summaries("connections")
    for kind in runs.keys() - {"residual"}:
        cells = row(outputs("01_gain_curves"), f"{kind}, here: mean of {len(runs[kind])} seeds (range)")
        for cell, side in zip(cells, ("forward", "backward"), strict=True):
            gains = [run[f"max_composite_{side}"] for run in runs[kind]]
            assert cell == f"{sum(gains) / len(gains):.4g} ({min(gains):.4g} to {max(gains):.4g})"


def test_notebook_02_has_the_losses_and_spikes_of_the_record():
    shown = outputs("02_training_dynamics")
    for kind, runs in summaries("connections").items():
        for seed, run in enumerate(runs):
            spikes = ", ".join(map(str, run["spike_steps"])) or "none"
            assert f"{kind:14s} seed {seed}: validation loss {run['validation_loss']:.4f}, spikes at {spikes}" in shown
        losses = [run["validation_loss"] for run in runs]
        mean, deviation = sum(losses) / 3, math.sqrt(sum((x - sum(losses) / 3) ** 2 for x in losses) / 2)
        assert row(shown, kind)[1:3] == [f"{mean:.4f}", f"{deviation:.4f}"]


def test_notebook_03_has_the_streams_and_shares_of_the_record():
    """A share is the largest |entry| of a sub-layer over the sum of its |entries|; means over the last diagnostics."""
    shown, shares = outputs("03_streams"), {}
    record = read(newest("connections") / "runs.json")
    for run in record["runs"]:
        kind, path = connection(record, run), newest("connections") / "metrics" / f"{run['name']}.jsonl"
        line = [json.loads(text) for text in path.read_text().splitlines() if '"kind": "diagnostics"' in text][-1]
        for key in ("h_pre", "h_post"):
            each = [max(map(abs, gates)) / sum(map(abs, gates)) for gates in line[key]]
            shares.setdefault((kind, key), []).append(sum(each) / len(each))
    runs, keys = summaries("connections"), ("stream_cosine", "stream_cosine_abs", "stream_rank")
    for kind in ("hc", "mhc:init=paper", "mhc:init=home"):
        assert row(shown, kind)[:2] == [f"{sum(shares[kind, key]) / 3:.2f}" for key in ("h_pre", "h_post")]
        expected = [f"{sum(run[f'final_{key}'] for run in runs[kind]) / 3:.3f}" for key in keys]
        assert [kind, *expected] in rows_of(shown)


def test_notebook_04_has_the_traffic_of_table_2():
    """Elements in C = 2560 at n = 4, as mHC Table 2 says; coefficients are 24, gates 4, H_res 16."""
    shown, C = outputs("04_cost"), 2560
    table = {
        "coefficients": (4, 24 / C),
        "apply H_pre": (4 + 4 / C, 1),
        "apply H_post": (1 + 4 / C, 4),
        "apply H_res": (4 + 16 / C, 4),
        "merge": (8, 4),
        "total, unfused": (21 + 24 / C, 13 + 24 / C),
        "total, H_post, H_res and merge fused": (13 + 24 / C, 5 + 24 / C),
        "residual": (2, 1),
    }
    for name, numbers in table.items():
        assert row(shown, name) == [f"{number:.2f}" for number in numbers]


def test_notebook_05_has_the_fits_of_the_record():
    """Least squares on logarithms; FLOPs are those of a token times steps, sequences and their length."""
    shown, runs, record = outputs("05_scaling"), {}, read(newest("ladder") / "runs.json")
    for run in record["runs"]:
        data, summary = record["config"]["data"], run["summary"]
        tokens = summary["steps"] * data["batch_size"] * data["sequence_length"]
        point = summary["flops_per_token"] * tokens, summary["validation_loss"]
        runs.setdefault(connection(record, run), []).append(point)
    for kind, points in runs.items():
        x, y = np.log(np.array(points)).T
        line = stats.linregress(x - x.mean(), y)
        half = stats.t.ppf(0.975, len(x) - 2) * line.stderr
        interval = f"{-line.slope - half:.3f} to {-line.slope + half:.3f}"
        numbers = [f"{math.exp(y.mean()):.4f}", f"{-line.slope:.3f}", interval]
        assert [cells[1:] for cells in rows_of(shown) if cells[0] == kind][-1] == numbers
