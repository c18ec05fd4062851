"""Load the text of a `DataConfig` and make batches of it, in an order that depends only on the settings of data."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from mhc_jax.data import arrays, files, sources
from mhc_jax.data.cache import cache_folder
from mhc_jax.data.tokenizers import Tokenizer, load_tokenizer
from mhc_jax.errors import InputError, require

if TYPE_CHECKING:
    import grain

    from mhc_jax.config import DataConfig, ExperimentConfig

Batch = dict[str, np.ndarray]
"""A batch: `inputs` and `targets`, int32 [B, T] of B sequences of T tokens.  Each target is the token after its input."""

ODD_SHARE = 0.2
"""Share of all tokens.  If local files give a larger share of validation text, a run warns that it is too much.

The run warns only if this share also exceeds twice data.validation_fraction."""
ENDLESS = 1 << 48
"""Number of windows (sequences) after which a training iterator ends.

Grain's endless repeat is not used, because with it `len` overflows at a batch size of 1."""


@dataclass(frozen=True)
class Data:
    """Tokenized training and validation text, and the batches drawn from it."""

    config: DataConfig
    tokenizer: Tokenizer
    train: arrays.TokenArray
    validation: arrays.TokenArray

    @property
    def identity(self) -> dict[str, str]:
        """Hashes of the tokenized training and validation text (`Counts.sha256`), under the same keys as in `summary`."""
        return {"train_sha256": self.train.counts.sha256, "validation_sha256": self.validation.counts.sha256}

    def target_bytes(self, batches: Sequence[Batch]) -> int:
        """Return the number of UTF-8 bytes that the targets of `batches` stand for.  The end of a document stands for none."""
        return sum(int(self.tokenizer.token_bytes[batch["targets"]].sum()) for batch in batches)

    def bits_per_nat(self, count: int) -> float:
        r"""Return the factor by which a mean loss in nats per token is multiplied to get bits per byte.

        Bits per byte are $-\sum_i \ln p_i / (\ln 2 \cdot \text{bytes})$, over the targets $i$ of the first `count` validation
        batches and the bytes that these targets stand for.  The end of a document counts in the sum, since the model must predict
        it, but has no bytes.  The factor is NaN if no target has a byte.
        """
        batches = self.validation_batches(count)
        size = self.target_bytes(batches)
        return sum(batch["targets"].size for batch in batches) / math.log(2) / size if size else math.nan

    def summary(self) -> dict[str, Any]:
        """Return the entry `data` of a run's env.json as JSON values: the sources, the tokenizer and the counts of both splits."""
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
        """Return lines to print at the start of a run: sizes of both splits, skipped files of folders, and warnings about splits.

        Args:
          count: number of validation batches that the run asks for (train.validation_batches).
        """
        config, held_out = self.config, self.validation.counts
        fills = _windows(held_out.tokens, config.sequence_length) // config.batch_size
        size = "{documents:,} documents, {tokens:,} tokens, {bytes:,} bytes"
        train, validation = (size.format(**vars(counts)) for counts in (self.train.counts, held_out))
        read = f"{min(count, max(fills, 1))} x {config.batch_size} x {config.sequence_length}"
        out = [f"training text: {train}; validation text: {validation}, of which {read} tokens are read"]
        for source in filter(None, dict.fromkeys((config.source, config.validation_source))):
            if sources.local(source) and (others := files.skipped(source)):
                out.append(f"{source}: {others}")
        if self.tokenizer.normalizes:
            out.append(
                "the tokenizer puts text into Unicode's form NFC; bytes are counted, and text is generated, in this form"
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
        """Return an endless iterator over shuffled training batches that skips the first `start_step` batches.

        A row of a batch is a window of the text.  Window i holds T + 1 tokens from token i T on, with T = data.sequence_length.
        Every epoch visits each window once, in a new order.  A batch may span two epochs.  One thread reads two batches ahead, and
        `close()` ends the thread.  The state of the iterator, `{"next_index": batches drawn}`, can be set in constant time.

        Args:
          start_step: number of batches to skip.
          rows: indices of the rows of each batch to read, in this order.  None: all rows.  The order of windows and the state do
            not depend on `rows`.  Processes that read different rows therefore make one batch together, and a run may go on with
            more or fewer processes.
        """
        import grain  # the import takes 1 s

        length, tokens = self.config.sequence_length, self.train.tokens
        windows = _windows(len(tokens), length)
        batches = (
            # Grain handles the indices of windows alone, and `_cutter` cuts all windows of a batch at once.  A window then takes
            # 20 us instead of 45 us.
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
        """Return the first `count` batches of the validation text, in the order of the text, or as many as the text fills.

        Shapes are always [B, T].  An incomplete last batch is left out.  A text that does not fill one batch is repeated until it
        does.

        Args:
          count: largest number of batches.
          rows: indices of the rows of each batch to read, as in `train_iterator`.
        """
        length, size = self.config.sequence_length, self.config.batch_size
        windows = _windows(len(self.validation.tokens), length)
        cut = _cutter(self.validation.tokens, length, rows)
        if windows < size:
            return [cut(np.arange(size) % windows)]
        return [cut(np.arange(i * size, (i + 1) * size)) for i in range(min(count, windows // size))]


def load_data(config: DataConfig, show: arrays.Show = arrays.show_nothing) -> Data:
    """Read, split and tokenize the text of `config`, or take the result from the cache.

    Args:
      config: settings of the text and the tokenizer.
      show: shows that text is tokenized, as `Display.during` of `mhc_jax.runs.progress` does.

    Raises:
      InputError: a source, the tokenizer or the cache folder cannot be used, a split is shorter than one sequence, or both splits
        hold the same text.
    """
    tokenizer = load_tokenizer(config.tokenizer)
    cache = cache_folder()
    fraction = config.validation_fraction
    if config.validation_source:
        sources.check_disjoint(config.source, config.validation_source)
        fraction = 0.0
    held_out = config.validation_source or config.source
    data = Data(
        config,
        tokenizer,
        arrays.token_array(config.source, "train", tokenizer, cache=cache, fraction=fraction, show=show),
        arrays.token_array(held_out, "validation", tokenizer, cache=cache, fraction=fraction, show=show),
    )
    for split, source, array in (
        ("training", config.source, data.train),
        ("validation", held_out, data.validation),
    ):
        require(
            _windows(array.counts.tokens, config.sequence_length) >= 1,
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


def resolve_tokenizer(config: ExperimentConfig, data: Data) -> ExperimentConfig:
    """Return `config` with the settings that it leaves to the tokenizer.

    They are a model.vocab_size of 0, and the id of the end-of-document token in a model.attention_scope of `document`.

    Raises:
      InputError: model.vocab_size is smaller than the vocabulary of the tokenizer, or model.attention_scope names another token.
    """
    size, end = data.tokenizer.vocab_size, data.tokenizer.end_of_document
    if config.model.vocab_size and config.model.vocab_size < size:
        raise InputError(
            f"model.vocab_size is {config.model.vocab_size}, but the tokenizer has {size} tokens; use 0 or more."
        )
    scope = config.model.attention_scope
    require(
        scope in ("window", "document", f"document:{end}"),
        f"model.attention_scope is {scope!r}, but the end-of-document token of the tokenizer is {end}; use 'document'.",
    )
    scope = scope if scope == "window" else f"document:{end}"
    return config.with_settings(model={"vocab_size": config.model.vocab_size or size, "attention_scope": scope})


def _windows(tokens: int, length: int) -> int:
    """Return the number of windows in a text of `tokens` tokens.

    A window is `length` inputs and their targets, `length` + 1 tokens.  It shares its last token with the next window.
    """
    return (tokens - 1) // length


def _cutter(tokens: np.ndarray, length: int, rows: np.ndarray | None) -> Callable[[np.ndarray], Batch]:
    """Return a function that makes a batch of windows of the text `tokens` from the indices [B] of the windows.

    If `rows` is not None, the batch holds only these of its rows.
    """

    def cut(windows: np.ndarray) -> Batch:
        windows = windows if rows is None else windows[rows]
        inputs = np.empty((len(windows), length), np.int32)
        targets = np.empty_like(inputs)
        for row, start in enumerate((windows * length).tolist()):
            inputs[row] = tokens[start : start + length]
            targets[row] = tokens[start + 1 : start + length + 1]
        return {"inputs": inputs, "targets": targets}

    return cut
