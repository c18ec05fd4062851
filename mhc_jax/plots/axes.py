"""Tools that draw curves and marks in a panel, and set its axes.

Letters: L is the number of sub-layers, l = 1 ... L the depth, n the number of streams, and K the number of logged steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, Formatter, FuncFormatter, MaxNLocator, NullFormatter, NullLocator

from mhc_jax.analysis.run_reader import RunRecord, last_diagnostics, series
from mhc_jax.plots.sizes import scaled
from mhc_jax.plots.style import styled

CLOSE_GAIN = 3.0
"""Largest gain of the curves that close-ups of gains show, which have linear axes of their own."""


def half_window(points: int) -> int:
    """Return how many neighbours on each side `smooth` includes in the median at a point, for a curve of `points` points."""
    return points // 40


def smooth(values: Float[np.ndarray, " K"]) -> Float[np.ndarray, " K"]:
    """Return the centred moving median over about a twentieth of the points.  Points that are not finite become NaN.

    A mean would turn a spike of one step into a plateau.  At the start of the curve the window shrinks on both sides, because a
    loss falls fast there.  At the end it loses its later half alone, so that a curve does not end with the value of one noisy step.
    """
    half = half_window(len(values))
    out = np.full(len(values), np.nan)
    for k in np.flatnonzero(np.isfinite(values)):
        reach = min(half, k)
        window = values[k - reach : k + reach + 1]
        out[k] = np.median(window[np.isfinite(window)])
    return out


def curve(axis: Axes, x: Any, y: Any, style: dict[str, Any], **more: Any) -> None:
    """Draw one curve of a run, with about 12 markers.  If no value of y is finite, nothing is drawn."""
    if np.isfinite(np.asarray(y, float)).any():
        options: dict[str, Any] = style | {"markevery": max(1, len(x) // 12)} | more
        axis.plot(x, y, **options)


def markers_at(k: int) -> tuple[float, float]:
    """Return the option `markevery` of curve number `k` of a panel: at its own places, so that no markers cover each other."""
    return 0.02 + 0.03 * (k % 5), 0.15


def mark_divergence(axis: Axes, record: RunRecord, style: dict[str, Any]) -> None:
    """Mark the step at which a run diverged, if it did, with a dotted vertical line and a cross at the foot of the panel."""
    if record.diverged_at is not None:
        axis.axvline(record.diverged_at, color=style["color"], linestyle=":", linewidth=1)
        top = axis.get_xaxis_transform()
        axis.plot([record.diverged_at], [0.04], "x", color=style["color"], ms=scaled(8), mew=2, transform=top)


def mark_spikes(axis: Axes, steps: Sequence[int], row: int, color: str) -> None:
    """Mark the steps of loss spikes by triangles in row `row` along the top edge of a panel.  Rows count downwards from 0."""
    height = [0.985 - 0.035 * row] * len(steps)
    axis.plot(steps, height, "v", color=color, ms=scaled(5), transform=axis.get_xaxis_transform())


def fit_y(axis: Axes, values: Any, below: float = 0.15, above: float = 0.15) -> None:
    """Let the y axis span the finite `values`.  The margins `below` and `above` are fractions of the range of these values."""
    values = np.asarray(values, float)
    values = values[np.isfinite(values)]
    if len(values):
        low, high = values.min(), values.max()
        axis.set_ylim(low - below * (high - low) - 1e-3, high + above * (high - low) + 1e-3)


def positive(values: Any) -> Float[np.ndarray, "*shape"]:
    """Return `values` with NaN in place of every value that a logarithmic axis cannot show: not finite, 0 or below."""
    values = np.asarray(values, float)
    return np.where(np.isfinite(values) & (values > 0), values, np.nan)


def log_axis(*axes: Axes, around: float | None = None) -> None:
    """Make the y axes of panels logarithmic, with common limits around the data of all the panels.

    Args:
      axes: panels whose curves have been drawn.
      around: a value such that the axes always span at least `around` / 1.7 to 1.7 `around`.  Without it, rounding errors near
        this value could fill the panel.  None means that the data alone set the limits.
    """
    values = positive(_drawn_values(axes))
    values = values[np.isfinite(values)]
    if around is not None:
        values = np.append(values, [around / 1.7, around * 1.7])
    for axis in axes:
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter(FuncFormatter(_tick))
        if len(values):
            low, high = values.min() / 1.25, values.max() * 1.25
            axis.set_ylim(low, high)
            axis.yaxis.set_minor_formatter(_minor_ticks(high / low))
            if high / low < 3.5:  # powers of ten and their multiples would be too few
                axis.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
                axis.yaxis.set_minor_locator(NullLocator())


def count_depth(axis: Axes, L: int) -> None:
    """Let an x axis count sub-layers (or blocks) from 1 to `L` at least, with no tick at 0."""
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set_xlim(0.5, max(L + 0.5, axis.get_xlim()[1]))


def near_one(axis: Axes) -> None:
    """Let a linear y axis span the curves and bands of a panel, and 0.98 to 1.02 at least, so that rounding errors look small."""
    values = _drawn_values([axis])
    values = np.append(values[np.isfinite(values)], [0.98, 1.02])
    margin = 0.05 * np.ptp(values)
    axis.set_ylim(values.min() - margin, values.max() + margin)


def _drawn_values(axes: Sequence[Axes]) -> Float[np.ndarray, " values"]:
    """Return the y values of all curves and bands of panels, without marks that stand at a fixed height of a panel."""
    drawn = [np.empty(0)]
    for axis in axes:
        lines = [line for line in axis.lines if line.get_transform() == axis.transData]
        drawn += [np.asarray(line.get_ydata(), float) for line in lines]
        bands = [path for band in axis.collections for path in band.get_paths()]
        drawn += [np.asarray(path.vertices, float)[:, 1] for path in bands]
    return np.concatenate(drawn)


def ticks_at(axis: Axes, values: Sequence[float | int], log: bool = True) -> None:
    """Put ticks of the x axis at `values` and nowhere else.  If `log`, make the axis logarithmic."""
    if log:
        axis.set_xscale("log")
        axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_locator(FixedLocator(values))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _tick(value: float, _: int) -> str:
    """Return the label of a tick: a plain number if 0.001 <= value < 100,000, else a digit times a power of ten."""
    if 1e-3 <= value < 1e5:
        return f"{value:g}"
    exponent = int(np.floor(np.log10(value) + 1e-9))
    factor = f"{value / 10.0**exponent:.2g}"
    factor_text = "" if factor == "1" else rf"{factor}\cdot "
    return f"${factor_text}10^{{{exponent}}}$"


def _minor_ticks(ratio: float) -> Formatter:
    """Return the formatter that labels ticks between powers of ten on a logarithmic axis, and labels fewer on a longer axis.

    `ratio` is the upper limit of the axis divided by the lower limit.  Above 30, no such tick has a label.
    """
    if ratio > 30:
        return NullFormatter()
    labelled = (2, 3, 4, 6) if ratio < 8 else (2, 5)

    def text(value: float, position: int) -> str:
        digit = round(value / 10.0 ** np.floor(np.log10(value) + 1e-9))
        return _tick(value, position) if digit in labelled else ""

    return FuncFormatter(text)


def by_step(axis: Axes, record: RunRecord, style: dict[str, Any], key: str, **more: Any) -> None:
    """Draw the measurement `key` of the train lines against steps: a faint line of all values, and the moving median on top.

    `more` are further options of `curve` for the median.
    """
    steps, values = series(record, "train", key)
    axis.plot(steps, values, color=style["color"], alpha=0.25, linewidth=0.8)
    curve(axis, steps, smooth(values), style, **more)


def points(axis: Axes, steps: Any, values: Any, style: dict[str, Any]) -> None:
    """Draw validation losses as markers without a line."""
    edge = {} if style["fillstyle"] == "none" else {"markeredgecolor": "white", "mew": 0.6}
    curve(axis, steps, values, style, linestyle="", markevery=1, **edge)


def by_depth(
    axis: Axes,
    records: Sequence[RunRecord],
    key: str,
    upper: str | None = None,
    keep: Callable[[RunRecord], bool] = lambda record: True,
    depth: str = "sub-layer l",
    **more: Any,
) -> None:
    """Draw the last diagnostics of `key` of each run against depth, which counts from 1.

    Values [L] are drawn as they are, with a faint band up to the values of `upper`.  Values [L, n] are drawn as their mean over
    streams, with a band from the smallest to the largest stream.  The label of the x axis has the step of the diagnostics.

    Args:
      axis: the panel.
      records: the runs.
      key: key of a diagnostics line, with values of shape [L] or [L, n].
      upper: key of the upper edge of the band for values [L].  None means no band.
      keep: says of a run whether it is drawn.
      depth: what the x axis counts.
      more: further options of `curve`.
    """
    steps = set()
    for record, style in styled(records):
        last = last_diagnostics(record, key)
        if last is None or not keep(record):
            continue
        step, values = last
        steps.add(step)
        places = np.arange(1, len(values) + 1)
        band = {"color": style["color"], "alpha": 0.15, "linewidth": 0}
        most = last_diagnostics(record, upper) if upper else None
        if values.ndim == 2:
            axis.fill_between(places, values.min(1), values.max(1), **band)
            values = values.mean(1)
        elif most is not None and most[0] == step:
            axis.fill_between(places, values, most[1], **band)
        curve(axis, places, values, style, **more)
        count_depth(axis, len(values))
    span = f"step {max(steps)}" if len(steps) == 1 else f"steps {min(steps)} to {max(steps)}" if steps else "no step"
    axis.set_xlabel(f"{depth} ({span})")


def multi_stream(
    records: Sequence[RunRecord], key: str
) -> Iterator[tuple[RunRecord, dict[str, Any], tuple[int, np.ndarray]]]:
    """Yield (run, look, (step, value)) for each run that has several streams and diagnostics of `key`.

    The look is that of `styled`.  The step and the value belong to the run's last diagnostics of `key`.
    """
    for record, style in styled(records):
        last = last_diagnostics(record, key)
        if record.num_streams > 1 and last is not None:
            yield record, style, last
