"""Generation of text: a first pass (prefill) reads the prompts, then decoding draws one token after another.

Decoding uses a key-value cache (`mhc_jax.kv_cache`), which has slots for one token each.  Arrays have few different shapes, so that
few programs are compiled: a prompt is padded at its end to a power of two, and the number of slots is a power of two, which doubles
when they are full.  Each call of the decoding program makes `CHUNK` tokens.  Padding does not change an answer, since causal
attention does not read tokens after the prompt, and new tokens overwrite the slots of the padding.
"""

from __future__ import annotations

import dataclasses
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
from mhc_jax.errors import check_seed, require
from mhc_jax.kv_cache import empty_cache, grown
from mhc_jax.model import Decoder
from mhc_jax.parallel.sharding import using

CHUNK = 8
"""Number of tokens that one call of the decoding program makes for each prompt."""
SHORTEST = 32
"""Smallest length to which a prompt is padded, in tokens."""


@dataclass(frozen=True)
class Sampling:
    """Settings that say how the next token is drawn."""

    temperature: float = 0.0
    """Number by which logits are divided.  0: always take the most likely token (greedy)."""
    top_p: float = 1.0
    """The next token is drawn from the smallest set of most likely tokens that has at least this probability.  1: all tokens."""
    seed: int = 0
    """Seed of the random numbers with which tokens are drawn, between 0 and 2^32 - 1."""

    def __post_init__(self) -> None:
        require(
            0 <= self.temperature < math.inf,
            f"The temperature is {self.temperature}; it must not be negative (0: greedy).",
        )
        check_seed("The seed of sampling", self.seed)
        require(0 < self.top_p <= 1, f"top_p is {self.top_p}; it must lie above 0 and be at most 1.")


def bucket(length: int, shortest: int = SHORTEST) -> int:
    """Return the smallest power of two that is at least `length` and at least `shortest`.

    Examples:
      >>> bucket(5), bucket(33)
      (32, 64)
    """
    return max(shortest, 1 << (length - 1).bit_length())


def draw(
    logits: Float[Array, "B V"],
    keys: Any,
    temperature: Float[Array, ""],
    top_p: Float[Array, ""],
) -> Int[Array, " B"]:
    r"""Draw a token for each of B sequences from the nucleus of $\mathrm{softmax}(\mathrm{logits} / \mathrm{temperature})$.

    The nucleus is the smallest set of most likely tokens whose probabilities sum to at least top_p (Holtzman et al., arXiv
    1904.09751, Eq. 2).  It always holds the most likely token.

    Args:
      logits: float32.
      keys: one random key for each sequence.
      temperature: above 0.
      top_p: above 0, at most 1.

    Returns:
      ids of the tokens, int32.
    """
    order = jnp.argsort(-logits, axis=-1)
    ranked = jnp.take_along_axis(logits, order, -1) / temperature
    p = jax.nn.softmax(ranked, axis=-1)
    # A token is in the nucleus if all more likely tokens together have a probability below top_p.
    ranked = jnp.where(jnp.cumsum(p, -1) - p < top_p, ranked, -jnp.inf)
    rank = jax.vmap(jax.random.categorical)(keys, ranked)
    return jnp.take_along_axis(order, rank[:, None], -1)[:, 0].astype(jnp.int32)


class Generator:
    """A generator of text with one set of parameters.  It compiles its programs once for each shape of arrays, and keeps them."""

    def __init__(
        self,
        config: ModelConfig,
        params: Any,
        context: int,
        vocab_size: int = 0,
        mesh: Mesh | None = None,
        shortest: int = SHORTEST,
    ):
        """Make a generator, which compiles its programs when it first needs them.

        Args:
          config: configuration of the model.
          params: parameters of the decoder.
          context: largest number of tokens of prompt and answer together.
          vocab_size: number of tokens of the tokenizer.  Ids from this number on are never drawn.  0: `config.vocab_size`.
          mesh: mesh of `make_mesh` on which `params` are placed.  None: no mesh.
          shortest: smallest length to which a prompt is padded, a power of two.
        """
        self.params, self.context, self.mesh, self.shortest = params, context, mesh, shortest
        self.programs: set[tuple[Any, ...]] = set()
        """Programs that have been compiled, each as a tuple of its name and static arguments, such as the number of prompts."""
        model, valid = Decoder(config), vocab_size or config.vocab_size

        def run(params: Any, tokens: Array, **inputs: Any) -> Any:
            return model.apply({"params": params}, tokens, **inputs)

        def choose(logits: Array, position: Array, rows: Array, settings: tuple[Array, Array, Array], greedy: bool):
            seed, temperature, top_p = settings
            logits = jnp.where(jnp.arange(logits.shape[-1])[None] < valid, logits, -jnp.inf)
            if greedy:
                return jnp.argmax(logits, -1).astype(jnp.int32)
            # Each prompt and position has a random key of its own, so that an answer does not depend on other prompts of the batch.
            keys = jax.vmap(lambda b, t: jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), b), t))(
                rows, position
            )
            return draw(logits, keys, temperature, top_p)

        @functools.partial(jax.jit, static_argnames=("slots", "greedy"))
        def prefill(params, tokens, lengths, rows, settings, *, slots, greedy):
            cache = empty_cache(config, len(tokens))
            logits, aux = run(params, tokens, cache=cache, at=lengths - 1)
            cache = dataclasses.replace(grown(aux["cache"], slots), position=lengths)
            return choose(logits[:, 0], lengths, rows, settings, greedy), cache

        @functools.partial(jax.jit, static_argnames=("greedy",), donate_argnums=1)
        def decode(params, cache, token, rows, settings, *, greedy):
            def step(carry, _):
                cache, token = carry
                logits, aux = run(params, token[:, None], cache=cache)
                token = choose(logits[:, 0], aux["cache"].position, rows, settings, greedy)
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
        """Return an answer to each prompt, the tokens that continue it.  All prompts are one batch.

        Args:
          prompts: token ids of each prompt.  Every prompt has at least one token.
          max_new: largest number of tokens of an answer.  An answer also ends when prompt and answer fill the context.
          sampling: settings that say how tokens are drawn.  None: the most likely token is always taken.
          ended: function of the index of a prompt and its new tokens so far, called after every `CHUNK` tokens or fewer.  If it
            returns True, the answer ends.  None: answers end at their largest length.
          rows: a number for each prompt, from which, with the seed, its random keys are made.  None: 0, 1, ...

        Returns:
          the new tokens of each prompt.

        Raises:
          InputError: a prompt is empty or leaves no room in the context.
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
        settings = (np.uint32(sampling.seed), np.float32(sampling.temperature), np.float32(sampling.top_p))
        numbers = np.asarray(range(B) if rows is None else rows, np.int32)
        greedy = sampling.temperature == 0
        slots = bucket(max(lengths) + CHUNK, width)
        answers: list[list[int]] = [[] for _ in prompts]

        def extend(made: np.ndarray, active: list[int]) -> list[int]:
            """Add the new tokens `made` [B, t] to the answers of the prompts `active`, and return those whose answers go on."""
            for row in active:
                answers[row] += made[row][: limits[row] - len(answers[row])].tolist()
            unfinished = [row for row in active if len(answers[row]) < limits[row]]
            return [row for row in unfinished if ended is None or not ended(row, answers[row])]

        with using(self.mesh):
            self.programs.add(("prefill", B, width, slots, greedy))
            token, cache = self._prefill(
                self.params, tokens, np.asarray(lengths, np.int32), numbers, settings, slots=slots, greedy=greedy
            )
            active = extend(np.asarray(token)[:, None], list(range(B)))
            while active:
                needed = max(lengths[row] + len(answers[row]) - 1 for row in active) + CHUNK
                if needed > cache.slots:
                    self.programs.add(("grow", B, cache.slots, bucket(needed)))
                    cache = self._grow(cache, bucket(needed))
                self.programs.add(("decode", B, cache.slots, greedy))
                cache, token, made = self._decode(self.params, cache, token, numbers, settings, greedy=greedy)
                active = extend(np.asarray(made), active)
        return answers
