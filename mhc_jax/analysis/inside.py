r"""Run the decoder of a trained model one sub-layer at a time, and let a function see and replace the streams between them.

A model has L sub-layers and hence L + 1 **boundaries**, b = 0 ... L.  The streams $x_b$ at boundary b < L are those that sub-layer
b + 1 reads, after the last branch output was written and before the coefficients of the sub-layer are made.  $x_L$ are the streams
that the exit collapses.  Streams count from 0, as i = 0 ... n - 1, and $x_{b,i,t}$ is the vector [C] of stream i at token t.

What counts as streams is what diagnostics see, `Connection.flat`.  Every kind of connection can be looked at.  `attnres_block`
shows the sum of its sources as one stream and refuses edits (`Connection.with_flat`).  `single_pass` carries coefficients beside
its streams, and kinds that read earlier depth carry sources; an edit changes the streams alone.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from mhc_kernels import settings, split

from mhc_jax import model as models
from mhc_jax.config import ModelConfig
from mhc_jax.errors import require
from mhc_jax.layers.norm import RMSNorm
from mhc_jax.parallel.sharding import token_axes, using
from mhc_jax.runs.trained import Trained

Model = Trained | tuple[ModelConfig, Any]
"""A trained model, or the configuration of a decoder and its `params` collection."""
Tokens = Array | np.ndarray
"""Ids of tokens in [0, vocab_size), integers of the shape [B, T]."""
Visitor = Callable[[int, Array], Array | None]
"""A function (b, streams [n, B, T, C]) -> the streams with which the model goes on, or None for the same streams."""


def run(model: Model, tokens: Tokens, visit: Visitor | None = None) -> Float[Array, "B T V"]:
    """Return the logits of a model, float32, and show its streams at every boundary to a visitor, which may replace them.

    Without edits the logits are those of `Decoder`, up to rounding.  The decoder is not one program here: each sub-layer is a
    compiled function, and the visitor is plain Python between two of them, which may keep what it sees.

    Args:
      model: a trained model, or (configuration, parameters).
      tokens: ids in [0, vocab_size).
      visit: called as visit(b, streams) at b = 0 ... L, with streams [n, B, T, C] in the dtype of the streams.  It returns the
        streams with which the model goes on, or None for the same streams.

    Raises:
      InputError: tokens are not ids [B, T] of the vocabulary, the visitor returns another shape, or the kind of connection has no
        stream that could be replaced.

    Examples:
      The root mean square of each stream at the exit of a model with two sub-layers:

      >>> config = ModelConfig(vocab_size=5, width=8, num_layers=1, num_heads=1, num_kv_heads=1, mlp_width=8)
      >>> tokens, sizes = jnp.array([[0, 1, 2]]), {}
      >>> params = models.Decoder(config).init(jax.random.key(0), tokens)["params"]
      >>> logits = run((config, params), tokens, lambda b, x: sizes.update({b: jnp.sqrt((x**2).mean((1, 2, 3)))}))
      >>> logits.shape, sizes[2].shape
      ((1, 3, 5), (4,))
    """
    with opened(model, tokens, least=1) as (inside, ids):
        return inside.unembed(inside.collapsed(inside.end(inside.enter(ids), visit=visit)))


def unembed(model: Model, x: Float[Array, "B T C"]) -> Float[Array, "B T V"]:
    """Return the logits of one vector for each token, float32: the final norm, then the unembedding.

    In a visitor of `run`, `unembed(model, streams[i])` is the logit lens of stream i.
    """
    config, params, mesh = _parts(model)
    with using(mesh):
        return _unembed(config, params, x)


class State(NamedTuple):
    """What the decoder carries at a boundary."""

    streams: Any
    c: Any
    """Coefficients with which the last branch output was written."""
    documents: Int[Array, "B T"] | None
    """Number of each token's document, to which attention is limited.  None: it is not limited."""


class Inside(NamedTuple):
    """The decoder in parts, with the parameters of one model; `opened` makes it."""

    config: ModelConfig
    params: Any

    @property
    def sublayers(self) -> int:
        """Number L of sub-layers, which is also the index of the last boundary."""
        return self.config.num_sublayers

    @property
    def num_streams(self) -> int:
        """Number n of streams."""
        return self.config.connection.num_streams

    def enter(self, ids: Int[Array, "B T"]) -> State:
        """Return the state at boundary 0."""
        return _enter(self.config, self.params, ids)

    def boundaries(self, state: State, first: int = 0, visit: Visitor | None = None) -> Iterator[tuple[int, State]]:
        """Yield (b, state) at each boundary from `first` to L, after the visitor saw it, and run the sub-layers between them."""
        for b in range(first, self.sublayers + 1):
            if visit is not None and (edited := visit(b, seen := self.streams(state))) is not None:
                require(
                    edited.shape == seen.shape,
                    f"The visitor returns an array of shape {edited.shape} at boundary {b}; it must return one of shape "
                    f"{seen.shape}, or None.",
                )
                state = self.with_streams(state, edited.astype(seen.dtype))
            yield b, state
            if b < self.sublayers:
                block, k = divmod(b, 2)
                stack = next(name for name, blocks in models.stacks(self.config).items() if block in blocks)
                state = _sublayer(self.config, stack, k, self.params, jnp.asarray(block), state)

    def end(self, state: State, first: int = 0, visit: Visitor | None = None) -> State:
        """Return the state at boundary L, starting from the state at boundary `first`."""
        last = state
        for _, last in self.boundaries(state, first, visit):  # noqa: B007  (the last one is needed)
            pass
        return last

    def streams(self, state: State) -> Float[Array, "n B T C"]:
        """Return the streams of a state, in their dtype."""
        return jnp.stack(split(_ends(self.config, self.params).flat(state.streams), self.num_streams))

    def with_streams(self, state: State, x: Float[Array, "n B T C"]) -> State:
        """Return the state with other streams."""
        flat = jnp.concatenate(list(x), -1)
        return state._replace(streams=_ends(self.config, self.params).with_flat(state.streams, flat))

    def collapsed(self, state: State) -> Float[Array, "B T C"]:
        """Return the one vector that the exit makes of the streams."""
        return _collapsed(self.config, self.params, state)

    def unembed(self, x: Float[Array, "B T C"]) -> Float[Array, "B T V"]:
        """Return the logits of one vector, as the function `unembed` does."""
        return _unembed(self.config, self.params, x)


@contextlib.contextmanager
def opened(model: Model, tokens: Tokens, least: int = 2) -> Iterator[tuple[Inside, Int[Array, "B T"]]]:
    """Make the parts of a model, and the tokens as int32, for work inside the context, where arrays are sharded as in its run.

    Raises:
      InputError: tokens are not ids [B, T] of the vocabulary, with T of at least `least`.
    """
    config, params, mesh = _parts(model)
    ids, V = np.asarray(tokens), config.vocab_size
    require(
        ids.ndim == 2 and len(ids) > 0 and ids.shape[1] >= least and np.issubdtype(ids.dtype, np.integer),
        f"tokens is an array {ids.shape} of {ids.dtype}; give integers [B, T] with T of at least {least}.",
    )
    low, high = int(ids.min()), int(ids.max())
    require(low >= 0 and high < V, f"tokens has ids from {low} to {high}; the model's vocabulary has 0 to {V - 1}.")
    with using(mesh), settings(token_axes=token_axes(ids.shape)):
        yield Inside(config, params), jnp.asarray(ids, jnp.int32)


def _parts(model: Model) -> tuple[ModelConfig, Any, Any]:
    """Return the configuration, the parameters, and the mesh or None."""
    if isinstance(model, Trained):
        return model.config.model, model.params, model.mesh
    config, params = model
    require(
        isinstance(config, ModelConfig) and "embedding" in params,
        f"model is a pair of {type(config).__name__} and {type(params).__name__}; give a `Trained`, or (ModelConfig, the `params` "
        "collection of `Decoder`).",
    )
    return config, params, None


def _ends(config: ModelConfig, params: Any) -> Any:
    return models.connection(config, None, "ends").bind({"params": params.get("ends", {})})


@functools.partial(jax.jit, static_argnums=0)
def _enter(config: ModelConfig, params: Any, tokens: Int[Array, "B T"]) -> State:
    streams, c, _ = models.enter(config, params["embedding"], _ends(config, params), tokens)
    return State(streams, c, models.documents_of(config, tokens))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _sublayer(config: ModelConfig, stack: str, k: int, params: Any, block: Int[Array, ""], state: State) -> State:
    """Run sub-layer k (0 or 1) of a block: its coefficients, its read, its branch and its write."""
    dense = stack == "dense_layers" or not config.num_experts
    name, branch = list(models.branches(config, dense).items())[k]
    own = jax.tree.map(lambda a: a[block - models.stacks(config)[stack].start], params[stack])
    link: Any = models.connection(config, 2 * block + k, f"{name}_connection")
    link = link.bind({"params": own.get(f"{name}_connection", {})})
    c = link.coefficients(state.streams)
    given = (None, state.documents) if name == "attention" else ()
    y, _ = branch.apply({"params": own[name]}, link.read(state.streams, c), *given)
    return State(link.write(state.streams, c, y), c, state.documents)


@functools.partial(jax.jit, static_argnums=0)
def _collapsed(config: ModelConfig, params: Any, state: State) -> Float[Array, "B T C"]:
    return _ends(config, params).collapse(state.streams, state.c)


@functools.partial(jax.jit, static_argnums=0)
def _unembed(config: ModelConfig, params: Any, x: Float[Array, "B T C"]) -> Float[Array, "B T V"]:
    normed: Any = RMSNorm(config.norm_eps).apply({"params": params["final_norm"]}, x)
    unembedding = params["embedding"].T if config.tied_embeddings else params["unembedding"]
    return models.logits_of(normed.astype(config.compute_dtype), unembedding)
