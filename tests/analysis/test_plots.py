"""Every figure shows the numbers of its runs, names its axes and runs, and says what it needs where it has nothing to show."""

import re

import numpy as np
import pytest
from matplotlib.colors import to_hex
from support.synthetic_runs import STEPS, SUBLAYERS, write_run

from mhc_jax import plots
from mhc_jax.diagnostics import STREAM_MEASURES, second_eigenvalue
from mhc_jax.records import labels, last_diagnostics, read_run, series

MHC, LOST = "mhc:init=paper", "hc dtype=float16"
"""Labels of the third and the fourth run."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Residual, hc, mhc and an hc that diverges at step 120."""
    root = tmp_path_factory.mktemp("runs")
    return [
        read_run(write_run(root, "residual", "residual")),
        read_run(write_run(root, "hc", "hc", spikes=(90, 150))),
        read_run(write_run(root, "mhc", "mhc")),
        read_run(write_run(root, "hc-fp16", "hc", diverged_at=120, config={"model.dtype": "float16"})),
    ]


def line(axis, label):
    """The curve of a run in a panel; the last one, which holds validation where there are two."""
    found = [item for item in axis.lines if item.get_label() == label]
    assert found, f"no line {label!r}"
    return found[-1]


def data(axis, label):
    return np.asarray(line(axis, label).get_xdata()), np.asarray(line(axis, label).get_ydata())


def legend_texts(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_every_figure_explains_itself_and_names_its_axes(runs):
    assert len(plots.FIGURES) == 13
    for name, plot in plots.FIGURES.items():
        assert plot.caption.endswith(".")
        assert plot.title
        for axis in plot.draw(runs).axes:
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
        train, validation = [item for item in whole.lines if item.get_label() == label]
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
    wide = read_run(write_run(tmp_path, "run", "hc"))
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
    train = next(item for item in axis.lines if item.get_label() == MHC)
    # The gap is a straight line; the last smoothed point is the median of the last five steps.
    np.testing.assert_allclose(train.get_ydata()[-1], -0.03 * (STEPS - 2) / STEPS, rtol=1e-9)
    assert "loss − baseline's loss" in axis.get_ylabel()
    assert not [item for item in axis.lines if item.get_label() == "residual"]
    assert axis.get_ylim()[0] < -0.06
    assert axis.get_ylim()[1] > 0


def test_gradient_norms_are_logarithmic_with_the_clipping_threshold(runs):
    axis = plots.grad_norm(runs).axes[0]
    assert axis.get_yscale() == "log"
    expected = plots.smooth(series(runs[2], "train", "grad_norm")[1])
    np.testing.assert_array_equal(data(axis, MHC)[1], expected)
    assert [1.0, 1.0] in [list(item.get_ydata()) for item in axis.lines]


def test_gains_against_depth_are_the_last_diagnostics_and_against_steps_of_the_whole_product(runs):
    figure = plots.gain_depth(runs)
    keys = ("single_forward", "single_backward", "composite_forward", "composite_backward")
    for axis, key in zip(figure.axes, keys, strict=True):
        assert axis.get_yscale() == "log"
        for run, label in zip(runs, labels(runs), strict=True):
            depth, gain = data(axis, label)
            assert depth.tolist() == list(range(1, SUBLAYERS + 1))
            np.testing.assert_array_equal(gain, last_diagnostics(run, key)[1])
        assert axis.get_ylim()[0] < 0.6
        assert axis.get_ylim()[1] > max(data(axis, "hc")[1])
    assert len(figure.axes[0].collections) == 0
    assert len(figure.axes[2].collections) == len(runs)
    assert figure.axes[2].get_ylim() == figure.axes[3].get_ylim()
    forward, backward = plots.gain_step(runs).axes
    expected = series(runs[1], "diagnostics", "composite_forward")[1][:, -1]
    np.testing.assert_array_equal(data(forward, "hc")[1], expected)
    expected = series(runs[1], "diagnostics", "composite_backward")[1][:, 0]
    np.testing.assert_array_equal(data(backward, "hc")[1], expected)
    assert data(forward, "hc")[0].tolist() == [50, 100, 150, 200]
    assert forward.get_yscale() == backward.get_yscale() == "log"


def test_similarity_shows_what_sees_collapse_and_leaves_out_runs_of_one_stream(runs, tmp_path):
    opposite = read_run(
        write_run(tmp_path, "opposite", "hc", opposite_streams=True, config={"model.dtype": "opposite"})
    )
    figure = plots.stream_similarity([*runs, opposite])
    cosine, cosine_steps, rank, rank_steps = figure.axes
    for name, absolute, signed, ranks in (
        (MHC, c := 1 - 0.3 * np.linspace(0, 1, SUBLAYERS), c, 4 / (1 + 3 * c**2)),
        ("hc dtype=opposite", np.ones(SUBLAYERS), np.full(SUBLAYERS, -1 / 3), np.ones(SUBLAYERS)),
    ):
        thick, thin = [item for item in cosine.lines if item.get_label() == name]
        assert thick.get_linewidth() > 2 * thin.get_linewidth()
        np.testing.assert_allclose(thick.get_ydata(), absolute)
        np.testing.assert_allclose(thin.get_ydata(), signed)
        np.testing.assert_allclose(data(rank, name)[1], ranks)
        thick, thin = [item for item in cosine_steps.lines if item.get_label() == name]
        np.testing.assert_allclose(thick.get_ydata(), [absolute.mean()] * 4)
        np.testing.assert_allclose(thin.get_ydata(), [signed.mean()] * 4)
        np.testing.assert_allclose(data(rank_steps, name)[1], [ranks.mean()] * 4)
    assert cosine.get_ylim()[0] < -1 / 3
    assert rank.get_ylim() == rank_steps.get_ylim()
    assert rank.get_ylim()[1] > 4, "the axis reaches n, where streams are orthogonal"
    assert [axis.get_title("left") for axis in (cosine, rank)] == [f"Over depth (steps 100 to {STEPS})"] * 2
    assert legend_texts(figure) == ["hc", MHC, f"{LOST} (diverged at step 120)", "hc dtype=opposite"]


def test_similarity_draws_what_a_record_has(tmp_path):
    """Of two measures that are missing nothing, and of sub-layers without a number the mean of the others."""
    run = read_run(write_run(tmp_path, "run", "hc", drop=("stream_cosine_abs", "stream_rank")))
    for line in run.diagnostics:
        line["stream_cosine"][1:] = np.nan
        line["stream_cosine"][3] = 0.5
    cosine, steps, rank, _ = plots.stream_similarity([run]).axes
    assert len(cosine.lines) == 1
    assert not rank.lines
    np.testing.assert_allclose(steps.lines[0].get_ydata(), [(1 + 0.5) / 2] * 4)


def test_stream_sizes_are_means_with_a_band_over_streams(runs):
    axis = plots.stream_size(runs).axes[0]
    rms = last_diagnostics(runs[2], "stream_rms")[1]
    np.testing.assert_allclose(data(axis, MHC)[1], rms.mean(1))
    band = axis.collections[2].get_paths()[0].vertices[:, 1]
    assert np.isin(rms.min(1), band).all()
    assert np.isin(rms.max(1), band).all()


def test_heat_maps_show_matrices_on_their_scales_sums_products_and_gates(runs):
    figure = plots.h_res(runs)
    assert len(figure.axes) == 3 * 6
    matrices = last_diagnostics(runs[2], "h_res")[1]
    row = figure.axes[6:12]
    for axis, l in zip(row, (0, 4, 8, 11, 15), strict=False):
        assert axis.get_title() == f"l = {l + 1}"
        np.testing.assert_array_equal(np.ravel(axis.collections[0].get_array()), matrices[l].ravel())
    product = np.eye(4)
    for matrix in matrices:
        product = matrix @ product
    shown = np.ravel(row[5].collections[0].get_array())
    np.testing.assert_allclose(shown, product.ravel(), rtol=1e-12)
    texts = [text.get_text() for text in row[0].texts]
    assert texts[:16] == [f"{abs(v):.2f}" for v in matrices[0].ravel()]
    assert len(texts) == 16 + 8
    by_place = {text.get_position(): float(text.get_text()) for text in figure.axes[0].texts[16:]}
    signed = last_diagnostics(runs[1], "h_res")[1][0]
    for i in range(4):
        assert by_place[4.12, i + 0.5] == pytest.approx(signed.sum(1)[i], abs=0.006)
        assert by_place[i + 0.5, 4.12] == pytest.approx(signed.sum(0)[i], abs=0.006)

    # Signed matrices have a scale centred at zero.
    hc, mhc = (figure.axes[k].collections[0] for k in (0, 6))
    assert hc.get_cmap().name == "RdBu_r"
    assert hc.norm.vmin == -hc.norm.vmax
    assert mhc.get_cmap().name == "Blues"
    assert mhc.norm.vmin == 0
    axes = [a for a in plots.gates(runs).axes if a.get_label() != "<colorbar>"]
    assert len(axes) == 3 * 2
    shown = np.asarray(axes[0].collections[0].get_array()).reshape(4, SUBLAYERS)
    np.testing.assert_array_equal(shown, last_diagnostics(runs[1], "h_pre")[1].T)


def test_kinds_keep_colours_and_runs_differ_in_style(runs):
    axis = plots.gain_depth(runs).axes[0]
    looks = {label: line(axis, label) for label in labels(runs)}
    assert to_hex(looks["hc"].get_color()) == to_hex(looks[LOST].get_color()) == "#d55e00"
    assert to_hex(looks[MHC].get_color()) == "#0072b2"
    assert to_hex(line(plots.gain_depth(runs[2:3]).axes[0], MHC).get_color()) == "#0072b2"
    assert len({looks[name].get_marker() for name in ("residual", "hc", MHC)}) == 3
    assert looks["hc"].get_linestyle() != looks[LOST].get_linestyle()
    assert looks["hc"].get_fillstyle() != looks[LOST].get_fillstyle()


def test_figures_without_data_say_what_they_need(runs):
    alone = runs[:1]
    for name in ("h_res", "gates", "mixing", "stream_similarity", "loss_gap"):
        with pytest.raises(plots.NothingToDraw, match="Nothing to draw"):
            plots.FIGURES[name].draw(alone)
    for name in ("loss", "loss_cost", "grad_norm", "gain_depth", "gain_step", "layer_grad_norm"):
        assert legend_texts(plots.FIGURES[name].draw(alone)) == ["residual"]
    with pytest.raises(plots.NothingToDraw):
        plots.loss_gap(runs[1:2])


def test_missing_keys_and_kinds_without_a_look_are_tolerated(tmp_path):
    keys = ("composite_forward_max", "single_backward", "tokens", "grad_norm", *STREAM_MEASURES)
    new = {"model.connection.kind": "brand_new"}
    run = read_run(write_run(tmp_path, "_mine $x", "mhc", drop=(*keys, "h_post"), config=new))
    missing = []
    for name, plot in plots.FIGURES.items():
        try:
            figure = plot.draw([run])
        except plots.NothingToDraw:
            missing.append(name)
            continue
        if name in ("loss", "gates"):
            assert "<svg" in plots.svg(figure)
    assert sorted(missing) == ["grad_norm", "loss_gap", "stream_similarity"]


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
