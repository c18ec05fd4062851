"""Read the documents of a text source, given by its name.

    shakespeare              the plays of Shakespeare that come with this package
    tfds:<name>[/<config>]   a data set of TensorFlow Datasets that is already prepared on this machine
    <file>.py:<function>     a function of your own (`mhc_jax.data.functions`)
    <path or glob>           local .txt / .jsonl[.gz|.zst] / .parquet files, or a folder of them

tensorflow_datasets is imported only if a source needs it.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mhc_jax import user_functions
from mhc_jax.data import files, functions
from mhc_jax.data.files import Document
from mhc_jax.errors import InputError, require

if TYPE_CHECKING:
    import tensorflow_datasets as tfds

Split = Literal["train", "validation"]
SHAKESPEARE = "shakespeare"
TFDS = "tfds:"
_HELD_OUT = re.compile(r"(?<![a-z])(valid|validation|val|dev|test|held.?out)(?![a-z])", re.IGNORECASE)


def documents(source: str, split: Split, *, cache: Path, fraction: float = 0.05) -> Iterator[Document]:
    """Yield the documents of one split of `source`, always in the same order.

    `shakespeare` has splits of its own.  The validation split of a TensorFlow Datasets set is its `validation` split or, if it has
    none, its `test` split.  The splits of a function are what it returns.  From a set with neither, from a function that returns
    None for `validation`, and from local files, about `fraction` of the documents are held out for validation (`set_apart`).  With
    `fraction=0` both splits of such a source are all its documents.

    Args:
      source: name of the source: `shakespeare`, `tfds:<name>[/<config>]`, `<file>.py:<function>`, or a path or glob.
      split: `train` or `validation`.
      cache: folder for prepared data, as from `cache.cache_folder`.
      fraction: share of documents in the validation split, in [0, 1).

    Raises:
      InputError: the source does not exist, is not prepared, or cannot be read.
    """
    if source == SHAKESPEARE:
        from mhc_jax.data import shakespeare

        return shakespeare.read(split, cache)
    if source.startswith(TFDS):
        return _named_documents(source, split, fraction)
    if user_functions.is_function(source):
        read = functions.load(source)
        held_out = read("validation") if fraction or split == "validation" else None
        if held_out is not None and split == "validation":
            return held_out
        records = read("train") or iter(())
        return set_apart(records, split, fraction) if held_out is None and fraction else records
    everything = files.read_files(files.expand(source))
    return set_apart(everything, split, fraction) if fraction else everything


def identity(source: str) -> list[Any]:
    """Return JSON values that differ if the documents of `source` may have changed.  Keys of the cache contain them.

    They are path, size and modification time of each local file, path and hash of the file of a function and its name, the hash of
    the file of `shakespeare`, or the folder of a TensorFlow Datasets set and a hash of its dataset_info.json.
    """
    if source == SHAKESPEARE:
        from mhc_jax.data import shakespeare

        return [SHAKESPEARE, shakespeare.identity()]
    if source.startswith(TFDS):
        folder = Path(_named_builder(source).data_path)
        info = (folder / "dataset_info.json").read_bytes()
        return [str(folder), hashlib.sha256(info).hexdigest()]
    if user_functions.is_function(source):
        return user_functions.identity("the source", source)
    stats = [(str(file.resolve()), file.stat()) for file in files.expand(source)]
    return [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]


def local(source: str) -> bool:
    """Return whether a source consists of local files."""
    return source != SHAKESPEARE and not source.startswith(TFDS) and not user_functions.is_function(source)


def named_like_splits(source: str) -> list[str]:
    """Return the names of those files of a local source whose path suggests held-out text (`valid.txt`, `test/a.txt`).

    The result is empty if the source is a single file.
    """
    paths = [file.resolve() for file in files.expand(source)]
    common = len(os.path.commonpath([path.parent for path in paths]))
    return [path.name for path in paths if len(paths) > 1 and _HELD_OUT.search(str(path)[common:])]


def check_disjoint(source: str, validation_source: str) -> None:
    """Raise `InputError` if both sources are local and have a file in common."""
    if not (local(source) and local(validation_source)):
        return
    train = {file.resolve() for file in files.expand(source)}
    shared = sorted(file for file in files.expand(validation_source) if file.resolve() in train)
    require(
        not shared,
        f"{shared[0] if shared else ''} is in data.source and in data.validation_source; name "
        f"different files, or leave data.validation_source empty to set documents of data.source "
        f"apart.",
    )


def position(text: str) -> float:
    """Return the hash of a text as a number in [0, 1): the first 64 bits of its SHA-256, divided by 2^64."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


def set_apart(everything: Iterable[Document], split: Split, fraction: float) -> Iterator[Document]:
    """Yield the documents that belong to `split`.  A hash of its text, `position`, decides to which split a document belongs.

    `validation` gets the documents whose position is below `fraction`.  If there are none, it gets the documents with the smallest
    position.  Equal texts are in the same split, whatever their ids, their order and their file format.

    Until a position below `fraction` has been seen, the documents with the smallest position so far may belong to either split.
    They are therefore held back, and `train` gets them later than in their order.
    """
    spare: list[Document] = []
    least, certain = 1.0, False
    for document in everything:
        place = position(document.text)
        if place < fraction:
            certain = True
            if split == "validation":
                yield document
        elif not certain and place <= least:
            if place < least and split == "train":
                yield from spare
            spare = [*spare, document] if place == least else [document]
            least = place
        elif split == "train":
            yield document
    if certain == (split == "train"):
        yield from spare


def _named_documents(source: str, split: Split, fraction: float) -> Iterator[Document]:
    builder = _named_builder(source)
    key = _text_feature(source, builder)
    held_out = next((name for name in ("validation", "test") if name in builder.info.splits), None)
    require(
        "train" in builder.info.splits,
        f"{source!r} has no split 'train' (its splits: {', '.join(builder.info.splits)}); choose another set.",
    )
    records = _records(builder, held_out if held_out and split == "validation" else "train", key)
    return set_apart(records, split, fraction) if held_out is None and fraction else records


def _records(builder: tfds.core.DatasetBuilder, part: str, key: str) -> Iterator[Document]:
    """Yield the documents of split `part` of a TensorFlow Datasets set, except those whose text has no visible character."""
    data = builder.as_data_source(split=part)  # pyright: ignore[reportCallIssue]
    for index in range(len(data)):
        text = data[index][key]
        if isinstance(text, bytes):
            text = text.decode("utf-8", errors="replace")
        if text.strip():
            yield Document(f"{part}:{index}", text)


def _named_builder(source: str) -> tfds.core.DatasetBuilder:
    """Return the builder of the TensorFlow Datasets set `source`, which must be prepared in a format with random access."""
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core import constants

    name = source.removeprefix(TFDS)
    unprepared = (
        f"{source!r} is not prepared in {constants.DATA_DIR}, and nothing is downloaded "
        f"unasked; where there is a network and TensorFlow (pip install tensorflow-cpu) run `tfds "
        f"build {name} --file_format=array_record` ($TFDS_DATA_DIR moves the folder), or give "
        f"{files.ALLOWED}."
    )
    try:
        builder = tfds.builder(name)
    except (ValueError, ImportError) as error:
        raise InputError(unprepared) from error
    require((builder.data_path / "dataset_info.json").exists(), unprepared)
    readable = (tfds.core.FileFormat.ARRAY_RECORD, tfds.core.FileFormat.PARQUET)
    kind = builder.info.file_format
    require(
        kind in readable,
        f"{source!r} is prepared as {kind.value if kind else 'unknown files'}, which has no "
        f"random access; prepare it again with "
        f"`tfds build {name} --file_format=array_record --overwrite`.",
    )
    return builder


def _text_feature(source: str, builder: tfds.core.DatasetBuilder) -> str:
    """Return the name of the feature of a data set that holds the text: `text`, or else the only feature that is a text."""
    import tensorflow_datasets as tfds

    declared = builder.info.features
    features = dict(declared.items()) if isinstance(declared, tfds.features.FeaturesDict) else {}
    texts = [name for name, kind in features.items() if isinstance(kind, tfds.features.Text)]
    if "text" in texts:
        return "text"
    require(
        len(texts) == 1,
        f"{source!r} has {len(texts)} text features among {', '.join(map(repr, features))}; one "
        f"is needed, or one called 'text'.",
    )
    return texts[0]
