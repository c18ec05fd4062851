"""Schedules of pipeline parallelism as tables of ticks x devices: pure functions of (stages, microbatches, chunks).

    gpipe         all forwards, then all backwards (Huang et al., arXiv 1811.06965)
    1f1b          one forward, one backward (Narayanan et al., arXiv 2104.04473)
    interleaved   1f1b with `chunks` parts of the model a device (same paper)
    zb1p          1f1b with the backward split; W fills the bubble (ZB-H1 of Qi et al., arXiv 2401.10241)
    dualpipe      half of the microbatches enter at either end; every device holds two stages (DeepSeek-V3, arXiv 2412.19437)
    dualpipev     its two directions laid end to end: twice as many stages as devices, in a V (deepseek-ai/DualPipe)

Kinds of operations: F forward, B backward (both gradients), I the gradient of the stage's input alone, W that of its weights alone.
A cell holds none, one, or the two of an overlapped pair F&B.  A message that is sent in a tick can be used `latency` ticks later.
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
    """`F`, `B`, `I` or `W`."""
    microbatch: int
    chunk: int
    """Which of the device's parts of the model."""
    receives: int | None = None
    """Device that what it needs comes from; its own: from memory; None: from the batch, the loss, or (W) from its own I."""
    sends: int | None = None
    """Device that its result goes to; its own: stays in memory; None: nowhere."""

    def __str__(self) -> str:
        return f"{self.kind} of microbatch {self.microbatch}, chunk {self.chunk}"


class Place(NamedTuple):
    """Where a stage is."""

    device: int
    chunk: int


Cell = tuple[Op, ...]
Order = list[list[tuple[str, int, int]]]
"""Of one device: cells of (kind, microbatch, chunk)."""


@dataclass(frozen=True)
class Schedule:
    """A table and what it is about."""

    name: str
    devices: int
    """P, along the stage axis."""
    microbatches: int
    """M."""
    routes: tuple[tuple[Place, ...], ...]
    """Where the stages 0, 1, ... of the model are, once for each direction."""
    route_of: tuple[int, ...]
    """Of each microbatch."""
    bound: tuple[int, ...]
    """Activations of one stage and microbatch that each device has room for."""
    table: tuple[tuple[Cell, ...], ...]
    """[ticks][devices]."""
    latency: int = 1
    """1: a message is waited for; 2: it travels while the next tick computes."""

    @property
    def stages(self) -> int:
        """Parts that the model is cut into."""
        return len(self.routes[0])

    @property
    def chunks(self) -> int:
        """Stages that a device holds."""
        return 1 + max(place.chunk for route in self.routes for place in route)

    @property
    def stage_of(self) -> dict[Place, int]:
        """The stage at every place."""
        return {place: stage for route in self.routes for stage, place in enumerate(route)}


class Wiring(NamedTuple):
    """What surrounds an operation on a route."""

    stage: int
    receives: int | None
    sends: int | None
    """See `Op`."""
    needs: tuple[tuple[str, int, bool], ...]
    """(kind, stage, whether that is on another device) of what must be done before; B stands for I too."""


@functools.lru_cache(maxsize=64)
def wiring(route: tuple[Place, ...]) -> dict[tuple[str, Place], Wiring]:
    """Of every kind of operation at every place of a route."""
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


def lay_out(
    name: str,
    orders: Sequence[Order],
    routes: Sequence[Sequence[Place]],
    route_of: Sequence[int],
    bound: Sequence[int],
    latency: int = 1,
) -> Schedule:
    """Every cell in the first tick in which what it needs is there; each device keeps the order it is given.

    Raises:
      InputError: cells wait for each other.
    """
    P, M = len(orders), len(route_of)
    routes = tuple(tuple(route) for route in routes)
    wires = [wiring(route) for route in routes]
    done: dict[tuple[str, int, int], int] = {}
    at, table = [0] * P, []
    while any(at[d] < len(orders[d]) for d in range(P)):
        tick, row, finished = len(table), [], {}
        for d in range(P):
            cell = orders[d][at[d]] if at[d] < len(orders[d]) else []
            ops = []
            for kind, m, chunk in cell:
                wire = wires[route_of[m]][kind, Place(d, chunk)]
                for need, stage, far in wire.needs:
                    if done.get((need, m, stage), tick) + (latency if far else 1) > tick:
                        break
                else:
                    ops.append(Op(kind, m, chunk, wire.receives, wire.sends))
                    finished["B" if kind == "I" else kind, m, wire.stage] = tick
            whole = len(ops) == len(cell)
            row.append(tuple(ops) if whole else ())
            at[d] += whole and bool(cell)
            if not whole:
                for op in ops:
                    del finished[
                        op.kind, op.microbatch, wires[route_of[op.microbatch]][op.kind, Place(d, op.chunk)].stage
                    ]
        done |= finished
        table.append(tuple(row))
        if len(table) > latency and not any(any(cells) for cells in table[-latency - 1 :]):
            waiting = {d: orders[d][at[d]] for d in range(P) if at[d] < len(orders[d])}
            raise InputError(f"The order of {name} never ends: by device, {waiting} wait for each other.")
    return Schedule(name, P, M, routes, tuple(route_of), tuple(bound), tuple(table), latency)


# -- the generators


def gpipe(stages: int, microbatches: int, chunks: int = 1, latency: int = 1) -> Schedule:
    """Bubble (P - 1)(F + B), as 1f1b's, and M activations a device."""
    _check("gpipe", stages, microbatches, 1, chunks)
    P, M = stages, microbatches
    order = [[("F", m, 0)] for m in range(M)] + [[("B", m, 0)] for m in range(M)]
    return lay_out("gpipe", [order] * P, [_line(P)], [0] * M, [M] * P, latency)


def one_f_one_b(stages: int, microbatches: int, chunks: int = 1, latency: int = 1) -> Schedule:
    """Bubble (P - 1)(F + B); device d holds P - d activations."""
    _check("1f1b", stages, microbatches, stages, chunks)
    P, M = stages, microbatches
    orders = [_alternate([("F", m, 0) for m in range(M)], [("B", m, 0) for m in range(M)], P - 1 - d) for d in range(P)]
    return lay_out("1f1b", orders, [_line(P)], [0] * M, [P - d for d in range(P)], latency)


def interleaved(stages: int, microbatches: int, chunks: int = 2, latency: int = 1) -> Schedule:
    """Stage c P + d is chunk c of device d.  Bubble (P - 1)(F + B) of one chunk; at most 2(P - d - 1) + (chunks - 1)P + 1."""
    P, M, v = stages, microbatches, chunks
    require(v >= 2, f"The schedule 'interleaved' has {v} chunks a device; use at least 2, or '1f1b'.")
    _check("interleaved", P, M, P, 1)
    require(
        M % P == 0, f"{M} microbatches are no multiple of {P} stages, which 'interleaved' needs; use {-(-M // P) * P}."
    )
    turns = [(k // (P * v) * P + k % P, k % (P * v) // P) for k in range(M * v)]
    forward = [("F", m, c) for m, c in turns]
    backward = [("B", m, v - 1 - c) for m, c in turns]
    warm = [min(2 * (P - d - 1) + (v - 1) * P, M * v) for d in range(P)]
    route = [Place(d, c) for c in range(v) for d in range(P)]
    bound = [min(w + 1, M * v) for w in warm]
    return lay_out("interleaved", [_alternate(forward, backward, w) for w in warm], [route], [0] * M, bound, latency)


def zb1p(stages: int, microbatches: int, chunks: int = 1, latency: int = 1) -> Schedule:
    """Bubble (P - 1)(F + B - 2W), with B = I + W, and P activations: device d puts off d weight gradients."""
    _check("zb1p", stages, microbatches, stages, chunks)
    P, M = stages, microbatches
    orders = []
    for d in range(P):
        order: Order = []
        waiting: deque[int] = deque()
        for (cell,) in _alternate([("F", m, 0) for m in range(M)], [("I", m, 0) for m in range(M)], P - 1 - d):
            order.append([cell])
            if cell[0] == "I":
                waiting.append(cell[1])
                # Behind the last F there is a bubble before every I, which a W fills.
                if len(waiting) > d or cell[1] >= M - (P - 1 - d) - 1:
                    order.append([("W", waiting.popleft(), 0)])
        orders.append(order + [[("W", m, 0)] for m in waiting])
    return lay_out("zb1p", orders, [_line(P)], [0] * M, [P] * P, latency)


def dualpipe(stages: int, microbatches: int, chunks: int = 2, latency: int = 1) -> Schedule:
    """Device d holds stage d (chunk 0) and stage P - 1 - d (chunk 1), for the microbatches that enter at the other end.

    Bubble (P/2 - 1)(F&B + B - 3W), P + 1 activations.
    """
    P, M = stages, microbatches
    require(P % 2 == 0, f"'dualpipe' has {P} stages; it needs an even number, one half for each direction.")
    require(M % 2 == 0, f"'dualpipe' has {M} microbatches; it needs an even number, one half for each direction.")
    _check("dualpipe", P, M, 2 * P, chunks - 1)
    orders = []
    for d in range(P):
        near = int(d >= P // 2)  # the chunk whose stages come first on this side
        first = [near * (M // 2), (1 - near) * (M // 2)]
        own = _dual_order(P // 2, min(d, P - 1 - d), M // 2)
        orders.append([[(kind, first[phase] + k, phase ^ near) for kind, k, phase in cell] for cell in own])
    there = [Place(d, 0) for d in range(P)]
    back = [Place(P - 1 - s, 1) for s in range(P)]
    route_of = [0] * (M // 2) + [1] * (M // 2)
    return lay_out("dualpipe", orders, [there, back], route_of, [P + 1] * P, latency)


def dualpipev(stages: int, microbatches: int, chunks: int = 2, latency: int = 1) -> Schedule:
    """On P devices 2P stages: device d holds stage d (chunk 0) and stage 2P - 1 - d (chunk 1).

    Bubble (P - 1)(F&B + B - 3W), 2P + 1 activations: dualpipe's formulas with PP = 2P stages.
    """
    P, M = stages, microbatches
    _check("dualpipev", P, M, 2 * P, chunks - 1)
    orders = [_dual_order(P, d, M) for d in range(P)]
    route = [Place(d, 0) for d in range(P)] + [Place(P - 1 - k, 1) for k in range(P)]
    return lay_out("dualpipev", orders, [route], [0] * M, [2 * P + 1] * P, latency)


SCHEDULES: dict[str, Callable[..., Schedule]] = {
    "gpipe": gpipe,
    "1f1b": one_f_one_b,
    "interleaved": interleaved,
    "zb1p": zb1p,
    "dualpipe": dualpipe,
    "dualpipev": dualpipev,
}
DEFAULT_CHUNKS = {"gpipe": 1, "1f1b": 1, "interleaved": 2, "zb1p": 1, "dualpipe": 2, "dualpipev": 2}


def make(name: str, stages: int, microbatches: int, chunks: int = 0, latency: int = 1) -> Schedule:
    """A schedule by name.

    Args:
      name: one of `SCHEDULES`.
      stages: P, devices along the stage axis.
      microbatches: M.
      chunks: stages a device holds; 0: the schedule's own number.
      latency: see `Schedule`.

    Raises:
      InputError: no such schedule, or one that these numbers do not fit.
    """
    one_of("The schedule", name, SCHEDULES)
    return SCHEDULES[name](stages, microbatches, chunks or DEFAULT_CHUNKS[name], latency)


def stage_count(name: str, stages: int, chunks: int = 0) -> int:
    """Parts that the model is cut into: P, but for what lays several along one device."""
    one_of("The schedule", name, SCHEDULES)
    return stages * {"interleaved": chunks or 2, "dualpipev": 2}.get(name, 1)


def _check(name: str, stages: int, microbatches: int, least: int, chunks: int) -> None:
    require(stages >= 2, f"The schedule {name!r} has {stages} stages; a pipeline needs at least 2.")
    require(
        microbatches >= least,
        f"{microbatches} microbatches are too few for {name!r} with {stages} stages; use at least {least}.",
    )
    require(chunks == 1, f"The number of chunks of {name!r} is fixed; leave it 0, or use 'interleaved'.")


def _line(P: int) -> list[Place]:
    return [Place(d, 0) for d in range(P)]


def _alternate(forward: Sequence[tuple], backward: Sequence[tuple], warm: int) -> Order:
    """`warm` forwards, then one forward and one backward in turn, then the backwards that are left."""
    head, rest = forward[:warm], forward[warm:]
    pairs = [[cell] for pair in zip(rest, backward, strict=False) for cell in pair]
    return [[cell] for cell in head] + pairs + [[cell] for cell in backward[len(rest) :]]


def _dual_order(half: int, h: int, count: int) -> Order:
    """The eight steps of DualPipe for the h-th device from its end of `half`, `count` microbatches in each phase.

    Phase 0 is the direction that begins at this end, phase 1 the other; cells are (kind, number in the phase, phase).  Of the
    backwards of step 6 the second half puts its W off to steps 7 and 8.
    """
    order: Order = []
    given = {(kind, phase): iter(range(count)) for kind in "FB" for phase in (0, 1)}
    waiting: deque[tuple[int, int]] = deque()

    def one(kind: str, phase: int) -> tuple[str, int, int]:
        k = next(given["F" if kind == "F" else "B", phase])
        if kind == "I":
            waiting.append((k, phase))
        return kind, k, phase

    def add(*cell: tuple[str, int]) -> None:
        order.append([one(*op) for op in cell])

    def add_w() -> None:
        order.append([("W", *waiting.popleft())])

    far = half - h - 1
    for _ in range(2 * far):
        add(("F", 0))
    for _ in range(h + 1):
        add(("F", 0))
        add(("F", 1))
    for _ in range(far):
        add(("I", 1))
        add_w()
        add(("F", 1))
    for i in range(count - 2 * half + h + 1):
        if i == 0 and far == 0:  # apart, as in DeepSeek's code: B need not wait for F here
            add(("F", 0))
            add(("B", 1))
        else:
            add(("F", 0), ("B", 1))
        add(("F", 1), ("B", 0))
    for _ in range(far):
        add(("B", 1))
        add(("F", 1), ("B", 0))
    for i in range(2 * (h + 1)):
        add(("I" if i > h else "B", 1 - i % 2))
    for _ in range(far):
        add_w()
        add(("I", 0))
    for _ in range(h + 1):
        add_w()
    return order
