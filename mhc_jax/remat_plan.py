"""What each way of recomputing keeps, from the configuration alone, and the choice that `model.remat=auto` makes.

Bytes are per token of one device and come from shapes: what autodiff of one block keeps is read off its jaxpr.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

from mhc_jax.config import ExperimentConfig, MeshConfig, ModelConfig
from mhc_jax.model import Block, Decoder, branches, connection
from mhc_jax.parallel.sharding import abstract_mesh, state_shardings
from mhc_jax.remat import block_length, reached

STATE_BYTES = 16
"""A parameter, its gradient and AdamW's two moments, float32."""
ONE = MeshConfig()
"""One device."""


@dataclass(frozen=True)
class Row:
    """Bytes per token for one L_r (mHC Eq. 20, in the dtypes of the configuration)."""

    L_r: int
    stored: int
    """Streams, and the coefficients of the write that is pending, at every L_r-th sub-layer."""
    transient: int
    """What is computed again and lives at once: streams, coefficients, what the branch reads and its norm."""


@dataclass(frozen=True)
class Plan:
    """What was chosen."""

    remat: str
    """`none`, `connection` or `full`."""
    L_r: int
    estimates: dict[str, float]
    """Bytes of a device by policy: parameters, gradients and moments, logits, and what is kept for the backward pass."""
    sentence: str


@dataclass(frozen=True)
class _Sizes:
    """Bytes per token."""

    streams: int
    coefficients: int
    width: int
    """Of h, in the dtype of the streams."""
    y: int
    blocks: tuple[int, ...]
    """What autodiff of each block keeps."""
    branches: int
    """What `connection` keeps of all branches, y among it."""


def table(config: ModelConfig, sequence_length: int) -> list[Row]:
    """nC ceil(L / L_r) and (n + 2)C L_r in bytes per token, for L_r = 1 ... L.

    n and C are those of what is carried, whatever the kind of connection.  The y of all sub-layers and what the branches keep are
    the same for every L_r and left out.
    """
    return _rows(_sizes(config, sequence_length), config.num_sublayers)


def _rows(sizes: _Sizes, L: int) -> list[Row]:
    stored, transient = sizes.streams + sizes.coefficients, sizes.streams + sizes.coefficients + 2 * sizes.width
    return [Row(L_r, stored * math.ceil(L / L_r), transient * L_r) for L_r in range(1, L + 1)]


def plan(config: ModelConfig, tokens: int, sequence_length: int, mesh: MeshConfig = ONE) -> Plan:
    """Choose among none, connection (with L_r*, or the L_r of model.remat) and full, in this order, the first that fits.

    Args:
      config: model.remat says the limit, as `auto:80` does; `auto` alone: none is known, and `connection` is chosen.
      tokens: of one device and one backward pass.
      sequence_length: T.
      mesh: splits parameters, gradients and moments, and logits.

    Returns:
      the plan; `full` where nothing fits, and its sentence says so.  Estimates leave out what lives for a moment only, and take
      what branches keep as whole, also where mesh.tensor splits heads and hidden channels.
    """
    sizes = _sizes(config, sequence_length)
    L, L_r = config.num_sublayers, _length(config)
    rows = _rows(sizes, L)
    boundary = sizes.streams + sizes.coefficients
    kept = {
        "none": sum(sizes.blocks),
        "connection": sizes.branches + rows[L_r - 1].stored + rows[L_r - 1].transient,
        "full": (boundary + sizes.y) * L // 2 + max(sizes.blocks),
    }
    # Float32 logits and their gradient.
    columns = config.vocab_size // (mesh.tensor if config.vocab_size % mesh.tensor == 0 else 1)
    fixed = float(state_bytes(config, mesh) + 8 * columns * tokens)
    estimates = {name: fixed + size * tokens for name, size in kept.items()}
    limit = config.remat_budget_gb * 1e9
    fitting = [name for name, size in estimates.items() if size <= limit]
    chosen = (fitting[0] if fitting else "full") if limit else "connection"
    listed = ", ".join(f"{name} {size / 1e9:.3g} GB" for name, size in estimates.items())
    if not limit:
        why = "no memory of a device is given, as model.remat=auto:80 does"
    elif fitting:
        why = f"the first that fits {config.remat_budget_gb:g} GB"
    else:
        why = f"the least, and more than the {config.remat_budget_gb:g} GB there are"
    detail = f" with L_r = {L_r} of {L} sub-layers" if chosen == "connection" else ""
    return Plan(chosen, L_r, estimates, f"model.remat is {chosen!r}{detail}: {why} (estimates: {listed}).")


def state_bytes(config: ModelConfig, mesh: MeshConfig) -> int:
    """Parameters, gradients and moments of one device."""
    shapes = jax.eval_shape(Decoder(config).init, jax.random.key(0), jax.ShapeDtypeStruct((1, 8), jnp.int32))["params"]
    parts = jax.tree.map(
        lambda a, place: place.shard_shape(a.shape), shapes, state_shardings(abstract_mesh(mesh), shapes)
    )
    return STATE_BYTES * sum(math.prod(part) for part in jax.tree.leaves(parts, is_leaf=lambda a: isinstance(a, tuple)))


def resolve(config: ExperimentConfig) -> tuple[ExperimentConfig, str]:
    """The configuration with `auto` replaced by what is planned for a device of its mesh, and the sentence about it.

    The sentence is '' where nothing was to choose.  `config` has its vocabulary.
    """
    model, data, mesh = config.model, config.data, config.mesh
    if model.remat_policy != "auto":
        return config, ""
    sequences = data.batch_size // config.optimizer.accumulation_steps
    tokens = sequences * data.sequence_length // (mesh.batch * mesh.sequence)
    found = plan(model, tokens, data.sequence_length, mesh)
    chosen = dataclasses.replace(model, remat=f"connection:{found.L_r}" if found.remat == "connection" else found.remat)
    return dataclasses.replace(config, model=chosen), found.sentence


def _carry(config: ModelConfig, tokens: int) -> Any:
    """Shapes of (streams, c, y) for one sequence."""
    x = jax.ShapeDtypeStruct((1, tokens, config.width), jnp.dtype(config.stream_dtype))
    ends = connection(config, None, "ends")
    key = jax.eval_shape(lambda: jax.random.key(0))
    (streams, c), _ = jax.eval_shape(lambda k, x: ends.init_with_output(k, x, method="start"), key, x)
    return streams, c, jax.ShapeDtypeStruct(x.shape, jnp.dtype(config.compute_dtype))


def _length(config: ModelConfig) -> int:
    return block_length(config, _carry(config, 1)[0])


def _sizes(config: ModelConfig, sequence_length: int) -> _Sizes:
    T = sequence_length
    carry = _carry(config, T)
    layer = jax.ShapeDtypeStruct((), jnp.int32)
    key = jax.eval_shape(lambda: jax.random.key(0))

    def of_block(dense: bool) -> tuple[int, int]:
        """(what autodiff keeps of a block, what `connection` keeps of its branches)."""
        whole = Block(config, 0, dense, parent=None)
        params = jax.eval_shape(whole.init, key, carry, layer)["params"]

        def pull(params, carry):
            index = jnp.zeros((), jnp.int32)
            return jax.vjp(lambda p, a: whole.apply({"params": p}, a, index)[0], params, carry)[1]

        block = _bytes(pull, params, carry, own=True)
        kept = 0
        for name, branch in branches(config, dense).items():
            h = jax.ShapeDtypeStruct((1, T, config.width), jnp.dtype(config.stream_dtype))

            def pull_branch(params, h, branch=branch):
                return jax.vjp(lambda p, h: branch.apply({"params": p}, h)[0], params, h)[1]

            kept += _bytes(pull_branch, params[name], h, own=False)
        return block // T, kept // T

    dense, sparse = of_block(True), of_block(not config.num_experts)
    counts = ((dense, config.num_leading), (sparse, config.num_layers - config.num_leading))
    streams, c, y = (sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(part)) // T for part in carry)
    return _Sizes(
        streams=streams,
        coefficients=c,
        width=config.width * jnp.dtype(config.stream_dtype).itemsize,
        y=y,
        blocks=tuple(block for (block, _), count in counts for _ in range(count)),
        branches=sum(kept * count for (_, kept), count in counts) + y * config.num_sublayers,
    )


def _bytes(pull: Callable[[Any, Any], Any], params: Any, given: Any, own: bool) -> int:
    """Bytes of what a pull-back holds that is computed from `given`, and of `given` itself if `own`."""
    jaxpr = jax.make_jaxpr(lambda *a: jax.tree.leaves(pull(*a)))(params, given).jaxpr
    start = jaxpr.invars[len(jax.tree.leaves(params)) :]
    made = reached(jaxpr, start) - (set() if own else set(start))
    held = {v for v in jaxpr.outvars if isinstance(v, core.Var) and v in made}
    avals: list[Any] = [v.aval for v in held]
    return sum(aval.size * aval.dtype.itemsize for aval in avals)
