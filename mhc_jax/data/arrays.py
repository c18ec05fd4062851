"""Tokenized text: a memory-mapped array of token ids for each source, split and tokenizer, kept in the cache folder.

Every document is followed by the end-of-document token.  The ids are in `<key>.npy`, and counts and checksums in `<key>.json`.  The
key is a hash of everything on which the ids depend, so that outdated files are never read.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from mhc_jax.data import sources
from mhc_jax.data.files import Document
from mhc_jax.data.tokenizers import Tokenizer, id_dtype
from mhc_jax.errors import InputError
from mhc_jax.files.aside import aside

FORMAT = 2
"""Version of the stored arrays, which is part of their key in the cache.

It must be raised if a change of the code gives the same text other ids or another layout."""
CHUNK = 1 << 22
"""Number of characters that the tokenizer gets at once, and number of bytes of a file that are read at once for its CRC-32."""

Show = Callable[[str], AbstractContextManager[Callable[[str], None]]]
"""A function that shows that some work goes on.  The context manager yields a function that gets a text about what is done."""


def show_nothing(work: str) -> AbstractContextManager[Callable[[str], None]]:
    """Show nothing of `work`."""
    return nullcontext(lambda text: None)


@dataclass(frozen=True)
class Counts:
    """Sizes and hash of the tokenized text of one split."""

    documents: int
    tokens: int
    """Number of tokens, including one end-of-document token for each document."""
    bytes: int
    """Number of bytes of the text in UTF-8, as the tokenizer reads it (`Tokenizer.count_bytes`)."""
    sha256: str
    """SHA-256, in hex, of the stored ids.  It is the same for the same text and tokenizer, whatever the paths of the files."""


@dataclass(frozen=True)
class TokenArray:
    """The token ids of one split of a text, and its counts."""

    tokens: np.ndarray
    """Ids [counts.tokens], uint16 or uint32, memory mapped and read-only."""
    counts: Counts


def token_array(
    source: str,
    split: sources.Split,
    tokenizer: Tokenizer,
    *,
    cache: Path,
    fraction: float = 0.05,
    show: Show = show_nothing,
) -> TokenArray:
    """Return the token ids of one split.  If the cache does not hold them undamaged, the text is tokenized.

    A file in the cache is checked against its CRC-32.  Several processes may call this function at once: each writes the same bytes
    under a name of its own, and then renames the file.

    Args:
      source, split, fraction: as in `sources.documents`.
      tokenizer: tokenizer from `tokenizers.load_tokenizer`.
      cache: cache folder from `cache.cache_folder`.
      show: shows that the text is tokenized, if it is, and how much of it.

    Raises:
      InputError: the source cannot be read or the cache cannot be written.
    """
    parts = [FORMAT, sources.identity(source), split, fraction, tokenizer.fingerprint]
    key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]
    folder = cache / "tokens"
    if (ready := _load(folder / key)) is not None:
        return ready
    documents = sources.documents(source, split, cache=cache, fraction=fraction)
    try:
        folder.mkdir(exist_ok=True)
        work = f"tokenizing the {'training' if split == 'train' else split} text of {source!r}"
        if not tokenizer.cuts:
            work += ", each document at once, with about 150 bytes of memory for each of its bytes"
        with show(work) as update:
            _store(folder / key, documents, tokenizer, update)
    except OSError as error:
        file = error.filename2 or error.filename or folder
        raise InputError(f"Tokenized text cannot be written to {file}: {error.strerror or error}.") from error
    if (written := _load(folder / key)) is None:
        raise InputError(f"{folder / key}.npy was damaged while it was written; check the disk.")
    return written


def _load(stem: Path) -> TokenArray | None:
    """Return the array and the counts in the files `stem`.npy and `stem`.json, or None if one cannot be read or is damaged."""
    path = stem.with_suffix(".npy")
    try:
        meta = json.loads(stem.with_suffix(".json").read_text("utf-8"))
        counts = Counts(meta["documents"], meta["tokens"], meta["bytes"], meta["sha256"])
        if _crc32(path) != meta["crc32"]:
            return None
        return TokenArray(np.load(path, mmap_mode="r"), counts)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _store(stem: Path, documents: Iterable[Document], tokenizer: Tokenizer, update: Callable[[str], None]) -> None:
    """Write `stem`.npy with the ids of the documents and `stem`.json with the counts, each under another name, and rename them."""
    with aside(stem.parent, stem.name) as folder:
        array, meta = folder / "array", folder / "meta"
        with array.open("wb") as file:
            counts = _write(file, documents, tokenizer, update)
        record = {**asdict(counts), "crc32": _crc32(array)}
        meta.write_text(json.dumps(record) + "\n", encoding="utf-8")
        os.replace(array, stem.with_suffix(".npy"))
        os.replace(meta, stem.with_suffix(".json"))


def _write(
    file: BinaryIO, documents: Iterable[Document], tokenizer: Tokenizer, update: Callable[[str], None]
) -> Counts:
    """Write the ids of all documents as a .npy file, and return the counts.  `update` gets the counts so far as text."""
    dtype = id_dtype(tokenizer)
    end = np.array([tokenizer.end_of_document], dtype)
    number, tokens, size, digest = 0, 0, 0, hashlib.sha256()
    _write_header(file, dtype, tokens)
    for texts in _chunks(documents):
        for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
            stored = ids.tobytes() + end.tobytes()
            digest.update(stored)
            file.write(stored)
            number, tokens, size = number + 1, tokens + len(ids) + 1, size + tokenizer.count_bytes(text)
        update(f"{number:,} documents, {size / 1e6:,.0f} MB")
    file.seek(0)
    _write_header(file, dtype, tokens)
    return Counts(number, tokens, size, digest.hexdigest())


def _write_header(file: BinaryIO, dtype: np.dtype, tokens: int) -> None:
    """Write the .npy header of an array [tokens].

    NumPy pads it for 21 digits, so that the header can be overwritten with the true number of tokens after all ids are written.
    """
    header = {"descr": dtype.str, "fortran_order": False, "shape": (tokens,)}
    np.lib.format.write_array_header_1_0(file, header)


def _chunks(documents: Iterable[Document]) -> Iterator[list[str]]:
    """Yield the texts of the documents in lists of at least `CHUNK` characters, except the last list."""
    texts: list[str] = []
    size = 0
    for document in documents:
        texts.append(document.text)
        size += len(document.text)
        if size >= CHUNK:
            yield texts
            texts, size = [], 0
    if texts:
        yield texts


def _crc32(path: Path) -> int:
    checksum = 0
    with path.open("rb") as file:
        while block := file.read(CHUNK):
            checksum = zlib.crc32(block, checksum)
    return checksum
