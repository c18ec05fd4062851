"""Figures of several seeds show every seed, and no line hides another."""

from support.synthetic_runs import make_run

from mhc_jax import plots
from mhc_jax.analysis.grouping import group
from mhc_jax.plots import style, sweeps
from mhc_jax.plots.sweeps import SWEEP_FIGURES


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
