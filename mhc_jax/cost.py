"""What a program costs, counted from its jaxpr and from the compiler: parameters, FLOPs, memory."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import jax
from jax.extend import core

from mhc_jax.optim import CONNECTION, path_of

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

    The body of a scan counts once a turn, that of a Pallas kernel once a program of its grid; of a cond the dearer
    branch; of a while loop, whose turns are not known, one turn.

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
            inner = [p for p in jax.tree.leaves(params, is_leaf=_is_jaxpr) if _is_jaxpr(p)]
            if name == "cond":
                total += max(_count(_open(p)) for p in inner)
            else:
                total += times * sum(_count(_open(p)) for p in inner)
    return total


def _shape(variable: Any) -> tuple[int, ...]:
    return variable.aval.shape


def _is_jaxpr(value: Any) -> bool:
    return isinstance(value, core.Jaxpr | core.ClosedJaxpr)


def _open(value: Any) -> core.Jaxpr:
    return value.jaxpr if isinstance(value, core.ClosedJaxpr) else value


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
