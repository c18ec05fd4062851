"""What all figures share: looks of the runs, panels, legend, axes, saving.

A kind of connection keeps its colour (Okabe-Ito, which colour-blind readers tell apart) in every
figure; line style and marker differ too, so that the figures survive a black-and-white printer.
Letters: S sub-layers (attention and feed-forward count as two), n streams, l = 1..S the depth.
"""

from __future__ import annotations

import functools
import io
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import Formatter, FuncFormatter, MaxNLocator, NullFormatter

from mhc_jax.analysis.records import RunRecord, labels, last_diagnostics, series
from mhc_jax.errors import InputError

INK = "#1a1a1b"
"""Text and axes; used for nothing else, since `svg` turns it into the page's text colour."""
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
}
OTHER_LOOK = ("#7f7f7f", "-.", "p")
_DASHES: tuple[Any, ...] = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (8, 2)))


class NothingToDraw(InputError):  # noqa: N818  (a message for a person, like its parent)
    """The records hold nothing that the figure shows; the sentence says what it needs."""


class Plot(NamedTuple):
    """An entry of `FIGURES`."""

    draw: Callable[[Any], Figure]
    title: str
    caption: str


FIGURES: dict[str, Plot] = {}
"""Name to function, title, and a caption that says what is shown and how to read it."""


def register(title: str, caption: str) -> Callable[[Callable[..., Figure]], Callable[..., Figure]]:
    """Enter a figure function in `FIGURES` and give it the house style."""

    def wrap(function: Callable[..., Figure]) -> Callable[..., Figure]:
        @functools.wraps(function)
        def draw(records: Sequence[RunRecord]) -> Figure:
            with matplotlib.rc_context(STYLE):
                return function(records)

        FIGURES[function.__name__] = Plot(draw, title, caption)
        return draw

    return wrap


def save(figure: Figure, path: str | Path, *, vector: bool = False) -> None:
    """Write `path` as PNG at 150 dpi and, if `vector`, the same name as .svg beside it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path.with_suffix(".png"), dpi=150, facecolor="white")
    if vector:
        with matplotlib.rc_context(STYLE):
            figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})


def svg(figure: Figure) -> str:
    """`<svg>` element for a page: transparent, its text in the page's colour, nothing external."""
    buffer = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(buffer, format="svg", transparent=True)
    text = buffer.getvalue().decode()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r' xmlns(:\w+)?="[^"]*"| version="[^"]*"', "", text)
    text = re.sub(r'<g id="[^"]*">', "<g>", text).replace("xlink:href", "href")
    return text.replace(INK, "currentColor")


def smooth(values: Float[np.ndarray, " K"]) -> Float[np.ndarray, " K"]:
    """Centred moving median over about a twentieth of the points; non-finite points stay NaN.

    A median, because a mean turns a one-step spike into a plateau.  At the start the window shrinks, because a loss falls
    fast there; at the end it loses its later half alone, because one noisy step is no end of a curve.
    """
    half = len(values) // 40
    out = np.full(len(values), np.nan)
    for k in np.flatnonzero(np.isfinite(values)):
        reach = min(half, k)
        window = values[k - reach : k + reach + 1]
        out[k] = np.median(window[np.isfinite(window)])
    return out


def styled(records: Sequence[RunRecord]) -> Iterator[tuple[RunRecord, dict[str, Any]]]:
    """Each run with its look and label.

    Runs of one kind share colour and marker; every second one has hollow markers, and the line
    styles go round.
    """
    seen: dict[str, int] = {}
    for record, label in zip(records, labels(records), strict=True):
        color, dashes, marker = LOOKS.get(record.kind, OTHER_LOOK)
        turn = seen[record.kind] = seen.get(record.kind, -1) + 1
        yield (
            record,
            {
                "color": color,
                "linestyle": _DASHES[(_DASHES.index(dashes) + turn) % len(_DASHES)],
                "marker": marker,
                "fillstyle": "none" if turn % 2 else "full",
                "label": plain_text(label),
            },
        )


def plain_text(label: str) -> str:
    """A label that matplotlib neither reads as mathematics nor hides for its leading underscore."""
    return (" " if label.startswith("_") else "") + label.replace("$", r"\$")


def panels(rows: int, columns: int, height: float = 2.9, share_y: bool = False) -> tuple[Figure, list[Axes]]:
    """A grid of panels; sizes in inches, 6.4 wide for one column, 4.2 a column for more.

    `share_y`: the panels of a row have one y axis, so that they can be compared.
    """
    size = (4.2 * columns if columns > 1 else 6.4, height * rows + 0.5)
    figure = Figure(figsize=size, layout="constrained")
    share = "row" if share_y else False
    return figure, list(figure.subplots(rows, columns, squeeze=False, sharey=share).flat)


def finish(figure: Figure, records: Sequence[RunRecord], need: str) -> Figure:
    """Add the legend of the runs that were drawn, with the step at which a run diverged."""
    drawn = {line.get_label() for axis in figure.axes for line in axis.lines}
    handles = []
    for record, style in styled(records):
        if style["label"] in drawn:
            at = record.diverged_at
            ended = "" if at is None else f" (diverged at step {at})"
            handles.append(Line2D([], [], **style | {"label": style["label"] + ended}))
    if not handles:
        raise NothingToDraw(f"Nothing to draw: {need}.")
    longest = max(len(handle.get_label()) for handle in handles)
    columns = max(1, min(len(handles), int(figure.get_figwidth() * 12 // (longest + 8))))
    # A row of the legend is 0.2 inches high; without the extra height it is taken from the panels.
    figure.set_figheight(figure.get_figheight() + 0.2 * (-(-len(handles) // columns) - 1))
    figure.legend(handles=handles, loc="outside upper center", ncols=columns, frameon=False)
    return figure


def curve(axis: Axes, x: Any, y: Any, style: dict[str, Any], **more: Any) -> None:
    """One curve of a run, with about 12 markers; its label tells `finish` whom to name."""
    if np.isfinite(np.asarray(y, float)).any():
        options: dict[str, Any] = style | {"markevery": max(1, len(x) // 12)} | more
        axis.plot(x, y, **options)


def mark_divergence(axis: Axes, record: RunRecord, style: dict[str, Any]) -> None:
    """Dotted line and a cross at the foot of the panel, at the step where the run diverged."""
    if record.diverged_at is not None:
        axis.axvline(record.diverged_at, color=style["color"], linestyle=":", linewidth=1)
        top = axis.get_xaxis_transform()
        axis.plot([record.diverged_at], [0.04], "x", color=style["color"], ms=8, mew=2, transform=top)


def mark_spikes(axis: Axes, records: Sequence[RunRecord]) -> None:
    """Triangles along the top edge at the steps of loss spikes, one row a run."""
    top = axis.get_xaxis_transform()
    for row, (record, style) in enumerate(styled(records)):
        steps = record.spike_steps
        axis.plot(
            steps,
            [0.985 - 0.035 * row] * len(steps),
            "v",
            color=style["color"],
            ms=5,
            transform=top,
        )


def positive(values: Any) -> Float[np.ndarray, "*shape"]:
    """What a logarithmic axis can show; the rest is NaN."""
    values = np.asarray(values, float)
    return np.where(np.isfinite(values) & (values > 0), values, np.nan)


def log_axis(*axes: Axes, around: float | None = None) -> None:
    """Logarithmic y, the same for all `axes`, over their data.

    `around`: show at least half to twice this value, lest rounding fill the panel.
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


def _tick(value: float, _: int) -> str:
    """100 rather than 10^2, powers only where they are shorter."""
    if 1e-3 <= value < 1e5:
        return f"{value:g}"
    exponent = int(np.floor(np.log10(value) + 1e-9))
    factor = round(value / 10.0**exponent)
    factor_text = "" if factor == 1 else rf"{factor}\cdot "
    return f"${factor_text}10^{{{exponent}}}$"


def _minor_ticks(ratio: float) -> Formatter:
    """Labels between powers of ten where the axis spans few of them; `ratio` is top over bottom."""
    if ratio > 30:
        return NullFormatter()
    labelled = range(2, 10) if ratio < 3.5 else (2, 3, 4, 6) if ratio < 8 else (2, 5)

    def text(value: float, position: int) -> str:
        digit = round(value / 10.0 ** np.floor(np.log10(value) + 1e-9))
        return _tick(value, position) if digit in labelled else ""

    return FuncFormatter(text)


def by_step(axis: Axes, record: RunRecord, style: dict[str, Any], key: str) -> None:
    """A training measurement: every logged value faint, its moving median on top."""
    steps, values = series(record, "train", key)
    axis.plot(steps, values, color=style["color"], alpha=0.25, linewidth=0.8)
    curve(axis, steps, smooth(values), style, marker="")


def points(axis: Axes, steps: Any, values: Any, style: dict[str, Any]) -> None:
    """Validation losses: markers without a line."""
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
    """The last diagnostics of `key` against depth, 1 at the left.

    Values [S] are drawn as they are, with a faint band up to those of `upper`; values [S, n] as
    their mean over streams, with a band from the smallest to the largest stream.  `more` goes to `curve`.
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
