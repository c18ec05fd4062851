"""The one decoder: embed -> expand -> L x (boundary, branch) -> collapse -> logits."""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int
from mhc_kernels import settings

from mhc_jax import remat
from mhc_jax.config import ModelConfig
from mhc_jax.connections import Connection, connection_module
from mhc_jax.diagnostics import sample_sublayer
from mhc_jax.kv_cache import Cache, written
from mhc_jax.layers.attention import Attention, Past
from mhc_jax.layers.mla import LatentAttention
from mhc_jax.layers.mlp import SwiGLU
from mhc_jax.layers.moe import ROUTED_SCALE, MoE
from mhc_jax.layers.norm import NORM_EPS, RMSNorm
from mhc_jax.layers.rope import ROPE_THETA
from mhc_jax.parallel.sharding import constrain, token_axes

Carry = tuple[Any, Any, Array]
"""(streams, c, y) between two blocks: the write of y with c is still pending."""


def connection(config: ModelConfig, sublayer: int | Array | None, name: str) -> Connection:
    """Connection instance of sub-layer l, or of the ends (`sublayer=None`)."""
    module = connection_module(config.connection)
    return module(config.connection, config.width, config.num_sublayers, sublayer, name=name)


def branches(config: ModelConfig, dense: bool) -> dict[str, nn.Module]:
    """Sub-layers of one block by name, in order.  Each is F(h) -> (y, aux) and holds its own pre-norm."""
    eps, dtype = NORM_EPS, jnp.dtype(config.compute_dtype)
    output_scale = 1 / math.sqrt(config.num_sublayers) if config.depth_scaled_init else 1.0
    shared = {"rope_theta": ROPE_THETA, "norm_eps": eps, "output_scale": output_scale, "dtype": dtype}
    if config.uses_mla:
        latent = (config.rope_width, config.kv_rank)
        attention = LatentAttention(
            config.num_heads, config.head_dim, *latent, implementation=config.attention, name="attention", **shared
        )
    else:
        heads = (config.num_heads, config.num_kv_heads, config.head_dim)
        attention = Attention(*heads, implementation=config.attention, name="attention", **shared)
    if dense:
        return {"attention": attention, "mlp": SwiGLU(config.mlp_width, eps, output_scale, dtype, name="mlp")}
    experts = (config.num_experts, config.num_active_experts, config.num_shared_experts, config.expert_width)
    scales = (ROUTED_SCALE, eps, output_scale)
    return {"attention": attention, "mlp": MoE(*experts, *scales, dtype, config.expert_buffer, name="mlp")}


def _apart(branch: nn.Module) -> tuple[remat.Branch, Any]:
    """(params, h) -> (y, aux), and the parameters."""
    alone = branch.clone(parent=None, name=None)
    return lambda params, h: alone.apply({"params": params}, h), branch.variables["params"]


class Block(nn.Module):
    """Attention and feed-forward, each behind a boundary.  The carry holds the write that is still pending."""

    config: ModelConfig
    sample: int
    dense: bool
    """Without experts."""
    only: int | None = None
    """One of its sub-layers alone, whose branch runs once under `remat.recomputed`."""

    @nn.compact
    def __call__(
        self,
        carry: Carry,
        layer: Int[Array, ""],
        kept: dict[str, Array] | None = None,
        position: Int[Array, " B"] | None = None,
    ) -> tuple[Carry, tuple[dict[str, Any], dict[str, Any]]]:
        """(streams, c, y), layer index -> the same after this block, (diagnostics of its sub-layers ({} when off), aux).

        With what attention kept of earlier tokens, aux has what it keeps of these (see `mhc_jax.kv_cache`).
        """
        streams, c, y = carry
        past = () if kept is None or position is None else (Past(kept, position),)
        collected, router = [], {}
        named = branches(self.config, self.dense)
        for k, (name, branch) in enumerate(named.items()):
            if self.only not in (None, k):
                continue
            link = connection(self.config, len(named) * layer + k, f"{name}_connection")
            streams, c, h = link.write_read(streams, c, y)
            h = constrain(h, "batch", "sequence", None)
            inputs = (h, *past) if name == "attention" else (h,)
            y, aux = branch(*inputs) if self.only is None else remat.keep_branch(*_apart(branch), h)
            y = constrain(y, "batch", "sequence", None)
            router |= aux
            if self.sample:
                collected.append(sample_sublayer(link, streams, c, y, self.sample))
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *collected) if collected else {}
        return (streams, c, y), (stacked, router)


def enter(config: ModelConfig, embedding: Float[Array, "V C"], ends: Connection, tokens: Int[Array, "B T"]) -> Carry:
    """What the first block gets: tokens looked up and expanded, and a pending write that changes nothing."""
    # Gathered over fsdp like any weight: a table split by channels would make tokens change devices after the lookup.
    x = jnp.take(constrain(embedding, "vocabulary", None), tokens, axis=0)
    x = constrain(x.astype(config.stream_dtype), "batch", "sequence", None)
    streams, c = ends.start(x)
    return streams, c, jnp.zeros(x.shape, config.compute_dtype)


def leave(
    config: ModelConfig, ends: Connection, final_norm: RMSNorm, carry: Carry, only: Int[Array, " B"] | None = None
) -> Float[Array, "B t C"]:
    """What the output embedding gets of the last block's carry: of all tokens, or of one of each sequence."""
    streams, c, y = carry
    x = ends.collapse(ends.write(streams, c, y), c)
    x = x if only is None else jnp.take_along_axis(x, only[:, None, None], axis=1)
    return final_norm(x).astype(config.compute_dtype)


def logits_of(x: Float[Array, "B T C"], unembedding: Float[Array, "C V"]) -> Float[Array, "B T V"]:
    """Float32."""
    logits = jnp.einsum("btc,cv->btv", x, unembedding.astype(x.dtype), preferred_element_type=jnp.float32)
    return constrain(logits, "batch", "sequence", "vocabulary")


def cross_entropy(logits: Float[Array, "B T V"], targets: Int[Array, "B T"]) -> Float[Array, ""]:
    """Mean negative log likelihood in nats per token, float32."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()


class Decoder(nn.Module):
    """Causal language model; the connection is the only part that differs between the runs of a comparison."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self,
        tokens: Int[Array, "B T"],
        sample: int = 0,
        cache: Cache | None = None,
        only: Int[Array, " B"] | None = None,
    ) -> tuple[Float[Array, "B _ V"], dict[str, Any]]:
        """Float32 logits of the next token, and diagnostics.

        Logits are NaN where a stream is: nothing replaces what is not finite on the way, and the train step keeps its state then.

        Args:
          tokens: ids in [0, vocab_size).
          sample: tokens to collect diagnostics from; 0: none, and the program is the same as if diagnostics did not exist.
          cache: of earlier tokens, which these follow.
          only: of each row, the token whose logits are wanted, counted from 0 among `tokens`; logits are [B, 1, V] then.

        Returns:
          logits, and a dict of arrays with sub-layers first ([2 num_layers, ...]; see `diagnostics.sample_sublayer`).  With
          experts also expert_load [M, E], router_entropy [M], router_dropped [M] and router_bias [M, E] of the M layers that
          have them, whatever `sample` is (see `layers.moe.MoE`).  With a cache, `cache` is the one after these tokens.
        """
        with settings(token_axes=token_axes(tokens.shape)):
            return self._logits(tokens, sample, cache, only)

    def _logits(self, tokens, sample, cache, only):
        cfg = self.config
        embedding = self.param("embedding", nn.initializers.normal(cfg.embedding_init_std), (cfg.vocab_size, cfg.width))
        ends = connection(cfg, None, "ends")
        carry = enter(cfg, embedding, ends, tokens)

        # Without a gradient there is nothing to keep, and what creates parameters is the same program whatever is kept.
        policy = "none" if sample or cache is not None or self.is_initializing() else cfg.remat_policy
        block = nn.remat(Block, prevent_cse=False) if policy == "full" else Block

        def run(carry, first, last, dense, name):
            if policy in ("connection", "auto"):

                def sublayer(k, params, carry, layer):
                    part = Block(cfg, 0, dense, only=k, parent=None)
                    out: Any = part.apply({"params": params}, carry, layer)
                    return out[0], out[1][1]

                L_r, params = remat.block_length(cfg, carry[0]), self.variables["params"][name]
                carry, aux = remat.recomputed(sublayer, params, carry, jnp.arange(first, last), 2, L_r, cfg.unroll)
                return carry, ({}, aux)

            past = () if cache is None else (cache.kept[name], cache.position)
            axes: Any = (0, 0, nn.broadcast)[: 1 + len(past)]
            layers = nn.scan(
                block,
                in_axes=axes,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                length=last - first,
                unroll=min(cfg.unroll, last - first),
                # Half the time to trace; at initialisation it would change the random numbers, and with them every record.
                check_constancy_invariants=self.is_initializing(),
            )(cfg, sample, dense, name=name)
            return layers(carry, jnp.arange(first, last), *past)

        leading = None
        kept = {}
        if cfg.num_leading:
            carry, (leading, aux) = run(carry, 0, cfg.num_leading, True, "dense_layers")
            kept["dense_layers"] = aux
        carry, (collected, router) = run(carry, cfg.num_leading, cfg.num_layers, not cfg.num_experts, "layers")
        if leading is not None:
            collected = jax.tree.map(lambda *parts: jnp.concatenate(parts), leading, collected)

        after = {}
        if cache is not None:
            keys = cache.kept["layers"].keys()
            kept["layers"] = {key: router.pop(key) for key in keys}
            after = {"cache": written(cache, kept, tokens.shape[1])}

        x = leave(cfg, ends, RMSNorm(NORM_EPS, name="final_norm"), carry, only)
        if cfg.tied_embeddings:
            unembedding = embedding.T
        else:
            unembedding = self.param("unembedding", nn.initializers.normal(0.02), (cfg.width, cfg.vocab_size))
        logits = logits_of(x, unembedding)
        # [blocks, sub-layers of a block, ...] -> [L, ...]
        return logits, {**jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), collected), **router, **after}
