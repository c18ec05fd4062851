"""Read documents from a function of the user, which a source such as `my_data.py:documents` names by its file and its name.

The function gets a split, `train` or `validation`, and returns an iterable.  An item is a text, or a mapping with the text under
`text`, which may also hold a name under `id`.  Other entries of the mapping are not read.  The function may return None for
`validation`.  Every process runs the file anew, so that the source needs no registration.
"""

from __future__ import annotations

import hashlib
import inspect
import re
import runpy
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from mhc_jax.data.files import Document, document_of
from mhc_jax.errors import InputError, one_of, require

_SOURCE = re.compile(r"(.+\.py):(\w+)")


def is_function(source: str) -> bool:
    """Return whether a source names a Python file and a function of it."""
    return _SOURCE.fullmatch(source) is not None


def identity(source: str) -> list[str]:
    """Return the path of the file, the name of the function, and the SHA-256 of the file in hex."""
    file, name = _parts(source)
    return [str(file.resolve()), name, hashlib.sha256(file.read_bytes()).hexdigest()]


def load(source: str) -> Callable[[str], Iterator[Document] | None]:
    """Run the Python file of a source, and return a function from a split to its documents, or to None if it has none.

    Documents without a visible character are left out.

    Raises:
      InputError: the file or the function does not exist or fails, or the function does not take the split.  The function that is
        returned, and its documents, raise it if the user's function fails or gives anything but documents.
    """
    file, name = _parts(source)
    try:
        names = runpy.run_path(str(file))
    except Exception as error:
        raise _failure(source, file, error) from error
    function: Any = names.get(name)
    if not callable(function):
        one_of(f"The function in {source!r}", name, [key for key, value in names.items() if inspect.isfunction(value)])
    try:
        inspect.signature(function).bind("train")
    except TypeError:
        raise InputError(
            f"{source!r} does not take one argument; write `def {name}(split):`, which is called with 'train' and 'validation'."
        ) from None

    def documents(split: str) -> Iterator[Document] | None:
        try:
            rows = function(split)
            if rows is None and split == "validation":
                return None
        except InputError:
            raise
        except Exception as error:
            raise _failure(source, file, error) from error
        require(
            not isinstance(rows, (str, bytes, Mapping)) and _iterable(rows),
            f"{source!r} returns {_kind(rows)} for the split {split!r}; it must return an iterable of texts, or of records such as "
            "{'text': '...'}.",
        )
        return _documents(source, file, split, rows)

    return documents


def _parts(source: str) -> tuple[Path, str]:
    """Return the file and the name of the function of a source."""
    match = _SOURCE.fullmatch(source)
    file = Path(match[1] if match else source).expanduser()
    require(
        match is not None and file.is_file(),
        f"There is no file {str(file)!r}, which the source {source!r} names; give 'FILE.py:FUNCTION'.",
    )
    return file, match[2] if match else ""


def _documents(source: str, file: Path, split: str, rows: Any) -> Iterator[Document]:
    """Yield the documents of what the user's function has returned for a split."""
    empty = True
    try:
        for number, row in enumerate(rows, 1):
            place = f"document {number} of the split {split!r}"
            require(
                isinstance(row, (str, Mapping)),
                f"{source}, {place}: {_kind(row)}; each item must be a text, or a record such as {{'text': '...'}}.",
            )
            document = document_of(source, place, {"text": row} if isinstance(row, str) else row, f"{split}:{number}")
            if document.text.strip():
                empty = False
                yield document
    except InputError:
        raise
    except Exception as error:
        raise _failure(source, file, error) from error
    require(
        not empty,
        f"{source!r} gives no text for the split {split!r}; give some, or for 'validation' return None, from a function without "
        f"`yield`, so that documents of 'train' are held out.",
    )


def _iterable(value: Any) -> bool:
    try:
        iter(value)
    except TypeError:
        return False
    return True


def _kind(value: Any) -> str:
    return "nothing (None)" if value is None else f"a {type(value).__name__}"


def _failure(source: str, file: Path, error: Exception) -> InputError:
    """Return the error for an exception that the user's file has raised, with the last line of the file that took part in it."""
    within = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(file)]
    place = f" at line {within[-1]}" if within else ""
    return InputError(f"{source!r} fails{place}: {type(error).__name__}: {' '.join(str(error).split())}")
