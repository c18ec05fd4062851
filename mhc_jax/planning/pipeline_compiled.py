"""What the compiler says of a pipelined train step: the cost of each operation, and what its messages hide behind.

The step holds every operation once, as a branch of a conditional in the loop over ticks, one for each phase of a tick (`executor`).
Each device runs what its columns say, so that totals of the program are weighted by how often an average device takes a branch;
what devices wait for each other is simulated with the costs of the branches.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from mhc_jax.cost.hlo import Instruction, Program, arrays
from mhc_jax.pipeline.executor import phase_scope
from mhc_jax.pipeline.program import Operation, compile_table
from mhc_jax.pipeline.stage import FIRST, LAST
from mhc_jax.schedules.simulate import Costs, simulate
from mhc_jax.schedules.tables import Schedule


@dataclass(frozen=True)
class Message:
    """A message that one tick sends and receives (`collective-permute`) in the compiled order."""

    bytes: int
    asynchronous: bool
    """Whether it has a start and an end."""
    hidden: bool
    """Whether all phases of the tick stand between the two, or other work that takes as long as the message."""


class Step:
    """The compiled program of a pipelined step, taken apart."""

    def __init__(self, text: Program, schedule: Schedule, leading: bool):
        """Args: the program, its schedule, and whether the first stage has other blocks.

        Raises:
          ValueError: the program has no loop over ticks.
        """
        self.text, self.schedule = text, schedule
        self.table = compile_table(schedule, leading)
        ticks = len(schedule.table)
        self.body = next(
            (
                loop.called("body")
                for body in text.bodies.values()
                for loop in body.values()
                if loop.opcode == "while" and text.turns(loop) == ticks and self._choices(loop.called("body"))
            ),
            "",
        )
        if not self.body:
            raise ValueError(f"the compiled step has no loop of {ticks} ticks with a choice for each of their phases")
        self.phases = self._choices(self.body)
        """The conditional of each phase."""

    def _choices(self, body: str) -> list[Instruction]:
        """Conditionals of a computation, by phase; empty if they are not those of the schedule."""
        found = {}
        for one in self.text.bodies[body].values():
            if one.opcode == "conditional":
                found |= {name: one for name in _scopes(one) if name.startswith("phase_")}
        own = [found.get(phase_scope(k)) for k in range(len(self.table.phases))]
        fits = all(a and len(a.branches()) == len(b) for a, b in zip(own, self.table.phases, strict=True))
        return [one for one in own if one] if fits else []

    def weighted(self) -> Program:
        """The program, its branches as often as an average device runs them."""
        taken: dict[str, Sequence[float]] = {}
        for k, (one, each) in enumerate(zip(self.phases, self.table.phases, strict=True)):
            column = self.table.columns[f"operation_{k}"]
            taken[one.name] = [float((column == position).mean()) for position in range(len(each))]
        S = self.schedule.stages
        return self.text.part(shares={**taken, **self._ends(1 / S, 1 / S)})

    def costs(self, cost: Callable[[Program], float], send: float) -> Costs:
        """Of every operation on every stage, in the unit of `cost`; a tick's own work counts with each.

        Args:
          cost: of one run of a program.
          send: of a message.
        """
        S, tick = self.schedule.stages, self.between(cost)
        branch = {
            op: name
            for one, each in zip(self.phases, self.table.phases, strict=True)
            for op, name in zip(each, one.branches(), strict=True)
        }

        def of(stage: int, operation: Operation) -> float:
            """0 where it does not occur."""
            leads = any(op.forward_leads or op.backward_leads for op in branch) and stage == 0
            operation = operation._replace(
                forward_leads=leads and bool(operation.forward), backward_leads=leads and bool(operation.backward)
            )
            if operation not in branch:
                return 0.0
            return tick + cost(self.text.part(branch[operation], self._ends(float(stage == 0), float(stage == S - 1))))

        F, B, I, W = ([of(s, op) for s in range(S)] for op in (Operation("F"), *(Operation("", k) for k in "BIW")))
        B = [b or i + w for b, i, w in zip(B, I, W, strict=True)]
        together = [of(s, Operation("F", "B")) for s in range(S)]
        ratios = [t / (f + b) for t, f, b in zip(together, F, B, strict=True) if t]
        W = [min(w, b) for w, b in zip(W, B, strict=True)]
        return Costs(tuple(F), tuple(B), tuple(W), sum(ratios) / len(ratios) if ratios else 1.0, send)

    def between(self, cost: Callable[[Program], float]) -> float:
        """Of a tick without its operation: messages put into buffers."""
        return cost(self.text.part(self.body, {one.name: [0.0] * len(one.branches()) for one in self.phases}))

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
                hidden = all(one in between for one in self.phases) or cost(self._only(between)) >= size / link
                found.append(Message(size, True, hidden))
        return found

    def _only(self, instructions: Sequence[Instruction]) -> Program:
        part = self.text.part("between", {})
        part.bodies = {**self.text.bodies, "between": {one.name: one for one in instructions}}
        return part

    def _ends(self, first: float, last: float) -> dict[str, tuple[float, float]]:
        """Shares of the branches, no and yes, of what the first and the last stage do alone; of yes as given."""
        shares: dict[str, tuple[float, float]] = {}
        for body in self.text.bodies.values():
            for one in body.values():
                scopes = _scopes(one) if one.opcode == "conditional" else []
                if FIRST in scopes or LAST in scopes:
                    yes = first if FIRST in scopes else last
                    shares[one.name] = (1.0 - yes, yes)
        return shares


def _scopes(one: Instruction) -> list[str]:
    """Those an operation was made in."""
    name = re.search(r'op_name="([^"]*)"', one.line)
    return name[1].split("/") if name else []


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
