"""Compilation of a schedule's table into columns of numbers that one SPMD program can follow.

The columns say what each device does in each tick, and in which slots of its buffers the operands and results lie.  In a tick a
device does a forward, a backward, or an overlapped pair F&B.  It reads buffers when the tick begins and writes them when the tick
ends, but for the gradient of the loss, which the last stage writes within its F.  Values of one buffer that live at the same time
have different slots.  All devices have buffers of the same length.

A tick has three phases, each with its own `jax.lax.switch`.  A single F runs in the first phase, an I in the second, and a W, a B
or an F&B in the third.  A device has work in at most one phase of a tick.

The phases keep XLA from copying large arrays.  XLA copies an array in a branch that does not change it, unless all branches that
write the array come later in the program.  F and F&B write the activations, I writes the deferrals, and W, B and F&B write the sums
of gradients.  Phases allow an order of branches in which, for each of these arrays, the branches that write it come last.  If one
switch held all operations, there would be no such order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from mhc_jax.pipeline_schedules.tables import Schedule
from mhc_jax.pipeline_schedules.validate import messages, operations, when


class Operation(NamedTuple):
    """What a device does in a phase of a tick: an operation, a pair F&B, or nothing.  It is one branch of the phase's switch."""

    forward: str = ""
    """`F`, or empty if the operation has no forward."""
    backward: str = ""
    """`B`, `I` or `W`, or empty if the operation has no backward."""
    forward_leads: bool = False
    """Whether the forward is that of the first stage, and the first stage begins with dense blocks."""
    backward_leads: bool = False
    """Whether the backward is that of the first stage, and the first stage begins with dense blocks."""


@dataclass(frozen=True)
class Channel:
    """Messages that devices send at the same time in one direction, such as to the next device.

    Each kind of message travels by itself, as one array for each dtype.
    """

    kinds: tuple[str, ...]
    """Kinds of messages on the channel: `F` (boundary tensors), `B` (their gradients), or both."""
    pairs: tuple[tuple[int, int], ...]
    """(source, target) for each pair of devices between which messages of the channel travel."""


@dataclass(frozen=True)
class Program:
    """A schedule's table as columns of numbers, each int32 [devices, ticks].  The slot -1 means that a value is not stored.

    | column | content |
    | --- | --- |
    | `operation_<k>` | position in `phases[k]` of the operation that the device runs |
    | `forward_microbatch`, `forward_chunk`, `forward_stage` | numbers of microbatch, chunk and stage of the forward |
    | `backward_microbatch`, `backward_chunk`, `backward_stage` | numbers of microbatch, chunk and stage of the backward |
    | `forward_read` | slot of the buffer `inputs` that the forward reads |
    | `backward_read` | slot of the buffer `gradients` that the backward reads |
    | `keep`, `kept` | slot of the buffer `activations` that a forward writes (`keep`), or a backward reads (`kept`) |
    | `defer`, `deferred` | slot of the buffer `deferrals` that I writes (`defer`), or W reads (`deferred`) |
    | `to_self` | slot of `inputs` for the forward's result if the next stage is on the same device |
    | `to_own_gradients` | slot of `gradients` for the backward's result if the previous stage is on the same device |
    | `from_loss` | slot of `gradients` for the gradient of the loss, which the last stage computes in its forward (see `stage`) |
    | `arrives_<k>_<kind>` | slot of `inputs` (kind F) or `gradients` (kind B) for the message that channel k brings |
    """

    columns: Mapping[str, np.ndarray]
    phases: tuple[tuple[Operation, ...], ...]
    """For each phase of a tick, the operations that occur in it, as the branches of a `jax.lax.switch`.

    The first operation of a phase does nothing.  A phase in which no device has work is left out.
    """
    channels: tuple[Channel, ...]
    inputs: int
    """Number of slots for boundary tensors that wait for the forward of the stage that they enter."""
    gradients: int
    """Number of slots for gradients of boundary tensors, which live from their arrival to their last use."""
    activations: int
    """Number of slots for activations.  A slot holds all that one stage keeps of one microbatch for the backward."""
    deferrals: int
    """Number of slots for deferrals.  A slot holds all that I of one stage and microbatch keeps for W."""


Item = tuple[int, int]
"""The name of an item in a buffer: (microbatch, stage)."""
Slots = Mapping[str, Mapping[Item, int]]
"""For the name of each buffer of `Program`, the slot of every item."""


class Life(NamedTuple):
    """The ticks in which a buffer holds an item, which is a value of one microbatch and stage.

    The item is written at the end of the tick `written`, and last read at the beginning of the tick `last_read`.
    """

    device: int
    written: int
    last_read: int
    item: Item


def compile_table(schedule: Schedule, leading: bool = False) -> Program:
    """Compile the table of a schedule into a `Program`.  The schedule must be one that `validate` accepts.

    `leading`: whether the first stage begins with dense blocks, which the other stages do not have.
    """
    slots, channels = _buffers(schedule), _channels(schedule)
    phases, chosen = _phases(schedule, leading)
    columns = _slot_columns(schedule, slots, list(channels)) | chosen
    sizes = {name: 1 + max(each.values(), default=-1) for name, each in slots.items()}
    return Program(columns, phases, tuple(channels.values()), **sizes)


def _buffers(schedule: Schedule) -> Slots:
    """Return the slot that each value (of one microbatch and stage) has in each of the four buffers of `Program`."""
    done = when(schedule)
    ends = {
        (op.microbatch, schedule.wiring_of(device, op).stage): tick
        for tick, device, op in operations(schedule)
        if op.kind in ("B", "W")
    }
    lives: dict[str, list[Life]] = {"inputs": [], "gradients": [], "activations": [], "deferrals": []}
    for message in messages(schedule):
        item = message.microbatch, message.stage
        arrival = message.sent + (schedule.latency - 1 if message.source != message.target else 0)
        last_read = message.used if message.kind == "F" else ends[item]
        lives["inputs" if message.kind == "F" else "gradients"].append(Life(message.target, arrival, last_read, item))
    for m, route in enumerate(schedule.route_of):
        for stage, place in enumerate(schedule.routes[route]):
            forward, backward, end = done["F", m, stage], done["B", m, stage], ends[m, stage]
            lives["activations"].append(Life(place.device, forward, end, (m, stage)))
            if backward < end:
                lives["deferrals"].append(Life(place.device, backward, end, (m, stage)))
            # After the last stage comes the loss.  The forward of this stage makes the gradient of the loss with respect to its
            # output, from which the backward starts.
            if stage == schedule.stages - 1:
                lives["gradients"].append(Life(place.device, forward, end, (m, stage)))
    return {name: _slots(each, schedule.devices, shared=name != "activations") for name, each in lives.items()}


def _slots(lives: Sequence[Life], devices: int, shared: bool) -> dict[Item, int]:
    """Give each item of one buffer the first slot of its device that is free when the item is written.

    `shared`: whether an item may be written into a slot at the end of the tick in which the item before it was last read.
    """
    out: dict[Item, int] = {}
    free_from: list[list[int]] = [[] for _ in range(devices)]
    for life in sorted(lives, key=lambda life: life.written):
        slots = free_from[life.device]
        k = next((k for k, tick in enumerate(slots) if tick <= life.written), len(slots))
        if k == len(slots):
            slots.append(0)
        slots[k] = life.last_read + (not shared)
        out[life.item] = k
    return out


def _direction(source: int, target: int, devices: int) -> int:
    """Return the direction of a message on the ring of devices: 1 to the next device, -1 to the previous device.

    Between devices that are not neighbours it is target - source.  With two devices, 0 -> 1 is 1 and 1 -> 0 is -1.
    """
    step = target - source
    return step if abs(step) == 1 else -step // (devices - 1) if abs(step) == devices - 1 else step


def _channels(schedule: Schedule) -> dict[int, Channel]:
    """Return a dict from each direction in which messages are sent to its channel, in ascending order of directions."""
    sent: dict[int, set[tuple[str, tuple[int, int]]]] = {}
    for message in messages(schedule):
        if message.source != message.target:
            step = _direction(message.source, message.target, schedule.devices)
            sent.setdefault(step, set()).add((message.kind, (message.source, message.target)))
    return {
        step: Channel(
            tuple(kind for kind in "FB" if any(each == kind for each, _ in pairs)),
            tuple(sorted({pair for _, pair in pairs})),
        )
        for step, pairs in sorted(sent.items())
    }


def _slot_columns(schedule: Schedule, slots: Slots, directions: Sequence[int]) -> dict[str, np.ndarray]:
    """Return all columns of `Program` but `operation_<k>`, by name.  `directions` are those of the channels, in order."""
    shape = schedule.devices, len(schedule.table)
    halves = [f"{half}_{name}" for half in ("forward", "backward") for name in ("microbatch", "chunk", "stage", "read")]
    columns = {name: np.zeros(shape, np.int32) for name in (*halves, "kept", "deferred")}
    writes = ("to_self", "from_loss", "to_own_gradients", "keep", "defer")
    columns |= {name: np.full(shape, -1, np.int32) for name in writes}
    for tick, device, op in operations(schedule):
        half, m, stage = (
            "forward" if op.kind == "F" else "backward",
            op.microbatch,
            schedule.wiring_of(device, op).stage,
        )
        values = {f"{half}_microbatch": m, f"{half}_chunk": op.chunk, f"{half}_stage": stage}
        if op.kind == "F":
            values |= {"forward_read": slots["inputs"].get((m, stage), 0), "keep": slots["activations"][m, stage]}
            if stage == schedule.stages - 1:
                values["from_loss"] = slots["gradients"][m, stage]
            elif op.sends == device:
                values["to_self"] = slots["inputs"][m, stage + 1]
        else:
            values |= {"backward_read": slots["gradients"][m, stage], "kept": slots["activations"][m, stage]}
            if op.kind in ("I", "W"):
                values["defer" if op.kind == "I" else "deferred"] = slots["deferrals"][m, stage]
            if op.sends == device:
                values["to_own_gradients"] = slots["gradients"][m, stage - 1]
        for name, value in values.items():
            columns[name][device, tick] = value
    for message in messages(schedule):
        if message.source != message.target:
            k = directions.index(_direction(message.source, message.target, schedule.devices))
            column = columns.setdefault(f"arrives_{k}_{message.kind}", np.full(shape, -1, np.int32))
            buffer = slots["inputs" if message.kind == "F" else "gradients"]
            column[message.target, message.sent + schedule.latency - 1] = buffer[message.microbatch, message.stage]
    return columns


def _phases(schedule: Schedule, leading: bool) -> tuple[tuple[tuple[Operation, ...], ...], dict[str, np.ndarray]]:
    """Return (operations of each phase in which some device has work, columns `operation_<k>` by name)."""
    does: dict[tuple[int, int], Operation] = {}
    for tick, device, op in operations(schedule):
        half, leads = "forward" if op.kind == "F" else "backward", leading and schedule.wiring_of(device, op).stage == 0
        change: dict[str, Any] = {half: op.kind, f"{half}_leads": leads}
        does[device, tick] = does.get((device, tick), Operation())._replace(**change)
    cells = {where: _in_phases(op) for where, op in does.items()}
    phases, columns = [], {}
    for k in range(3):
        each = _ordered({cell[k] for cell in cells.values()})
        if len(each) > 1:
            column = columns[f"operation_{len(phases)}"] = np.zeros((schedule.devices, len(schedule.table)), np.int32)
            for where, cell in cells.items():
                column[where] = each.index(cell[k])
            phases.append(each)
    return tuple(phases), columns


def _in_phases(op: Operation) -> tuple[Operation, Operation, Operation]:
    """Divide what a device does in a tick among the three phases.  The phases are F, then I, then W, B or F&B.

    An F in the same cell as an I or a W is an operation of its own, in the first phase.
    """
    nothing = Operation()
    if op.forward and op.backward == "B":
        return nothing, nothing, op
    forward = op._replace(backward="", backward_leads=False)
    backward = op._replace(forward="", forward_leads=False)
    return (forward, backward, nothing) if op.backward == "I" else (forward, nothing, backward)


def _ordered(operations: set[Operation]) -> tuple[Operation, ...]:
    """Sort the operations of a phase: the first does nothing, and those that write most arrays come last."""
    kinds = ("", "W", "I", "B")
    return tuple(
        sorted({Operation(), *operations}, key=lambda op: (op.forward, op.backward_leads, kinds.index(op.backward), op))
    )
