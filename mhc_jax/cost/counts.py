"""Counts of parameters, FLOPs and memory.

The counts of a program come from its jaxpr or its compiler, and those of a model from its configuration alone.
"""

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
from mhc_jax.jaxprs import called

_ELEMENTWISE = frozenset(
    (
        *("add", "sub", "mul", "div", "neg", "max", "min", "add_any", "cumsum", "square", "integer_pow", "pow"),
        *("exp", "log", "log1p", "tanh", "logistic", "sqrt", "rsqrt", "sin", "cos"),
    )
)
"""JAX primitives that count as one FLOP per element of their result.  Comparisons, selects, copies and reshapes count as none."""
_REDUCTIONS = frozenset(("reduce_sum", "reduce_max", "reduce_min", "argmax"))
"""JAX primitives that count as one FLOP per element of their operand."""


def parameter_counts(params: Any) -> tuple[int, int]:
    """Return (number of entries of all parameters, number of entries of the connections' parameters)."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    of_connections = [leaf for path, leaf in leaves if re.search(CONNECTION, path_of(path))]
    return _size(params), _size(of_connections)


# -- programs


def flops(function: Callable[..., Any], *args: Any) -> float:
    """Count the floating-point operations of one call: 2 m n k for a product of [m, k] and [k, n], 1 per element for arithmetic.

    Loops and parallel parts count as often as they run: the body of a scan once per iteration, a Pallas kernel once per program of
    its grid, a shard_map once per device that has a part of its own.  A cond counts as its most expensive branch.  The body of a
    while loop counts once, because its number of iterations is not known.

    Args:
      function: a function that JAX can trace.
      *args: its arguments, as arrays or `jax.ShapeDtypeStruct`.
    """
    return jaxpr_flops(jax.make_jaxpr(function)(*args))


def jaxpr_flops(program: core.ClosedJaxpr) -> float:
    """Count the floating-point operations of a traced program (`jax.jit(f).trace(...).jaxpr`), as `flops` does of a function."""
    return sum((_operation_flops(eqn) for eqn in program.jaxpr.eqns), 0.0)


def _operation_flops(eqn: core.JaxprEqn) -> float:
    name = eqn.primitive.name
    if name in ("dot_general", "ragged_dot_general"):
        return _product_flops(eqn)
    if name in _ELEMENTWISE:
        return float(math.prod(_shape(eqn.outvars[0])))
    if name in _REDUCTIONS:
        return float(math.prod(_shape(eqn.invars[0])))
    inner = [jaxpr_flops(program) for program in called(eqn)]
    return max(inner) if name == "cond" else _times(eqn) * sum(inner, 0.0)


def _product_flops(eqn: core.JaxprEqn) -> float:
    if eqn.primitive.name == "dot_general":
        (contracted, _), groups = eqn.params["dimension_numbers"][0], 1
    else:
        dims = eqn.params["ragged_dot_dimension_numbers"]
        contracted, _ = dims.dot_dimension_numbers[0]
        # In a ragged product each row of the left operand belongs to one group.  If the product sums over the rows, it has one
        # result per group, and each row enters one result only, so that the count is divided by the number of groups.
        groups = _shape(eqn.outvars[0])[0] if set(contracted) & set(dims.lhs_ragged_dimensions) else 1
    k = math.prod(_shape(eqn.invars[0])[d] for d in contracted)
    return 2.0 * k * math.prod(_shape(eqn.outvars[0])) / groups


def _times(eqn: core.JaxprEqn) -> int:
    """Return how often an operation (a scan, a kernel, a shard_map or a call) runs the program inside it."""
    name, params = eqn.primitive.name, eqn.params
    if name == "scan":
        return params["length"]
    if name == "pallas_call":
        return math.prod(params["grid_mapping"].grid)
    if name == "shard_map":
        # If a mesh axis splits none of the arrays, all devices along it do the same work, which counts once.
        specs = (*params["in_specs"], *params["out_specs"])
        axes = {name for spec in specs for axes in spec for name in (axes if isinstance(axes, tuple) else (axes,))}
        return math.prod(size for name, size in dict(params["mesh"].shape).items() if name in axes)
    return 1


def _shape(variable: Any) -> tuple[int, ...]:
    return variable.aval.shape


def device_peak() -> int:
    """Return the largest number of bytes in use so far on this process's first device, or 0 on a CPU, which does not count them."""
    return (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0)


def memory_parts(compiled: Any) -> dict[str, int] | None:
    """Return the bytes per device that a compiled program needs at its peak, or None if the backend does not report them.

    Returns:
      `arguments`, `outputs`, `temporaries`, `aliased` (bytes of outputs that reuse the memory of arguments), and `total`, which
      counts reused bytes once.
    """
    analysis = compiled.memory_analysis()
    if analysis is None:
        return None
    sizes = {
        "arguments": int(analysis.argument_size_in_bytes),
        "outputs": int(analysis.output_size_in_bytes),
        "temporaries": int(analysis.temp_size_in_bytes),
        "aliased": int(analysis.alias_size_in_bytes),
    }
    return {**sizes, "total": sum(sizes.values()) - 2 * sizes["aliased"]}


def compiled_memory(compiled: Any) -> int | None:
    """Return the bytes per device that a compiled program needs at its peak (`total` of `memory_parts`), or None if unknown."""
    parts = memory_parts(compiled)
    return None if parts is None else parts["total"]


# -- models


@dataclass(frozen=True)
class ModelCost:
    """Numbers of parameters of a model, and its FLOPs per token."""

    total: int
    """Number of all parameters."""
    active: int
    """Number of parameters that one token uses (mHC Table 5).

    Routed experts to which the token is not sent do not count.  If input and output embeddings are untied, one of them counts."""
    vocabulary: int
    """Number of parameters of the input and output embeddings."""
    connection: int
    """Number of parameters of the connections."""
    training_flops: float
    """FLOPs per token of the forward and backward pass: matrix products, T x T attention scores, and connections.

    Recomputation and the optimizer do not count."""
    connection_flops: float
    """FLOPs per token of the connections, forward and backward, which are part of `training_flops`."""


def model_cost(config: ModelConfig, sequence_length: int) -> ModelCost:
    r"""Count the parameters and FLOPs of a model from its configuration alone.  No array of the model is made.

    A matrix product takes 2 FLOPs per weight and token in the forward pass and 4 in the backward pass.  N is the number of weights
    that a token is multiplied with, including those of the output embedding.  S is the number of multiplications per pair of tokens
    in the attention of one block, for scores and for sums of values.  T is the sequence length, and F is the FLOPs per token of the
    connections.  Training takes, per token,

    $$6 (N + \mathrm{num\_layers} \, T S) + F$$

    Norms, activations and softmax are left out, because they are below 1 % at the papers' widths.
    """
    C, T, layers, E = config.width, sequence_length, config.num_layers, config.num_experts
    attention, scores, norms = _attention_cost(config)
    sparse = layers - config.num_leading if E else 0
    expert = 3 * C * config.expert_width
    unseen = sparse * (E - config.num_active_experts) * expert
    dense = (layers - sparse) * 3 * C * config.mlp_width
    always = sparse * (C * E + config.num_shared_experts * expert)
    matrix = config.vocab_size * C
    vocabulary = matrix if config.tied_embeddings else 2 * matrix

    connection, connection_flops = _connection_cost(config)
    weights = layers * attention + dense + always + sparse * config.num_active_experts * expert
    # The last three terms are the norms of all sub-layers, the biases of the routers, and the final norm.
    total = weights + unseen + vocabulary + connection + layers * (norms + C) + sparse * E + C
    return ModelCost(
        total=total,
        active=total - unseen - (vocabulary - matrix),
        vocabulary=vocabulary,
        connection=connection,
        training_flops=6.0 * (weights + matrix + layers * T * scores) + connection_flops,
        connection_flops=connection_flops,
    )


def _attention_cost(config: ModelConfig) -> tuple[int, int, int]:
    """Return three counts of one attention sub-layer.

    They are the weights in matrix products, the multiplications per pair of tokens (scores and sums of values), and the weights of
    norms.
    """
    C, H, D = config.width, config.num_heads, config.head_dim
    if config.uses_mla:
        R, rank = config.rope_width, config.kv_rank
        return C * H * (D + R) + C * (rank + R) + rank * H * 2 * D + H * D * C, H * (2 * D + R), C + rank
    return 2 * C * H * D + 2 * C * config.num_kv_heads * D, 2 * H * D, C


def carry_shapes(config: ModelConfig, tokens: int) -> tuple[Any, Any, jax.ShapeDtypeStruct]:
    """Return the shapes of what a block passes to the next block, for one sequence: (streams, coefficients, branch output y)."""
    streams, c = _entry_shapes(config, tokens)[0]
    return streams, c, jax.ShapeDtypeStruct((1, tokens, config.width), jnp.dtype(config.compute_dtype))


def stream_elements(config: ModelConfig) -> int:
    """Count the elements per token that go from sub-layer to sub-layer: nC of streams, and what the connection keeps with them."""
    return _size(carry_shapes(config, 1)[0])


def _connection_cost(config: ModelConfig) -> tuple[int, float]:
    """Return (number of parameters of all connections, FLOPs per token of all boundaries and of their gradients)."""
    tokens, L = 256, config.num_sublayers
    link = connection_module(config.connection)(config.connection, config.width, L, 1)
    carry, of_ends = carry_shapes(config, tokens), _entry_shapes(config, tokens)[1]
    params = jax.eval_shape(lambda k, *a: link.init(k, *a, method="write_read"), _key(), *carry)

    def boundary_and_gradient(*args):
        out, back = jax.vjp(lambda params, *carry: link.apply(params, *carry, method="write_read"), *args)
        return back(jax.tree.map(jnp.ones_like, out))

    return _size(of_ends) + L * _size(params), L * flops(boundary_and_gradient, params, *carry) / tokens


def _entry_shapes(config: ModelConfig, tokens: int) -> tuple[tuple[Any, Any], Any]:
    """Return shapes: ((streams, coefficients) that enter the first block, parameters of the decoder's entry and exit)."""
    ends = connection_module(config.connection)(config.connection, config.width, config.num_sublayers, None)
    x = jax.ShapeDtypeStruct((1, tokens, config.width), jnp.dtype(config.stream_dtype))
    return jax.eval_shape(lambda k, x: ends.init_with_output(k, x, method="start"), _key(), x)


def _key() -> Any:
    return jax.eval_shape(lambda: jax.random.key(0))


def _size(tree: Any) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))
