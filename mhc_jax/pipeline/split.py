"""Splitting of one computation into two, as zero-bubble pipelines split a backward pass (Qi et al., arXiv 2401.10241).

The backward pass of a stage makes the gradient of its input (I), for which the previous stage waits, and the gradients of its
weights (W), for which no stage waits.  `split` traces the whole pass and divides its operations.  The first half runs the
operations on which I depends, and the second half runs all others.  Values of the first half that the second half needs are kept
until it runs.  Most of the kept values are gradients of the results of matrix products.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core
from jaxtyping import Array

from mhc_jax.jaxprs import called, computed_from

Tree = Any

CALLS = frozenset({"jit", "pjit", "checkpoint", "remat2", "closed_call"})
"""Names of primitives that call an inner jaxpr."""
EXACT = frozenset(
    (
        *("convert_element_type", "broadcast_in_dim", "reshape", "squeeze", "expand_dims", "transpose"),
        *("copy", "name", "stack", "concatenate", "neg", "max", "min", "select_n"),
        *("eq", "ne", "ge", "gt", "le", "lt", "and", "or", "not"),
    )
)
"""Names of primitives whose results have the same bits, however XLA fuses them: they move, cast, negate, select or compare."""
CHEAP = EXACT | {"add", "add_any", "sub", "mul", "div", "integer_pow", "square", "rsqrt", "logistic", "exp"}
"""Names of primitives that are cheap to run again.  Those not in `EXACT` may round differently in another fusion by XLA."""


class Split(NamedTuple):
    """The two halves that `split` makes of a function with two arguments, called free and given, and two results."""

    now: Callable[[Tree, Tree], tuple[Tree, list[Array]]]
    """The first half: now(free, given) returns (first result of the function, values to keep for the second half)."""
    later: Callable[[Tree, Tree, Sequence[Array]], Tree]
    """The second half: later(free, given, kept) returns the second result of the function.

    If the function was split with `at_once`, the second half does not use `given`.
    """
    between: list[jax.ShapeDtypeStruct]
    """Shapes and dtypes of the values that the first half keeps for the second half."""


def split(
    function: Callable[[Tree, Tree], tuple[Tree, Tree]],
    free: Tree,
    given: Tree,
    at_once: bool = False,
    recompute: frozenset[str] = CHEAP,
) -> Split:
    """Split a function of (free, given) into two halves.  The first half makes the first result, and the second half the second.

    Most operations run in one of the two halves.  Both halves may run operations on `free` alone (casts of weights, masks) and
    primitives in `recompute`.  Calls, `jax.checkpoint` and unrolled loops are inlined, so that their operations are divided too.
    Any other loop is one operation.

    Args:
      function: a function of two trees of arrays, whose two results are trees of arrays.
      free: arrays, or their shapes and dtypes, that both halves get.  Results of operations on `free` alone are not kept.
      given: arrays, or their shapes and dtypes, that both halves get.  With `at_once` only the first half uses them.
      at_once: whether the first half computes all that depends on `given`.
      recompute: `EXACT` or `CHEAP`: primitives that the second half may run again so that fewer bytes are kept.
    """
    closed, shapes = jax.make_jaxpr(lambda *a: function(*a), return_shape=True)(free, given)
    flat = jax.make_jaxpr(lambda *a: _opened(closed.jaxpr, closed.consts, a))(*jax.tree.leaves((free, given)))
    jaxpr = flat.jaxpr
    count = len(jax.tree.leaves(shapes[0]))
    wanted_now, wanted_later = jaxpr.outvars[:count], jaxpr.outvars[count:]
    known = set(jaxpr.invars) | set(jaxpr.constvars)
    given_vars = jaxpr.invars[len(jax.tree.leaves(free)) :]
    dependent = computed_from(jaxpr, given_vars)

    also = [v for v in wanted_later if isinstance(v, core.Var) and v in dependent] if at_once else []
    first = _needed(jaxpr.eqns, wanted_now + also, known)
    available = {v for eqn in first for v in eqn.outvars if v in dependent}
    if at_once:
        known, available = known - set(given_vars), available | set(given_vars)
    origin = {v: eqn for eqn in first for v in eqn.outvars}
    used = _used(_needed(jaxpr.eqns, wanted_later, known | available), wanted_later, available)
    kept = _cheapest(used, origin, dependent, known, recompute)
    second = _needed(jaxpr.eqns, wanted_later, known | set(kept))

    zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), given)

    def environment(free: Tree, given: Tree) -> dict[Any, Any]:
        leaves = jax.tree.leaves((free, given))
        return dict(zip([*jaxpr.invars, *jaxpr.constvars], [*leaves, *flat.consts], strict=True))

    def now(free: Tree, given: Tree) -> tuple[Tree, list[Array]]:
        values = _run(jaxpr, first, environment(free, given))
        results = [_value(values, v) for v in wanted_now]
        return jax.tree.unflatten(jax.tree.structure(shapes[0]), results), [values[v] for v in kept]

    def later(free: Tree, given: Tree, between: Sequence[Array]) -> Tree:
        values = environment(free, zeros if at_once else given) | dict(zip(kept, between, strict=True))
        values = _run(jaxpr, second, values)
        return jax.tree.unflatten(jax.tree.structure(shapes[1]), [_value(values, v) for v in wanted_later])

    return Split(now, later, [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in kept])


def _needed(eqns: Sequence[Any], wanted: Iterable[Any], known: set[Any]) -> list[Any]:
    """Return those of the operations `eqns` that are needed to compute `wanted` from `known`, in the same order."""
    needed = {v for v in wanted if isinstance(v, core.Var)} - known
    out = []
    for eqn in reversed(eqns):
        if not needed.isdisjoint(eqn.outvars):
            out.append(eqn)
            needed.difference_update(eqn.outvars)
            needed.update(v for v in eqn.invars if isinstance(v, core.Var) and v not in known)
    return out[::-1]


def _used(eqns: Sequence[Any], wanted: Iterable[Any], available: set[Any]) -> list[Any]:
    """Return the values of `available` that are operands of `eqns` or are in `wanted`, each once."""
    used = [v for eqn in eqns for v in eqn.invars] + list(wanted)
    return list(dict.fromkeys(v for v in used if isinstance(v, core.Var) and v in available))


def _cheapest(
    kept: list[Any], origin: dict[Any, Any], dependent: set[Any], known: set[Any], recompute: frozenset[str]
) -> list[Any]:
    """Return values with at most as many bytes as `kept`, from which all of `kept` can be recomputed.

    A value is dropped if primitives in `recompute` can make it from the other values.  A value that such a primitive makes is
    replaced by the operands of the primitive if these have fewer bytes.
    """

    def at_hand(v: Any, others: set[Any]) -> bool:
        return not isinstance(v, core.Var) or v in others or v in known or v not in dependent

    def recomputable(v: Any, others: set[Any]) -> bool:
        pending = [v]
        while pending:
            eqn = origin.get(pending.pop())
            if eqn is None or eqn.primitive.name not in recompute:
                return False
            pending += [u for u in eqn.invars if not at_hand(u, others)]
        return True

    before: list[Any] = []
    while kept != before:
        before = kept
        for v in sorted(before, key=_bytes, reverse=True):
            others = set(kept) - {v}
            if recomputable(v, others):
                kept = [u for u in kept if u is not v]
            elif v in origin and (name := origin[v].primitive.name) in recompute:
                operands = [u for u in origin[v].invars if not at_hand(u, others)]
                # The operands of these three primitives together are as large as the result.  They replace the result all the
                # same, because some of them may be dropped later.
                if sum(map(_bytes, operands)) < _bytes(v) + (name in ("stack", "concatenate", "name")):
                    kept = list(dict.fromkeys([u for u in kept if u is not v] + operands))
    return kept


def _bytes(v: Any) -> int:
    return v.aval.size * v.aval.dtype.itemsize


# -- jaxprs


def _value(values: dict[Any, Any], v: Any) -> Any:
    return values[v] if isinstance(v, core.Var) else v.val


def _run(jaxpr: core.Jaxpr, eqns: Sequence[Any], values: dict[Any, Any]) -> dict[Any, Any]:
    """Run the operations `eqns` of a jaxpr, add their results to `values`, and return `values`."""
    for eqn in eqns:
        used = list(dict.fromkeys(v for v in eqn.invars if isinstance(v, core.Var)))
        alone = jaxpr.replace(constvars=(), invars=used, outvars=eqn.outvars, eqns=[eqn], effects=eqn.effects)
        alone = core.ClosedJaxpr(alone.replace(debug_info=jaxpr.debug_info.with_unknown_names()), ())
        values.update(zip(eqn.outvars, core.jaxpr_as_fun(alone)(*(values[v] for v in used)), strict=True))
    return values


def _opened(jaxpr: core.Jaxpr, consts: Sequence[Any], arguments: Sequence[Any]) -> list[Any]:
    """Run a jaxpr with its calls inlined and its unrolled loops traced turn by turn, and return its results."""
    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *arguments], strict=True))
    for eqn in jaxpr.eqns:
        name, params = eqn.primitive.name, eqn.params
        own = [_value(values, v) for v in eqn.invars]
        if name in CALLS:
            (inner,) = called(eqn)
            out = _opened(inner.jaxpr, inner.consts, own)
        elif name == "scan" and params["unroll"] >= params["length"] > 0:
            out = _unrolled(params, own)
        else:
            values = _run(jaxpr, [eqn], values)
            continue
        values.update(zip(eqn.outvars, out, strict=True))
    return [_value(values, v) for v in jaxpr.outvars]


def loop_arguments(params: dict[str, Any]) -> tuple[int, int]:
    """Return (number of constants, number of carried values) among the operands of a scan.

    The operands of a scan are its constants, its carried values, and the scanned arrays, in this order.
    """
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    # In JAX 0.12 the parameters of a scan have `ft_in` in place of num_consts and num_carry.
    consts, carry, _ = params["ft_in"].unpack()
    return len(list(consts)), len(list(carry))


def _unrolled(params: dict[str, Any], arguments: Sequence[Any]) -> list[Any]:
    """Run a scan turn by turn, so that the operations of each turn are traced separately, and return its results."""
    consts, carry = loop_arguments(params)
    fixed, state, each = arguments[:consts], list(arguments[consts:][:carry]), arguments[consts + carry :]
    told: list[list[Any]] = []
    for turn in range(params["length"])[:: -1 if params["reverse"] else 1]:
        now = [a[turn] for a in each]
        out = _opened(params["jaxpr"].jaxpr, params["jaxpr"].consts, [*fixed, *state, *now])
        state = out[:carry]
        told.append(out[carry:])
    if params["reverse"]:
        told.reverse()
    return state + [jnp.stack(one) for one in zip(*told, strict=True)]
