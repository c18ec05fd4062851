"""Checksums of the files of a folder, with which a damaged file is detected when the folder is read.

Neither Orbax nor TensorStore can do this here: Orbax writes its arrays by codecs of its own choice, among which the codec `crc32c`
protects an index and no values.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection
from pathlib import Path

from mhc_jax.files.json_files import read_json

CHECKSUMS = "checksums.json"
"""Name of the file that holds the size and the SHA-256 of each file of a folder, by its path in the folder."""


def write_checksums(folder: Path, without: Collection[str] = ()) -> None:
    """Write `CHECKSUMS` of all files below a folder, except those whose names are in `without`."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in (CHECKSUMS, *without))
    found = {path.relative_to(folder).as_posix(): checksum(path) for path in paths}
    (folder / CHECKSUMS).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def damage(folder: Path) -> str:
    """Return what is damaged in a folder, in a few words, or an empty text if nothing is.

    A folder without `CHECKSUMS`, which an older version of this project wrote, is not checked.  Another older version wrote the
    SHA-256 without the size.
    """
    if not (folder / CHECKSUMS).exists():
        return ""
    try:
        listed = read_json(folder / CHECKSUMS)
    except ValueError:
        return f"{CHECKSUMS} is damaged"
    for name, expected in listed.items():
        try:
            found = checksum(folder / name)
            if expected not in (found, found[1]):
                return f"{name} is damaged: its SHA-256 is not the one that was saved"
        except OSError as error:
            return f"{name} cannot be read: {error.strerror}"
    return ""


def checksum(file: Path) -> list[int | str]:
    """Return the size of a file in bytes, and its SHA-256."""
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
        return [stream.tell(), digest]
