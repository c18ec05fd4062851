"""The key-value cache of a decoder, which keeps arrays of the tokens read so far, so that the next token costs one token's work.

Only attention keeps arrays: keys and values (GQA), or the latent and the rotary key (MLA).  Connections keep nothing, because
every kind makes the coefficients of a token from the streams of that same token.  Streams run over depth and not over time: n
streams cost n times the activations of a token, and no cache.

Rows may have different lengths.  Row b writes its next token into slot position[b] and reads no slot from there on.
"""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from mhc_jax.config import ModelConfig


@flax.struct.dataclass
class Cache:
    """The key-value cache: arrays [N, B, S, ...] for the N blocks of each scan, in the compute dtype, and positions of the rows."""

    kept: dict[str, dict[str, Array]]
    """Arrays by the name of the scan (`layers`, `dense_layers`), then by the name of the array (k and v, or c and k_R)."""
    position: Int[Array, " B"]
    """Number of tokens that each row has so far."""

    @property
    def slots(self) -> int:
        """Number S of tokens that a row has room for."""
        return jax.tree.leaves(self.kept)[0].shape[2]


def empty_cache(config: ModelConfig, batch: int, slots: int = 0) -> Cache:
    """Make an empty cache with room for `slots` tokens in each of `batch` rows.

    If `slots` is 0, the cache after a call of the decoder holds exactly the tokens of the call.
    """
    if config.uses_mla:
        shapes = {"c": (config.kv_rank,), "k_R": (config.rope_width,)}
    else:
        heads = (config.num_kv_heads, config.head_dim)
        shapes = {"k": heads, "v": heads}
    depths = {"dense_layers": config.num_leading, "layers": config.num_layers - config.num_leading}
    kept = {
        name: {key: jnp.zeros((N, batch, slots, *shape), config.compute_dtype) for key, shape in shapes.items()}
        for name, N in depths.items()
        if N
    }
    return Cache(kept, jnp.zeros(batch, jnp.int32))


def written(cache: Cache, new: dict[str, dict[str, Array]], num_tokens: int) -> Cache:
    """Return the cache after `num_tokens` new tokens, which each row writes from its position on.

    The caller makes sure that the new tokens fit: position + num_tokens <= S.
    """

    def put(old: Array, new: Array, position: Array) -> Array:
        return jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), position, 1)  # [N, S, ...] of one row

    rows = jax.vmap(put, in_axes=(1, 1, 0), out_axes=1)
    kept = new if cache.slots == 0 else jax.tree.map(lambda a, b: rows(a, b, cache.position), cache.kept, new)
    return Cache(kept, cache.position + num_tokens)


def grown(cache: Cache, slots: int) -> Cache:
    """Return a copy of the cache with room for `slots` tokens in each row."""

    def pad(a: Array) -> Array:
        return jnp.pad(a, [(0, slots - a.shape[2]) if axis == 2 else (0, 0) for axis in range(a.ndim)])

    return Cache(jax.tree.map(pad, cache.kept), cache.position)
