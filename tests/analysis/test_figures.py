"""A figure for a paper: of which runs it is, how large it is, what its caption says, and how mistakes end."""

import json

import pytest
from support.synthetic_runs import STEPS, legend_texts, write_run
from support.tiny_runs import run_script

from mhc_jax import plots
from mhc_jax.errors import InputError
from mhc_jax.reports.figures import NAMED, draw_figure, read_folders, size_of, write_figure
from mhc_jax.reports.record import write_runs

COLUMN = plots.SIZES["column"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """HC and mHC with two seeds each; seed 0 of HC diverged."""
    root = tmp_path_factory.mktemp("runs")
    for kind in ("hc", "mhc"):
        for seed in (0, 1):
            lost = 120 if (kind, seed) == ("hc", 0) else None
            write_run(root, f"{kind}-{seed}", kind, seed=seed, diverged_at=lost)
    return root


def test_the_caption_says_which_runs_are_shown_and_how(folder):
    drawn = draw_figure("gain_depth", [folder], COLUMN)
    assert legend_texts(drawn.figure) == ["hc", "mhc:init=paper"]
    assert drawn.caption.startswith("Gain against depth. The y axes show gains")
    for sentence in (
        "Lines are means over the sampled tokens. Faint bands reach",
        "Lines and bands are means over the seeds that finished.",
        "Runs: hc (seeds 0, 1, of 2 finished 1); mhc:init=paper (seeds 0, 1).",
        f"Last logged step: 120 or {STEPS}.",
        "Diverged: hc seed 0 at step 120.",
        "Commit 0123abc.",
    ):
        assert sentence in drawn.caption
    each = draw_figure("gain_depth", [folder], COLUMN, each_run=True)
    assert len(legend_texts(each.figure)) == 4
    assert "Every run is shown by itself." in each.caption
    matrices = draw_figure("h_res", [folder], COLUMN)
    maps = [axis for axis in matrices.figure.axes if axis.axison]
    assert len(maps) == 2 * 6
    assert maps[0].get_ylabel() == f"hc seed 1\n(step {STEPS})", "seed 0 diverged"
    assert "Of each variant the figure shows the run with the lowest seed that finished." in matrices.caption
    panel = draw_figure("gain_depth", [folder], size_of("column", panel="composite H(l)···h(1), forward"))
    assert plots.panel_names(panel.figure) == ["Composite H(l)···H(1), forward"]
    assert panel.panels == drawn.panels
    assert "Shown is the panel 'Composite H(l)···H(1), forward' alone." in panel.caption


def test_several_panels_are_chosen_by_numbers_and_words_of_several_are_a_mistake(folder):
    size = size_of("page", panel="5, 8")
    drawn = draw_figure("gain_depth", [folder], size)
    kept = ["Composite H(l)···H(1), forward", "Composite H(L)···H(l), backward, close-up"]
    assert plots.panel_names(drawn.figure) == kept
    assert {axis.get_subplotspec().rowspan.start for axis in drawn.figure.axes} == {0}, "side by side"
    assert f"Shown are the panels '{kept[0]}' and '{kept[1]}' alone." in drawn.caption
    column = draw_figure("gain_depth", [folder], size._replace(width=3.3))
    assert len({axis.get_subplotspec().rowspan.start for axis in column.figure.axes}) == 2
    for panel, sentence in (
        (
            "composite close-up",
            r"^2 panels match 'composite close-up': 6 \(.*, 8 \([^,]*, backward, close-up\). .* --panel=6,8 ",
        ),
        ("3,9", r"There is no panel '3,9'; the panels of this figure are 1 \("),
    ):
        with pytest.raises(InputError, match=sentence):
            draw_figure("gain_depth", [folder], size_of("page", panel=panel))


def test_the_caption_explains_only_the_panels_that_are_drawn(folder):
    for panel, there, gone in (
        (
            "1",
            ['"Single" panels show', "A forward gain is", "the axis is log"],
            ['Composite"', "A backward", "bands", "close-up"],
        ),
        (
            "8",
            ["A backward gain is", "A close-up has", "Faint bands"],
            ['"Single"', "A forward", "the axis is logarithmic"],
        ),
    ):
        text = draw_figure("gain_depth", [folder], size_of("column", panel=panel)).caption.partition(
            " Lines and bands"
        )[0]
        text = text.partition("alone. ")[2]
        assert [words in text for words in there] == [True] * 3
        assert [words in text for words in gone] == [False] * len(gone)
    for name, plot in NAMED.items():
        for start in plot.only:
            assert f" {start} " in f" {plot.caption}", (name, start)
        assert plot.caption_of([]).count(".") <= plot.caption.count(".") - len(plot.only), name


def test_a_record_without_metrics_says_so(folder, tmp_path):
    (tmp_path / "hc").mkdir()
    (tmp_path / "hc" / "config.json").write_text("{}")
    with pytest.raises(
        InputError, match=r"has no metrics of its runs \(hc\); a record keeps them if .*record.py .*--metrics"
    ):
        draw_figure("loss", [tmp_path], COLUMN)


def test_runs_come_from_run_folders_sweeps_and_records(folder, tmp_path):
    assert [run.name for run in read_folders([folder])[0]] == ["hc-0", "hc-1", "mhc-0", "mhc-1"]
    assert [run.name for run in read_folders([folder / "mhc-1", folder / "hc-0"])[0]] == ["mhc-1", "hc-0"]
    write_runs(sorted(folder.iterdir()), tmp_path)
    assert [run.name for run in read_folders([tmp_path])[0]] == ["hc-0", "hc-1", "mhc-0", "mhc-1"]
    with pytest.raises(
        InputError, match=r"loss cannot be drawn of .*: no run has logged a loss.*record.py is given --met"
    ):
        draw_figure("loss", [tmp_path], COLUMN)
    sweep = {"title": "Two", "baseline": {"connection": "hc"}, "runs": ["mhc-0", "hc-0"], "bisection": None}
    for name in sweep["runs"]:
        (tmp_path / "sweep").mkdir(exist_ok=True)
        (tmp_path / "sweep" / name).symlink_to(folder / name)
    (tmp_path / "sweep" / "sweep.json").write_text(json.dumps(sweep))
    records, baseline = read_folders([tmp_path / "sweep"])
    assert [run.name for run in records] == ["mhc-0", "hc-0"]
    assert baseline == {"connection": "hc"}


def test_files_have_their_format_and_text_as_text(folder, tmp_path):
    drawn = draw_figure("seed_strip", [folder], COLUMN)
    files = write_figure(drawn, [tmp_path / "a" / "strip", tmp_path / "b.svg"])
    assert [str(path.relative_to(tmp_path)) for path in files] == [
        *("a/strip.pdf", "a/strip.svg", "a/strip.png", "b.svg"),
        *("a/strip.txt", "b.txt"),
    ]
    assert files[0].read_bytes()[:5] == b"%PDF-"
    assert files[2].read_bytes()[:4] == b"\x89PNG"
    text = files[1].read_text()
    assert "mhc:init=paper</text>" in text
    assert 'width="237.6pt"' in text, "3.3 inches of 72 points"
    assert files[-1].read_text() == drawn.caption + "\n"
    with pytest.raises(InputError, match=r"'\.jpg'; it must be one of '\.pdf', '\.svg', '\.png'"):
        write_figure(drawn, [tmp_path / "c.jpg"])
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cannot be written to .*file"):
        write_figure(drawn, [tmp_path / "file" / "c.pdf"])


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("gain_deth", r"is 'gain_deth'; it must be one of 'loss', .* Did you mean 'gain_depth'\?"),
        ("depth_mixing", "depth_mixing cannot be drawn of .*: no diagnostics with depth_mixing"),
        ("loss_gap", "has several seeds; draw gap_curves, or set --each_run"),
        ("swept", "swept cannot be drawn of .*: no number is swept"),
    ],
)
def test_figures_that_cannot_be_drawn_say_why(folder, name, sentence):
    with pytest.raises(InputError, match=sentence):
        draw_figure(name, [folder], COLUMN)


def test_folders_without_runs_are_mistakes(folder, tmp_path):
    for given, sentence in (
        ([], "RUNS is missing"),
        ([tmp_path], "holds no run"),
        ([tmp_path / "x"], "There is no folder"),
    ):
        with pytest.raises(InputError, match=sentence):
            draw_figure("loss", given, COLUMN)


def test_sizes_have_names_or_inches():
    assert size_of("column") == plots.Size(3.3, 7.0)
    assert size_of("page", 9.5, "2") == plots.Size(6.8, 9.5, "2")
    assert size_of("5.5") == plots.Size(5.5, 8.0)
    for given, sentence in (
        (("colum",), "or a width in inches, such as 5.5. Did you mean 'column'"),
        (("33",), "size is 33 inches; it must lie between 1.5 and 20"),
        (("nan",), "must lie between"),
        (("page", 40.0), "The text size is 40 points; it must lie between 4 and 20"),
    ):
        with pytest.raises(InputError, match=sentence):
            size_of(*given)


def test_the_command_draws_a_figure_and_lists_their_names(folder, tmp_path):
    out = tmp_path / "gain.pdf"
    status, printed, errors = run_script("figure", "gain_step", str(folder), "--panel=2", f"--output={out}")
    assert (status, errors) == (0, "")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gain.pdf", "gain.txt"]
    assert "(3.3 x 2" in printed
    assert out.with_suffix(".txt").read_text() in printed
    status, printed, _ = run_script("figure", "--list")
    assert [line.split()[0] for line in printed.splitlines()] == list(NAMED)
    status, _, errors = run_script("figure", "lss", str(folder))
    assert status == 2
    assert errors.endswith("Did you mean 'loss'?\n")
