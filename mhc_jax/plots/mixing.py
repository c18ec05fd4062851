"""Figures of the streams: gains, similarity, sizes, mixing matrices, reads and writes.

All numbers come from the diagnostics lines of metrics.jsonl.  The sampled tokens are `DIAGNOSTICS_TOKENS` evenly spaced tokens of
one held-out sequence.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import reduce
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from mhc_jax.analysis.run_reader import RunRecord, last_diagnostics, series
from mhc_jax.diagnostics import composites, second_eigenvalue
from mhc_jax.plots.style import (
    FIGURES,
    GRID,
    NothingToDraw,
    by_depth,
    curve,
    finish,
    log_axis,
    mark_divergence,
    panels,
    register,
    styled,
)

CELL_TEXT_STREAMS = 4
"""Largest number n of streams for which the cells of a heat map of a matrix show their numbers."""
MARGIN_STREAMS = 8
"""Largest number n of streams for which a heat map of a matrix shows the sums of rows and columns in its margins."""
SEAMLESS: dict[str, Any] = {"edgecolors": "face", "linewidth": 0.4}
"""Options of `pcolormesh` that draw the edges of cells.  Without them, viewers of vector figures show hairlines between cells."""


@register(FIGURES, "Gain against depth")
def gain_depth(records: Sequence[RunRecord]) -> Figure:
    """Draw the gains of single mixing matrices and of composites against depth (mHC, Figures 3 and 7).

    The y axes (logarithmic) show gains, which have no unit, at the last diagnostics step; the x axes show the sub-layer l. A gain
    is the largest absolute row sum (forward) or column sum (backward) of a matrix. The top panels show each mixing matrix alone.
    The bottom panels show the product of the matrices of sub-layers 1 to l (forward) or l to L (backward). Lines are means over the
    sampled tokens, and the faint bands reach from these means up to the largest gain of a token. A gain of 1 amplifies nothing.
    """
    figure, axes = panels(2, 2, height=2.7, share_y=True)
    drawn = (
        ("single_forward", "Single H_res, forward", None),
        ("single_backward", "Single H_res, backward", None),
        ("composite_forward", "Composite H(l)···H(1), forward", "composite_forward_max"),
        ("composite_backward", "Composite H(L)···H(l), backward", "composite_backward_max"),
    )
    for axis, (key, title, upper) in zip(axes, drawn, strict=True):
        axis.set_title(title)
        by_depth(axis, records, key, upper)
        axis.axhline(1, color=GRID, linewidth=1)
        axis.set_ylabel("gain (max. abs. row sum)" if "forward" in key else "gain (max. abs. col. sum)")
    for row in (axes[:2], axes[2:]):
        log_axis(*row, around=1.0)
    return finish(figure, records, "no diagnostics with gains")


@register(FIGURES, "Composite gain against steps")
def gain_step(records: Sequence[RunRecord]) -> Figure:
    """Draw the gain of the product H_L ... H_1 of all mixing matrices against steps.

    The y axes (logarithmic) show the gain of the product of all mixing matrices, forward and backward, which has no unit; the x
    axes show the optimizer step. Lines are means over the sampled tokens, and the faint bands reach from these means up to the
    largest gain of a token. A gain of 1 amplifies nothing, and a line that climbs shows that the product grows during training. A
    dotted vertical line with a cross marks the step at which a run diverged.
    """
    figure, axes = panels(1, 2, height=3.0, share_y=True)
    # The product of all L matrices is the last entry of `composite_forward` and the first entry of `composite_backward`.
    sides = ((axes[0], "composite_forward", -1), (axes[1], "composite_backward", 0))
    for axis, key, whole in sides:
        for record, style in styled(records):
            steps, values = series(record, "diagnostics", key)
            if not len(steps):
                continue
            curve(axis, steps, values[:, whole], style)
            most_steps, most = series(record, "diagnostics", f"{key}_max")
            if np.array_equal(steps, most_steps):
                band = {"color": style["color"], "alpha": 0.15, "linewidth": 0}
                axis.fill_between(steps, values[:, whole], most[:, whole], **band)
            mark_divergence(axis, record, style)
        axis.axhline(1, color=GRID, linewidth=1)
        axis.set(title=key.split("_")[1].capitalize(), xlabel="optimizer step", ylabel="gain of H(L)···H(1)")
    log_axis(*axes, around=1.0)
    return finish(figure, records, "no diagnostics with composite gains")


@register(FIGURES, "Similarity of the streams")
def stream_similarity(records: Sequence[RunRecord]) -> Figure:
    """Draw cosines and participation ratio of the streams against depth and against steps.

    The left panels show values against the sub-layer l at the last diagnostics step, and the right panels show means over
    sub-layers against optimizer steps. All values are means over the sampled tokens and have no unit. In the top panels, thick
    lines are the mean absolute cosine between pairs of streams, and thin lines are the mean cosine with its sign, where opposite
    signs cancel. If the absolute cosine is 1, the streams of a token are multiples of one vector, and a mixing matrix can change
    only the signs and scales of these multiples. The bottom panels show the participation ratio (tr G)² / tr(G²) of the Gram matrix
    G of a token's n streams. The ratio is 1 if the streams are multiples of one vector or if one stream outweighs the others, and
    n if the streams are orthogonal and have equal norms.
    """
    figure, axes = panels(2, 2, height=2.7, share_y=True)
    thin = {"linewidth": 0.7, "marker": ""}
    drawn = (("stream_cosine_abs", axes[:2], {}), ("stream_cosine", axes[:2], thin), ("stream_rank", axes[2:], {}))
    for key, (depth, steps), look in drawn:
        depth.set_title("Over depth")
        by_depth(depth, records, key, multi_stream_only=True, **look)
        for record, style in styled(records):
            at, values = series(record, "diagnostics", key)
            if len(at) and record.num_streams > 1:
                finite = np.isfinite(values)
                with np.errstate(invalid="ignore"):
                    curve(steps, at, np.where(finite, values, 0).sum(1) / finite.sum(1), style, **look)
                mark_divergence(steps, record, style)
    for label, (depth, steps) in (("mean pairwise cosine", axes[:2]), ("participation ratio", axes[2:])):
        steps.set(title="Mean over depth", xlabel="optimizer step", ylabel=label)
        depth.set_ylabel(label)
    axes[0].set_ylim(min(axes[0].get_ylim()[0], 0), 1.04)
    n = max((record.num_streams for record in records if record.num_streams > 1), default=2)
    axes[2].set_ylim(1 - 0.04 * (n - 1), n + 0.04 * (n - 1))
    return finish(figure, records, "no diagnostics with the cosines or the rank of the streams of a multi-stream run")


@register(FIGURES, "Size of streams and branches")
def stream_size(records: Sequence[RunRecord]) -> Figure:
    """Draw the root mean square of streams and of branch outputs against depth.

    The y axes (logarithmic) show root mean squares, which have no unit, at the last diagnostics step; the x axes show the sub-layer
    l. The left panel is about the streams that the sub-layer reads: the root mean square of each stream is taken over its channels
    and the sampled tokens, the line is the mean over streams, and the band reaches from the smallest stream to the largest. A wide
    band means that the streams differ in size. The right panel shows the root mean square of the branch's output, over its
    channels and all tokens of the sequence.
    """
    figure, axes = panels(1, 2, height=2.9)
    for axis, title, key in zip(axes, ("Streams", "Branch outputs"), ("stream_rms", "branch_rms"), strict=True):
        axis.set(title=title, ylabel="RMS")
        by_depth(axis, records, key)
        log_axis(axis)
    return finish(figure, records, "no diagnostics with stream_rms or branch_rms")


@register(FIGURES, "Second eigenvalue")
def eigenvalues(records: Sequence[RunRecord]) -> Figure:
    """Draw the second eigenvalue of single mixing matrices and of composites against depth.

    The y axes show |lambda_2| / |lambda_1| (no unit), where lambda_1 and lambda_2 are the eigenvalues of a matrix that are largest
    in absolute value; the x axes show the sub-layer l. In the left panel the matrix is the mean of H_res over the sampled tokens at
    the last diagnostics step, in the right panel the product H(l)···H(1) of these means. Each time the matrix is applied to the
    streams, differences from its leading eigenvector shrink by this ratio. At 1 nothing is averaged away; near 0 the streams become
    multiples of one vector. For doubly stochastic matrices lambda_1 is 1, and the streams become equal.
    """
    figure, axes = panels(1, 2, height=2.9)
    for _, style, (_, matrices) in _multi_stream(records, "h_res"):
        depth = np.arange(1, len(matrices) + 1)
        for axis, H in zip(axes, (matrices, composites(matrices)[0]), strict=True):
            curve(axis, depth, second_eigenvalue(H), style)
    for axis, title in zip(axes, ("Single H_res", "Composite H(l)···H(1)"), strict=True):
        axis.set(title=title, ylim=(-0.03, 1.05), xlabel="sub-layer l", ylabel="|λ₂| / |λ₁|")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    return finish(figure, records, "no diagnostics with h_res of a multi-stream run")


@register(FIGURES, "How the matrices mix")
def mixing(records: Sequence[RunRecord]) -> Figure:
    """Draw the row and column sums, the entropy and the distance to uniform averaging of the mixing matrices against depth.

    Each panel shows a number without unit at the last diagnostics step against the sub-layer l. The top panels (logarithmic) show
    the largest |row sum − 1| and |column sum − 1| of H_res, over its rows or columns and the sampled tokens; zeros are not drawn.
    The bottom left panel shows the entropy of the rows of H_res divided by log n, a mean over rows and the sampled tokens: it is 0
    if each row has one entry that is not 0, and 1 if all entries have the same size. The bottom right panel (logarithmic) shows how
    far the product P = H(l)···H(1) is from the matrix with all entries 1/n, a mean over the sampled tokens. If the matrices are
    doubly stochastic and mix all streams, this distance approaches 0 as l grows.
    """
    figure, axes = panels(2, 2, height=2.5)
    drawn = (
        ("row_error", "Row sums", "max |row sum − 1|"),
        ("column_error", "Column sums", "max |column sum − 1|"),
        ("entropy", "Row entropy", "entropy / log n"),
        ("uniform_distance", "Composite to uniform", "Frobenius norm of P − 1/n"),
    )
    for axis, (key, title, label) in zip(axes, drawn, strict=True):
        axis.set(title=title, ylabel=label)
        by_depth(axis, records, key, multi_stream_only=True)
        if key == "entropy":
            axis.set_ylim(0, max(1.0, axis.get_ylim()[1]))
        else:
            log_axis(axis)
    return finish(figure, records, "no diagnostics of a multi-stream run")


@register(FIGURES, "Mixing matrices H_res")
def h_res(records: Sequence[RunRecord]) -> Figure:
    """Draw heat maps of H_res at five evenly spaced sub-layers, and of the composite of all sub-layers.

    Each row of the figure shows one run at its last diagnostics step. The first maps show H_res (no unit), a mean over the
    sampled tokens, at up to five sub-layers l from the first to the last. The last map shows the product of these means over all L
    sub-layers. Row i of a map says how much output stream i takes from each input stream j. Sums of rows stand at the right of a
    map and sums of columns below it, for up to 8 streams. The colour scale is centred at 0 if a run's matrices have negative
    entries, else it starts at 0. The product has a colour scale of its own if one of its entries reaches 2 in size.
    """
    runs = list(_multi_stream(records, "h_res"))
    if not runs:
        raise NothingToDraw("no diagnostics with h_res of a multi-stream run")
    figure = Figure(figsize=(11, 2.3 * len(runs) + 0.3), layout="constrained")
    grid = figure.subplots(len(runs), 6, squeeze=False)
    for axes, (_, style, (step, matrices)) in zip(grid, runs, strict=True):
        L = len(matrices)
        depths = sorted({round(share * (L - 1)) for share in (0, 0.25, 0.5, 0.75, 1)})
        composite = reduce(lambda product, matrix: matrix @ product, matrices)
        chosen = matrices[depths]
        scale = heat_scale(np.append(chosen, composite) if np.abs(composite).max() < 2 else chosen)
        for axis, sublayer in zip(axes, depths, strict=False):
            mesh = _matrix(axis, matrices[sublayer], scale)
            axis.set_title(f"l = {sublayer + 1}", loc="center")
        for axis in axes[len(depths) : 5]:
            axis.set_axis_off()
        composite_mesh = _matrix(axes[5], composite, heat_scale(np.append(chosen, composite)))
        if len(composite) > CELL_TEXT_STREAMS:
            figure.colorbar(mesh, ax=list(axes[:5]), shrink=0.7, pad=0.01)
            figure.colorbar(composite_mesh, ax=axes[5], shrink=0.7, pad=0.03)
        axes[5].set_title(f"H({L})···H(1)", loc="center")
        # The font size, in points, is small enough for a long label to fit a row of 2.3 inches.
        size = min(9.0, 240 / len(style["label"]))
        name = f"{style['label']}\n(step {step})"
        axes[0].set_ylabel(name, color=style["color"], weight="bold", fontsize=size)
    return figure


@register(FIGURES, "Reads and writes")
def reads_and_writes(records: Sequence[RunRecord]) -> Figure:
    """Draw heat maps of H_pre and H_post, with streams against depth.

    H_pre says how much of each stream the branch reads, and H_post says how much of the branch's output is written to each stream.
    Colours show their means over the sampled tokens (no unit) at the last diagnostics step. The y axis is the stream, 1 to n, and
    the x axis is the sub-layer l. A column of one colour means that the sub-layer treats all streams alike.
    """
    runs = list(_multi_stream(records, "h_pre"))
    if not runs:
        raise NothingToDraw("no diagnostics with h_pre of a multi-stream run")
    figure = Figure(figsize=(9.5, 1.7 * len(runs) + 0.3), layout="constrained")
    grid = figure.subplots(len(runs), 2, squeeze=False)
    for axes, (record, style, read) in zip(grid, runs, strict=True):
        drawn = (("H_pre", read), ("H_post", last_diagnostics(record, "h_post")))
        for axis, (name, last) in zip(axes, drawn, strict=True):
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


@register(FIGURES, "Reads of earlier depth")
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
    figure = Figure(figsize=(5.2 * columns, 2.6 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
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


def _multi_stream(
    records: Sequence[RunRecord], key: str
) -> Iterator[tuple[RunRecord, dict[str, Any], tuple[int, np.ndarray]]]:
    """Yield (run, look, (step, value)) for each run that has several streams and diagnostics of `key`.

    The look is that of `styled`.  The step and the value belong to the run's last diagnostics of `key`.
    """
    for record, style in styled(records):
        last = last_diagnostics(record, key)
        if record.num_streams > 1 and last is not None:
            yield record, style, last


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


def _matrix(axis: Axes, matrix: Float[np.ndarray, "n n"], scale: tuple[str, Normalize]) -> QuadMesh:
    """Draw the heat map of one matrix, with numbers in cells and margins as `CELL_TEXT_STREAMS` and `MARGIN_STREAMS` allow."""
    n = len(matrix)
    cmap, norm = scale
    mesh = axis.pcolormesh(matrix, cmap=cmap, norm=norm, **SEAMLESS)
    if n <= CELL_TEXT_STREAMS:
        for (i, j), value in np.ndenumerate(matrix):
            dark = np.mean(mesh.to_rgba(value)[:3]) < 0.5
            ink = "#ffffff" if dark else "#000000"
            centre = {"ha": "center", "va": "center", "fontsize": 6.5}
            axis.text(j + 0.5, i + 0.5, _number(value), color=ink, **centre)
    if n <= MARGIN_STREAMS:
        turn = 0 if n <= CELL_TEXT_STREAMS else 90
        for i in range(n):
            right, below = _number(matrix[i].sum()), _number(matrix[:, i].sum())
            axis.text(n + 0.12, i + 0.5, right, ha="left", va="center", fontsize=6.5)
            axis.text(i + 0.5, n + 0.12, below, ha="center", va="top", fontsize=6.5, rotation=turn)
    axis.set(aspect="equal", xticks=[], yticks=[], xlim=(0, n), ylim=(n, 0))
    axis.grid(False)
    axis.spines[:].set_visible(False)
    return mesh
