"""From a `DataConfig` to batches, in an order that depends on the data settings alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from mhc_jax.data import arrays, sources
from mhc_jax.data.cache import cache_folder
from mhc_jax.data.tokenizers import Tokenizer, load_tokenizer
from mhc_jax.errors import InputError, require

if TYPE_CHECKING:
    import grain

    from mhc_jax.config import DataConfig, ExperimentConfig

Batch = dict[str, np.ndarray]
"""`inputs` and `targets`, int32 [B, T]; targets are the inputs one token later."""

ODD_SHARE = 0.2
"""Share of all tokens above which a validation text that a hash has set apart is odd, if it is also twice what was asked for."""
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
    def identity(self) -> dict[str, str]:
        """`Counts.sha256` of both splits, under their keys in `summary`."""
        return {"train_sha256": self.train.counts.sha256, "validation_sha256": self.validation.counts.sha256}

    def target_bytes(self, batches: Sequence[Batch]) -> int:
        """Return the UTF-8 bytes that the targets of `batches` stand for; the end of a document stands for none."""
        return sum(int(self.tokenizer.token_bytes[batch["targets"]].sum()) for batch in batches)

    def bits_per_nat(self, count: int) -> float:
        r"""Bits per byte of the first `count` validation batches, as a multiple of their mean loss in nats a token.

        $-\sum_i \ln p_i / (\ln 2 \cdot \text{bytes})$, over the targets of exactly these batches and the bytes that they stand
        for.  The end of a document counts in the sum, since the model must predict it, and has no bytes.  NaN where no target
        has a byte.
        """
        batches = self.validation_batches(count)
        size = self.target_bytes(batches)
        return sum(batch["targets"].size for batch in batches) / math.log(2) / size if size else math.nan

    def summary(self) -> dict[str, Any]:
        """Return what a run's record says about its data, as JSON values."""
        return {
            "source": self.config.source,
            "validation_source": self.config.validation_source,
            "tokenizer": self.config.tokenizer,
            "vocab_size": self.tokenizer.vocab_size,
            "fingerprint": self.tokenizer.fingerprint,
            **{f"train_{k}": v for k, v in vars(self.train.counts).items()},
            **{f"validation_{k}": v for k, v in vars(self.validation.counts).items()},
        }

    def describe(self, count: int) -> list[str]:
        """Return lines for the start of a run: the sizes of both splits, then a warning for each odd thing about them.

        Args:
          count: validation batches that a run asks for (`validation_batches`).
        """
        config, held_out = self.config, self.validation.counts
        fills = _windows(self.validation_tokens, config.sequence_length) // config.batch_size
        sizes = (
            f"{c.documents:,} documents, {c.tokens:,} tokens, {c.bytes:,} bytes" for c in (self.train.counts, held_out)
        )
        out = ["training text: {}; validation text: {}".format(*sizes)]
        out[0] += (
            f", of which {min(count, max(fills, 1))} x {config.batch_size} x {config.sequence_length} tokens are read"
        )
        share = held_out.tokens / (held_out.tokens + self.train.counts.tokens)
        by_hash = not config.validation_source and sources.local(config.source)
        if share > (max(ODD_SHARE, 2 * config.validation_fraction) if by_hash else 0.5):
            why = f", though data.validation_fraction is {config.validation_fraction}" if by_hash else ""
            out.append(
                f"warning: {share:.0%} of all tokens are held out for validation{why}; give more documents, or another "
                f"data.validation_source."
            )
        if by_hash and (names := sources.named_like_splits(config.source)):
            out.append(
                f"warning: data.source holds {', '.join(names[:3])}, yet documents are held out by a hash of their text, not by "
                f"their file; give held-out files as data.validation_source alone."
            )
        if not fills:
            out.append("warning: the validation text fills no batch, so that it is repeated until it does.")
        elif fills < count:
            out.append(
                f"warning: the validation text fills {fills} batches, not the {count} of train.validation_batches."
            )
        return out

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
      InputError: a source, tokenizer or cache folder that cannot be used, a split shorter than
      one window, or two splits of the same text.
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
    require(
        data.train.counts.sha256 != data.validation.counts.sha256,
        f"The training text of {config.source!r} and the validation text of {held_out!r} are the same; give another "
        f"data.validation_source.",
    )
    return data


def resolve_vocabulary(config: ExperimentConfig, data: Data) -> ExperimentConfig:
    """The configuration with the tokenizer's vocabulary size written in.

    Raises:
      InputError: model.vocab_size is set and too small.
    """
    size = data.tokenizer.vocab_size
    if config.model.vocab_size and config.model.vocab_size < size:
        raise InputError(
            f"model.vocab_size is {config.model.vocab_size}, but the tokenizer has {size} tokens; use 0 or more."
        )
    return config.with_settings(model={"vocab_size": config.model.vocab_size or size})


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
