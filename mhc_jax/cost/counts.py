"""What a program costs, counted from its jaxpr and from the compiler: parameters, FLOPs, memory; and what a model would cost."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

from mhc_jax.config import ModelConfig
from mhc_jax.connections import connection_module
from mhc_jax.connections.parameter_paths import CONNECTION, path_of

# One operation per output element; comparisons, selects, copies and reshapes are free.
_ELEMENTWISE = frozenset(
    (
        *("add", "sub", "mul", "div", "neg", "max", "min", "add_any", "cumsum", "square", "integer_pow", "pow"),
        *("exp", "log", "log1p", "tanh", "logistic", "sqrt", "rsqrt", "sin", "cos"),
    )
)
_REDUCTIONS = frozenset(("reduce_sum", "reduce_max", "reduce_min", "argmax"))


def parameter_counts(params: Any) -> tuple[int, int]:
    """(all parameters, those that belong to connections)."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    total = sum(math.prod(leaf.shape) for _, leaf in leaves)
    own = sum(math.prod(leaf.shape) for path, leaf in leaves if re.search(CONNECTION, path_of(path)))
    return total, own


def flops(function: Callable[..., Any], *args: Any) -> float:
    """Floating-point operations of one call: 2 m n k for a product, 1 an element for arithmetic; from its jaxpr.

    The body of a scan counts once a turn, that of a Pallas kernel once a program of its grid, that of a shard_map once a part of
    what it splits; of a cond the dearer branch; of a while loop, whose turns are not known, one turn.

    Args:
      function: traceable.
      *args: arrays or `jax.ShapeDtypeStruct`.
    """
    return jaxpr_flops(jax.make_jaxpr(function)(*args))


def jaxpr_flops(closed: core.ClosedJaxpr) -> float:
    """`flops` of a program that is traced already (`jax.jit(f).trace(...).jaxpr`)."""
    return _count(closed.jaxpr)


def _count(jaxpr: core.Jaxpr) -> float:
    total = 0.0
    for eqn in jaxpr.eqns:
        name, params = eqn.primitive.name, eqn.params
        if name == "dot_general":
            contracted, _ = params["dimension_numbers"][0]
            k = math.prod(_shape(eqn.invars[0])[d] for d in contracted)
            total += 2.0 * k * math.prod(_shape(eqn.outvars[0]))
        elif name == "ragged_dot_general":
            dims = params["ragged_dot_dimension_numbers"]
            contracted, _ = dims.dot_dimension_numbers[0]
            k = math.prod(_shape(eqn.invars[0])[d] for d in contracted)
            # With ragged rows each row meets one group; where rows are summed, the groups share them.
            groups = _shape(eqn.outvars[0])[0] if set(contracted) & set(dims.lhs_ragged_dimensions) else 1
            total += 2.0 * k * math.prod(_shape(eqn.outvars[0])) / groups
        elif name in _ELEMENTWISE:
            total += math.prod(_shape(eqn.outvars[0]))
        elif name in _REDUCTIONS:
            total += math.prod(_shape(eqn.invars[0]))
        else:
            times = 1
            if name == "scan":
                times = params["length"]
            elif name == "pallas_call":
                times = math.prod(params["grid_mapping"].grid)
            elif name == "shard_map":
                times = _parts(params)
            inner = [p for p in jax.tree.leaves(params, is_leaf=_is_jaxpr) if _is_jaxpr(p)]
            if name == "cond":
                total += max(_count(_open(p)) for p in inner)
            else:
                total += times * sum(_count(_open(p)) for p in inner)
    return total


def _parts(shard_map: dict[str, Any]) -> int:
    """Devices with work of their own: over the other axes of the mesh all do the same."""
    specs = (*shard_map["in_specs"], *shard_map["out_specs"])
    names = {name for spec in specs for axes in spec for name in (axes if isinstance(axes, tuple) else (axes,))}
    return math.prod(size for name, size in dict(shard_map["mesh"].shape).items() if name in names)


def _shape(variable: Any) -> tuple[int, ...]:
    return variable.aval.shape


def _is_jaxpr(value: Any) -> bool:
    return isinstance(value, core.Jaxpr | core.ClosedJaxpr)


def _open(value: Any) -> core.Jaxpr:
    return value.jaxpr if isinstance(value, core.ClosedJaxpr) else value


def device_peak() -> int:
    """Most bytes that the arrays of this process have ever taken on its first device; 0 where it keeps no count, as a CPU."""
    return (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0)


def compiled_memory(compiled: Any) -> int | None:
    """Bytes a compiled step needs at its peak: arguments, outputs that do not reuse them, and temporaries."""
    analysis = compiled.memory_analysis()
    if analysis is None:
        return None
    return int(
        analysis.argument_size_in_bytes
        + analysis.output_size_in_bytes
        - analysis.alias_size_in_bytes
        + analysis.temp_size_in_bytes
    )


@dataclass(frozen=True)
class ModelCost:
    """What a configuration costs; parameters are counts, FLOPs and bytes are per token."""

    total: int
    """All parameters."""
    active: int
    """Without the experts that a token does not see, and with one of the two vocabulary matrices (as mHC Table 5 counts)."""
    vocabulary: int
    """Input and output embeddings."""
    connection: int
    """Parameters of the connections."""
    training_flops: float
    """Forward and backward, without recomputation and optimizer: products of the branches, T x T scores, connections."""
    connection_flops: float
    """The part of the connections."""
    stream_bytes: int
    """Least traffic of a forward pass between the sub-layers: streams read and written once, h written and y read."""


def model_cost(config: ModelConfig, sequence_length: int) -> ModelCost:
    """Cost of a model from its configuration alone; nothing of it is built but the shapes of one connection.

    Products count 2 FLOPs a weight and token forward and 4 backward; norms, activations and softmax are left out, which are
    below 1 % at the papers' widths.
    """
    C, H, D, T = config.width, config.num_heads, config.head_dim, sequence_length
    if config.uses_mla:
        R, rank = config.rope_width, config.kv_rank
        attention, scores = C * H * (D + R) + C * (rank + R) + rank * H * 2 * D + H * D * C, H * (2 * D + R)
        norms = C + rank
    else:
        attention, scores = 2 * C * H * D + 2 * C * config.num_kv_heads * D, 2 * H * D
        norms = C
    layers, E, k = config.num_layers, config.num_experts, config.num_active_experts
    sparse = layers - config.num_leading if E else 0
    expert = 3 * C * config.expert_width
    dense = (layers - sparse) * 3 * C * config.mlp_width
    always = sparse * (C * E + config.num_shared_experts * expert)
    matrix = config.vocab_size * C
    vocabulary = matrix if config.tied_embeddings else 2 * matrix

    connection, forward_and_backward, carried = _connection_cost(config)
    weights = layers * attention + dense + always + sparse * k * expert
    # The last terms: norms of the feed-forward sub-layers, biases of the routers, the final norm.
    total = weights + sparse * (E - k) * expert + vocabulary + connection + layers * (norms + C) + sparse * E + C
    width = jnp.dtype(config.stream_dtype).itemsize
    return ModelCost(
        total=total,
        active=total - sparse * (E - k) * expert - (vocabulary - matrix),
        vocabulary=vocabulary,
        connection=connection,
        training_flops=6.0 * (weights + matrix + layers * T * scores) + forward_and_backward,
        connection_flops=forward_and_backward,
        stream_bytes=config.num_sublayers * 2 * (carried * width + C * jnp.dtype(config.compute_dtype).itemsize),
    )


def stream_elements(config: ModelConfig) -> int:
    """Elements that a connection carries per token between sub-layers: nC, and what it keeps beside the streams."""
    return _connection_cost(config)[2]


def _connection_cost(config: ModelConfig) -> tuple[int, float, int]:
    """(parameters of all connections, FLOPs per token of all boundaries and their gradients, elements carried per token)."""
    tokens, module = 256, connection_module(config.connection)
    ends, link = (module(config.connection, config.width, config.num_sublayers, l) for l in (None, 1))
    x = jax.ShapeDtypeStruct((1, tokens, config.width), jnp.dtype(config.stream_dtype))
    y = jax.ShapeDtypeStruct(x.shape, jnp.dtype(config.compute_dtype))
    key = jax.eval_shape(lambda: jax.random.key(0))
    (streams, c), own_ends = jax.eval_shape(lambda k, x: ends.init_with_output(k, x, method="start"), key, x)
    params = jax.eval_shape(lambda k, *a: link.init(k, *a, method="write_read"), key, streams, c, y)

    def boundary(params, streams, c, y):
        return link.apply(params, streams, c, y, method="write_read")

    def there_and_back(*args):
        out, back = jax.vjp(boundary, *args)
        return back(jax.tree.map(jnp.ones_like, out))

    L = config.num_sublayers
    count = _size(own_ends) + L * _size(params)
    return count, L * flops(there_and_back, params, streams, c, y) / tokens, _size(streams) // tokens


def _size(tree: Any) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))
