"""Tools that all figures share: house style, sizes, looks of the kinds of connection, panels, legends and saving.

A look is a colour, a line style and a marker.  A kind of connection has the same colour in every figure.  The colours are those of
Okabe and Ito, which colour-blind readers tell apart.  Line styles and markers tell the kinds apart in black and white.

A figure is drawn for a `Size`.  The default suits a screen; `SIZES` has those of a column and of a page of a paper.  Text keeps its
size in points whatever the width: panels that do not fit beside each other stand below each other.
"""

from __future__ import annotations

import functools
import inspect
import io
import re
import textwrap
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, cast

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.gridspec import GridSpec
from matplotlib.lines import Line2D

from mhc_jax.analysis.run_reader import RunRecord, labels
from mhc_jax.errors import InputError
from mhc_jax.plots.sizes import LEAST_HEIGHT, LEAST_PANEL, TEXT, Size, chosen_panels, current_size, scaled

INK = "#1a1a1b"
"""Colour of text, axes and the residual connection; `svg` replaces it by the text colour of the page."""
GRID = "#9a9a9a"
STYLE: dict[Any, Any] = {
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.alpha": 0.35,
    "grid.linewidth": 0.5,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "svg.fonttype": "none",
    "svg.hashsalt": "mhc_jax",
    "pdf.fonttype": 42,
}
"""Settings of matplotlib for every figure.  Text stays text in SVG and PDF files."""
SCALED: dict[Any, float] = {
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.labelsize": 9,
    "legend.fontsize": 9,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "lines.linewidth": 1.6,
    "lines.markersize": 5,
}
"""Settings of matplotlib in points for text of `TEXT` points.  They grow and shrink with the text."""
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
BASELINE_WIDTH = 2.8
"""Width in points of the residual connection's line, which lies under all others, so that they do not hide it."""
_DASHES: tuple[Any, ...] = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (8, 2)))


class NothingToDraw(InputError):  # noqa: N818  (a message for a person, like its parent)
    """Raised if the given runs lack what a figure shows.  The message says what is missing."""

    def __init__(self, missing: str) -> None:
        self.missing = missing
        super().__init__(f"Nothing to draw: {missing}.")


class Plot(NamedTuple):
    """A figure that a page can show: the function that draws it, its title and its caption."""

    draw: Callable[[Any], Figure]
    """Function that draws the figure of a list of `RunRecord` (`FIGURES`) or of `Variant` (`sweeps.SWEEP_FIGURES`)."""
    title: str
    caption: str
    """Text below the figure, which says what the axes show and how to read the figure."""
    matrices: bool = False
    """Whether the figure shows matrices or what is computed of them.  Means over seeds of matrices would show none of the runs, so
    that such a figure takes one seed of each variant."""
    only: Mapping[str, str] = MappingProxyType({})
    """By the words with which a sentence of the caption begins: a regular expression, which the name of a panel that this sentence
    explains matches in lower case."""

    def caption_of(self, panels: Sequence[str]) -> str:
        """Return the caption without the sentences that explain none of the panels with these names."""
        text = self.caption
        for start, pattern in self.only.items():
            if not any(re.search(pattern, name.lower()) for name in panels):
                text = re.sub(rf"{re.escape(start)}.*?\.(?: (?=[A-Z\"])|$)", "", text, count=1)
        return text.strip()


FIGURES: dict[str, Plot] = {}
"""Figures of single runs, by name."""


def _settings() -> dict[Any, Any]:
    return STYLE | {key: scaled(points) for key, points in SCALED.items()}


def house_style(function: Callable[..., Figure]) -> Callable[..., Figure]:
    """Make a function draw its figures in the house style, and the panels alone that `Size.panel` names."""

    @functools.wraps(function)
    def draw(*args: Any, **kwargs: Any) -> Figure:
        with matplotlib.rc_context(_settings()):
            figure = function(*args, **kwargs)
            for axis in figure.axes:
                # Ticks are made when the figure is rendered, where these settings no longer hold.
                ticks = {"labelsize": scaled(8), "color": INK, "labelcolor": INK}
                axis.tick_params(which="both", **ticks, grid_color=GRID, grid_alpha=0.35, grid_linewidth=0.5)
            if current_size().panel:
                _keep(figure, current_size())
            return figure

    return draw


def register(
    figures: dict[str, Plot], title: str, matrices: bool = False, only: Mapping[str, str] = MappingProxyType({})
) -> Callable[[Callable[..., Figure]], Callable[..., Figure]]:
    """Return a decorator that makes a function draw in the house style and enters it in `figures` under its name.

    The caption of the figure is the function's docstring without the first line, so that code and pages say the same.
    `matrices` and `only` are those of `Plot`.
    """

    def enter(function: Callable[..., Figure]) -> Callable[..., Figure]:
        draw = house_style(function)
        body = (inspect.getdoc(function) or "").partition("\n")[2]
        figures[function.__name__] = Plot(draw, title, " ".join(body.split()), matrices, only)
        return draw

    return enter


def save(figure: Figure, path: str | Path, *, vector: bool = False, dpi: int = 150) -> None:
    """Write a figure to `path` as PNG at `dpi` and, if `vector`, as SVG and PDF beside the PNG, both with text as text."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write(figure, path.with_suffix(".png"), dpi)
    for suffix in (".svg", ".pdf") if vector else ():
        write(figure, path.with_suffix(suffix))


def write(figure: Figure, path: Path, dpi: int = 150) -> None:
    """Write a figure as the file `path`.  Its suffix .png, .svg or .pdf says in which format."""
    dates = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}
    with matplotlib.rc_context(STYLE):
        figure.savefig(path, dpi=dpi, facecolor="white", metadata=dates.get(path.suffix))


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
    text = re.sub(r"(\d\.\d\d)\d+", r"\1", text)  # hundredths of a point are enough, and take half the space
    return text.replace(INK, "currentColor")


def looks(kinds: Iterable[str]) -> Iterator[dict[str, Any]]:
    """Yield colour, line style and marker for each kind of connection in `kinds`, as arguments of `Axes.plot`.

    If a kind occurs again, it has the same colour and marker but the next line style, and every second time its markers are hollow.
    The lines of the residual connection are wider than others and lie under them.
    """
    seen: Counter[str] = Counter()
    for kind in kinds:
        color, dashes, marker = LOOKS.get(kind, OTHER_LOOK)
        line = _DASHES[(_DASHES.index(dashes) + seen[kind]) % len(_DASHES)]
        under = {"linewidth": scaled(BASELINE_WIDTH), "zorder": 1.9} if kind == "residual" else {}
        hollow = "none" if seen[kind] % 2 else "full"
        yield {"color": color, "linestyle": line, "marker": marker, "fillstyle": hollow, **under}
        seen[kind] += 1


def color_of(kind: str) -> str:
    """Return the colour of a kind of connection."""
    return LOOKS.get(kind, OTHER_LOOK)[0]


def shades(color: str, count: int) -> list[str]:
    """Return `count` shades of a colour from light to dark, for variants of one kind.  A single shade is the colour itself."""
    rgb = np.asarray(to_rgb(color))
    at = np.linspace(-0.55, 0.3, count) if count > 1 else np.zeros(1)
    return [to_hex(tuple(rgb + (1 - rgb) * -share if share < 0 else rgb * (1 - share))) for share in at]


def styled(records: Sequence[RunRecord]) -> Iterator[tuple[RunRecord, dict[str, Any]]]:
    """Yield each run together with its look and label, which are arguments of `Axes.plot`."""
    for record, style, label in zip(records, looks(r.kind for r in records), labels(records), strict=True):
        yield record, style | {"label": plain_text(label)}


def plain_text(label: str) -> str:
    """Return a label that matplotlib shows as plain text: $ is escaped, and a space stands before a leading underscore."""
    return (" " if label.startswith("_") else "") + label.replace("$", r"\$")


def panels(
    rows: int, columns: int, height: float = 2.9, share_y: bool = False, by_text: bool = False
) -> tuple[Figure, list[Axes]]:
    """Make a figure with a grid of panels.  Return the figure and the list of its panels, row by row.

    At most three panels stand beside each other.  At a fixed width (`Size.width`), panels that would be narrower than `LEAST_PANEL`
    go to further rows.

    Args:
      rows, columns: numbers of panels.  On a screen, a single column is 6.4 inches wide, and each of several columns 4.2.
      height: height of a row on a screen, in inches.
      share_y: whether the panels of a row share one y axis.
      by_text: whether the height is that of lines of text, which does not depend on the width.
    """
    size = current_size()
    natural = 4.2 if columns > 1 else 6.4
    across = columns if columns <= 3 else min(3, -(-columns // 2))
    width = natural * across
    if size.width is not None:
        width = size.width
        across = max(1, min(across, int(width * 72 / size.text // LEAST_PANEL)))
        across = min(across, max(1, len(size.numbers))) if size.panel else across
        shrunk = scaled(height) if by_text else min(height / natural, 0.62) * width / across
        height = max(shrunk, LEAST_HEIGHT * size.text / 72)
    down = -(-rows * columns // across)
    figure = Figure(figsize=(width, height * down + scaled(0.5)), layout="constrained")
    grid = GridSpec(down, across, figure=figure)
    axes: list[Axes] = []
    for k in range(rows * columns):
        first = axes[k - k % columns] if share_y and k % columns else None
        axes.append(figure.add_subplot(grid[k // across, k % across], sharey=first))
        if first is not None and k % across:
            axes[k].tick_params(labelleft=False)
    return figure, axes


def legend(figure: Figure, handles: Sequence[Any] | None = None, axis: Axes | None = None) -> None:
    """Put a legend above the panels, in as many columns as fit the width, and make the figure higher by its further rows.

    Args:
      figure: figure with panels.
      handles: what the legend lists.  None: every label that was drawn, once.
      axis: panel above which the legend stands.  None: above all panels.
    """
    if handles is None:
        of = figure.axes if axis is None else [axis]
        pairs = [pair for one in of for pair in zip(*one.get_legend_handles_labels(), strict=True)]
        named = {label: handle for handle, label in reversed(pairs)}
        named = {label: named[label] for label in dict.fromkeys(label for _, label in pairs)}
    else:
        named = {str(handle.get_label()): handle for handle in handles}
    if not named:
        return
    texts = [textwrap.fill(label, max(20, _letters(figure) - 8), break_on_hyphens=False) for label in named]
    columns = _columns(figure, texts)
    rows = -(-len(named) // columns) + sum(text.count("\n") for text in texts)
    # The figure grows by 0.2 inches for each further row, so that the panels do not shrink.
    figure.set_figheight(figure.get_figheight() + scaled(0.2) * (rows - (axis is None)))
    options: dict[str, Any] = {"ncols": columns, "frameon": False}
    if axis is None:
        figure.legend(named.values(), texts, loc="outside upper center", **options)
    else:
        place = {"loc": "lower left", "bbox_to_anchor": (0, 1), "borderaxespad": 0.2}
        axis.legend(named.values(), texts, **place, **options)


def name_rows(axis: Axes, names: Sequence[str]) -> None:
    """Name the rows 0, 1, ... of a panel on its left side.

    A name that is longer than 0.6 of the figure's width is written on several lines, and the figure grows by these lines.
    """
    figure = cast("Figure", axis.figure)
    width = max(20, _letters(figure) * 6 // 10)
    # A line may end behind a colon, too.
    lines = [textwrap.wrap(name.replace(":", ":\0 "), width, break_on_hyphens=False) for name in names]
    broken = ["\n".join(line).replace("\0 ", "").replace("\0", "") for line in lines]
    texts = [name if len(name) <= width else text for name, text in zip(names, broken, strict=True)]
    axis.set_yticks(range(len(texts)), texts)
    deepest = max((text.count("\n") for text in texts), default=0)
    figure.set_figheight(figure.get_figheight() + scaled(0.14) * deepest * len(texts))


def _letters(figure: Figure) -> int:
    """Return about how many letters fit the width of a figure."""
    return int(figure.get_figwidth() * 12 * TEXT / current_size().text)


def _columns(figure: Figure, texts: Sequence[str]) -> int:
    """Return how many columns of a legend with these texts fit the width of a figure."""
    longest = max(len(line) for text in texts for line in text.split("\n"))
    return max(1, min(len(texts), _letters(figure) // (longest + 8)))


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
    legend(figure, handles)
    return figure


def panel_names(figure: Figure) -> list[str]:
    """Return the names of a figure's panels in order: that of `Axes.set_label`, or else title, or label of the y or x axis."""
    names = []
    for axis in _panels_of(figure):
        title = next((text for place in ("left", "center") if (text := axis.get_title(place))), "")
        names.append(axis.get_label() or title or axis.get_ylabel() or axis.get_xlabel())
    return [" ".join(name.split()) for name in names]


def _panels_of(figure: Figure) -> list[Axes]:
    return [axis for axis in figure.axes if axis.get_label() != "<colorbar>" and axis.axison]


def _keep(figure: Figure, size: Size) -> None:
    """Remove all panels but those that `size.panel` names, and make the figure as high as these need.

    Raises:
      InputError: there is no such panel, or several have its words.
    """
    axes, names = _panels_of(figure), panel_names(figure)
    found = chosen_panels(names, size)
    kept = [axes[k] for k in found]
    bars = [item.colorbar.ax for axis in kept for item in axis.collections if item.colorbar is not None]
    places = [place.get_gridspec() for axis in kept if (place := axis.get_subplotspec()) is not None]
    rows, columns = (places[0].nrows, min(places[0].ncols, len(kept))) if places else (1, 1)
    for axis in [axis for axis in figure.axes if axis not in kept and axis not in bars]:
        axis.remove()
    legends = 0.5 if figure.legends else 0.1
    down = -(-len(kept) // columns)
    figure.set_figheight((figure.get_figheight() - legends) / rows * down + legends)
    grid = GridSpec(down, columns, figure=figure)
    for k, axis in enumerate(kept):
        axis.set_subplotspec(grid[k // columns, k % columns])
        axis.tick_params(labelleft=bool(len(axis.get_yticks())))
        if axis.get_title("center"):  # that of a map, which does not name its run
            axis.set_title(names[found[k]], loc="center")
    drawn = {str(artist.get_label()) for axis in kept for artist in (*axis.lines, *axis.patches, *axis.containers)}
    drawn = {label for label in drawn if label and not label.startswith("_")}
    for old in figure.legends:
        entries = zip(old.legend_handles, (text.get_text() for text in old.get_texts()), strict=True)
        shown = [pair for pair in entries if any(" ".join(pair[1].split()).startswith(label) for label in drawn)]
        if shown:
            old.remove()
            handles, texts = zip(*shown, strict=True)
            figure.legend(handles, texts, loc="outside upper center", ncols=_columns(figure, texts), frameon=False)
