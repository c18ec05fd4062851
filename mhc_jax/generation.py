"""Text from a decoder: prompts in one pass, then a token a step over the cache (`mhc_jax.kv_cache`).

Shapes are few, so that programs are: a prompt is padded on the right to the next power of two, the cache holds a power of two of
slots and doubles when it is full, and `CHUNK` tokens are made a call.  Padding changes nothing: it comes after the prompt, and the
first new token takes its slot.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from mhc_jax.config import ModelConfig
from mhc_jax.errors import require
from mhc_jax.kv_cache import Cache, empty_cache, grown
from mhc_jax.model import Decoder
from mhc_jax.parallel.sharding import using

CHUNK = 8
"""Tokens a call of the decode program makes."""
SHORTEST = 32
"""Tokens of the smallest bucket."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn."""

    temperature: float = 0.0
    """0: the most likely token (greedy)."""
    top_p: float = 1.0
    """Draw among the most likely tokens that together have this probability; 1: among all."""
    seed: int = 0

    def __post_init__(self) -> None:
        require(
            0 <= self.temperature < math.inf,
            f"The temperature is {self.temperature}; it must not be negative (0: greedy).",
        )
        require(0 < self.top_p <= 1, f"top_p is {self.top_p}; it must lie above 0 and be at most 1.")


def bucket(length: int, shortest: int = SHORTEST) -> int:
    """The power of two that holds `length` tokens, at least `shortest`."""
    return max(shortest, 1 << (length - 1).bit_length())


def draw(
    logits: Float[Array, "B V"],
    keys: Any,
    temperature: Float[Array, ""],
    top_p: Float[Array, ""],
) -> Int[Array, " B"]:
    """A token of each row from softmax(logits / temperature), cut to the nucleus of probability top_p (arXiv 1904.09751).

    Args:
      logits: float32.
      keys: one random key a row.
      temperature: above 0.
      top_p: the most likely token always stays.
    """
    order = jnp.argsort(-logits, axis=-1)
    ranked = jnp.take_along_axis(logits, order, -1) / temperature
    p = jax.nn.softmax(ranked, axis=-1)
    # Tokens before which less than top_p has been gathered.
    ranked = jnp.where(jnp.cumsum(p, -1) - p < top_p, ranked, -jnp.inf)
    rank = jax.vmap(jax.random.categorical)(keys, ranked)
    return jnp.take_along_axis(order, rank[:, None], -1)[:, 0].astype(jnp.int32)


class Generator:
    """Generation with one set of parameters.  Programs are compiled once a bucket and kept."""

    def __init__(
        self,
        config: ModelConfig,
        params: Any,
        context: int,
        vocab_size: int = 0,
        mesh: Mesh | None = None,
        shortest: int = SHORTEST,
    ):
        """Ids from `vocab_size` on (0: none) are never drawn: an embedding may have more rows than the tokenizer has tokens.

        Args:
          config: of the model.
          params: under `params` of the decoder.
          context: tokens of prompt and answer together, at most.
          vocab_size: of the tokenizer.
          mesh: of `make_mesh`, with `params` placed on it.
          shortest: tokens of the smallest bucket, a power of two.
        """
        self.config, self.params, self.context, self.mesh, self.shortest = config, params, context, mesh, shortest
        self.programs: set[tuple[Any, ...]] = set()
        """What has been compiled."""
        model, valid = Decoder(config), vocab_size or config.vocab_size

        def run(params: Any, tokens: Array, **kwargs: Any) -> Any:
            return model.apply({"params": params}, tokens, **kwargs)

        def choose(logits: Array, position: Array, rows: Array, settings: tuple[Array, Array, Array], greedy: bool):
            seed, temperature, top_p = settings
            logits = jnp.where(jnp.arange(logits.shape[-1])[None] < valid, logits, -jnp.inf)
            if greedy:
                return jnp.argmax(logits, -1).astype(jnp.int32)
            # By row and position, so that an answer does not depend on what else is in the batch.
            keys = jax.vmap(lambda b, t: jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), b), t))(
                rows, position
            )
            return draw(logits, keys, temperature, top_p)

        @functools.partial(jax.jit, static_argnames=("slots", "greedy"))
        def prefill(params, tokens, lengths, rows, settings, *, slots, greedy):
            out, aux = run(params, tokens, cache=empty_cache(config, len(tokens)), only=lengths - 1)
            cache = Cache(grown(aux["cache"], slots).kept, lengths)
            return choose(out[:, 0], lengths, rows, settings, greedy), cache

        @functools.partial(jax.jit, static_argnames=("greedy",), donate_argnums=1)
        def decode(params, cache, token, rows, settings, *, greedy):
            def step(carry, _):
                cache, token = carry
                out, aux = run(params, token[:, None], cache=cache)
                token = choose(out[:, 0], aux["cache"].position, rows, settings, greedy)
                return (aux["cache"], token), token

            (cache, token), made = jax.lax.scan(step, (cache, token), length=CHUNK)
            return cache, token, made.T

        self._prefill, self._decode = prefill, decode
        self._grow = jax.jit(grown, static_argnums=1)

    def generate(
        self,
        prompts: Sequence[Sequence[int] | np.ndarray],
        max_new: int,
        sampling: Sampling | None = None,
        ended: Callable[[int, list[int]], bool] | None = None,
        rows: Sequence[int] | None = None,
    ) -> list[list[int]]:
        """New tokens of each prompt, one batch.

        Args:
          prompts: ids, at least one each.
          max_new: tokens to make, at most; an answer also ends where the context does.
          sampling: greedy if not given.
          ended: (index of the prompt, tokens made so far), called after every `CHUNK` tokens or fewer; True ends that answer.
          rows: names of the prompts for the random numbers; 0, 1, ... if not given.

        Raises:
          InputError: a prompt that is empty or leaves no room in the context.
        """
        sampling = sampling or Sampling()
        lengths = [len(prompt) for prompt in prompts]
        require(min(lengths) > 0, "The prompt is empty; give at least one token of text.")
        require(
            max(lengths) < self.context,
            f"The prompt has {max(lengths)} tokens and the context {self.context}; shorten the prompt, or allow a longer "
            "context (positions beyond the trained ones are extrapolated).",
        )
        limits = [min(max_new, self.context - length) for length in lengths]
        B, width = len(prompts), bucket(max(lengths), self.shortest)
        tokens = np.zeros((B, width), np.int32)
        for row, prompt in enumerate(prompts):
            tokens[row, : lengths[row]] = prompt
        settings = (np.int32(sampling.seed), np.float32(sampling.temperature), np.float32(sampling.top_p))
        names = np.asarray(range(B) if rows is None else rows, np.int32)
        greedy = sampling.temperature == 0
        slots = bucket(max(lengths) + CHUNK, width)
        out: list[list[int]] = [[] for _ in prompts]
        with using(self.mesh):
            self.programs.add(("prefill", B, width, slots, greedy))
            token, cache = self._prefill(
                self.params, tokens, np.asarray(lengths, np.int32), names, settings, slots=slots, greedy=greedy
            )
            active = self._take(out, np.asarray(token)[:, None], list(range(B)), limits, ended)
            while active:
                needed = max(lengths[row] + len(out[row]) - 1 for row in active) + CHUNK
                if needed > cache.slots:
                    self.programs.add(("grow", B, cache.slots, bucket(needed)))
                    cache = self._grow(cache, bucket(needed))
                self.programs.add(("decode", B, cache.slots, greedy))
                cache, token, made = self._decode(self.params, cache, token, names, settings, greedy=greedy)
                active = self._take(out, np.asarray(made), active, limits, ended)
        return out

    @staticmethod
    def _take(out, made, active, limits, ended):
        """Add the tokens made to the answers that go on; those that still do."""
        for row in active:
            out[row] += made[row][: limits[row] - len(out[row])].tolist()
        return [
            row for row in active if len(out[row]) < limits[row] and not (ended is not None and ended(row, out[row]))
        ]
