r"""Schedules of pipeline parallelism, as tables with a row for each tick and a column for each device.

| name | rule | source |
| --- | --- | --- |
| `gpipe` | all forwards, then all backwards | GPipe, arXiv 1811.06965, section 2.2 |
| `1f1b` | one forward, one backward in turn | PipeDream-Flush; arXiv 2104.04473, section 2.2.1 |
| `interleaved` | `1f1b` with several stages a device | arXiv 2104.04473, section 2.2.2 |
| `zb1p` | `1f1b` whose weight gradients fill the bubble | ZB-H1, arXiv 2401.10241, section 2.1 |
| `dualpipe` | microbatches enter at both ends of the pipeline | DeepSeek-V3, arXiv 2412.19437, section 3.2.1 |
| `dualpipev` | `dualpipe` on half as many devices, whose stages lie in a V | github.com/deepseek-ai/DualPipe |

Letters: P devices along the stage axis, M microbatches, v stages a device (chunks).  F, B, I and W are times of one stage and
microbatch: the forward, the whole backward, and the two parts of the backward, B = I + W.  I computes the gradient of the stage's
input, and W computes the gradients of its weights.  F&B is the time of a forward and a backward that overlap.

The docstring of each schedule gives its bubble (the time that a device waits in a step) and the largest number of activations that
a device holds.  Table 2 of arXiv 2412.19437 has the formulas of `1f1b`, `zb1p` and `dualpipe`.  The formula of `dualpipev` is in
the README of github.com/deepseek-ai/DualPipe.

A cell of a table holds no operation, one operation, or the two operations of an overlapped pair F&B.  A message sent in a tick is
usable `latency` ticks later.
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
    """Position of the stage among the stages of the device."""
    receives: int | None = None
    """The device of the stage that makes the operand, which may be this device.  None if no other stage makes it."""
    sends: int | None = None
    """The device of the stage that needs the result, which may be this device.  None if no other stage needs it."""

    def __str__(self) -> str:
        return f"{self.kind} of microbatch {self.microbatch}, chunk {self.chunk}"


class Place(NamedTuple):
    """The device and the chunk at which a stage is computed."""

    device: int
    chunk: int


Cell = tuple[Op, ...]
Order = list[list[tuple[str, int, int]]]
"""The cells of one device in order.  Each cell is a list of operations (kind, microbatch, chunk)."""


@dataclass(frozen=True)
class Schedule:
    """A table of operations, with the routes that microbatches take through the devices."""

    name: str
    devices: int
    """Number of devices along the stage axis, P."""
    microbatches: int
    """Number of microbatches, M."""
    routes: tuple[tuple[Place, ...], ...]
    """One route for each direction in which microbatches travel.  A route lists the places of stages 0, 1, ... of the model."""
    route_of: tuple[int, ...]
    """For each microbatch, the index in `routes` of the route that it takes."""
    bound: tuple[int, ...]
    """Number of activations, each of one stage and microbatch, for which each device has room."""
    table: tuple[tuple[Cell, ...], ...]
    """The cell of each tick and device, indexed as table[tick][device]."""
    latency: int = 1
    """Number of ticks from sending a message to its first use.  1: devices wait for messages between two ticks.  2: messages
    travel while the next tick computes."""

    @property
    def stages(self) -> int:
        """Return the number of stages into which the model is cut."""
        return len(self.routes[0])

    @property
    def chunks(self) -> int:
        """Return the number of stages that a device holds."""
        return 1 + max(place.chunk for route in self.routes for place in route)

    @property
    def stage_of(self) -> dict[Place, int]:
        """Return the number of the stage at every place."""
        return {place: stage for route in self.routes for stage, place in enumerate(route)}

    def wiring_of(self, device: int, op: Op) -> Wiring:
        """Return the wiring of an operation that the table gives to `device`."""
        return wiring(self.routes[self.route_of[op.microbatch]])[op.kind, Place(device, op.chunk)]


class Wiring(NamedTuple):
    """The stage of an operation, the devices of its neighbours, and the operations on which it depends."""

    stage: int
    receives: int | None
    """As `Op.receives`: the device that makes the operand."""
    sends: int | None
    """As `Op.sends`: the device that needs the result."""
    needs: tuple[tuple[str, int, bool], ...]
    """The operations that must come before, as (kind, stage, whether another device does it).  B means B or I."""


@functools.lru_cache(maxsize=64)
def wiring(route: tuple[Place, ...]) -> dict[tuple[str, Place], Wiring]:
    """Return the wiring of every kind of operation at every place of a route."""
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
    """A schedule before its ticks are known: the order of operations on every device."""

    orders: Sequence[Order]
    """The order of operations on each device."""
    routes: Sequence[Sequence[Place]]
    """The routes, as in `Schedule`.  `route_of` and `bound` are as in `Schedule` too."""
    route_of: Sequence[int]
    bound: Sequence[int]


def lay_out(name: str, plan: Plan, latency: int = 1) -> Schedule:
    """Put every cell of a plan into the first tick in which its operands are there.  Each device keeps its order of cells.

    Raises:
      InputError: cells of the plan wait for each other for ever.
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

    Bubble: $(P - 1)(F + B)$.  Activations of a device: $M$.
    """
    order = [[("F", m, 0)] for m in range(M)] + [[("B", m, 0)] for m in range(M)]
    return Plan([order] * P, [_line(P)], [0] * M, [M] * P)


def one_f_one_b(P: int, M: int) -> Plan:
    r"""1F1B (PipeDream-Flush; Narayanan et al., arXiv 2104.04473, section 2.2.1).

    Device $d$ begins with $P - 1 - d$ forwards, and then alternates one forward and one backward.
    Bubble: $(P - 1)(F + B)$.  Activations of device $d$: $P - d$.
    """
    orders = [_alternate([("F", m, 0) for m in range(M)], [("B", m, 0) for m in range(M)], P - 1 - d) for d in range(P)]
    return Plan(orders, [_line(P)], [0] * M, [P - d for d in range(P)])


def interleaved(P: int, M: int, v: int = 2) -> Plan:
    r"""Interleaved 1F1B (Narayanan et al., arXiv 2104.04473, section 2.2.2): device $d$ holds the stages $cP + d$, $c < v$.

    Bubble: $(P - 1)(F + B)$ with the times of one stage, which are $1 / v$ of those under `1f1b`.
    Activations of device $d$: $\min(2(P - d - 1) + (v - 1)P + 1,\; Mv)$.

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

    The order is that of `1f1b`, with I instead of B.  Device $d$ postpones $d$ weight gradients, and fills the bubble behind its
    last forward with them.  Bubble: $(P - 1)(F + B - 2W)$.  Activations of a device: $P$.
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
                # Behind the last F there is a bubble before every I, which a W fills.
                if len(waiting) > d or m >= M - (P - 1 - d) - 1:
                    order.append([("W", waiting.popleft(), 0)])
        orders.append(order + [[("W", m, 0)] for m in waiting])
    return Plan(orders, [_line(P)], [0] * M, [P] * P)


def dualpipe(P: int, M: int) -> Plan:
    r"""DualPipe (DeepSeek-V3, arXiv 2412.19437, section 3.2.1, Figure 5 and Table 2).

    Half of the microbatches enter at device 0, and the other half at device $P - 1$.  A forward of one direction overlaps a
    backward of the other direction.  Device $d$ therefore holds stage $d$ (chunk 0) and stage $P - 1 - d$ (chunk 1): two copies of
    the parameters.  Bubble: $(P / 2 - 1)(F\&B + B - 3W)$ if $F = I = W$, and at most as long for other times.  Activations of a
    device: $P + 1$.

    Raises:
      InputError: P or M is odd.
    """
    require(P % 2 == 0, f"'dualpipe' has {P} devices; it needs an even number, one half for each direction.")
    require(M % 2 == 0, f"'dualpipe' has {M} microbatches; it needs an even number, one half for each direction.")
    half, orders = M // 2, []
    for d in range(P):
        near = int(d >= P // 2)  # the direction that begins at this device's end; its chunk has the same number
        first = [near * half, (1 - near) * half]
        cells = _dual_order(P // 2, min(d, P - 1 - d), half)
        orders.append([[(kind, first[phase] + k, phase ^ near) for kind, k, phase in cell] for cell in cells])
    back = [Place(P - 1 - stage, 1) for stage in range(P)]
    return Plan(orders, [_line(P), back], [0] * half + [1] * half, [P + 1] * P)


def dualpipev(P: int, M: int) -> Plan:
    r"""DualPipeV (Sea AI Lab's "cut in half", in github.com/deepseek-ai/DualPipe): the directions of `dualpipe`, laid end to end.

    P devices hold 2P stages: device $d$ holds stage $d$ (chunk 0) and stage $2P - 1 - d$ (chunk 1).  The
    formulas are those of `dualpipe` for $PP = 2P$ stages.  Bubble: $(P - 1)(F\&B + B - 3W)$ if $F = I = W$, and at most as long
    for other times.
    Activations of a device: $2P + 1$.
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
"""The least number of microbatches of each schedule, divided by the number of devices.  0 means one microbatch."""


def make(name: str, devices: int, microbatches: int, chunks: int = 0, latency: int = 1) -> Schedule:
    """Make a schedule by name.

    Args:
      name: one of `SCHEDULES`.
      devices: number of devices along the stage axis, P.
      microbatches: number of microbatches, M.
      chunks: number of stages that a device holds.  0 means the number in `DEFAULT_CHUNKS`; only `interleaved` takes another.
      latency: ticks from sending a message to its first use, as in `Schedule`.

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
    """Return the number of stages into which a schedule that `make` makes of these arguments cuts the model."""
    one_of("The schedule", name, SCHEDULES)
    return devices * {"interleaved": chunks or 2, "dualpipev": 2}.get(name, 1)


def _line(P: int) -> list[Place]:
    return [Place(d, 0) for d in range(P)]


def _alternate(forward: Sequence[tuple], backward: Sequence[tuple], warm: int) -> Order:
    """Return an order: `warm` forwards, then one forward and one backward in turn, then the remaining backwards."""
    head, rest = forward[:warm], forward[warm:]
    pairs = [[op] for pair in zip(rest, backward, strict=False) for op in pair]
    return [[op] for op in head] + pairs + [[op] for op in backward[len(rest) :]]


def _dual_order(half: int, h: int, count: int) -> Order:
    """Return the order of one device under DualPipe, in eight steps that are numbered as in DeepSeek's code.

    Args:
      half: number of devices from one end of the pipeline to its middle.
      h: number of this device, counted from 0 at the nearer end.
      count: number of microbatches of each direction.

    Returns:
      Cells of (kind, number among the microbatches of the direction, direction).  Direction 0 begins at the end from which h
      counts.
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
    for _ in range(2 * far):  # step 1
        add(("F", 0))
    for _ in range(h + 1):  # step 2
        add(("F", 0))
        add(("F", 1))
    for _ in range(far):  # step 3
        add(("I", 1))
        add_w()
        add(("F", 1))
    for i in range(count - 2 * half + h + 1):  # step 4, the main one
        if i == 0 and far == 0:  # F and B in separate cells, as in DeepSeek's code: B need not wait for F here
            add(("F", 0))
            add(("B", 1))
        else:
            add(("F", 0), ("B", 1))
        add(("F", 1), ("B", 0))
    for _ in range(far):  # step 5
        add(("B", 1))
        add(("F", 1), ("B", 0))
    for i in range(2 * (h + 1)):  # step 6: the second half does only I, and leaves W to steps 7 and 8
        add(("I" if i > h else "B", 1 - i % 2))
    for _ in range(far):  # step 7
        add_w()
        add(("I", 0))
    for _ in range(h + 1):  # step 8
        add_w()
    return order
