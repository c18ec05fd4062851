"""The choice of a remat policy for `model.remat=auto`, from estimates of the bytes that each policy keeps for the backward pass.

The estimates need the configuration alone.  The jaxpr of one block shows which values its backward pass needs.  Their bytes are
counted per token.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

from mhc_jax.config import ExperimentConfig, MeshConfig, ModelConfig
from mhc_jax.cost.counts import carry_shapes
from mhc_jax.jaxprs import computed_from
from mhc_jax.model import Block, Decoder, branches, loss_parts
from mhc_jax.parallel.sharding import abstract_mesh, state_shardings
from mhc_jax.remat import block_length

STATE_BYTES = 16
"""Bytes for one entry of a parameter: the entry itself, its gradient and AdamW's two moments, each float32."""
ONE_DEVICE = MeshConfig()


@dataclass(frozen=True)
class Plan:
    """The chosen remat policy, and the estimates that led to the choice."""

    remat: str
    """The chosen policy: `none`, `connection` or `full`."""
    L_r: int
    """Number of sub-layers that the policy `connection` recomputes at a time."""
    estimates: dict[str, float]
    """Estimated bytes on one device under each policy, for parameters, gradients, AdamW's moments, logits, and all values that are
    kept for the backward pass."""
    sentence: str
    """A sentence for the log that says which policy was chosen, and why."""


@dataclass(frozen=True)
class _Sizes:
    """Bytes per token of the values that may be kept for the backward pass."""

    streams: int
    coefficients: int
    h: int
    """Bytes of the branch input h, in the dtype of the streams."""
    y: int
    """Bytes of one branch output."""
    blocks: tuple[int, ...]
    """Bytes that the policy `none` keeps of each block."""
    branches: int
    """Bytes that the policy `connection` keeps of all branches, their outputs y included."""


def plan(config: ModelConfig, tokens: int, sequence_length: int, mesh: MeshConfig = ONE_DEVICE) -> Plan:
    r"""Choose the first of the policies `none`, `connection` and `full` whose estimate fits the memory of a device.

    `connection` has the best L_r (`best_block_length`), unless model.remat gives an L_r.  Its estimate is the values that branches
    keep, plus mHC Eq. 20 in bytes:

    $$(nC + c) \lceil L / L_r \rceil + ((n + 2) C + c) L_r$$

    Here c is the size of the coefficients of the pending write, which the paper does not count.  The 2C are the branch input h and
    the normed h, both in the dtype of the streams.

    All estimates leave out values that are in memory for a short time only.  They count the kept values of a branch in full, even
    if mesh.tensor splits heads and hidden channels among devices.

    Args:
      config: the configuration.  Its remat may give the limit in GB, as in `auto:80`.  Without a limit `connection` is chosen.
      tokens: number of tokens that one device has in one backward pass.
      sequence_length: T.
      mesh: the mesh that splits parameters, gradients, moments and logits.

    Returns:
      the plan.  If no policy fits, the plan is `full`, and its sentence says that it does not fit.
    """
    sizes = _sizes(config, sequence_length)
    L, L_r = config.num_sublayers, block_length(config, carry_shapes(config, 1)[0])
    boundary = sizes.streams + sizes.coefficients
    kept = {
        "none": sum(sizes.blocks),
        "connection": sizes.branches + boundary * math.ceil(L / L_r) + (boundary + 2 * sizes.h) * L_r,
        "full": (boundary + sizes.y) * L // 2 + max(sizes.blocks),
    }
    # A logit takes 8 bytes: 4 for the logit and 4 for its gradient.
    columns = config.vocab_size // (mesh.tensor if config.vocab_size % mesh.tensor == 0 else 1)
    parts = loss_parts(tokens, config.vocab_size) if mesh.stage == 1 else 1
    # A loss in parts keeps the unembedding and its gradient whole on each device, and the gradient in float32 too.
    whole = (4 + 2 * jnp.dtype(config.compute_dtype).itemsize) * config.width * columns if parts > 1 else 0
    fixed = float(state_bytes(config, mesh) + 8 * columns * tokens // parts + whole)
    estimates = {policy: fixed + size * tokens for policy, size in kept.items()}
    limit = config.remat_budget_gb * 1e9
    fitting = [policy for policy, size in estimates.items() if size <= limit]
    chosen = (fitting[0] if fitting else "full") if limit else "connection"
    listed = ", ".join(f"{policy} {size / 1e9:.3g} GB" for policy, size in estimates.items())
    if not limit:
        why = "no memory of a device is given, as model.remat=auto:80 does"
    elif fitting:
        why = f"the first that fits {config.remat_budget_gb:g} GB"
    else:
        why = f"the least, and more than the {config.remat_budget_gb:g} GB there are"
    detail = f" with L_r = {L_r} of {L} sub-layers" if chosen == "connection" else ""
    return Plan(chosen, L_r, estimates, f"model.remat is {chosen!r}{detail}: {why} (estimates: {listed}).")


def state_bytes(config: ModelConfig, mesh: MeshConfig) -> int:
    """Return the bytes that parameters, gradients and AdamW's moments take on one device of the mesh.

    If the mesh stores them over `data` too, the parameters that a step gathers over `data` and the gradients of one slice of
    accumulation count as well, in the compute dtype.  A pipeline gathers parameters in float32.
    """
    shapes = jax.eval_shape(Decoder(config).init, jax.random.key(0), jax.ShapeDtypeStruct((1, 8), jnp.int32))["params"]

    def entries(spread: bool) -> int:
        places = state_shardings(abstract_mesh(mesh), shapes, spread)
        return sum(jax.tree.leaves(jax.tree.map(lambda a, s: math.prod(s.shard_shape(a.shape)), shapes, places)))

    itemsize = jnp.dtype(config.compute_dtype).itemsize if mesh.stage == 1 else 4
    gathered = 2 * itemsize * entries(False) if mesh.data > 1 else 0
    return STATE_BYTES * entries(True) + gathered


def resolve(config: ExperimentConfig) -> tuple[ExperimentConfig, str]:
    """Replace model.remat `auto` by the policy that `plan` chooses for one device of the mesh.

    Args:
      config: a configuration whose model.vocab_size is set.

    Returns:
      (configuration, sentence of the plan).  If model.remat is not `auto`, they are the configuration unchanged and ''.
    """
    data, mesh = config.data, config.mesh
    if config.model.remat_policy != "auto":
        return config, ""
    sequences = data.batch_size // config.optimizer.accumulation_steps
    tokens = sequences * data.sequence_length // (mesh.batch * mesh.sequence)
    planned = plan(config.model, tokens, data.sequence_length, mesh)
    chosen = f"connection:{planned.L_r}" if planned.remat == "connection" else planned.remat
    return config.with_settings(model={"remat": chosen}), planned.sentence


def _sizes(config: ModelConfig, sequence_length: int) -> _Sizes:
    carry = carry_shapes(config, sequence_length)
    dense, sparse = _block_bytes(config, carry, True), _block_bytes(config, carry, not config.num_experts)
    counts = ((dense, config.num_leading), (sparse, config.num_layers - config.num_leading))
    streams, c, y = (
        sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(part)) // sequence_length for part in carry
    )
    return _Sizes(
        streams=streams,
        coefficients=c,
        h=config.width * jnp.dtype(config.stream_dtype).itemsize,
        y=y,
        blocks=tuple(block for (block, _), count in counts for _ in range(count)),
        branches=sum(kept * count for (_, kept), count in counts) + y * config.num_sublayers,
    )


def _block_bytes(config: ModelConfig, carry: Any, dense: bool) -> tuple[int, int]:
    """Return (bytes kept of a block under the policy `none`, bytes kept of its branches under `connection`), both per token.

    `carry` has the shapes of the carry that enters the block, and `dense` says whether the block has no experts.
    """
    block, T = Block(config, 0, dense, parent=None), carry[2].shape[1]
    layer = jax.ShapeDtypeStruct((), jnp.int32)
    params = jax.eval_shape(block.init, jax.eval_shape(lambda: jax.random.key(0)), carry, layer)["params"]

    def apply_block(params, carry):
        return block.apply({"params": params}, carry, jnp.zeros((), jnp.int32))[0]

    h = jax.ShapeDtypeStruct((1, T, config.width), jnp.dtype(config.stream_dtype))
    of_branches = 0
    for name, branch in branches(config, dense).items():

        def apply_branch(params, h, branch=branch):
            return branch.apply({"params": params}, h)[0]

        of_branches += _residual_bytes(apply_branch, params[name], h, include_given=False)
    return _residual_bytes(apply_block, params, carry, include_given=True) // T, of_branches // T


def _residual_bytes(function: Callable[[Any, Any], Any], params: Any, given: Any, include_given: bool) -> int:
    """Return the bytes of the values that depend on `given` and that the pull-back (`jax.vjp`) of function(params, given) holds.

    `include_given` says whether `given` itself counts if the pull-back holds it.
    """
    jaxpr = jax.make_jaxpr(lambda *a: jax.tree.leaves(jax.vjp(function, *a)[1]))(params, given).jaxpr
    start = jaxpr.invars[len(jax.tree.leaves(params)) :]
    counted = computed_from(jaxpr, start) - (set() if include_given else set(start))
    held = {v for v in jaxpr.outvars if isinstance(v, core.Var) and v in counted}
    avals: list[Any] = [v.aval for v in held]
    return sum(aval.size * aval.dtype.itemsize for aval in avals)
