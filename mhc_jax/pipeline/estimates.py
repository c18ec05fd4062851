"""What the compiler says of a pipelined train step: the cost of each operation, and what its messages hide behind.

The step holds every operation once, as a branch of one conditional in the loop over ticks (`executor`).  Each device runs what its
column says, so that totals of the program are weighted by how often an average device takes a branch; what devices wait for each
other is simulated with the costs of the branches.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from mhc_jax.compiled import Instruction, Program, arrays
from mhc_jax.pipeline.program import Operation, compile_table
from mhc_jax.pipeline.schedules import Schedule
from mhc_jax.pipeline.simulate import Costs, simulate
from mhc_jax.pipeline.stage import FIRST, LAST


@dataclass(frozen=True)
class Message:
    """A message that one tick sends and receives (`collective-permute`) in the compiled order."""

    bytes: int
    asynchronous: bool
    """Whether it has a start and an end."""
    hidden: bool
    """Whether the tick's operation stands between the two, or other work that takes as long as the message."""


class Step:
    """The compiled program of a pipelined step, taken apart."""

    def __init__(self, text: Program, schedule: Schedule, leading: bool):
        """Args: the program, its schedule, and whether the first stage has other blocks.

        Raises:
          ValueError: the program has no loop over ticks.
        """
        self.text, self.schedule = text, schedule
        self.table = compile_table(schedule, leading)
        ticks, count = len(schedule.table), len(self.table.operations)
        self.body, self.tick = next(
            (
                (loop.called("body"), one)
                for body in text.bodies.values()
                for loop in body.values()
                if loop.opcode == "while" and text.turns(loop) == ticks
                for one in text.bodies[loop.called("body")].values()
                if one.opcode == "conditional" and len(one.branches()) == count
            ),
            ("", None),
        )
        if self.tick is None:
            raise ValueError(f"the compiled step has no loop of {ticks} ticks with a choice of {count} operations")

    def weighted(self) -> Program:
        """The program, its branches as often as an average device runs them."""
        column = self.table.columns["operation"]
        taken = [float((column == k).mean()) for k in range(len(self.table.operations))]
        S = self.schedule.stages
        return self.text.part(shares={self._name(): taken, **self._ends(1 / S, 1 / S)})

    def costs(self, cost: Callable[[Program], float], send: float) -> Costs:
        """Of every operation on every stage, in the unit of `cost`; a tick's own work counts with each.

        Args:
          cost: of one run of a program.
          send: of a message.
        """
        S, tick = self.schedule.stages, self.between(cost)
        column = dict(zip(self.table.operations, self.tick.branches() if self.tick else (), strict=True))

        def of(stage: int, operation: Operation) -> float:
            """0 where it does not occur."""
            leads = any(op.forward_leads or op.backward_leads for op in column) and stage == 0
            operation = operation._replace(
                forward_leads=leads and bool(operation.forward), backward_leads=leads and bool(operation.backward)
            )
            if operation not in column:
                return 0.0
            return tick + cost(self.text.part(column[operation], self._ends(float(stage == 0), float(stage == S - 1))))

        F, B, I, W = ([of(s, op) for s in range(S)] for op in (Operation("F"), *(Operation("", k) for k in "BIW")))
        B = [b or i + w for b, i, w in zip(B, I, W, strict=True)]
        together = [of(s, Operation("F", "B")) for s in range(S)]
        ratios = [t / (f + b) for t, f, b in zip(together, F, B, strict=True) if t]
        W = [min(w, b) for w, b in zip(W, B, strict=True)]
        return Costs(tuple(F), tuple(B), tuple(W), sum(ratios) / len(ratios) if ratios else 1.0, send)

    def between(self, cost: Callable[[Program], float]) -> float:
        """Of a tick without its operation: messages put into buffers."""
        return cost(self.text.part(self.body, {self._name(): [0.0] * len(self.table.operations)}))

    def messages(self, cost: Callable[[Program], float], link: float) -> list[Message]:
        """Of one tick.

        Args:
          cost: seconds of one run of a program.
          link: bytes per second from one stage to the next.
        """
        order = list(self.text.bodies[self.body].values())
        at = {one.name: k for k, one in enumerate(order)}
        found = []
        for one in order:
            if one.opcode == "collective-permute":
                found.append(Message(sum(arrays(one.shape)), False, False))
            if one.opcode == "collective-permute-done":
                (start,) = one.operands
                size, between = max(arrays(order[at[start]].shape)), order[at[start] + 1 : at[one.name]]
                hidden = self.tick in between or cost(self._only(between)) >= size / link
                found.append(Message(size, True, hidden))
        return found

    def _only(self, instructions: Sequence[Instruction]) -> Program:
        part = self.text.part("between", {})
        part.bodies = {**self.text.bodies, "between": {one.name: one for one in instructions}}
        return part

    def _name(self) -> str:
        assert self.tick is not None
        return self.tick.name

    def _ends(self, first: float, last: float) -> dict[str, tuple[float, float]]:
        """Shares of the branches, no and yes, of what the first and the last stage do alone; of yes as given."""
        shares: dict[str, tuple[float, float]] = {}
        for body in self.text.bodies.values():
            for one in body.values():
                name = re.search(r'op_name="([^"]*)"', one.line)
                if one.opcode == "conditional" and name:
                    scopes = name[1].split("/")
                    if FIRST in scopes or LAST in scopes:
                        yes = first if FIRST in scopes else last
                        shares[one.name] = (1.0 - yes, yes)
        return shares


def described(step: Step, seconds: Callable[[Program], float], link: float, blocks: int) -> dict[str, Any]:
    """JSON of a pipelined step.

    Args:
      step: compiled.
      seconds: of one run of a program.
      link: bytes per second from one stage to the next.
      blocks: of a stage.
    """
    messages = step.messages(seconds, link)
    send = max((one.bytes for one in messages), default=0) / link
    costs = step.costs(seconds, send)
    run = simulate(step.schedule, costs)
    return {
        "schedule": step.schedule.name,
        "stages": step.schedule.stages,
        "blocks": blocks,
        "latency": step.schedule.latency,
        "seconds": {"F": costs.F, "B": costs.B, "W": costs.W, "message": send, "tick": step.between(seconds)},
        "pair": costs.pair,
        "makespan": run.makespan,
        "bubble": max(run.bubble),
        "bubble_fraction": run.bubble_fraction,
        "messages": {
            "a tick": len(messages),
            "asynchronous": sum(one.asynchronous for one in messages),
            "hidden": sum(one.hidden for one in messages),
            "bytes": sum(one.bytes for one in messages),
        },
    }
