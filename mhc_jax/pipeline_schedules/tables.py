r"""Schedules of pipeline parallelism, as tables with a row for each tick and a column for each device.

| name | rule | source |
| --- | --- | --- |
| `gpipe` | all forwards, then all backwards | GPipe, arXiv 1811.06965, section 2.2 |
| `1f1b` | one forward, one backward in turn | PipeDream-Flush; arXiv 2104.04473, section 2.2.1 |
| `interleaved` | `1f1b` with several stages on each device | arXiv 2104.04473, section 2.2.2 |
| `zb1p` | `1f1b` whose weight gradients fill the bubble | ZB-H1, arXiv 2401.10241, section 2.1 |
| `dualpipe` | microbatches enter at both ends of the pipeline | DeepSeek-V3, arXiv 2412.19437, section 3.2.1 |
| `dualpipev` | `dualpipe` on half as many devices; stages go along them and back, in a V | github.com/deepseek-ai/DualPipe |

P is the number of devices along the mesh axis `stage`, M the number of microbatches, and v the number of stages (chunks) of a
device.  F, B, I and W are the times of a forward, a whole backward, and the two parts of the backward, for one stage and
microbatch: B = I + W.  I computes the gradient of the stage's input, and W computes the gradients of its weights.  F&B is the time
of a forward and a backward that overlap.

The docstring of each schedule gives the bubble (the time that a device waits in a step) and the largest number of activations that
a device holds at once.  An activation is all that one stage keeps of one microbatch.  Table 2 of arXiv 2412.19437 has the formulas
of `1f1b`, `zb1p` and `dualpipe`.  The formula of `dualpipev` is in the README of github.com/deepseek-ai/DualPipe.

A cell of a table holds no operation, one operation, or the two operations of an overlapped pair F&B.  A message that is
sent in one tick can be used `latency` ticks later.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from mhc_jax.errors import InputError, one_of, require

KINDS = ("F", "B", "I", "W")


class Op(NamedTuple):
    """One operation of one microbatch on one device."""

    kind: str
    """The kind of operation: `F`, `B`, `I` or `W`."""
    microbatch: int
    chunk: int
    """Number of the stage among the stages of the device, from 0."""
    receives: int | None = None
    """The device of the neighbouring stage that makes the operand.  It may be this device.  None: no other stage makes it."""
    sends: int | None = None
    """The device of the neighbouring stage that needs the result.  It may be this device.  None: no other stage needs it."""

    def __str__(self) -> str:
        return f"{self.kind} of microbatch {self.microbatch}, chunk {self.chunk}"


class Place(NamedTuple):
    """Where a stage is computed: the device, and the number of the stage among those of the device (chunk)."""

    device: int
    chunk: int


Cell = tuple[Op, ...]
Order = list[list[tuple[str, int, int]]]
"""The cells that one device runs, in order.  Each cell is a list of operations (kind, microbatch, chunk)."""


@dataclass(frozen=True)
class Schedule:
    """A table of the operations of each device and tick, with the routes of microbatches through the devices."""

    name: str
    devices: int
    """Number of devices along the stage axis, P."""
    microbatches: int
    """Number of microbatches, M."""
    routes: tuple[tuple[Place, ...], ...]
    """One route for each direction in which microbatches travel.  It lists the places (device, chunk) of stages 0, 1, ..."""
    route_of: tuple[int, ...]
    """For each microbatch, the index in `routes` of the route that it takes."""
    bound: tuple[int, ...]
    """For each device, the number of activations that it may hold at once.  Each is of one stage and one microbatch."""
    table: tuple[tuple[Cell, ...], ...]
    """The cell of each tick and device, indexed as `table[tick][device]`."""
    latency: int = 1
    """Number of ticks from the tick that sends a message to the first tick that can use it.  1: devices wait for messages between
    two ticks.  2: messages travel while the next tick computes."""

    @property
    def stages(self) -> int:
        """Return the number of stages into which the model is cut."""
        return len(self.routes[0])

    @property
    def chunks(self) -> int:
        """Return the number of stages that a device holds, v."""
        return 1 + max(place.chunk for route in self.routes for place in route)

    @property
    def stage_of(self) -> dict[Place, int]:
        """Return a dict from each place (device, chunk) to the number of the stage that is computed there."""
        return {place: stage for route in self.routes for stage, place in enumerate(route)}

    def wiring_of(self, device: int, op: Op) -> Wiring:
        """Return the stage, neighbours and dependencies of an operation that `table` gives to `device`."""
        return wiring(self.routes[self.route_of[op.microbatch]])[op.kind, Place(device, op.chunk)]


class Wiring(NamedTuple):
    """The stage of an operation, the devices that make its operand and need its result, and what must come before it."""

    stage: int
    receives: int | None
    """The device that makes the operand, as in `Op.receives`."""
    sends: int | None
    """The device that needs the result, as in `Op.sends`."""
    needs: tuple[tuple[str, int, bool], ...]
    """The operations of the same microbatch that must come before this one, as (kind, stage, whether another device does it).

    The kind B stands for B or I."""


@functools.lru_cache(maxsize=64)
def wiring(route: tuple[Place, ...]) -> dict[tuple[str, Place], Wiring]:
    """Return a dict from (kind of operation, place) to the `Wiring` of this operation, for all places of one route."""
    out = {}
    for stage, place in enumerate(route):
        before = route[stage - 1].device if stage > 0 else None
        after = route[stage + 1].device if stage + 1 < len(route) else None
        earlier = () if before is None else (("F", stage - 1, before != place.device),)
        later = () if after is None else (("B", stage + 1, after != place.device),)
        out["F", place] = Wiring(stage, before, after, earlier)
        out["B", place] = out["I", place] = Wiring(stage, after, before, (("F", stage, False), *later))
        out["W", place] = Wiring(stage, None, None, (("B", stage, False),))
    return out


class Plan(NamedTuple):
    """A schedule whose ticks are not known yet: it gives the order of operations on each device."""

    orders: Sequence[Order]
    """For each device, its cells in the order in which it runs them."""
    routes: Sequence[Sequence[Place]]
    """The routes, as in `Schedule`.  `route_of` and `bound` are as in `Schedule` too."""
    route_of: Sequence[int]
    bound: Sequence[int]


def lay_out(name: str, plan: Plan, latency: int = 1) -> Schedule:
    """Make the schedule of a plan.  Each device runs its cells in order, each in the first tick in which the operands are there.

    Raises:
      InputError: cells of the plan wait for each other for ever.  `name` names the plan in the message.
    """
    P = len(plan.orders)
    routes = tuple(tuple(route) for route in plan.routes)
    done: dict[tuple[str, int, int], int] = {}
    position, table = [0] * P, []
    while any(position[d] < len(plan.orders[d]) for d in range(P)):
        row, finished = [], {}
        for d in range(P):
            cell = plan.orders[d][position[d]] if position[d] < len(plan.orders[d]) else []
            wires = [wiring(routes[plan.route_of[m]])[kind, Place(d, chunk)] for kind, m, chunk in cell]
            ready = all(
                (need, m, stage) in done and done[need, m, stage] + (latency if far else 1) <= len(table)
                for (_, m, _), wire in zip(cell, wires, strict=True)
                for need, stage, far in wire.needs
            )
            row.append(())
            if cell and ready:
                position[d] += 1
                row[d] = tuple(Op(*op, wire.receives, wire.sends) for op, wire in zip(cell, wires, strict=True))
                for (kind, m, _), wire in zip(cell, wires, strict=True):
                    finished["B" if kind == "I" else kind, m, wire.stage] = len(table)
        done |= finished
        table.append(tuple(row))
        if len(table) > latency and not any(any(cells) for cells in table[-latency - 1 :]):
            waiting = {d: plan.orders[d][k] for d, k in enumerate(position) if k < len(plan.orders[d])}
            raise InputError(f"The order of {name} never ends: by device, {waiting} wait for each other.")
    return Schedule(name, P, len(plan.route_of), routes, tuple(plan.route_of), tuple(plan.bound), tuple(table), latency)


# ---------------------------------------------------------------------------------------------------------- generators


def gpipe(P: int, M: int) -> Plan:
    r"""GPipe (Huang et al., arXiv 1811.06965, section 2.2): all forwards, then all backwards.

    Bubble: $(P - 1)(F + B)$.  A device holds at most $M$ activations.
    """
    order = [[("F", m, 0)] for m in range(M)] + [[("B", m, 0)] for m in range(M)]
    return Plan([order] * P, [_line(P)], [0] * M, [M] * P)


def one_f_one_b(P: int, M: int) -> Plan:
    r"""1F1B (PipeDream-Flush; Narayanan et al., arXiv 2104.04473, section 2.2.1).

    Device $d$ begins with $P - 1 - d$ forwards, and then alternates one forward and one backward.
    Bubble: $(P - 1)(F + B)$.  Device $d$ holds at most $P - d$ activations.
    """
    orders = [_alternate([("F", m, 0) for m in range(M)], [("B", m, 0) for m in range(M)], P - 1 - d) for d in range(P)]
    return Plan(orders, [_line(P)], [0] * M, [P - d for d in range(P)])


def interleaved(P: int, M: int, v: int = 2) -> Plan:
    r"""Interleaved 1F1B (Narayanan et al., arXiv 2104.04473, section 2.2.2): device $d$ holds stages $cP + d$ for $c < v$.

    Bubble: $(P - 1)(F + B)$, where the times F and B of a stage are $1 / v$ of those under `1f1b`.
    Device $d$ holds at most $\min(2(P - d - 1) + (v - 1)P + 1,\; Mv)$ activations.

    Raises:
      InputError: v is less than 2, or M is not a multiple of P.
    """
    require(v >= 2, f"The schedule 'interleaved' has {v} chunks a device; use at least 2, or '1f1b'.")
    require(
        M % P == 0, f"'interleaved' needs a multiple of {P} microbatches on {P} devices, not {M}; use {-(-M // P) * P}."
    )
    turns = [(k // (P * v) * P + k % P, k % (P * v) // P) for k in range(M * v)]
    forward = [("F", m, c) for m, c in turns]
    backward = [("B", m, v - 1 - c) for m, c in turns]
    warm = [min(2 * (P - d - 1) + (v - 1) * P, M * v) for d in range(P)]
    route = [Place(d, c) for c in range(v) for d in range(P)]
    return Plan([_alternate(forward, backward, w) for w in warm], [route], [0] * M, [min(w + 1, M * v) for w in warm])


def zb1p(P: int, M: int) -> Plan:
    r"""ZB-H1 (Qi et al., arXiv 2401.10241, section 2.1), which arXiv 2412.19437 calls ZB1P.

    The order is that of `1f1b`, with I instead of B.  Device $d$ postpones up to $d$ weight gradients (W), and computes them after
    its last forward, where it would otherwise wait.  Bubble: $(P - 1)(F + B - 2W)$.  A device holds at most $P$ activations.
    """
    orders = []
    for d in range(P):
        order: Order = []
        waiting: deque[int] = deque()
        for cell in _alternate([("F", m, 0) for m in range(M)], [("I", m, 0) for m in range(M)], P - 1 - d):
            ((kind, m, _),) = cell
            order.append(cell)
            if kind == "I":
                waiting.append(m)
                # After its last F the device would wait before every I.  Here a W fills each of these waits.
                if len(waiting) > d or m >= M - (P - 1 - d) - 1:
                    order.append([("W", waiting.popleft(), 0)])
        orders.append(order + [[("W", m, 0)] for m in waiting])
    return Plan(orders, [_line(P)], [0] * M, [P] * P)


def dualpipe(P: int, M: int) -> Plan:
    r"""DualPipe (DeepSeek-V3, arXiv 2412.19437, section 3.2.1, Figure 5 and Table 2).

    Half of the microbatches enter at device 0, and the other half at device $P - 1$.  A forward of one direction overlaps a
    backward of the other direction.  Device $d$ holds stage $d$ (chunk 0) and stage $P - 1 - d$ (chunk 1), so that there are two
    copies of the parameters.  Bubble: $(P / 2 - 1)(F\&B + B - 3W)$ if $F = I = W$, and at most as long for other times.  A device
    holds at most $P + 1$ activations.

    Raises:
      InputError: P or M is odd.
    """
    require(P % 2 == 0, f"'dualpipe' has {P} devices; it needs an even number, one half for each direction.")
    require(M % 2 == 0, f"'dualpipe' has {M} microbatches; it needs an even number, one half for each direction.")
    half, orders = M // 2, []
    for d in range(P):
        near = int(d >= P // 2)  # direction and chunk of the microbatches that enter at the end nearer to this device
        first = [near * half, (1 - near) * half]
        cells = _dual_order(P // 2, min(d, P - 1 - d), half)
        orders.append([[(kind, first[phase] + k, phase ^ near) for kind, k, phase in cell] for cell in cells])
    back = [Place(P - 1 - stage, 1) for stage in range(P)]
    return Plan(orders, [_line(P), back], [0] * half + [1] * half, [P + 1] * P)


def dualpipev(P: int, M: int) -> Plan:
    r"""DualPipeV (Sea AI Lab's "cut in half", in github.com/deepseek-ai/DualPipe): `dualpipe` with its two directions joined.

    P devices hold 2P stages: device $d$ holds stage $d$ (chunk 0) and stage $2P - 1 - d$ (chunk 1).  The formulas are those of
    `dualpipe` with $2P$ in place of $P$.  Bubble: $(P - 1)(F\&B + B - 3W)$ if $F = I = W$, and at most as long for other times.
    A device holds at most $2P + 1$ activations.
    """
    route = [*_line(P), *(Place(d, 1) for d in reversed(range(P)))]
    return Plan([_dual_order(P, d, M) for d in range(P)], [route], [0] * M, [2 * P + 1] * P)


SCHEDULES: dict[str, Callable[..., Plan]] = {
    "gpipe": gpipe,
    "1f1b": one_f_one_b,
    "interleaved": interleaved,
    "zb1p": zb1p,
    "dualpipe": dualpipe,
    "dualpipev": dualpipev,
}
DEFAULT_CHUNKS = {"gpipe": 1, "1f1b": 1, "interleaved": 2, "zb1p": 1, "dualpipe": 2, "dualpipev": 2}
"""Number of stages that a device holds under each schedule.  Only `interleaved` can be given another number."""
_FEWEST = {"gpipe": 0, "1f1b": 1, "interleaved": 1, "zb1p": 1, "dualpipe": 2, "dualpipev": 2}
"""Least number of microbatches of each schedule, as a multiple of the number of devices.  0: one microbatch is enough."""


def make(name: str, devices: int, microbatches: int, chunks: int = 0, latency: int = 1) -> Schedule:
    """Make a schedule by name.

    Args:
      name: one of `SCHEDULES`.
      devices: number of devices along the stage axis, P.
      microbatches: number of microbatches, M.
      chunks: number of stages that a device holds.  0 means the number in `DEFAULT_CHUNKS`; only `interleaved` takes another.
      latency: number of ticks from sending a message to its first use, as in `Schedule`.

    Raises:
      InputError: there is no schedule of this name, or the numbers do not fit it.
    """
    one_of("The schedule", name, SCHEDULES)
    fewest = max(1, _FEWEST[name] * devices)
    require(devices >= 2, f"The schedule {name!r} has {devices} devices; a pipeline needs at least 2.")
    require(
        microbatches >= fewest,
        f"{microbatches} microbatches are too few for {name!r} on {devices} devices; use at least {fewest}.",
    )
    require(
        name == "interleaved" or chunks in (0, DEFAULT_CHUNKS[name]),
        f"The number of chunks of {name!r} is fixed; leave it 0, or use 'interleaved'.",
    )
    more = (chunks,) if name == "interleaved" and chunks else ()
    return lay_out(name, SCHEDULES[name](devices, microbatches, *more), latency)


def stage_count(name: str, devices: int, chunks: int = 0) -> int:
    """Return the number of stages into which the schedule cuts the model.  The arguments are those of `make`."""
    one_of("The schedule", name, SCHEDULES)
    return devices * {"interleaved": chunks or 2, "dualpipev": 2}.get(name, 1)


def _line(P: int) -> list[Place]:
    return [Place(d, 0) for d in range(P)]


def _alternate(forward: Sequence[tuple], backward: Sequence[tuple], warm: int) -> Order:
    """Return the order of operations: `warm` forwards, then a forward and a backward in turn, then the remaining backwards."""
    head, rest = forward[:warm], forward[warm:]
    pairs = [[op] for pair in zip(rest, backward, strict=False) for op in pair]
    return [[op] for op in head] + pairs + [[op] for op in backward[len(rest) :]]


def _dual_order(half: int, h: int, count: int) -> Order:
    """Return the order of one device's cells under DualPipe, in eight steps that are numbered as in DeepSeek's code.

    Args:
      half: number of devices from one end of the pipeline to its middle.
      h: number of this device, counted from 0 at the nearer end.
      count: number of microbatches of each direction.

    Returns:
      Cells of operations (kind, number among the microbatches of its direction, direction).  Microbatches of direction 0 enter at
      the end of the pipeline from which h counts.
    """
    order: Order = []
    numbers = {(kind, direction): iter(range(count)) for kind in "FB" for direction in (0, 1)}
    waiting: deque[tuple[int, int]] = deque()

    def add(*cell: tuple[str, int]) -> None:
        order.append([])
        for kind, direction in cell:
            k = next(numbers["F" if kind == "F" else "B", direction])
            order[-1].append((kind, k, direction))
            if kind == "I":
                waiting.append((k, direction))

    def add_w() -> None:
        order.append([("W", *waiting.popleft())])

    far = half - h - 1
    for _ in range(2 * far):  # step 1: forwards of direction 0
        add(("F", 0))
    for _ in range(h + 1):  # step 2: forwards of both directions in turn
        add(("F", 0))
        add(("F", 1))
    for _ in range(far):  # step 3: I, W and a forward of direction 1
        add(("I", 1))
        add_w()
        add(("F", 1))
    for i in range(count - 2 * half + h + 1):  # step 4, the main step: pairs of opposite directions
        if i == 0 and far == 0:  # no pair here, as in DeepSeek's code, so that B need not wait for F
            add(("F", 0))
            add(("B", 1))
        else:
            add(("F", 0), ("B", 1))
        add(("F", 1), ("B", 0))
    for _ in range(far):  # step 5: a backward of direction 1, then a pair
        add(("B", 1))
        add(("F", 1), ("B", 0))
    for i in range(2 * (h + 1)):  # step 6: backwards of both directions in turn, the second half of them without W
        add(("I" if i > h else "B", 1 - i % 2))
    for _ in range(far):  # step 7: a W that was left, then an I of direction 0
        add_w()
        add(("I", 0))
    for _ in range(h + 1):  # step 8: all W that are left
        add_w()
    return order
