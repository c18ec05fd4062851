"""Elements that connections move and keep are those of mHC Table 2, section 4.3 and Equation 20, and so are their figures."""

import json
import math

import numpy as np
import pytest

from mhc_jax import traffic
from mhc_jax.errors import InputError
from mhc_jax.pipeline.schedules import make
from mhc_jax.pipeline.simulate import by_hand, simulate
from mhc_jax.plots import NothingToDraw
from mhc_jax.plots import cost as figures
from mhc_jax.plots.pipeline import timeline


@pytest.mark.parametrize(("n", "C"), [(1, 8), (4, 128), (8, 2560)])
def test_tables_of_the_paper(n, C):
    small = n * n + 2 * n
    assert traffic.total(traffic.unfused(n, C)) == ((5 * n + 1) * C + small, (3 * n + 1) * C + small)
    unfused, merged = traffic.unfused(n, C), traffic.merged(n, C)
    write = [unfused[key] for key in ("apply H_post", "apply H_res", "merge")]
    assert sum(row.read for row in write) == (3 * n + 1) * C + n * n + n
    assert merged["write"] == ((n + 1) * C + n * n + n, n * C)
    assert sum(row.written for row in write) == 3 * n * C


def test_boundary_at_four_streams():
    # mHC section 4.3 with n = 4: 20C in three kernels, 14C, and 10C as the floor.
    assert list(traffic.boundary(4, 1).values()) == [20, 14, 10]
    assert traffic.residual(7) == (14, 7)


@pytest.mark.parametrize(("L", "n"), [(60, 4), (24, 2), (1, 4), (128, 8)])
def test_best_recompute_is_near_the_root(L, n):
    best = traffic.best_recompute(L, n)
    kept = [traffic.recompute_elements(L_r, L, n, 3) for L_r in range(1, L + 1)]
    assert kept[best - 1] == min(kept)
    assert best == pytest.approx((n * L / (n + 2)) ** 0.5, abs=1.5)


def test_recompute_counts_by_hand():
    # n = 4, L = 60: 4 stored 60 times and 6 while one sub-layer is recomputed; 4 stored 9 times and 6 x 7.
    assert traffic.recompute_elements(1, 60, 4, 1) == 4 * 60 + 6
    assert traffic.recompute_elements(7, 60, 4, 10) == 10 * (4 * 9 + 6 * 7)
    with pytest.raises(InputError, match="from 1 to L = 4"):
        traffic.recompute_elements(5, 4, 4, 8)


def test_figures_of_cost():
    """Traffic of mHC Table 2 at n = 4, in C: 21 read and 13 written; fused 13 and 5; with the pre-norm 20, 14 and 10.

    Memory is nC ceil(L / L_r) + (n + 2) C L_r elements of two bytes, in KiB.
    """
    bars = figures.traffic_bars(4, 10_000).axes[0]
    np.testing.assert_allclose([bar.get_width() for bar in bars.patches], [2, 21, 13, 1, 13, 5, 20, 14, 10], atol=0.003)
    assert "C = 10000" in bars.get_xlabel()
    assert [text.get_text().strip() for text in bars.texts][:2] == ["3.0", "34.0"]
    curves = figures.recompute(60, (4, 2), 2560).axes[0]
    expected = [(4 * math.ceil(60 / k) + 6 * k) * 2560 * 2 / 1024 for k in range(1, 61)]
    np.testing.assert_allclose(curves.lines[0].get_ydata(), expected)
    assert (curves.lines[1].get_xdata()[0], curves.lines[1].get_ydata()[0]) == (6, min(expected))
    assert curves.get_ylabel() == "KiB per token (C = 2560, 2 bytes)"
    labels = [label for line in curves.lines if not (label := str(line.get_label())).startswith("_")]
    assert labels == ["n = 4: best L_r = 6", "n = 2: best L_r = 5"]
    ratios = figures.overhead({"parameters": {"hc": 1.25, "mhc": 1.5}, "time": {"hc": 2.0}}).axes[0]
    np.testing.assert_allclose([bar.get_height() for bar in ratios.patches], [1.25, 2.0, 1.5, np.nan])
    assert [text.get_text() for text in ratios.texts][:2] == ["1.25", "2.00"]
    with pytest.raises(NothingToDraw, match="no ratios"):
        figures.overhead({})


def test_cells_of_a_timeline_are_as_long_as_their_operations():
    run = simulate(make("1f1b", 2, 2), by_hand(2, 1.0, 3.0, 1.0))
    widths = sorted(patch.get_width() for patch in timeline([run], ["one"]).axes[0].patches)
    assert widths == pytest.approx([1.0] * 4 + [3.0] * 4)


def test_roofline_of_a_device_record():
    row = {"op": "read", "pass": "forward", "spec": {"name": "tiny"}, "implementation": "xla", "status": "ok"}
    report = {"copy_bytes_per_s": 2e11, "parts": {"bench/tiny/read": [{**row, "copy_share": 0.8}], "step/tiny": {}}}
    axis = figures.roofline(json.loads(json.dumps(report))).axes[0]
    assert axis.lines[0].get_xdata()[0] == pytest.approx(80)
    assert "200 GB/s" in axis.get_xlabel()
    with pytest.raises(NothingToDraw, match="no timed kernel"):
        figures.roofline({"parts": {"bench/tiny/read": [{**row, "status": "no GPU"}]}})
