"""Tools that all figures share: house style, looks of the kinds of connection, panels, legends, axes and saving.

A look is a colour, a line style and a marker.  A kind of connection has the same colour in every figure.  The colours are those of
Okabe and Ito, which colour-blind readers tell apart.  Line styles and markers tell the kinds apart in black and white.

Letters: L is the number of sub-layers, l = 1 ... L the depth, n the number of streams, and K the number of logged steps.
"""

from __future__ import annotations

import functools
import inspect
import io
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, Formatter, FuncFormatter, MaxNLocator, NullFormatter, NullLocator

from mhc_jax.analysis.run_reader import RunRecord, labels, last_diagnostics, series
from mhc_jax.errors import InputError

INK = "#1a1a1b"
"""Colour of text, axes and the residual connection; `svg` replaces it by the text colour of the page."""
GRID = "#9a9a9a"
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.labelsize": 9,
    "legend.fontsize": 9,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": GRID,
    "grid.alpha": 0.35,
    "grid.linewidth": 0.5,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "lines.linewidth": 1.6,
    "lines.markersize": 5,
    "svg.fonttype": "path",
    "svg.hashsalt": "mhc_jax",
}
LOOKS = {
    "residual": (INK, "-", "o"),
    "hc": ("#D55E00", "--", "s"),
    "mhc": ("#0072B2", "-", "^"),
    "identity": ("#009E73", "-.", "D"),
    "scalar_gated": ("#E69F00", ":", "v"),
    "gated": ("#CC79A7", "--", "P"),
    "mhc_lite": ("#56B4E9", "-.", "X"),
    "single_pass": ("#009E73", ":", "*"),
    "kromhc": ("#CC79A7", "-", "<"),
    "circulant": ("#E69F00", "--", ">"),
    "attnres_block": ("#56B4E9", ":", "h"),
    "lanes": (INK, ":", (4, 1, 0)),
    "diagonal": ("#0072B2", ":", "d"),
    "identity_mix": ("#0072B2", "--", "8"),
    "go_mhc": ("#D55E00", "-.", "H"),
    "delta_attnres": ("#56B4E9", "--", (6, 1, 0)),
    "mudd": ("#E69F00", "-.", (5, 1, 0)),
}
OTHER_LOOK = ("#7f7f7f", "-.", "p")
_DASHES: tuple[Any, ...] = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (8, 2)))


class NothingToDraw(InputError):  # noqa: N818  (a message for a person, like its parent)
    """Raised if the given runs lack what a figure shows.  The message says what is missing."""

    def __init__(self, missing: str) -> None:
        super().__init__(f"Nothing to draw: {missing}.")


class Plot(NamedTuple):
    """A figure that a page can show: the function that draws it, its title and its caption."""

    draw: Callable[[Any], Figure]
    """Function that draws the figure of a list of `RunRecord` (`FIGURES`) or of `Variant` (`sweeps.SWEEP_FIGURES`)."""
    title: str
    caption: str
    """Text below the figure, which says what the axes show and how to read the figure."""


FIGURES: dict[str, Plot] = {}
"""Figures of single runs, by name."""


def house_style(function: Callable[..., Figure]) -> Callable[..., Figure]:
    """Make a function draw its figures in the house style `STYLE`."""

    @functools.wraps(function)
    def draw(*args: Any, **kwargs: Any) -> Figure:
        with matplotlib.rc_context(STYLE):
            return function(*args, **kwargs)

    return draw


def register(figures: dict[str, Plot], title: str) -> Callable[[Callable[..., Figure]], Callable[..., Figure]]:
    """Return a decorator that makes a function draw in the house style `STYLE` and enters it in `figures` under its name.

    The caption of the figure is the function's docstring without the first line, so that code and pages say the same.
    """

    def enter(function: Callable[..., Figure]) -> Callable[..., Figure]:
        draw = house_style(function)
        body = (inspect.getdoc(function) or "").partition("\n")[2]
        figures[function.__name__] = Plot(draw, title, " ".join(body.split()))
        return draw

    return enter


def save(figure: Figure, path: str | Path, *, vector: bool = False) -> None:
    """Write a figure to `path` as PNG at 150 dpi and, if `vector`, as SVG and PDF beside the PNG, both with text as text."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path.with_suffix(".png"), dpi=150, facecolor="white")
    if vector:
        text_as_text: dict[Any, Any] = {"svg.fonttype": "none", "pdf.fonttype": 42}
        with matplotlib.rc_context(STYLE | text_as_text):
            figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})
            figure.savefig(path.with_suffix(".pdf"), metadata={"CreationDate": None})


def svg(figure: Figure) -> str:
    """Return a figure as an `<svg>` element for a page: transparent, with text in the page's colour, and without links to files."""
    buffer = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(buffer, format="svg", transparent=True)
    text = buffer.getvalue().decode()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r' xmlns(:\w+)?="[^"]*"| version="[^"]*"', "", text)
    text = re.sub(r'<g id="[^"]*">', "<g>", text).replace("xlink:href", "href")
    return text.replace(INK, "currentColor")


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


def looks(kinds: Iterable[str]) -> Iterator[dict[str, Any]]:
    """Yield colour, line style and marker for each kind of connection in `kinds`, as arguments of `Axes.plot`.

    If a kind occurs again, it has the same colour and marker but the next line style, and every second time its markers are hollow.
    """
    seen: Counter[str] = Counter()
    for kind in kinds:
        color, dashes, marker = LOOKS.get(kind, OTHER_LOOK)
        line = _DASHES[(_DASHES.index(dashes) + seen[kind]) % len(_DASHES)]
        yield {"color": color, "linestyle": line, "marker": marker, "fillstyle": "none" if seen[kind] % 2 else "full"}
        seen[kind] += 1


def color_of(kind: str) -> str:
    """Return the colour of a kind of connection."""
    return LOOKS.get(kind, OTHER_LOOK)[0]


def styled(records: Sequence[RunRecord]) -> Iterator[tuple[RunRecord, dict[str, Any]]]:
    """Yield each run together with its look and label, which are arguments of `Axes.plot`."""
    for record, style, label in zip(records, looks(r.kind for r in records), labels(records), strict=True):
        yield record, style | {"label": plain_text(label)}


def plain_text(label: str) -> str:
    """Return a label that matplotlib shows as plain text: $ is escaped, and a space stands before a leading underscore."""
    return (" " if label.startswith("_") else "") + label.replace("$", r"\$")


def panels(rows: int, columns: int, height: float = 2.9, share_y: bool = False) -> tuple[Figure, list[Axes]]:
    """Make a figure with a grid of panels.  Return the figure and the list of its panels, row by row.

    Args:
      rows, columns: numbers of panels.  A single column is 6.4 inches wide; each of several columns is 4.2 inches wide.
      height: height of a row, in inches.
      share_y: whether the panels of a row share one y axis.
    """
    size = (4.2 * columns if columns > 1 else 6.4, height * rows + 0.5)
    figure = Figure(figsize=size, layout="constrained")
    share = "row" if share_y else False
    return figure, list(figure.subplots(rows, columns, squeeze=False, sharey=share).flat)


def finish(figure: Figure, records: Sequence[RunRecord], need: str) -> Figure:
    """Add a legend of the runs that were drawn, with the step at which a run diverged, and return the figure.

    Args:
      figure: figure whose curves have the labels from `styled`.
      records: all runs, drawn or not.
      need: what the runs lack if nothing was drawn, for the message of the error.

    Raises:
      NothingToDraw: no curve of any run was drawn.
    """
    drawn = {line.get_label() for axis in figure.axes for line in axis.lines}
    handles = []
    for record, style in styled(records):
        if style["label"] in drawn:
            at = record.diverged_at
            ended = "" if at is None else f" (diverged at step {at})"
            handles.append(Line2D([], [], **style | {"label": style["label"] + ended}))
    if not handles:
        raise NothingToDraw(need)
    longest = max(len(handle.get_label()) for handle in handles)
    columns = max(1, min(len(handles), int(figure.get_figwidth() * 12 // (longest + 8))))
    # Each further row of the legend is 0.2 inches high.  The figure grows by that height, so that the panels do not shrink.
    figure.set_figheight(figure.get_figheight() + 0.2 * (-(-len(handles) // columns) - 1))
    figure.legend(handles=handles, loc="outside upper center", ncols=columns, frameon=False)
    return figure


def curve(axis: Axes, x: Any, y: Any, style: dict[str, Any], **more: Any) -> None:
    """Draw one curve of a run, with about 12 markers.  If no value of y is finite, nothing is drawn."""
    if np.isfinite(np.asarray(y, float)).any():
        options: dict[str, Any] = style | {"markevery": max(1, len(x) // 12)} | more
        axis.plot(x, y, **options)


def mark_divergence(axis: Axes, record: RunRecord, style: dict[str, Any]) -> None:
    """Mark the step at which a run diverged, if it did, with a dotted vertical line and a cross at the foot of the panel."""
    if record.diverged_at is not None:
        axis.axvline(record.diverged_at, color=style["color"], linestyle=":", linewidth=1)
        top = axis.get_xaxis_transform()
        axis.plot([record.diverged_at], [0.04], "x", color=style["color"], ms=8, mew=2, transform=top)


def mark_spikes(axis: Axes, steps: Sequence[int], row: int, color: str) -> None:
    """Mark the steps of loss spikes by triangles in row `row` along the top edge of a panel.  Rows count downwards from 0."""
    height = [0.985 - 0.035 * row] * len(steps)
    axis.plot(steps, height, "v", color=color, ms=5, transform=axis.get_xaxis_transform())


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
    drawn = [np.empty(0)]
    for axis in axes:
        lines = [line for line in axis.lines if line.get_transform() == axis.transData]
        drawn += [positive(line.get_ydata()) for line in lines]
        bands = [path for band in axis.collections for path in band.get_paths()]
        drawn += [positive(np.asarray(path.vertices)[:, 1]) for path in bands]
    values = np.concatenate(drawn)
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
    if ratio < 3.5:
        return FuncFormatter(_tick)  # such an axis has few ticks, also ones such as 2.2 and 2.4
    labelled = (2, 3, 4, 6) if ratio < 8 else (2, 5)

    def text(value: float, position: int) -> str:
        digit = round(value / 10.0 ** np.floor(np.log10(value) + 1e-9))
        return _tick(value, position) if digit in labelled else ""

    return FuncFormatter(text)


def by_step(axis: Axes, record: RunRecord, style: dict[str, Any], key: str) -> None:
    """Draw the measurement `key` of the train lines against steps: a faint line of all values, and the moving median on top."""
    steps, values = series(record, "train", key)
    axis.plot(steps, values, color=style["color"], alpha=0.25, linewidth=0.8)
    curve(axis, steps, smooth(values), style, marker="")


def points(axis: Axes, steps: Any, values: Any, style: dict[str, Any]) -> None:
    """Draw validation losses as markers without a line."""
    edge = {} if style["fillstyle"] == "none" else {"markeredgecolor": "white", "mew": 0.6}
    curve(axis, steps, values, style, linestyle="", markevery=1, **edge)


def by_depth(
    axis: Axes,
    records: Sequence[RunRecord],
    key: str,
    upper: str | None = None,
    multi_stream_only: bool = False,
    **more: Any,
) -> None:
    """Draw the last diagnostics of `key` of each run against depth, which counts from 1.

    Values [L] are drawn as they are, with a faint band up to the values of `upper`.  Values [L, n] are drawn as their mean over
    streams, with a band from the smallest to the largest stream.  The step of the diagnostics is added to the panel's title.

    Args:
      axis: the panel, with its title.
      records: the runs.
      key: key of a diagnostics line, with values of shape [L] or [L, n].
      upper: key of the upper edge of the band for values [L].  None means no band.
      multi_stream_only: whether to leave out runs of one stream.
      more: further options of `curve`.
    """
    steps = set()
    for record, style in styled(records):
        last = last_diagnostics(record, key)
        if last is None or (multi_stream_only and record.num_streams == 1):
            continue
        step, values = last
        steps.add(step)
        depth = np.arange(1, len(values) + 1)
        band = {"color": style["color"], "alpha": 0.15, "linewidth": 0}
        most = last_diagnostics(record, upper) if upper else None
        if values.ndim == 2:
            axis.fill_between(depth, values.min(1), values.max(1), **band)
            values = values.mean(1)
        elif most is not None and most[0] == step:
            axis.fill_between(depth, values, most[1], **band)
        curve(axis, depth, values, style, **more)
    axis.set_xlabel("sub-layer l")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    if steps:
        span = f"step {max(steps)}" if len(steps) == 1 else f"steps {min(steps)} to {max(steps)}"
        axis.set_title(f"{axis.get_title('left')} ({span})", loc="left")
