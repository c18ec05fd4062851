"""What the contract of a connection speaks of, computed by one compiled program."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from support.decoders import drawn

from mhc_jax import connections

C, B, T, L = 8, 2, 5, 6


def make(spec, sublayer=1):
    config = connections.parse(spec)
    return connections.connection_module(config)(config, C, L, sublayer)


@functools.cache
def found(spec):
    """(module of sub-layer 1, streams, y, {what the contract speaks of: its value}), all of it from one program."""
    link, ends = make(spec), make(spec, None)
    draw = np.random.default_rng(1)
    x, y, weights = (jnp.asarray(draw.normal(size=(B, T, C)), jnp.float32) for _ in range(3))
    streams, c = jax.eval_shape(ends.start, x)
    streams = jax.tree.map(lambda s: jnp.asarray(draw.normal(size=s.shape), s.dtype), streams)
    params = drawn(functools.partial(link.init, method="write_read"), streams, c, y)
    ends_params = drawn(functools.partial(ends.init, method="collapse"), streams, c, seed=1)

    def loss(params, ends_params):
        out = {"params": params, "ends": ends_params, "start": ends.start(x)}
        out["unwritten"] = ends.write(*out["start"], jnp.zeros_like(x))
        out["c"] = c = link.apply(params, streams, method="coefficients")
        out["h"] = h = link.apply(params, streams, c, method="read")
        out["written"] = written = link.apply(params, streams, c, y, method="write")
        out["left"] = left = ends.apply(ends_params, written, c, method="collapse")
        out["boundary"] = link.apply(params, streams, c, y, method="write_read")
        after = link.apply(params, written, method="coefficients")
        out["in parts"] = written, after, link.apply(params, written, after, method="read")
        out["dense"] = link.dense(c, y)
        return (h * weights).sum() + (left**2).sum() + (link.flat(written) ** 3).sum(), out

    grads, out = jax.jit(jax.grad(loss, (0, 1), has_aux=True))(params, ends_params)
    return link, streams, y, {**out, "gradient": grads}
