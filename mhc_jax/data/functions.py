"""Read documents from a function of the user, which a source such as `my_data.py:documents` names by its file and its name.

The function gets a split, `train` or `validation`, and returns an iterable.  An item is a text, or a mapping with the text under
`text`, which may also hold a name under `id`.  Other entries of the mapping are not read.  The function may return None for
`validation`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from mhc_jax import user_functions
from mhc_jax.data.files import Document, document_of
from mhc_jax.errors import InputError, require


def load(source: str) -> Callable[[str], Iterator[Document] | None]:
    """Run the Python file of a source, and return a function from a split to its documents, or to None if it has none.

    Documents without a visible character are left out.

    Raises:
      InputError: the file or the function does not exist or fails, or the function does not take the split.  The function that is
        returned, and its documents, raise it if the user's function fails or gives anything but documents.
    """
    function = user_functions.load("the source", source, "split", "'train' and 'validation'")
    file, _ = user_functions.parts("the source", source)

    def documents(split: str) -> Iterator[Document] | None:
        rows = function(split)
        if rows is None and split == "validation":
            return None
        require(
            not isinstance(rows, (str, bytes, Mapping)) and _iterable(rows),
            f"{source!r} returns {_kind(rows)} for the split {split!r}; it must return an iterable of texts, or of records such as "
            "{'text': '...'}.",
        )
        return _documents(source, file, split, rows)

    return documents


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
        raise user_functions.failure(source, file, error) from error
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
