"""What one device does in one tick of a pipeline: forward and backward of a stage, and what has to be kept in between.

B is the whole VJP of a stage; I what its part to the stage's input needs, W the rest (`split`).  Embedding and output embedding
are computed on their stages alone; the gradient of the loss is taken in the last stage's forward, so that logits live in no buffer.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from mhc_jax.config import ModelConfig
from mhc_jax.layers.norm import RMSNorm
from mhc_jax.model import Block, connection, cross_entropy, enter, leave, logits_of
from mhc_jax.pipeline.boundary import Boundary
from mhc_jax.pipeline.casts import cast, computed_in
from mhc_jax.pipeline.split import CHEAP, EXACT, split
from mhc_jax.remat import block_length, recomputed

Tree = Any

FIRST, LAST = "first_stage", "last_stage"
"""Scopes, in the names of compiled operations, of what these stages alone do."""


class Stage:
    """What a device does in one tick, as branches for `jax.lax.switch`, and the shapes of its buffers."""

    def __init__(self, model: ModelConfig, stages: int, outer: Tree, tokens: Array, layers: Tree, halves: bool = False):
        """Args: parameters outside the blocks; tokens of a microbatch; own blocks, [chunks, blocks of a stage, ...]."""
        self.model, self.outer, self.stages = model, outer, stages
        self.per = model.num_layers // stages
        at = jnp.zeros((), jnp.int32)
        self.boundary = Boundary(lambda tokens: self.enter(self.head(), tokens), tokens)
        first = jax.tree.map(lambda a: a[0], layers)
        self.aux = jax.eval_shape(lambda: self.blocks(False, first, {}, self.boundary.zeros(), at)[1])
        """Of a stage's blocks, [blocks of a stage, ...]."""
        self.outer, self.layers = self._cast(layers, tokens, at)
        own = jax.tree.map(lambda a: a[0], self.layers)
        variants = (False, True) if model.num_leading else (False,)
        # In float32 it rounds as the decoder without stages.
        again = EXACT if model.compute_dtype == "float32" else CHEAP
        self.cuts = {
            leads: split(functools.partial(self._pushed, leads), (own, at), self.boundary.zeros(), True, again)
            for leads in variants
        }
        """Forward passes, and what their pull-backs hold."""
        self.pool, self.lies = pooled({leads: one.between for leads, one in self.cuts.items()})
        self.halves = {}
        for leads in variants if halves else ():
            given = [self.pool[k] for k in self.lies[leads]], self.boundary.tree
            self.halves[leads] = split(functools.partial(self.pulled, leads), (own, at), given, again=again)
        self.deferred, self.puts = pooled({leads: one.between for leads, one in self.halves.items()})

    def _cast(self, layers: Tree, tokens: Array, at: Array) -> tuple[Tree, Tree]:
        """(`outer`, `layers`) in the types that the model computes with."""
        carry, lead = self.boundary.zeros(), self.model.num_leading
        own = jax.tree.map(lambda a: a[0], layers)

        def whole(params: tuple[Tree, Tree]) -> Any:
            self.outer, own = params
            told = [self.blocks(leads, own, self.dense(leads), carry, at) for leads in {False, lead > 0}]
            return told, self.enter(self.head(), tokens), self.loss(self.tail(), carry, tokens)

        outer = self.outer
        dtypes = computed_in(whole, (outer, own))
        self.outer = outer
        return cast(outer, dtypes[0]), cast(layers, dtypes[1])

    # -- the model

    def head(self) -> Tree:
        """Parameters outside the blocks that the input embedding needs."""
        return {name: self.outer[name] for name in ("embedding", "ends") if name in self.outer}

    def tail(self) -> Tree:
        """Those that the loss needs."""
        unembedding = "embedding" if self.model.tied_embeddings else "unembedding"
        return {name: self.outer[name] for name in (unembedding, "final_norm", "ends") if name in self.outer}

    def dense(self, leads: bool) -> Tree:
        """The dense blocks in front of those with experts."""
        return self.outer["dense_layers"] if leads and self.model.num_leading else {}

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

    def blocks(self, leads: bool, layers: Tree, dense: Tree, carry: Tree, stage: Array) -> tuple[Tree, Tree]:
        """(carry behind the stage's blocks, aux [blocks, ...]; zeros of a dense one)."""
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
        """Blocks one after another, as model.remat says."""
        model, count = self.model, len(indices)
        if model.remat == "connection":

            def sublayer(k: int, params: Tree, carry: Tree, layer: Array) -> tuple[Tree, Tree]:
                out: Any = Block(model, 0, dense, only=k, parent=None).apply({"params": params}, carry, layer)
                return out[0], out[1][1]

            L_r = block_length(model, carry[0], sublayers=2 * count)
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

    def vjp(self, leads: bool, layers: Tree, carry: Tree, stage: Array) -> tuple[Tree, Any, Tree]:
        """(carry, pull-back to (layers, dense, carry), aux)."""
        function = functools.partial(self.blocks, leads)
        return jax.vjp(lambda l, d, c: function(l, d, c, stage), layers, self.dense(leads), carry, has_aux=True)

    def _pushed(self, leads: bool, free: tuple[Tree, Array], carry: Tree) -> tuple[tuple[Tree, Tree], list[Array]]:
        """((carry, aux), leaves of the pull-back), of (weights, stage) and the carry."""
        carry, pull, aux = self.vjp(leads, free[0], carry, free[1])
        return (carry, aux), jax.tree.leaves(pull)

    def forward(
        self, leads: bool, layers: Tree, batch: Tree, stage: Array, x: Tree, sums: Tree
    ) -> tuple[dict[str, Tree], Tree]:
        """(F: boundary tensor to send, or on the last stage its gradient; held: activations; loss; aux), and `sums` of gradients
        outside the blocks."""
        head = self.head()
        with jax.named_scope(FIRST):
            x = jax.lax.cond(stage == 0, lambda: self.enter(head, batch["inputs"]), lambda: self.boundary.unpack(x))
        (x, aux), kept = self.cuts[leads].now((layers, stage), x)
        held = [jnp.zeros(a.shape, a.dtype) for a in self.pool]
        for leaf, k in zip(kept, self.lies[leads], strict=True):
            held[k] = leaf

        def end() -> tuple[Array, Tree, Tree]:
            loss, back = jax.vjp(lambda p, c: self.loss(p, c, batch["targets"]), self.tail(), x)
            g, g_x = back(jnp.ones(()))
            return loss, g_x, _added(sums, g)

        with jax.named_scope(LAST):
            loss, x, sums = jax.lax.cond(stage == self.stages - 1, end, lambda: (jnp.zeros(()), x, sums))
        return {"F": self.boundary.pack(x), "held": held, "loss": loss, "aux": aux}, sums

    def backward(
        self,
        leads: bool,
        kind: str,
        layers: Tree,
        batch: Tree,
        stage: Array,
        chunk: Array,
        kept: Sequence[Array],
        g: Tree,
        put_off: Sequence[Array],
        sums: tuple[Tree, Tree],
    ) -> tuple[dict[str, Tree], tuple[Tree, Tree]]:
        """(B: gradient of the stage's input; put_off: what waits for W), and sums of gradients outside the blocks and of them."""
        free, given = (layers, stage), ([kept[k] for k in self.lies[leads]], self.boundary.unpack(g))
        outer, inner = sums
        made: dict[str, Tree] = {}
        if kind == "B":
            g_x, (g_layers, g_dense) = self.pulled(leads, free, given)
        elif kind == "I":
            g_x, between = self.halves[leads].now(free, given)
            made["put_off"] = [jnp.zeros(a.shape, a.dtype) for a in self.deferred]
            for leaf, k in zip(between, self.puts[leads], strict=True):
                made["put_off"][k] = leaf
        else:
            g_layers, g_dense = self.halves[leads].later(free, given, [put_off[k] for k in self.puts[leads]])
        if kind != "W":
            made["B"] = self.boundary.pack(g_x)
            head = self.head()

            def begin() -> Tree:
                _, back = jax.vjp(lambda p: self.enter(p, batch["inputs"]), head)
                return _added(outer, back(g_x)[0])

            with jax.named_scope(FIRST):
                outer = jax.lax.cond(stage == 0, begin, lambda: outer)
        if kind != "I":
            inner = jax.tree.map(lambda a, b: a.at[chunk].add(b), inner, g_layers)
            outer = _added(outer, {"dense_layers": g_dense} if g_dense else {})
        return made, (outer, inner)

    def pulled(self, leads: bool, free: tuple[Tree, Array], given: tuple[Sequence[Array], Tree]) -> tuple[Tree, Tree]:
        """(gradient of the input, those of (own blocks, dense blocks)), of (weights, stage) and (what is kept, gradient)."""
        (layers, stage), (kept, g) = free, given
        # Of this forward only the structure is used.
        _, pull, _ = self.vjp(leads, layers, self.boundary.zeros(), stage)
        leaves = self.cuts[leads].later(free, None, kept)
        g_layers, g_dense, g_x = jax.tree.unflatten(jax.tree.structure(pull), leaves)(g)
        return g_x, (g_layers, g_dense)


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


def _added(sums: Tree, part: Tree) -> Tree:
    return sums | {name: jax.tree.map(jnp.add, sums[name], g) for name, g in part.items()}
