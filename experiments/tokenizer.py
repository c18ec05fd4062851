"""Train a byte-level BPE tokenizer on a text source and save it to a JSON file, for `data.tokenizer=bpe:<file>`.

    python experiments/tokenizer.py --source='texts/*.jsonl.zst' --vocab_size=4096 --output=bpe4k.json

The source is one that data.source takes.  The command prints the bytes per token on the held-out text.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator

from mhc_jax import data
from mhc_jax.data.sources import Split
from mhc_jax.errors import InputError, require


def limited(documents: Iterable[data.Document], megabytes: float) -> Iterator[str]:
    """Yield the texts of documents until they reach `megabytes` x 10^6 UTF-8 bytes in sum.  The last text is not cut."""
    size = 0
    for document in documents:
        yield document.text
        size += len(document.text.encode())
        if size >= megabytes * 1e6:
            return


def main(arguments: list[str] | None = None) -> None:
    """Train the tokenizer on the training split, save it, and print its bytes per token on the validation split."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", default="shakespeare", help="as data.source")
    parser.add_argument("--vocab_size", type=int, default=4096, help="number of tokens")
    parser.add_argument("--output", required=True, help="JSON file to write")
    parser.add_argument("--megabytes", type=float, default=50, help="10^6 bytes of text to train on, at most")
    parser.add_argument("--validation_fraction", type=float, default=0.05, help="as data.validation_fraction")
    flags = parser.parse_args(arguments)
    require(flags.megabytes > 0, f"--megabytes is {flags.megabytes}; it must be above 0.")
    require(
        0 < flags.validation_fraction < 1,
        f"--validation_fraction is {flags.validation_fraction}; it must lie between 0 and 1.",
    )
    cache = data.cache_folder()

    def texts(split: Split) -> Iterator[str]:
        documents = data.documents(flags.source, split, cache=cache, fraction=flags.validation_fraction)
        return limited(documents, flags.megabytes)

    tokenizer = data.train_bpe(texts("train"), flags.vocab_size, flags.output)
    size = tokens = 0
    for text in texts("validation"):
        size += len(text.encode())
        tokens += len(tokenizer.encode(text))
    print(
        f"{flags.output}: {tokenizer.vocab_size} entries, {size / tokens:.3f} bytes per token "
        f"on {size} bytes of validation text"
    )


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
