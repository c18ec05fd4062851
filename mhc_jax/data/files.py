r"""Read documents from local files: .txt, .jsonl, .jsonl.gz, .jsonl.zst and .parquet.

JSON lines are split at `\n` alone, since other Unicode line separators may occur inside a text.  Compressed files are read by
pyarrow, which refuses a file that ends in the middle of a compressed frame.  The package `zstandard` would accept it.
"""

from __future__ import annotations

import codecs
import glob
import io
import itertools
import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from mhc_jax.errors import InputError, require, user_path

SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
ALLOWED = "a file, folder or glob of .txt / .jsonl[.gz|.zst] / .parquet files"
BLOCK = 8192
"""Smallest number of characters of a block of text (`text_blocks`), except the last block of a file."""
LONGEST_BLOCK = 16 * BLOCK
"""Largest number of characters of a block of text."""
LARGEST_RECORD = 1 << 26
"""Largest number of bytes of a line of a .jsonl file, after decompression, and of characters of the text of a parquet row."""

ROWS = 16
"""Number of rows of a parquet file that are read at once."""
MOST_EXPANSION = 1000
"""Largest ratio of the bytes of a parquet column to those on disk, if they are more than `LARGEST_RECORD`."""
_COLUMN_SIZES = """
import json, sys
import pyarrow as pa
from pyarrow import parquet
try:
    with open(sys.argv[1], "rb") as file:
        of = parquet.ParquetFile(file).metadata
    paths = [of.schema.column(k).path for k in range(of.num_columns)]
    nested = set(sys.argv[2:]) - set(paths)
    read = [k for k, path in enumerate(paths) if path in sys.argv[2:] or path.partition(".")[0] in nested]
    columns = [of.row_group(group).column(k) for group in range(of.num_row_groups) for k in read]
    print(json.dumps([[c.path_in_schema, c.total_uncompressed_size, c.total_compressed_size] for c in columns]))
except (pa.ArrowException, UnicodeDecodeError) as error:
    print(json.dumps(" ".join(str(error).split())))
"""
"""Program of `_column_sizes`."""

_BLANK_LINE, _LINE_END = re.compile(r"\n[ \t\r]*\n"), re.compile(r"\n")
_BLANK_LINE_CR, _LINE_END_CR = re.compile(r"\r[ \t]*\r"), re.compile(r"\r")
_LAST_SPACE = re.compile(r".*\s", re.DOTALL)
_READ = 1 << 22


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
    path = user_path(source)
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
    path = user_path(source)
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
            reason = " ".join(str(error.strerror or error).split()).rstrip(".")
            raise InputError(f"{file} cannot be read: {reason}.") from error
        require(not empty, f"{file} is empty: it holds no text; remove it or give another file.")


def text_blocks(pieces: Iterable[str]) -> Iterator[str]:
    """Yield consecutive blocks of a text, which give the text again if they are joined.

    A block ends at the first blank line between `BLOCK` and 2 `BLOCK` characters after its start.  If there is none, it ends at the
    first line end after 2 `BLOCK` characters.  If there is none up to `LONGEST_BLOCK` characters, it ends after the last space of
    the second half of them, or after all of them.

    A line ends with LF, with CR and LF, or with CR alone in a text without LF in its first `LONGEST_BLOCK` characters.

    Args:
      pieces: the text, cut anywhere.  Little more than a piece is in memory at a time.
    """
    rest, patterns = "", None
    for piece in itertools.chain(pieces, [None]):
        rest, start = rest + (piece or ""), 0
        while len(rest) - start > (0 if piece is None else LONGEST_BLOCK):
            if patterns is None:
                lf = "\n" in rest[:LONGEST_BLOCK]
                patterns = (_BLANK_LINE, _LINE_END) if lf else (_BLANK_LINE_CR, _LINE_END_CR)
            end = _block_end(rest, start, *patterns)
            yield rest[start:end]
            start = end
        rest = rest[start:]


def _block_end(text: str, start: int, blank_line: re.Pattern[str], line_end: re.Pattern[str]) -> int:
    """Return where the block that begins at `start` ends."""
    blank = blank_line.search(text, start + BLOCK, start + 2 * BLOCK)
    last = start + LONGEST_BLOCK
    if cut := blank or line_end.search(text, start + 2 * BLOCK, last):
        return cut.end()
    if len(text) <= last:
        return len(text)
    space = _LAST_SPACE.match(text, start + LONGEST_BLOCK // 2, last)
    return space.end() if space else last


def _read(file: Path, alone: bool) -> Iterator[Document]:
    if file.suffix == ".parquet":
        return _read_parquet(file)
    return _read_text(file, alone) if file.suffix == ".txt" else _read_jsonl(file)


def _read_text(file: Path, alone: bool) -> Iterator[Document]:
    name = file.as_posix()
    with file.open("rb") as stream:
        if not alone:
            yield Document(name, "".join(_decoded(file, stream)))
            return
        for index, block in enumerate(text_blocks(_decoded(file, stream))):
            yield Document(f"{name}:{index}", block)


def _decoded(file: Path, stream: BinaryIO) -> Iterator[str]:
    """Yield the text of an open file in pieces, without the byte order mark that may begin it."""
    decoder, before, lines = codecs.getincrementaldecoder("utf-8-sig")(), 0, 1
    while True:
        data = stream.read(_READ)
        held = decoder.getstate()[0]  # the first bytes of a character that the piece before has cut
        try:
            yield decoder.decode(data, final=not data)
        except UnicodeDecodeError as error:
            # Python counts bytes from the start of what it decodes, which are the held bytes and `data`.
            skipped = len(error.object) - len(held) - len(data)
            place = error.start - skipped
            line = lines + (held + data).count(b"\n", 0, place)
            raise _not_utf8(file, line, before - len(held) + place) from error
        if not data:
            return
        before, lines = before + len(data), lines + data.count(b"\n")


def _read_jsonl(file: Path) -> Iterator[Document]:
    import pyarrow as pa  # the import takes 0.1 s

    compression = {".gz": "gzip", ".zst": "zstd"}.get(file.suffix)
    offset, number = 0, 0
    with (
        file.open("rb") as opened,  # pyarrow itself opens no file whose name is not UTF-8
        pa.input_stream(opened, compression=compression) as raw,
        io.BufferedReader(raw, 1 << 20) as stream,
    ):
        while line := stream.readline(LARGEST_RECORD + 1):
            number += 1
            require(len(line) <= LARGEST_RECORD, _too_large(file, f"line {number}"))
            yield from _parse_line(file, number, offset, line)
            offset += len(line)


def _parse_line(file: Path, number: int, offset: int, line: bytes) -> Iterator[Document]:
    """Yield the document of a line, or several if a file has CR as its line ends, so that all of it is one line."""
    parts = [line]
    if b"\r" in line.rstrip():
        try:
            _parse(file, number, offset, line)
        except InputError:
            parts = line.split(b"\r")
    for k, part in enumerate(parts):
        if document := _parse(file, number + k, offset, part):
            yield document
        offset += len(part) + 1


def _parse(file: Path, number: int, offset: int, line: bytes) -> Document | None:
    try:
        decoded = line.decode("utf-8").removeprefix("\ufeff").strip()
    except UnicodeDecodeError as error:
        raise _not_utf8(file, number, offset + error.start) from error
    if not decoded:
        return None
    try:
        record = json.loads(decoded)
    except (ValueError, RecursionError) as error:
        reason = "it nests too deeply" if isinstance(error, RecursionError) else "a number in it has too many digits"
        if isinstance(error, json.JSONDecodeError):
            reason = f"{error.msg} at column {error.colno}"
        raise InputError(
            f'{file}, line {number}: not valid JSON ({reason}); each line must be an object such as {{"text": "..."}}.'
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
        with file.open("rb") as opened, parquet.ParquetFile(opened) as table:
            names = table.schema_arrow.names
            require(
                "text" in names,
                f"{file} has no column 'text' (its columns: {', '.join(map(repr, names))}); "
                f"rename the column that holds the text.",
            )
            columns = [name for name in ("id", "text") if name in names]
            for name in columns:
                require(names.count(name) == 1, f"{file} has more than one column {name!r}; rename all but one.")
            # Columns of small groups need no look.
            if any(table.metadata.row_group(g).total_byte_size > LARGEST_RECORD for g in range(table.num_row_groups)):
                _check_expansion(file, columns)
            number = 0
            # A dictionary stores a text once for many rows, so that few rows are in memory at a time.
            for batch in table.iter_batches(batch_size=ROWS, columns=columns):
                rows = [batch.column(name) for name in columns]
                for values in zip(*rows, strict=True):
                    number += 1
                    record = {name: value.as_py() for name, value in zip(columns, values, strict=True)}
                    document = document_of(str(file), f"row {number}", record, number)
                    require(len(document.text) <= LARGEST_RECORD, _too_large(file, f"row {number}"))
                    yield document
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise InputError(f"{file} is not a readable parquet file: {' '.join(str(error).split())}") from error


def _check_expansion(file: Path, columns: Sequence[str]) -> None:
    """Raise `InputError` if a column of a row group is so much smaller on disk that a small file would fill the memory."""
    for name, size, stored in _column_sizes(file, columns):
        require(
            size <= LARGEST_RECORD or size <= MOST_EXPANSION * stored,
            f"{file}: the column {name!r} has {stored:,} bytes that expand to {size:,}; at most {MOST_EXPANSION} times as many are "
            f"read: write the file again with shorter texts.",
        )


def _column_sizes(file: Path, columns: Sequence[str]) -> list[tuple[str, int, int]]:
    """Return name, bytes and bytes on disk of these columns in every row group of a parquet file.

    A process of its own reads them: where the statistics of a column are damaged, pyarrow 26 ends the process that looks at the
    metadata of that column.
    """
    # -P: modules of the working folder are not imported.
    command = [sys.executable, "-P", "-c", _COLUMN_SIZES, file, *columns]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode < 0 and done.returncode != -signal.SIGKILL:  # which the system sends when memory is short
        what = re.search(r"what\(\): +(.*)", done.stderr)
        found = what[1] if what else "the metadata of a column are damaged."
    elif done.returncode:
        raise RuntimeError(f"The columns of {file} could not be read (status {done.returncode}): {done.stderr}")
    else:
        found = json.loads(done.stdout)
    if isinstance(found, str):
        raise InputError(f"{file} is not a readable parquet file: {found}")
    return [(name, size, stored) for name, size, stored in found]


def _too_large(file: Path, place: str) -> str:
    return (
        f"{file}, {place}: it has more than {LARGEST_RECORD:,} bytes, the most that a document may have; cut it into "
        f"several documents."
    )


def _not_utf8(file: Path, line: int, offset: int) -> InputError:
    return InputError(
        f"{file}, line {line}: byte {offset} is not UTF-8; convert the file to UTF-8 first (for example with iconv)."
    )
