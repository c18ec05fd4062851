"""Simulation of a schedule from the times of its operations: how long a step takes, how long devices wait, and what they hold.

Each device runs its cells in the order of the table.  A cell starts as soon as the device is free and the operands have arrived.
The ticks of the table therefore only order the cells, and have no duration.  A message takes the time `Costs.send`, and the devices
that send and receive it compute meanwhile.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import NamedTuple

from mhc_jax.errors import require
from mhc_jax.pipeline_schedules.tables import Cell, Schedule
from mhc_jax.pipeline_schedules.validate import peak_activations


@dataclass(frozen=True)
class Costs:
    """Times of the operations on one microbatch, in any unit.  Each tuple has one number for each stage of the model."""

    F: tuple[float, ...]
    """Time of the forward of one microbatch, for each stage, in any unit."""
    B: tuple[float, ...]
    """Time of the whole backward of one microbatch with its recomputation, for each stage, in the unit of F."""
    W: tuple[float, ...]
    """Time of the part of B that makes the gradients of the weights, for each stage.  I is the rest: B = I + W."""
    pair: float = 1.0
    """Time of an overlapped pair F&B, divided by the time F + B that the two take one after the other."""
    send: float = 0.0
    """Time that a boundary tensor takes to travel from one device to the next, in the unit of F."""
    activations: tuple[float, ...] = ()
    """Size of what each stage keeps of one microbatch for its backward, in any unit.  Empty means 1 for every stage."""

    def __post_init__(self) -> None:
        require(
            len(self.F) == len(self.B) == len(self.W) and len(self.activations) in (0, len(self.F)),
            f"F, B, W and activations have {len(self.F)}, {len(self.B)}, {len(self.W)} and {len(self.activations)} stages; "
            f"give each the same.",
        )
        require(
            all(0 <= w <= b for w, b in zip(self.W, self.B, strict=True)) and min(self.F) >= 0 and self.send >= 0,
            "Costs: F, W and send must not be negative, and W is a part of B.",
        )
        require(self.pair > 0, f"pair is {self.pair}; F&B takes more than no time.")


def by_hand(stages: int, F: float = 1.0, B: float = 2.0, W: float = 1.0, pair: float = 1.0, send: float = 0.0) -> Costs:
    """Make costs that are the same for all stages.  F, B and W are the times of one stage, as in `Costs`."""
    return Costs((F,) * stages, (B,) * stages, (W,) * stages, pair, send)


class Span(NamedTuple):
    """The time from `start` to `end` in which a device runs a cell, in the unit of `Costs`."""

    device: int
    start: float
    end: float
    cell: Cell


@dataclass(frozen=True)
class Timeline:
    """The result of `simulate`: when each cell runs, and how much each device holds.  Times are in the unit of `Costs`."""

    schedule: Schedule
    spans: tuple[Span, ...]
    exposed: float
    """Exposed time of messages: the time by which the step would be shorter if messages took no time."""
    activations: tuple[float, ...]
    """The largest size of activations that each device holds at once, in the unit of `Costs.activations`."""

    @property
    def makespan(self) -> float:
        """Return the time from the start of the step to the end of its last cell.  The optimizer is left out."""
        return max(span.end for span in self.spans)

    @property
    def bubble(self) -> tuple[float, ...]:
        """Return, for each device, the time that it waits during the step."""
        busy = [0.0] * self.schedule.devices
        for span in self.spans:
            busy[span.device] += span.end - span.start
        return tuple(self.makespan - time for time in busy)

    @property
    def bubble_fraction(self) -> float:
        """Return the share of the step that an average device waits: the mean of `bubble`, divided by `makespan`."""
        return sum(self.bubble) / (self.makespan * self.schedule.devices)


def simulate(schedule: Schedule, costs: Costs) -> Timeline:
    """Compute when each cell of a schedule runs if its operations take the times in `costs`.

    The schedule must be one that `validate` accepts.

    Raises:
      InputError: the costs are those of another number of stages than the schedule has.
    """
    require(
        len(costs.F) == schedule.stages,
        f"The costs are of {len(costs.F)} stages, and {schedule.name!r} cuts the model into {schedule.stages}.",
    )
    spans = _run(schedule, costs)
    without_messages = _run(schedule, dataclasses.replace(costs, send=0.0)) if costs.send else spans
    exposed = max(span.end for span in spans) - max(span.end for span in without_messages)
    peaks = peak_activations(schedule, costs.activations)
    return Timeline(schedule, tuple(spans), exposed, tuple(float(most) for most, _ in peaks))


def _run(schedule: Schedule, costs: Costs) -> list[Span]:
    times = {"F": costs.F, "B": costs.B, "W": costs.W}
    times["I"] = tuple(b - w for b, w in zip(costs.B, costs.W, strict=True))
    free = [0.0] * schedule.devices
    done: dict[tuple[str, int, int], float] = {}
    spans = []
    for row in schedule.table:
        finished = {}
        for device, cell in enumerate(row):
            if not cell:
                continue
            start, duration = free[device], 0.0
            wires = [schedule.wiring_of(device, op) for op in cell]
            for op, wire in zip(cell, wires, strict=True):
                for kind, stage, far in wire.needs:
                    start = max(start, done[kind, op.microbatch, stage] + (costs.send if far else 0.0))
                duration += times[op.kind][wire.stage]
            free[device] = start + duration * (costs.pair if len(cell) == 2 else 1.0)
            spans.append(Span(device, start, free[device], cell))
            for op, wire in zip(cell, wires, strict=True):
                finished["B" if op.kind == "I" else op.kind, op.microbatch, wire.stage] = free[device]
        done |= finished
    return spans
