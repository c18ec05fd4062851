"""Train a tokenizer with byte-pair encoding (BPE) on the texts of a user."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from mhc_jax.data.tokenizer_checks import MOST_TOKENS
from mhc_jax.data.tokenizers import END, BPETokenizer
from mhc_jax.errors import InputError, require, user_path
from mhc_jax.files.aside import aside


def train_bpe(texts: Iterable[str], vocab_size: int, output: str | Path) -> BPETokenizer:
    """Train byte-level BPE, save it as a JSON file of the `tokenizers` library, and return it.

    The vocabulary begins with `<|endoftext|>` (id 0) and the 256 bytes.  Text is split into words as in GPT-2.  The content of the
    file depends only on the texts and on `vocab_size`.  The file is written under another name and renamed.

    Args:
      texts: texts to train on.
      vocab_size: number of entries of the vocabulary, 257 or more.
      output: the file to write.

    Raises:
      InputError: fewer than 257 entries or more than `MOST_TOKENS`, a text too small for `vocab_size`, or a file that cannot be
        written.
    """
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers, trainers

    require(
        257 <= vocab_size <= MOST_TOKENS,
        f"vocab_size is {vocab_size}; it must be at least 257, the 256 bytes and {END!r}, and at most {MOST_TOKENS}.",
    )
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer=trainer)
    size = backend.get_vocab_size()
    require(
        size == vocab_size,
        f"vocab_size is {vocab_size}, but the text gives only {size} entries; ask for at most that or give more text.",
    )
    content, output = backend.to_str(pretty=True).encode(), user_path(output)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with aside(output.parent, output.name) as folder:
            temporary = folder / "tokenizer.json"
            temporary.write_bytes(content)
            os.replace(temporary, output)
    except OSError as error:
        raise InputError(f"{output} cannot be written: {error.strerror}.") from error
    return BPETokenizer(content, str(output))
