"""Figures of the streams: gains, similarity, mixing matrices, gates."""

from __future__ import annotations

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

from mhc_jax.analysis.records import RunRecord, last_diagnostics, series
from mhc_jax.diagnostics import composites, second_eigenvalue
from mhc_jax.plots.style import (
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
"""Largest n whose matrices have their numbers written in the cells."""
MARGIN_STREAMS = 8
"""Largest n whose row and column sums are written in the margins."""
_SEAMLESS: dict[str, Any] = {"edgecolors": "face", "linewidth": 0.4}
"""Without edges, viewers of vector figures show hairlines between cells."""


@register(
    "Gain against depth",
    "Top: gain of each mixing matrix alone; bottom: gain of the product of mixing matrices, "
    "forward from the first sub-layer to l, backward from the last down to l. Gain is the largest "
    "absolute row sum (forward) or column sum (backward), per token and then averaged; the faint "
    "band reaches up to the largest token. 1 means that no signal is amplified.",
)
def gain_depth(records: Sequence[RunRecord]) -> Figure:
    """Single-layer and composite gains against depth (mHC, Figures 3 and 7)."""
    figure, axes = panels(2, 2, height=2.7, share_y=True)
    drawn = (
        ("single_forward", "Single H_res, forward", None),
        ("single_backward", "Single H_res, backward", None),
        ("composite_forward", "Composite H(l)···H(1), forward", "composite_forward_max"),
        ("composite_backward", "Composite H(S)···H(l), backward", "composite_backward_max"),
    )
    for axis, (key, title, upper) in zip(axes, drawn, strict=True):
        axis.set_title(title, loc="left")
        by_depth(axis, records, key, upper)
        axis.axhline(1, color=GRID, linewidth=1)
        axis.set_ylabel("gain (max. abs. row sum)" if "forward" in key else "gain (max. abs. col. sum)")
    for row in (axes[:2], axes[2:]):
        log_axis(*row, around=1.0)
    return finish(figure, records, "no diagnostics with gains")


@register(
    "Composite gain against steps",
    "Gain of the product of all mixing matrices of the network (mean over sampled tokens; band up "
    "to the largest token), logarithmic, as training goes on. A line that climbs is an "
    "unconstrained product growing; 1 is neutral.",
)
def gain_step(records: Sequence[RunRecord]) -> Figure:
    """Gain of the whole product H_S ... H_1 against steps."""
    figure, axes = panels(1, 2, height=3.0, share_y=True)
    # The whole product ends the forward profile (l = S) and begins the backward one (l = 1).
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
        axis.set_title(key.split("_")[1].capitalize(), loc="left")
        axis.set_xlabel("optimizer step")
        axis.set_ylabel("gain of H(S)···H(1)")
    log_axis(*axes, around=1.0)
    return finish(figure, records, "no diagnostics with composite gains")


@register(
    "Similarity of the streams",
    "Top: mean absolute cosine between pairs of streams (thick) and mean signed cosine (thin). Bottom: participation ratio "
    "(tr G)² / tr(G²) of the streams' Gram matrix G, which lies between 1 and n. Left: each sub-layer at the last "
    "diagnostics step; right: means over sub-layers. An absolute cosine of 1 means that the streams of a token are one "
    "vector up to sign and scale; then a mixing matrix changes only their signs and scales. Signed cosines of opposite "
    "streams cancel. A ratio of 1 means one vector, or one stream that outweighs the others; n means orthogonal streams of "
    "equal norm.",
)
def stream_similarity(records: Sequence[RunRecord]) -> Figure:
    """Cosines and participation ratio of the streams against depth and against steps."""
    figure, axes = panels(2, 2, height=2.7, share_y=True)
    several = [record.num_streams for record in records if record.num_streams > 1]
    thin = {"linewidth": 0.7, "marker": ""}
    rows = (("mean pairwise cosine", axes[:2]), ("participation ratio", axes[2:]))
    drawn = (("stream_cosine_abs", axes[:2], {}), ("stream_cosine", axes[:2], thin), ("stream_rank", axes[2:], {}))
    for key, (depth, steps), look in drawn:
        depth.set_title("Over depth", loc="left")
        by_depth(depth, records, key, multi_stream_only=True, **look)
        for record, style in styled(records):
            at, values = series(record, "diagnostics", key)
            if len(at) and record.num_streams > 1:
                finite = np.isfinite(values)
                with np.errstate(invalid="ignore"):
                    curve(steps, at, np.where(finite, values, 0).sum(1) / finite.sum(1), style, **look)
                mark_divergence(steps, record, style)
    for label, (depth, steps) in rows:
        steps.set_title("Mean over depth", loc="left")
        steps.set_xlabel("optimizer step")
        depth.set_ylabel(label)
        steps.set_ylabel(label)
    axes[0].set_ylim(min(axes[0].get_ylim()[0], 0), 1.04)
    n = max(several, default=2)
    axes[2].set_ylim(1 - 0.04 * (n - 1), n + 0.04 * (n - 1))
    return finish(figure, records, "no diagnostics with the cosines or the rank of the streams of a multi-stream run")


@register(
    "Size of streams and branches",
    "Root mean square of the streams (line: mean over streams; band: smallest to largest stream) "
    "and of the branch outputs, logarithmic, at the last diagnostics step. A wide band means that "
    "the streams differ in size.",
)
def stream_size(records: Sequence[RunRecord]) -> Figure:
    """RMS of streams and of branch outputs against depth."""
    figure, axes = panels(1, 2, height=2.9)
    axes[0].set_title("Streams", loc="left")
    axes[1].set_title("Branch outputs", loc="left")
    by_depth(axes[0], records, "stream_rms")
    by_depth(axes[1], records, "branch_rms")
    for axis in axes:
        log_axis(axis)
        axis.set_ylabel("RMS")
    return finish(figure, records, "no diagnostics with stream_rms or branch_rms")


@register(
    "Second eigenvalue",
    "|lambda_2| / |lambda_1| of the token-mean H_res alone and of the product H(l)···H(1), last diagnostics step: "
    "the factor by which each further application shrinks what differs from the leading eigenvector. At 1 nothing is "
    "averaged away; near 0 the streams become multiples of one vector. For doubly stochastic matrices lambda_1 = 1, and the "
    "streams become equal.",
)
def eigenvalues(records: Sequence[RunRecord]) -> Figure:
    """Second eigenvalue of single matrices and of products against depth."""
    figure, axes = panels(1, 2, height=2.9)
    for record, style in styled(records):
        last = last_diagnostics(record, "h_res")
        if record.num_streams > 1 and last is not None:
            depth = np.arange(1, len(last[1]) + 1)
            for axis, matrices in zip(axes, (last[1], composites(last[1])[0]), strict=True):
                curve(axis, depth, second_eigenvalue(matrices), style)
    for axis, title in zip(axes, ("Single H_res", "Composite H(l)···H(1)"), strict=True):
        axis.set_title(title, loc="left")
        axis.set_ylim(-0.03, 1.05)
        axis.set_xlabel("sub-layer l")
        axis.set_ylabel("|λ₂| / |λ₁|")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    return finish(figure, records, "no diagnostics with h_res of a multi-stream run")


@register(
    "How the matrices mix",
    "Distance of row and column sums from 1 (exact zeros are not drawn), entropy of "
    "the rows of H_res (0: each stream keeps to itself, 1: uniform averaging), and distance of "
    "the composite H(l)···H(1) to uniform averaging, which products of doubly stochastic matrices "
    "approach.",
)
def mixing(records: Sequence[RunRecord]) -> Figure:
    """Marginal errors, entropy and distance to uniform against depth."""
    figure, axes = panels(2, 2, height=2.5)
    drawn = (
        ("row_error", "Row sums", "max |row sum − 1|"),
        ("column_error", "Column sums", "max |column sum − 1|"),
        ("entropy", "Row entropy", "entropy / log n"),
        ("uniform_distance", "Composite to uniform", "Frobenius norm of P − 1/n"),
    )
    for axis, (key, title, label) in zip(axes, drawn, strict=True):
        axis.set_title(title, loc="left")
        by_depth(axis, records, key, multi_stream_only=True)
        axis.set_ylabel(label)
        if key == "entropy":
            axis.set_ylim(0, max(1.0, axis.get_ylim()[1]))
        else:
            log_axis(axis)
    return finish(figure, records, "no diagnostics of a multi-stream run")


@register(
    "Mixing matrices H_res",
    "Token-mean H_res at five depths and the product of all of them, last diagnostics step: row i "
    "says what output stream i takes from each input stream j. Sums of rows at the right, of "
    "columns below. Signed matrices have a diverging scale centred at 0, non-negative ones a "
    "sequential scale from 0; the product has its own scale where it exceeds the others'.",
)
def h_res(records: Sequence[RunRecord]) -> Figure:
    """Heat maps of H_res at depths 0, 1/4, 1/2, 3/4 and 1, and of the product of all."""
    runs = [
        (style, last)
        for record, style in styled(records)
        if record.num_streams > 1 and (last := last_diagnostics(record, "h_res")) is not None
    ]
    if not runs:
        raise NothingToDraw("Nothing to draw: no diagnostics with h_res of a multi-stream run.")
    figure = Figure(figsize=(11, 2.3 * len(runs) + 0.3), layout="constrained")
    grid = figure.subplots(len(runs), 6, squeeze=False)
    for axes, (style, (step, matrices)) in zip(grid, runs, strict=True):
        S = len(matrices)
        depths = [round(share * (S - 1)) for share in (0, 0.25, 0.5, 0.75, 1)]
        composite = reduce(lambda product, matrix: matrix @ product, matrices)
        chosen = matrices[depths]
        scale = _scale(np.append(chosen, composite) if np.abs(composite).max() < 2 else chosen)
        for axis, l in zip(axes, depths, strict=False):
            mesh = _matrix(axis, matrices[l], scale)
            axis.set_title(f"l = {l + 1}", loc="center")
        product_mesh = _matrix(axes[5], composite, _scale(np.append(chosen, composite)))
        if len(composite) > CELL_TEXT_STREAMS:
            figure.colorbar(mesh, ax=list(axes[:5]), shrink=0.7, pad=0.01)
            figure.colorbar(product_mesh, ax=axes[5], shrink=0.7, pad=0.03)
        axes[5].set_title(f"H({S})···H(1)", loc="center")
        size = min(9.0, 240 / len(style["label"]))  # points; a row is 2.3 inches high
        name = f"{style['label']}\n(step {step})"
        axes[0].set_ylabel(name, color=style["color"], weight="bold", fontsize=size)
    return figure


@register(
    "Reads and writes",
    "Token-mean H_pre (how much of each stream the branch reads) and H_post (how much of the "
    "branch's output is written to each stream) over depth, last diagnostics step. Uniform rows "
    "mean that all streams are treated alike.",
)
def gates(records: Sequence[RunRecord]) -> Figure:
    """Heat maps of H_pre and H_post, streams against depth."""
    runs = [
        (record, style)
        for record, style in styled(records)
        if record.num_streams > 1 and last_diagnostics(record, "h_pre") is not None
    ]
    if not runs:
        raise NothingToDraw("Nothing to draw: no diagnostics with h_pre of a multi-stream run.")
    figure = Figure(figsize=(9.5, 1.7 * len(runs) + 0.3), layout="constrained")
    grid = figure.subplots(len(runs), 2, squeeze=False)
    for axes, (record, style) in zip(grid, runs, strict=True):
        for axis, key, name in zip(axes, ("h_pre", "h_post"), ("H_pre", "H_post"), strict=True):
            last = last_diagnostics(record, key)
            if last is None:
                axis.set_axis_off()
                continue
            S, n = last[1].shape
            cmap, norm = _scale(last[1])
            edges = np.arange(S + 1) + 0.5, np.arange(n + 1) + 0.5
            mesh = axis.pcolormesh(*edges, last[1].T, cmap=cmap, norm=norm, **_SEAMLESS)
            figure.colorbar(mesh, ax=axis, pad=0.01)
            axis.set_title(f"{style['label']}: {name} (step {last[0]})", color=style["color"])
            axis.set_yticks(range(1, n + 1) if n <= MARGIN_STREAMS else (1, n))
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
            axis.invert_yaxis()
            axis.grid(False)
            axis.set_ylabel("stream")
            axis.set_xlabel("sub-layer l")
    return figure


def _scale(values: Float[np.ndarray, "*shape"]) -> tuple[str, Normalize]:
    """Diverging about 0 for signed values, sequential from 0 otherwise; the top is at least 1."""
    top = max(1.0, float(np.nanmax(np.abs(values))))
    if np.nanmin(values) < -1e-6:
        return "RdBu_r", Normalize(-top, top)
    return "Blues", Normalize(0, top)


def _number(value: float) -> str:
    """Three figures at most: -0.12, 1.05, 38.2, 4e+03."""
    if abs(value) >= 1000:
        return f"{value:.0e}".replace("e+0", "e")
    text = f"{value:.2f}" if abs(value) < 10 else f"{value:.3g}"
    return "0.00" if text == "-0.00" else text


def _matrix(axis: Axes, matrix: Float[np.ndarray, "n n"], scale: tuple[str, Normalize]) -> QuadMesh:
    """One heat map, numbers in the cells for small n, sums in the margins."""
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
