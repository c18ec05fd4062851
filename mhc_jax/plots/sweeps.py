"""Figures of a sweep: pure functions from settings (runs grouped over seeds) to matplotlib figures."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from mhc_jax.analysis.grouping import Variant, frontier_lines, lines, loss_threshold
from mhc_jax.analysis.records import paired_gap, series
from mhc_jax.analysis.statistics import MIN_SEEDS, power_law, stability_frontier
from mhc_jax.plots.style import GRID, INK, LOOKS, OTHER_LOOK, STYLE, NothingToDraw, Plot, log_axis, panels, smooth

SWEEP_FIGURES: dict[str, Plot] = {}
"""Name to function of settings, title, caption."""
LOG_KEYS = ("optimizer.learning_rate", "model.num_layers", "model.connection.num_streams", "model.connection.t_max")
MEASURES = (
    ("validation_loss", "validation loss (nats/token)", False),
    ("max_composite_forward", "largest gain, forward", True),
    ("max_composite_backward", "largest gain, backward", True),
    ("max_column_error", "largest |column sum − 1| of H_res", False),
)
"""Result, name, whether it is drawn on a logarithmic axis around 1."""


def _register(title: str, caption: str) -> Callable[[Callable[..., Figure]], Callable[..., Figure]]:
    def wrap(function: Callable[..., Figure]) -> Callable[..., Figure]:
        @functools.wraps(function)
        def draw(settings: Sequence[Variant]) -> Figure:
            with matplotlib.rc_context(STYLE):
                return function(settings)

        SWEEP_FIGURES[function.__name__] = Plot(draw, title, caption)
        return draw

    return wrap


def look(kind: str) -> dict[str, Any]:
    """Colour, line and marker of a kind."""
    color, line, marker = LOOKS.get(kind, OTHER_LOOK)
    return {"color": color, "linestyle": line, "marker": marker}


def _kinds(settings: Sequence[Variant]) -> list[str]:
    return list(dict.fromkeys(setting.kind for setting in settings))


def _beside(axis: Axes) -> None:
    axis.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, fontsize=8, borderaxespad=0.2)


@_register(
    "Loss gap, seeds and mean",
    "Training loss minus that of the baseline run of the same seed at the same step (moving median); thin lines are seeds, the "
    "thick line is their mean. Below zero is better. The axis spans the second half of the means.",
)
def gap_curves(settings: Sequence[Variant]) -> Figure:
    """One panel a kind; its legend names the connections."""
    compared = [(setting, setting.baseline) for setting in settings if setting.baseline is not None]
    kinds = _kinds([setting for setting, _ in compared])
    if not kinds:
        raise NothingToDraw("no variant has a baseline to be compared with")
    figure, axes = panels(len(kinds), 1, height=2.6)
    drawn = False
    for axis, kind in zip(axes, kinds, strict=True):
        mine = [(setting, base) for setting, base in compared if setting.kind == kind]
        ends = [0.0]
        for k, (setting, base) in enumerate(mine):
            color = look(kind)["color"] if len(mine) == 1 else matplotlib.colormaps["viridis"](0.9 * k / len(mine))
            curves = []
            for seed, run in setting.runs.items():
                if seed in base.runs:
                    steps, gap = paired_gap(run, base.runs[seed], "train")
                    curves.append(dict(zip(steps.tolist(), smooth(gap).tolist(), strict=True)))
                    axis.plot(steps, smooth(gap), color=color, linewidth=0.6, alpha=0.6)
            common = sorted(set.intersection(*map(set, curves))) if curves else []
            if common:
                drawn = True
                mean = np.asarray([np.mean([curve[step] for curve in curves]) for step in common])
                axis.plot(common, mean, color=color, linewidth=2, label=f"{setting.label} ({len(curves)})")
                ends += mean[len(mean) // 2 :][np.isfinite(mean[len(mean) // 2 :])].tolist()
        margin = 0.6 * (max(ends) - min(ends)) + 1e-3
        axis.set_ylim(min(ends) - margin, max(ends) + margin)
        axis.axhline(0, color=INK, linewidth=0.9)
        axis.set_ylabel("gap (nats/token)")
        _beside(axis)
    axes[-1].set_xlabel("optimizer step")
    if not drawn:
        raise NothingToDraw("no two variants share a seed and logged steps")
    return figure


BANDS = (("loss", "training loss (nats/token)"), ("grad_norm", "gradient norm before clipping"))


@_register(
    "Loss and gradient norm, mean and band",
    "Moving medians over steps: the line is the mean of the variant's seeds, the band reaches from its lowest to its highest seed. "
    "Triangles at the top mark loss spikes of any seed. The loss axis leaves out the first quarter.",
)
def seed_bands(settings: Sequence[Variant]) -> Figure:
    """Training loss and gradient norm of every setting that has curves."""
    figure, axes = panels(1, 2, height=3.2)
    turn: dict[str, int] = {}
    ends: list[float] = []
    for row, setting in enumerate(settings):
        turn[setting.kind] = turn.get(setting.kind, -1) + 1
        color = look(setting.kind)["color"]
        line = look(setting.kind)["linestyle"] if not turn[setting.kind] else ("--", ":", "-.")[turn[setting.kind] % 3]
        for axis, (key, _) in zip(axes, BANDS, strict=True):
            curves = [
                dict(zip(steps.tolist(), smooth(values).tolist(), strict=True))
                for run in setting.runs.values()
                if len((found := series(run, "train", key))[0])
                for steps, values in [found]
            ]
            if not curves:
                continue
            common = sorted(set.intersection(*map(set, curves)))
            half = len(common) // 40  # of `smooth`'s window, which shrinks to single values at the end
            common = common[: len(common) - half]
            table = np.asarray([[curve[step] for step in common] for curve in curves])
            axis.fill_between(common, table.min(0), table.max(0), color=color, alpha=0.15, linewidth=0)
            axis.plot(
                common, table.mean(0), color=color, linestyle=line, label=f"{setting.label} ({len(curves)} seeds)"
            )
            spikes = sorted({step for run in setting.runs.values() for step in run.spike_steps})
            top = axis.get_xaxis_transform()
            axis.plot(spikes, [0.985 - 0.035 * row] * len(spikes), "v", color=color, ms=5, transform=top)
            if key == "loss":
                ends += [v for v in table[:, len(common) // 4 :].flat if np.isfinite(v)]
    if not ends:
        raise NothingToDraw("no run has logged a loss")
    margin = 0.15 * (max(ends) - min(ends)) + 1e-3
    axes[0].set_ylim(min(ends) - margin, max(ends) + 3 * margin)
    log_axis(axes[1])
    for axis, (_, name) in zip(axes, BANDS, strict=True):
        axis.set_xlabel("optimizer step")
        axis.set_ylabel(name)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=min(3, len(labels)), frameon=False)
    return figure


@_register(
    "Seeds",
    "Validation loss of every run (dots) and the mean of each variant (bar). The grey band is the variant's baseline: mean plus "
    f"and minus one standard deviation over its seeds, from {MIN_SEEDS} seeds on. Runs without a "
    "final loss are counted at the right.",
)
def seed_strip(settings: Sequence[Variant]) -> Figure:
    """One row a setting."""
    figure, (axis,) = panels(1, 1, height=0.9 + 0.27 * len(settings))
    drawn = False
    for row, setting in enumerate(settings):
        values = list(setting.results("validation_loss").values())
        style = look(setting.kind)
        base = list((setting.baseline or setting).results("validation_loss").values())
        if len(base) >= MIN_SEEDS and (setting.baseline or setting.is_baseline):
            spread = float(np.std(base, ddof=1))
            axis.barh(row, 2 * spread, 0.8, float(np.mean(base)) - spread, color=GRID, alpha=0.35, linewidth=0)
        if values:
            drawn = True
            axis.plot(values, [row] * len(values), "o", color=style["color"], ms=4.5, alpha=0.8, mew=0)
            axis.plot([np.mean(values)] * 2, [row - 0.38, row + 0.38], color=style["color"], linewidth=2)
        if lost := len(setting.runs) - len(values):
            text = f"{lost} of {len(setting.runs)} without a loss"
            axis.text(1.01, row, text, transform=axis.get_yaxis_transform(), va="center", fontsize=8)
    if not drawn:
        raise NothingToDraw("no run has a final validation loss")
    axis.set_yticks(range(len(settings)), [setting.label for setting in settings])
    axis.set_ylim(len(settings) - 0.4, -0.6)
    axis.grid(visible=False, axis="y")
    axis.set_xlabel("validation loss (nats/token)")
    return figure


@_register(
    "Measurements against what is swept",
    "One row a swept number, one column a measurement: dots are runs that finished, lines their means over seeds. Only "
    "variants that differ in nothing else are joined.",
)
def swept(settings: Sequence[Variant]) -> Figure:
    """Loss and gains against every numeric key that is swept."""
    keys = [key for key in dict.fromkeys(k for s in settings for k in s.varying) if lines(settings, key)]
    if not keys:
        raise NothingToDraw("no number is swept with the other settings fixed")
    measures = [measure for measure in MEASURES if any(setting.results(measure[0]) for setting in settings)]
    if not measures:
        raise NothingToDraw("no run has ended")
    count = len(measures)
    figure, axes = panels(len(keys), count, height=2.7)
    for row, key in enumerate(keys):
        found = lines(settings, key)
        for axis, (measure, name, log) in zip(axes[count * row : count * (row + 1)], measures, strict=True):
            turn: dict[str, int] = {}
            for label, members in found.items():
                kind = members[0].kind
                turn[kind] = turn.get(kind, -1) + 1
                style = look(kind)
                if turn[kind]:
                    style["linestyle"] = ("-", "--", ":", "-.")[turn[kind] % 4]
                points = [(s.varying[key], v) for s in members for v in s.results(measure).values()]
                means = sorted((s.varying[key], m) for s in members if (m := s.mean(measure)) is not None)
                axis.plot([x for x, _ in points], [y for _, y in points], ".", color=style["color"], alpha=0.5)
                axis.plot([x for x, _ in means], [y for _, y in means], **style, label=label)
            values = sorted({s.varying[key] for members in found.values() for s in members})
            if values[0] > 0 and (key in LOG_KEYS or values[-1] / values[0] >= 8):
                axis.set_xscale("log")
                axis.xaxis.set_minor_locator(NullLocator())
            axis.xaxis.set_major_locator(FixedLocator(values))
            axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axis.set_xlabel(key)
            axis.set_ylabel(name)
            if log:
                log_axis(axis, around=1.0)
    handles, labels = axes[0].get_legend_handles_labels()
    extra = [axis.get_legend_handles_labels() for axis in axes[count::count]]
    named = dict(zip(labels, handles, strict=True)) | {l: h for hs, ls in extra for h, l in zip(hs, ls, strict=True)}
    figure.legend(named.values(), named.keys(), loc="outside upper center", ncols=min(4, len(named)), frameon=False)
    return figure


@_register(
    "Stability frontier",
    "Every learning rate tried: filled, every run finished with a validation loss less than 0.5 nats above the best mean of the "
    "sweep; hollow with a cross, not. The bar reaches from the first filled rate to the last one before a rate that is "
    "not.",
)
def frontier(settings: Sequence[Variant]) -> Figure:
    """One row a connection, learning rate to the right."""
    threshold = loss_threshold(settings)
    found = frontier_lines(settings)
    if not found:
        raise NothingToDraw("the learning rate is not swept")
    figure, (axis,) = panels(1, 1, height=0.9 + 0.35 * len(found))
    rates = sorted({rate for losses in found.values() for rate in losses})
    for row, (name, losses) in enumerate(found.items()):
        color = look(re.split("[: ]", name)[0])["color"]
        best, _ = stability_frontier(losses, threshold)
        if best is not None:
            first = min(r for r, values in losses.items() if all(v is not None and v < threshold for v in values))
            axis.plot([first, best], [row, row], color=color, linewidth=6, alpha=0.25, solid_capstyle="butt")
        for rate, values in losses.items():
            stable = all(v is not None and v < threshold for v in values)
            axis.plot(rate, row, "o", color=color, ms=7, fillstyle="full" if stable else "none")
            if not stable:
                axis.plot(rate, row, "x", color=color, ms=5)
    axis.set_xscale("log")
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_locator(FixedLocator(rates))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_yticks(range(len(found)), list(found))
    axis.set_ylim(len(found) - 0.5, -0.5)
    axis.set_xlabel("learning rate")
    return figure


@_register(
    "Compute ladder",
    "Validation loss against training FLOPs (logarithmic axes): dots are runs, lines power laws fitted to them, with the exponent "
    "and its 95 % interval from the scatter of the dots about the line. With one run a size it does not hold the noise of seeds.",
)
def ladder(settings: Sequence[Variant]) -> Figure:
    """Power law of each connection whose runs differ in training FLOPs by at least a factor of two, over three sizes."""
    figure, (axis,) = panels(1, 1, height=3.2)
    sizes = {"model.width", "model.num_layers", "train.steps"}
    for name in dict.fromkeys(setting.any_run.connection for setting in settings):
        points = []
        for setting in settings:
            if setting.any_run.connection == name and sizes & set(setting.varying):
                for run in setting.runs.values():
                    loss, flops = run.result("validation_loss"), run.result("flops_per_token")
                    if run.status == "finished" and loss and flops and run.tokens:
                        points.append((flops * run.tokens, loss))
        if len({x for x, _ in points}) < 3 or max(points)[0] < 2 * min(points)[0]:
            continue
        x, loss = (np.asarray(column) for column in zip(*sorted(points), strict=True))
        fit = power_law(x.tolist(), loss.tolist())
        low, high = fit.b_interval or (float("nan"), float("nan"))
        style = look(name.split(":")[0])
        axis.plot(x, loss, linestyle="", marker=style["marker"], color=style["color"])
        label = f"{name}: exponent {-fit.b:.3f} [{-high:.3f}, {-low:.3f}]"
        axis.plot(x, fit.a * (x / fit.x_0) ** -fit.b, color=style["color"], linestyle=style["linestyle"], label=label)
    if not axis.lines:
        raise NothingToDraw("no connection has three sizes that differ in training FLOPs by a factor of two")
    axis.set_xscale("log")
    log_axis(axis)
    axis.set_xlabel("training arithmetic (FLOPs)")
    axis.set_ylabel("validation loss (nats/token)")
    figure.legend(loc="outside upper center", ncols=1, frameon=False)
    return figure
