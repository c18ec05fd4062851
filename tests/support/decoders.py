"""A decoder of three blocks for every connection, and its logits at initialisation."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from mhc_jax import connections
from mhc_jax.config import ModelConfig
from mhc_jax.model import Decoder

MODEL = ModelConfig(vocab_size=31, width=16, num_layers=3, num_heads=2, num_kv_heads=1, mlp_width=24)


TOKENS = jnp.arange(24).reshape(2, 12) % 31


def randomized(params, seed=0):
    """Parameters moved off their initial values, so that nothing is zero or equal by construction."""
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed), max(len(leaves), 1))
    return tree.unflatten([p + 0.3 * jax.random.normal(k, p.shape) for p, k in zip(leaves, keys, strict=False)])


@functools.cache
def logits_of(spec):
    model = Decoder(dataclasses.replace(MODEL, connection=connections.parse(spec)))
    params = jax.jit(model.init)(jax.random.key(0), TOKENS)
    return jax.jit(lambda p: model.apply(p, TOKENS)[0])(params), params
