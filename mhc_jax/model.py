"""The decoder that all connections share: embed, expand, L boundaries and branches, collapse, logits.

`Decoder.__call__` computes the whole model, and `Block` computes two sub-layers of it.  `branches` makes what a sub-layer computes,
and `mhc_jax/connections/base.py` describes what happens between two sub-layers.
"""

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
from mhc_jax.layers.norm import RMSNorm
from mhc_jax.parallel.sharding import constrain, token_axes, token_shards

Carry = tuple[Any, Any, Array | None]
"""The state (streams, c, y) between two sub-layers.  y is the last branch output.  The next boundary will write it to the streams
with the coefficients c (pending write).  If c and y are None, no write is pending, as at the start of a stage of a pipeline."""


class Decoder(nn.Module):
    """The causal language model.  Between the runs of a comparison only its connection differs."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self,
        tokens: Int[Array, "B T"],
        sample: int = 0,
        cache: Cache | None = None,
        at: Int[Array, " B"] | None = None,
        targets: Int[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B _ V"] | Float[Array, ""], dict[str, Any]]:
        """Return the float32 logits of the next token at every token, or the loss, and a dict of auxiliary arrays.

        If a stream of a token is NaN, so are the logits of the token, because no operation replaces values that are not finite.

        Args:
          tokens: ids in [0, vocab_size).  If model.attention_scope is `document`, they also say where documents begin.
          sample: number of tokens to collect diagnostics from.  0: the compiled program contains no diagnostics.
          cache: keys and values of the tokens before `tokens`.  None: there are no earlier tokens.
          at: for each sequence the index of the token whose logits are returned, as [B, 1, V].  None: logits of all tokens.
          targets: the token that follows each token.  If they are given, the loss (`mean_loss`) is returned in place of logits.
            `at` must then be None.

        Returns:
          logits or loss, and a dict of arrays.  With `sample` the dict has the diagnostics of `diagnostics.sample_sublayer`, with
          an axis of sub-layers in front ([L, ...]).  With experts it has expert_load [M, E], router_entropy [M], router_dropped
          [M] and router_bias [M, E] of the M blocks with experts (see `layers.moe.MoE`).  With a cache it has `cache`, the cache
          that includes `tokens`.
        """
        cfg = self.config
        with settings(token_axes=token_axes(tokens.shape)):
            documents = documents_of(cfg, tokens)
            if documents is not None and cache is not None:
                documents = cache.numbered_on(documents)
            embedding = self.param(
                "embedding", nn.initializers.normal(cfg.embedding_init_std), (cfg.vocab_size, cfg.width)
            )
            ends = connection(cfg, None, "ends")
            carry = enter(cfg, embedding, ends, tokens)

            collected, aux, kept = [], {}, {}
            for name, blocks in stacks(cfg).items():
                carry, (diagnostics, extra) = self._run(name, blocks, carry, sample, cache, documents)
                collected.append(diagnostics)
                if cache is not None:
                    kept[name] = {key: extra.pop(key) for key in cache.kept[name]}
                aux |= extra

            x = leave(cfg, ends, RMSNorm(cfg.norm_eps, name="final_norm"), carry, at)
            if cfg.tied_embeddings:
                unembedding = embedding.T
            else:
                unembedding = self.param("unembedding", nn.initializers.normal(0.02), (cfg.width, cfg.vocab_size))
            out = logits_of(x, unembedding) if targets is None else mean_loss(x, unembedding, targets)

        if sample:
            all_blocks = jax.tree.map(lambda *parts: jnp.concatenate(parts), *collected)
            # The axes [blocks, sub-layers of a block] become one axis of L sub-layers.
            aux |= jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), all_blocks)
        if cache is not None:
            aux["cache"] = written(cache, kept, tokens.shape[1], documents)
        return out, aux

    def _run(
        self, name: str, blocks: range, carry: Carry, sample: int, cache: Cache | None, documents: Array | None
    ) -> tuple[Carry, Any]:
        """Run the blocks of one scan, and return (the carry after them, (diagnostics, auxiliary values)).

        `name` is the name of the scan's parameters.  The arrays in the result, but for the carry, have an axis of blocks in front.
        """
        cfg = self.config
        dense = name == "dense_layers" or not cfg.num_experts
        indices = jnp.arange(blocks.start, blocks.stop)
        # Diagnostics and generation have no backward pass that could recompute.  Initialisation uses "none" too, so that it is the
        # same program under every policy.
        policy = "none" if sample or cache is not None or self.is_initializing() else cfg.remat_policy

        # Training replaces `auto` first (`remat_plan.resolve`), so that it arrives here only from a run's saved configuration.
        if policy in ("connection", "auto"):

            def sublayer(k, params, carry, layer):
                block = Block(cfg, 0, dense, only=k, parent=None)
                out: Any = block.apply({"params": params}, carry, layer, documents=documents)
                return out[0], out[1][1]

            L_r, params = remat.block_length(cfg, carry[0]), self.variables["params"][name]
            carry, aux = remat.recomputed(sublayer, params, carry, indices, 2, L_r, cfg.unroll)
            return carry, ({}, aux)

        past = None if cache is None else Past(cache.kept[name], cache.position, cache.documents)
        axes: Any = (0, None if past is None else Past._make((0, nn.broadcast, nn.broadcast)), nn.broadcast)
        scanned = nn.scan(
            nn.remat(Block, prevent_cse=False) if policy == "full" else Block,
            in_axes=axes,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=len(blocks),
            unroll=min(cfg.unroll, len(blocks)),
            # This check takes half of the tracing time.  At initialisation it stays on, because without it the initial random
            # numbers would change.
            check_constancy_invariants=self.is_initializing(),
        )
        return scanned(cfg, sample, dense, name=name)(carry, indices, past, documents)


class Block(nn.Module):
    """One block: two sub-layers, attention and feed-forward.  Each runs the boundary of its connection and then its branch."""

    config: ModelConfig
    sample: int
    """Number of tokens from which diagnostics are collected.  0: no diagnostics."""
    dense: bool
    """Whether the feed-forward branch is dense (SwiGLU).  False: it is a mixture of experts."""
    only: int | None = None
    """Index (0 or 1) of the only sub-layer of the block that runs, which `remat.recomputed` needs.  None: both run."""

    @nn.compact
    def __call__(
        self,
        carry: Carry,
        layer: Int[Array, ""],
        past: Past | None = None,
        documents: Int[Array, "B T"] | None = None,
    ) -> tuple[Carry, tuple[dict[str, Any], dict[str, Any]]]:
        """Write the pending branch output, if there is one, and run the block.  The output of its last branch is then pending.

        Args:
          carry: streams, and the branch output and coefficients of the pending write.
          layer: index of the block in the decoder.
          past: arrays of earlier tokens that attention keeps in the key-value cache.
          documents: number of each token's document, to which attention is limited.  None: it is not limited.

        Returns:
          the carry after the block, and (diagnostics [2, ...], auxiliary values of the branches).  With `past` the auxiliary
          values include the arrays of the new tokens for the key-value cache.
        """
        streams, c, y = carry
        collected, aux = [], {}
        for k, (name, branch) in enumerate(branches(self.config, self.dense).items()):
            if self.only not in (None, k):
                continue
            link = connection(self.config, 2 * layer + k, f"{name}_connection")
            if y is None:
                c = link.coefficients(streams)
                h = link.read(streams, c)
            else:
                streams, c, h = link.write_read(streams, c, y)
            h = constrain(h, "batch", "sequence", None)
            given = (past, documents) if name == "attention" else ()
            if self.only is not None:
                y, extra = remat.keep_branch(*_function_of(branch), h, *given)
            else:
                y, extra = branch(h, *given)
            y = constrain(y, "batch", "sequence", None)
            aux |= extra
            if self.sample:
                collected.append(sample_sublayer(link, streams, c, y, self.sample))
        diagnostics = jax.tree.map(lambda *leaves: jnp.stack(leaves), *collected) if collected else {}
        return (streams, c, y), (diagnostics, aux)


def stacks(config: ModelConfig) -> dict[str, range]:
    """Return the indices of the blocks in each scan over depth, by the name of the scan's parameters.

    The dense blocks before the first block with experts, if there are any, are one scan.  All other blocks are another scan.
    """
    leading, others = range(config.num_leading), range(config.num_leading, config.num_layers)
    return {"dense_layers": leading, "layers": others} if leading else {"layers": others}


def connection(config: ModelConfig, sublayer: int | Array | None, name: str) -> Connection:
    """Make the connection module of sub-layer l (`sublayer` = l - 1), or the one with the entry and the exit (`sublayer=None`)."""
    module = connection_module(config.connection)
    return module(config.connection, config.width, config.num_sublayers, sublayer, name=name)


def branches(config: ModelConfig, dense: bool) -> dict[str, nn.Module]:
    """Make the branches of one block, by name and in the order in which they run.

    Each branch is a function F(h) -> (y, auxiliary values) that begins with its own pre-norm.
    """
    shared: dict[str, Any] = {
        "norm_eps": config.norm_eps,
        "output_scale": 1 / math.sqrt(config.num_sublayers) if config.depth_scaled_init else 1.0,
        "dtype": jnp.dtype(config.compute_dtype),
    }
    heads: dict[str, Any] = {
        "num_heads": config.num_heads,
        "head_dim": config.head_dim,
        "rope_theta": config.rope_theta,
        "implementation": config.attention,
    }
    if config.uses_mla:
        widths = {"rope_width": config.rope_width, "kv_rank": config.kv_rank}
        attention = LatentAttention(**heads, **widths, **shared, name="attention")
    else:
        attention = Attention(
            **heads, num_kv_heads=config.num_kv_heads, qk_norm=config.qk_norm, **shared, name="attention"
        )
    if dense:
        return {"attention": attention, "mlp": SwiGLU(hidden=config.mlp_width, **shared, name="mlp")}
    experts = MoE(
        num_experts=config.num_experts,
        num_active=config.num_active_experts,
        num_shared=config.num_shared_experts,
        hidden=config.expert_width,
        routed_scale=ROUTED_SCALE,
        buffer=config.expert_buffer,
        **shared,
        name="mlp",
    )
    return {"attention": attention, "mlp": experts}


def _function_of(branch: nn.Module) -> tuple[remat.Branch, Any]:
    """Return a branch as a pure function (params, h, *given) -> (y, auxiliary values), and the branch's parameters."""
    unbound = branch.clone(parent=None, name=None)
    return lambda params, h, *given: unbound.apply({"params": params}, h, *given), branch.variables["params"]


def documents_of(config: ModelConfig, tokens: Int[Array, "B T"]) -> Int[Array, "B T"] | None:
    """Return the number of each token's document, counted from 0 in each sequence.  None: attention is not limited to documents.

    The end-of-document token belongs to the document that follows it.  It is the first token of that document.
    """
    if (first := config.document_token) is None:
        return None
    # Every device gets whole sequences, because a query is compared with the keys of all tokens.
    return jnp.cumsum(constrain(tokens, "batch", None) == first, axis=1, dtype=jnp.int32)


def enter(config: ModelConfig, embedding: Float[Array, "V C"], ends: Connection, tokens: Int[Array, "B T"]) -> Carry:
    """Make the carry before the first block: the streams of the embedded tokens, and a pending write that changes nothing."""
    # The embedding is gathered over the mesh axis fsdp before it is used, like any weight.  If its channels stayed split, the
    # embedded tokens would have to move between devices.
    x = jnp.take(constrain(embedding, "vocabulary", None), tokens, axis=0)
    x = constrain(x.astype(config.stream_dtype), "batch", "sequence", None)
    streams, c = ends.start(x)
    return streams, c, jnp.zeros(x.shape, config.compute_dtype)


def leave(
    config: ModelConfig, ends: Connection, final_norm: RMSNorm, carry: Carry, at: Int[Array, " B"] | None = None
) -> Float[Array, "B t C"]:
    """Return the output of the final norm, from which logits are made, for the carry after the last block.

    The last branch output is written first, unless it is None.  With `at`, only the token with the index at[b] of each sequence b
    is returned.
    """
    streams, c, y = carry
    x = ends.collapse(streams if y is None else ends.write(streams, c, y), c)
    x = x if at is None else jnp.take_along_axis(x, at[:, None, None], axis=1)
    return final_norm(x).astype(config.compute_dtype)


def logits_of(x: Float[Array, "B T C"], unembedding: Float[Array, "C V"]) -> Float[Array, "B T V"]:
    """Return the logits x W, float32.  The unembedding W is cast to the dtype of x, and sums are in float32."""
    logits = jnp.einsum("btc,cv->btv", x, unembedding.astype(x.dtype), preferred_element_type=jnp.float32)
    return constrain(logits, "batch", "sequence", "vocabulary")


def cross_entropy(logits: Float[Array, "*tokens V"], targets: Int[Array, "*tokens"]) -> Float[Array, ""]:
    """Return the mean negative log likelihood of the targets in nats per token, float32."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()


LOGITS_BYTES = 2**32
"""Largest size in bytes of the float32 logits that a device makes at once for the loss."""


def loss_parts(tokens: int, vocabulary: int) -> int:
    """Return the number of equal parts of a device's tokens, for one of which at a time `mean_loss` makes logits.

    It is the smallest number whose parts have at most `LOGITS_BYTES` of float32 logits, or one token each.

    Examples:
      >>> loss_parts(tokens=4 * 4096, vocabulary=129280), loss_parts(tokens=4096, vocabulary=50304)
      (2, 1)
    """
    most = max(1, LOGITS_BYTES // (4 * vocabulary))
    return next(n for n in range(1, tokens + 1) if tokens % n == 0 and tokens // n <= most)


def mean_loss(
    x: Float[Array, "B T C"], unembedding: Float[Array, "C V"], targets: Int[Array, "B T"]
) -> Float[Array, ""]:
    """Return `cross_entropy` of the logits of x, of which a device never holds more than `LOGITS_BYTES`.

    If all logits are larger, a device makes them for a part of its tokens at a time.  Under `jax.grad` it makes the gradients of a
    part at once, so that no logits are kept and none are made twice.  The gradients are then sums in another order.
    """
    B, T = targets.shape
    shards = token_shards((B, T))
    parts = loss_parts(B * T // math.prod(shards), unembedding.shape[1])
    if parts == 1:
        return cross_entropy(logits_of(x, unembedding), targets)
    # Each device has a copy of the unembedding as long as the loss takes, and adds up its gradient by itself.
    W = jnp.broadcast_to(unembedding.astype(x.dtype), (*shards, *unembedding.shape))
    return _loss_in_parts(_parts(x, shards, parts), _on_shards(W, "vocabulary"), _parts(targets, shards, parts))


def _parts(a: Array, shards: tuple[int, int], parts: int) -> Array:
    """Return an array [B, T, ...] as [parts, b, t, tokens, ...], where b x t are the shards of the tokens on the mesh."""
    b, t, rest = *shards, a.shape[2:]
    a = a.reshape(b, a.shape[0] // b, t, a.shape[1] // t, *rest)
    a = jnp.moveaxis(a, 2, 1).reshape(b, t, parts, -1, *rest)
    return jnp.moveaxis(a, 2, 0)


def _on_shards(a: Array, last: str | None) -> Array:
    return constrain(a, "batch", "sequence", *(None,) * (a.ndim - 3), last)


@jax.custom_vjp
def _loss_in_parts(x: Array, W: Array, targets: Array) -> Array:
    def add(total, part):
        return total + _summed(W, *part), None

    return jax.lax.scan(add, jnp.zeros(()), (x, targets))[0] / targets.size


def _summed(W: Float[Array, "b t C V"], x: Float[Array, "b t tokens C"], targets: Int[Array, "b t tokens"]) -> Array:
    """Return the sum of the losses of one part of all tokens."""
    logits = jnp.einsum("btnc,btcv->btnv", _on_shards(x, None), W, preferred_element_type=jnp.float32)
    return cross_entropy(_on_shards(logits, "vocabulary"), targets) * targets.size


def _with_gradients(x: Array, W: Array, targets: Array) -> tuple[Array, tuple[Array, Array]]:
    def add(carry, part):
        # The factor is inside, so that gradients are as small as those of `cross_entropy` before they are rounded.
        of_part = jax.value_and_grad(lambda W, x: _summed(W, x, part[1]) / targets.size, (0, 1))
        loss, (dW, dx) = of_part(W, part[0])
        return (carry[0] + loss, _on_shards(carry[1] + dW, "vocabulary")), dx

    zero = jnp.zeros(()), _on_shards(jnp.zeros(W.shape, jnp.float32), "vocabulary")
    (loss, dW), dx = jax.lax.scan(add, zero, (x, targets))
    return loss, (dx, dW.astype(W.dtype))


_loss_in_parts.defvjp(_with_gradients, lambda found, g: (*((g * a).astype(a.dtype) for a in found), None))
