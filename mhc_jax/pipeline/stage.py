"""The operations of one stage of a pipeline: its forward, its backward, and what is kept between the two.

B is the whole VJP of a stage.  I is the part that makes the gradient of the stage's input, and W the rest (`split`).  Only the
first stage embeds tokens, and only the last one computes logits and the loss.  The last stage takes the gradient of the loss within
its forward, so that no buffer holds logits.

Where a decoder begins with dense blocks before those with experts, the first stage computes other blocks than the others.  That
variant of a stage is named `leads`, and every function of it is traced once for each variant.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from mhc_jax.config import ModelConfig
from mhc_jax.layers.norm import NORM_EPS, RMSNorm
from mhc_jax.model import Block, connection, cross_entropy, enter, leave, logits_of
from mhc_jax.pipeline.boundary import Boundary
from mhc_jax.pipeline.casts import cast, computed_in
from mhc_jax.pipeline.split import CHEAP, EXACT, split
from mhc_jax.remat import block_length, recomputed

Tree = Any

FIRST, LAST = "first_stage", "last_stage"
"""Name scopes of the operations that only the first and only the last stage run."""


class Pool:
    """One list of arrays with room for the values of either variant of a stage, so that both use one buffer."""

    def __init__(self, variants: Mapping[bool, Sequence[jax.ShapeDtypeStruct]]):
        """Give every value of each variant (shapes and dtypes) a position; equal arrays of two variants share one."""
        self.shapes: list[jax.ShapeDtypeStruct] = []
        self.places: dict[bool, list[int]] = {}
        """For each variant, the position of every value."""
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
        """The list with the values of a variant; zeros elsewhere."""
        out = [jnp.zeros(a.shape, a.dtype) for a in self.shapes]
        for k, a in zip(self.places[leads], values, strict=True):
            out[k] = a
        return out

    def take(self, leads: bool, pool: Sequence[Any]) -> list[Any]:
        """The values of a variant."""
        return [pool[k] for k in self.places[leads]]


class Work(NamedTuple):
    """One stage and one microbatch, on which an operation works."""

    leads: bool
    """Whether the stage begins with dense blocks."""
    layers: Tree
    """Parameters of its blocks, [blocks of a stage, ...]."""
    batch: Tree
    """`inputs` and `targets` [B, T]."""
    stage: Array
    """Its number, int32 []."""


class Stage:
    """The operations of a device, as branches for `jax.lax.switch`, and the shapes of their results."""

    def __init__(self, model: ModelConfig, stages: int, outer: Tree, tokens: Array, layers: Tree, halves: bool = False):
        """Trace the operations.

        Args:
          model: the whole decoder.
          stages: how many stages it is cut into.
          outer: parameters outside the stacked blocks.
          tokens: of one microbatch.
          layers: parameters of this device's blocks, [chunks, blocks of a stage, ...].
          halves: whether the schedule has I and W.
        """
        self.model, self.stages = model, stages
        self.per = model.num_layers // stages
        at = jnp.zeros((), jnp.int32)
        self.boundary = Boundary(lambda tokens: self.enter(self.head(outer), tokens), tokens)
        first = jax.tree.map(lambda a: a[0], layers)
        self.aux = jax.eval_shape(lambda: self.blocks(False, first, {}, self.boundary.zeros(), at)[1])
        """Shapes of what the blocks of a stage report, [blocks of a stage, ...]."""
        variants = (False, True) if model.num_leading else (False,)

        def all_uses(params: tuple[Tree, Tree]) -> Any:
            outer, layers = params
            carry = self.boundary.zeros()
            results = [self.blocks(leads, layers, self.dense(outer, leads), carry, at) for leads in variants]
            return results, self.enter(self.head(outer), tokens), self.loss(self.tail(outer), carry, tokens)

        dtypes = computed_in(all_uses, (outer, first))
        self.outer, self.layers = cast(outer, dtypes[0]), cast(layers, dtypes[1])
        free = jax.tree.map(lambda a: a[0], self.layers), at
        # In float32 a pipeline then rounds as the decoder without one.
        recompute = EXACT if model.compute_dtype == "float32" else CHEAP
        self.passes = {
            leads: split(functools.partial(self._pushed, leads), free, self.boundary.zeros(), True, recompute)
            for leads in variants
        }
        """Forward passes, split into what F computes and what the backward recomputes."""
        self.activations = Pool({leads: each.between for leads, each in self.passes.items()})
        """What a forward keeps for its backward."""
        self.halves = {}
        """Backward passes, split into I and W."""
        for leads in variants if halves else ():
            given = self.activations.take(leads, self.activations.shapes), self.boundary.tree
            self.halves[leads] = split(functools.partial(self.pulled, leads), free, given, recompute=recompute)
        self.deferrals = Pool({leads: each.between for leads, each in self.halves.items()})
        """What I keeps for W."""

    # -- the model

    def head(self, outer: Tree) -> Tree:
        """The parameters outside the blocks that the input embedding needs."""
        return {name: outer[name] for name in ("embedding", "ends") if name in outer}

    def tail(self, outer: Tree) -> Tree:
        """The parameters outside the blocks that the loss needs."""
        unembedding = "embedding" if self.model.tied_embeddings else "unembedding"
        return {name: outer[name] for name in (unembedding, "final_norm", "ends") if name in outer}

    def dense(self, outer: Tree, leads: bool) -> Tree:
        """The parameters of the dense blocks before those with experts."""
        return outer["dense_layers"] if leads and self.model.num_leading else {}

    def enter(self, params: Tree, tokens: Array) -> Tree:
        """The carry that enters the first block."""
        ends = connection(self.model, None, "ends").bind({"params": params.get("ends", {})})
        return enter(self.model, params["embedding"], ends, tokens)

    def loss(self, params: Tree, carry: Tree, targets: Array) -> Array:
        """The loss of one microbatch in nats per token, float32 []."""
        ends = connection(self.model, None, "ends").bind({"params": params.get("ends", {})})
        norm = RMSNorm(NORM_EPS).bind({"params": params["final_norm"]})
        x = leave(self.model, ends, norm, carry)
        W = params["embedding"].T if self.model.tied_embeddings else params["unembedding"]
        return cross_entropy(logits_of(x, W), targets)

    def blocks(self, leads: bool, layers: Tree, dense: Tree, carry: Tree, stage: Array) -> tuple[Tree, Tree]:
        """Run the blocks of a stage: (carry that leaves them, aux [blocks, ...], which is zero for dense blocks)."""
        lead = self.model.num_leading if leads else 0
        if lead:
            carry, _ = self._run(True, dense, carry, jnp.arange(lead))
            layers = jax.tree.map(lambda a: a[lead:], layers)
        indices = stage * self.per + jnp.arange(lead, self.per)
        if lead == self.per:
            return carry, jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), self.aux)
        carry, aux = self._run(not self.model.num_experts, layers, carry, indices)
        return carry, jax.tree.map(lambda a: jnp.concatenate([jnp.zeros((lead, *a.shape[1:]), a.dtype), a]), aux)

    def _run(self, dense: bool, layers: Tree, carry: Tree, indices: Array) -> tuple[Tree, Tree]:
        """Run blocks one after another, and recompute as model.remat says."""
        model, count = self.model, len(indices)

        def block(only: int | None, params: Tree, carry: Tree, layer: Array) -> tuple[Tree, Tree]:
            out: Any = Block(model, 0, dense, only=only, parent=None).apply({"params": params}, carry, layer)
            return out[0], out[1][1]

        if model.remat_policy == "connection":
            L_r = block_length(model, carry[0], sublayers=2 * count)
            return recomputed(block, layers, carry, indices, 2, L_r, count)
        whole = functools.partial(block, None)
        keep = jax.checkpoint(whole) if model.remat_policy == "full" else whole
        collected = []
        for k in range(count):
            carry, aux = keep(jax.tree.map(lambda a, k=k: a[k], layers), carry, indices[k])
            collected.append(aux)
        return carry, jax.tree.map(lambda *each: jnp.stack(each), *collected)

    # -- its gradient in parts

    def vjp(self, leads: bool, layers: Tree, carry: Tree, stage: Array) -> tuple[Tree, Any, Tree]:
        """The VJP of `blocks`: (carry, pull-back to (layers, dense, carry), aux)."""
        dense = self.dense(self.outer, leads)
        return jax.vjp(lambda l, d, c: self.blocks(leads, l, d, c, stage), layers, dense, carry, has_aux=True)

    def _pushed(self, leads: bool, free: tuple[Tree, Array], carry: Tree) -> tuple[tuple[Tree, Tree], list[Array]]:
        """The forward of (layers, stage) and the carry, as ((carry, aux), leaves of the pull-back)."""
        carry, pull, aux = self.vjp(leads, free[0], carry, free[1])
        return (carry, aux), jax.tree.leaves(pull)

    def pulled(self, leads: bool, free: tuple[Tree, Array], given: tuple[Sequence[Array], Tree]) -> tuple[Tree, Tree]:
        """The backward of (layers, stage) and (kept values, gradient of the carry).

        Returns:
          Gradient of the carry that entered the stage, and gradients of (its blocks, the dense blocks).
        """
        (layers, stage), (kept, g) = free, given
        # Only the structure of this forward is used: the leaves of its pull-back are those that were kept.
        _, pull, _ = self.vjp(leads, layers, self.boundary.zeros(), stage)
        leaves = self.passes[leads].later(free, None, kept)
        g_layers, g_dense, g_x = jax.tree.unflatten(jax.tree.structure(pull), leaves)(g)
        return g_x, (g_layers, g_dense)

    def forward(self, work: Work, x: Tree, sums: Tree) -> tuple[dict[str, Tree], Tree]:
        """F of one stage and microbatch; on the last stage also the loss and its gradient.

        Args:
          work: the stage and the microbatch.
          x: packed boundary tensor; the first stage makes its own from the tokens.
          sums: gradients outside the blocks, added up so far.

        Returns:
          F (packed boundary tensor; on the last stage its gradient), activations, loss and aux as a dict, and `sums`.
        """
        layers, batch, stage = work.layers, work.batch, work.stage
        head = self.head(self.outer)
        with jax.named_scope(FIRST):
            x = jax.lax.cond(stage == 0, lambda: self.enter(head, batch["inputs"]), lambda: self.boundary.unpack(x))
        (x, aux), kept = self.passes[work.leads].now((layers, stage), x)
        activations = self.activations.put(work.leads, kept)

        def end() -> tuple[Array, Tree, Tree]:
            loss, back = jax.vjp(lambda p, c: self.loss(p, c, batch["targets"]), self.tail(self.outer), x)
            g, g_x = back(jnp.ones(()))
            return loss, g_x, _added(sums, g)

        with jax.named_scope(LAST):
            loss, x, sums = jax.lax.cond(stage == self.stages - 1, end, lambda: (jnp.zeros(()), x, sums))
        return {"F": self.boundary.pack(x), "activations": activations, "loss": loss, "aux": aux}, sums

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
        """B, I or W of one stage and microbatch.

        Args:
          kind: `B`, `I` or `W`.
          work: the stage and the microbatch.
          chunk: which of the device's stages it is.
          activations: what the forward kept.
          g: packed gradient of the boundary tensor that leaves the stage.
          deferrals: what I kept, for W.
          sums: gradients (outside the blocks, of the blocks [chunks, ...]), added up so far.

        Returns:
          B (packed gradient of the boundary tensor that enters the stage) and deferrals as a dict, and `sums`.
        """
        leads, layers, batch, stage = work
        free, given = (layers, stage), (self.activations.take(leads, activations), self.boundary.unpack(g))
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
            made["B"] = self.boundary.pack(g_x)
            head = self.head(self.outer)

            def begin() -> Tree:
                _, back = jax.vjp(lambda p: self.enter(p, batch["inputs"]), head)
                return _added(outer, back(g_x)[0])

            with jax.named_scope(FIRST):
                outer = jax.lax.cond(stage == 0, begin, lambda: outer)
        if kind != "I":
            inner = jax.tree.map(lambda a, b: a.at[chunk].add(b), inner, g_layers)
            outer = _added(outer, {"dense_layers": g_dense} if g_dense else {})
        return made, (outer, inner)


def _added(sums: Tree, part: Tree) -> Tree:
    return sums | {name: jax.tree.map(jnp.add, sums[name], g) for name, g in part.items()}
