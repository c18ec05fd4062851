"""Run folders are read back whatever they lack, and shown on a page; wherever the page names mHC, it names its init."""

import dataclasses
import html
import json
import re

import numpy as np
import pytest
from support.synthetic_runs import STEPS, SUBLAYERS, make_four, make_run, write_run
from support.tiny_runs import ROOT, lines

from mhc_jax import plots
from mhc_jax.analysis.comparison import rows
from mhc_jax.analysis.grouping import group, mean_record
from mhc_jax.analysis.run_reader import flatten, labels, last_diagnostics, not_defaults, read_run, series
from mhc_jax.config import ExperimentConfig
from mhc_jax.config.mapping import to_mapping
from mhc_jax.errors import InputError
from mhc_jax.reports.markup import markdown_table
from mhc_jax.reports.page import find_runs, header, write_folder_report, write_report
from mhc_jax.sweeps.results import measurements


def append(folder, kind, step, **line):
    with open(folder / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"kind": kind, "step": step, **line}) + "\n")


def test_reads_back_what_was_written(tmp_path):
    record = make_run(tmp_path, "hc", "hc", spikes=(90,))
    steps, loss = series(record, "train", "loss")
    expected = [(line["step"], line["loss"]) for line in lines(record.folder, "train")]
    assert list(zip(steps, loss, strict=True)) == expected
    steps, gain = series(record, "diagnostics", "composite_forward")
    assert steps.tolist() == [50, 100, 150, 200]
    assert gain.shape == (4, SUBLAYERS)
    assert gain.tolist() == [line["composite_forward"] for line in lines(record.folder, "diagnostics")]
    assert (record.name, record.kind, record.num_streams, record.status) == ("hc", "hc", 4, "finished")
    assert (record.spike_steps, record.diverged_at) == ([90], None)


def test_null_is_nan_and_a_diverged_run_says_where(tmp_path):
    record = make_run(tmp_path, "run", "hc", diverged_at=84)
    steps, loss = series(record, "train", "loss")
    assert steps[-1] == 84
    assert np.flatnonzero(~np.isfinite(loss)).tolist() == [len(loss) - 1]
    assert (record.diverged_at, record.status) == (84, "diverged")
    (tmp_path / "run" / "summary.json").unlink()
    record = read_run(tmp_path / "run")
    assert (record.summary, record.diverged_at, record.status) == (None, 84, "diverged"), "known from the event alone"


@pytest.mark.parametrize("broken", ['{"kind": "train", "st', "3", '{"kind": "train"}', "\xff"])
def test_a_broken_line_is_left_out_at_the_end_and_named_by_its_number_in_the_middle(tmp_path, broken):
    folder = write_run(tmp_path, "run", "mhc")
    whole, more = (folder / "metrics.jsonl").read_text(), '{"kind": "train", "step": 202, "loss": 1.0}\n'
    (folder / "metrics.jsonl").write_text(whole + more[:-9])
    assert series(read_run(folder), "train", "step")[0][-1] == STEPS
    (folder / "metrics.jsonl").write_text(whole + broken + "\n" + more)
    with pytest.raises(InputError, match=rf"^Line {len(whole.splitlines()) + 1} of .*metrics\.jsonl"):
        read_run(folder)


def test_wrong_folders_and_files_are_told_in_a_sentence(tmp_path):
    with pytest.raises(InputError, match="There is no folder"):
        read_run(tmp_path / "nowhere")
    for missing in ("config.json", "metrics.jsonl"):
        (write_run(tmp_path, missing, "mhc") / missing).unlink()
        with pytest.raises(InputError, match=f"is not a run folder: it has no {missing}"):
            read_run(tmp_path / missing)
    folder = write_run(tmp_path, "run", "mhc")
    for name, text, sentence in (
        ("summary", "{", r"summary\.json cannot be read"),
        ("summary", "[]", r"summary\.json holds no JSON object"),
        ("config", '{"model": {}}', r"has no model\.connection\.kind"),
    ):
        (folder / f"{name}.json").write_text(text)
        with pytest.raises(InputError, match=sentence):
            read_run(folder)


def test_optional_files_and_keys_may_be_missing(tmp_path):
    folder = write_run(tmp_path, "run", "mhc", drop=("grad_norm", "h_res"))
    (folder / "env.json").unlink()
    (folder / "summary.json").unlink()
    record = read_run(folder)
    assert (record.env, record.status) == ({}, "no summary")
    assert [len(values) for values in series(record, "train", "grad_norm")] == [0, 0]
    assert len(series(record, "diagnostics", "h_res")[0]) == 0
    assert last_diagnostics(record, "h_res") is None
    with pytest.raises(InputError, match="must be one of 'train', 'validation', 'diagnostics'"):
        series(record, "valid", "loss")


def test_last_diagnostics_skips_lines_without_a_finite_number(tmp_path):
    folder = write_run(tmp_path, "run", "hc")
    append(folder, "diagnostics", 250, row_error=[None, None])
    append(folder, "diagnostics", 300, row_error=None)
    assert last_diagnostics(read_run(folder), "row_error")[0] == 200
    append(folder, "diagnostics", 350, row_error=[None, 2.0])
    step, value = last_diagnostics(read_run(folder), "row_error")
    np.testing.assert_array_equal([step, *value], [350, np.nan, 2.0])


def test_the_largest_norm_is_that_of_the_steps_after_the_warm_up(tmp_path):
    record = make_run(tmp_path, "run", "hc", config={"optimizer.warmup_steps": 4})
    train = {"step": np.arange(1.0, 7), "grad_norm": np.asarray([9.0, 8, 7, 6, 2, np.nan]), "clipped": np.ones(6) * 0.5}
    found = measurements(dataclasses.replace(record, train=train))
    assert (found["max_grad_norm"], found["clipped_fraction"]) == (2, 0.5)


def test_flattened_settings_and_those_that_are_no_defaults():
    assert flatten({"a": {"b": {"c": 1}}, "d": [2]}) == {"a.b.c": 1, "d": [2]}
    config = to_mapping(ExperimentConfig())
    assert not_defaults(config) == {}
    config["optimizer"]["grad_clip"], config["train"]["seed"] = 0.5, 7
    config["model"]["connection"]["num_streams"] = 8
    assert not_defaults(config) == {"optimizer.grad_clip": 0.5}


def test_labels_tell_folders_of_one_name_apart(tmp_path):
    runs = [make_run(tmp_path / folder, kind, kind) for folder, kind in (("a", "hc"), ("b", "hc"), ("b", "mhc"))]
    assert labels(runs) == ["hc", "hc'", "mhc:init=paper"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return make_four(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module", params=["three figures", pytest.param("all figures", marks=pytest.mark.full)])
def page(runs, tmp_path_factory, request):
    """Path of the page of the four runs.  The file of a figure that is not rendered holds the signature of PNG alone."""
    folder = tmp_path_factory.mktemp("report")
    save, svg, rendered = plots.save, plots.svg, []

    def saved(figure, path, *, vector):
        if request.param == "all figures" or path.stem in ("loss", "gain_depth", "reads_and_writes"):
            rendered.append(figure)
            return save(figure, path, vector=vector)
        path.write_bytes(b"\x89PNG")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "save", saved)
        patch.setattr(plots, "svg", lambda figure: svg(figure) if figure in rendered else "<svg></svg>")
        path = write_report(runs, folder, "A <b>title</b>", notes=["Seen & noted."])
    assert len(rendered) == (13 if request.param == "all figures" else 3)
    assert path == folder / "report.html"
    return path


def test_markdown_table_has_one_line_a_run(runs):
    lines = markdown_table(rows(runs)).splitlines()
    assert len(lines) == 2 + len(runs)
    assert len({line.count("|") - line.count("\\|") for line in lines}) == 1
    assert lines[2].startswith("| residual | 400k | 2.8M | 100 | 512 |")
    assert lines[5].startswith("| hc dtype=float16 |")


def test_page_is_self_contained(page, runs):
    text = page.read_text()
    assert "://" not in text
    assert not re.search(r"\bsrc\s*=|@import|<link|<iframe", text)
    assert not re.search(r"url\((?!#)", text)
    links = set(re.findall(r'href="([^"]*)"', text))
    inside = {link for link in links if link.startswith(("#", "data:image/png;base64,"))}
    drawn = list((page.parent / "figures").glob("*.png"))
    files = {f"./figures/{path.stem}.{suffix}" for path in drawn for suffix in ("pdf", "svg", "png")}
    outside = links - inside
    assert {(page.parent / link).resolve() for link in outside - files} == {run.folder.resolve() for run in runs}
    assert files <= outside
    assert text.count("<svg") == 2 * 13, "each for a wide and for a narrow screen"
    assert set(re.findall(r'<a href="#([^"]+)"', text)) <= set(re.findall(r'id="([^"]+)"', text))
    assert len(drawn) == 13
    assert {path.read_bytes()[:4] for path in drawn} == {b"\x89PNG"}
    assert sorted(item.name for item in page.parent.iterdir()) == ["figures", "report.html"]


def missing(text, *parts):
    return [part for part in parts if part not in text]


def test_page_holds_header_notes_table_settings_and_events(page):
    text = page.read_text()
    header = "<title>A &lt;b&gt;title&lt;/b&gt;</title>", "<p>Seen &amp; noted.</p>", "<dd>2026-01-02 03:04</dd>"
    run = "<code>python experiments/compare.py --seed 0</code>", "<dt>commit</dt><dd>0123abc</dd>"
    setting = "<tr><td>hc dtype=float16</td><td>hc</td><td>4</td><td>float16</td></tr>"
    numbers = '<td data-value="38.25">38.25</td>', '<td data-value="">–</td>', "one seed, no claim"
    events = "<td>hc</td><td>150</td><td>spike</td>", "<td>hc dtype=float16</td><td>120</td><td>diverged</td>"
    looks = "prefers-color-scheme: dark", "@media print"
    assert missing(text, *header, *run, setting, *numbers, *events, *looks) == []
    _, changed = text.split("Shared settings that are not defaults: ")
    assert "model.width=64, data.batch_size=16" in changed.split("</p>")[0]
    differing, shared = text.split("shared settings</summary>")
    assert "<td>train.steps</td><td>200</td>" in shared
    assert "train.steps" not in differing
    assert "model.connection.kind" not in shared.split("Environments")[0]


def test_text_from_runs_is_escaped(tmp_path, monkeypatch):
    monkeypatch.setattr(plots, "FIGURES", {"loss": plots.FIGURES["loss"]})
    folder = write_run(tmp_path, "<script>alert(1)<", "mhc", spikes=(90,))
    (folder / "env.json").write_text('{"command": "<script>alert(2)</script>", "commit": "0123abc", "dirty": true}')
    text = write_report([read_run(folder)], tmp_path / "out", "one").read_text()
    assert text.count("<script") == 1
    link = 'href="./../%3Cscript%3Ealert%281%29%3C"'
    assert missing(text, link, "&lt;script&gt;alert(2)", "0123abc with uncommitted changes") == []


def test_one_run_with_little_in_it_still_gets_a_report(tmp_path, monkeypatch):
    monkeypatch.setattr(plots, "FIGURES", {name: plots.FIGURES[name] for name in ("loss", "grad_norm")})
    folder = write_run(tmp_path, "alone", "residual", drop=("grad_norm",))
    (folder / "summary.json").unlink()
    (folder / "env.json").unlink()
    text = write_report([read_run(folder)], tmp_path / "out", "one").read_text()
    assert "residual: 1 of 1 runs have not ended and have no final loss." in text
    assert "Not drawn" in text
    assert "Gradient norm: Nothing to draw: no run has logged grad_norm." in text
    assert "No spikes, no resumptions, no divergence." in text


def test_a_report_that_fails_leaves_the_old_one(page, monkeypatch, runs):
    before = page.read_bytes()

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("mhc_jax.files.json_files.os.replace", fail)
    monkeypatch.setattr(plots, "FIGURES", {"loss": plots.FIGURES["loss"]})
    with pytest.raises(InputError, match="disk full"):
        write_report(runs[:1], page.parent, "new")
    assert page.read_bytes() == before
    assert sorted(item.name for item in page.parent.iterdir()) == ["figures", "report.html"]
    with pytest.raises(InputError, match="There are no runs to report"):
        write_report([], page.parent, "none")


def test_the_header_of_many_runs_stays_short(runs):
    envs = [{**runs[0].env, "date": f"2026-01-{day:02}", "command": f"run {day}"} for day in (3, 2, 5, 4)]
    text = header(many := [dataclasses.replace(runs[0], env=env) for env in envs])
    assert "<dt>date</dt><dd>2026-01-02 to 2026-01-05</dd>" in text
    assert text.count("<dt>command</dt>") == 1
    assert "run 3 and 3 more" in text
    assert header(many[:2]).count("<dt>command</dt>") == 2


def test_a_page_says_which_runs_of_the_grid_it_holds(tmp_path, monkeypatch):
    monkeypatch.setattr(plots, "FIGURES", {})
    write_run(tmp_path, "b", "residual")
    write_run(tmp_path, "a", "hc")
    (tmp_path / "sweep.json").write_text('{"title": "A sweep", "baseline": {"connection": "hc"}, "runs": ["b", "c"]}')
    page = write_folder_report(tmp_path).read_text()
    assert "This page holds 1 of the 2 runs of the grid; not begun: c, and 1 runs of earlier grids." in page
    assert "residual: loss minus hc&#x27;s +0.0600; one seed, no claim." in page
    assert [run.name for run in find_runs(tmp_path, ["b", "c"])] == ["b", "a"]


def test_a_page_of_several_seeds_has_figures_and_statistics_over_them(tmp_path, monkeypatch):
    runs = [make_run(tmp_path, f"{kind}-{k}", kind, seed=k) for kind in ("residual", "mhc") for k in range(3)]
    saved = {}
    monkeypatch.setattr(plots, "save", lambda figure, path, vector: saved.update({path: vector}))
    monkeypatch.setattr(plots, "svg", lambda figure: "")
    page = write_report(runs, tmp_path / "out", "Seeds").read_text()
    assert page.count('<table class="sortable">') == 2
    assert "Below 3 seeds, and where a run of either has not finished, there is no interval" in page
    assert {path.parent for path in saved} == {tmp_path / "out" / "figures"}
    assert set(saved.values()) == {True}, "PNG and SVG"
    drawn = {path.stem for path in saved}
    assert drawn >= {"gap_curves", "seed_strip", "seed_bands", "gain_depth"}
    assert "loss_gap" not in drawn
    assert all(f'id="{figure}"' in page for figure in drawn)
    for run in runs:
        (href,) = re.findall(rf'<a href="([^"]*{run.name})">', page)
        assert (tmp_path / "out" / href / "metrics.jsonl").is_file()


def test_folders_are_searched_for_runs(tmp_path):
    for name in ("b", "a"):
        write_run(tmp_path, name, "hc")
    assert [[run.name for run in find_runs(folder)] for folder in (tmp_path, tmp_path / "a")] == [["a", "b"], ["a"]]
    (tmp_path / "empty").mkdir()
    for folder, sentence in (("empty", "holds no run folder"), ("none", "There is no folder")):
        with pytest.raises(InputError, match=sentence):
            find_runs(tmp_path / folder)


MHC = re.compile(r"\bm[hH][cC]\b(?![_\w]*\.|-|'s paper| (?:Table|Figure|Eq|section|ICML))")
"""Matches mHC as the name of a run or a result, but neither in a file name nor in a reference to the paper."""
KEEPS_ITS_NAME = ("Kind", "What to change", "Formula", "Letter", "`model.remat`", "Notebook")
"""Headings of tables without results."""


@pytest.fixture(scope="module")
def seeds(tmp_path_factory):
    """Runs of three seeds of each connection, and of mHC with two inits."""
    root, out = tmp_path_factory.mktemp("runs"), []
    for kind, config in (("residual", {}), ("hc", {}), ("mhc", {}), ("mhc", {"init": "home", "t_max": 5})):
        config = {f"model.connection.{key}": value for key, value in config.items()}
        out += [make_run(root, f"{len(out) + k}", kind, seed=k, config=config) for k in range(3)]
    return out


def rows_without_init(text):
    """Return the rows of Markdown tables that name mHC in their first cells or in the heading row, without its init."""
    wrong = []
    for table in re.findall(r"^\|.*(?:\n\|.*)*", text, re.MULTILINE):
        for k, line in enumerate(table.splitlines()):
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            head = cells if k == 0 else head
            named = not set(head) & set(KEEPS_ITS_NAME) and any(
                MHC.search(cell) for cell in cells[: None if k == 0 else 2]
            )
            if named and "init=" not in line and "`home`" not in line:
                wrong.append(line)
    return wrong


def test_the_report_and_its_figures_name_the_init(seeds, tmp_path, monkeypatch):
    """The test reads the text outside the figures, and every text in them; they are drawn but not rendered."""
    figures = []
    monkeypatch.setattr(plots, "save", lambda figure, path, vector: figures.append((path.stem, figure)))
    monkeypatch.setattr(plots, "svg", lambda figure: "")
    page = write_report(seeds, tmp_path, "Runs").read_text()
    page = re.sub(r"<script.*?</script>|<style.*?</style>|<details.*?</details>", "", page, flags=re.DOTALL)
    for block in re.findall(r"<(?:tr|li|figcaption)>(.*?)</(?:tr|li|figcaption)>", page, re.DOTALL):
        text = html.unescape(re.sub(r"<[^>]*>", " ", block))
        assert not MHC.search(text) or "init=" in text, text
    assert "mhc:init=paper" in page
    assert "mhc:init=home:t_max=5" in page
    drawn = [name for name, _ in figures]
    assert set(drawn) == {*plots.FIGURES, "gap_curves", "seed_bands", "seed_strip"} - {"loss_gap", "depth_mixing"}
    means = [mean_record(variant) for variant in group(seeds)]
    for name, figure in [*figures, ("loss_gap", plots.FIGURES["loss_gap"].draw(means))]:
        for text in figure.findobj(lambda artist: hasattr(artist, "get_text")):
            assert not MHC.search(text.get_text()) or "init=" in text.get_text(), (name, text.get_text())


PAGES = [*sorted(ROOT.glob("docs/*.md")), ROOT / "README.md", *sorted(ROOT.glob("experiments/records/*/README.md"))]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_pages_and_records_name_the_init(path):
    assert rows_without_init(path.read_text()) == []


@pytest.mark.parametrize("path", sorted(ROOT.glob("notebooks/*.ipynb")), ids=lambda path: path.stem)
def test_notebooks_name_the_init(path):
    cells = json.loads(path.read_text())["cells"]
    texts = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown"]
    for cell in cells:
        for output in cell.get("outputs", []):
            texts += ["".join(output.get("data", {}).get("text/markdown", "")), "".join(output.get("text", ""))]
    for text in texts:
        assert rows_without_init(text) == []
        for paragraph in re.findall(r"(?:^|\n)\*[^*\s].*?\*(?=\n\n|\n#|$)", text, re.DOTALL):  # captions of figures
            assert not MHC.search(paragraph) or "init=" in paragraph or "paper's" in paragraph, paragraph
