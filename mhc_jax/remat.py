"""Recomputing the connections in the backward pass (mHC section 4.3.2), and the scan over depth that does it.

Of L sub-layers, every L_r-th keeps the streams that enter it (nC a token) and every one what autodiff of its branch F keeps,
but for h, and y = F(h) (C).  The backward pass computes streams, coefficients and h of L_r sub-layers again from those; F is not
run again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.extend import core

from mhc_jax.config import ModelConfig
from mhc_jax.cost.memory_io import best_recompute

KEPT = "branch"
"""Name of the values that the policy `connection` keeps."""

Branch = Callable[[Any, jax.Array], tuple[jax.Array, Any]]
Sublayer = Callable[[int, Any, Any, jax.Array], tuple[Any, dict[str, Any]]]


def block_length(config: ModelConfig, streams: Any) -> int:
    """L_r: that of model.remat, or the one with the least memory for these streams (`memory_io.best_recompute`)."""
    tokens = jax.tree.leaves(streams)[0].shape[:2]
    carried = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(streams))
    return config.remat_block or best_recompute(config.num_sublayers, carried // (math.prod(tokens) * config.width))


def keep_branch(function: Branch, params: Any, h: jax.Array) -> tuple[jax.Array, Any]:
    """function(params, h) = (y, aux), of which `recomputed` keeps y and what its gradient needs, so that it runs once.

    What depends on the parameters alone (their casts, masks, angles of RoPE) is made again: it has no token axis to compute on.
    h is made again by the boundary.  No gradient flows through aux.
    """

    @jax.custom_vjp
    def branch(params, h):
        return function(params, h)

    def forward(params, h):
        y, pull, aux = jax.vjp(function, params, h, has_aux=True)
        leaves, tree = jax.tree.flatten(pull)
        keep = _made_from(h, lambda h: jax.tree.leaves(jax.vjp(function, params, h, has_aux=True)[1]))
        named: dict[int, jax.Array] = {}
        for leaf, of_h in zip(leaves, keep, strict=True):
            if id(leaf) not in named:
                named[id(leaf)] = checkpoint_name(leaf, KEPT) if of_h else leaf
        return (checkpoint_name(y, KEPT), aux), tree.unflatten([named[id(leaf)] for leaf in leaves])

    branch.defvjp(forward, lambda pull, g: pull(g[0]))
    return branch(params, h)


def reached(jaxpr: core.Jaxpr, start: Iterable[Any]) -> set[Any]:
    """`start`, some variables of a jaxpr, and all that is computed from them."""
    found = set(start)
    for eqn in jaxpr.eqns:
        if any(isinstance(v, core.Var) and v in found for v in eqn.invars):
            found.update(eqn.outvars)
    return found


def _made_from(h: jax.Array, function: Callable[[jax.Array], list[jax.Array]]) -> list[bool]:
    """Which results of `function` are computed from h, h itself not among them."""
    jaxpr = jax.make_jaxpr(function)(h).jaxpr
    made = reached(jaxpr, jaxpr.invars) - set(jaxpr.invars)
    return [isinstance(v, core.Var) and v in made for v in jaxpr.outvars]


def recomputed(
    sublayer: Sublayer, params: Any, carry: Any, indices: jax.Array, kinds: int, L_r: int, unroll: int = 1
) -> tuple[Any, dict[str, Any]]:
    """Run the sub-layers of N blocks in order, keeping the carry of every L_r-th and the branches (`keep_branch`).

    A scan over as many blocks as hold a whole number of times L_r sub-layers, then the blocks that are left.

    Args:
      sublayer: (which of a block's, parameters of the block, carry, index of the block) -> (carry, aux).
      params: stacked, [N, ...].
      carry: of the first sub-layer.
      indices: of the blocks, [N].
      kinds: sub-layers of a block.
      L_r: sub-layers between two carries that are kept, at least 1; it need not divide their number.
      unroll: blocks per step of the scan, at least.

    Returns:
      the last carry, and aux of the sub-layers of a block as one dict, stacked over blocks.
    """
    blocks = len(indices)
    period = math.lcm(kinds, min(L_r, kinds * blocks)) // kinds
    turns = blocks // period

    def run(carry, params_and_indices, *, prevent_cse):
        """Some blocks, L_r sub-layers at a time."""
        count = len(params_and_indices[1])

        def segment(carry, params_and_indices, *, start, stop):
            # Its transpose is a concatenation; that of an index would be a sum of padded arrays.
            each = jax.tree.map(lambda a: jax.lax.split(a, (1,) * count), params_and_indices)
            collected = []
            for l in range(start, stop):
                own, index = jax.tree.map(
                    lambda parts, b=l // kinds: parts[b][0], each, is_leaf=lambda node: isinstance(node, list)
                )
                carry, aux = sublayer(l % kinds, own, carry, index)
                collected.append(aux)
            return carry, collected

        collected = []
        for start in range(0, kinds * count, L_r):
            keep = jax.checkpoint(
                lambda *a, start=start: segment(*a, start=start, stop=min(start + L_r, kinds * count)),
                prevent_cse=prevent_cse,
                policy=jax.checkpoint_policies.save_only_these_names(KEPT),
            )
            carry, aux = keep(carry, params_and_indices)
            collected += aux
        merged = [
            {key: value for aux in collected[i : i + kinds] for key, value in aux.items()}
            for i in range(0, kinds * count, kinds)
        ]
        return carry, jax.tree.map(lambda *leaves: jnp.stack(leaves), *merged)

    def part(first, last):
        return jax.tree.map(lambda a: a[first:last], (params, indices))

    pieces = []
    if turns:
        whole = jax.tree.map(lambda a: a.reshape(turns, period, *a.shape[1:]), part(0, turns * period))
        steps = min(max(1, unroll // period), turns)
        # A loop keeps forward and backward apart by itself, unless it is unrolled, by us or because it has one turn.
        alone = steps < turns
        carry, aux = jax.lax.scan(
            lambda carry, own: run(carry, own, prevent_cse=not alone), carry, whole, length=turns, unroll=steps
        )
        pieces.append(jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), aux))
    if turns * period < blocks:
        carry, aux = run(carry, part(turns * period, blocks), prevent_cse=True)
        pieces.append(aux)
    return carry, jax.tree.map(lambda *parts: jnp.concatenate(parts), *pieces)
