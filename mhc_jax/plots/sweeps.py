"""Figures of a sweep: pure functions from variants (runs grouped over seeds) to matplotlib figures."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from mhc_jax.analysis.grouping import Variant, frontier_lines, lines, loss_threshold
from mhc_jax.analysis.run_reader import paired_gap, series
from mhc_jax.analysis.statistics import MIN_SEEDS, power_law, stability_frontier
from mhc_jax.plots.axes import (
    CLOSE_GAIN,
    fit_y,
    half_window,
    log_axis,
    mark_spikes,
    markers_at,
    near_one,
    smooth,
    ticks_at,
)
from mhc_jax.plots.sizes import current_size, scaled
from mhc_jax.plots.style import (
    GRID,
    INK,
    NothingToDraw,
    Plot,
    color_of,
    legend,
    looks,
    name_rows,
    panels,
    plain_text,
    register,
    shades,
)

SWEEP_FIGURES: dict[str, Plot] = {}
"""Figures of runs grouped over seeds, by name."""
MOST_STRETCH = 5.0
"""Most that the lines of seeds may stretch the y axis of `gap_curves` beyond what zero and their means span."""
LOG_KEYS = ("optimizer.learning_rate", "model.num_layers", "model.connection.num_streams", "model.connection.t_max")
"""Settings that have a logarithmic axis in the figure `swept`, if their values are positive.

Any other setting has a logarithmic axis if its largest value is at least 8 times its smallest.
"""
MEASURES = (
    ("validation_loss", "Validation loss", "loss (nats/token)", False),
    ("max_composite_forward", "Largest composite gain, forward", "gain", True),
    ("max_composite_backward", "Largest composite gain, backward", "gain", True),
    ("max_column_error", "Largest |column sum − 1| of H_res", "|column sum − 1|", False),
)
"""Measurements that the figure `swept` shows: (key in summary.json, title, label of the y axis, whether the axis is logarithmic).

A logarithmic axis always includes 1 and its surroundings.
"""


@register(SWEEP_FIGURES, "Loss gap, seeds and mean")
def gap_curves(settings: Sequence[Variant]) -> Figure:
    """Draw each variant's training loss minus its baseline's against steps, one panel for each kind of connection.

    The y axis is the gap in nats/token, where below zero is better; the x axis is the optimizer step. The gap is the training loss
    of a run minus that of the baseline's run of the same seed at the same step. Lines are moving medians over a twentieth of the
    logged steps. Each thin line is one seed, and the thick line is the mean over seeds. The legend gives the number of seeds in
    parentheses. Variants of one kind of connection are shades of its colour. The y axis spans zero and all lines. But if the thin
    lines span more than five times what zero and the thick ones span, the axis spans the latter twice, and a triangle at the edge
    marks where a seed leaves the panel.
    """
    compared = [(setting, setting.baseline) for setting in settings if setting.baseline is not None]
    if not compared:
        raise NothingToDraw("no variant has a baseline to be compared with")
    kinds = list(dict.fromkeys(setting.kind for setting, _ in compared))
    figure, axes = panels(len(kinds), 1, height=2.6)
    for axis, kind in zip(axes, kinds, strict=True):
        mine = [(setting, base) for setting, base in compared if setting.kind == kind]
        ends, drawn = [0.0], []
        tones = zip(mine, looks([kind] * len(mine)), shades(color_of(kind), len(mine)), strict=True)
        for (setting, base), look, color in tones:
            curves = []
            for seed, run in setting.runs.items():
                if seed in base.runs:
                    steps, gap = paired_gap(run, base.runs[seed], "train")
                    curves.append(dict(zip(steps.tolist(), smooth(gap).tolist(), strict=True)))
                    drawn += axis.plot(steps, smooth(gap), color=color, linewidth=0.6, alpha=0.6)
            common = sorted(set.intersection(*map(set, curves))) if curves else []
            if common:
                mean = np.asarray([np.mean([curve[step] for curve in curves]) for step in common])
                style = {"color": color, "linestyle": look["linestyle"], "linewidth": scaled(2)}
                axis.plot(common, mean, **style, label=plain_text(f"{setting.label} ({len(curves)})"))
                ends += mean.tolist()
        _fit_seeds(axis, ends, drawn)
        axis.axhline(0, color=INK, linewidth=0.9)
        axis.set_ylabel("gap (nats/token)")
        axis.set_label(f"gap of {kind}")
        legend(figure, axis=axis)
    for axis in axes if current_size().panel else axes[-1:]:
        axis.set_xlabel("optimizer step")
    if not any(axis.get_legend() for axis in axes):
        raise NothingToDraw("no variant shares a seed and logged steps with its baseline")
    return figure


def _fit_seeds(axis: Axes, means: Sequence[float], seeds: Sequence[Line2D]) -> None:
    """Let the y axis span the values `means` and the lines of all seeds.

    If these lines span more than `MOST_STRETCH` times what the means span, the axis spans the means and half their span on either
    side, and triangles at the edges mark where a line leaves the panel.
    """
    every = np.concatenate([np.asarray(line.get_ydata(), float) for line in seeds] + [np.asarray(means, float)])
    every, kept = every[np.isfinite(every)], np.asarray(means)[np.isfinite(means)]
    if np.ptp(every) <= MOST_STRETCH * np.ptp(kept):
        fit_y(axis, every)
        return
    fit_y(axis, kept, 0.5, 0.5)
    low, high = axis.get_ylim()
    for line in seeds:
        steps, gap = (np.asarray(values, float) for values in line.get_data())
        for out, edge, mark in ((gap > high, 1.0, "^"), (gap < low, 0.0, "v")):
            leaves = steps[out & ~np.append(False, out[:-1])]
            options = {"color": line.get_color(), "ms": scaled(5), "clip_on": False}
            axis.plot(leaves, [edge] * len(leaves), mark, transform=axis.get_xaxis_transform(), **options)


def _largest(members: Sequence[Variant], key: str) -> float:
    """Return the largest number `key` of the summaries of all runs of some variants, or 0 if there is none."""
    return max((value for member in members for value in member.results(key).values()), default=0.0)


BANDS = (("loss", "training loss (nats/token)"), ("grad_norm", "gradient norm before clipping"))


@register(
    SWEEP_FIGURES,
    "Loss and gradient norm, mean and band",
    only={
        "The training loss is": "loss",
        "The gradient norm is": "norm",
        "The panel of the loss": "loss",
    },
)
def seed_bands(settings: Sequence[Variant]) -> Figure:
    """Draw training loss and gradient norm against steps, over the seeds of every variant.

    The training loss is in nats/token. The gradient norm is that of the gradient of the training loss with respect to all
    parameters, before clipping, on a logarithmic axis. The x axes are optimizer steps, and values are moving medians over a
    twentieth of the logged steps. Each line is the mean over a variant's seeds, and the band reaches from the lowest seed to the
    highest. Line styles and markers tell kinds of connection apart, and the residual connection's line is wide and lies under the
    others. Triangles at the top mark loss spikes of any seed, one row for each variant. The panel of the loss begins after the
    first quarter of the steps.
    """
    figure, axes = panels(1, 2, height=3.2)
    ends: list[float] = []
    latest = 0
    for row, (setting, style) in enumerate(zip(settings, looks(s.kind for s in settings), strict=True)):
        color = style["color"]
        for axis, (key, _) in zip(axes, BANDS, strict=True):
            curves = [
                dict(zip(steps.tolist(), smooth(values).tolist(), strict=True))
                for steps, values in (series(run, "train", key) for run in setting.runs.values())
                if len(steps)
            ]
            if not curves:
                continue
            common = sorted(set.intersection(*map(set, curves)))
            # The last medians of a curve are left out, because their windows have fewer points.
            common = common[: len(common) - half_window(len(common))]
            table = np.asarray([[curve[step] for step in common] for curve in curves])
            axis.fill_between(common, table.min(0), table.max(0), color=color, alpha=0.15, linewidth=0)
            label = plain_text(f"{setting.label} ({len(curves)} seeds)")
            axis.plot(common, table.mean(0), **style, markevery=markers_at(row), label=label)
            spikes = sorted({step for run in setting.runs.values() for step in run.spike_steps})
            mark_spikes(axis, spikes, row, color)
            if key == "loss":
                ends += table[:, len(common) // 4 :].ravel().tolist()
                latest = max([latest, *common])
    if not np.isfinite(ends).any():
        raise NothingToDraw("no run has logged a loss")
    fit_y(axes[0], ends)
    axes[0].set_xlim(latest / 4, latest * 1.02)
    log_axis(axes[1])
    for axis, (_, name) in zip(axes, BANDS, strict=True):
        axis.set(xlabel="optimizer step", ylabel=name)
    legend(figure)
    return figure


@register(SWEEP_FIGURES, "Seeds")
def seed_strip(settings: Sequence[Variant]) -> Figure:
    """Draw the final validation loss of every run, one row for each variant.

    The x axis is the validation loss in nats/token at the end of training. Dots are runs, and the bar is the mean over the
    variant's seeds. The grey band is the mean of the variant's baseline plus and minus one standard deviation over the baseline's
    seeds, if at least three of them finished. Runs without a final loss are counted at the right.
    """
    figure, (axis,) = panels(1, 1, height=0.9 + 0.27 * len(settings), by_text=True)
    drawn = False
    for row, setting in enumerate(settings):
        values = list(setting.results("validation_loss").values())
        color = color_of(setting.kind)
        base = list((setting.baseline or setting).results("validation_loss").values())
        if len(base) >= MIN_SEEDS and (setting.baseline or setting.is_baseline):
            spread = float(np.std(base, ddof=1))
            axis.barh(row, 2 * spread, 0.8, float(np.mean(base)) - spread, color=GRID, alpha=0.35, linewidth=0)
        if values:
            drawn = True
            axis.plot(values, [row] * len(values), "o", color=color, ms=scaled(4.5), alpha=0.8, mew=0)
            axis.plot([np.mean(values)] * 2, [row - 0.38, row + 0.38], color=color, linewidth=2)
        if lost := len(setting.runs) - len(values):
            text = f"{lost} of {len(setting.runs)} without a loss"
            axis.text(1.01, row, text, transform=axis.get_yaxis_transform(), va="center", fontsize=scaled(8))
    if not drawn:
        raise NothingToDraw("no run has a final validation loss")
    name_rows(axis, [setting.label for setting in settings])
    axis.set_ylim(len(settings) - 0.4, -0.6)
    axis.grid(visible=False, axis="y")
    axis.set_xlabel("validation loss (nats/token)")
    return figure


@register(
    SWEEP_FIGURES,
    "Measurements against what is swept",
    only={
        "Validation losses are": "validation loss",
        "Gains are": "gain",
        "Column errors are": "column sum",
        "A close-up": "close-up",
    },
)
def swept(settings: Sequence[Variant]) -> Figure:
    """Draw loss, gains and column errors against every number that the sweep varies.

    Each panel shows one measurement against one setting that the sweep varies and that is a number. Validation losses are in
    nats/token. Gains are the largest composite gains of all sub-layers and diagnostics steps, means over the sampled tokens,
    without unit. Column errors are the largest |column sum − 1| of H_res of all sub-layers and diagnostics steps, maxima over the
    sampled tokens, without unit. Dots are runs that finished, and lines join their means over seeds. A line joins only variants
    that differ in no other setting. A close-up has a linear axis, and shows the lines alone whose gains never exceed 3.
    """
    keys = [key for key in dict.fromkeys(k for s in settings for k in s.varying) if lines(settings, key)]
    if not keys:
        raise NothingToDraw("no number is swept with the other settings fixed")
    measures = [measure for measure in MEASURES if any(setting.results(measure[0]) for setting in settings)]
    if not measures:
        raise NothingToDraw("no run has ended")
    swept_lines = {key: lines(settings, key) for key in keys}
    close = {
        (key, measure): {label for label, members in found.items() if _largest(members, measure) <= CLOSE_GAIN}
        for key, found in swept_lines.items()
        for measure, _, _, log in measures
        if log
    }
    shown = []
    for measure, title, name, log in measures:
        shown.append((measure, title, name, log, False))
        if any(0 < len(labels) < len(swept_lines[key]) for (key, of), labels in close.items() if of == measure):
            shown.append((measure, f"{title}, close-up", name, log, True))
    count = len(shown)
    figure, axes = panels(len(keys), count, height=2.7)
    for row, (key, found) in enumerate(swept_lines.items()):
        for axis, (measure, title, name, log, is_close) in zip(axes[count * row :][:count], shown, strict=True):
            styles = looks(members[0].kind for members in found.values())
            for (label, members), style in zip(found.items(), styles, strict=True):
                if is_close and label not in close[key, measure]:
                    continue
                points = [(s.varying[key], v) for s in members for v in s.results(measure).values()]
                means = sorted((s.varying[key], m) for s in members if (m := s.mean(measure)) is not None)
                axis.plot([x for x, _ in points], [y for _, y in points], ".", color=style["color"], alpha=0.5)
                axis.plot([x for x, _ in means], [y for _, y in means], **style, label=label)
            values = sorted({s.varying[key] for members in found.values() for s in members})
            ticks_at(axis, values, log=values[0] > 0 and (key in LOG_KEYS or values[-1] / values[0] >= 8))
            axis.set(title=title, xlabel=key, ylabel=name)
            axis.set_label(f"{title}, against {key}")
            if is_close:
                near_one(axis)
            elif log:
                log_axis(axis, around=1.0)
    legend(figure)
    return figure


@register(SWEEP_FIGURES, "Stability frontier")
def frontier(settings: Sequence[Variant]) -> Figure:
    """Draw which learning rates are stable, one row for each connection.

    The x axis (logarithmic) is the learning rate. Each dot is a rate that was tried. A filled dot is a stable rate: every run
    finished with a validation loss less than 0.5 nats/token above the lowest mean of a variant of the sweep. A hollow dot with a
    cross is a rate that is not stable. The bar reaches from the lowest stable rate to the last one below the next unstable rate.
    A row whose rates have fewer than three runs makes no claim, and its name says so.
    """
    threshold = loss_threshold(settings)
    found = frontier_lines(settings)
    if not found:
        raise NothingToDraw("the learning rate is not swept")
    figure, (axis,) = panels(1, 1, height=0.9 + 0.35 * len(found), by_text=True)
    rates = sorted({rate for losses in found.values() for rate in losses})
    for row, (name, losses) in enumerate(found.items()):
        color = color_of(re.split("[: ]", name)[0])
        best, _ = stability_frontier(losses, threshold)
        if best is not None:
            first = min(r for r, values in losses.items() if all(v is not None and v < threshold for v in values))
            axis.plot([first, best], [row, row], color=color, linewidth=6, alpha=0.25, solid_capstyle="butt")
        for rate, values in losses.items():
            stable = all(v is not None and v < threshold for v in values)
            axis.plot(rate, row, "o", color=color, ms=scaled(7), fillstyle="full" if stable else "none")
            if not stable:
                axis.plot(rate, row, "x", color=color, ms=scaled(5))
    ticks_at(axis, rates)
    counts = [min(map(len, losses.values())) for losses in found.values()]
    notes = [f" ({'one seed' if k == 1 else f'{k} seeds'}, no claim)" * (k < MIN_SEEDS) for k in counts]
    name_rows(axis, [f"{name}{note}" for name, note in zip(found, notes, strict=True)])
    axis.set_ylim(len(found) - 0.5, -0.5)
    axis.set_xlabel("learning rate")
    return figure


@register(SWEEP_FIGURES, "Compute ladder")
def ladder(settings: Sequence[Variant]) -> Figure:
    """Draw a power law of loss against training FLOPs for each connection that was trained at several sizes.

    The y axis is the validation loss in nats/token, and the x axis is the training arithmetic in FLOPs, which is FLOPs per token
    times the number of tokens. Both axes are logarithmic. Markers are runs, and lines are power laws fitted to the markers. A
    connection is drawn if its runs have at least three different FLOPs, the largest at least twice the smallest. The legend gives
    the exponent and its 95 % interval, which comes from the scatter of the markers about the line. With one run for each size, the
    interval does not include the noise of seeds.
    """
    figure, (axis,) = panels(1, 1, height=3.2)
    sizes = {"model.width", "model.num_layers", "train.steps"}
    names = list(dict.fromkeys(setting.any_run.connection for setting in settings))
    for name, style in zip(names, looks(name.split(":")[0] for name in names), strict=True):
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
        axis.plot(x, loss, linestyle="", marker=style["marker"], color=style["color"])
        label = f"{name}: exponent {-fit.b:.3f} [{-high:.3f}, {-low:.3f}]"
        axis.plot(x, fit.a * (x / fit.x_0) ** -fit.b, color=style["color"], linestyle=style["linestyle"], label=label)
    if not axis.lines:
        raise NothingToDraw("no connection has three sizes that differ in training FLOPs by a factor of two")
    axis.set_xscale("log")
    log_axis(axis)
    axis.set(xlabel="training arithmetic (FLOPs)", ylabel="validation loss (nats/token)")
    legend(figure)
    return figure
