"""Figures of cost: memory traffic, activations kept for the backward pass, measured overhead, and bandwidth of kernels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from mhc_jax import remat
from mhc_jax.cost import memory_io
from mhc_jax.plots.axes import log_axis, ticks_at
from mhc_jax.plots.sizes import scaled
from mhc_jax.plots.style import INK, LOOKS, NothingToDraw, color_of, house_style, legend, panels, shades


@house_style
def traffic_bars(n: int, C: int) -> Figure:
    """Draw as bars how many elements connections read and write in memory, per token and sub-layer, in units of C.

    From top to bottom, the bars are the residual connection, mHC with one kernel for each operation (mHC Table 2), and mHC with
    more and more operations in one kernel. Grey bars include the pre-norm and leave out the coefficients.

    Args:
      n: number of streams.
      C: width of the model.
    """
    figure, (axis,) = panels(1, 1, height=2.6)
    split = {
        "residual, merge": memory_io.residual(C),
        "unfused (Table 2)": memory_io.total(memory_io.unfused(n, C)),
        "H_post, H_res, merge fused": memory_io.total(memory_io.merged(n, C)),
    }
    whole = {f"{name}, with pre-norm": moved for name, moved in memory_io.boundary(n, C).items()}
    names = [*split, *whole]
    read = [moved.read / C for moved in split.values()]
    written = [moved.written / C for moved in split.values()]
    rows = range(len(split))
    axis.barh(rows, read, color="#0072B2", label="read")
    axis.barh(rows, written, left=read, color="#E69F00", label="written")
    both = [moved / C for moved in whole.values()]
    axis.barh(range(len(split), len(names)), both, color="#7f7f7f", label="read and written")
    for row, end in enumerate([r + w for r, w in zip(read, written, strict=True)] + both):
        axis.text(end, row, f" {end:.1f}", va="center", fontsize=scaled(8))
    axis.set_yticks(range(len(names)), names)
    axis.invert_yaxis()
    axis.grid(visible=False, axis="y")
    axis.set_xlabel(f"elements per token and sub-layer, in C (n = {n}, C = {C})")
    legend(figure)
    return figure


@house_style
def recompute(L: int, streams: Sequence[int], C: int, itemsize: int = 2) -> Figure:
    r"""Draw the size of the activations that are kept for the backward pass if connections are computed again there.

    The x axis is L_r: the streams are stored at every L_r-th sub-layer, and recomputed at the others. The y axis shows
    $nC \lceil L / L_r \rceil + (n + 2) C L_r$ elements (mHC Eq. 20) times `itemsize`, in KiB per token. Both axes are logarithmic.
    Each number of streams has a line, with a dot at the L_r that keeps the least.

    Args:
      L: number of sub-layers.
      streams: numbers n of streams, one for each line.
      C: width of the model.
      itemsize: size of an element, in bytes.
    """
    figure, (axis,) = panels(1, 1, height=2.9)
    L_r = range(1, L + 1)
    for n, color in zip(streams, shades(color_of("mhc"), len(streams)), strict=True):
        kib = [remat.kept_elements(r, L, n, C) * itemsize / 1024 for r in L_r]
        best = remat.best_block_length(L, n)
        axis.plot(L_r, kib, color=color, label=f"n = {n}: best L_r = {best}")
        axis.plot(best, kib[best - 1], "o", color=color)
    log_axis(axis)
    ticks_at(axis, [r for r in (1, 2, 4, 8, 16, 32, 64, 128) if r <= L])
    label = f"KiB per token (C = {C}, {itemsize} bytes)"
    axis.set(xlabel=f"L_r: sub-layers between stored streams (L = {L})", ylabel=label)
    legend(figure)
    return figure


@house_style
def overhead(ratios: Mapping[str, Mapping[str, float]]) -> Figure:
    """Draw as bars the measured costs of connections, each divided by the same cost of the residual connection.

    Args:
      ratios: {measure: {connection: ratio}}.  A measure is a name for the x axis, a connection a text such as `mhc:t_max=5`.

    Raises:
      NothingToDraw: `ratios` is empty.
    """
    if not ratios:
        raise NothingToDraw("no ratios are given")
    figure, (axis,) = panels(1, 1, height=2.6)
    names = list(dict.fromkeys(name for row in ratios.values() for name in row))
    width = 0.8 / len(names)
    for k, name in enumerate(names):
        at = [row + (k - (len(names) - 1) / 2) * width for row in range(len(ratios))]
        values = [row.get(name, float("nan")) for row in ratios.values()]
        axis.bar(at, values, 0.9 * width, color=color_of(name.partition(":")[0]), label=name)
        for x, value in [point for point in zip(at, values, strict=True) if np.isfinite(point[1])]:
            axis.text(x, value, f"{value:.2f}", ha="center", va="bottom", fontsize=scaled(8))
    axis.axhline(1, color=INK, linewidth=0.9)
    axis.set_xticks(range(len(ratios)), list(ratios))
    axis.grid(visible=False, axis="x")
    axis.set_ylabel("ratio to residual (line: 1)")
    legend(figure)
    return figure


@house_style
def roofline(report: Mapping[str, Any]) -> Figure:
    """Draw the memory bandwidth that each implementation of an operation reaches, in % of the bandwidth of a copy.

    There is one row for each operation, workload (shape of its arguments) and pass (forward, or forward and backward).

    Args:
      report: content of report.json from `experiments/device_report.py`.

    Raises:
      NothingToDraw: the report has no timed kernel.
    """
    benches = [rows for part, rows in report["parts"].items() if part.startswith("bench/")]
    rows = [row for bench in benches for row in bench if row["status"] == "ok"]
    if not rows:
        raise NothingToDraw("the report has no timed kernel")
    labels = [f"{row['op']}, {row['spec']['name']}, {row['pass']}" for row in rows]
    names = list(dict.fromkeys(labels))
    implementations = list(dict.fromkeys(row["implementation"] for row in rows))
    figure, (axis,) = panels(1, 1, height=0.9 + 0.2 * len(names), by_text=True)
    for implementation, (color, _, marker) in zip(implementations, LOOKS.values(), strict=False):
        mine = [
            (row, label) for row, label in zip(rows, labels, strict=True) if row["implementation"] == implementation
        ]
        shares = [100 * row["copy_share"] for row, _ in mine]
        heights = [names.index(label) for _, label in mine]
        axis.plot(shares, heights, linestyle="", marker=marker, color=color, label=implementation)
    axis.axvline(100, color=INK, linewidth=0.9)
    axis.set_yticks(range(len(names)), names)
    axis.set_ylim(len(names) - 0.4, -0.6)
    axis.set_xlim(left=0)
    copy = report["copy_bytes_per_s"] / 1e9
    axis.set_xlabel(f"bytes that must move / time, % of a copy ({copy:.0f} GB/s)")
    legend(figure)
    return figure
