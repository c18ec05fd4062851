"""Checksums of the files of a folder, with which a damaged file is detected when the folder is read.

Neither Orbax nor TensorStore can do this here: Orbax writes its arrays by codecs of its own choice, among which the codec `crc32c`
protects an index and no values.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from mhc_jax.errors import require
from mhc_jax.runs.json_files import read_json, replacing, write_json

CHECKSUMS = "checksums.json"
"""Name of the file that holds the size and the SHA-256 of each file of a folder, by its path in the folder."""
OPEN = "_CHECKPOINT_METADATA"
"""Name of a file of Orbax that may still change after the checksums are written.  No value is read from it."""
RUN_FILES = ("config.json", "env.json", "metrics.jsonl")
"""Files of a run folder that have a checksum once the run has ended, besides summary.json."""
BLOCK = 1 << 22
"""Number of bytes that are read at a time."""


def write_checksums(folder: Path) -> None:
    """Write `CHECKSUMS` into a folder."""
    found = {name: _of(folder / name) for name in _names(folder)}
    (folder / CHECKSUMS).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def write_summary(folder: Path, summary: dict[str, Any]) -> None:
    """Write summary.json of a run folder, and before it `CHECKSUMS` of the files that a page of the run is made of.

    Raises:
      InputError: the folder cannot be written.
      ValueError: a number is NaN or infinite.
    """
    with replacing(folder / "summary.json") as temporary:
        temporary.write_text(json.dumps(summary, indent=1, allow_nan=False) + "\n")
        found = {name: _of(folder / name) for name in RUN_FILES if (folder / name).is_file()}
        write_json(folder / CHECKSUMS, {**found, "summary.json": _of(temporary)})


def remove_summary(folder: Path) -> None:
    """Remove summary.json and `CHECKSUMS` of a run folder, whose run goes on."""
    for name in (CHECKSUMS, "summary.json"):
        (folder / name).unlink(missing_ok=True)


def require_whole(folder: Path) -> None:
    """Raise `InputError` if a run has ended and a file of its folder is not the one that was written."""
    reason = damage(folder) if (folder / "summary.json").is_file() else ""
    require(
        not reason,
        f"{folder}: {reason}; restore it from a copy, or remove {folder / CHECKSUMS} to use the files as they are.",
    )


def damage(folder: Path) -> str:
    """Return what is damaged in a folder, in a few words, or an empty text if nothing is.

    A folder without `CHECKSUMS`, which an older version of this project wrote, is not checked.
    """
    if not (folder / CHECKSUMS).is_file():
        return ""
    try:
        listed = read_json(folder / CHECKSUMS)
    except ValueError:
        return f"{CHECKSUMS} is damaged"
    for name, expected in listed.items():
        try:
            if _of(folder / name) != expected:
                return f"{name} is damaged: its SHA-256 is not the one that was saved"
        except OSError as error:
            return f"{name} cannot be read: {error.strerror}"
    return ""


def _names(folder: Path) -> list[str]:
    """Return the paths of all files below a folder, relative to it, except those that have no checksum."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in (CHECKSUMS, OPEN))
    return [path.relative_to(folder).as_posix() for path in paths]


def _of(file: Path) -> list[int | str]:
    """Return the size of a file in bytes, and its SHA-256."""
    digest, size = hashlib.sha256(), 0
    with file.open("rb") as stream:
        while block := stream.read(BLOCK):
            digest.update(block)
            size += len(block)
    return [size, digest.hexdigest()]
