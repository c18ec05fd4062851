"""Figures of sweeps and of several seeds show every seed, no line hides another, and variants have means, marks and colours."""

import itertools

import numpy as np
import pytest
from matplotlib.colors import to_hex, to_rgb
from support.synthetic_runs import STEPS, make_run

from mhc_jax import plots
from mhc_jax.analysis.grouping import group
from mhc_jax.plots import style, sweeps
from mhc_jax.plots.sweeps import SWEEP_FIGURES


def lines_of(axis, label):
    return [line for line in axis.lines if line.get_label() == label]


@pytest.fixture(scope="module")
def rates(tmp_path_factory):
    """Return residual and HC at two learning rates with two seeds each; one run of HC diverges."""
    root, out = tmp_path_factory.mktemp("rates"), []
    for kind, rate, seed in itertools.product(("residual", "hc"), (1e-3, 1e-2), (0, 1)):
        lost = 120 if (kind, rate, seed) == ("hc", 1e-2, 1) else None
        loss = {} if lost else {"validation_loss": 2.0 + 0.1 * seed + rate - 0.5 * (kind == "hc")}
        more = {"config": {"optimizer.learning_rate": rate}, "results": loss, "diverged_at": lost}
        out.append(make_run(root, f"{kind}-{rate}-{seed}", kind, seed=seed, **more))
    return group(out)


def test_points_of_a_sweep(rates):
    """Dots are the losses of the seeds at their learning rate, lines the means over the seeds that finished."""
    figure = SWEEP_FIGURES["swept"].draw(rates)
    assert [axis.get_xscale() for axis in figure.axes] == ["log"] * 5
    titles = [axis.get_title("left") for axis in figure.axes]
    assert titles[1::2] == [f"Largest composite gain, {side}" for side in ("forward", "backward")]
    assert titles[2::2] == [f"{title}, close-up" for title in titles[1::2]]
    assert [axis.get_yscale() for axis in figure.axes] == ["linear", "log", "linear", "log", "linear"]
    assert [bool(lines_of(axis, "hc")) for axis in figure.axes] == [True, True, False, True, False]
    axis = figure.axes[0]
    assert {line.get_label() for line in axis.lines if line.get_label()[0] != "_"} == {"residual", "hc"}
    dots = [line.get_data() for line in axis.lines if line.get_marker() == "."]
    residual, hc = (
        [(1e-3, 2.001), (1e-3, 2.101), (1e-2, 2.01), (1e-2, 2.11)],
        [(1e-3, 1.501), (1e-3, 1.601), (1e-2, 1.51)],
    )
    assert {(x, round(y, 6)) for xs, ys in dots for x, y in zip(xs, ys, strict=True)} == {*residual, *hc}
    (line,) = lines_of(axis, "hc")
    np.testing.assert_allclose(line.get_data(), [[1e-3, 1e-2], [1.551, 1.51]])


def test_rows_of_seeds(tmp_path, rates):
    """A row has dots, a bar at the mean, and a band of one standard deviation about the mean of the baseline."""
    runs = []
    for kind, seed in itertools.product(("residual", "hc"), range(3)):
        loss = {"validation_loss": 2.0 + 0.1 * seed + (kind == "hc")}
        runs.append(make_run(tmp_path, f"{kind}-{seed}", kind, seed=seed, results=loss))
    axis = SWEEP_FIGURES["seed_strip"].draw(group(runs)).axes[0]
    for line, expected in zip(axis.lines[:3], ([2.0, 2.1, 2.2], [2.1] * 2, [3.0, 3.1, 3.2]), strict=True):
        np.testing.assert_allclose(line.get_xdata(), expected)
    for band in axis.patches:  # of residual, in both rows
        assert (band.get_x(), band.get_width()) == pytest.approx((2.0, 0.2))
    (axis,) = SWEEP_FIGURES["seed_strip"].draw(rates).axes
    assert [text.get_text() for text in axis.texts] == ["1 of 2 without a loss"]
    assert not axis.patches, "two seeds have no band"
    (axis,) = SWEEP_FIGURES["gap_curves"].draw(group(runs)).axes
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["hc (3)"]
    assert len(axis.lines) == 3 + 1 + 1  # seeds, mean, zero
    for name in ("swept", "frontier", "ladder"):
        with pytest.raises(plots.NothingToDraw):
            SWEEP_FIGURES[name].draw(group(runs))


def test_marks_of_the_frontier(rates):
    """Marks are filled up to 0.5 nats above the best mean, 1.51; a rate with a diverged run is hollow with a cross."""
    axis = SWEEP_FIGURES["frontier"].draw(rates).axes[0]
    marks = [(line.get_xdata()[0], line.get_fillstyle()) for line in axis.lines if line.get_marker() == "o"]
    assert marks == [(1e-3, "none"), (1e-2, "none"), (1e-3, "full"), (1e-2, "none")]
    assert sum(line.get_marker() == "x" for line in axis.lines) == 3
    (bar,) = [line for line in axis.lines if line.get_linewidth() == 6]
    assert list(bar.get_xdata()) == [1e-3, 1e-3]


def test_gaps_of_seeds_and_their_mean(rates):
    """The gap is HC's loss minus residual's of the same seed and step, so that the noise of a seed cancels."""
    (line,) = lines_of(SWEEP_FIGURES["gap_curves"].draw(rates).axes[0], "hc lr=0.001 (2)")
    steps, gap = line.get_data()
    # A straight line, -0.06 of the share of the steps done; medians of it are its middle.
    np.testing.assert_allclose(gap[5:-5], -0.06 * np.asarray(steps)[5:-5] / STEPS, atol=1e-9)


def test_variants_of_a_kind_are_shades_of_its_colour(rates):
    (axis,) = SWEEP_FIGURES["gap_curves"].draw(rates).axes
    found = [to_hex(lines_of(axis, f"hc lr={rate} (2)")[0].get_color()) for rate in (0.001, 0.01)]
    assert found == style.shades("#d55e00", 2)
    assert style.shades("#d55e00", 1) == ["#d55e00"]
    for light, dark in itertools.pairwise(to_rgb(color) for color in style.shades("#0072b2", 5)):
        assert all(a > b or a == b == 0 for a, b in zip(light, dark, strict=True))


def test_the_axis_of_gaps_holds_every_seed(tmp_path):
    runs = [make_run(tmp_path, f"{kind}{k}", kind, seed=k) for kind in ("residual", "hc") for k in (0, 1)]
    runs[3].train["loss"][20:30] += 0.5
    low, high = SWEEP_FIGURES["gap_curves"].draw(group(runs)).axes[0].get_ylim()
    assert low < -0.06
    assert high > 0.49, "the seed alone pulls the mean, and the panel holds it"


def test_an_outlier_far_beyond_the_means_is_cut_and_marked():
    _, (panel,) = style.panels(1, 1)
    seeds = [panel.plot([1, 2, 3, 4], [0.0, gap, 9.0, -0.1])[0] for gap in (-0.1, 9.0)]
    sweeps._fit_seeds(panel, [0.0, -0.1], seeds)
    assert panel.get_ylim()[1] < 0.1
    assert [list(line.get_xdata()) for line in panel.lines if line.get_marker() == "^"] == [[3], [2]]
    assert [len(line.get_xdata()) for line in panel.lines if line.get_marker() == "v"] == [0, 0]


def test_the_line_of_residual_lies_wide_under_those_that_could_hide_it(tmp_path):
    runs = [make_run(tmp_path, f"{kind}{k}", kind, seed=k) for kind in ("residual", "mhc") for k in (0, 1)]
    for panel in (
        plots.loss(runs[::2]).axes[0],
        plots.grad_norm(runs[::2]).axes[0],
        SWEEP_FIGURES["seed_bands"].draw(group(runs)).axes[1],
    ):
        below, above = [line for line in panel.lines if not str(line.get_label()).startswith("_")][
            :: 2 if panel.get_title("left") else 1
        ]
        assert below.get_linewidth() > 1.5 * above.get_linewidth()
        assert below.get_zorder() < above.get_zorder()
    bands = SWEEP_FIGURES["seed_bands"].draw(group(runs)).axes[1]
    marks = [
        (line.get_marker(), line.get_markevery()) for line in bands.lines if line.get_marker() not in ("v", "None")
    ]
    assert [mark for mark, _ in marks] == ["o", "^"]
    assert marks[0][1] != marks[1][1], "the markers of equal lines do not cover each other"
