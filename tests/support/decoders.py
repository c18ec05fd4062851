"""A decoder of three blocks for every connection, its logits at initialisation, and parameters that need no compilation."""

import dataclasses
import functools
import os

import jax
import jax.numpy as jnp
import numpy as np

from mhc_jax import connections
from mhc_jax.config import ModelConfig
from mhc_jax.model import Decoder

MODEL = ModelConfig(vocab_size=31, width=16, num_layers=3, num_heads=2, num_kv_heads=1, mlp_width=24)
TOKENS = jnp.arange(24).reshape(2, 12) % 31
RESIDUAL = connections.parse("residual")
MLA = {"attention_kind": "mla:kv_rank=8:rope_width=4"}
EXPERTS = {"experts": "4:active=2:shared=1:width=8"}
"""One block in front is dense."""

OPTIMIZED = {"xla_backend_optimization_level": 3}
"""Options of the compiler that tests/conftest.py turns down, for tests of optimized programs."""
if "fusion_emitters" in os.environ.get("XLA_FLAGS", ""):
    OPTIMIZED["xla_cpu_use_fusion_emitters"] = True


def decoder_of(spec, base=MODEL, **settings):
    """The configuration of a decoder with that connection."""
    return dataclasses.replace(base, connection=connections.parse(spec), **settings)


def randomized(params, seed=0, spread=0.3):
    """Parameters moved off their initial values, so that nothing is zero or equal by construction."""
    random = np.random.default_rng(seed)
    return jax.tree.map(lambda p: jnp.asarray(p + spread * random.normal(size=p.shape), p.dtype), params)


def drawn(function, *arguments, seed=0, spread=0.3):
    """Random parameters in the shapes that `function(key, *arguments)` gives: around 1 for norms, 0 for routers' biases."""
    random = np.random.default_rng(seed)

    def draw(path, a):
        name = jax.tree_util.keystr(path)
        noise = random.normal(size=a.shape) * (0 if "router_bias" in name else spread)
        return jnp.asarray(float("norm" in name) + noise, a.dtype)

    return jax.tree_util.tree_map_with_path(draw, jax.eval_shape(function, jax.random.key(0), *arguments))


def drawn_decoder(config, **how):
    """Random parameters of a decoder by `drawn`, as under `params`."""
    return drawn(Decoder(config).init, jnp.zeros((1, 8), jnp.int32), **how)["params"]


@functools.cache
def started(config, sample=0):
    """((logits, auxiliary values), parameters) of a decoder with initial connections and one draw of random branches."""
    run = functools.partial(Decoder(config).apply, sample=sample, mutable="params", rngs={"params": jax.random.key(0)})
    out, made = jax.jit(run)({"params": drawn_decoder(dataclasses.replace(config, connection=RESIDUAL))}, TOKENS)
    return out, made["params"]


def logits_of(spec):
    """(logits, parameters) of `started` for a connection."""
    (logits, _), params = started(decoder_of(spec))
    return logits, params
