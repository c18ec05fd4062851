"""Curves of the streams: gains, similarity, sizes, and what mixing matrices do.

All numbers come from the diagnostics lines of metrics.jsonl.  The sampled tokens are `DIAGNOSTICS_TOKENS` evenly spaced tokens of
one held-out sequence.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mhc_jax.analysis.run_reader import RunRecord, last_diagnostics, series
from mhc_jax.diagnostics import composites, second_eigenvalue
from mhc_jax.plots.axes import (
    CLOSE_GAIN,
    by_depth,
    count_depth,
    curve,
    log_axis,
    mark_divergence,
    multi_stream,
    near_one,
)
from mhc_jax.plots.style import FIGURES, GRID, finish, panels, register, styled

MAIN, CLOSE_UP = "^(?!.*close-up)", "close-up"


@register(
    FIGURES,
    "Gain against depth",
    only={
        "A forward gain": "forward",
        "A backward gain": "backward",
        '"Single" panels': "single",
        'The "Composite" panel forward': "composite.*forward",
        'The "Composite" panel backward': "composite.*backward",
        "Faint bands": "composite",
        "If a run's": MAIN,
        "A close-up": CLOSE_UP,
    },
)
def gain_depth(records: Sequence[RunRecord]) -> Figure:
    """Draw the gains of single mixing matrices and of composites against depth (mHC, Figures 3 and 7).

    The y axes show gains, which have no unit, at the last diagnostics step; the x axes show the sub-layer l. A forward gain is the
    largest absolute row sum of a matrix. A backward gain is the largest absolute column sum of a matrix. "Single" panels show each
    mixing matrix alone. The "Composite" panel forward shows the product of the matrices of sub-layers 1 to l. The "Composite" panel
    backward shows the product of the matrices of sub-layers l to L. Lines are means over the sampled tokens. Faint bands reach from
    these means up to the largest gain of a token. A gain of 1 amplifies nothing. If a run's gains exceed 3, the axis is
    logarithmic. A close-up has a linear axis, and shows those runs alone whose gains never exceed 3.
    """
    drawn = (
        ("single_forward", "Single H_res, forward", None),
        ("single_backward", "Single H_res, backward", None),
        ("composite_forward", "Composite H(l)···H(1), forward", "composite_forward_max"),
        ("composite_backward", "Composite H(L)···H(l), backward", "composite_backward_max"),
    )
    close = _close_runs(records, [key for key, _, _ in drawn])
    rows = _with_close_ups(drawn, close, len(records))
    figure, axes = panels(len(rows), 2, height=2.7 if len(rows) == 2 else 2.3)
    for axis, (key, title, upper, is_close) in zip(axes, [one for row in rows for one in row], strict=True):
        axis.set_title(title)
        by_depth(axis, records, key, upper, keep=lambda record, only=is_close: not only or id(record) in close)
        axis.axhline(1, color=GRID, linewidth=1, zorder=1.5)
        axis.set_ylabel("gain (max. abs. row sum)" if "forward" in key else "gain (max. abs. col. sum)")
    _gain_axes(axes, [one for row in rows for one in row], len(close) == len(records))
    return finish(figure, records, "no diagnostics with gains (single_forward, composite_forward and others)")


@register(
    FIGURES,
    "Composite gain against steps",
    only={
        "A forward gain": "forward",
        "A backward gain": "backward",
        "If a run's": MAIN,
        "A close-up": CLOSE_UP,
    },
)
def gain_step(records: Sequence[RunRecord]) -> Figure:
    """Draw the gain of the product H_L ... H_1 of all mixing matrices against steps.

    The y axes show the gain of the product of all mixing matrices, which has no unit; the x axes show the optimizer step. A forward
    gain is the largest absolute row sum of the product. A backward gain is the largest absolute column sum of the product. Lines
    are means over the sampled tokens, and the faint bands reach from these means up to the largest gain of a token. A gain of 1
    amplifies nothing, and a line that climbs shows that the product grows during training. If a run's gains exceed 3, the axis is
    logarithmic. A close-up has a linear axis, and shows those runs alone whose gains never exceed 3. A dotted vertical line with a
    cross marks the step at which a run diverged.
    """
    drawn = (("composite_forward", "Forward", -1), ("composite_backward", "Backward", 0))
    # The product of all L matrices is the last entry of `composite_forward` and the first entry of `composite_backward`.
    close = _close_runs(records, [key for key, _, _ in drawn], {key: whole for key, _, whole in drawn})
    rows = _with_close_ups(drawn, close, len(records))
    figure, axes = panels(len(rows), 2, height=3.0 if len(rows) == 1 else 2.3)
    for axis, (key, title, whole, is_close) in zip(axes, [one for row in rows for one in row], strict=True):
        for record, style in styled(records):
            steps, values = series(record, "diagnostics", key)
            if not len(steps) or (is_close and id(record) not in close):
                continue
            curve(axis, steps, values[:, whole], style)
            most_steps, most = series(record, "diagnostics", f"{key}_max")
            if np.array_equal(steps, most_steps):
                band = {"color": style["color"], "alpha": 0.15, "linewidth": 0}
                axis.fill_between(steps, values[:, whole], most[:, whole], **band)
            mark_divergence(axis, record, style)
        axis.axhline(1, color=GRID, linewidth=1, zorder=1.5)
        axis.set(title=title, xlabel="optimizer step", ylabel="gain of H(L)···H(1)")
    _gain_axes(axes, [one for row in rows for one in row], len(close) == len(records))
    return finish(figure, records, "no diagnostics with composite_forward or composite_backward")


def _close_runs(records: Sequence[RunRecord], keys: Sequence[str], at: Mapping[str, int] | None = None) -> set[int]:
    """Return the ids of the runs whose gains never exceed `CLOSE_GAIN`, among those that have diagnostics.

    Args:
      records: the runs.
      keys: measurements of gains, with values [L].
      at: for each key the sub-layer (index) that counts, at all diagnostics steps.  None: all sub-layers, at the last step.
    """
    close = set()
    for record in records:
        lasts = [last_diagnostics(record, key) for key in keys]
        found = [last[1] for last in lasts if last is not None]
        if at is not None:
            found = [values[:, at[key]] for key in keys if len(values := series(record, "diagnostics", key)[1])]
        largest = max((float(np.nanmax(values, initial=0)) for values in found), default=0.0)
        if largest <= CLOSE_GAIN:
            close.add(id(record))
    return close


def _with_close_ups(drawn: Sequence[tuple], close: set[int], runs: int) -> list[list[tuple]]:
    """Return rows of two panels, as (key, title, option, whether it is a close-up).

    If some runs are close to 1 and others are not, each row has one measurement and its close-up, else two measurements.
    """
    if 0 < len(close) < runs:
        return [[(*one, False), (one[0], f"{one[1]}, close-up", one[2], True)] for one in drawn]
    return [[(*one, False) for one in drawn[k : k + 2]] for k in range(0, len(drawn), 2)]


def _gain_axes(axes: Sequence[Axes], drawn: Sequence[tuple], all_close: bool) -> None:
    """Set the y axes of panels of gains: common limits for single gains and for composites, apart from those of close-ups."""
    for part in ("single", "composite"):
        of_part = [(axis, one[3]) for axis, one in zip(axes, drawn, strict=True) if one[0].startswith(part)]
        linear = [axis for axis, is_close in of_part if is_close or all_close]
        logarithmic = [axis for axis, is_close in of_part if not is_close and not all_close]
        for axis in linear:
            near_one(axis)
        if logarithmic:
            log_axis(*logarithmic, around=1.0)


@register(
    FIGURES,
    "Similarity of the streams",
    only={
        'Panels "over depth"': "(cosine|ratio) over depth",
        'Panels "mean over depth"': "mean over depth",
        "Thick lines of cosines": "cosine",
        "If the absolute cosine": "cosine",
        "The participation ratio is": "ratio",
        "It is 1 if the streams": "ratio",
    },
)
def stream_similarity(records: Sequence[RunRecord]) -> Figure:
    """Draw cosines and participation ratio of the streams against depth and against steps.

    Panels "over depth" show values against the sub-layer l at the last diagnostics step. Panels "mean over depth" show means over
    sub-layers against optimizer steps. All values are means over the sampled tokens and have no unit. Thick lines of cosines are
    the mean absolute cosine between pairs of streams, and thin lines are the mean cosine with its sign, where opposite signs
    cancel. If the absolute cosine is 1, the streams of a token are multiples of one vector, and a mixing matrix can change only the
    signs and scales of these multiples. The participation ratio is (tr G)² / tr(G²) of the Gram matrix G of a token's n streams. It
    is 1 if the streams are multiples of one vector or if one stream outweighs the others, and n if the streams are orthogonal and
    have equal norms.
    """
    figure, axes = panels(2, 2, height=2.7, share_y=True)
    thin = {"linewidth": 0.7, "marker": ""}
    drawn = (("stream_cosine_abs", axes[:2], {}), ("stream_cosine", axes[:2], thin), ("stream_rank", axes[2:], {}))
    for key, (depth, steps), look in drawn:
        by_depth(depth, records, key, keep=_has_streams, **look)
        for record, style in styled(records):
            at, values = series(record, "diagnostics", key)
            if len(at) and record.num_streams > 1:
                finite = np.isfinite(values)
                with np.errstate(invalid="ignore"):
                    curve(steps, at, np.where(finite, values, 0).sum(1) / finite.sum(1), style, **look)
                mark_divergence(steps, record, style)
    for label, (depth, steps) in (("mean pairwise cosine", axes[:2]), ("participation ratio", axes[2:])):
        steps.set(title=f"{label.capitalize()}, mean over depth", xlabel="optimizer step", ylabel=label)
        depth.set(title=f"{label.capitalize()} over depth", ylabel=label)
    axes[0].set_ylim(min(axes[0].get_ylim()[0], 0), 1.04)
    n = max((record.num_streams for record in records if record.num_streams > 1), default=2)
    axes[2].set_ylim(1 - 0.04 * (n - 1), n + 0.04 * (n - 1))
    return finish(figure, records, "no diagnostics with the cosines or the rank of the streams of a multi-stream run")


@register(
    FIGURES,
    "Size of streams and branches",
    only={'"Streams" are': "^streams", "A wide band": "^streams", '"Branch outputs"': "^branch"},
)
def stream_size(records: Sequence[RunRecord]) -> Figure:
    """Draw the root mean square of streams and of branch outputs against depth.

    The y axes (logarithmic) show root mean squares, which have no unit, at the last diagnostics step; the x axes show the sub-layer
    l. "Streams" are those that the sub-layer reads: the root mean square of each stream is taken over its channels and the sampled
    tokens, the line is the mean over streams, and the band reaches from the smallest stream to the largest. A wide band means that
    the streams differ in size. "Branch outputs" shows the root mean square of the branch's output, over its channels and all tokens
    of the sequence.
    """
    figure, axes = panels(1, 2, height=2.9)
    for axis, title, key in zip(axes, ("Streams", "Branch outputs"), ("stream_rms", "branch_rms"), strict=True):
        axis.set(title=title, ylabel="RMS")
        by_depth(axis, records, key)
        log_axis(axis)
    return finish(figure, records, "no diagnostics with stream_rms or branch_rms")


@register(
    FIGURES, "Second eigenvalue", matrices=True, only={"The single matrix": "single", "The composite is": "composite"}
)
def eigenvalues(records: Sequence[RunRecord]) -> Figure:
    """Draw the second eigenvalue of single mixing matrices and of composites against depth.

    The y axes show |lambda_2| / |lambda_1| (no unit), where lambda_1 and lambda_2 are the eigenvalues of a matrix that are largest
    in absolute value; the x axes show the sub-layer l. The single matrix is the mean of H_res over the sampled tokens at the last
    diagnostics step. The composite is the product H(l)···H(1) of the means of H_res over the sampled tokens at that step. Each time
    the matrix is applied to the streams, differences from its leading eigenvector shrink by this ratio. At 1 nothing is averaged
    away; near 0 the streams become multiples of one vector. For doubly stochastic matrices lambda_1 is 1, and the streams become
    equal.
    """
    figure, axes = panels(1, 2, height=2.9)
    for _, style, (_, matrices) in multi_stream(records, "h_res"):
        depth = np.arange(1, len(matrices) + 1)
        for axis, H in zip(axes, (matrices, composites(matrices)[0]), strict=True):
            curve(axis, depth, second_eigenvalue(H), style)
            count_depth(axis, len(matrices))
    for axis, title in zip(axes, ("Single H_res", "Composite H(l)···H(1)"), strict=True):
        axis.set(title=title, ylim=(-0.03, 1.05), xlabel="sub-layer l", ylabel="|λ₂| / |λ₁|")
    return finish(figure, records, "no diagnostics with h_res of a multi-stream run")


@register(
    FIGURES,
    "How the matrices mix",
    only={
        '"Row sums"': "row sums",
        '"Column sums"': "column sums",
        '"Row entropy"': "entropy",
        '"Composite to uniform"': "uniform",
        "If the matrices are doubly": "uniform",
    },
)
def mixing(records: Sequence[RunRecord]) -> Figure:
    """Draw the row and column sums, the entropy and the distance to uniform averaging of the mixing matrices against depth.

    Each panel shows a number without unit at the last diagnostics step against the sub-layer l. "Row sums" (logarithmic) shows the
    largest |row sum − 1| of H_res, over its rows and the sampled tokens; zeros are not drawn. "Column sums" (logarithmic) shows the
    largest |column sum − 1| of H_res, over its columns and the sampled tokens; zeros are not drawn. "Row entropy" is the entropy of
    the rows of H_res divided by log n, a mean over rows and the sampled tokens: it is 0 if each row has one entry that is not 0,
    and 1 if all entries have the same size. "Composite to uniform" (logarithmic) is the distance of the product P = H(l)···H(1)
    from the matrix with all entries 1/n, a mean over the sampled tokens. If the matrices are doubly stochastic and mix all streams,
    this distance to uniform averaging approaches 0 as l grows.
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
        by_depth(axis, records, key, keep=_has_streams)
        if key == "entropy":
            axis.set_ylim(0, max(1.0, axis.get_ylim()[1]))
        else:
            log_axis(axis)
    return finish(figure, records, "no diagnostics with row_error, entropy or uniform_distance of a multi-stream run")


def _has_streams(record: RunRecord) -> bool:
    return record.num_streams > 1
