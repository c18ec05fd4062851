r"""Recomputing connections, but no branches, in the backward pass (mHC section 4.3.2), with a scan over depth that does it.

The forward pass keeps three things: the streams that enter every L_r-th sub-layer, every branch output y, and the values that the
gradient of every branch F needs beside its input h.  From these the backward pass computes streams, coefficients and h again, L_r
sub-layers at a time.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.extend import core

from mhc_jax.config import ModelConfig
from mhc_jax.errors import require
from mhc_jax.jaxprs import computed_from

KEPT = "branch"
"""Name (`checkpoint_name`) that marks the values which the remat policy `connection` keeps for the backward pass."""

Branch = Callable[..., tuple[jax.Array, Any]]
Sublayer = Callable[[int, Any, Any, jax.Array], tuple[Any, dict[str, Any]]]


def kept_elements(L_r: int, L: int, n: int, C: int) -> int:
    r"""Return the number of elements per token that connections keep if every L_r-th sub-layer stores its streams (mHC Eq. 20).

    $$nC \lceil L / L_r \rceil + (n + 2) C L_r$$

    The first term counts the stored streams.  The second term counts the values that are in memory while L_r sub-layers are
    computed again.  The LC elements of the branch outputs y do not depend on L_r and are left out, as in the paper.

    Raises:
      InputError: L_r is not between 1 and L.
    """
    require(1 <= L_r <= L, f"L_r is {L_r}; give a number of sub-layers from 1 to L = {L}.")
    return n * C * math.ceil(L / L_r) + (n + 2) * C * L_r


def best_block_length(L: int, n: int) -> int:
    r"""Return the number L_r of sub-layers to recompute at a time for which connections keep the fewest elements (mHC Eq. 20).

    If several L_r have equally few `kept_elements`, the smallest of them is returned.

    $$L_r^* = \arg\min_{L_r} \left[ nC \lceil L / L_r \rceil + (n + 2) C L_r \right] \approx \sqrt{nL / (n + 2)}$$
    """
    return min(range(1, L + 1), key=lambda L_r: kept_elements(L_r, L, n, 1))


def block_length(config: ModelConfig, streams: Any, sublayers: int = 0) -> int:
    """Return the number L_r of sub-layers recomputed at a time: the number in model.remat (`connection:6`), or the best one.

    The best one is `best_block_length` of L sub-layers.

    Args:
      config: the configuration of the model.
      streams: the streams that enter a sub-layer, as arrays or shapes [B, T, ...].  n is their size divided by B T C.
      sublayers: number L of sub-layers.  0 means all sub-layers of the model.
    """
    tokens = jax.tree.leaves(streams)[0].shape[:2]
    carried = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(streams))
    n = carried // (math.prod(tokens) * config.width)
    return config.remat_block or best_block_length(sublayers or config.num_sublayers, n)


def keep_branch(function: Branch, params: Any, h: jax.Array, *given: Any) -> tuple[jax.Array, Any]:
    """Run a branch, (y, aux) = function(params, h, *given), so that under `recomputed` the backward pass does not run it again.

    The forward pass keeps y and the values that the gradient of the branch needs, with two exceptions.  Values that do not depend
    on h (casts of parameters, masks, angles of RoPE) are computed again, because they cost nothing per token.  The input h is
    computed again by the boundary before the branch.

    No gradient flows through the auxiliary values aux, and none to the further arguments `given`.
    """

    @jax.custom_vjp
    def branch(params, h, *given):
        return function(params, h, *given)

    def forward(params, h, *given):
        def with_given(params, h):
            return function(params, h, *given)

        y, pull, aux = jax.vjp(with_given, params, h, has_aux=True)
        leaves, tree = jax.tree.flatten(pull)
        keep = _made_from(h, lambda h: jax.tree.leaves(jax.vjp(with_given, params, h, has_aux=True)[1]))
        named: dict[int, jax.Array] = {}
        for leaf, of_h in zip(leaves, keep, strict=True):
            if id(leaf) not in named:
                named[id(leaf)] = checkpoint_name(leaf, KEPT) if of_h else leaf
        return (checkpoint_name(y, KEPT), aux), tree.unflatten([named[id(leaf)] for leaf in leaves])

    branch.defvjp(forward, lambda pull, g: (*pull(g[0]), *(None for _ in given)))
    return branch(params, h, *given)


def _made_from(h: jax.Array, function: Callable[[jax.Array], list[jax.Array]]) -> list[bool]:
    """Return for each result of function(h) whether it depends on h.  For a result that is h itself, return False."""
    jaxpr = jax.make_jaxpr(function)(h).jaxpr
    made = computed_from(jaxpr, jaxpr.invars) - set(jaxpr.invars)
    return [isinstance(v, core.Var) and v in made for v in jaxpr.outvars]


def recomputed(
    sublayer: Sublayer,
    params: Any,
    carry: Any,
    indices: jax.Array,
    kinds: int,
    L_r: int,
    unroll: int = 1,
    end: Callable[[Any], Any] | None = None,
) -> tuple[Any, dict[str, Any]]:
    """Run the sub-layers of N blocks in order, so that the backward pass recomputes L_r sub-layers at a time.

    The forward pass keeps the carry (state between sub-layers) that enters every L_r-th sub-layer, and the values that
    `keep_branch` marks.  The backward pass computes all other values again.

    The blocks run in a scan.  One iteration runs the smallest number of blocks that have a multiple of L_r sub-layers.  Blocks that
    are too few for one more iteration run after the scan.  Blocks whose parameters are a list run one after another, and the carry
    may then change its form on the way.

    Args:
      sublayer: function that runs one sub-layer: (position in its block, parameters of the block, carry, index of the block)
        -> (carry, aux), where aux is a dict of arrays.
      params: stacked parameters of all blocks, [N, ...], or a list of those of each block.
      carry: the carry that enters the first sub-layer.
      indices: indices of the blocks in the decoder, [N].
      kinds: number of sub-layers in a block, which is 2 in the decoder (attention and feed-forward).
      L_r: number of sub-layers between two kept carries, at least 1.  It need not divide the number of sub-layers.
      unroll: number of blocks in one step of the compiled loop, rounded down to a whole number of iterations (at least one).
      end: with a list of parameters, a function of the carry after the last sub-layer, which the backward pass computes again
        together with the last L_r sub-layers.

    Returns:
      (carry after the last block, aux).  The aux dicts of the sub-layers of one block are merged, and then stacked over blocks.
    """
    blocks = len(indices)
    period = math.lcm(kinds, min(L_r, kinds * blocks)) // kinds
    turns = blocks // period
    run = functools.partial(_run_blocks, sublayer, kinds, L_r)

    def part(first, last):
        return jax.tree.map(lambda a: a[first:last], (params, indices))

    pieces = []
    if isinstance(params, list):
        for first in range(0, blocks, period):
            part_of_all = params[first : first + period], indices[first : first + period]
            finish = end if first + period >= blocks else None
            carry, aux = run(carry, part_of_all, prevent_cse=True, end=finish)
            pieces.append(aux)
    elif turns:
        whole = jax.tree.map(lambda a: a.reshape(turns, period, *a.shape[1:]), part(0, turns * period))
        steps = min(max(1, unroll // period), turns)
        # `prevent_cse` keeps XLA from replacing recomputed values by those of the forward pass.  A loop needs no such care, because
        # its backward pass is a loop of its own.  A scan with one iteration, or unrolled to the end, compiles to no loop.
        is_loop = steps < turns
        carry, aux = jax.lax.scan(
            lambda carry, blocks: run(carry, blocks, prevent_cse=not is_loop), carry, whole, length=turns, unroll=steps
        )
        pieces.append(jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), aux))
    if turns * period < blocks and not isinstance(params, list):
        carry, aux = run(carry, part(turns * period, blocks), prevent_cse=True)
        pieces.append(aux)
    return carry, jax.tree.map(lambda *parts: jnp.concatenate(parts), *pieces)


def _run_blocks(
    sublayer: Sublayer,
    kinds: int,
    L_r: int,
    carry: Any,
    blocks: Any,
    prevent_cse: bool,
    end: Callable[[Any], Any] | None = None,
) -> tuple[Any, Any]:
    """Run `blocks`, given as (params, indices), and then `end`.  The backward pass recomputes L_r sub-layers at a time."""
    count = len(blocks[1])
    collected: list[dict[str, Any]] = []
    for start in range(0, kinds * count, L_r):
        segment = range(start, min(start + L_r, kinds * count))
        last = end if segment.stop == kinds * count else None
        keep = jax.checkpoint(
            functools.partial(_run_segment, sublayer, kinds, segment, last),
            prevent_cse=prevent_cse,
            policy=jax.checkpoint_policies.save_only_these_names(KEPT),
        )
        carry, aux = keep(carry, blocks)
        collected += aux
    merged = [
        {key: value for aux in collected[i : i + kinds] for key, value in aux.items()}
        for i in range(0, kinds * count, kinds)
    ]
    return carry, jax.tree.map(lambda *leaves: jnp.stack(leaves), *merged)


def _run_segment(
    sublayer: Sublayer, kinds: int, segment: range, end: Callable[[Any], Any] | None, carry: Any, blocks: Any
) -> tuple[Any, list[Any]]:
    """Run the sub-layers of `blocks` whose numbers, from 0 on, are in `segment`, and then `end`, if it is given.

    Return (carry, list of their aux dicts).
    """
    # Stacked arrays are split and not indexed: the gradient of a split is a concatenation, that of indexing is a sum of padded
    # arrays.
    listed = isinstance(blocks[0], list)
    each = blocks if listed else jax.tree.map(lambda a: jax.lax.split(a, (1,) * len(a)), blocks)
    collected = []
    for l in segment:
        b = l // kinds
        params, index = (
            (each[0][b], each[1][b])
            if listed
            else jax.tree.map(lambda parts, b=b: parts[b][0], each, is_leaf=lambda node: isinstance(node, list))
        )
        carry, aux = sublayer(l % kinds, params, carry, index)
        collected.append(aux)
    return carry if end is None else end(carry), collected
