"""Every figure shows the numbers of its runs, names its axes and runs, and raises an error where it has nothing to show."""

import contextlib
import copy
import dataclasses
import math
import re

import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.text import Text
from support.synthetic_runs import STEPS, SUBLAYERS, legend_texts, make_four, make_run
from support.tiny_runs import lines

from mhc_jax import plots
from mhc_jax.analysis.run_reader import labels, last_diagnostics, series
from mhc_jax.diagnostics import STREAM_MEASURES, second_eigenvalue
from mhc_jax.errors import InputError
from mhc_jax.plots import axes, style

MHC, LOST = "mhc:init=paper", "hc dtype=float16"
"""Labels of the third and the fourth run."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return make_four(tmp_path_factory.mktemp("runs"), "differ")


def lines_of(axis, label):
    return [line for line in axis.lines if line.get_label() == label]


def data(axis, label):
    """Return the last curve of a run in a panel, which is the validation loss where there are two."""
    return lines_of(axis, label)[-1].get_data()


def test_every_figure_explains_itself_and_names_its_axes(runs):
    assert len(plots.FIGURES) == 14
    for name, plot in plots.FIGURES.items():
        assert plot.caption.endswith(".")
        assert plot.title
        for axis in plot.draw(runs).axes if name != "depth_mixing" else ():  # test_plots_depth.py
            if axis.get_label() != "<colorbar>" and name != "h_res":
                assert axis.get_xlabel(), name
                assert axis.get_ylabel(), name


def test_a_figure_is_saved_as_png_and_svg_and_shown_as_self_contained_svg(runs, tmp_path):
    for name in ("plain", "both"):
        plots.save(plots.loss(runs), tmp_path / f"{name}.png", vector=name == "both")
        assert (tmp_path / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
    assert (tmp_path / "both.svg").read_text().count("<svg") == 1
    assert [path.name for path in tmp_path.glob("*.svg")] == ["both.svg"]
    text = plots.svg(plots.loss(runs))
    assert text.startswith("<svg")
    assert "currentColor" in text
    assert not re.search("://|<!--", text)
    assert plots.svg(plots.loss(runs)) == text


def test_loss_shows_smoothed_training_validation_divergence_and_spikes(runs, tmp_path):
    figure = plots.loss(runs)
    whole, half = figure.axes
    for run, label in list(zip(runs, labels(runs), strict=True))[:3]:
        train, validation = lines_of(whole, label)
        steps, values = series(run, "train", "loss")
        np.testing.assert_array_equal(train.get_xdata(), steps)
        np.testing.assert_array_equal(train.get_ydata(), plots.smooth(values))
        np.testing.assert_array_equal(validation.get_ydata(), series(run, "validation", "loss")[1])
        assert validation.get_linestyle() == "None"
    raw = [item.get_ydata() for item in whole.lines if item.get_alpha() == 0.25]
    np.testing.assert_array_equal(raw[1], series(runs[1], "train", "loss")[1])
    assert half.get_xlim()[0] == STEPS / 2
    assert half.get_ylim()[1] < 2.2
    assert len([item for item in whole.lines if list(item.get_xdata()) == [120, 120]]) == 1
    assert [90, 150] in [list(item.get_xdata()) for item in whole.lines if item.get_marker() == "v"]
    assert legend_texts(figure)[-1] == f"{LOST} (diverged at step 120)"
    assert whole.get_yscale() == "linear"
    wide = make_run(tmp_path, "run", "hc")
    wide.train["loss"][-1] = 900.0
    assert plots.loss([wide]).axes[0].get_yscale() == "log"


def test_smoothing_is_a_median_that_keeps_the_start_gaps_and_length():
    values = np.arange(100.0)
    np.testing.assert_array_equal(plots.smooth(values)[:-2], values[:-2])
    noisy = np.append(np.zeros(99), 1e6)
    assert plots.smooth(noisy)[-1] == 0  # one step is no end of a curve
    values[50], values[20] = 1e6, np.nan
    out = plots.smooth(values)
    assert out[50] < 60
    assert np.flatnonzero(np.isnan(out)).tolist() == [20]
    assert plots.smooth(np.empty(0)).shape == (0,)


def test_gap_is_run_minus_residual(runs):
    axis = plots.loss_gap(runs).axes[0]
    steps, gap = data(axis, "hc")
    assert steps.tolist() == [50, 100, 150, 200]
    np.testing.assert_allclose(gap, -0.06 * steps / STEPS, rtol=1e-9)
    # The gap is a straight line; the last smoothed point is the median of the last five steps.
    assert lines_of(axis, MHC)[0].get_ydata()[-1] == pytest.approx(-0.03 * (STEPS - 2) / STEPS, rel=1e-9)
    assert "loss − baseline's loss" in axis.get_ylabel()
    assert not lines_of(axis, "residual")
    assert axis.get_ylim()[0] < -0.06 < 0 < axis.get_ylim()[1]


def test_gradient_norms_are_logarithmic_with_the_clipping_threshold(runs):
    axis = plots.grad_norm(runs).axes[0]
    assert axis.get_yscale() == "log"
    np.testing.assert_array_equal(data(axis, MHC)[1], plots.smooth(series(runs[2], "train", "grad_norm")[1]))
    assert [1.0, 1.0] in [list(item.get_ydata()) for item in axis.lines]


def test_gains_against_depth_are_the_last_diagnostics_and_against_steps_of_the_whole_product(runs):
    figure = plots.gain_depth(runs)
    keys = ("single_forward", "single_backward", "composite_forward", "composite_backward")
    assert len(figure.axes) == 8, "each measurement has a close-up"
    axes = figure.axes[::2]
    for axis, key in zip(axes, keys, strict=True):
        assert axis.get_yscale() == "log"
        for run, label in zip(runs, labels(runs), strict=True):
            depth, gain = data(axis, label)
            assert depth.tolist() == list(range(1, SUBLAYERS + 1))
            assert axis.get_xlim()[0] == 0.5, "l counts from 1, and no tick stands at 0"
            np.testing.assert_array_equal(gain, last_diagnostics(run, key)[1])
        assert axis.get_ylim()[0] < 0.6 < max(data(axis, "hc")[1]) < axis.get_ylim()[1]
    assert [len(axis.collections) for axis in axes[:3:2]] == [0, len(runs)]
    assert axes[2].get_ylim() == axes[3].get_ylim()
    forward, _, backward, _ = plots.gain_step(runs).axes
    for axis, side, end in ((forward, "forward", -1), (backward, "backward", 0)):
        expected = series(runs[1], "diagnostics", f"composite_{side}")[1][:, end]
        np.testing.assert_array_equal(data(axis, "hc")[1], expected)
    assert data(forward, "hc")[0].tolist() == [50, 100, 150, 200]
    assert forward.get_yscale() == backward.get_yscale() == "log"


def test_close_ups_of_gains_have_axes_of_their_own_which_hold_their_curves(runs, tmp_path):
    for figure in (plots.gain_depth(runs), plots.gain_step(runs)):
        for axis in figure.axes[1::2]:
            assert axis.get_yscale() == "linear"
            assert axis.get_title("left").endswith(", close-up")
            assert {label for label in labels(runs) if lines_of(axis, label)} == {"residual", MHC}
            low, high = axis.get_ylim()
            assert low < 0.98 < 1.02 < high < 3
            for line in axis.lines:
                assert low < min(line.get_ydata()) <= max(line.get_ydata()) < high
    grown = dataclasses.replace(runs[2], diagnostics=copy.deepcopy(runs[2].diagnostics))
    grown.diagnostics[-1]["composite_backward_max"] *= 1.5
    tops = [axis.get_ylim()[1] for axis in plots.gain_depth([*runs[:2], grown]).axes[1::2]]
    assert tops == pytest.approx([1.022, 1.022, 1.022, 1.55], abs=0.03), "each close-up has an axis of its own"
    assert [axis.get_yscale() for axis in plots.gain_depth(runs[2:3]).axes] == ["linear"] * 4, "no HC, no close-ups"
    assert [axis.get_yscale() for axis in plots.gain_depth(runs[1:2]).axes] == ["log"] * 4


def test_a_figure_has_the_width_and_the_text_of_its_size(runs):
    for size in (plots.SIZES["column"], plots.SIZES["page"], plots.Size(5, 6.5)):
        with plots.drawn_at(size):
            drawn = {name: plot.draw(runs) for name, plot in plots.FIGURES.items() if name != "depth_mixing"}
        for name, figure in drawn.items():
            assert figure.get_figwidth() == size.width, name
            texts = [text for text in figure.findobj(Text) if text.get_text() and text not in figure.axes[0].texts]
            assert max(text.get_fontsize() for text in texts) <= 9.5 / 9 * size.text + 1e-6, name
        rows = {axis.get_subplotspec().rowspan.start for axis in drawn["gain_depth"].axes}
        assert len(rows) == (8 if size.width == 3.3 else 4)
    assert plots.gain_depth(runs).get_figwidth() == 8.4


def test_one_panel_is_drawn_alone_with_the_legend_of_its_runs(runs):
    names = plots.panel_names(plots.gain_depth(runs))
    assert names[7] == "Composite H(L)···H(l), backward, close-up"
    for panel in ("8", "COMPOSITE backward close-up"):
        with plots.drawn_at(plots.Size(3.3, 7.0, panel)):
            figure = plots.gain_depth(runs)
        assert plots.panel_names(figure) == [names[7]]
        assert legend_texts(figure) == ["residual", MHC]
        assert figure.get_figheight() < 3
    with plots.drawn_at(plots.Size(3.3, 7.0, "3")):
        assert plots.panel_names(plots.h_res(runs)) == ["hc: l = 16"]
    for panel in ("9", "0", "sideways"):
        with (
            plots.drawn_at(plots.Size(panel=panel)),
            pytest.raises(InputError, match=rf"no panel '{panel}'; .* 1 \(Single"),
        ):
            plots.gain_depth(runs)


def test_similarity_shows_what_sees_collapse_and_leaves_out_runs_of_one_stream(runs, tmp_path):
    opposite = make_run(tmp_path, "opposite", "hc", streams="opposite", config={"model.dtype": "opposite"})
    figure = plots.stream_similarity([*runs, opposite])
    cosine, cosine_steps, rank, rank_steps = figure.axes
    for name, absolute, signed, ranks in (
        (MHC, c := 1 - 0.3 * np.linspace(0, 1, SUBLAYERS), c, 4 / (1 + 3 * c**2)),
        ("hc dtype=opposite", np.ones(SUBLAYERS), np.full(SUBLAYERS, -1 / 3), np.ones(SUBLAYERS)),
    ):
        thick, thin = lines_of(cosine, name)
        assert thick.get_linewidth() > 2 * thin.get_linewidth()
        np.testing.assert_allclose(thick.get_ydata(), absolute)
        np.testing.assert_allclose(thin.get_ydata(), signed)
        np.testing.assert_allclose(data(rank, name)[1], ranks)
        thick, thin = lines_of(cosine_steps, name)
        np.testing.assert_allclose(thick.get_ydata(), [absolute.mean()] * 4)
        np.testing.assert_allclose(thin.get_ydata(), [signed.mean()] * 4)
        np.testing.assert_allclose(data(rank_steps, name)[1], [ranks.mean()] * 4)
    assert cosine.get_ylim()[0] < -1 / 3
    assert rank.get_ylim() == rank_steps.get_ylim()
    assert rank.get_ylim()[1] > 4, "the axis reaches n, where streams are orthogonal"
    assert [axis.get_xlabel() for axis in (cosine, rank)] == [f"sub-layer l (steps 100 to {STEPS})"] * 2
    assert legend_texts(figure) == ["hc", MHC, f"{LOST} (diverged at step 120)", "hc dtype=opposite"]


def test_similarity_draws_what_a_record_has(tmp_path):
    """Measures that are missing are not drawn, and means leave out sub-layers without a number."""
    run = make_run(tmp_path, "run", "hc", drop=("stream_cosine_abs", "stream_rank"))
    for line in run.diagnostics:
        line["stream_cosine"][1:] = np.nan
        line["stream_cosine"][3] = 0.5
    cosine, steps, rank, _ = plots.stream_similarity([run]).axes
    assert (len(cosine.lines), len(rank.lines)) == (1, 0)
    np.testing.assert_allclose(steps.lines[0].get_ydata(), [(1 + 0.5) / 2] * 4)


def test_stream_sizes_are_means_with_a_band_over_streams(runs):
    axis = plots.stream_size(runs).axes[0]
    rms = last_diagnostics(runs[2], "stream_rms")[1]
    np.testing.assert_allclose(data(axis, MHC)[1], rms.mean(1))
    band = axis.collections[2].get_paths()[0].vertices[:, 1]
    assert np.isin([rms.min(1), rms.max(1)], band).all()


def test_heat_maps_show_matrices_on_their_scales_sums_products_and_gates(runs):
    figure = plots.h_res(runs)
    assert len(figure.axes) == 3 * 6
    matrices = last_diagnostics(runs[2], "h_res")[1]
    row = figure.axes[6:12]
    for axis, l in zip(row, (1, 8, 16), strict=False):
        assert axis.get_title() == f"l = {l}"
        np.testing.assert_array_equal(np.ravel(axis.collections[0].get_array()), matrices[l - 1].ravel())
    for axis, high, low in zip(row[3:], (8, 16, 16), (1, 9, 1), strict=True):
        assert axis.get_title() == f"H({high})···H({low})"
        product = np.linalg.multi_dot(matrices[low - 1 : high][::-1])
        np.testing.assert_allclose(np.ravel(axis.collections[0].get_array()), product.ravel(), rtol=1e-12)
    assert [text.get_text() for text in row[0].texts[:16]] == [f"{abs(v):.2f}" for v in matrices[0].ravel()]
    assert len(row[0].texts) == 16 + 8
    by_place = {text.get_position(): float(text.get_text()) for text in figure.axes[0].texts[16:]}
    signed = last_diagnostics(runs[1], "h_res")[1][0]
    for i in range(4):
        assert by_place[4.12, i + 0.5] == pytest.approx(signed.sum(1)[i], abs=0.006)
        assert by_place[i + 0.5, 4.12] == pytest.approx(signed.sum(0)[i], abs=0.006)
    hc, mhc = (figure.axes[k].collections[0] for k in (0, 6))
    assert (hc.get_cmap().name, hc.norm.vmin) == ("RdBu_r", -hc.norm.vmax), "signed"
    assert (mhc.get_cmap().name, mhc.norm.vmin) == ("Blues", 0)
    axes = [a for a in plots.reads_and_writes(runs).axes if a.get_label() != "<colorbar>"]
    assert len(axes) == 3 * 2
    shown = np.asarray(axes[0].collections[0].get_array()).reshape(4, SUBLAYERS)
    np.testing.assert_array_equal(shown, last_diagnostics(runs[1], "h_pre")[1].T)


def test_kinds_keep_colours_and_runs_differ_in_style(runs):
    axis = plots.gain_depth(runs).axes[0]
    looks = {label: lines_of(axis, label)[-1] for label in labels(runs)}
    assert to_hex(looks["hc"].get_color()) == to_hex(looks[LOST].get_color()) == "#d55e00"
    assert to_hex(looks[MHC].get_color()) == "#0072b2"
    assert to_hex(lines_of(plots.gain_depth(runs[2:3]).axes[0], MHC)[-1].get_color()) == "#0072b2"
    assert len({looks[name].get_marker() for name in ("residual", "hc", MHC)}) == 3
    assert looks["hc"].get_linestyle() != looks[LOST].get_linestyle()
    assert looks["hc"].get_fillstyle() != looks[LOST].get_fillstyle()


def test_figures_without_data_say_what_they_need(runs):
    for name in ("h_res", "reads_and_writes", "mixing", "stream_similarity", "loss_gap"):
        with pytest.raises(plots.NothingToDraw, match="Nothing to draw"):
            plots.FIGURES[name].draw(runs[:1])
    for name in ("loss", "loss_cost", "grad_norm", "gain_depth", "gain_step", "block_grad_norm"):
        assert legend_texts(plots.FIGURES[name].draw(runs[:1])) == ["residual"]
    with pytest.raises(plots.NothingToDraw):
        plots.loss_gap(runs[1:2])


@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.full)], ids=["two", "all"])
def test_missing_keys_and_kinds_without_a_look_are_tolerated(tmp_path, every):
    keys = ("composite_forward_max", "single_backward", "tokens", "grad_norm", *STREAM_MEASURES)
    new = {"model.connection.kind": "brand_new"}
    run = make_run(tmp_path, "_mine $x", "mhc", drop=(*keys, "h_post"), config=new)
    for name, plot in plots.FIGURES.items():
        missing = name in ("grad_norm", "loss_gap", "stream_similarity", "depth_mixing")
        with pytest.raises(plots.NothingToDraw) if missing else contextlib.nullcontext():
            figure = plot.draw([run])
        if every or name in ("loss", "reads_and_writes"):
            assert "<svg" in plots.svg(figure)


def test_second_eigenvalue_of_known_matrices_and_of_the_last_ones(runs):
    n = 4
    uniform, shift = np.full((n, n), 1 / n), np.roll(np.eye(n), 1, axis=1)
    lazy = 0.7 * np.eye(n) + 0.3 * uniform  # eigenvalues 1 and three times 0.7
    found = second_eigenvalue(np.stack([np.eye(n), uniform, shift, lazy, 5 * lazy]))
    np.testing.assert_allclose(found, [1, 0, 1, 0.7, 0.7], atol=1e-12)
    np.testing.assert_array_equal(second_eigenvalue(np.ones((3, 1, 1))), np.zeros(3))
    single, product = plots.eigenvalues(runs).axes
    _, matrices = last_diagnostics(runs[2], "h_res")
    np.testing.assert_allclose(data(single, MHC)[1], second_eigenvalue(matrices))
    whole = np.linalg.multi_dot(matrices[::-1])
    assert data(product, MHC)[1][-1] == pytest.approx(second_eigenvalue(whole[None])[0], rel=1e-6)
    assert "residual" not in legend_texts(plots.eigenvalues(runs))


def test_loss_against_cost(runs):
    """The x axes are tokens x FLOPs per token and steps x median step time."""
    arithmetic, time = plots.loss_cost(runs).axes
    assert arithmetic.get_xlabel() == "training arithmetic (FLOPs)"
    assert time.get_xlabel() == "training time (s)"
    steps = np.arange(2, STEPS + 1, 2)
    (line,) = lines_of(arithmetic, "hc")
    np.testing.assert_allclose(line.get_xdata(), steps * 16 * 128 * (2.4e6 + 403_000))
    (line,) = lines_of(time, "hc")
    np.testing.assert_allclose(line.get_xdata(), steps * 0.15)
    losses = [one["loss"] for one in lines(runs[1].folder, "train")]
    # 100 points: a window of two on each side, one-sided from the last but one on.
    expected = [np.median(losses[max(0, k - min(2, k)) : k + min(2, k) + 1]) for k in range(100)]
    np.testing.assert_allclose(line.get_ydata(), expected)


def test_gradient_norm_of_blocks(runs):
    axis = plots.block_grad_norm(runs).axes[0]
    (line,) = lines_of(axis, MHC)
    np.testing.assert_array_equal(line.get_ydata(), lines(runs[2].folder, "diagnostics")[-1]["grad_norm_per_layer"])
    assert list(line.get_xdata()) == list(range(1, 9))
    assert axis.get_yscale() == "log"


def test_marginals_entropy_and_distance(runs):
    matrices = last_diagnostics(runs[1], "h_res")[1]
    rows, columns, entropy, distance = plots.mixing(runs).axes
    expected = [max(abs(sum(row) - 1) for row in H) for H in matrices]
    np.testing.assert_allclose(np.ma.filled(lines_of(rows, "hc")[0].get_ydata(), 0), expected, atol=1e-12)
    expected = [max(abs(sum(column) - 1) for column in H.T) for H in matrices]
    np.testing.assert_allclose(np.ma.filled(lines_of(columns, "hc")[0].get_ydata(), 0), expected, atol=1e-12)
    one = abs(matrices[3]) / abs(matrices[3]).sum(1, keepdims=True)
    assert lines_of(entropy, "hc")[0].get_ydata()[3] == pytest.approx(-(one * np.log(one)).sum() / 4 / math.log(4))
    product = np.linalg.multi_dot(matrices[::-1])
    assert lines_of(distance, "hc")[0].get_ydata()[-1] == pytest.approx(np.linalg.norm(product - 0.25))
    assert rows.get_ylabel() == "max |row sum − 1|"


def test_ticks_of_a_short_logarithmic_axis_are_labelled_as_they_stand():
    assert [axes._tick(value, 0) for value in (2.2e-7, 1e-7, 0.02)] == [r"$2.2\cdot 10^{-7}$", "$10^{-7}$", "0.02"]
    _, (panel,) = style.panels(1, 1)
    panel.plot([0, 1], [2.3, 3.1])
    axes.log_axis(panel)
    assert list(panel.get_yticks()) == [1.5, 2, 2.5, 3, 3.5, 4], "more than the multiples of a power of ten"
    label = axes._minor_ticks(10.0)
    assert [label(value, 0) for value in (2e-7, 3e-7)] == [r"$2\cdot 10^{-7}$", ""]


def test_long_names_of_rows_take_several_lines_and_the_figure_grows():
    figure, (panel,) = style.panels(1, 1)
    before = figure.get_figheight()
    style.name_rows(panel, ["hc", "mhc:init=home"])
    assert figure.get_figheight() == before
    style.name_rows(panel, ["hc", "mhc:init=home:entry=scaled:num_streams=8:t_max=5 optimizer=muon learning_rate=0.03"])
    short, long = (text.get_text() for text in panel.get_yticklabels())
    assert short == "hc"
    assert long.split("\n")[0] == "mhc:init=home:entry=scaled:"
    assert figure.get_figheight() > before
