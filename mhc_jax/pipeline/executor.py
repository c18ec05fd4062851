"""One SPMD program that runs any valid table: the loss and the gradients of the decoder, its blocks split over the `stage` axis.

`jax.shard_map` over `stage` alone; the other axes of the mesh stay XLA's, and each stage's program is split over them as the
decoder's is.  Each device scans over the ticks of its columns (`program.compile_table`): one operation, by a `jax.lax.switch` for
each phase of a tick, then boundary tensors up and down (`ppermute`).  With `pipeline.overlap` those of a tick travel while the next
one computes.

    inputs       boundary tensors that wait for their forward
    gradients    gradients of boundary tensors, from arrival to the last use
    activations  what the gradients of a stage need of a microbatch: residuals of its VJP, but for what weights alone make, or
                 elementwise operations of other residuals (in float32 only those that round nothing); that is made again
                 where it is used
    deferrals    what I made and W needs

A boundary tensor is the carry between two blocks, packed: streams, coefficients and the y still to be written, (n + 1)C and
n^2 + 2n elements a token.

During a step every device has a copy of what lies outside the stacked blocks.  Blocks are put where the schedule wants them at the
start of a step, for DualPipe in two copies, which are equal because both are made of the one state; gradients of copies are added
up.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array
from mhc_kernels import settings

from mhc_jax.config import ExperimentConfig, ModelConfig
from mhc_jax.errors import require
from mhc_jax.parallel.sharding import constrain, current, token_axes
from mhc_jax.pipeline.program import Operation, Program, compile_table
from mhc_jax.pipeline.stage import Stage
from mhc_jax.schedules.tables import Place, Schedule, make

AXIS = "stage"
Tree = Any


def schedule_of(config: ExperimentConfig) -> Schedule | None:
    """That of `config.pipeline`, of optimizer.accumulation_steps microbatches; None without stages."""
    own = config.pipeline
    if config.mesh.stage == 1:
        return None
    steps = config.optimizer.accumulation_steps
    return make(own.schedule_name, config.mesh.stage, steps, own.chunks, 2 if own.overlap else 1)


def pipelined(config: ExperimentConfig, schedule: Schedule) -> Callable[[Tree, Tree], tuple[tuple[Array, Tree], Tree]]:
    """(params, batch) -> ((loss, router), gradient), as `train_step.gradients`, with one microbatch a slice of accumulation.

    Args:
      config: whose mesh, that of the trace, has an axis `stage` of schedule.devices.
      schedule: valid, of optimizer.accumulation_steps microbatches.
    """
    model = config.model
    program = compile_table(schedule, leading=model.num_leading > 0)
    P, M, S = schedule.devices, schedule.microbatches, schedule.stages
    per, lead = model.num_layers // S, model.num_leading
    stage_of = schedule.stage_of
    # Of each chunk, by device; one without a stage in a chunk holds the first, and has no gradient of it.
    places = np.array([[stage_of.get(Place(d, c), 0) for d in range(P)] for c in range(schedule.chunks)])

    def staged(layers: Tree) -> Tree:
        """[blocks, ...] -> [P, chunks, blocks of a stage, ...]; zeros where dense blocks lead."""

        def one(a: Array) -> Array:
            a = jnp.concatenate([jnp.zeros((lead, *a.shape[1:]), a.dtype), a]) if lead else a
            a = a.reshape(S, per, *a.shape[1:])
            return jnp.stack([_taken(a, place) for place in places], axis=1)

        return jax.tree.map(one, layers)

    def unstaged(parts: Tree) -> Tree:
        """Its transpose: copies are added up."""

        def one(a: Array) -> Array:
            whole = jnp.zeros((S, *a.shape[2:]), a.dtype)
            for c, place in enumerate(places):
                own, low = a[:, c], min(place)
                straight = _consecutive(place)
                at, own = (slice(low, low + P), own[:: place[1] - place[0]]) if straight else (place, own)
                whole = whole.at[at].add(own)
            return whole.reshape(S * per, *a.shape[3:])[lead:]

        return jax.tree.map(one, parts)

    def run(params: Tree, batch: Tree) -> tuple[tuple[Array, Tree], Tree]:
        mesh = current()
        require(
            mesh is not None and dict(mesh.shape).get(AXIS) == P,
            f"The schedule {schedule.name!r} has {P} devices along the axis {AXIS!r}; the mesh has "
            f"{'no such axis' if mesh is None else dict(mesh.shape).get(AXIS, 'no such axis')}. Set mesh.{AXIS} to {P}.",
        )
        slices = jax.tree.map(lambda a: a.reshape(M, a.shape[0] // M, *a.shape[1:]), batch)
        slices = jax.tree.map(lambda a: constrain(a, None, "batch", "sequence"), slices)
        outer = {name: part for name, part in params.items() if name != "layers"}
        split, whole = PartitionSpec(AXIS), PartitionSpec()
        ticks = jax.shard_map(
            functools.partial(_ticks, model, schedule, program),
            in_specs=(split, split, whole, whole),
            out_specs=(whole, split, whole, split),
            axis_names={AXIS},
            check_vma=False,
        )
        columns = {name: jnp.asarray(column) for name, column in program.columns.items()}
        loss, aux, outer_grads, grads = ticks(columns, staged(params["layers"]), outer, slices)
        aux, grads = unstaged(aux), unstaged(grads)
        return jax.tree.map(lambda a: a / M, ((loss, aux), {**outer_grads, "layers": grads}))

    return run


def _consecutive(place: np.ndarray) -> bool:
    """Stages one after another, up or down: they move as slices, where a gather would bring all to every device."""
    return set(np.diff(place).tolist()) in ({1}, {-1})


def _taken(a: Array, place: np.ndarray) -> Array:
    """a[place]."""
    if not _consecutive(place):
        return a[place]
    low = min(place)
    return a[low : low + len(place)][:: place[1] - place[0]]


# -- one device


def _ticks(
    model: ModelConfig, schedule: Schedule, program: Program, columns: Tree, layers: Tree, outer: Tree, slices: Tree
):
    """(loss, aux [1, chunks, ...], gradients of `outer`, gradients of `layers` [1, chunks, ...]), sums over microbatches."""
    layers = jax.tree.map(lambda a: a[0], layers)
    columns = {name: column[0] for name, column in columns.items()}
    with settings(token_axes=token_axes(slices["inputs"].shape[1:])):
        tokens = jax.tree.map(lambda a: a[0], slices["inputs"])
        stage = Stage(model, schedule.stages, outer, tokens, layers, halves=program.deferrals > 0)
        boundary, aux = stage.boundary.like, stage.aux
        zeros = functools.partial(jax.tree.map, lambda a: jnp.zeros(a.shape, a.dtype))

        def buffer(slots: int, like: Tree) -> Tree:
            return jax.tree.map(lambda a: jnp.zeros((slots, *a.shape), a.dtype), like)

        state = {
            # One slot more, for what is nowhere wanted.
            "inputs": buffer(program.inputs + 1, boundary),
            "gradients": buffer(program.gradients + 1, boundary),
            "activations": buffer(program.activations, stage.pool),
            "deferrals": buffer(program.deferrals, stage.deferred),
            "outer": zeros(outer),
            "layers": zeros(layers),
            "loss": jnp.zeros(()),
            "aux": buffer(schedule.chunks, aux),
        }
        late = schedule.latency == 2
        if late:
            state["outbox"] = {"F": zeros(boundary), "B": zeros(boundary)}
        fresh = {"F": lambda: zeros(boundary), "B": lambda: zeros(boundary), "aux": lambda: zeros(aux)}
        fresh["loss"] = lambda: jnp.zeros(())

        def arrived(outbox: Tree) -> list[Tree]:
            """By channel; [kinds of the channel, ...]."""
            out = []
            for channel in program.channels:
                together = jax.tree.map(lambda *each: jnp.stack(each), *(outbox[kind] for kind in channel.kinds))
                out.append(jax.lax.ppermute(together, AXIS, channel.pairs))
            return out

        def operate(op: Operation, names: Sequence[str], state: Tree, now: Tree) -> Tree:
            """`names` after an operation; of what it does not make, what there was."""
            made = {name: state[name] if name in state else fresh[name]() for name in names}

            def pick(half: str) -> tuple[Tree, Tree, Array]:
                own = _read(stage.layers, now[f"{half}_chunk"])
                return own, _read(slices, now[f"{half}_microbatch"]), now[f"{half}_stage"]

            kept = _read(state["activations"], now["kept"]) if op.backward else []
            put_off = _read(state["deferrals"], now["deferred"]) if op.backward == "W" else []
            if op.forward and op.backward:
                # Read before the forward writes; without an order XLA copies the whole buffer.
                kept, made["activations"] = jax.lax.optimization_barrier((kept, made["activations"]))
            if op.forward:
                x = _read(state["inputs"], now["forward_read"])
                told, made["outer"] = stage.forward(op.forward_leads, *pick("forward"), x, made["outer"])
                told["activations"] = _put(made["activations"], now["keep"], told.pop("held"))
                made |= told
            if op.backward:
                g = _read(state["gradients"], now["backward_read"])
                own, tokens, at = pick("backward")
                sums = made["outer"], made.get("layers")
                told, (made["outer"], inner) = stage.backward(
                    op.backward_leads, op.backward, own, tokens, at, now["backward_chunk"], kept, g, put_off, sums
                )
                if op.backward == "I":
                    told["deferrals"] = _put(made["deferrals"], now["defer"], told.pop("put_off"))
                else:
                    told["layers"] = inner
                made |= told
            return made

        def phase(k: int, state: Tree, now: Tree) -> Tree:
            """`state`, and what was made in this tick, after a phase."""
            names = list(dict.fromkeys(name for op in program.phases[k] for name in writes(op)))
            branches = [functools.partial(operate, op, names) for op in program.phases[k]]
            with jax.named_scope(phase_scope(k)):
                return state | jax.lax.switch(now[f"operation_{k}"], branches, state, now)

        def tick(state: Tree, now: Tree) -> tuple[Tree, None]:
            arrivals = arrived(state["outbox"]) if late else None
            totals = {name: state[name] for name in ("loss", "aux")}
            made = {name: state[name] for name in ("inputs", "gradients", *SUMS)}
            for k in range(len(program.phases)):
                made = phase(k, made, now)
            made = {name: make() for name, make in fresh.items()} | made
            if late:
                # What comes next must not hide them, or XLA lets them begin behind the operation.
                made, arrivals = jax.lax.optimization_barrier((made, arrivals))
            outbox = {kind: made[kind] for kind in "FB"}
            arrivals = arrived(outbox) if arrivals is None else arrivals
            new = {name: made[name] for name in ("inputs", "gradients", *SUMS)}

            def deliver(name: str, column: str, value: Tree, k: int | None = None) -> None:
                if (program.columns[column] >= 0).any():
                    new[name] = _deliver(new[name], now[column], value, k)

            deliver("inputs", "to_self", made["F"])
            deliver("gradients", "from_loss", made["F"])
            deliver("gradients", "to_own_gradients", made["B"])
            for channel, got in enumerate(arrivals):
                for k, kind in enumerate(program.channels[channel].kinds):
                    deliver("inputs" if kind == "F" else "gradients", f"arrives_{channel}_{kind}", got, k)
            new["aux"] = jax.tree.map(lambda a, b: a.at[now["forward_chunk"]].add(b), totals["aux"], made["aux"])
            new["loss"] = totals["loss"] + made["loss"]
            return new | ({"outbox": outbox} if late else {}), None

        state, _ = jax.lax.scan(tick, state, columns)
    loss, outer_grads = jax.lax.psum((state["loss"], state["outer"]), AXIS)
    aux, grads = jax.tree.map(lambda a: a[None], (state["aux"], state["layers"]))
    return loss, aux, outer_grads, grads


SUMS = ("activations", "deferrals", "outer", "layers")
"""Of the state, what operations change in place; what else they make is of one tick."""


def writes(op: Operation) -> list[str]:
    """What an operation makes, or changes."""
    forward = ["F", "aux", "loss", "activations", "outer"] if op.forward else []
    backward = {"": [], "I": ["B", "outer", "deferrals"], "W": ["outer", "layers"], "B": ["B", "outer", "layers"]}
    return forward + backward[op.backward]


def phase_scope(k: int) -> str:
    """Of the names of compiled operations."""
    return f"phase_{k}"


def _read(buffer: Tree, slot: Array) -> Tree:
    return jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, slot, keepdims=False), buffer)


def _put(buffer: Tree, slot: Array, value: Tree) -> Tree:
    """`value` in a slot."""
    return jax.tree.map(lambda a, new: jax.lax.dynamic_update_index_in_dim(a, new, slot, 0), buffer, value)


def _deliver(buffer: Tree, slot: Array, value: Tree, k: int | None) -> Tree:
    """`value`, or what lies at its k, in a slot; in the last one where the slot is -1."""

    def one(a: Array, new: Array) -> Array:
        new = new[None] if k is None else jax.lax.slice_in_dim(new, k, k + 1)
        return jax.lax.dynamic_update_slice_in_dim(a, new, jnp.where(slot >= 0, slot, a.shape[0] - 1), 0)

    return jax.tree.map(one, buffer, value)
