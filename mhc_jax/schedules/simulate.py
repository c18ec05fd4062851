"""What a schedule takes when its operations take the times they are given: bubbles, activations, communication that shows.

Each device does its cells in the table's order, each as soon as the device is free and what it needs has arrived; ticks say the
order alone.  A message travels beside the computations of both devices and takes `Costs.send`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from mhc_jax.errors import InputError, require
from mhc_jax.schedules.tables import Cell, Place, Schedule, wiring


@dataclass(frozen=True)
class Costs:
    """Times of one microbatch, in any unit; a number a stage of the model."""

    F: tuple[float, ...]
    """Forward."""
    B: tuple[float, ...]
    """Backward: both gradients, and what is computed again for them."""
    W: tuple[float, ...]
    """The part of B that the gradients of the weights take; I is the rest."""
    pair: float = 1.0
    """F&B, a forward and a backward that overlap, over F + B."""
    send: float = 0.0
    """A boundary tensor from one device to the next."""
    activations: tuple[float, ...] = ()
    """What a stage keeps of a microbatch, in any unit; empty: 1 each."""

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
    """The same for all stages."""
    return Costs((F,) * stages, (B,) * stages, (W,) * stages, pair, send)


class Span(NamedTuple):
    """A cell in time."""

    device: int
    start: float
    end: float
    cell: Cell


@dataclass(frozen=True)
class Timeline:
    """How it went."""

    schedule: Schedule
    spans: tuple[Span, ...]
    exposed: float
    """Time that the step would be shorter if messages took none."""
    activations: tuple[float, ...]
    """The most that each device holds, in the unit of `Costs.activations`."""

    @property
    def makespan(self) -> float:
        """Time of the whole step, without the optimizer."""
        return max(span.end for span in self.spans)

    @property
    def busy(self) -> tuple[float, ...]:
        """Of each device."""
        total = [0.0] * self.schedule.devices
        for span in self.spans:
            total[span.device] += span.end - span.start
        return tuple(total)

    @property
    def bubble(self) -> tuple[float, ...]:
        """Time that each device waits."""
        return tuple(self.makespan - busy for busy in self.busy)

    @property
    def bubble_fraction(self) -> float:
        """Waiting, of the time of all devices."""
        return sum(self.bubble) / (self.makespan * self.schedule.devices)


def simulate(schedule: Schedule, costs: Costs) -> Timeline:
    """Run a table that `validate` has passed.

    Raises:
      InputError: costs of another number of stages.
    """
    require(
        len(costs.F) == schedule.stages,
        f"The costs are of {len(costs.F)} stages, and {schedule.name!r} cuts the model into {schedule.stages}.",
    )
    spans = _run(schedule, costs)
    alone = _run(schedule, dataclasses.replace(costs, send=0.0)) if costs.send else spans
    exposed = max(span.end for span in spans) - max(span.end for span in alone)
    return Timeline(schedule, tuple(spans), exposed, tuple(_activations(schedule, costs)))


def _run(schedule: Schedule, costs: Costs) -> list[Span]:
    wires = [wiring(route) for route in schedule.routes]
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
            own = [wires[schedule.route_of[op.microbatch]][op.kind, Place(device, op.chunk)] for op in cell]
            for op, wire in zip(cell, own, strict=True):
                for kind, stage, far in wire.needs:
                    start = max(start, done[kind, op.microbatch, stage] + (costs.send if far else 0.0))
                duration += times[op.kind][wire.stage]
            free[device] = start + duration * (costs.pair if len(cell) == 2 else 1.0)
            spans.append(Span(device, start, free[device], cell))
            for op, wire in zip(cell, own, strict=True):
                finished["B" if op.kind == "I" else op.kind, op.microbatch, wire.stage] = free[device]
        done |= finished
    return spans


def _activations(schedule: Schedule, costs: Costs) -> Sequence[float]:
    size, stage_of = costs.activations or (1.0,) * schedule.stages, schedule.stage_of
    alive, most = [0.0] * schedule.devices, [0.0] * schedule.devices
    for row in schedule.table:
        for device, cell in enumerate(row):
            sizes = {op: size[stage_of[Place(device, op.chunk)]] for op in cell}
            alive[device] += sum(s for op, s in sizes.items() if op.kind == "F")
            most[device] = max(most[device], alive[device])
            alive[device] -= sum(s for op, s in sizes.items() if op.kind in ("B", "W"))
    return most


def published(name: str, stages: int, F: float, B: float, W: float, pair: float) -> tuple[float, int, int]:
    """(bubble, activations a device in chunks, copies of the parameters) of DeepSeek's DualPipe table.

    Args:
      name: `1f1b`, `zb1p`, `dualpipe` or `dualpipev`.
      stages: PP, the parts of the model; dualpipev runs on PP / 2 devices.
      F: of one stage, as B (both gradients) and W.
      pair: F&B over F + B.
    """
    FB = pair * (F + B)
    formulas = {
        "1f1b": ((stages - 1) * (F + B), stages, 1),
        "zb1p": ((stages - 1) * (F + B - 2 * W), stages, 1),
        "dualpipe": ((stages / 2 - 1) * (FB + B - 3 * W), stages + 1, 2),
        "dualpipev": ((stages / 2 - 1) * (FB + B - 3 * W), stages + 1, 2),
    }
    if name not in formulas:
        raise InputError(f"There is no published bubble of {name!r} here; use one of {', '.join(map(repr, formulas))}.")
    return formulas[name]
