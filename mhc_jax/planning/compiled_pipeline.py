"""The costs of the operations of a compiled pipelined train step, and whether its messages hide behind other work.

The compiled program is a loop over ticks, with one `conditional` for each phase of a tick (`pipeline.executor`).  A branch is here
one of the computations that a conditional chooses from.  Each operation is such a branch, and the schedule says in which ticks a
device takes it.  In totals of the program each branch is therefore weighted by how often an average device takes it.  The time
that devices wait for each other is simulated from the costs of the branches.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mhc_jax.cost.hlo import Instruction, Program, arrays
from mhc_jax.pipeline.executor import delivery_scope, phase_scope
from mhc_jax.pipeline.program import Operation, compile_table
from mhc_jax.pipeline.stage import FIRST, LAST
from mhc_jax.pipeline_schedules.simulate import Costs, simulate
from mhc_jax.pipeline_schedules.tables import Schedule

Cost = Callable[[Program], float]
"""A function that returns the cost of one run of a program, in any unit."""


@dataclass(frozen=True)
class Message:
    """A message that devices exchange in every tick: a `collective-permute` of the compiled program."""

    bytes: int
    """Size of the message in bytes on one device."""
    asynchronous: bool
    """Whether the message is compiled into two instructions, its start and its end, so that work can run in between."""
    hidden: bool
    """Whether the message costs no time, because other work runs between its start and its end.

    This work is either all phases of the tick, or instructions that take at least as long as the message.
    """


class CompiledPipeline:
    """The compiled program of a train step with a pipeline, divided into the operations of the schedule."""

    def __init__(self, program: Program, schedule: Schedule, leading: bool):
        """Find the loop over ticks in a compiled program, and in this loop the conditional of each phase of a tick.

        Args:
          program: the compiled program of a train step.
          schedule: the schedule that the train step follows.
          leading: whether the first stage begins with dense blocks, which the other stages do not have.

        Raises:
          ValueError: the program has no such loop.
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
        """For each phase of a tick, in order, the conditional instruction that runs one of its operations."""

    def _conditionals(self, body: str) -> list[Instruction]:
        """List the conditionals of the phases of a tick in a computation.  Return [] if they do not match the schedule."""
        by_scope = {}
        for instruction in self.program.bodies[body].values():
            if instruction.opcode == "conditional":
                by_scope |= dict.fromkeys(_scopes(instruction), instruction)
        conditionals = [by_scope.get(phase_scope(k)) for k in range(len(self.table.phases))]
        pairs = zip(conditionals, self.table.phases, strict=True)
        fits = all(conditional and len(conditional.branches()) == len(phase) for conditional, phase in pairs)
        return [conditional for conditional in conditionals if conditional] if fits else []

    def weighted(self) -> Program:
        """Return the program such that each branch of a conditional counts as often as an average device takes it in a tick."""
        taken: dict[str, Sequence[float]] = {}
        for k, (conditional, phase) in enumerate(zip(self.phases, self.table.phases, strict=True)):
            column = self.table.columns[f"operation_{k}"]
            taken[conditional.name] = [float((column == position).mean()) for position in range(len(phase))]
        S = self.schedule.stages
        delivered = self._delivery_shares({name: float((c >= 0).mean()) for name, c in self.table.columns.items()})
        return self.program.part(shares={**taken, **delivered, **self._end_shares(1 / S, 1 / S)})

    def costs(self, cost: Cost, send: float) -> Costs:
        """Return the cost of every operation on every stage.  Each cost includes `tick_cost`, and that of delivering its operand.

        Args:
          cost: a function that returns the cost of one run of a program.
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
            """List the cost on each stage of an operation (the other argument is '') or a pair F&B; 0 where it does not occur."""
            out = []
            for stage in range(S):
                leads = has_leading and stage == 0
                branch = branch_of.get(Operation(forward, backward, leads and bool(forward), leads and bool(backward)))
                ends = self._end_shares(float(stage == 0), float(stage == S - 1))
                far = self._delivery_cost(cost, "F") if forward and stage > 0 else 0.0
                far += self._delivery_cost(cost, "B") if backward in ("B", "I") and stage < S - 1 else 0.0
                out.append(tick + far + cost(self.program.part(branch, ends)) if branch else 0.0)
            return out

        F, pairs = on_all_stages("F", ""), on_all_stages("F", "B")
        B, I, W = (on_all_stages("", kind) for kind in "BIW")
        B = [b or i + w for b, i, w in zip(B, I, W, strict=True)]
        ratios = [pair / (f + b) for pair, f, b in zip(pairs, F, B, strict=True) if pair]
        W = [min(w, b) for w, b in zip(W, B, strict=True)]
        return Costs(tuple(F), tuple(B), tuple(W), sum(ratios) / len(ratios) if ratios else 1.0, send)

    def tick_cost(self, cost: Cost) -> float:
        """Return the cost of a tick in which a device does no operation and gets no message.  Such a tick still sends messages."""
        nothing = {conditional.name: [0.0] * len(conditional.branches()) for conditional in self.phases}
        return cost(self.program.part(self.body, nothing | self._delivery_shares({})))

    def _deliveries(self) -> dict[str, Instruction]:
        """Return the conditionals that put a message into a buffer, by the column that names the slot."""
        return {
            column: instruction
            for instruction in self.program.bodies[self.body].values()
            if instruction.opcode == "conditional"
            for column in self.table.columns
            if delivery_scope(column) in _scopes(instruction)
        }

    def _delivery_shares(self, delivered: Mapping[str, float]) -> dict[str, tuple[float, float]]:
        """Return how often the conditionals of deliveries take each branch, if they deliver as often as `delivered` says (or 0)."""
        shares = {column: delivered.get(column, 0.0) for column in self._deliveries()}
        return {one.name: (1.0 - shares[column], shares[column]) for column, one in self._deliveries().items()}

    def _delivery_cost(self, cost: Cost, kind: str) -> float:
        """Return the mean cost of putting a message of a kind, `F` or `B`, into its buffer."""
        own = {"F": "to_self", "B": "to_own_gradients"}[kind]
        puts = [c.branches()[1] for name, c in self._deliveries().items() if name == own or name.endswith(f"_{kind}")]
        return sum(cost(self.program.part(branch)) for branch in puts) / max(1, len(puts))

    def messages(self, seconds: Cost, link: float) -> list[Message]:
        """List the messages that devices exchange in one tick.

        Args:
          seconds: a function that returns the seconds of one run of a program.
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
        """Return a program that consists of `instructions` alone, so that their cost can be computed."""
        part = self.program.part("between", {})
        part.bodies = {**self.program.bodies, "between": {one.name: one for one in instructions}}
        return part

    def _end_shares(self, first: float, last: float) -> dict[str, tuple[float, float]]:
        """Return how often conditionals around work of the first stage alone, or of the last stage alone, take each branch.

        Args:
          first: how often the stage is the first one, from 0 (never) to 1 (always).
          last: how often the stage is the last one, from 0 to 1.

        Returns:
          The shares of the branches (false, true) by the name of the conditional.
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
        """Return JSON values: costs of operations, the bubble of a step simulated with these costs, number and size of messages.

        Args:
          seconds: a function that returns the seconds of one run of a program.
          link: bytes per second from one stage to the next.
          blocks: number of blocks of one stage, which is only written into the result.
        """
        messages, kinds = self.messages(seconds, link), [len(channel.kinds) for channel in self.table.channels]
        message = sum(message.bytes for message in messages) / sum(kinds) / link
        costs = self.costs(seconds, message * max(kinds))
        run = simulate(self.schedule, costs)
        return {
            "schedule": self.schedule.name,
            "stages": self.schedule.stages,
            "blocks": blocks,
            "seconds": {"F": costs.F, "B": costs.B, "W": costs.W, "message": message, "tick": self.tick_cost(seconds)},
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
    """List the names of the `jax.named_scope` in which an instruction was traced, the outermost first."""
    name = re.search(r'op_name="([^"]*)"', instruction.line)
    return name[1].split("/") if name else []
