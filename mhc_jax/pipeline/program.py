"""A valid table as columns of numbers that one SPMD program can follow: what to do in each tick, and where everything lies.

In a tick a device does a forward, a backward, or a pair F&B.  Buffers are read when it begins and written when it ends.  A device
gives slots to what lives at the same time; a buffer is as long as the longest.

A tick has three phases, and a device does something in one of them: F; I; W, B and F&B.  XLA copies a large array in a branch
that passes it on unless all branches that write it come behind: activations (F, F&B write), what W waits for (I) and sums of
gradients (W, B, F&B) each find such an order in these phases, and none where one switch has all operations.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from mhc_jax.schedules.tables import Place, Schedule, wiring
from mhc_jax.schedules.validate import messages, operations, when


class Operation(NamedTuple):
    """What a device does in a tick: kinds of `schedules.tables.KINDS`, empty for nothing."""

    forward: str = ""
    backward: str = ""
    forward_leads: bool = False
    backward_leads: bool = False
    """Whether it is of a stage with other blocks, the first."""


@dataclass(frozen=True)
class Channel:
    """What all devices send one way, together: a TPU keeps few messages in flight."""

    kinds: tuple[str, ...]
    """Of the messages: `F`, `B`."""
    pairs: tuple[tuple[int, int], ...]
    """(source, target)."""


@dataclass(frozen=True)
class Program:
    """Columns are int32 [devices, ticks]; a slot of -1 is nowhere.

    operation_<k>: position in `phases[k]`; *_microbatch, *_chunk; forward_stage, backward_stage; forward_read, backward_read:
    slot of what comes in; keep, kept: slot of the activations; defer, deferred: slot of what I leaves for W; to_self,
    to_own_gradients: slot for a result that stays on the device; from_loss: slot for the gradient that the last stage starts with;
    arrives_<k>_<kind>: slot for what comes on channel k.
    """

    columns: Mapping[str, np.ndarray]
    phases: tuple[tuple[Operation, ...], ...]
    """The operations that occur, by the phase of a tick; the first of each is nothing."""
    channels: tuple[Channel, ...]
    inputs: int
    """Slots for boundary tensors that wait for their forward."""
    gradients: int
    """Slots for gradients of boundary tensors, from their arrival to their last use."""
    activations: int
    """Slots for what a stage keeps of a microbatch."""
    deferrals: int
    """Slots for what I of a microbatch leaves for its W."""


def compile_table(schedule: Schedule, leading: bool = False) -> Program:
    """Columns of a table that `validate` has passed.

    Args:
      schedule: the table.
      leading: whether the first stage has other blocks than the others.
    """
    P, ticks, last = schedule.devices, len(schedule.table), schedule.stages - 1
    names = ("forward_microbatch", "forward_chunk", "forward_stage", "backward_microbatch", "backward_chunk")
    zero = (
        *names,
        "backward_stage",
        "forward_read",
        "backward_read",
        "kept",
        "deferred",
    )
    columns = {name: np.zeros((P, ticks), np.int32) for name in zero}
    columns |= {
        name: np.full((P, ticks), -1, np.int32)
        for name in ("to_self", "from_loss", "to_own_gradients", "keep", "defer")
    }
    wires = [wiring(route) for route in schedule.routes]
    done, ends = when(schedule), _last_uses(schedule)

    sent = messages(schedule)
    ways: dict[int, set[tuple[str, int, int]]] = {}
    for one in sent:
        if one.source != one.target:
            ways.setdefault(_way(one.source, one.target, P), set()).add((one.kind, one.source, one.target))
    channels = tuple(
        Channel(
            tuple(kind for kind in "FB" if any(one[0] == kind for one in found)),
            tuple(sorted({(source, target) for _, source, target in found})),
        )
        for _, found in sorted(ways.items())
    )
    for k, channel in enumerate(channels):
        columns |= {f"arrives_{k}_{kind}": np.full((P, ticks), -1, np.int32) for kind in channel.kinds}

    # (device, written, last used, what): written when a tick ends, read when one begins.
    waiting: dict[str, list[tuple[int, int, int, tuple[int, int]]]] = {"F": [], "B": []}
    for one in sent:
        written = one.sent + (schedule.latency - 1 if one.source != one.target else 0)
        until = one.used if one.kind == "F" else ends[one.microbatch, one.stage]
        waiting[one.kind].append((one.target, written, until, (one.microbatch, one.stage)))
    kept, put_off = [], []
    for m, route in enumerate(schedule.route_of):
        for stage, place in enumerate(schedule.routes[route]):
            forward = done["F", m, stage]
            kept.append((place.device, forward, ends[m, stage], (m, stage)))
            if done["B", m, stage] < ends[m, stage]:
                put_off.append((place.device, done["B", m, stage], ends[m, stage], (m, stage)))
            if stage == last:
                waiting["B"].append((place.device, forward, ends[m, stage], (m, stage)))
    inputs, gradients = (_slots(waiting[kind], P, shared=True) for kind in "FB")
    activations, deferrals = _slots(kept, P, shared=False), _slots(put_off, P, shared=True)

    does: dict[tuple[int, int], Operation] = {}
    for tick, device, op in operations(schedule):
        half = "forward" if op.kind == "F" else "backward"
        stage, m = wires[schedule.route_of[op.microbatch]][op.kind, Place(device, op.chunk)].stage, op.microbatch
        for name, value in (("microbatch", m), ("chunk", op.chunk), ("stage", stage)):
            columns[f"{half}_{name}"][device, tick] = value
        now: dict[str, Any] = {half: op.kind, f"{half}_leads": leading and stage == 0}
        does[device, tick] = does.get((device, tick), Operation())._replace(**now)
        if op.kind == "F":
            columns["forward_read"][device, tick] = inputs.get((m, stage), 0)
            columns["keep"][device, tick] = activations[m, stage]
            if stage == last:
                columns["from_loss"][device, tick] = gradients[m, stage]
            elif op.sends == device:
                columns["to_self"][device, tick] = inputs[m, stage + 1]
        else:
            columns["backward_read"][device, tick] = gradients[m, stage]
            columns["kept"][device, tick] = activations[m, stage]
            if op.kind in ("I", "W"):
                columns["defer" if op.kind == "I" else "deferred"][device, tick] = deferrals[m, stage]
            if op.sends == device:
                columns["to_own_gradients"][device, tick] = gradients[m, stage - 1]
    for one in sent:
        if one.source != one.target:
            k = sorted(ways).index(_way(one.source, one.target, P))
            slots = inputs if one.kind == "F" else gradients
            tick = one.sent + schedule.latency - 1
            columns[f"arrives_{k}_{one.kind}"][one.target, tick] = slots[one.microbatch, one.stage]
    cells = {where: _in_phases(op) for where, op in does.items()}
    phases = tuple(_ordered({cell[k] for cell in cells.values()}) for k in range(3))
    phases = tuple((k, each) for k, each in enumerate(phases) if len(each) > 1)
    for position, (k, each) in enumerate(phases):
        own = np.zeros((P, ticks), np.int32)
        for where, cell in cells.items():
            own[where] = each.index(cell[k])
        columns[f"operation_{position}"] = own
    sizes = (1 + max(slots.values(), default=0) for slots in (inputs, gradients, activations, deferrals))
    return Program(columns, tuple(each for _, each in phases), channels, *sizes)


def _in_phases(op: Operation) -> tuple[Operation, Operation, Operation]:
    """What a device does, as F; I; W, B or F&B.  F beside I or W are two."""
    nothing = Operation()
    together = op.forward and op.backward == "B"
    forward = op._replace(backward="", backward_leads=False) if not together else nothing
    backward = op if together else op._replace(forward="", forward_leads=False)
    return forward, *((backward, nothing) if op.backward == "I" else (nothing, backward))


def _ordered(operations: set[Operation]) -> tuple[Operation, ...]:
    """Nothing, then those that write little first."""
    kinds = ("", "W", "I", "B")
    return tuple(
        sorted({Operation(), *operations}, key=lambda op: (op.forward, op.backward_leads, kinds.index(op.backward), op))
    )


def _way(source: int, target: int, devices: int) -> int:
    """1 up, -1 down, round the ring too; of two devices each way is another."""
    step = target - source
    return step if abs(step) == 1 else -step // (devices - 1) if abs(step) == devices - 1 else step


def _last_uses(schedule: Schedule) -> dict[tuple[int, int], int]:
    """Of every (microbatch, stage) the tick of the last of its gradients."""
    stage_of = schedule.stage_of
    return {
        (op.microbatch, stage_of[Place(device, op.chunk)]): tick
        for tick, device, op in operations(schedule)
        if op.kind in ("B", "W")
    }


def _slots(
    alive: Sequence[tuple[int, int, int, tuple[int, int]]], devices: int, shared: bool
) -> dict[tuple[int, int], int]:
    """A slot for each (device, written, last used, what); `shared`: one that is read in a tick can be written at its end."""
    out: dict[tuple[int, int], int] = {}
    free_from: list[list[int]] = [[] for _ in range(devices)]
    for device, written, until, what in sorted(alive, key=lambda one: one[1]):
        slots = free_from[device]
        k = next((k for k, tick in enumerate(slots) if tick <= written), len(slots))
        if k == len(slots):
            slots.append(0)
        slots[k] = until + (not shared)
        out[what] = k
    return out
