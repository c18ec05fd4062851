"""The key-value cache of a decoder, which keeps arrays of earlier tokens so that they are not computed again for the next token.

Only attention keeps arrays: keys and values (GQA), or the latent vector and the rotary key (MLA).  Connections keep none, because
every kind makes the coefficients of a token from the streams of that token alone.  So n streams take n times the memory of one
stream for the tokens that are being computed, and none for earlier tokens.

A row of the cache holds one sequence, in one slot for each token.  Rows may have different lengths.  Row b puts its next token into
slot position[b].  Attention sees the slots before position[b] and the new tokens.  If attention is limited to documents, it sees
only those slots of them whose document has the same number.
"""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from mhc_jax.config import ModelConfig


@flax.struct.dataclass
class Cache:
    """The key-value cache of B sequences (rows), with S slots for tokens in each row."""

    kept: dict[str, dict[str, Array]]
    """Arrays [N, B, S, ...] of N blocks, with S slots for tokens in each of B rows, in the compute dtype.  The first key is the
    name of the scan over these blocks (`layers`, `dense_layers`), the second that of the array (k, v for GQA; c, k_R for MLA)."""
    position: Int[Array, " B"]
    """Number of tokens that each of the B rows of the cache holds so far.  A row holds one sequence."""
    documents: Int[Array, "B S"] | None = None
    """Number of the document of the token in each slot.  None: attention is not limited to documents."""

    @property
    def slots(self) -> int:
        """Number S of tokens for which each row has room."""
        return jax.tree.leaves(self.kept)[0].shape[2]

    def numbered_on(self, documents: Int[Array, "B T"]) -> Int[Array, "B T"]:
        """Return the numbers of the documents of new tokens, where the first document may have begun in the cache.

        `documents` counts from 0 at the first new token of each row, which belongs to the document of the last token in the cache.
        """
        if self.documents is None or self.slots == 0:
            return documents
        last = jnp.take_along_axis(self.documents, jnp.maximum(self.position - 1, 0)[:, None], axis=1)
        return documents + jnp.where(self.position[:, None] > 0, last, 0)


def empty_cache(config: ModelConfig, batch: int, slots: int = 0) -> Cache:
    """Make an empty cache with room for `slots` tokens in each of `batch` rows.

    If `slots` is 0, the cache that the decoder returns has room for exactly the tokens that the decoder was given.
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
    documents = None if config.document_token is None else jnp.zeros((batch, slots), jnp.int32)
    return Cache(kept, jnp.zeros(batch, jnp.int32), documents)


def written(
    cache: Cache, new: dict[str, dict[str, Array]], num_tokens: int, documents: Int[Array, "B T"] | None = None
) -> Cache:
    """Return the cache with the arrays `new` of `num_tokens` more tokens in each row, in the slots from the row's position on.

    The caller makes sure that the new tokens fit: position + num_tokens <= S.  `documents` has the numbers of their documents, if
    attention is limited to documents.
    """

    def put(old: Array, new: Array, position: Array) -> Array:
        # `old` [N, S, ...] and `new` [N, num_tokens, ...] belong to one row of the cache.
        return jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), position, 1)

    rows = jax.vmap(put, in_axes=(1, 1, 0), out_axes=1)
    if cache.slots == 0:
        return Cache(new, cache.position + num_tokens, documents)
    kept = jax.tree.map(lambda a, b: rows(a, b, cache.position), cache.kept, new)
    if cache.documents is not None and documents is not None:
        documents = rows(cache.documents[None], documents[None], cache.position)[0]
    return Cache(kept, cache.position + num_tokens, documents)


def grown(cache: Cache, slots: int) -> Cache:
    """Return a copy of the cache with room for `slots` tokens in each row."""

    def pad(a: Array, slot_axis: int = 2) -> Array:
        return jnp.pad(a, [(0, slots - a.shape[slot_axis]) if axis == slot_axis else (0, 0) for axis in range(a.ndim)])

    documents = None if cache.documents is None else pad(cache.documents, 1)
    return Cache(jax.tree.map(pad, cache.kept), cache.position, documents)
