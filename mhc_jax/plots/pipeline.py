"""Draw the timeline of pipeline schedules: one row for each device, with time to the right."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from mhc_jax.pipeline_schedules.simulate import Timeline
from mhc_jax.plots.style import INK, house_style, legend, panels

COLORS = {"F": "#56B4E9", "B": "#E69F00", "I": "#F0E442", "W": "#8FC98F"}
NAMES = {"F": "forward", "B": "backward", "I": "backward for the input", "W": "backward for the weights"}


@house_style
def timeline(runs: Sequence[Timeline], titles: Sequence[str], unit: str = "") -> Figure:
    """Draw one panel for each schedule, all with the same time axis.  Colours are operations, numbers are microbatches.

    A forward and a backward pass that overlap lie above each other in one box.  If a device computes several stages, the operations
    of all its stages but the first are hatched.

    Args:
      runs: results of `simulate`, one for each schedule.
      titles: titles of the panels.
      unit: unit of time for the label of the time axis, or empty.
    """
    longest = max(run.makespan for run in runs)
    widest = max(len(run.spans) / run.schedule.devices for run in runs)
    figure, axes = panels(len(runs), 1, height=0.75 + 0.26 * max(run.schedule.devices for run in runs))
    figure.set_figwidth(max(8.0, 0.3 * widest + 1.0))
    kinds = set()
    for axis, run, title in zip(axes, runs, titles, strict=True):
        for span in run.spans:
            kinds |= {op.kind for op in span.cell}
            for k, op in enumerate(span.cell):
                height = 0.9 / len(span.cell)
                corner = (span.start, span.device - 0.45 + k * height)
                hatch = "////" if op.chunk else None
                patch = Rectangle(corner, span.end - span.start, height, facecolor=COLORS[op.kind], hatch=hatch)
                patch.set(edgecolor="#ffffff80" if hatch else "white", linewidth=0.5)
                axis.add_patch(patch)
                middle = (corner[0] + (span.end - span.start) / 2, corner[1] + height / 2)
                size = 6.0 if len(span.cell) == 1 else 4.8
                axis.text(*middle, str(op.microbatch), ha="center", va="center", fontsize=size, clip_on=True)
            if len(span.cell) == 2:
                box = Rectangle((span.start, span.device - 0.45), span.end - span.start, 0.9, fill=False)
                axis.add_patch(box)
                box.set(edgecolor=INK, linewidth=0.7)
        axis.set_xlim(0, longest)
        axis.set_ylim(run.schedule.devices - 0.4, -0.6)
        axis.set_yticks(range(run.schedule.devices))
        axis.set_ylabel("device")
        axis.grid(visible=False)
        axis.set_title(title)
    axes[-1].set_xlabel(f"time ({unit})" if unit else "time")
    handles = [Patch(facecolor=COLORS[kind], label=f"{kind}: {NAMES[kind]}") for kind in COLORS if kind in kinds]
    if any(op.chunk for run in runs for span in run.spans for op in span.cell):
        handles.append(Patch(facecolor="#cccccc", edgecolor="white", hatch="////", label="second and further chunks"))
    legend(figure, handles)
    return figure
