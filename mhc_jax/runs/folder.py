"""Check and create the folder of a run, and read and write its JSON files."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mhc_jax.errors import InputError, require
from mhc_jax.parallel import distributed
from mhc_jax.runs.metrics import plain


def write_json(path: Path, value: Any) -> None:
    """Write `value` to a JSON file.  If the process is killed, the file is either old or complete.

    Raises:
      InputError: the folder cannot be written.
    """
    temporary = path.with_suffix(".tmp")
    try:
        temporary.write_text(json.dumps(plain(value), indent=1) + "\n")
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise InputError(f"Cannot write {path}: {error.strerror}; mend that and run the same command again.") from error


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
      InputError: the file cannot be read, or holds no JSON object.
    """
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({error}); restore it or use another run folder.") from error
    require(isinstance(value, dict), f"{path} holds no JSON object; restore it or use another run folder.")
    return value


def recorded_data(folder: Path) -> dict[str, Any]:
    """Return what env.json says of the text and the tokenizer of a run (`Data.summary`), or {} if there is no env.json yet.

    Raises:
      InputError: the file is no JSON object.
    """
    file = folder / "env.json"
    return read_json(file)["data"] if file.is_file() else {}


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Return a line such as `model.width: 64 -> 128` for every value in which two nested mappings differ.

    `prefix` stands before every key.
    """
    out = []
    for key in sorted({*old, *new}):
        a, b = old.get(key), new.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            out += differences(a, b, f"{prefix}{key}.")
        elif a != b:
            out.append(f"{prefix}{key}: {a!r} -> {b!r}")
    return out


def check_run_folder(folder: Path, config: dict[str, Any]) -> dict[str, Any] | None:
    """Check that a run with the configuration `config` may start or go on in a folder.  Nothing is written.

    Returns:
      The content of summary.json if the run has finished or diverged already, else None.

    Raises:
      InputError: the folder is not a run folder and not empty, or holds a run of another configuration.
    """
    saved = folder / "config.json"
    if saved.exists():
        # The mesh and the pipeline may differ from those in config.json, because a run may go on with other devices.
        free = {"mesh": None, "pipeline": None}
        changed = differences({**read_json(saved), **free}, {**plain(config), **free})
        if changed:
            raise InputError(
                f"{folder} already holds a run with another configuration ({'; '.join(changed[:6])}); "
                f"choose another folder, or the same configuration to go on with it."
            )
        summary = folder / "summary.json"
        if summary.exists():
            ended = read_json(summary)
            return ended if ended["status"] != "interrupted" else None
        return None
    # A run that was killed while it wrote config.json leaves config.tmp as the only file.
    if folder.exists() and (not folder.is_dir() or any(p.name != "config.tmp" for p in folder.iterdir())):
        raise InputError(f"{folder} exists and is not a run folder; choose a new or empty one.")
    return None


def create_run_folder(folder: Path, config: dict[str, Any]) -> None:
    """Make the run folder and write config.json on the first process.  Then every process checks that it sees config.json.

    Raises:
      InputError: the folder cannot be written, or another process does not see config.json.
    """
    distributed.on_every_process(lambda: _create(folder, config) if distributed.is_first_process() else None)
    sentence = f"{folder} is not the folder that the first process writes to; give a run folder that all hosts share."
    distributed.on_every_process(lambda: require((folder / "config.json").exists(), sentence))


def _create(folder: Path, config: dict[str, Any]) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"Cannot create {folder}: {error.strerror}; choose a folder you may write to.") from error
    if not (folder / "config.json").exists():
        write_json(folder / "config.json", config)
