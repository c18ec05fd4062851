"""Elements that connections move and keep are those of mHC Table 2, section 4.3 and Equation 20, and so are their figures."""

import json

import pytest

from mhc_jax import traffic
from mhc_jax.errors import InputError
from mhc_jax.plots import NothingToDraw
from mhc_jax.plots import cost as figures


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
    bars = figures.traffic_bars(4, 1280).axes[0]
    assert "C = 1280" in bars.get_xlabel()
    assert [text.get_text().strip() for text in bars.texts][:2] == ["3.0", "34.0"]
    curves = figures.recompute(60, (2, 4), 2560).axes[0]
    labels = [label for line in curves.lines if not (label := str(line.get_label())).startswith("_")]
    assert labels == ["n = 2: best L_r = 5", "n = 4: best L_r = 6"]
    ratios = figures.overhead({"parameters": {"hc": 1.01, "mhc": 1.19}}).axes[0]
    assert [text.get_text() for text in ratios.texts] == ["1.01", "1.19"]
    with pytest.raises(NothingToDraw, match="no ratios"):
        figures.overhead({})


def test_roofline_of_a_device_record():
    row = {"op": "read", "pass": "forward", "spec": {"name": "tiny"}, "implementation": "xla", "status": "ok"}
    report = {"copy_bytes_per_s": 2e11, "parts": {"bench/tiny/read": [{**row, "copy_share": 0.8}], "step/tiny": {}}}
    axis = figures.roofline(json.loads(json.dumps(report))).axes[0]
    assert axis.lines[0].get_xdata()[0] == pytest.approx(80)
    assert "200 GB/s" in axis.get_xlabel()
    with pytest.raises(NothingToDraw, match="no timed kernel"):
        figures.roofline({"parts": {"bench/tiny/read": [{**row, "status": "no GPU"}]}})
