"""One SPMD program that runs any valid table: the loss and the gradients of the decoder, its blocks split over the `stage` axis.

`jax.shard_map` over `stage` alone; the other axes of the mesh stay XLA's, and each stage's program is split over them as the
decoder's is.  Each device scans over the ticks of its columns (`program.compile_table`): a forward, `jax.lax.switch` over where its
stage is, and a backward, `switch` over B, I and W, then boundary tensors up and down (`ppermute`).

    inputs       boundary tensors that wait for their forward
    gradients    gradients of boundary tensors, from arrival to the last use
    activations  what the gradients of a stage need of a microbatch: residuals of its VJP, but for what weights alone make,
                 which is made again where it is used
    deferrals    what I made and W needs

B is the whole VJP of a stage; I what its part to the stage's input needs, W the rest (`split`).
Embedding and output embedding are computed on their stages alone; the gradient of the loss is taken in the last stage's forward,
so that logits live in no buffer.  A boundary tensor is the carry between two blocks: streams, coefficients and the y still to be
written, (n + 1)C and n^2 + 2n elements a token.

Every device has a copy of what lies outside the stacked blocks.  Blocks are put where the schedule wants them at the start of a
step, for DualPipe in two copies, which are equal because both are made of the one state; gradients of copies are added up.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core
from jax.sharding import PartitionSpec
from jaxtyping import Array
from mhc_kernels import settings

from mhc_jax.config import ExperimentConfig, ModelConfig
from mhc_jax.errors import require
from mhc_jax.layers.norm import RMSNorm
from mhc_jax.model import Block, connection, cross_entropy, enter, leave, logits_of
from mhc_jax.pipeline.program import Program, compile_table
from mhc_jax.pipeline.schedules import Place, Schedule
from mhc_jax.pipeline.split import split
from mhc_jax.remat import reached, recomputed
from mhc_jax.sharding import constrain, current, token_axes
from mhc_jax.traffic import best_recompute

AXIS = "stage"
Tree = Any


def pipelined(config: ExperimentConfig, schedule: Schedule) -> Callable[[Tree, Tree], tuple[tuple[Array, Tree], Tree]]:
    """(params, batch) -> ((loss, router), gradient), as `train_step.gradients`, with one microbatch a slice of accumulation.

    Args:
      config: whose mesh, that of the trace, has an axis `stage` of schedule.devices.
      schedule: valid, of optimizer.accumulation_steps microbatches.
    """
    model, program = config.model, compile_table(schedule)
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
        boundary, aux = stage.boundary, stage.aux
        forwards = [stage.forwards[k] for k in program.forwards]
        backwards = [stage.backwards[k] for k in program.backwards]
        zeros = functools.partial(jax.tree.map, lambda a: jnp.zeros(a.shape, a.dtype))

        def buffer(slots: int, like: Tree) -> Tree:
            return jax.tree.map(lambda a: jnp.zeros((slots, *a.shape), a.dtype), like)

        state = {
            "inputs": buffer(program.inputs, boundary),
            "gradients": buffer(program.gradients, boundary),
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

        def arrived(outbox: Tree) -> list[Tree]:
            return [jax.lax.ppermute(outbox[channel.kind], AXIS, channel.pairs) for channel in program.channels]

        def tick(state: Tree, now: Tree) -> tuple[Tree, None]:
            arrivals = arrived(state["outbox"]) if late else None
            x = _read(state["inputs"], now["forward_read"])
            held = _read(state["activations"], now["keep"])
            g, kept = _read(state["gradients"], now["backward_read"]), _read(state["activations"], now["kept"])

            def pick(half: str) -> tuple[Tree, Tree, Array]:
                own = _read(layers, now[f"{half}_chunk"])
                return own, _read(slices, now[f"{half}_microbatch"]), now[f"{half}_stage"]

            result, held, loss, aux, sums = jax.lax.switch(
                now["forward"], forwards, *pick("forward"), x, held, state["outer"]
            )
            put_off = _read(state["deferrals"], now["deferred"]) if program.deferrals else []
            g_x, put_off, (sums, layer_sums) = jax.lax.switch(
                now["backward"],
                backwards,
                *pick("backward"),
                now["backward_chunk"],
                kept,
                g,
                put_off,
                (sums, state["layers"]),
            )
            outbox = {"F": result, "B": g_x}
            arrivals = arrived(outbox) if arrivals is None else arrivals
            inputs = _write(state["inputs"], now["to_self"], result)
            gradients = _write(state["gradients"], now["from_loss"], result)
            gradients = _write(gradients, now["to_own_gradients"], g_x)
            for k, (channel, message) in enumerate(zip(program.channels, arrivals, strict=True)):
                if channel.kind == "F":
                    inputs = _write(inputs, now[f"arrives_{k}"], message)
                else:
                    gradients = _write(gradients, now[f"arrives_{k}"], message)
            total = jax.tree.map(lambda a, b: a.at[now["forward_chunk"]].add(b), state["aux"], aux)
            activations = _write(state["activations"], now["keep"], held)
            new = {"inputs": inputs, "gradients": gradients, "activations": activations, "outer": sums}
            new["deferrals"] = _write(state["deferrals"], now["defer"], put_off) if program.deferrals else []
            new |= {"layers": layer_sums, "loss": state["loss"] + loss, "aux": total}
            return {**new, "outbox": outbox} if late else new, None

        state, _ = jax.lax.scan(tick, state, columns)
    loss, outer_grads = jax.lax.psum((state["loss"], state["outer"]), AXIS)
    aux, grads = jax.tree.map(lambda a: a[None], (state["aux"], state["layers"]))
    return loss, aux, outer_grads, grads


def _read(buffer: Tree, slot: Array) -> Tree:
    return jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, slot, keepdims=False), buffer)


def _write(buffer: Tree, slot: Array, value: Tree) -> Tree:
    """`value` in a slot, or nothing where the slot is -1."""
    at = jnp.maximum(slot, 0)

    def one(a: Array, new: Array) -> Array:
        new = jnp.where(slot >= 0, new, jax.lax.dynamic_index_in_dim(a, at, keepdims=False))
        return jax.lax.dynamic_update_index_in_dim(a, new, at, 0)

    return jax.tree.map(one, buffer, value)


class Stage:
    """What a device does in one tick, as branches for `jax.lax.switch`, and the shapes of its buffers."""

    def __init__(self, model: ModelConfig, stages: int, outer: Tree, tokens: Array, layers: Tree, halves: bool = False):
        self.model, self.outer = model, outer
        self.per = model.num_layers // stages
        own = jax.tree.map(lambda a: a[0], layers)
        at = jnp.zeros((), jnp.int32)
        self.boundary = jax.eval_shape(lambda: self.enter(self.head(), tokens))
        self.aux = jax.eval_shape(lambda: self.blocks(False, own, {}, self._zeros(), at)[1])
        """Of a stage's blocks, [blocks of a stage, ...]."""
        self.kept = {first: self._kept(first, own, at) for first in (True, False)}
        self.pool, self.lies = pooled({first: shapes for first, (shapes, _) in self.kept.items()})
        self.halves = {}
        if halves:
            free = own, at
            for first in (True, False):
                given = [self.pool[k] for k in self.lies[first]], self.boundary
                self.halves[first] = split(functools.partial(self.pulled, first), free, given)
        self.deferred, self.puts = pooled({first: one.between for first, one in self.halves.items()})
        self.forwards = [self.idle_forward, *(functools.partial(self.forward, f, l) for f, l in _POSITIONS)]
        backwards = [functools.partial(self.backward, first, kind) for first in (False, True) for kind in "BIW"]
        self.backwards = [self.idle_backward, *backwards]

    # -- the model

    def head(self) -> Tree:
        """Parameters outside the blocks that the input embedding needs."""
        return {name: self.outer[name] for name in ("embedding", "ends") if name in self.outer}

    def tail(self) -> Tree:
        """Those that the loss needs."""
        unembedding = "embedding" if self.model.tied_embeddings else "unembedding"
        return {name: self.outer[name] for name in (unembedding, "final_norm", "ends") if name in self.outer}

    def dense(self, first: bool) -> Tree:
        """The dense blocks in front of those with experts."""
        return self.outer["dense_layers"] if first and self.model.num_leading else {}

    def enter(self, params: Tree, tokens: Array) -> Tree:
        """The carry of the first block."""
        ends = connection(self.model, None, "ends").bind({"params": params.get("ends", {})})
        return enter(self.model, params["embedding"], ends, tokens)

    def loss(self, params: Tree, carry: Tree, targets: Array) -> Array:
        """Nats per token of one microbatch."""
        ends = connection(self.model, None, "ends").bind({"params": params.get("ends", {})})
        norm = RMSNorm(self.model.norm_eps).bind({"params": params["final_norm"]})
        x = leave(self.model, ends, norm, carry)
        W = params["embedding"].T if self.model.tied_embeddings else params["unembedding"]
        return cross_entropy(logits_of(x, W), targets)

    def blocks(self, first: bool, layers: Tree, dense: Tree, carry: Tree, stage: Array) -> tuple[Tree, Tree]:
        """(carry behind the stage's blocks, aux [blocks, ...]; zeros of a dense one)."""
        lead = self.model.num_leading if first else 0
        if lead:
            carry, _ = self._run(True, dense, carry, jnp.arange(lead))
            layers = jax.tree.map(lambda a: a[lead:], layers)
        indices = stage * self.per + jnp.arange(lead, self.per)
        if lead == self.per:
            return carry, jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), self.aux)
        carry, aux = self._run(not self.model.num_experts, layers, carry, indices)
        return carry, jax.tree.map(lambda a: jnp.concatenate([jnp.zeros((lead, *a.shape[1:]), a.dtype), a]), aux)

    def _run(self, dense: bool, layers: Tree, carry: Tree, indices: Array) -> tuple[Tree, Tree]:
        """Blocks one after another, as model.remat says."""
        model, count = self.model, len(indices)
        if model.remat == "connection":

            def sublayer(k: int, params: Tree, carry: Tree, layer: Array) -> tuple[Tree, Tree]:
                out: Any = Block(model, 0, dense, only=k, parent=None).apply({"params": params}, carry, layer)
                return out[0], out[1][1]

            L_r = model.remat_block or best_recompute(2 * count, model.connection.num_streams)
            return recomputed(sublayer, layers, carry, indices, 2, L_r, count)

        def block(params: Tree, carry: Tree, layer: Array) -> tuple[Tree, Tree]:
            out: Any = Block(model, 0, dense, parent=None).apply({"params": params}, carry, layer)
            return out[0], out[1][1]

        keep = jax.checkpoint(block) if model.remat == "full" else block
        told = []
        for k in range(count):
            carry, aux = keep(jax.tree.map(lambda a, k=k: a[k], layers), carry, indices[k])
            told.append(aux)
        return carry, jax.tree.map(lambda *each: jnp.stack(each), *told)

    # -- its gradient in parts

    def _zeros(self) -> Tree:
        return jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), self.boundary)

    def vjp(self, first: bool, layers: Tree, carry: Tree, stage: Array) -> tuple[Tree, Any, Tree]:
        """(carry, pull-back to (layers, dense, carry), aux)."""
        function = functools.partial(self.blocks, first)
        return jax.vjp(lambda l, d, c: function(l, d, c, stage), layers, self.dense(first), carry, has_aux=True)

    def _kept(self, first: bool, layers: Tree, stage: Array) -> tuple[list[Any], list[int | None]]:
        """(shapes of what the pull-back holds that comes from the carry, for each of its leaves which of them; None: none)."""

        def leaves(carry: Tree) -> list[Array]:
            return jax.tree.leaves(self.vjp(first, layers, carry, stage)[1])

        jaxpr = jax.make_jaxpr(leaves)(self._zeros()).jaxpr
        made, index, which = reached(jaxpr, jaxpr.invars), {}, []
        for v in jaxpr.outvars:
            own = isinstance(v, core.Var) and v in made
            which.append(index.setdefault(v, len(index)) if own else None)
        avals: list[Any] = [v.aval for v in index]
        return avals, which

    def forward(
        self, first: bool, last: bool, layers: Tree, batch: Tree, stage: Array, x: Tree, held: Tree, sums: Tree
    ):
        """(boundary tensor to send, or on the last stage its gradient; activations; loss; aux; gradients outside the blocks)."""
        x = self.enter(self.head(), batch["inputs"]) if first else x
        x, pull, aux = self.vjp(first, layers, x, stage)
        held = list(held)
        for leaf, k in zip(jax.tree.leaves(pull), self.kept[first][1], strict=True):
            if k is not None:
                held[self.lies[first][k]] = leaf
        loss = jnp.zeros(())
        if last:
            loss, back = jax.vjp(lambda p, c: self.loss(p, c, batch["targets"]), self.tail(), x)
            g, x = back(jnp.ones(()))
            sums = _added(sums, g)
        return x, held, loss, aux, sums

    def idle_forward(self, layers: Tree, batch: Tree, stage: Array, x: Tree, held: Tree, sums: Tree):
        """Nothing."""
        return x, held, jnp.zeros(()), jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), self.aux), sums

    def backward(
        self,
        first: bool,
        kind: str,
        layers: Tree,
        batch: Tree,
        stage: Array,
        chunk: Array,
        kept: Sequence[Array],
        g: Tree,
        put_off: Sequence[Array],
        sums: tuple[Tree, Tree],
    ):
        """(gradient of the stage's input, what waits for W, sums of gradients outside the blocks and of them)."""
        free, given = (layers, stage), ([kept[k] for k in self.lies[first]], g)
        outer, inner = sums
        if kind == "B":
            g_x, (g_layers, g_dense) = self.pulled(first, free, given)
        elif kind == "I":
            g_x, between = self.halves[first].now(free, given)
            put_off = list(put_off)
            for leaf, k in zip(between, self.puts[first], strict=True):
                put_off[k] = leaf
        else:
            g_x = self._zeros()
            g_layers, g_dense = self.halves[first].later(free, given, [put_off[k] for k in self.puts[first]])
        if kind != "W" and first:
            _, back = jax.vjp(lambda p: self.enter(p, batch["inputs"]), self.head())
            outer = _added(outer, back(g_x)[0])
        if kind != "I":
            inner = jax.tree.map(lambda a, b: a.at[chunk].add(b), inner, g_layers)
            outer = _added(outer, {"dense_layers": g_dense} if g_dense else {})
        return g_x, put_off, (outer, inner)

    def pulled(self, first: bool, free: tuple[Tree, Array], given: tuple[Sequence[Array], Tree]) -> tuple[Tree, Tree]:
        """(gradient of the input, those of (the stage's blocks, dense blocks)), of (weights, stage) and (what is kept, gradient)."""
        (layers, stage), (kept, g) = free, given
        # Of this forward only what comes from the weights alone is used.
        _, pull, _ = self.vjp(first, layers, self._zeros(), stage)
        leaves, tree = jax.tree.flatten(pull)
        own = [leaf if k is None else kept[k] for leaf, k in zip(leaves, self.kept[first][1], strict=True)]
        g_layers, g_dense, g_x = jax.tree.unflatten(tree, own)(g)
        return g_x, (g_layers, g_dense)

    def idle_backward(self, layers, batch, stage, chunk, kept, g, put_off, sums):
        """Nothing."""
        return g, put_off, sums


def pooled(each: Mapping[bool, Sequence[Any]]) -> tuple[list[Any], dict[bool, list[int]]]:
    """(arrays that serve every list of shapes, for each list where its own lie): the first stage may have other blocks."""
    pool: list[Any] = []
    lies: dict[bool, list[int]] = {}
    for key, shapes in each.items():
        free = list(range(len(pool)))
        lies[key] = []
        for a in shapes:
            found = next((k for k in free if (pool[k].shape, pool[k].dtype) == (a.shape, a.dtype)), None)
            if found is None:
                found = len(pool)
                pool.append(jax.ShapeDtypeStruct(a.shape, a.dtype))
            else:
                free.remove(found)
            lies[key].append(found)
    return pool, lies


_POSITIONS = ((True, False), (False, False), (False, True))
"""(first, last) of `program.FIRST`, `MIDDLE` and `LAST`."""


def _added(sums: Tree, part: Tree) -> Tree:
    return sums | {name: jax.tree.map(jnp.add, sums[name], g) for name, g in part.items()}
