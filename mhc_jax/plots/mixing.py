"""Figures of the streams: gains, similarity, sizes, mixing matrices, reads and writes.

All numbers come from diagnostics.  The sampled tokens are `DIAGNOSTICS_TOKENS` evenly spaced tokens of one held-out
sequence.
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
"""Largest number n of streams for which heat maps of matrices show the numbers in the cells."""
MARGIN_STREAMS = 8
"""Largest number n of streams for which heat maps of matrices show row and column sums in the margins."""
_SEAMLESS: dict[str, Any] = {"edgecolors": "face", "linewidth": 0.4}
"""Options that draw the edges of a heat map's cells.  Without edges, viewers of vector figures show hairlines between cells."""


@register(FIGURES, "Gain against depth")
def gain_depth(records: Sequence[RunRecord]) -> Figure:
    """Draw the gains of single mixing matrices and of composites against depth (mHC, Figures 3 and 7).

    Gain (no unit, logarithmic) against the sub-layer l at the last diagnostics step. Top: gain of each mixing matrix alone.
    Bottom: gain of the composite, forward from the first sub-layer to l, backward from the last down to l. The gain is the
    largest absolute row sum (forward) or column sum (backward). Lines are means over the sampled tokens; the faint band in the
    bottom panels reaches up to the token of the largest gain. A gain of 1 amplifies nothing.
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
    """Draw the gain of the whole composite H_L ... H_1 against steps.

    Gain (no unit, logarithmic) of the composite of all mixing matrices against optimizer steps, forward and backward. Lines are
    means over the sampled tokens; the band reaches up to the token of the largest gain. A line that climbs is an unconstrained
    product that grows; a gain of 1 amplifies nothing. A dotted vertical line with a cross marks the step at which a run diverged.
    """
    figure, axes = panels(1, 2, height=3.0, share_y=True)
    # The whole composite ends the forward profile (l = L) and begins the backward one (l = 1).
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

    Left: values against the sub-layer l at the last diagnostics step. Right: means over sub-layers against optimizer steps. All
    values are means over the sampled tokens and have no unit. Top: mean absolute cosine between pairs of streams (thick) and
    mean signed cosine (thin). Bottom: participation ratio (tr G)² / tr(G²) of the streams' Gram matrix G, which lies between 1
    and n. An absolute cosine of 1 means that the streams of a token are one vector up to sign and scale; then a mixing matrix
    changes only their signs and scales. Signed cosines of opposite streams cancel. A ratio of 1 means one vector, or one stream
    that outweighs the others; n means orthogonal streams of equal norm.
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

    Root mean square over channels and tokens (no unit, logarithmic) against the sub-layer l at the last diagnostics step. Left:
    of the streams that the sub-layer reads, over the sampled tokens; the line is the mean over streams, the band reaches from
    the smallest to the largest stream, so that a wide band means that the streams differ in size. Right: of the branch's
    output, over all tokens of the sequence.
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

    |lambda_2| / |lambda_1| (no unit) against the sub-layer l at the last diagnostics step. Left: the ratio of the mean of H_res
    over the sampled tokens. Right: the ratio of the composite H(l)···H(1) of these means. The ratio is the factor by which each
    further application shrinks what differs from the leading eigenvector. At 1 nothing is averaged away; near 0 the streams
    become multiples of one vector. For doubly stochastic matrices lambda_1 = 1, and the streams become equal.
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

    Four numbers (no unit) against the sub-layer l at the last diagnostics step. Top: largest distance of a row sum and of a
    column sum of H_res from 1, over rows or columns and the sampled tokens, logarithmic; exact zeros are not drawn. Bottom left:
    entropy of the rows of H_res over log n, mean over rows and the sampled tokens (0: each stream keeps to itself, 1: uniform
    averaging). Bottom right: distance of the composite P = H(l)···H(1) to uniform averaging, mean over the sampled tokens,
    logarithmic; products of doubly stochastic matrices approach 0.
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
    """Draw heat maps of H_res at depths 0, 1/4, 1/2, 3/4 and 1, and of the composite of all sub-layers.

    H_res (no unit), its mean over the sampled tokens, at five sub-layers l, and the product of these means over all L
    sub-layers, at the last diagnostics step. Row i says what output stream i takes from each input stream j. Sums of rows stand
    at the right, sums of columns below. Signed matrices have a diverging scale centred at 0, others a sequential scale from 0; the
    product has a scale of its own if it exceeds the scale of the other matrices.
    """
    runs = list(_multi_stream(records, "h_res"))
    if not runs:
        raise NothingToDraw("no diagnostics with h_res of a multi-stream run")
    figure = Figure(figsize=(11, 2.3 * len(runs) + 0.3), layout="constrained")
    grid = figure.subplots(len(runs), 6, squeeze=False)
    for axes, (_, style, (step, matrices)) in zip(grid, runs, strict=True):
        L = len(matrices)
        depths = [round(share * (L - 1)) for share in (0, 0.25, 0.5, 0.75, 1)]
        composite = reduce(lambda product, matrix: matrix @ product, matrices)
        chosen = matrices[depths]
        scale = _scale(np.append(chosen, composite) if np.abs(composite).max() < 2 else chosen)
        for axis, sublayer in zip(axes, depths, strict=False):
            mesh = _matrix(axis, matrices[sublayer], scale)
            axis.set_title(f"l = {sublayer + 1}", loc="center")
        composite_mesh = _matrix(axes[5], composite, _scale(np.append(chosen, composite)))
        if len(composite) > CELL_TEXT_STREAMS:
            figure.colorbar(mesh, ax=list(axes[:5]), shrink=0.7, pad=0.01)
            figure.colorbar(composite_mesh, ax=axes[5], shrink=0.7, pad=0.03)
        axes[5].set_title(f"H({L})···H(1)", loc="center")
        size = min(9.0, 240 / len(style["label"]))  # points; a row is 2.3 inches high
        name = f"{style['label']}\n(step {step})"
        axes[0].set_ylabel(name, color=style["color"], weight="bold", fontsize=size)
    return figure


@register(FIGURES, "Reads and writes")
def reads_and_writes(records: Sequence[RunRecord]) -> Figure:
    """Draw heat maps of H_pre and H_post, with streams against depth.

    H_pre says how much of each stream the branch reads, H_post how much of the branch's output is written to each stream. Colour
    is their mean over the sampled tokens (no unit), for the streams 1 to n against the sub-layer l, at the last diagnostics
    step. Columns of one colour mean that all streams are treated alike.
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
            cmap, norm = _scale(last[1])
            edges = np.arange(L + 1) + 0.5, np.arange(n + 1) + 0.5
            mesh = axis.pcolormesh(*edges, last[1].T, cmap=cmap, norm=norm, **_SEAMLESS)
            figure.colorbar(mesh, ax=axis, pad=0.01)
            axis.set_title(f"{style['label']}: {name} (step {last[0]})", color=style["color"])
            axis.set_yticks(range(1, n + 1) if n <= MARGIN_STREAMS else (1, n))
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
            axis.invert_yaxis()
            axis.grid(False)
            axis.set(xlabel="sub-layer l", ylabel="stream")
    return figure


def _multi_stream(
    records: Sequence[RunRecord], key: str
) -> Iterator[tuple[RunRecord, dict[str, Any], tuple[int, np.ndarray]]]:
    """Yield the runs that have several streams and diagnostics of `key`.

    Each is a tuple of the record, its look, and the step and value of its last diagnostics of `key`.
    """
    for record, style in styled(records):
        last = last_diagnostics(record, key)
        if record.num_streams > 1 and last is not None:
            yield record, style, last


def _scale(values: Float[np.ndarray, "*shape"]) -> tuple[str, Normalize]:
    """Return the colour map and the scale of a heat map: diverging about 0 for signed values, else sequential from 0.

    The top of the scale is at least 1.
    """
    top = max(1.0, float(np.nanmax(np.abs(values))))
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
    """Draw the heat map of one matrix.  For few streams, cells show their numbers and margins the sums of rows and columns."""
    n = len(matrix)
    cmap, norm = scale
    mesh = axis.pcolormesh(matrix, cmap=cmap, norm=norm, **_SEAMLESS)
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
