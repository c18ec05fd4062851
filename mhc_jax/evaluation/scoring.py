"""Compute log-likelihoods of token sequences in batches of a few shapes.

A sequence is padded at its end to a power of two.  In a causal model later tokens do not change the predictions of earlier ones, so
a score depends neither on the padding nor on the other sequences of the batch.  All sequences that are padded to the same length
form a bucket.  For each bucket a program is compiled, for batches of as many sequences as fit the memory.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from mhc_jax.config import ModelConfig
from mhc_jax.cost import counts
from mhc_jax.data.tokenizers import Tokenizer
from mhc_jax.generation import bucket
from mhc_jax.model import Decoder
from mhc_jax.parallel.sharding import batch_sharding, using

LN2 = math.log(2)
TOKENS = {"cpu": 8192}
"""Largest number of tokens of a batch, by platform.  Larger batches are no faster."""
MORE_TOKENS = 65536
"""Largest number of tokens of a batch on platforms that `TOKENS` does not name."""
FEW_ROWS = 8
"""Smallest number of sequences (rows) of a batch, if they fit the memory.

With it, small batches share one program.  Otherwise each size would be compiled separately."""


class Scored(NamedTuple):
    """A sequence of token ids to score: the model predicts each of the last `scored` ids from all ids before it."""

    ids: Sequence[int]
    scored: int


class Score(NamedTuple):
    """Score of one sequence of tokens."""

    bits: float
    """-log2 of the probability of the scored tokens, in bits.  It is the sum, in float64, of one float32 term for each token."""
    greedy: bool
    """Whether every scored token was the most likely token at its position."""


def split_texts(tokenizer: Tokenizer, context: str, continuations: Sequence[str]) -> tuple[list[int], list[list[int]]]:
    """Split each text (context + continuation) into conditioning tokens, which all texts share, and the tokens to score.

    Each whole text is encoded.  The conditioning tokens are the longest run of tokens with which all encodings begin and that ends
    within the context.  All later tokens are scored.  Hence a token that holds the end of the context and the beginning of the
    continuation is scored, with the bytes of the context that it holds.  Two continuations differ in their scores exactly as in the
    log-probabilities of their whole texts.  White space at the end of the context counts as part of each continuation.

    lm-evaluation-harness (`TemplateLM._encode_pair`) instead cuts each text after as many tokens as the context alone has.  Both
    splits are the same if every encoding begins with the encoding of the context.

    Args:
      tokenizer: a lossless tokenizer.  No special tokens are added to a text.
      context: text before the continuations, which may be empty.
      continuations: texts to score, at least one, none of them empty.

    Returns:
      The conditioning tokens, and for each continuation its scored tokens, at least one.  If the texts share no token, the only
      conditioning token is the end-of-document token.
    """
    room = tokenizer.count_bytes(context.rstrip())
    encoded = tokenizer.encode_batch([context + continuation for continuation in continuations])
    first = encoded[0]
    shared = int(np.searchsorted(np.cumsum(tokenizer.token_bytes[first]), room, side="right"))
    for ids in encoded[1:]:
        shared = min(shared, len(ids))
        differs = np.flatnonzero(first[:shared] != ids[:shared])
        shared = int(differs[0]) if len(differs) else shared
    return first[:shared].tolist() or [tokenizer.end_of_document], [ids[shared:].tolist() for ids in encoded]


def memory_budget() -> int:
    """Return how many bytes a program may use: 4/5 of an accelerator's free memory, else 1/4 of the host's free memory."""
    stats = jax.devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return int(0.8 * (stats["bytes_limit"] - stats.get("bytes_in_use", 0)))
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4


def make_score_step(config: ModelConfig) -> Any:
    """Return the function (params, inputs, targets) -> (bits, greedy), which scores every target of a batch.

    Inputs, targets, bits and greedy have the shape [B, T].  bits is -log2 of the probability of each target, in float32.  greedy
    says whether the target was the most likely token at its position.
    """
    model = Decoder(config)

    def step(params, inputs, targets):
        logits, _ = model.apply({"params": params}, inputs)
        target = jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]
        top = logits.max(-1)
        # The logarithm of the sum is log2 and not ln / ln 2, so that a uniform model over 256 bytes has exactly 8 bits.
        bits = jnp.log2(jnp.exp(logits - top[..., None]).sum(-1)) + (top - target) / LN2
        return bits, target >= top

    return step


class Scorer:
    """A scorer of token sequences with one set of parameters, which keeps its compiled programs."""

    def __init__(self, config: ModelConfig, params: Any, mesh: Mesh | None = None, batch_size: int = 0):
        """Prepare the scorer.  Programs are compiled later.

        Args:
          config: configuration of the model.
          params: parameters of `Decoder`, on `mesh` or on the first device.
          mesh: mesh of devices.  None means one device.
          batch_size: number of sequences in a batch.  0 means as many as fit the memory by the compiler's estimate.
        """
        self.params, self.mesh, self.batch_size = params, mesh, batch_size
        self._step = jax.jit(make_score_step(config))
        self.programs: dict[tuple[int, int], Any] = {}
        """Compiled programs by the shape of their batch: (number of sequences, tokens of a sequence)."""
        self.compilations = 0
        self._most: dict[int, int] = {}

    def scores(self, sequences: Sequence[Scored]) -> Iterator[tuple[int, Score]]:
        """Yield the index and the score of each sequence, longer buckets first.  The score of equal sequences is computed once."""
        same: dict[tuple[tuple[int, ...], int], list[int]] = {}
        for index, sequence in enumerate(sequences):
            same.setdefault((tuple(sequence.ids), sequence.scored), []).append(index)
        buckets: dict[int, list[tuple[tuple[int, ...], int]]] = {}
        for key in same:
            buckets.setdefault(bucket(len(key[0]) - 1), []).append(key)
        for T in sorted(buckets, reverse=True):
            left = buckets[T]
            while left:
                scored = self._batch(left, T)
                for key, score in zip(left, scored, strict=False):
                    yield from ((index, score) for index in same[key])
                left = left[len(scored) :]

    def _batch(self, left: list[tuple[tuple[int, ...], int]], T: int) -> list[Score]:
        """Pad sequences to T tokens, run one batch of them, and return their scores.

        The batch has the first sequences of `left`, as many as the compiled program takes.  If memory runs out, a program for half
        as many is used.
        """
        while True:
            B = self._program(T, len(left))
            inputs, targets = np.zeros((B, T), np.int32), np.zeros((B, T), np.int32)
            for i, (ids, _) in enumerate(left[:B]):
                inputs[i, : len(ids) - 1], targets[i, : len(ids) - 1] = ids[:-1], ids[1:]
            if self.mesh:
                inputs, targets = jax.device_put((inputs, targets), batch_sharding(self.mesh))
            try:
                with using(self.mesh):
                    bits, greedy = map(np.asarray, self.programs[B, T](self.params, inputs, targets))
            except jax.errors.JaxRuntimeError as error:
                if "RESOURCE_EXHAUSTED" not in str(error) or self._least == B:
                    raise
                self._most[T] = B // 2
                continue
            ends = [(len(ids) - 1, scored) for ids, scored in left[:B]]
            return [
                Score(float(bits[i, n - k : n].astype(np.float64).sum()), bool(greedy[i, n - k : n].all()))
                for i, (n, k) in enumerate(ends)
            ]

    @property
    def _least(self) -> int:
        """Smallest number of sequences in a batch: one for each device of the mesh axes over which the batch is sharded."""
        return 1 if self.mesh is None else math.prod(self.mesh.shape[a] for a in ("data", "fsdp", "expert"))

    def _program(self, T: int, wanted: int) -> int:
        """Return the batch size of a compiled program for sequences of T tokens.

        The program takes at least `wanted` sequences, or as many as fit the memory.  It is compiled if no earlier program does.
        """
        most = TOKENS.get(jax.devices()[0].platform, MORE_TOKENS) // T
        while True:
            B = max(self._least, min(self._most.setdefault(T, self.batch_size or most), bucket(wanted, FEW_ROWS)))
            known = [rows for rows, length in self.programs if length == T and B <= rows <= max(B, self._most[T])]
            if known:
                return min(known)
            split = batch_sharding(self.mesh) if self.mesh else None
            shape = jax.ShapeDtypeStruct((B, T), jnp.int32, sharding=split)
            with using(self.mesh):
                program = self._step.lower(self.params, shape, shape).compile()
            self.compilations += 1
            if self.batch_size or self._least == B or (counts.compiled_memory(program) or 0) <= memory_budget():
                self.programs[B, T] = program
                return B
            self._most[T] = B // 2
