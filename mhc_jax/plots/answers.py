"""Figures of the three questions that `analysis.answers` decides: intervals of differences, and largest stable learning rates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure

from mhc_jax.analysis.answers import MixingNeeded, WhichMap, WhichMapHome
from mhc_jax.analysis.rate_margins import MHC, OPTIMIZERS, MuonMargin
from mhc_jax.analysis.statistics import Paired
from mhc_jax.plots.style import GRID, INK, color_of, house_style, name_rows, panels

PART_COLORS = {"pre": "#E69F00", "post": "#0072B2", "res": "#009E73"}
"""Colours of the three maps, and of nothing else in the same figure."""


class Bar(NamedTuple):
    """A row of a panel of intervals: its label, its test, its colour and whether it is one of the tests that decide."""

    label: str
    result: Paired | None
    color: str
    decides: bool


def _intervals(axis, rows: Sequence[Bar]) -> None:
    """Draw one row for each test: dots for the seeds, a bar for Student's 95 % interval, a tick for the mean."""
    for row, bar in enumerate(rows):
        if bar.result is None:
            continue
        axis.plot(
            bar.result.differences,
            [row] * bar.result.seeds,
            "o",
            color=bar.color,
            ms=3.5,
            alpha=0.6,
            mec="white",
            mew=0.4,
            zorder=3,
        )
        if bar.result.t_interval:
            axis.plot(bar.result.t_interval, [row, row], color=bar.color, linewidth=3.2 if bar.decides else 1.4)
        axis.plot([bar.result.mean], [row], "|", color=bar.color, ms=10, mew=2)
    axis.axvline(0, color=INK, linewidth=0.8)
    name_rows(axis, [bar.label for bar in rows])
    axis.set_ylim(len(rows) - 0.4, -0.6)
    axis.grid(visible=False, axis="y")


@house_style
def which_map_figure(answer: WhichMap, home: WhichMapHome | None = None) -> Figure:
    """Draw the effects of learning H_pre, H_post and H_res on the loss, averaged over the designs and in each design.

    The x axis is the change of the validation loss in nats/token, where below 0 is better.  Dots are seeds, lines Student's 95 %
    intervals without a correction, ticks means.  Thick lines are the tests that decide: three of which_map and, if `home` is given,
    three of which_map_home, where streams differ.
    """
    rows = [Bar(f"H_{c.label}, mean of designs", c.result, PART_COLORS[c.label], True) for c in answer.primary]
    if home is not None:
        rows += [Bar(f"H_{c.label}, which_map_home", c.result, PART_COLORS[c.label], True) for c in home.primary]
    for (arm, form), effects in answer.designs.items():
        rows += [
            Bar(f"H_{c.label}, {arm} {form}", c.result, PART_COLORS[c.label], False)
            for c in effects
            if c.label in PART_COLORS
        ]
    figure, (axis,) = panels(1, 1, height=0.6 + 0.22 * len(rows), by_text=True)
    _intervals(axis, rows)
    axis.set_xlabel("change of the loss (nats/token)")
    return figure


@house_style
def mixing_needed_figure(answer: MixingNeeded) -> Figure:
    """Draw the loss of each form of H_res minus that of mHC, averaged over the four combinations and in each combination.

    The x axis is in nats/token, where below 0 is better than mHC.  Dots are seeds, lines Student's 95 % intervals without a
    correction, ticks means.  Thick lines are the tests that decide.  The grey band is the margin of equivalence.
    """
    rows = [Bar(kind, c.contrast.result, color_of(kind), True) for kind, c in answer.primary.items()]
    for (streams, entry), kinds in answer.combinations.items():
        rows += [
            Bar(f"{kind}, n = {streams}, {entry}", c.contrast.result, color_of(kind), False)
            for kind, c in kinds.items()
        ]
    figure, (axis,) = panels(1, 1, height=0.6 + 0.22 * len(rows), by_text=True)
    margin = next((c.equivalence.margin for c in answer.primary.values() if c.equivalence), 0.0)
    axis.axvspan(-margin, margin, color=GRID, alpha=0.3, linewidth=0)
    _intervals(axis, rows)
    axis.set_xlabel("loss minus that of mHC (nats/token)")
    return figure


@house_style
def muon_margin_figure(answer: MuonMargin) -> Figure:
    """Draw the largest stable learning rate of every connection, a panel for each optimizer.

    The y axis is the largest stable rate, logarithmic.  Marks are seeds, shifted sideways so that equal ones can be seen, and bars
    geometric means.  Full marks are with clipping at a gradient norm of 1, hollow ones without clipping.  A triangle is a bound: it
    points up at the highest rate if no rate was unstable, and down at half the lowest rate if none was stable.
    """
    lines = list(answer.rates)
    optimizers = [name for name in OPTIMIZERS if any(line.optimizer == name for line in lines)]
    names = ["residual", *sorted({line.connection for line in lines} - {"residual", MHC}), MHC]
    figure, axes = panels(1, len(optimizers), height=3.0, share_y=True)
    for axis, optimizer in zip(axes, optimizers, strict=True):
        for place, name in enumerate(names):
            for side, clipped in ((-0.18, True), (0.18, False)):
                base = optimizer.partition(",")[0] if name == "residual" else optimizer
                found = [x for x in lines if (x.connection, x.optimizer, x.grad_clip > 0) == (name, base, clipped)]
                if not found:
                    continue
                rates = np.asarray([answer.counted(line) for line in found])
                color = color_of(name.partition(":")[0])
                x = place + side + np.linspace(-0.1, 0.1, len(rates))
                for place_x, rate, line in zip(x, rates, found, strict=True):
                    stable, unstable = answer.rates[line]
                    mark = "v" if stable is None else "^" if unstable is None else "o"
                    axis.plot(place_x, rate, mark, color=color, ms=5, fillstyle="full" if clipped else "none")
                axis.plot([place + side - 0.14, place + side + 0.14], [np.exp(np.log(rates).mean())] * 2, color=color)
        axis.set_title(optimizer)
        axis.set_yscale("log", base=2)
        axis.set_yticks([2.0**k / 1000 for k in range(0, 12, 2)], [f"{2.0**k / 1000:g}" for k in range(0, 12, 2)])
        axis.set_xticks(range(len(names)), [name.partition(":")[0] for name in names])
        axis.grid(visible=False, axis="x")
        place_in_grid = axis.get_subplotspec()
        if place_in_grid is not None and place_in_grid.is_first_col():
            axis.set_ylabel("largest stable learning rate")
    return figure
