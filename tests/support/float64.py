"""A float32 computation done again in float64: what is left of a difference to it is the rounding of one side alone."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from mhc_jax.pipeline import split

CALLS = split.CALLS | {"custom_jvp_call": "call_jaxpr", "custom_vjp_call": "call_jaxpr"}


def in_float64(function):
    """function(*arguments), every float32 in it a float64; the constants are those of float32."""

    def run(*arguments):
        closed, shapes = jax.make_jaxpr(function, return_shape=True)(*arguments)
        with jax.enable_x64(True):
            given = [_wide(np.asarray(a)) for a in jax.tree.leaves(arguments)]
            out = jax.jit(lambda *a: _evaluated(closed, a))(*given)
            return jax.tree.unflatten(jax.tree.structure(shapes), jax.device_get(out))

    return run


def _wide(a):
    return a.astype(np.float64) if a.dtype == np.float32 else a


def _parameter(value):
    is_float32 = isinstance(value, np.dtype | type) and value in (np.float32, np.dtype(np.float32), jnp.float32)
    return np.dtype(np.float64) if is_float32 else value


def _evaluated(closed, arguments):
    jaxpr, consts = (closed.jaxpr, closed.consts) if hasattr(closed, "consts") else (closed, ())
    values = dict(
        zip([*jaxpr.constvars, *jaxpr.invars], [*map(_wide, map(np.asarray, consts)), *arguments], strict=True)
    )

    def of(v):
        return values[v] if isinstance(v, core.Var) else _wide(np.asarray(v.val, v.aval.dtype))

    for eqn in jaxpr.eqns:
        out = _operation(eqn, [of(v) for v in eqn.invars])
        values.update(zip(eqn.outvars, out, strict=True))
    return [of(v) for v in jaxpr.outvars]


def _operation(eqn, own):
    name, params = eqn.primitive.name, eqn.params
    if name in CALLS:
        return _evaluated(params[CALLS[name]], own)
    if name == "scan":
        consts, carry = split.loop_arguments(params)

        def turn(state, now):
            out = _evaluated(params["jaxpr"], [*own[:consts], *state, *now])
            return out[:carry], out[carry:]

        state, told = jax.lax.scan(
            turn, own[consts:][:carry], own[consts + carry :], params["length"], params["reverse"]
        )
        return [*state, *told]
    if name == "while":
        asked, done = params["cond_nconsts"], params["body_nconsts"]
        question, body = own[:asked], own[asked:][:done]
        return jax.lax.while_loop(
            lambda state: _evaluated(params["cond_jaxpr"], [*question, *state])[0],
            lambda state: _evaluated(params["body_jaxpr"], [*body, *state]),
            own[asked + done :],
        )
    if name == "cond":
        branches = [lambda *a, one=one: _evaluated(one, a) for one in params["branches"]]
        return jax.lax.switch(own[0], branches, *own[1:])
    if name == "scatter-add":  # it holds the addition as a float32 program
        options = {key: params[key] for key in ("indices_are_sorted", "unique_indices", "mode")}
        return [jax.lax.scatter_add(*own, params["dimension_numbers"], **options)]
    out = eqn.primitive.bind(*own, **{key: _parameter(value) for key, value in params.items()})
    return out if eqn.primitive.multiple_results else [out]
