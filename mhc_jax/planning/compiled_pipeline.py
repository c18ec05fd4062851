"""The costs of the operations of a compiled pipelined train step, and whether its messages hide behind other work.

The program is a loop over ticks, with one conditional for each phase of a tick (`pipeline.executor`).  Every operation stands in it
once, as a branch of a conditional.  The schedule's columns say which branches a device takes.  Totals of the program are therefore
weighted by how often an average device takes a branch.  The waits of devices for each other are simulated with the branches' costs.
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
from mhc_jax.pipeline_schedules.simulate import Costs, simulate
from mhc_jax.pipeline_schedules.tables import Schedule

Cost = Callable[[Program], float]
"""A function that returns the cost of one run of a program, in any unit."""


@dataclass(frozen=True)
class Message:
    """A message that one tick sends and receives, which is a `collective-permute` in the compiled program."""

    bytes: int
    """Size of the message in bytes on one device."""
    asynchronous: bool
    """Whether the compiled message is two instructions, a start and an end."""
    hidden: bool
    """Whether work that covers the message stands between its start and its end: all phases of the tick, or as much time."""


class CompiledPipeline:
    """The compiled program of a pipelined train step, divided into the operations of its schedule."""

    def __init__(self, program: Program, schedule: Schedule, leading: bool):
        """Find the loop over ticks and the conditional of each phase.

        Args:
          program: the program, compiled from a step that follows `schedule`.
          schedule: the schedule of the step.
          leading: whether the first stage has leading blocks, which differ from the blocks of the other stages.

        Raises:
          ValueError: the program has no loop over ticks.
        """
        self.program, self.schedule = program, schedule
        self.table = compile_table(schedule, leading)
        ticks = len(schedule.table)
        self.body = next(
            (
                loop.called("body")
                for body in program.bodies.values()
                for loop in body.values()
                if loop.opcode == "while" and program.turns(loop) == ticks and self._conditionals(loop.called("body"))
            ),
            "",
        )
        if not self.body:
            raise ValueError(f"the compiled step has no loop of {ticks} ticks with a choice for each of their phases")
        self.phases = self._conditionals(self.body)
        """The conditional of each phase of a tick, in order."""

    def _conditionals(self, body: str) -> list[Instruction]:
        """List the conditionals of a computation, one for each phase; an empty list if they do not match the schedule."""
        by_scope = {}
        for instruction in self.program.bodies[body].values():
            if instruction.opcode == "conditional":
                by_scope |= dict.fromkeys(_scopes(instruction), instruction)
        conditionals = [by_scope.get(phase_scope(k)) for k in range(len(self.table.phases))]
        pairs = zip(conditionals, self.table.phases, strict=True)
        fits = all(conditional and len(conditional.branches()) == len(phase) for conditional, phase in pairs)
        return [conditional for conditional in conditionals if conditional] if fits else []

    def weighted(self) -> Program:
        """Return the program with each branch weighted by how often an average device takes it."""
        taken: dict[str, Sequence[float]] = {}
        for k, (conditional, phase) in enumerate(zip(self.phases, self.table.phases, strict=True)):
            column = self.table.columns[f"operation_{k}"]
            taken[conditional.name] = [float((column == position).mean()) for position in range(len(phase))]
        S = self.schedule.stages
        return self.program.part(shares={**taken, **self._end_shares(1 / S, 1 / S)})

    def costs(self, cost: Cost, send: float) -> Costs:
        """Return the cost of every operation on every stage; each operation includes the work of a tick itself.

        Args:
          cost: returns the cost of one run of a program.
          send: cost of one message, in the unit of `cost`.
        """
        S, tick = self.schedule.stages, self.tick_cost(cost)
        branch_of = {
            operation: branch
            for conditional, phase in zip(self.phases, self.table.phases, strict=True)
            for operation, branch in zip(phase, conditional.branches(), strict=True)
        }
        has_leading = any(operation.forward_leads or operation.backward_leads for operation in branch_of)

        def on_all_stages(forward: str, backward: str) -> list[float]:
            """List the costs of an operation on each stage, 0 where the operation does not occur."""
            out = []
            for stage in range(S):
                leads = has_leading and stage == 0
                branch = branch_of.get(Operation(forward, backward, leads and bool(forward), leads and bool(backward)))
                ends = self._end_shares(float(stage == 0), float(stage == S - 1))
                out.append(tick + cost(self.program.part(branch, ends)) if branch else 0.0)
            return out

        F, pairs = on_all_stages("F", ""), on_all_stages("F", "B")
        B, I, W = (on_all_stages("", kind) for kind in "BIW")
        B = [b or i + w for b, i, w in zip(B, I, W, strict=True)]
        ratios = [pair / (f + b) for pair, f, b in zip(pairs, F, B, strict=True) if pair]
        W = [min(w, b) for w, b in zip(W, B, strict=True)]
        return Costs(tuple(F), tuple(B), tuple(W), sum(ratios) / len(ratios) if ratios else 1.0, send)

    def tick_cost(self, cost: Cost) -> float:
        """Return the cost of a tick without its operations: the messages that it puts into buffers."""
        nothing = {conditional.name: [0.0] * len(conditional.branches()) for conditional in self.phases}
        return cost(self.program.part(self.body, nothing))

    def messages(self, seconds: Cost, link: float) -> list[Message]:
        """List the messages of one tick.

        Args:
          seconds: returns the seconds of one run of a program.
          link: bytes per second from one stage to the next.
        """
        order = list(self.program.bodies[self.body].values())
        position = {instruction.name: k for k, instruction in enumerate(order)}
        messages = []
        for instruction in order:
            if instruction.opcode == "collective-permute":
                messages.append(Message(sum(arrays(instruction.shape)), False, False))
            if instruction.opcode == "collective-permute-done":
                start = position[instruction.operands[0]]
                size, between = max(arrays(order[start].shape)), order[start + 1 : position[instruction.name]]
                covered = all(conditional in between for conditional in self.phases)
                hidden = covered or seconds(self._only(between)) >= size / link
                messages.append(Message(size, True, hidden))
        return messages

    def _only(self, instructions: Sequence[Instruction]) -> Program:
        """Return a program that holds these instructions alone."""
        part = self.program.part("between", {})
        part.bodies = {**self.program.bodies, "between": {one.name: one for one in instructions}}
        return part

    def _end_shares(self, first: float, last: float) -> dict[str, tuple[float, float]]:
        """Return how often each branch (false, true) runs of the conditionals for the first stage's and the last stage's own work.

        Args:
          first: share of devices that are the first stage, from 0 to 1.
          last: share of devices that are the last stage, from 0 to 1.

        Returns:
          The shares of the two branches, by the conditional's name.
        """
        shares: dict[str, tuple[float, float]] = {}
        for body in self.program.bodies.values():
            for instruction in body.values():
                scopes = _scopes(instruction) if instruction.opcode == "conditional" else []
                if FIRST in scopes or LAST in scopes:
                    yes = first if FIRST in scopes else last
                    shares[instruction.name] = (1.0 - yes, yes)
        return shares

    def describe(self, seconds: Cost, link: float, blocks: int) -> dict[str, Any]:
        """Return JSON values of the operations' costs, of the step simulated with those costs, and of the messages.

        Args:
          seconds: returns the seconds of one run of a program.
          link: bytes per second from one stage to the next.
          blocks: number of blocks of one stage.
        """
        messages = self.messages(seconds, link)
        send = max((message.bytes for message in messages), default=0) / link
        costs = self.costs(seconds, send)
        run = simulate(self.schedule, costs)
        return {
            "schedule": self.schedule.name,
            "stages": self.schedule.stages,
            "blocks": blocks,
            "seconds": {"F": costs.F, "B": costs.B, "W": costs.W, "message": send, "tick": self.tick_cost(seconds)},
            "pair": costs.pair,
            "bubble": max(run.bubble),
            "bubble_fraction": run.bubble_fraction,
            "messages": {
                "a tick": len(messages),
                "asynchronous": sum(message.asynchronous for message in messages),
                "hidden": sum(message.hidden for message in messages),
                "bytes": sum(message.bytes for message in messages),
            },
        }


def _scopes(instruction: Instruction) -> list[str]:
    """List the named scopes in which an instruction's operation was traced, outermost first."""
    name = re.search(r'op_name="([^"]*)"', instruction.line)
    return name[1].split("/") if name else []
