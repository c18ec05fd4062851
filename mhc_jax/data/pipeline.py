"""From a `DataConfig` to batches, in an order that depends on the data settings alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from mhc_jax.data import arrays, sources
from mhc_jax.data.cache import cache_folder
from mhc_jax.data.tokenizers import Tokenizer, load_tokenizer
from mhc_jax.errors import require

if TYPE_CHECKING:
    import grain

    from mhc_jax.config import DataConfig

Batch = dict[str, np.ndarray]
"""`inputs` and `targets`, int32 [B, T]; targets are the inputs one token later."""

ENDLESS = 1 << 48
"""Windows an iterator can give: Grain's own endless repeat overflows `len` at a batch size of 1."""


@dataclass(frozen=True)
class Data:
    """Tokenized text and how to draw batches from it."""

    config: DataConfig
    tokenizer: Tokenizer
    train: arrays.TokenArray
    validation: arrays.TokenArray

    @property
    def train_tokens(self) -> np.ndarray:
        """Ids [N], uint16 or uint32, memory mapped."""
        return self.train.tokens

    @property
    def validation_tokens(self) -> np.ndarray:
        """Ids [N], uint16 or uint32, memory mapped."""
        return self.validation.tokens

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes per token of the validation text; ends of documents count as tokens.

        Bits per byte = loss in nats / ln 2 / bytes_per_token; exact for a part of the text with
        `target_bytes`.
        """
        return self.validation.counts.bytes / self.validation.counts.tokens

    def target_bytes(self, batches: Sequence[Batch]) -> int:
        """Return the UTF-8 bytes that the targets of `batches` stand for.

        Bits per byte of exactly these batches = summed loss in nats / ln 2 / target_bytes.
        """
        return sum(int(self.tokenizer.token_bytes[batch["targets"]].sum()) for batch in batches)

    def summary(self) -> dict[str, Any]:
        """Return what a run's record says about its data, as JSON values."""
        return {
            "source": self.config.source,
            "validation_source": self.config.validation_source,
            "tokenizer": self.config.tokenizer,
            "vocab_size": self.tokenizer.vocab_size,
            "fingerprint": self.tokenizer.fingerprint,
            "bytes_per_token": self.bytes_per_token,
            **{f"train_{k}": v for k, v in vars(self.train.counts).items()},
            **{f"validation_{k}": v for k, v in vars(self.validation.counts).items()},
        }

    def train_iterator(self, start_step: int = 0, rows: np.ndarray | None = None) -> grain.DatasetIterator[Batch]:
        """Return an endless iterator over shuffled training batches, after `start_step` batches.

        Every epoch visits each window of T + 1 tokens (window i starts at token i T) once, in a new
        order; a batch may span two epochs.  One thread reads two batches ahead; `close()` ends it.
        The state is `{"next_index": batches drawn}`: exact, JSON, and set in constant time.

        Args:
          start_step: batches passed over.
          rows: of each batch, those that are read, in this order; None: all.  Order and state do not depend on it, so that
            processes which read other rows make one batch, and go on as more or fewer processes.
        """
        import grain  # 1 s

        length, tokens = self.config.sequence_length, self.train_tokens
        windows = _windows(tokens, length)
        batches = (
            # Grain sees indices; windows are cut a batch at a time: 20 us each instead of 45.
            grain.MapDataset.range(windows)
            .seed(self.config.seed)
            .shuffle()
            .repeat(ENDLESS // windows)
            .batch(self.config.batch_size)
            .map(_cutter(tokens, length, rows))
        )
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
        iterator = iter(batches.to_iter_dataset(options))
        iterator.set_state({"next_index": start_step})
        return iterator

    def validation_batches(self, count: int, rows: np.ndarray | None = None) -> list[Batch]:
        """Return the first `count` batches of consecutive windows without overlap, or fewer.

        Shapes are always [B, T]: a last part of a batch is left out, and when the whole text holds
        fewer than B windows it fills one batch by repetition.  `rows` as in `train_iterator`.
        """
        length, size = self.config.sequence_length, self.config.batch_size
        windows = _windows(self.validation_tokens, length)
        cut = _cutter(self.validation_tokens, length, rows)
        if windows < size:
            return [cut(np.arange(size) % windows)]
        return [cut(np.arange(i * size, (i + 1) * size)) for i in range(min(count, windows // size))]


def load_data(config: DataConfig) -> Data:
    """Read, split and tokenize the text of `config`, or find the result in the cache.

    Raises:
      InputError: a source, tokenizer or cache folder that cannot be used, or a split shorter than
      one window.
    """
    tokenizer = load_tokenizer(config.tokenizer)
    cache = cache_folder(config.cache_dir)
    fraction = config.validation_fraction
    if config.validation_source:
        sources.check_disjoint(config.source, config.validation_source)
        fraction = 0.0
    held_out = config.validation_source or config.source
    data = Data(
        config,
        tokenizer,
        arrays.token_array(config.source, "train", tokenizer, cache=cache, fraction=fraction),
        arrays.token_array(held_out, "validation", tokenizer, cache=cache, fraction=fraction),
    )
    for split, source, array in (
        ("training", config.source, data.train),
        ("validation", held_out, data.validation),
    ):
        require(
            _windows(array.tokens, config.sequence_length) >= 1,
            f"The {split} text of {source!r} has {array.counts.tokens} tokens in "
            f"{array.counts.documents} documents, but one window needs data.sequence_length + 1 = "
            f"{config.sequence_length + 1}; give more text or documents, a "
            f"data.validation_source, or a smaller data.sequence_length.",
        )
    return data


def _windows(tokens: np.ndarray, length: int) -> int:
    return (len(tokens) - 1) // length


def _cutter(tokens: np.ndarray, length: int, rows: np.ndarray | None) -> Callable[[np.ndarray], Batch]:
    def cut(windows: np.ndarray) -> Batch:
        windows = windows if rows is None else windows[rows]
        inputs = np.empty((len(windows), length), np.int32)
        targets = np.empty_like(inputs)
        for row, start in enumerate((windows * length).tolist()):
            inputs[row] = tokens[start : start + length]
            targets[row] = tokens[start + 1 : start + length + 1]
        return {"inputs": inputs, "targets": targets}

    return cut
