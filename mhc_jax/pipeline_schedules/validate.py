"""Proof that the table of a schedule describes a correct pipeline.

In a correct table every operation occurs once, on the device of its stage, and after all operations on which it depends.  No device
holds more activations than it has room for.  `validate` refuses any other table with one sentence that says what is wrong in which
tick and on which device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from mhc_jax.errors import InputError, require
from mhc_jax.pipeline_schedules.tables import KINDS, Op, Place, Schedule, Wiring, wiring


class Message(NamedTuple):
    """What one stage hands to a neighbouring stage: a boundary tensor (F), or the gradient of one (B)."""

    kind: str
    """The operation whose result the message is, `F` or `B`.  I counts as B."""
    microbatch: int
    stage: int
    """The stage that uses the message."""
    source: int
    """The device that sends the message."""
    target: int
    """The device that gets the message.  It equals `source` if both stages lie on one device."""
    sent: int
    """The tick in which `source` computes the message."""
    used: int
    """The tick in which `target` uses the message."""


def operations(schedule: Schedule) -> list[tuple[int, int, Op]]:
    """Return all operations of a schedule as (tick, device, operation), in the order of ticks and devices."""
    return [
        (tick, device, op) for tick, row in enumerate(schedule.table) for device, cell in enumerate(row) for op in cell
    ]


def when(schedule: Schedule) -> dict[tuple[str, int, int], int]:
    """Return the tick of every operation, by (kind, microbatch, stage).  An I is listed under the kind B."""
    return {
        ("B" if op.kind == "I" else op.kind, op.microbatch, schedule.wiring_of(device, op).stage): tick
        for tick, device, op in operations(schedule)
    }


def messages(schedule: Schedule) -> list[Message]:
    """Return all messages between neighbouring stages, in the order in which they are used."""
    done, out = when(schedule), []
    for tick, device, op in operations(schedule):
        if op.kind != "W" and op.receives is not None:
            kind, stage = "F" if op.kind == "F" else "B", schedule.wiring_of(device, op).stage
            sent = done[kind, op.microbatch, stage - 1 if kind == "F" else stage + 1]
            out.append(Message(kind, op.microbatch, stage, op.receives, device, sent, tick))
    return out


def validate(schedule: Schedule) -> None:
    """Check that the table of a schedule describes a correct pipeline.

    Raises:
      InputError: a cell holds operations that cannot overlap, or an operation is on the wrong device, missing, listed twice or
        earlier than its operands, or has a wrong sender or receiver, or a device holds more activations than `schedule.bound`.
    """
    _check_cells(schedule)
    ticks: dict[tuple[str, int, int], int] = {}
    placed = [(tick, device, op, _placed(schedule, tick, device, op)) for tick, device, op in operations(schedule)]
    for tick, device, op, wire in placed:
        for kind in {"B": ("B", "W"), "I": ("B",)}.get(op.kind, (op.kind,)):
            key = (kind, op.microbatch, wire.stage)
            if key in ticks:
                raise InputError(f"tick {tick}, device {device}: {op}: was done in tick {ticks[key]} already.")
            ticks[key] = tick
    for m, route in enumerate(schedule.route_of):
        for stage, place in enumerate(schedule.routes[route]):
            for kind in ("F", "B", "W"):
                if (kind, m, stage) not in ticks:
                    raise InputError(f"{kind} of microbatch {m}, stage {stage} (device {place.device}) is in no tick.")
    for tick, device, op, wire in placed:
        for kind, stage, far in wire.needs:
            done = ticks[kind, op.microbatch, stage]
            ready = done + (schedule.latency if far else 1)
            if tick < ready:
                source = schedule.routes[schedule.route_of[op.microbatch]][stage].device
                raise InputError(
                    f"tick {tick}, device {device}: {op}, stage {wire.stage}, needs {kind} of stage {stage}, which device "
                    f"{source} does in tick {done}; it is there from tick {ready} on."
                )
    for device, (most, tick) in enumerate(peak_activations(schedule)):
        if most > schedule.bound[device]:
            raise InputError(
                f"tick {tick}, device {device}: {most} activations are alive, and there is room for {schedule.bound[device]}."
            )


def _placed(schedule: Schedule, tick: int, device: int, op: Op) -> Wiring:
    """Return the `Wiring` of an operation, after checking that the operation lies on the route of its microbatch."""
    at = f"tick {tick}, device {device}: {op}: "
    require(op.kind in KINDS, f"{at}the kind {op.kind!r} is none of {', '.join(KINDS)}.")
    known = 0 <= op.microbatch < schedule.microbatches
    require(known, f"{at}there are {schedule.microbatches} microbatches, numbered from 0.")
    wire = wiring(schedule.routes[schedule.route_of[op.microbatch]]).get((op.kind, Place(device, op.chunk)))
    if wire is None:
        raise InputError(f"{at}the route of this microbatch does not pass there.")
    require(op.receives == wire.receives, f"{at}receives from {op.receives}; its route says {wire.receives}.")
    require(op.sends == wire.sends, f"{at}sends to {op.sends}; its route says {wire.sends}.")
    return wire


def _check_cells(schedule: Schedule) -> None:
    P = schedule.devices
    require(
        len(schedule.route_of) == schedule.microbatches and len(schedule.bound) == P,
        f"route_of and bound are {len(schedule.route_of)} and {len(schedule.bound)} long; there are "
        f"{schedule.microbatches} microbatches and {P} devices.",
    )
    require(schedule.latency in (1, 2), f"latency is {schedule.latency}; it must be 1 or 2.")
    for tick, row in enumerate(schedule.table):
        require(len(row) == P, f"tick {tick} has {len(row)} cells; there are {P} devices.")
        for device, cell in enumerate(row):
            if len(cell) > 1 and [op.kind for op in cell] != ["F", "B"]:
                both = " and ".join(map(str, cell))
                raise InputError(f"tick {tick}, device {device}: {both} in one cell; only F and B can be a pair.")


def peak_activations(schedule: Schedule, sizes: Sequence[float] = ()) -> list[tuple[int | float, int]]:
    """Return for each device (largest size of activations held at once, first tick in which the device holds so much).

    An activation belongs to one microbatch and stage, and lives from its F to its B or W.  An activation that ends in a tick makes
    room only in the next tick, so an overlapped F&B holds the activations of both of its microbatches.

    Args:
      schedule: the table of operations.
      sizes: size of the activation of each stage, in any unit.  Empty means 1 for every stage.
    """
    sizes = sizes or (1,) * schedule.stages
    alive: list[int | float] = [0] * schedule.devices
    most: list[tuple[int | float, int]] = [(0, 0)] * schedule.devices
    for tick, row in enumerate(schedule.table):
        for device, cell in enumerate(row):
            held = [(op.kind, sizes[schedule.wiring_of(device, op).stage]) for op in cell]
            alive[device] += sum(size for kind, size in held if kind == "F")
            if alive[device] > most[device][0]:
                most[device] = (alive[device], tick)
            alive[device] -= sum(size for kind, size in held if kind in ("B", "W"))
    return most
