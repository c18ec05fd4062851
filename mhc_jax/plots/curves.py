"""Figures of the training run: loss, gap to residual, cost, gradient norms."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from mhc_jax.analysis.grouping import baselines
from mhc_jax.analysis.records import RunRecord, flatten, paired_gap, series
from mhc_jax.plots.style import (
    INK,
    by_depth,
    by_step,
    curve,
    finish,
    log_axis,
    mark_divergence,
    mark_spikes,
    panels,
    points,
    positive,
    register,
    smooth,
    styled,
)

WIDE_LOSS_RATIO = 10.0
"""Largest over smallest logged loss from which the loss axis is logarithmic."""


@register(
    "Loss",
    "Training loss (faint: every logged step; line: moving median) and validation loss (markers) "
    "against optimizer steps; lower is better. The second panel spans the moving medians and the "
    "validation losses of the second half, so that single values may leave it. "
    "Triangles at the top edge mark loss spikes; a dotted vertical line with a cross marks the "
    "step at which a run diverged.",
)
def loss(records: Sequence[RunRecord]) -> Figure:
    """Training and validation loss against steps."""
    figure, axes = panels(1, 2, height=3.4)
    latest = max((s[-1] for r in records if len(s := series(r, "train", "loss")[0])), default=0)
    ends = []
    for record, style in styled(records):
        steps, values = series(record, "train", "loss")
        for axis in axes:
            by_step(axis, record, style, "loss")
            points(axis, *series(record, "validation", "loss"), style)
            mark_divergence(axis, record, style)
        ends += [v for v in smooth(values)[steps >= latest / 2] if np.isfinite(v)]
        checked, held_out = series(record, "validation", "loss")
        ends += [v for v in held_out[checked >= latest / 2] if np.isfinite(v)]
    seen = np.concatenate([positive(series(r, "train", "loss")[1]) for r in records])
    if np.isfinite(seen).any() and np.nanmax(seen) > WIDE_LOSS_RATIO * np.nanmin(seen):
        log_axis(axes[0])
    if ends:
        margin = 0.15 * (max(ends) - min(ends)) + 1e-3
        axes[1].set_ylim(min(ends) - margin, max(ends) + margin)
        axes[1].set_xlim(latest / 2, latest * 1.02)
    for axis, title in zip(axes, ("Whole run", "Second half"), strict=True):
        mark_spikes(axis, records)
        axis.set_title(title, loc="left")
        axis.set_xlabel("optimizer step")
        axis.set_ylabel("loss (nats/token)")
    return finish(figure, records, "no run has logged a loss")


@register(
    "Loss gap to the baseline",
    "Loss of each run minus the loss of the baseline's run of the same seed at the same step, hence on the same batch "
    "(line: moving median in training; markers: validation). The baseline is the residual run, else the first one. Below zero "
    "is better. The axis spans medians and markers; single values may leave it.",
)
def loss_gap(records: Sequence[RunRecord]) -> Figure:
    """Paired difference of losses against steps."""
    figure, (axis,) = panels(1, 1, height=3.4)
    for (record, style), baseline in zip(styled(records), baselines(records), strict=True):
        if baseline is None:
            continue
        steps, gap = paired_gap(record, baseline, "train")
        axis.plot(steps, gap, color=style["color"], alpha=0.25, linewidth=0.8)
        curve(axis, steps, smooth(gap), style, marker="")
        points(axis, *paired_gap(record, baseline, "validation"), style)
        mark_divergence(axis, record, style)
    main = [l.get_ydata() for l in axis.lines if not str(l.get_label()).startswith("_")]
    values = np.concatenate([*main, [0.0]])
    values = values[np.isfinite(values)]
    margin = 0.15 * np.ptp(values) + 1e-3
    axis.set_ylim(values.min() - margin, values.max() + margin)
    axis.axhline(0, color=INK, linewidth=0.9)
    axis.set_xlabel("optimizer step")
    axis.set_ylabel("loss − baseline's loss (nats/token)\n← better        worse →")
    need = "a gap takes two runs that differ in the connection and the settings of it alone, and log losses at the same steps"
    return finish(figure, records, need)


@register(
    "Loss against cost",
    "Moving median of the training loss against arithmetic done (tokens × FLOPs per token) and "
    "against time (steps × median step time, without compilation): what a gain in loss costs.",
)
def loss_cost(records: Sequence[RunRecord]) -> Figure:
    """Training loss against FLOPs and against time, for runs with a summary."""
    figure, axes = panels(1, 2, height=3.2)
    for record, style in styled(records):
        steps, values = series(record, "train", "loss")
        tokens = series(record, "train", "tokens")[1]
        flops, step_time = record.result("flops_per_token"), record.result("step_time_s")
        if flops and len(tokens) == len(values):
            curve(axes[0], tokens * flops, smooth(values), style, markevery=0.15)
        if step_time:
            curve(axes[1], steps * step_time, smooth(values), style, markevery=0.15)
    axes[0].set_xlabel("training arithmetic (FLOPs)")
    axes[1].set_xlabel("training time (s)")
    for axis in axes:
        axis.set_ylabel("training loss (nats/token)")
    need = "no run has a summary with flops_per_token or step_time_s"
    return finish(figure, records, need)


@register(
    "Gradient norm",
    "Global gradient norm before clipping (faint: every logged step; line: moving median), "
    "logarithmic. Surges that the loss does not show are the first sign of instability; the grey "
    "dashed line is the clipping threshold where all runs share one.",
)
def grad_norm(records: Sequence[RunRecord]) -> Figure:
    """Gradient norm against steps."""
    figure, (axis,) = panels(1, 1, height=3.2)
    for record, style in styled(records):
        by_step(axis, record, style, "grad_norm")
        mark_divergence(axis, record, style)
    log_axis(axis)
    clips = {flatten(record.config).get("optimizer.grad_clip") for record in records}
    threshold = clips.pop() if len(clips) == 1 else None
    if threshold:
        axis.axhline(threshold, color="#7f7f7f", linestyle=(0, (6, 4)), linewidth=1)
    axis.set_xlabel("optimizer step")
    axis.set_ylabel("gradient norm before clipping")
    return finish(figure, records, "no run has logged grad_norm")


@register(
    "Gradient norm per block",
    "Norm of the gradient of each block's parameters at the last diagnostics step, logarithmic: "
    "a curve that climbs or falls by orders of magnitude shows gradients amplified or lost with "
    "depth.",
)
def layer_grad_norm(records: Sequence[RunRecord]) -> Figure:
    """Gradient norm against the index of the block."""
    figure, (axis,) = panels(1, 1, height=3.0)
    axis.set_title("Per block", loc="left")
    by_depth(axis, records, "grad_norm_per_layer")
    log_axis(axis)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set_xlabel("block (attention and feed-forward)")
    axis.set_ylabel("gradient norm")
    return finish(figure, records, "no diagnostics with grad_norm_per_layer")
