"""Proof that a table is a pipeline: every operation once, where its stage is, after what it needs, within the memory there is.

A table is refused in one sentence that names the tick, the device and the operation.
"""

from __future__ import annotations

from typing import NamedTuple

from mhc_jax.errors import InputError, require
from mhc_jax.schedules.tables import KINDS, Op, Place, Schedule, Wiring, wiring


class Message(NamedTuple):
    """What a device hands on: the streams (F) or their gradient (B) at the boundary between two stages."""

    kind: str
    """`F` or `B`."""
    microbatch: int
    stage: int
    """That uses it."""
    source: int
    target: int
    """Devices; equal where the route turns."""
    sent: int
    used: int
    """Ticks."""


def operations(schedule: Schedule) -> list[tuple[int, int, Op]]:
    """(tick, device, operation), in order."""
    return [
        (tick, device, op) for tick, row in enumerate(schedule.table) for device, cell in enumerate(row) for op in cell
    ]


def when(schedule: Schedule) -> dict[tuple[str, int, int], int]:
    """Tick of every (kind, microbatch, stage); B stands for I too."""
    stage_of = schedule.stage_of
    return {
        ("B" if op.kind == "I" else op.kind, op.microbatch, stage_of[Place(device, op.chunk)]): tick
        for tick, device, op in operations(schedule)
    }


def messages(schedule: Schedule) -> list[Message]:
    """All that crosses a boundary between stages, in the order in which it is used."""
    done, stage_of, out = when(schedule), schedule.stage_of, []
    for tick, device, op in operations(schedule):
        if op.kind != "W" and op.receives is not None:
            kind = "F" if op.kind == "F" else "B"
            stage = stage_of[Place(device, op.chunk)]
            sent = done[kind, op.microbatch, stage - 1 if kind == "F" else stage + 1]
            out.append(Message(kind, op.microbatch, stage, op.receives, device, sent, tick))
    return out


def validate(schedule: Schedule) -> None:
    """Check a table.

    Raises:
      InputError: a cell that is no cell, an operation in the wrong place, twice or missing, one that comes before what it needs,
        a wrong sender or receiver, more activations than `schedule.bound`.
    """
    _check_cells(schedule)
    wires = [wiring(route) for route in schedule.routes]
    seen: dict[tuple[str, int, int], int] = {}
    found: list[tuple[int, int, Op, Wiring]] = []
    for tick, device, op in operations(schedule):
        at = (tick, device, op)
        if op.kind not in KINDS:
            raise _wrong(at, f"the kind {op.kind!r} is none of {', '.join(KINDS)}.")
        if not 0 <= op.microbatch < schedule.microbatches:
            raise _wrong(at, f"there are {schedule.microbatches} microbatches, numbered from 0.")
        wire = wires[schedule.route_of[op.microbatch]].get((op.kind, Place(device, op.chunk)))
        if wire is None:
            raise _wrong(at, "the route of this microbatch does not pass there.")
        if op.receives != wire.receives:
            raise _wrong(at, f"receives from {op.receives}; its route says {wire.receives}.")
        if op.sends != wire.sends:
            raise _wrong(at, f"sends to {op.sends}; its route says {wire.sends}.")
        for kind in {"B": ("B", "W"), "I": ("B",)}.get(op.kind, (op.kind,)):
            key = (kind, op.microbatch, wire.stage)
            if key in seen:
                raise _wrong(at, f"was done in tick {seen[key]} already.")
            seen[key] = tick
        found.append((*at, wire))
    for m, route in enumerate(schedule.route_of):
        for stage, place in enumerate(schedule.routes[route]):
            for kind in ("F", "B", "W"):
                if (kind, m, stage) not in seen:
                    raise InputError(f"{kind} of microbatch {m}, stage {stage} (device {place.device}) is in no tick.")
    for tick, device, op, wire in found:
        for kind, stage, far in wire.needs:
            done = seen[kind, op.microbatch, stage]
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


def _wrong(at: tuple[int, int, Op], sentence: str) -> InputError:
    tick, device, op = at
    return InputError(f"tick {tick}, device {device}: {op}: {sentence}")


def _check_cells(schedule: Schedule) -> None:
    P = schedule.devices
    require(
        len(schedule.route_of) == schedule.microbatches and len(schedule.bound) == P,
        f"route_of and bound are {len(schedule.route_of)} and {len(schedule.bound)} long; there are "
        f"{schedule.microbatches} microbatches and {P} devices.",
    )
    require(schedule.latency in (1, 2), f"latency is {schedule.latency}; it must be 1 or 2.")
    for tick, row in enumerate(schedule.table):
        if len(row) != P:
            raise InputError(f"tick {tick} has {len(row)} cells; there are {P} devices.")
        for device, cell in enumerate(row):
            if len(cell) > 1 and [op.kind for op in cell] != ["F", "B"]:
                both = " and ".join(map(str, cell))
                raise InputError(f"tick {tick}, device {device}: {both} in one cell; only F and B can be a pair.")


def peak_activations(schedule: Schedule) -> list[tuple[int, int]]:
    """Of each device: the most (microbatch, chunk) between F and the last of its gradients, and the first tick with as many.

    What ends in a tick makes room in the next: an overlapped F&B holds both of its microbatches.
    """
    alive, most = [0] * schedule.devices, [(0, 0)] * schedule.devices
    for tick, row in enumerate(schedule.table):
        for device, cell in enumerate(row):
            alive[device] += sum(op.kind == "F" for op in cell)
            if alive[device] > most[device][0]:
                most[device] = (alive[device], tick)
            alive[device] -= sum(op.kind in ("B", "W") for op in cell)
    return most
