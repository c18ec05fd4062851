"""One SPMD program that computes the loss and the gradients of a decoder under any valid schedule.

The blocks of the decoder are split over the mesh axis `stage`.

The program is a `jax.shard_map` over the axis `stage` alone.  XLA splits the program of each stage over the other axes of the mesh,
as it splits the decoder without stages.

Each device scans over the ticks of the schedule.  Columns of numbers from `program.compile_table` tell it what to do.  In a tick
it runs one operation, which a `jax.lax.switch` for each phase of the tick chooses.  Then the devices exchange boundary tensors
by `jax.lax.ppermute`.  With `pipeline.overlap` the tensors of a tick travel while the next tick computes.

The state of the scan has four buffers.  The columns name the slots of these buffers:

    inputs       boundary tensors that wait for the forward of the stage that they enter
    gradients    gradients of boundary tensors, from their arrival to their last use
    activations  residuals of the VJP of a stage, which a forward keeps for its backward.  The backward recomputes residuals that
                 depend on weights alone, or that cheap primitives make (`split.CHEAP`; in float32 `split.EXACT`).
    deferrals    values that I keeps for W

A boundary tensor holds the streams between two stages, nC elements per token.  A stage writes the output of its last branch before
it sends them, so that neither this output nor coefficients travel, and the next stage begins with coefficients and a read.  Streams
that are one array are sent as they are, and others are packed (`packing`).

Parameters outside the stacked blocks are replicated over `stage` during a step.  Between steps the embeddings are sharded over
`stage`, along the vocabulary (`parallel.sharding.Rules.rows`).  Blocks are moved to the devices of their stages when a step begins.
DualPipe has two copies of every block.  Both are made from the same parameters, so they are equal.  Their gradients are added up.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import PartitionSpec
from jaxtyping import Array
from mhc_kernels import settings

from mhc_jax.config import ExperimentConfig, ModelConfig
from mhc_jax.errors import require
from mhc_jax.model import documents_of
from mhc_jax.parallel.sharding import constrain, current, token_axes
from mhc_jax.pipeline.program import Operation, Program, compile_table
from mhc_jax.pipeline.stage import Stage, Work
from mhc_jax.pipeline_schedules.tables import Place, Schedule, make

AXIS = "stage"
Tree = Any


def schedule_of(config: ExperimentConfig) -> Schedule | None:
    """Return the schedule of `config.pipeline` with optimizer.accumulation_steps microbatches, or None if mesh.stage is 1."""
    if config.mesh.stage == 1:
        return None
    microbatches, pipeline = config.optimizer.accumulation_steps, config.pipeline
    return make(pipeline.schedule_name, config.mesh.stage, microbatches, pipeline.chunks, 2 if pipeline.overlap else 1)


def pipelined(config: ExperimentConfig, schedule: Schedule) -> Callable[[Tree, Tree], tuple[tuple[Array, Tree], Tree]]:
    """Make a function (params, batch) -> ((loss, router), gradient), like `train_step.gradients`, that runs a pipeline.

    Trace the function under the mesh of the configuration, whose axis `stage` has schedule.devices devices.

    Args:
      config: the configuration of the run.
      schedule: a valid schedule, whose microbatches are the optimizer.accumulation_steps slices of a batch.
    """
    program = compile_table(schedule, leading=config.model.num_leading > 0)
    layout = _Layout(config.model, schedule)
    P, M = schedule.devices, schedule.microbatches

    def run(params: Tree, batch: Tree) -> tuple[tuple[Array, Tree], Tree]:
        mesh = current()
        require(
            mesh is not None and dict(mesh.shape).get(AXIS) == P,
            f"The schedule {schedule.name!r} has {P} devices along the axis {AXIS!r}; the mesh has "
            f"{'no such axis' if mesh is None else dict(mesh.shape).get(AXIS, 'no such axis')}. Set mesh.{AXIS} to {P}.",
        )
        if (documents := documents_of(config.model, batch["inputs"])) is not None:
            batch = {**batch, "documents": documents}
        slices = jax.tree.map(lambda a: a.reshape(M, a.shape[0] // M, *a.shape[1:]), batch)
        slices = jax.tree.map(lambda a: constrain(a, None, "batch", "sequence"), slices)
        outer = {name: part for name, part in params.items() if name != "layers"}
        split, whole = PartitionSpec(AXIS), PartitionSpec()
        ticks = jax.shard_map(
            functools.partial(_run_ticks, config.model, schedule, program),
            in_specs=(split, split, whole, whole),
            out_specs=(whole, split, whole, split),
            axis_names={AXIS},
            check_vma=False,
        )
        columns = {name: jnp.asarray(column) for name, column in program.columns.items()}
        loss, aux, outer_grads, grads = ticks(columns, layout.to_stages(params["layers"]), outer, slices)
        aux, grads = layout.from_stages(aux), layout.from_stages(grads)
        return jax.tree.map(lambda a: a / M, ((loss, aux), {**outer_grads, "layers": grads}))

    return run


class _Layout:
    """Rearranges stacked blocks [blocks, ...] by device and chunk as [P, chunks, blocks of a stage, ...], and back."""

    def __init__(self, model: ModelConfig, schedule: Schedule):
        self.lead, self.stages = model.num_leading, schedule.stages
        stage_of, devices = schedule.stage_of, range(schedule.devices)
        # If a device has no stage in a chunk, it holds a copy of stage 0 there.  The gradient of this copy is zero.
        self.places = np.array([[stage_of.get(Place(d, c), 0) for d in devices] for c in range(schedule.chunks)])

    def to_stages(self, layers: Tree) -> Tree:
        """Move stacked blocks to the devices of their stages.  Zeros fill the rows of leading blocks, which `layers` lacks."""

        def move(a: Array) -> Array:
            a = jnp.concatenate([jnp.zeros((self.lead, *a.shape[1:]), a.dtype), a]) if self.lead else a
            a = a.reshape(self.stages, a.shape[0] // self.stages, *a.shape[1:])
            parts = []
            for place in self.places:
                where, step = self._slice(place)
                parts.append(a[where][::step])
            return jnp.stack(parts, axis=1)

        return jax.tree.map(move, layers)

    def from_stages(self, parts: Tree) -> Tree:
        """Move values of blocks, such as gradients, back from the devices, and add up the values of the copies of a block."""

        def move(a: Array) -> Array:
            whole = jnp.zeros((self.stages, *a.shape[2:]), a.dtype)
            for c, place in enumerate(self.places):
                where, step = self._slice(place)
                whole = whole.at[where].add(a[:, c][::step])
            return whole.reshape(-1, *a.shape[3:])[self.lead :]

        return jax.tree.map(move, parts)

    def _slice(self, place: np.ndarray) -> tuple[Any, int]:
        """Return (index, step) such that a[index][::step] is a[place], where `place` lists numbers of stages.

        For consecutive stages the index is a slice, because a gather would bring all stages to every device.
        """
        steps = set(np.diff(place).tolist())
        if steps in ({1}, {-1}):
            return slice(min(place), min(place) + len(place)), steps.pop()
        return place, 1


# -- one device


def _run_ticks(
    model: ModelConfig, schedule: Schedule, program: Program, columns: Tree, layers: Tree, outer: Tree, slices: Tree
):
    """Run all ticks of the schedule on one device.

    Returns:
      (loss, auxiliary values of blocks [1, chunks, ...], gradients of `outer` (parameters outside the blocks), gradients of
      `layers` [1, chunks, ...]), each a sum over microbatches.
    """
    layers = jax.tree.map(lambda a: a[0], layers)
    columns = {name: column[0] for name, column in columns.items()}
    with settings(token_axes=token_axes(slices["inputs"].shape[1:])):
        device = _Device(model, schedule, program, layers, outer, slices)
        state, _ = jax.lax.scan(device.tick, device.start(), columns)
    loss, outer_grads = jax.lax.psum((state["loss"], state["outer"]), AXIS)
    aux, grads = jax.tree.map(lambda a: a[None], (state["aux"], state["layers"]))
    return loss, aux, outer_grads, grads


IN_PLACE = ("gradients", "activations", "deferrals", "outer", "layers")
"""Names of the parts of the scan's state that operations change in place.  Other results of operations live for one tick."""


def writes(op: Operation) -> list[str]:
    """Return the names of the results of an operation, and of the parts of the scan's state that it changes."""
    forward = ["F", "aux", "loss", "gradients", "activations", "outer"] if op.forward else []
    backward = {"": [], "I": ["B", "outer", "deferrals"], "W": ["outer", "layers"], "B": ["B", "outer", "layers"]}
    return forward + backward[op.backward]


def delivery_scope(column: str) -> str:
    """Return the name of the `jax.named_scope` around the conditional that puts a message into the slot that a column names."""
    return f"delivery_{column}"


def phase_scope(k: int) -> str:
    """Return the name of the `jax.named_scope` around the operations of phase k of a tick."""
    return f"phase_{k}"


class _Device:
    """The program of one device inside the `jax.shard_map`: makes the first state of the scan over ticks, and runs each tick."""

    def __init__(
        self, model: ModelConfig, schedule: Schedule, program: Program, layers: Tree, outer: Tree, slices: Tree
    ):
        self.schedule, self.program, self.slices = schedule, program, slices
        self.layers, self.outer = layers, outer
        tokens = jax.tree.map(lambda a: a[0], slices["inputs"])
        self.stage = Stage(model, schedule.stages, outer, tokens, layers, halves=program.deferrals > 0)
        self.overlap = schedule.latency == 2
        boundary = self.stage.packer.like
        self.of_a_tick = {
            "F": boundary,
            "B": boundary,
            "aux": self.stage.aux,
            "loss": jax.ShapeDtypeStruct((), "float32"),
        }
        """Shapes and dtypes of those results of operations that live for one tick only."""

    def start(self) -> Tree:
        """Return the state of the scan before the first tick."""
        stage, program = self.stage, self.program

        def buffer(slots: int, like: Tree) -> Tree:
            return jax.tree.map(lambda a: jnp.zeros((slots, *a.shape), a.dtype), like)

        state = {
            "inputs": buffer(program.inputs, stage.packer.like),
            "gradients": buffer(program.gradients, stage.packer.like),
            "activations": buffer(program.activations, stage.activations.shapes),
            "deferrals": buffer(program.deferrals, stage.deferrals.shapes),
            "outer": _zeros(self.outer),
            "layers": _zeros(self.layers),
            "loss": jnp.zeros(()),
            "aux": buffer(self.schedule.chunks, stage.aux),
        }
        if self.overlap:
            state["outbox"] = {kind: _zeros(stage.packer.like) for kind in "FB"}
        return state

    def tick(self, state: Tree, now: Tree) -> tuple[Tree, None]:
        """Return (state after a tick, None), as `jax.lax.scan` wants.  `now` has the columns' numbers for this tick and device."""
        arrivals = self.exchanged(state["outbox"]) if self.overlap else []
        made = {name: state[name] for name in ("inputs", *IN_PLACE)}
        for k in range(len(self.program.phases)):
            made = self.phase(k, made, now)
        made = {name: _zeros(like) for name, like in self.of_a_tick.items()} | made
        if self.overlap:
            # Without this barrier XLA may exchange messages after the operations of the tick, instead of at the same time.
            made, arrivals = jax.lax.optimization_barrier((made, arrivals))
        outbox = {kind: made[kind] for kind in "FB"}
        if not self.overlap:
            arrivals = self.exchanged(outbox)
        new = {name: made[name] for name in ("inputs", *IN_PLACE)}

        def deliver(name: str, column: str, value: Tree) -> None:
            if (self.program.columns[column] >= 0).any():
                with jax.named_scope(delivery_scope(column)):
                    new[name] = _deliver(new[name], now[column], value)

        deliver("inputs", "to_self", made["F"])
        deliver("gradients", "to_own_gradients", made["B"])
        for channel, values in enumerate(arrivals):
            for kind, value in values.items():
                deliver("inputs" if kind == "F" else "gradients", f"arrives_{channel}_{kind}", value)
        new["aux"] = jax.tree.map(lambda a, b: a.at[now["forward_chunk"]].add(b), state["aux"], made["aux"])
        new["loss"] = state["loss"] + made["loss"]
        return new | ({"outbox": outbox} if self.overlap else {}), None

    def exchanged(self, outbox: Tree) -> list[dict[str, Tree]]:
        """Exchange messages with other devices.  Return for each channel what arrives, by its kind of message."""
        return [
            {kind: jax.lax.ppermute(outbox[kind], AXIS, channel.pairs) for kind in channel.kinds}
            for channel in self.program.channels
        ]

    def phase(self, k: int, state: Tree, now: Tree) -> Tree:
        """Run phase k of a tick.  Return `state` after it, together with the results of its operation."""
        operations = self.program.phases[k]
        names = list(dict.fromkeys(name for op in operations for name in writes(op)))
        branches = [functools.partial(self.operate, op, names) for op in operations]
        with jax.named_scope(phase_scope(k)):
            return state | jax.lax.switch(now[f"operation_{k}"], branches, state, now)

    def operate(self, op: Operation, names: Sequence[str], state: Tree, now: Tree) -> Tree:
        """Run the operation `op`, and return those parts of the state and results of operations that `names` lists.

        What `op` does not write is returned unchanged if it is in `state`, and as zeros otherwise.
        """
        stage = self.stage
        made = {name: state[name] if name in state else _zeros(self.of_a_tick[name]) for name in names}

        def work(half: str, leads: bool) -> Work:
            layers, batch = _read(stage.layers, now[f"{half}_chunk"]), _read(self.slices, now[f"{half}_microbatch"])
            return Work(leads, layers, batch, now[f"{half}_stage"])

        activations, g = (
            (_take(state["activations"], now["kept"]), _take(state["gradients"], now["backward_read"]))
            if op.backward
            else ([], {})
        )
        deferrals = _take(state["deferrals"], now["deferred"]) if op.backward == "W" else []
        if op.forward and op.backward:
            # The barrier makes XLA read the backward's slots before it writes the forward's slots.  Otherwise XLA copies buffers.
            both = {name: made[name] for name in ("activations", "gradients")}
            activations, g, both = jax.lax.optimization_barrier((activations, g, both))
            made |= both
        if op.forward:
            results, made["outer"], made["gradients"] = stage.forward(
                work("forward", op.forward_leads),
                lambda: _take(state["inputs"], now["forward_read"]),
                made["outer"],
                made["gradients"],
                lambda gradients, g: _put(gradients, now["from_loss"], g),
            )
            made |= results | {"activations": _put(made["activations"], now["keep"], results["activations"])}
        if op.backward:
            half, sums = work("backward", op.backward_leads), (made["outer"], made.get("layers"))
            results, (made["outer"], layers) = stage.backward(
                op.backward, half, now["backward_chunk"], activations, g, deferrals, sums
            )
            if op.backward == "I":
                results["deferrals"] = _put(made["deferrals"], now["defer"], results["deferrals"])
            else:
                results["layers"] = layers
            made |= results
        return made


def _zeros(like: Tree) -> Tree:
    return jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), like)


def _read(buffer: Tree, slot: Array) -> Tree:
    return jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, slot, keepdims=False), buffer)


def _put(buffer: Tree, slot: Array, value: Tree) -> Tree:
    """Return the buffer after `value` is written into `slot`."""
    return jax.tree.map(lambda a, new: jax.lax.dynamic_update_index_in_dim(a, _in_rows(new), slot, 0), buffer, value)


def _take(buffer: Tree, slot: Array) -> Tree:
    """Return the value in a slot of a buffer that `_put` writes."""
    return jax.tree.map(_in_rows, _read(buffer, slot))


def _in_rows(a: Array) -> Array:
    """Return the array with its last axis contiguous in memory.

    Without this constraint XLA gives a whole buffer the layout in which one operation writes a slot, and copies the whole buffer
    into another layout for the operation that reads the slot.
    """
    return with_layout_constraint(a, Layout(tuple(range(a.ndim))))


def _deliver(buffer: Tree, slot: Array, value: Tree) -> Tree:
    """Return the buffer after `value` is written into `slot`, or the buffer as it was if the slot is -1."""
    return jax.lax.cond(slot >= 0, lambda: _put(buffer, slot, value), lambda: buffer)
