"""What the compiler keeps for the backward pass of a chain of boundaries."""

import jax
import jax.numpy as jnp

from mhc_jax import connections, remat
from mhc_jax.connections import connection_module


def temporary(L_r, L=60):
    """Temporary bytes of the gradient of L boundaries of mHC around h^2 w, as multiples of one y."""
    C, T = 128, 2048
    config = connections.parse("mhc:t_max=1")
    link, ends = (connection_module(config)(config, C, L, l) for l in (1, None))

    def branch(params, h):
        return jnp.square(h) * params["w"][None, None, :], {}

    def sublayer(_, params, carry, __):
        streams, c, h = link.apply({"params": params["link"]}, *carry, method="write_read")
        y, aux = remat.keep_branch(branch, params["branch"], h)
        return (streams, c, y), aux

    def loss(params, x):
        carry = (*ends.start(x), jnp.zeros_like(x))
        (streams, c, y), _ = remat.recomputed(sublayer, params, carry, jnp.arange(L), 1, L_r)
        return jnp.square(ends.collapse(ends.write(streams, c, y), c)).sum()

    x = jax.ShapeDtypeStruct((1, T, C), jnp.float32)
    own = jax.eval_shape(lambda k, x: link.init(k, *ends.start(x), x, method="write_read"), jax.random.key(0), x)
    one = {"link": own["params"], "branch": {"w": jax.ShapeDtypeStruct((C,), jnp.float32)}}
    params = jax.tree.map(lambda a: jax.ShapeDtypeStruct((L, *a.shape), a.dtype), one)
    compiled = jax.jit(jax.grad(loss)).lower(params, x).compile()
    return compiled.memory_analysis().temp_size_in_bytes / (4 * T * C)
