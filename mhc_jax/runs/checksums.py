"""Checksums of the files of a run that has ended, with which a page or a command notices that one of them has changed."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from mhc_jax.errors import require
from mhc_jax.files.checksums import CHECKSUMS, checksum, damage
from mhc_jax.files.json_files import replacing, write_json

RUN_FILES = ("config.json", "env.json", "metrics.jsonl")
"""Files of a run folder that have a checksum once the run has ended, besides summary.json."""
WRITING_S = 0.5
"""Seconds in which another process that has written `CHECKSUMS` also writes summary.json."""


def write_summary(folder: Path, summary: dict[str, Any]) -> None:
    """Write summary.json of a run folder, and before it `CHECKSUMS` of the files that a page of the run is made of.

    Raises:
      InputError: the folder cannot be written.
      ValueError: a number is NaN or infinite.
    """
    with replacing(folder / "summary.json") as temporary:
        temporary.write_text(json.dumps(summary, indent=1, allow_nan=False) + "\n")
        found = {name: checksum(folder / name) for name in RUN_FILES if (folder / name).is_file()}
        write_json(folder / CHECKSUMS, {**found, "summary.json": checksum(temporary)})


def remove_summary(folder: Path) -> None:
    """Remove summary.json and `CHECKSUMS` of a run folder, whose run goes on."""
    for name in (CHECKSUMS, "summary.json"):
        (folder / name).unlink(missing_ok=True)


def require_whole(folder: Path) -> None:
    """Raise `InputError` if a run has ended and a file of its folder is missing, or is not the one that was written."""
    reason = damage(folder)
    if reason and not (folder / "summary.json").exists():
        time.sleep(WRITING_S)
        reason = damage(folder)
    require(
        not reason,
        f"{folder}: {reason}; restore it from a copy, or remove {folder / CHECKSUMS} to use the files as they are.",
    )
