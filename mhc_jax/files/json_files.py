"""Files that are replaced in one step, and JSON files that are either read whole or refused in a sentence."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mhc_jax.errors import InputError, require
from mhc_jax.files.aside import aside


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield the path of a new file beside `path`, and replace `path` by this file in one step at the end.

    Every call has a folder of its own for it (`aside`).  Several processes may therefore write `path` at the same time, and a
    reader finds the whole file of one of them.  After an error the old file stays.  What a kill leaves, the next call on the same
    host removes.

    Raises:
      InputError: the folder cannot be written.
    """
    try:
        with aside(path.parent, path.name) as folder:
            yield folder / path.name
            os.replace(folder / path.name, path)
    except OSError as error:
        raise InputError(
            f"Cannot write {path}: {error.strerror or error}; mend that and run the same command again."
        ) from error


def write_json(path: Path, value: Any) -> None:
    """Write JSON values to a file in one step (`replacing`).

    Floats are written with as many digits as they need, so that `read_json` returns the same floats, bit for bit.

    Raises:
      InputError: the folder cannot be written.
      ValueError: a number is NaN or infinite.  `metrics.plain` replaces these numbers by null.
    """
    text = json.dumps(value, indent=1, allow_nan=False) + "\n"
    with replacing(path) as temporary:
        temporary.write_text(text)


def read_json(path: Path, advice: str = "restore it or use another folder") -> dict[str, Any]:
    """Read a JSON object.

    Args:
      path: the file.
      advice: what to do if the file is damaged, as the end of the error message.

    Raises:
      InputError: the file cannot be read, or holds no JSON object.
    """
    try:
        value = json.loads(path.read_text("utf-8"))
    except RecursionError:  # Its message does not say that the file is the cause.
        raise InputError(f"{path} cannot be read (its values are nested too deeply); {advice}.") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({error}); {advice}.") from error
    require(isinstance(value, dict), f"{path} holds no JSON object; {advice}.")
    return value
