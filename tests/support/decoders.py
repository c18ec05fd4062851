"""A decoder of three blocks for every connection, its logits at initialisation, and parameters that need no compile."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from mhc_jax import connections
from mhc_jax.config import ModelConfig
from mhc_jax.model import Decoder

MODEL = ModelConfig(vocab_size=31, width=16, num_layers=3, num_heads=2, num_kv_heads=1, mlp_width=24)
TOKENS = jnp.arange(24).reshape(2, 12) % 31
MLA = {"attention_kind": "mla", "kv_rank": 8, "rope_width": 4}
EXPERTS = {"num_experts": 4, "num_active_experts": 2, "num_shared_experts": 1, "expert_width": 8, "num_dense_layers": 1}


def decoder_of(spec, base=MODEL, **settings):
    """The configuration of a decoder with that connection."""
    return dataclasses.replace(base, connection=connections.parse(spec), **settings)


def randomized(params, seed=0, spread=0.3):
    """Parameters moved off their initial values, so that nothing is zero or equal by construction."""
    random = np.random.default_rng(seed)
    return jax.tree.map(lambda p: jnp.asarray(p + spread * random.normal(size=p.shape), p.dtype), params)


def drawn(function, *arguments, seed=0, spread=0.3):
    """What the initialiser `function(key, *arguments)` gives, random instead: 1 and noise for norms, noise elsewhere."""
    shapes = jax.eval_shape(function, jax.random.key(0), *arguments)
    return randomized(
        jax.tree_util.tree_map_with_path(
            lambda path, a: np.full(a.shape, float("norm" in jax.tree_util.keystr(path)), a.dtype), shapes
        ),
        seed,
        spread,
    )


def drawn_decoder(config, **how):
    """`drawn` parameters of a decoder, as under `params`."""
    return drawn(Decoder(config).init, jnp.zeros((1, 8), jnp.int32), **how)["params"]


@functools.cache
def logits_of(spec):
    """(logits, parameters) with the connection as it is initialised and branches that are the same for all of them."""
    config = decoder_of(spec)
    run = functools.partial(Decoder(config).apply, mutable="params", rngs={"params": jax.random.key(0)})
    (logits, _), made = jax.jit(run)({"params": drawn_decoder(decoder_of("residual"))}, TOKENS)
    return logits, made["params"]
