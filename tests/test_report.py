import dataclasses
import json
import re

import pytest
from synthetic_runs import write_run

from mhc_jax import plots
from mhc_jax.comparison import ONE_SEED, findings, rows, validation_gap
from mhc_jax.errors import InputError
from mhc_jax.records import read_run
from mhc_jax.report import comparison_table, header, write_report


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    return [
        read_run(write_run(root, "residual", "residual")),
        read_run(write_run(root, "hc", "hc", spikes=(90, 150))),
        read_run(write_run(root, "mhc", "mhc", equal_streams=True)),
        read_run(write_run(root, "fp16", "hc", diverged_at=120, settings={"dtype": "float16"})),
    ]


@pytest.fixture(scope="module")
def page(runs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    path = write_report(runs, folder, "A <b>title</b>", notes=["Seen & noted."])
    assert path == folder / "report.html"
    return path


def seeds(root, kinds=("residual", "mhc"), count=3):
    return [read_run(write_run(root, f"{kind}-{seed}", kind, seed=seed)) for seed in range(count) for kind in kinds]


def test_rows_hold_the_numbers_of_the_summaries(runs):
    residual, hc, mhc, diverged = rows(runs)
    assert residual["parameters"] == ("400k", 400_000)
    assert hc["parameters"] == ("403k (+0.75\N{NO-BREAK SPACE}%)", 403_000)
    assert mhc["FLOPs per token"] == ("2.81M", 2.81e6)
    assert mhc["step time (ms)"] == ("180 (×1.80)", 0.18)
    assert residual["step time (ms)"].text == "100"
    assert mhc["peak memory (MiB)"] == ("512", 512)
    assert hc["peak memory (MiB)"] == ("–", None)
    assert mhc["validation loss"].text == f"{1.7 + 3.9 * 2.718281828**-6 - 0.03:.4f}"
    assert residual["gap to residual"] == ("–", None)
    assert mhc["gap to residual"].text == "-0.0300"
    assert hc["max gain forward"] == ("38.25", 38.25)
    assert hc["max gain backward"].text == "52"
    assert residual["stream cosine"].value is None
    assert hc["spikes"] == ("2", 2)
    assert diverged["status"].text == "diverged at step 120"
    assert diverged["validation loss"].text == "–"


def test_a_gap_says_where_it_was_taken_and_whether_it_is_paired(runs):
    text = rows(runs)[3]["gap to residual"].text
    assert text == "-0.0300 (step\N{NO-BREAK SPACE}100) (unpaired)"
    assert validation_gap(runs[3], runs[0]) == (100, pytest.approx(-0.06 * 100 / 200))


def test_markdown_table_has_one_line_a_run(runs):
    lines = comparison_table(runs).splitlines()
    assert len(lines) == 2 + len(runs)
    assert {line.count("|") for line in lines} == {16}
    assert lines[2].startswith("| residual | residual | 400k | 2.8M | 100 | 512 |")
    with pytest.raises(InputError, match="at least one run"):
        comparison_table([])


def test_findings_name_the_lowest_loss_the_gaps_and_the_failures(runs):
    said = findings(runs)
    assert said[0].startswith("The lowest final validation loss is that of hc: 1.6497 nats/token")
    assert "fp16 diverged at step 120: it has no final loss to compare." in said
    assert "hc: validation loss 0.0600 nats below residual at step 200." in said
    assert "mhc: validation loss 0.0300 nats below residual at step 200." in said
    assert not [s for s in said if s.startswith("fp16: validation loss")]
    assert ONE_SEED in said
    gains = next(s for s in said if s.startswith("Largest composite gain"))
    assert "hc 38.25 forward, 52 backward" in gains
    equal = next(s for s in said if s.startswith("Streams stayed equal"))
    assert "mhc 1.0000" in equal
    assert "hc" not in equal.replace("mhc", "")
    assert "H_res is inert" in equal
    assert "Streams differ; lowest pairwise cosine: hc 0.7000, fp16 0.7000." in said
    assert "Loss spikes: hc 2." in said


def test_a_worse_run_is_above_residual(runs, tmp_path):
    folder = write_run(tmp_path, "worse", "mhc")
    text = (folder / "metrics.jsonl").read_text()
    lines = [json.loads(item) for item in text.splitlines()]
    for item in lines:
        if item["kind"] == "validation":
            item["loss"] += 0.5
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    said = findings([runs[0], read_run(folder)])
    assert "worse: validation loss 0.4700 nats above residual at step 200." in said


def test_several_seeds_give_a_mean_an_interval_and_a_count(tmp_path):
    runs = seeds(tmp_path)
    for change, name in ((0.01, "mhc-0"), (-0.01, "mhc-1"), (0.06, "mhc-2")):
        record = next(run for run in runs if run.name == name)
        record.validation["loss"][:] += change
    said = findings(runs)
    # Gaps -0.02, -0.04, +0.03: mean -0.01, deviation 0.036056, half-width 4.303 * 0.020817.
    assert (
        "mhc-0, mhc-1, mhc-2: validation loss minus residual's -0.0100 nats on average "
        "(95 % interval -0.0996 to +0.0796), below residual in 2 of 3 seeds."
    ) in said
    assert ONE_SEED not in said


def test_seeds_without_a_final_loss_are_named_and_single_seeds_are_not_ranked(tmp_path):
    runs = seeds(tmp_path, count=2)
    failed = write_run(tmp_path, "mhc-2", "mhc", seed=2, diverged_at=60)
    lone = write_run(tmp_path, "hc-0", "hc", seed=0)
    said = findings([*runs, read_run(failed), read_run(lone)])
    group = next(s for s in said if s.startswith("mhc-0, mhc-1: "))
    assert group.endswith("in 2 of 2 seeds. Left out, without a final loss: mhc-2.")
    assert "One seed only, no claim about its place: hc-0." in said


def test_the_same_run_twice_is_no_second_seed(runs, tmp_path):
    twin = read_run(write_run(tmp_path, "twin", "mhc"))
    assert ONE_SEED in findings([runs[0], runs[2], twin])


def test_runs_that_differ_in_more_than_the_connection_are_called_unpaired(runs, tmp_path):
    other = read_run(write_run(tmp_path, "other", "mhc", seed=1))
    said = next(s for s in findings([runs[0], other]) if s.startswith("other: "))
    assert "Not paired: data.seed, train.seed differ from the residual run." in said


def test_page_is_self_contained(page):
    text = page.read_text()
    assert "://" not in text
    assert not re.search(r"\bsrc\s*=|@import|<link|<iframe", text)
    assert not re.search(r"url\((?!#)", text)
    links = set(re.findall(r'href="([^"]*)"', text))
    assert {link for link in links if not link.startswith(("#", "data:image/png;base64,"))} == set()
    assert text.count("<svg") == 13
    targets = set(re.findall(r'<a href="#([^"]+)"', text))
    assert targets <= set(re.findall(r'id="([^"]+)"', text))
    assert len(list((page.parent / "figures").glob("*.png"))) == 13
    assert sorted(item.name for item in page.parent.iterdir()) == ["figures", "report.html"]


def test_page_holds_header_notes_table_settings_and_events(page):
    text = page.read_text()
    assert "<title>A &lt;b&gt;title&lt;/b&gt;</title>" in text
    assert "<p>Seen &amp; noted.</p>" in text
    assert "<dd>2026-01-02 03:04</dd>" in text
    assert "<code>python experiments/compare.py --seed 0</code>" in text
    assert "<dt>commit</dt><dd>0123abc</dd>" in text
    assert '<td data-value="38.25">38.25</td>' in text
    assert '<td data-value="">–</td>' in text
    assert "<tr><td>model.dtype</td><td>(absent)</td><td>(absent)</td><td>(absent)</td>" in text
    differing, shared = text.split("shared settings</summary>")
    assert "<td>train.steps</td><td>200</td>" in shared
    assert "train.steps" not in differing
    assert "model.connection.kind" not in shared.split("Environment of each run")[0]
    assert "<td>hc</td><td>150</td><td>spike</td>" in text
    assert "<td>fp16</td><td>120</td><td>diverged</td>" in text
    assert ONE_SEED in text
    assert "prefers-color-scheme: dark" in text
    assert "@media print" in text


def test_text_from_runs_is_escaped(tmp_path, monkeypatch):
    monkeypatch.setattr(plots, "FIGURES", {"loss": plots.FIGURES["loss"]})
    folder = write_run(tmp_path, "<script>alert(1)<", "mhc", spikes=(90,))
    env = {"command": "<script>alert(2)</script>", "commit": "0123abc", "dirty": True}
    (folder / "env.json").write_text(json.dumps(env))
    text = write_report([read_run(folder)], tmp_path / "out", "one").read_text()
    assert text.count("<script") == 1
    assert "&lt;script&gt;alert(1)&lt;" in text
    assert "&lt;script&gt;alert(2)" in text
    assert "0123abc with uncommitted changes" in text


def test_one_run_with_little_in_it_still_gets_a_report(tmp_path, monkeypatch):
    kept = {name: plots.FIGURES[name] for name in ("loss", "grad_norm")}
    monkeypatch.setattr(plots, "FIGURES", kept)
    folder = write_run(tmp_path, "alone", "residual", drop=("grad_norm",))
    (folder / "summary.json").unlink()
    (folder / "env.json").unlink()
    text = write_report([read_run(folder)], tmp_path / "out", "one").read_text()
    assert "No run has a final validation loss." in text
    assert "alone did not finish (no summary): its numbers are not final." in text
    assert "Not drawn" in text
    assert "Gradient norm: Nothing to draw: no run has logged grad_norm." in text
    assert "One run: all its settings are below." in text
    assert "No spikes, no resumptions, no divergence." in text
    assert ONE_SEED in text


def test_a_report_that_fails_leaves_the_old_one(page, monkeypatch, runs):
    before = page.read_bytes()

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("mhc_jax.report.os.replace", fail)
    monkeypatch.setattr(plots, "FIGURES", {"loss": plots.FIGURES["loss"]})
    with pytest.raises(OSError, match="disk full"):
        write_report(runs[:1], page.parent, "new")
    assert page.read_bytes() == before
    assert sorted(item.name for item in page.parent.iterdir()) == ["figures", "report.html"]
    with pytest.raises(InputError, match="at least one run"):
        write_report([], page.parent, "none")


def test_the_header_of_many_runs_stays_short(runs):
    many = [
        dataclasses.replace(runs[0], env={**runs[0].env, "date": f"2026-01-{day:02}", "command": f"run {day}"})
        for day in (3, 2, 5, 4)
    ]
    text = header(many)
    assert "<dt>date</dt><dd>2026-01-02 to 2026-01-05</dd>" in text
    assert text.count("<dt>command</dt>") == 1
    assert "run 3 and 3 more" in text
    assert header(many[:2]).count("<dt>command</dt>") == 2
