"""One computation cut in two: what is wanted now, and the rest later (zero bubble pipelines, Qi et al., arXiv 2401.10241).

The backward pass of a stage makes the gradient of its input, which the stage before waits for (I), and those of its weights,
which nobody waits for (W).  Every operation that the first needs is done by it, all others by the second; what those take from the
first is kept in between: gradients of the results of matrix products, as a rule.
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
"""Operations that are a call of others."""
EXACT = frozenset(
    (
        *("convert_element_type", "broadcast_in_dim", "reshape", "squeeze", "expand_dims", "transpose"),
        *("copy", "name", "stack", "concatenate", "neg", "max", "min", "select_n"),
        *("eq", "ne", "ge", "gt", "le", "lt", "and", "or", "not"),
    )
)
"""Element by element, and the same bits wherever they are done again: rather that than kept in between, where it keeps less."""
CHEAP = EXACT | {"add", "add_any", "sub", "mul", "div", "integer_pow", "square", "rsqrt", "logistic", "exp"}
"""Likewise, but done again they may round otherwise, as their neighbours in a fusion decide."""


class Split(NamedTuple):
    """The two halves."""

    now: Callable[[Tree, Tree], tuple[Tree, list[Array]]]
    """(free, given) -> (now, what is kept in between)."""
    later: Callable[[Tree, Tree, Sequence[Array]], Tree]
    """(free, given, what was kept) -> later; `given` is not used where all is done now."""
    between: list[jax.ShapeDtypeStruct]


def split(
    function: Callable[[Tree, Tree], tuple[Tree, Tree]],
    free: Tree,
    given: Tree,
    at_once: bool = False,
    again: frozenset[str] = CHEAP,
) -> Split:
    """Halves of function(free, given) = (now, later).

    What depends on `free` alone (casts of weights, masks) is done by each half that needs it; calls and recomputation are opened,
    loops are not: one that `now` needs is done by it whole.

    Args:
      function: of arrays.
      free: arrays, or shapes, that either half has at no cost.
      given: likewise; either half has it, and it is what keeps operations from being done twice.
      at_once: all of `later` that `given` has a part in is made now and kept, but for what is cheaper to make again from less (a
        float32 copy of bfloat16 values); the second half does without `given`.
      again: operations that may be done again to keep less, `EXACT` or `CHEAP`.
    """
    closed, shapes = jax.make_jaxpr(lambda *a: function(*a), return_shape=True)(free, given)
    flat = jax.make_jaxpr(lambda *a: _opened(closed.jaxpr, closed.consts, a))(*jax.tree.leaves((free, given)))
    jaxpr = flat.jaxpr
    count = len(jax.tree.leaves(shapes[0]))
    wanted, rest = jaxpr.outvars[:count], jaxpr.outvars[count:]
    inputs = set(jaxpr.invars) | set(jaxpr.constvars)
    start = jaxpr.invars[len(jax.tree.leaves(free)) :]
    made = computed_from(jaxpr, start)

    own = [v for v in rest if isinstance(v, core.Var) and v in made]
    first = _needed(jaxpr.eqns, wanted + own if at_once else wanted, inputs)
    done = {v for eqn in first for v in eqn.outvars if v in made}
    if at_once:
        inputs, done = inputs - set(start), done | set(start)
    origin = {v: eqn for eqn in first for v in eqn.outvars}
    kept = _cheapest(_taken(_needed(jaxpr.eqns, rest, inputs | done), rest, done), origin, made, inputs, again)
    second = _needed(jaxpr.eqns, rest, inputs | set(kept))

    zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), given)

    def environment(free: Tree, given: Tree) -> dict[Any, Any]:
        leaves = jax.tree.leaves((free, given))
        return dict(zip([*jaxpr.invars, *jaxpr.constvars], [*leaves, *flat.consts], strict=True))

    def now(free: Tree, given: Tree) -> tuple[Tree, list[Array]]:
        values = _run(jaxpr, first, environment(free, given))
        found = [_value(values, v) for v in wanted]
        return jax.tree.unflatten(jax.tree.structure(shapes[0]), found), [values[v] for v in kept]

    def later(free: Tree, given: Tree, between: Sequence[Array]) -> Tree:
        values = environment(free, zeros if at_once else given) | dict(zip(kept, between, strict=True))
        values = _run(jaxpr, second, values)
        return jax.tree.unflatten(jax.tree.structure(shapes[1]), [_value(values, v) for v in rest])

    return Split(now, later, [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in kept])


def _needed(eqns: Sequence[Any], wanted: Iterable[Any], known: set[Any]) -> list[Any]:
    """The operations that `wanted` needs beside `known`, in order."""
    needed = {v for v in wanted if isinstance(v, core.Var)} - known
    found = []
    for eqn in reversed(eqns):
        if not needed.isdisjoint(eqn.outvars):
            found.append(eqn)
            needed.difference_update(eqn.outvars)
            needed.update(v for v in eqn.invars if isinstance(v, core.Var) and v not in known)
    return found[::-1]


def _taken(eqns: Sequence[Any], wanted: Iterable[Any], done: set[Any]) -> list[Any]:
    """Of `done`, what some operations and results use, each once."""
    used = [v for eqn in eqns for v in eqn.invars] + list(wanted)
    return list(dict.fromkeys(v for v in used if isinstance(v, core.Var) and v in done))


def _cheapest(
    kept: list[Any], origin: dict[Any, Any], made: set[Any], inputs: set[Any], again: frozenset[str]
) -> list[Any]:
    """The same, without what cheap operations make of the rest, and with the source of a cast for its result where smaller."""

    def at_hand(v: Any, others: set[Any]) -> bool:
        return not isinstance(v, core.Var) or v in others or v in inputs or v not in made

    def makes(v: Any, others: set[Any]) -> bool:
        """Whether cheap operations make v of `others`."""
        pending = [v]
        while pending:
            eqn = origin.get(pending.pop())
            if eqn is None or eqn.primitive.name not in again:
                return False
            pending += [u for u in eqn.invars if not at_hand(u, others)]
        return True

    before: list[Any] = []
    while kept != before:
        before = kept
        for v in sorted(before, key=_bytes, reverse=True):
            others = set(kept) - {v}
            if makes(v, others):
                kept = [u for u in kept if u is not v]
            elif v in origin and origin[v].primitive.name in again:
                extra = [u for u in origin[v].invars if not at_hand(u, others)]
                # What is only put together, or named, has the size of its parts, of which some may be cheap.
                if sum(map(_bytes, extra)) < _bytes(v) + (origin[v].primitive.name in ("stack", "concatenate", "name")):
                    kept = list(dict.fromkeys([u for u in kept if u is not v] + extra))
    return kept


def _bytes(v: Any) -> int:
    return v.aval.size * v.aval.dtype.itemsize


# -- jaxprs


def _value(values: dict[Any, Any], v: Any) -> Any:
    return values[v] if isinstance(v, core.Var) else v.val


def _run(jaxpr: core.Jaxpr, eqns: Sequence[Any], values: dict[Any, Any]) -> dict[Any, Any]:
    """All values after some operations of a jaxpr."""
    for eqn in eqns:
        used = list(dict.fromkeys(v for v in eqn.invars if isinstance(v, core.Var)))
        alone = jaxpr.replace(constvars=(), invars=used, outvars=eqn.outvars, eqns=[eqn], effects=eqn.effects)
        alone = core.ClosedJaxpr(alone.replace(debug_info=jaxpr.debug_info.with_unknown_names()), ())
        values.update(zip(eqn.outvars, core.jaxpr_as_fun(alone)(*(values[v] for v in used)), strict=True))
    return values


def _opened(jaxpr: core.Jaxpr, consts: Sequence[Any], arguments: Sequence[Any]) -> list[Any]:
    """The results of a jaxpr, of whose calls and unrolled loops only what they call is left."""
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
    """Constants and carried values of a scan, by its parameters; what it scans over comes behind them."""
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    consts, carry, _ = params["ft_in"].unpack()  # JAX 0.12
    return len(list(consts)), len(list(carry))


def _unrolled(params: dict[str, Any], arguments: Sequence[Any]) -> list[Any]:
    """The results of a scan, turn by turn."""
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
