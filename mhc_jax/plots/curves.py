"""Figures of training: loss, gap to the baseline, cost and gradient norms."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from mhc_jax.analysis.grouping import baselines
from mhc_jax.analysis.run_reader import RunRecord, flatten, paired_gap, series
from mhc_jax.plots.axes import (
    by_depth,
    by_step,
    curve,
    fit_y,
    log_axis,
    mark_divergence,
    mark_spikes,
    markers_at,
    points,
    positive,
    smooth,
)
from mhc_jax.plots.style import FIGURES, INK, finish, panels, register, styled

WIDE_LOSS_RATIO = 10.0
"""The loss axis is logarithmic if the largest logged loss divided by the smallest exceeds this ratio."""


@register(FIGURES, "Loss", only={'The y axis of "Second half"': "second half"})
def loss(records: Sequence[RunRecord]) -> Figure:
    """Draw training and validation loss against steps.

    The y axis is the loss in nats/token, where lower is better; the x axis is the optimizer step. The faint line shows the training
    loss at every logged step, a mean over the tokens of the step's batch. The strong line is its moving median over a twentieth of
    the logged steps. Markers are validation losses. The y axis of "Second half" spans the strong lines and the markers, so that
    faint lines may leave the panel. Triangles at the top edge mark loss spikes, one row for
    each run. A dotted vertical line with a cross marks the step at which a run diverged.
    """
    figure, axes = panels(1, 2, height=3.4)
    latest = max((s[-1] for r in records if len(s := series(r, "train", "loss")[0])), default=0)
    late: list[float] = []
    for row, (record, style) in enumerate(styled(records)):
        steps, values = series(record, "train", "loss")
        validated, held_out = series(record, "validation", "loss")
        for axis in axes:
            by_step(axis, record, style, "loss", marker="")
            points(axis, validated, held_out, style)
            mark_divergence(axis, record, style)
            mark_spikes(axis, record.spike_steps, row, style["color"])
        late += [*smooth(values)[steps >= latest / 2], *held_out[validated >= latest / 2]]
    seen = np.concatenate([positive(series(r, "train", "loss")[1]) for r in records])
    if np.isfinite(seen).any() and np.nanmax(seen) > WIDE_LOSS_RATIO * np.nanmin(seen):
        log_axis(axes[0])
    fit_y(axes[1], late)
    if np.isfinite(late).any():
        axes[1].set_xlim(latest / 2, latest * 1.02)
    for axis, title in zip(axes, ("Whole run", "Second half"), strict=True):
        axis.set(title=title, xlabel="optimizer step", ylabel="loss (nats/token)")
    return finish(figure, records, "no run has logged a loss")


@register(FIGURES, "Loss gap to the baseline")
def loss_gap(records: Sequence[RunRecord]) -> Figure:
    """Draw the loss of each run minus the loss of its baseline against steps.

    The y axis is the gap in nats/token, where below zero is better; the x axis is the optimizer step. The gap is the loss of a run
    minus the loss of the baseline's run of the same seed at the same step, hence on the same batch. The faint line is the gap in
    training loss at every logged step, the strong line is its moving median over a twentieth of these steps, and markers are gaps
    in validation loss. The baseline has the residual connection or, if no run has it, the connection of the first run. The y axis
    spans the strong lines and the markers, so that faint lines may leave the panel.
    """
    figure, (axis,) = panels(1, 1, height=3.4)
    for (record, style), baseline in zip(styled(records), baselines(records), strict=True):
        if baseline is None:
            continue
        steps, gap = paired_gap(record, baseline, "train")
        axis.plot(steps, gap, color=style["color"], alpha=0.25, linewidth=0.8)
        curve(axis, steps, smooth(gap), style, marker="")
        points(axis, *paired_gap(record, baseline, "validation"), style)
        mark_divergence(axis, record, style)
    labelled = [line.get_ydata() for line in axis.lines if not str(line.get_label()).startswith("_")]
    fit_y(axis, np.concatenate([*labelled, [0.0]]))
    axis.axhline(0, color=INK, linewidth=0.9)
    axis.set(xlabel="optimizer step", ylabel="loss − baseline's loss (nats/token)\n← better        worse →")
    need = "a gap takes two runs that differ in the connection and the settings of it alone, and log losses at the same steps"
    return finish(figure, records, need)


@register(
    FIGURES,
    "Loss against cost",
    only={"Arithmetic is": "arithmetic", "Time is": "time", "Runs follow each other": "time"},
)
def loss_cost(records: Sequence[RunRecord]) -> Figure:
    """Draw the training loss of runs with a summary against FLOPs and against time.

    The y axes show the moving median of the training loss over a twentieth of the logged steps, in nats/token. Arithmetic is
    what was done so far in FLOPs, the number of tokens times the FLOPs per token. Time is the training time so far in seconds, the
    number of steps times the median time of a step; compilation is not included. Of several seeds a curve shows the mean loss
    against the mean cost, and the range over seeds is not drawn.
    Runs follow each other and are not timed in turns, so that other work on the machine may stretch the times of some of them:
    experiments/steptime.py times connections in turns.
    """
    figure, axes = panels(1, 2, height=3.2)
    for record, style in styled(records):
        steps, values = series(record, "train", "loss")
        tokens = series(record, "train", "tokens")[1]
        flops, step_time = record.result("flops_per_token"), record.result("step_time_s")
        if flops and len(tokens) == len(values):
            curve(axes[0], tokens * flops, smooth(values), style, markevery=0.15)
        if step_time:
            curve(axes[1], steps * step_time, smooth(values), style, markevery=0.15)
    for axis, label in zip(axes, ("training arithmetic (FLOPs)", "training time (s)"), strict=True):
        axis.set(xlabel=label, ylabel="training loss (nats/token)")
        axis.set_label(f"loss against {label}")
    return finish(figure, records, "no run has a summary with flops_per_token or step_time_s")


@register(FIGURES, "Gradient norm")
def grad_norm(records: Sequence[RunRecord]) -> Figure:
    """Draw the gradient norm against steps.

    The y axis (logarithmic) is the norm of the gradient of the loss (nats/token) with respect to all parameters, before clipping;
    the x axis is the optimizer step. The faint line shows every logged step, and the strong line is the moving median over a
    twentieth of these steps. A norm that surges while the loss does not is often the first sign of instability. The grey dashed
    line is the norm to which gradients are clipped, if it is the same in all runs.
    """
    figure, (axis,) = panels(1, 1, height=3.2)
    for k, (record, style) in enumerate(styled(records)):
        by_step(axis, record, style, "grad_norm", markevery=markers_at(k))
        mark_divergence(axis, record, style)
    log_axis(axis)
    clips = {flatten(record.config).get("optimizer.grad_clip") for record in records}
    threshold = clips.pop() if len(clips) == 1 else None
    if threshold:
        axis.axhline(threshold, color="#7f7f7f", linestyle=(0, (6, 4)), linewidth=1)
    axis.set(xlabel="optimizer step", ylabel="gradient norm before clipping")
    return finish(figure, records, "no run has logged grad_norm")


@register(FIGURES, "Gradient norm per block")
def block_grad_norm(records: Sequence[RunRecord]) -> Figure:
    """Draw the gradient norm of each block against the number of the block.

    The y axis (logarithmic) is the norm of the gradient of the loss (nats/token) with respect to the parameters of one block,
    attention and feed-forward together, before clipping at the last diagnostics step. The x axis is the number of the block,
    counted from 1. A curve that climbs or falls by orders of magnitude shows that gradients explode or vanish over depth.
    """
    figure, (axis,) = panels(1, 1, height=3.0)
    by_depth(axis, records, "grad_norm_per_layer", depth="block")
    log_axis(axis)
    axis.set_ylabel("gradient norm before clipping")
    return finish(figure, records, "no diagnostics with grad_norm_per_layer")
