"""Figures of what `mhc_jax.analysis.streams` finds in trained models: ablation, rescue, logit lens and dominant streams.

Each function takes results by label.  A label is the text of a connection, such as `mhc:init=home`, and begins with its kind.
Streams count from 1 in figures.  Boundary b is shown as the sub-layer l = b + 1 that reads its streams, the last one as the exit.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from mhc_jax.analysis.streams import Dominance, Lens, Rescue
from mhc_jax.plots.axes import curve
from mhc_jax.plots.heat_maps import SEAMLESS, heat_scale
from mhc_jax.plots.style import GRID, INK, house_style, legend, looks, panels, plain_text

_STREAM_LOOKS = [
    {"linestyle": line, "marker": marker} for line, marker in zip(("-", "--", "-.", ":"), "os^D", strict=True)
]
"""Line style and marker of streams 1 to 4, which repeat for further streams.  The colour is that of the kind of connection."""


@house_style
def stream_ablation(losses: Mapping[str, Mapping[str, Float[np.ndarray, " n"]]]) -> Figure:
    """Draw by how much the mean loss grows if one stream is ablated, as bars: one panel for each way to ablate.

    Args:
      losses: for each label the mean loss differences [n] in nats/token by way to ablate, as `ablate(...).mean((1, 2))` gives them.
    """
    ways = list(dict.fromkeys(way for found in losses.values() for way in found))
    figure, axes = panels(1, len(ways), height=2.9, share_y=True)
    handles = []
    for k, (label, style) in enumerate(_styled(losses)):
        bar = {"edgecolor": style["color"], "facecolor": style["color"] if style["fillstyle"] == "full" else "none"}
        handles.append(Patch(label=plain_text(label), **bar))
        for axis, way in zip(axes, ways, strict=True):
            if way in losses[label]:
                values = losses[label][way]
                width = 0.8 / len(losses)
                axis.bar(np.arange(1, len(values) + 1) + (k + 0.5) * width - 0.4, values, 0.85 * width, **bar)
    for axis, way in zip(axes, ways, strict=True):
        n = max(len(found[way]) for found in losses.values() if way in found)
        title = "Stream held at zero" if way == "zero" else "Stream held at its mean over tokens"
        axis.set(title=title, xlabel="stream", ylabel="loss difference (nats/token)", xticks=range(1, n + 1))
        axis.axhline(0, color=INK, linewidth=0.9)
        axis.grid(False, axis="x")
        axis.set_axisbelow(True)
    legend(figure, handles)
    return figure


@house_style
def stream_rescue(found: Mapping[str, Rescue]) -> Figure:
    """Draw heat maps of the share of the loss difference that one restored stream recovers, streams against sub-layers.

    The colour scale is common to all models.  It begins at 0, or is centred at 0 if a share is negative.  Shares that are NaN are
    left white.
    """
    return _heat_maps({label: one.share for label, one in found.items()}, "share of the loss difference")


@house_style
def stream_dominance(found: Mapping[str, Dominance]) -> Figure:
    """Draw heat maps of the share of tokens whose largest stream is stream i, and the largest stream's share of the squared norm.

    The last panel has one curve for each model, and a grey line at 1/n, where all streams have equal norms.
    """
    figure = _heat_maps({label: one.share for label, one in found.items()}, "share of tokens", more=1)
    axis = figure.axes[len(found)]
    for label, style in _styled(found):
        largest = found[label].largest
        curve(axis, np.arange(1, len(largest) + 1), largest, style | {"label": plain_text(label)}, markevery=1)
        axis.axhline(1 / found[label].share.shape[1], color=GRID, linewidth=1)
    _sublayers(axis, max(len(one.largest) for one in found.values()))
    axis.set(ylim=(0, 1.03), ylabel="largest stream's share\nof the squared norm")
    legend(figure, axis=axis)
    return figure


@house_style
def stream_lens(found: Mapping[str, Lens]) -> Figure:
    """Draw the mean loss of the predictions from each stream alone and from the collapsed streams, a panel for each model."""
    figure, axes = panels(1, len(found), height=3.2, share_y=True)
    n = 0
    for axis, (label, style) in zip(axes, _styled(found), strict=True):
        lens = found[label]
        depth = np.arange(1, len(lens.loss) + 1)
        n = max(n, lens.loss.shape[1])
        axis.plot(depth, lens.collapsed_loss.mean((1, 2)), color=INK, linewidth=2.4, alpha=0.45)
        for i, losses in enumerate(np.moveaxis(lens.loss, 1, 0)):
            curve(axis, depth, losses.mean((1, 2)), {"color": style["color"]} | _stream(i), markevery=1)
        axis.set(title=plain_text(label), ylabel="loss (nats/token)")
        _sublayers(axis, len(depth))
    handles = [Line2D([], [], color=INK, linewidth=2.4, alpha=0.45, label="all streams, collapsed")]
    handles += [Line2D([], [], color=INK, label=f"stream {i + 1}", **_stream(i)) for i in range(n)]
    legend(figure, handles)
    return figure


def _styled(labels: Iterable[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each label with the look of its kind of connection."""
    labels = list(labels)
    yield from zip(labels, looks(label.partition(":")[0] for label in labels), strict=True)


def _stream(i: int) -> dict[str, Any]:
    return _STREAM_LOOKS[i % len(_STREAM_LOOKS)]


def _sublayers(axis: Axes, boundaries: int) -> None:
    """Label the x axis of a panel over boundaries: sub-layers l = 1 ... L, then the exit."""
    L, step = boundaries - 1, max(1, (boundaries - 1) // 8)
    shown = list(range(1, L + 1, step))
    axis.set_xticks([*shown, L + 1], [*map(str, shown), "exit"])
    axis.set_xlabel("sub-layer l that reads the streams")


def _heat_maps(values: Mapping[str, Float[np.ndarray, "boundaries n"]], label: str, more: int = 0) -> Figure:
    """Draw a heat map of streams against sub-layers for each model, with one colour scale, and add `more` empty panels below."""
    rows = len(values) + more
    figure, axes = panels(rows, 1, height=1.55)
    cmap, norm = heat_scale(np.concatenate([one.ravel() for one in values.values()]))
    for axis, (name, style) in zip(axes, _styled(values), strict=False):
        boundaries, n = values[name].shape
        edges = np.arange(boundaries + 1) + 0.5, np.arange(n + 1) + 0.5
        mesh = axis.pcolormesh(*edges, np.ma.masked_invalid(values[name].T), cmap=cmap, norm=norm, **SEAMLESS)
        axis.set_title(plain_text(name), color=style["color"])
        axis.set(ylabel="stream", yticks=range(1, n + 1))
        axis.invert_yaxis()
        axis.grid(False)
        _sublayers(axis, boundaries)
    figure.colorbar(mesh, ax=axes[: len(values)], pad=0.01, label=label)
    return figure
