"""Heat maps of mixing matrices, of reads and writes, and of reads of earlier depth.

All numbers come from the diagnostics lines of metrics.jsonl.  The sampled tokens are `DIAGNOSTICS_TOKENS` evenly spaced tokens of
one held-out sequence.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from functools import reduce
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from mhc_jax.analysis.run_reader import RunRecord, last_diagnostics
from mhc_jax.plots.axes import multi_stream
from mhc_jax.plots.sizes import current_size, scaled
from mhc_jax.plots.style import FIGURES, NothingToDraw, panels, register, styled

CELL_TEXT_STREAMS = 4
"""Largest number n of streams for which the cells of a heat map of a matrix show their numbers."""
MARGIN_STREAMS = 8
"""Largest number n of streams for which a heat map of a matrix shows the sums of rows and columns in its margins."""
SEAMLESS: dict[str, Any] = {"edgecolors": "face", "linewidth": 0.4}
"""Options of `pcolormesh` that draw the edges of cells.  Without them, viewers of vector figures show hairlines between cells."""


@register(FIGURES, "Mixing matrices H_res", matrices=True, only={"Maps of one l": ": l =", "Maps of a product": "···"})
def h_res(records: Sequence[RunRecord]) -> Figure:
    """Draw heat maps of single mixing matrices and of composites (mHC, Figure 8).

    A map shows a matrix without unit at a run's last diagnostics step. Maps of one l show H_res of the first, the middle or the
    last sub-layer l, a mean over the sampled tokens. Maps of a product show that of the means of H_res of the first half, of the
    second half, or of all L sub-layers. Row i of a map says how much output stream i takes from each input stream j. At the right
    of a map stand its row sums, by which a signal grows on its way up (forward); below it stand its column sums, by which a
    gradient grows on its way down (backward), for up to 8 streams. The colour scale is centred at 0 if a run's matrices have
    negative entries, else it starts at 0. The products have a colour scale of their own if one of their entries reaches 2 in size.
    """
    runs = list(multi_stream(records, "h_res"))
    if not runs:
        raise NothingToDraw("no diagnostics with h_res of a multi-stream run")
    width = current_size().width or 11.0
    across = 1 if current_size().panel else 6 if width > 5 else 3
    side, down = min(width / across, 2.3), len(runs) * 6 // across
    figure = Figure(figsize=(width, side * down + scaled(0.3)), layout="constrained")
    grid = figure.subplots(down, across, squeeze=False).reshape(len(runs), 6)
    for axes, (_, style, (step, matrices)) in zip(grid, runs, strict=True):
        L, half = len(matrices), len(matrices) // 2
        singles = [(f"l = {l}", matrices[l - 1]) for l in sorted({1, half, L})]
        spans = [(low, high) for low, high in dict.fromkeys([(1, half), (half + 1, L), (1, L)]) if low < high]
        products = [
            (f"H({high})···H({low})", reduce(lambda product, matrix: matrix @ product, matrices[low - 1 : high]))
            for low, high in spans
        ]
        chosen, composite = (np.stack([matrix for _, matrix in maps]) for maps in (singles, products))
        all_values = np.append(chosen, composite)
        scale = heat_scale(all_values if np.abs(composite).max() < 2 else chosen)
        meshes = [_matrix(axis, matrix, scale, side) for axis, (_, matrix) in zip(axes[:3], singles, strict=False)]
        scale = heat_scale(all_values)
        meshes += [_matrix(axis, matrix, scale, side) for axis, (_, matrix) in zip(axes[3:], products, strict=False)]
        used = [*axes[: len(singles)], *axes[3 : 3 + len(products)]]
        for axis, (title, _) in zip(used, singles + products, strict=True):
            axis.set_title(title, loc="center")
            axis.set_label(f"{style['label']}: {title}")
        for axis in set(axes) - set(used):
            axis.set_axis_off()
        if len(matrices[0]) > CELL_TEXT_STREAMS:
            for k in (len(singles) - 1, len(meshes) - 1):
                figure.colorbar(meshes[k], ax=used[k], shrink=0.7, pad=0.03)
        # The font size, in points, is small enough for a long label to fit the height of a map.
        size = min(scaled(9), 1.4 * 72 * side / len(style["label"]))
        name = f"{style['label']}\n(step {step})"
        axes[0].set_ylabel(name, color=style["color"], weight="bold", fontsize=size)
    if any(len(matrices[0]) <= MARGIN_STREAMS for _, _, (_, matrices) in runs):
        text = "right of a map: row sums (forward), below it: column sums (backward)"
        figure.supxlabel(textwrap.fill(text, int(width * 72 / (0.6 * scaled(8)))), fontsize=scaled(8))
    return figure


@register(FIGURES, "Reads and writes", matrices=True, only={"H_pre says": "h_pre", "H_post says": "h_post"})
def reads_and_writes(records: Sequence[RunRecord]) -> Figure:
    """Draw heat maps of H_pre and H_post, with streams against depth.

    H_pre says how much of each stream the branch reads. H_post says how much of the branch's output is written to each stream.
    Colours show means over the sampled tokens (no unit) at the last diagnostics step. The y axis is the stream, 1 to n, and
    the x axis is the sub-layer l. A column of one colour means that the sub-layer treats all streams alike.
    """
    runs = list(multi_stream(records, "h_pre"))
    if not runs:
        raise NothingToDraw("no diagnostics with h_pre of a multi-stream run")
    figure, axes = panels(len(runs), 2, height=1.7)
    for k, (record, style, read) in enumerate(runs):
        drawn = (("H_pre", read), ("H_post", last_diagnostics(record, "h_post")))
        for axis, (name, last) in zip(axes[2 * k : 2 * k + 2], drawn, strict=True):
            if last is None:
                axis.set_axis_off()
                continue
            L, n = last[1].shape
            cmap, norm = heat_scale(last[1])
            edges = np.arange(L + 1) + 0.5, np.arange(n + 1) + 0.5
            mesh = axis.pcolormesh(*edges, last[1].T, cmap=cmap, norm=norm, **SEAMLESS)
            figure.colorbar(mesh, ax=axis, pad=0.01)
            axis.set_title(f"{style['label']}: {name} (step {last[0]})", color=style["color"])
            axis.set_yticks(range(1, n + 1) if n <= MARGIN_STREAMS else (1, n))
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
            axis.invert_yaxis()
            axis.grid(False)
            axis.set(xlabel="sub-layer l", ylabel="stream")
    return figure


@register(FIGURES, "Reads of earlier depth", matrices=True)
def depth_mixing(records: Sequence[RunRecord]) -> Figure:
    """Draw heat maps of the weights with which sub-layers read sources of earlier depth.

    Each panel shows one run at its last diagnostics step. The x axis is the sub-layer l, and the y axis is the source j: 0 is the
    embedding, and the others are what the kind of connection keeps: outputs of earlier sub-layers, their sums, or earlier streams.
    Colours show the weights (no unit), means over the sampled tokens and over heads. Weights on top of the residual stream, which
    is read with weight 1, may have either sign. A cell is blank if its weight is exactly 0, such as that of a source which the
    sub-layer cannot see.
    Each panel has a scale of its own. A weight multiplies the source itself, so that a small source can have a large weight. What
    the exit reads is not shown.
    """
    found = [(style, last_diagnostics(record, "depth_mixing")) for record, style in styled(records)]
    runs = [(style, last) for style, last in found if last is not None]
    if not runs:
        raise NothingToDraw(
            "no diagnostics with depth_mixing, which connections that read sources of earlier depth have"
        )
    columns = min(len(runs), 2)
    rows = -(-len(runs) // columns)
    figure, axes = panels(rows, columns, height=2.6)
    for axis, (style, (step, weights)) in zip(axes, runs, strict=False):
        L, slots = weights.shape
        cmap, norm = heat_scale(weights, least=1e-6)
        edges = np.arange(L + 1) + 0.5, np.arange(slots + 1) - 0.5
        mesh = axis.pcolormesh(*edges, np.ma.masked_equal(weights.T, 0), cmap=cmap, norm=norm, **SEAMLESS)
        figure.colorbar(mesh, ax=axis, pad=0.01, label="weight")
        axis.set_title(f"{style['label']} (step {step})", color=style["color"])
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.set_yticks(range(0, slots, -(-slots // 12)))
        axis.invert_yaxis()
        axis.grid(False)
        axis.set(xlabel="sub-layer l", ylabel="source j")
    for axis in axes[len(runs) :]:
        axis.set_axis_off()
    return figure


def heat_scale(values: Float[np.ndarray, "*shape"], least: float = 1.0) -> tuple[str, Normalize]:
    """Return the name of the colour map and the scale of a heat map.

    If any value is negative, colours diverge from 0.  Otherwise they begin at 0.  The scale reaches at least to `least`.
    """
    top = max(least, float(np.nanmax(np.abs(values))))
    if np.nanmin(values) < -1e-6:
        return "RdBu_r", Normalize(-top, top)
    return "Blues", Normalize(0, top)


def _number(value: float) -> str:
    """Return a number as text with at most three digits: -0.12, 1.05, 38.2, 4e3."""
    if abs(value) >= 1000:
        return f"{value:.0e}".replace("e+0", "e")
    text = f"{value:.2f}" if abs(value) < 10 else f"{value:.3g}"
    return "0.00" if text == "-0.00" else text


def _matrix(axis: Axes, matrix: Float[np.ndarray, "n n"], scale: tuple[str, Normalize], side: float) -> QuadMesh:
    """Draw the heat map of one matrix, with numbers in cells and margins as `CELL_TEXT_STREAMS` and `MARGIN_STREAMS` allow.

    `side` is the width in inches of the map and its margin, into which the numbers must fit.
    """
    n = len(matrix)
    # A number of five characters, each about 0.58 of the font size wide, fits a cell.
    size = min(scaled(6.5), 72 * (side - 0.3) / min(n, CELL_TEXT_STREAMS) / (5 * 0.58))
    cmap, norm = scale
    mesh = axis.pcolormesh(matrix, cmap=cmap, norm=norm, **SEAMLESS)
    if n <= CELL_TEXT_STREAMS:
        for (i, j), value in np.ndenumerate(matrix):
            dark = np.mean(mesh.to_rgba(value)[:3]) < 0.5
            ink = "#ffffff" if dark else "#000000"
            centre = {"ha": "center", "va": "center", "fontsize": size}
            axis.text(j + 0.5, i + 0.5, _number(value), color=ink, **centre)
    if n <= MARGIN_STREAMS:
        turn = 0 if n <= CELL_TEXT_STREAMS else 90
        for i in range(n):
            right, below = _number(matrix[i].sum()), _number(matrix[:, i].sum())
            axis.text(n + 0.12, i + 0.5, right, ha="left", va="center", fontsize=size)
            axis.text(i + 0.5, n + 0.12, below, ha="center", va="top", fontsize=size, rotation=turn)
    axis.set(aspect="equal", xticks=[], yticks=[], xlim=(0, n), ylim=(n, 0))
    axis.grid(False)
    axis.spines[:].set_visible(False)
    return mesh
