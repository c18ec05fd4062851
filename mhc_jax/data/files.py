r"""Read documents from local files: .txt, .jsonl, .jsonl.gz, .jsonl.zst and .parquet.

JSON lines are split at `\n` alone, since other Unicode line separators may occur inside a text.  Compressed files are read by
pyarrow, which refuses a file that ends in the middle of a compressed frame.  The package `zstandard` would accept it.
"""

from __future__ import annotations

import glob
import io
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mhc_jax.errors import InputError, require

SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
ALLOWED = "a file, folder or glob of .txt / .jsonl[.gz|.zst] / .parquet files"
BLOCK = 8192
"""Smallest number of characters of a block of text (`text_blocks`), except the last block of a file."""

_BLANK_LINE = re.compile(r"\n[ \t\r]*\n")
_LINE_END = re.compile(r"\n")


@dataclass(frozen=True, slots=True)
class Document:
    """A text and its name.  The whole document belongs either to the training split or to the validation split."""

    id: str
    text: str


def expand(source: str) -> list[Path]:
    """Return the files that a path or glob names, sorted.  `**` stands for folders at any depth, `~` for the home folder.

    A folder names all text files below it, at any depth, except hidden files and the files of hidden folders.

    Raises:
      InputError: the path does not exist, the folder holds no text file, the glob matches nothing, or a suffix is not in
        `SUFFIXES`.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        files = [file for file in _below(path) if file.name.endswith(SUFFIXES)]
        require(
            bool(files),
            f"The folder {source!r} holds no text file ({skipped(source) or 'it is empty'}); give {ALLOWED}.",
        )
        return files
    if path.exists():
        files = [path]
    elif glob.has_magic(source):
        files = [Path(file) for file in sorted(glob.glob(str(path), recursive=True))]
        files = [file for file in files if file.is_file()]
        require(bool(files), f"The glob {source!r} matches no file; give {ALLOWED}.")
    else:
        raise InputError(
            f"There is no file {source!r}; give 'shakespeare', 'tfds:<name>', 'FILE.py:FUNCTION', or {ALLOWED}."
        )
    for file in files:
        own = f", or name a function of it, as in '{file}:documents'" if file.suffix == ".py" else ""
        require(
            file.name.endswith(SUFFIXES),
            f"{file} is not a kind of text file that is read here; give {ALLOWED}{own}.",
        )
    return files


def skipped(source: str) -> str:
    """Return how many files of a folder are not read because of their kind, and their suffixes; empty if there are none.

    >>> skipped("a file or a glob")
    ''
    """
    path = Path(source).expanduser()
    others = [file for file in _below(path) if not file.name.endswith(SUFFIXES)] if path.is_dir() else []
    if not others:
        return ""
    suffixes = sorted({file.suffix or "no suffix" for file in others})
    count = "1 file of another kind is" if len(others) == 1 else f"{len(others)} files of other kinds are"
    return f"{count} skipped: {', '.join(suffixes)}"


def _below(folder: Path) -> list[Path]:
    """Return the files at any depth below a folder, sorted by path, without hidden files and those of hidden folders."""
    everything = sorted(glob.glob(f"{glob.escape(str(folder))}/**", recursive=True))
    return [Path(file) for file in everything if Path(file).is_file()]


def read_files(files: Sequence[Path]) -> Iterator[Document]:
    """Yield the documents of `files` in order, except documents without a visible character.

    If there are several .txt files, each is a document.  A single .txt file is cut into blocks of text (`text_blocks`), which are
    the documents, so that some can be held out for validation.  JSON lines and parquet rows hold the text under `text` and may hold
    a name under `id`.

    Raises:
      InputError: a file is empty, damaged or unreadable.  The message says where the first fault is.
    """
    for file in files:
        empty = True
        try:
            for document in _read(file, alone=len(files) == 1):
                if document.text.strip():
                    empty = False
                    yield document
        except OSError as error:
            raise InputError(f"{file} cannot be read: {error.strerror or error}.") from error
        require(not empty, f"{file} is empty: it holds no text; remove it or give another file.")


def text_blocks(text: str) -> Iterator[str]:
    """Yield consecutive blocks of `text`, which give `text` again if they are joined.

    A block ends at the first blank line between `BLOCK` and 2 `BLOCK` characters after its start.  If there is none, it ends at the
    first line end after 2 `BLOCK` characters.
    """
    start = 0
    while start < len(text):
        end = len(text)
        blank = _BLANK_LINE.search(text, start + BLOCK, start + 2 * BLOCK)
        if cut := blank or _LINE_END.search(text, start + 2 * BLOCK):
            end = cut.end()
        yield text[start:end]
        start = end


def _read(file: Path, alone: bool) -> Iterator[Document]:
    if file.suffix == ".parquet":
        return _read_parquet(file)
    return _read_text(file, alone) if file.suffix == ".txt" else _read_jsonl(file)


def _read_text(file: Path, alone: bool) -> Iterator[Document]:
    data = file.read_bytes()
    try:
        text = data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise _not_utf8(file, line, error.start) from error
    if not alone:
        yield Document(file.as_posix(), text)
        return
    for index, block in enumerate(text_blocks(text)):
        yield Document(f"{file.as_posix()}:{index}", block)


def _read_jsonl(file: Path) -> Iterator[Document]:
    import pyarrow as pa  # the import takes 0.1 s

    compression = {".gz": "gzip", ".zst": "zstd"}.get(file.suffix)
    offset = 0
    with (
        pa.input_stream(str(file), compression=compression) as raw,
        io.BufferedReader(raw, 1 << 20) as stream,
    ):
        for number, line in enumerate(stream, 1):
            document = _parse(file, number, offset, line)
            offset += len(line)
            if document is not None:
                yield document


def _parse(file: Path, number: int, offset: int, line: bytes) -> Document | None:
    try:
        decoded = line.decode("utf-8").removeprefix("\ufeff").strip()
    except UnicodeDecodeError as error:
        raise _not_utf8(file, number, offset + error.start) from error
    if not decoded:
        return None
    try:
        record = json.loads(decoded)
    except json.JSONDecodeError as error:
        raise InputError(
            f"{file}, line {number}: not valid JSON ({error.msg} at column {error.colno}); "
            f'each line must be an object such as {{"text": "..."}}.'
        ) from error
    if not isinstance(record, dict):
        raise InputError(
            f"{file}, line {number}: a JSON {type(record).__name__}; "
            f'each line must be an object such as {{"text": "..."}}.'
        )
    return document_of(str(file), f"line {number}", record, number)


def document_of(source: str, place: str, record: Mapping[str, Any], number: object) -> Document:
    """Return the document of a record, which holds its text under `text` and may hold its name under `id`.

    Args:
      source, place: the file and the place in it, for error messages.
      record: the record.  Other entries are not read.
      number: the document is called `source:number` if the record holds no name.

    Raises:
      InputError: there is no string under `text`, or it is not valid Unicode.
    """
    text = record.get("text")
    if not isinstance(text, str):
        held = f"'text' is a {type(text).__name__}" if "text" in record else "there is no 'text'"
        raise InputError(f"{source}, {place}: {held}; every record needs a string under 'text'.")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(
            f"{source}, {place}: character {error.start} of 'text' is half of a surrogate pair, "
            f"which is not valid Unicode; repair or remove it."
        ) from error
    name = record.get("id")
    return Document(name if isinstance(name, str) else f"{source}:{number}", text)


def _read_parquet(file: Path) -> Iterator[Document]:
    import pyarrow as pa
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(file) as table:
            names = table.schema_arrow.names
            require(
                "text" in names,
                f"{file} has no column 'text' (its columns: {', '.join(map(repr, names))}); "
                f"rename the column that holds the text.",
            )
            columns = [name for name in ("id", "text") if name in names]
            number = 0
            for batch in table.iter_batches(batch_size=1024, columns=columns):
                for record in batch.to_pylist():
                    number += 1
                    yield document_of(str(file), f"row {number}", record, number)
    except pa.ArrowException as error:
        raise InputError(f"{file} is not a readable parquet file: {error}") from error


def _not_utf8(file: Path, line: int, offset: int) -> InputError:
    return InputError(
        f"{file}, line {line}: byte {offset} is not UTF-8; convert the file to UTF-8 first (for example with iconv)."
    )
