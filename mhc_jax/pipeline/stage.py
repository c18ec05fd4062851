"""The operations of one stage of a pipeline: its forward, its backward, and the values that are kept between the two.

B is the whole backward pass of a stage.  I is the part that makes the gradient of the stage's input, and W is the rest (`split`).
Only the first stage embeds tokens, and only the last stage computes logits and the loss.  The forward of the last stage also makes
the gradient of the loss, so that no buffer holds logits.

If a decoder begins with dense blocks before its blocks with experts, there are two variants of a stage: the first stage, which has
dense blocks (`leads` is true), and any other stage.  Every function of a stage is traced once for each variant.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from mhc_jax.config import ModelConfig
from mhc_jax.connections import Connection
from mhc_jax.layers.norm import RMSNorm
from mhc_jax.model import Block, Carry, connection, cross_entropy, documents_of, enter, leave, logits_of
from mhc_jax.pipeline.casts import cast, computed_in
from mhc_jax.pipeline.packing import CarryPacker, placed
from mhc_jax.pipeline.split import CHEAP, EXACT, split
from mhc_jax.remat import block_length, recomputed

Tree = Any
Free = tuple[list[Tree], Array, Array | None]
"""What an operation of a stage needs besides the values that travel: parameters of each block, number of the stage, and the numbers
of the tokens' documents, to which attention is limited (or None)."""

FIRST, LAST = "first_stage", "last_stage"
"""Names of the `jax.named_scope` around operations that only the first stage runs, or only the last stage."""


class Pool:
    """A list of arrays with room for the values of either variant of a stage (`leads` or not), so that both share one buffer."""

    def __init__(self, variants: Mapping[bool, Sequence[jax.ShapeDtypeStruct]]):
        """Give every value of each variant a position in the list.

        A value of one variant and a value of the other share a position if they have the same shape and dtype.
        """
        self.shapes: list[jax.ShapeDtypeStruct] = []
        self.places: dict[bool, list[int]] = {}
        """For each variant of a stage (`leads` or not), the positions of its values in the list `shapes`."""
        for leads, values in variants.items():
            free = list(range(len(self.shapes)))
            self.places[leads] = []
            for a in values:
                same = (k for k in free if (self.shapes[k].shape, self.shapes[k].dtype) == (a.shape, a.dtype))
                k = next(same, len(self.shapes))
                if k == len(self.shapes):
                    self.shapes.append(jax.ShapeDtypeStruct(a.shape, a.dtype))
                else:
                    free.remove(k)
                self.places[leads].append(k)

    def put(self, leads: bool, values: Sequence[Array]) -> list[Array]:
        """Return a list of arrays with the values of a variant at their positions, and zeros elsewhere."""
        out = [jnp.zeros(a.shape, a.dtype) for a in self.shapes]
        for k, a in zip(self.places[leads], values, strict=True):
            out[k] = a
        return out

    def take(self, leads: bool, pool: Sequence[Any]) -> list[Any]:
        """Return the values of a variant from `pool`, a list like that of `put`."""
        return [pool[k] for k in self.places[leads]]


class Work(NamedTuple):
    """The stage and the microbatch of one operation."""

    leads: bool
    """Whether the stage begins with the dense blocks that precede blocks with experts."""
    layers: list[Tree]
    """Parameters of each block of the stage."""
    batch: Tree
    """`inputs` and `targets` [B, T] of the microbatch, and `documents` [B, T] if attention is limited to documents."""
    stage: Array
    """Number of the stage, int32 []."""


class Stage:
    """The operations F, B, I and W of the stages of one device, and the shapes of the values that they keep."""

    def __init__(self, model: ModelConfig, stages: int, outer: Tree, tokens: Array, layers: Tree, halves: bool = False):
        """Trace the operations of the stages of one device.

        Args:
          model: the configuration of the whole decoder.
          stages: number of stages into which the decoder is cut.
          outer: parameters outside the stacked blocks.
          tokens: the tokens of one microbatch, [B, T].
          layers: parameters of this device's blocks, [chunks, blocks of a stage, ...].
          halves: whether the schedule divides B into I and W.
        """
        self.model, self.stages, self.outer = model, stages, outer
        self.per = model.num_layers // stages
        at, documents = jnp.zeros((), jnp.int32), documents_of(model, tokens)
        self.packer = CarryPacker(lambda tokens: self.enter(self.head(outer), tokens), tokens)
        self.coefficients = jax.eval_shape(lambda: self._enter(self.head(outer), tokens)[1])
        each = [jax.tree.map(lambda a, k=k: a[:, k], layers) for k in range(self.per)]
        first = jax.tree.map(lambda a: a[0], each)
        self.aux = jax.eval_shape(lambda: self.blocks(False, first, {}, self.packer.zeros(), at, documents)[1])
        """Shapes of the auxiliary values (aux) that the blocks of a stage report, [blocks of a stage, ...]."""
        variants = (False, True) if model.num_leading else (False,)

        def all_uses(params: tuple[Tree, Tree]) -> Any:
            outer, layers = params
            carry = self.packer.zeros()
            dense = {leads: self.dense(outer, leads) for leads in variants}
            results = [self.blocks(leads, layers, dense[leads], carry, at, documents) for leads in variants]
            return results, self.enter(self.head(outer), tokens), self.loss(self.tail(outer), carry, tokens)

        dtypes = computed_in(all_uses, (outer, first))
        self.outer, self.layers = cast(outer, dtypes[0]), cast(each, dtypes[1])
        """Parameters, cast once a step: those outside the blocks, and for each block of a stage those of all chunks [chunks, ...].

        Blocks are arrays of their own, because a kernel that takes a slice of an array makes XLA copy the slice in every tick."""
        free = jax.tree.map(lambda a: a[0], self.layers), at, documents
        # In float32 a pipeline should round as the decoder without it does, so values that XLA may round differently are kept.
        recompute = EXACT if model.compute_dtype == "float32" else CHEAP
        self.passes = {
            leads: split(functools.partial(self._pushed, leads), free, self.packer.zeros(), True, recompute)
            for leads in variants
        }
        """For each variant of a stage (`leads` or not), its forward, split into two halves.  F runs the first half.  The backward
        runs the second half, which makes again what F did not keep."""
        self.activations = Pool({leads: each.between for leads, each in self.passes.items()})
        """The values that the forward of a stage keeps for its backward, as a `Pool` of their shapes and dtypes."""
        self.halves = {}
        """For each variant of a stage (`leads` or not), its backward, split into I and W.  Empty if the schedule has no I and W."""
        for leads in variants if halves else ():
            given = self.activations.take(leads, self.activations.shapes), self.packer.tree
            self.halves[leads] = split(functools.partial(self.pulled, leads), free, given, recompute=recompute)
        self.deferrals = Pool({leads: each.between for leads, each in self.halves.items()})
        """The values that I keeps for W, as a `Pool` of their shapes and dtypes."""

    # -- the model

    def head(self, outer: Tree) -> Tree:
        """Return those of the parameters `outer` that the first stage needs to embed tokens and make streams of them."""
        return {name: outer[name] for name in ("embedding", "ends") if name in outer}

    def tail(self, outer: Tree) -> Tree:
        """Return those of the parameters `outer` that the last stage needs to compute the loss."""
        unembedding = "embedding" if self.model.tied_embeddings else "unembedding"
        return {name: outer[name] for name in (unembedding, "final_norm", "ends") if name in outer}

    def dense(self, outer: Tree, leads: bool) -> Tree:
        """Return the parameters of the leading dense blocks, or an empty dict for a stage without such blocks."""
        return outer["dense_layers"] if leads and self.model.num_leading else {}

    def ends(self, params: Tree) -> Connection:
        """Return the connection's module of the entry and the exit, with those of its parameters that `params` has."""
        return connection(self.model, None, "ends").bind({"params": params.get("ends", {})})

    def enter(self, params: Tree, tokens: Array) -> Tree:
        """Embed the tokens [B, T] of a microbatch, and return the streams that enter the first block."""
        return self._enter(params, tokens)[0]

    def _enter(self, params: Tree, tokens: Array) -> Carry:
        return enter(self.model, params["embedding"], self.ends(params), tokens)

    def loss(self, params: Tree, streams: Tree, targets: Array) -> Array:
        """Return the loss of one microbatch in nats per token, float32 [], from the streams that leave the last block."""
        norm = RMSNorm(self.model.norm_eps).bind({"params": params["final_norm"]})
        # The exit takes coefficients for their form alone (`Connection.collapse`).
        c = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), self.coefficients)
        x = leave(self.model, self.ends(params), norm, (streams, c, None))
        W = params["embedding"].T if self.model.tied_embeddings else params["unembedding"]
        return cross_entropy(logits_of(x, W), targets)

    def blocks(
        self,
        leads: bool,
        layers: Sequence[Tree],
        dense: Tree,
        streams: Tree,
        stage: Array,
        documents: Array | None = None,
    ) -> tuple[Tree, Tree]:
        """Run the blocks of a stage on the streams that enter it.  The output of the last branch is written at the end.

        Returns:
          (streams that leave the stage, auxiliary values [blocks, ...], 0 for dense blocks).

        `documents` are the numbers of the tokens' documents, to which attention is limited, or None.
        """
        lead = self.model.num_leading if leads else 0
        carry: Carry = streams, None, None
        pieces: list[tuple[bool, Sequence[Tree], Array]] = (
            [(True, _each(dense, lead), jnp.arange(lead))] if lead else []
        )
        if lead < self.per:
            pieces.append((not self.model.num_experts, layers[lead:], stage * self.per + jnp.arange(lead, self.per)))
        aux: Any = None
        for piece in pieces:
            carry, aux = self._run(*piece, carry, documents, end=piece is pieces[-1])
        if lead == self.per:
            return carry[0], jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), self.aux)
        return carry[0], jax.tree.map(lambda a: jnp.concatenate([jnp.zeros((lead, *a.shape[1:]), a.dtype), a]), aux)

    def _run(
        self, dense: bool, layers: Sequence[Tree], indices: Array, carry: Carry, documents: Array | None, end: bool
    ) -> tuple[Carry, Tree]:
        """Run blocks in order, and return (carry, auxiliary values).  The backward recomputes values as model.remat says.

        If these are the last blocks of the stage (`end`), the pending write follows.
        """
        model, count = self.model, len(layers)

        def block(only: int | None, params: Tree, carry: Tree, layer: Array) -> tuple[Tree, Tree]:
            one = Block(model, 0, dense, only=only, parent=None)
            out: Any = one.apply({"params": params}, carry, layer, documents=documents)
            return out[0], out[1][1]

        def written(carry: Carry) -> Carry:
            streams, c, y = carry
            assert y is not None
            return self.ends(self.outer).write(streams, c, y), None, None

        def last(params: Tree, carry: Tree, layer: Array) -> tuple[Tree, Tree]:
            carry, aux = block(None, params, carry, layer)
            return written(carry), aux

        if model.remat_policy == "connection":
            L_r = block_length(model, carry[0], sublayers=2 * count)
            return recomputed(block, list(layers), carry, indices, 2, L_r, end=written if end else None)
        collected = []
        for k, params in enumerate(layers):
            whole = last if end and k == count - 1 else functools.partial(block, None)
            carry, aux = (jax.checkpoint(whole) if model.remat_policy == "full" else whole)(params, carry, indices[k])
            collected.append(aux)
        return carry, jax.tree.map(lambda *each: jnp.stack(each), *collected)

    # -- its gradient in parts

    def vjp(
        self, leads: bool, layers: Sequence[Tree], carry: Tree, stage: Array, documents: Array | None
    ) -> tuple[Tree, Any, Tree]:
        """Run the blocks of a stage, and return (streams that leave the stage, pull-back, auxiliary values).

        The pull-back takes the gradient of these streams, and returns the gradients of (`layers`, leading dense blocks, `carry`).
        """
        dense = self.dense(self.outer, leads)
        return jax.vjp(
            lambda l, d, c: self.blocks(leads, l, d, c, stage, documents), layers, dense, carry, has_aux=True
        )

    def _pushed(self, leads: bool, free: Free, carry: Tree) -> tuple[tuple[Tree, Tree], list[Array]]:
        """Run `vjp`.  Return ((streams, auxiliary values), arrays that the pull-back holds)."""
        layers, stage, documents = free
        carry, pull, aux = self.vjp(leads, layers, carry, stage, documents)
        return (carry, aux), jax.tree.leaves(pull)

    def pulled(self, leads: bool, free: Free, given: tuple[Sequence[Array], Tree]) -> tuple[Tree, Tree]:
        """Run the backward of a stage.  `given` is (values that F kept, gradient of the streams that leave the stage).

        Returns:
          (gradient of the streams that entered the stage, (gradients of its blocks, gradients of the dense blocks)).
        """
        (layers, stage, documents), (kept, g) = free, given
        # Of this pull-back only the tree structure is used.  Its arrays come from the values that F kept.
        _, pull, _ = self.vjp(leads, layers, self.packer.zeros(), stage, documents)
        leaves = self.passes[leads].later(free, None, kept)
        g_layers, g_dense, g_x = jax.tree.unflatten(jax.tree.structure(pull), leaves)(g)
        return g_x, (g_layers, g_dense)

    def forward(
        self, work: Work, x: Callable[[], Tree], sums: Tree, gradients: Tree, put: Callable[[Tree, Tree], Tree]
    ) -> tuple[dict[str, Tree], Tree, Tree]:
        """Run F of one stage and microbatch.  The last stage also computes the loss and its gradient.

        Args:
          work: the stage and the microbatch.
          x: makes the packed boundary tensor that enters the stage.  The first stage embeds the tokens instead.
          sums: gradients of the parameters outside the blocks, added up so far.
          gradients: buffer of gradients of boundary tensors.
          put: function (buffer, g) -> buffer that writes g, the packed gradient of the loss with respect to the boundary tensor
            that leaves the last stage.

        Returns:
          (dict of `F`, `activations`, `loss` and auxiliary values `aux`, new `sums`, new `gradients`).  `F` is the packed boundary
          tensor that leaves the stage.  Only the last stage changes `gradients`.
        """
        layers, batch, stage = work.layers, work.batch, work.stage
        head = self.head(self.outer)
        with jax.named_scope(FIRST):
            # The buffer is read inside of the conditional, because XLA copies a result that a branch only passes on.
            packed = jax.lax.cond(
                stage == 0, lambda: self.packer.pack(self.enter(head, batch["inputs"])), lambda: placed(x())
            )
        entered = self.packer.unpack(packed)
        (left, aux), kept = self.passes[work.leads].now((layers, stage, batch.get("documents")), entered)
        activations = self.activations.put(work.leads, kept)

        def end() -> tuple[Array, Tree, Tree]:
            loss, back = jax.vjp(lambda p, c: self.loss(p, c, batch["targets"]), self.tail(self.outer), left)
            g, g_x = back(jnp.ones(()))
            return loss, put(gradients, self.packer.pack(g_x)), _added(sums, g)

        with jax.named_scope(LAST):
            last = stage == self.stages - 1
            loss, gradients, sums = jax.lax.cond(last, end, lambda: (jnp.zeros(()), gradients, sums))
        made = {"F": self.packer.pack(left), "activations": activations, "loss": loss, "aux": aux}
        return made, sums, gradients

    def backward(
        self,
        kind: str,
        work: Work,
        chunk: Array,
        activations: Sequence[Array],
        g: Tree,
        deferrals: Sequence[Array],
        sums: tuple[Tree, Tree],
    ) -> tuple[dict[str, Tree], tuple[Tree, Tree]]:
        """Run B, I or W of one stage and microbatch.

        Args:
          kind: the operation to run: `B`, `I` or `W`.
          work: the stage and the microbatch.
          chunk: position of the stage among the stages of the device.
          activations: the values that F of the same stage and microbatch kept.
          g: packed gradient of the boundary tensor that leaves the stage.
          deferrals: the values that I of the same stage and microbatch kept.  Only W uses them.
          sums: (gradients outside the blocks, gradients of the blocks [chunks, ...]), added up so far.

        Returns:
          (dict, new `sums`).  After B and I the dict has `B`, the packed gradient of the boundary tensor that enters the stage.
          After I it also has `deferrals`.
        """
        leads, layers, batch, stage = work
        free = layers, stage, batch.get("documents")
        given = self.activations.take(leads, activations), self.packer.unpack(g)
        outer, inner = sums
        made: dict[str, Tree] = {}
        if kind == "B":
            g_x, (g_layers, g_dense) = self.pulled(leads, free, given)
        elif kind == "I":
            g_x, between = self.halves[leads].now(free, given)
            made["deferrals"] = self.deferrals.put(leads, between)
        else:
            g_layers, g_dense = self.halves[leads].later(free, given, self.deferrals.take(leads, deferrals))
        if kind != "W":
            made["B"] = self.packer.pack(g_x)
            head = self.head(self.outer)

            def begin() -> Tree:
                _, back = jax.vjp(lambda p: self.enter(p, batch["inputs"]), head)
                return _added(outer, back(g_x)[0])

            with jax.named_scope(FIRST):
                outer = jax.lax.cond(stage == 0, begin, lambda: outer)
        if kind != "I":
            for k, g_block in enumerate(g_layers):
                inner = jax.tree.map(lambda a, b, k=k: a.at[chunk, k].add(b), inner, g_block)
            outer = _added(outer, {"dense_layers": g_dense} if g_dense else {})
        return made, (outer, inner)


def _each(stacked: Tree, count: int) -> list[Tree]:
    """Return the trees that `stacked` has along its first axis."""
    parts = jax.tree.map(lambda a: jax.lax.split(a, (1,) * count), stacked)
    return [
        jax.tree.map(lambda part, k=k: part[k][0], parts, is_leaf=lambda node: isinstance(node, list))
        for k in range(count)
    ]


def _added(sums: Tree, part: Tree) -> Tree:
    return sums | {name: jax.tree.map(jnp.add, sums[name], g) for name, g in part.items()}
