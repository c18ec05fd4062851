"""What stands on the axes of figures whose numbers no other test holds."""

import json
import math

import numpy as np
import pytest
from support.synthetic_runs import STEPS, write_run

from mhc_jax import plots
from mhc_jax.plots.sweeps import SWEEP_FIGURES
from mhc_jax.records import last_diagnostics, read_run
from mhc_jax.settings import group


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    return [read_run(write_run(root, kind, kind)) for kind in ("residual", "hc", "mhc")]


@pytest.fixture(scope="module")
def rates(tmp_path_factory):
    """Residual and HC at two learning rates, two seeds each; one of HC's is lost."""
    root, out = tmp_path_factory.mktemp("rates"), []
    for kind in ("residual", "hc"):
        for rate in (1e-3, 1e-2):
            for seed in (0, 1):
                lost = 120 if (kind, rate, seed) == ("hc", 1e-2, 1) else None
                loss = {} if lost else {"validation_loss": 2.0 + 0.1 * seed + rate - 0.5 * (kind == "hc")}
                more = {"config": {"optimizer.learning_rate": rate}, "results": loss, "diverged_at": lost}
                out.append(read_run(write_run(root, f"{kind}-{rate}-{seed}", kind, seed=seed, **more)))
    return group(out)


def lines_of(axis, label):
    return [line for line in axis.lines if line.get_label() == label]


def test_loss_against_cost(runs):
    """FLOPs: tokens x FLOPs per token; seconds: steps x median step time."""
    arithmetic, time = plots.loss_cost(runs).axes
    assert arithmetic.get_xlabel() == "training arithmetic (FLOPs)"
    assert time.get_xlabel() == "training time (s)"
    steps = np.arange(2, STEPS + 1, 2)
    (line,) = lines_of(arithmetic, "hc")
    np.testing.assert_allclose(line.get_xdata(), steps * 16 * 128 * (2.4e6 + 403_000))
    (line,) = lines_of(time, "hc")
    np.testing.assert_allclose(line.get_xdata(), steps * 0.15)
    losses = [json.loads(text) for text in (runs[1].folder / "metrics.jsonl").read_text().splitlines()]
    losses = [one["loss"] for one in losses if one["kind"] == "train"]
    # 100 points: a window of two on each side, one-sided from the last but one on.
    expected = [np.median(losses[max(0, k - min(2, k)) : k + min(2, k) + 1]) for k in range(100)]
    np.testing.assert_allclose(line.get_ydata(), expected)


def test_gradient_norm_of_blocks(runs):
    axis = plots.layer_grad_norm(runs).axes[0]
    (line,) = lines_of(axis, "mhc:init=paper")
    last = json.loads(
        [text for text in (runs[2].folder / "metrics.jsonl").read_text().splitlines() if "grad_norm_per" in text][-1]
    )
    np.testing.assert_array_equal(line.get_ydata(), last["grad_norm_per_layer"])
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


def test_points_of_a_sweep(rates):
    """Dots are the seeds' losses at their learning rate, lines the means over the seeds that ended."""
    figure = SWEEP_FIGURES["swept"].draw(rates)
    assert [axis.get_xscale() for axis in figure.axes] == ["log"] * 3
    axis = figure.axes[0]
    assert {line.get_label() for line in axis.lines if line.get_label()[0] != "_"} == {"residual", "hc"}
    dots = {
        (x, round(y, 6))
        for line in axis.lines
        if line.get_marker() == "."
        for x, y in zip(*line.get_data(), strict=True)
    }
    assert dots == {(r, round(2 + 0.1 * s + r, 6)) for r in (1e-3, 1e-2) for s in (0, 1)} | {
        (1e-3, 1.501),
        (1e-3, 1.601),
        (1e-2, 1.51),
    }
    (line,) = lines_of(axis, "hc")
    np.testing.assert_allclose(line.get_data(), [[1e-3, 1e-2], [1.551, 1.51]])


def test_rows_of_seeds(tmp_path, rates):
    """Dots, a bar at the mean, and a band of one standard deviation of the baseline around its mean."""
    runs = []
    for kind in ("residual", "hc"):
        for seed in range(3):
            loss = {"validation_loss": 2.0 + 0.1 * seed + (kind == "hc")}
            runs.append(read_run(write_run(tmp_path, f"{kind}-{seed}", kind, seed=seed, results=loss)))
    axis = SWEEP_FIGURES["seed_strip"].draw(group(runs)).axes[0]
    np.testing.assert_allclose(axis.lines[0].get_xdata(), [2.0, 2.1, 2.2])
    np.testing.assert_allclose(axis.lines[1].get_xdata(), [2.1] * 2)
    np.testing.assert_allclose(axis.lines[2].get_xdata(), [3.0, 3.1, 3.2])
    for band in axis.patches:  # of residual, in both rows
        assert band.get_x() == pytest.approx(2.0)
        assert band.get_width() == pytest.approx(0.2)
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
    """Filled up to 0.5 nats above the best mean, 1.51; a lost seed is hollow with a cross."""
    axis = SWEEP_FIGURES["frontier"].draw(rates).axes[0]
    marks = [(line.get_xdata()[0], line.get_fillstyle()) for line in axis.lines if line.get_marker() == "o"]
    assert marks == [(1e-3, "none"), (1e-2, "none"), (1e-3, "full"), (1e-2, "none")]
    assert sum(line.get_marker() == "x" for line in axis.lines) == 3
    (bar,) = [line for line in axis.lines if line.get_linewidth() == 6]
    assert list(bar.get_xdata()) == [1e-3, 1e-3]


def test_gaps_of_seeds_and_their_mean(rates):
    """HC's loss minus residual's of the same seed and step; the noise of a seed is in both and goes."""
    axis = SWEEP_FIGURES["gap_curves"].draw(rates).axes
    (line,) = lines_of(axis[0], "hc lr=0.001 (2)")
    steps, gap = line.get_data()
    # A straight line, -0.06 of the share of the steps done; medians of it are its middle.
    np.testing.assert_allclose(gap[5:-5], -0.06 * np.asarray(steps)[5:-5] / STEPS, atol=1e-9)
