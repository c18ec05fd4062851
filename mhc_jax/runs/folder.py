"""The run folder: whose it is, and its JSON files."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

from mhc_jax.errors import InputError, require
from mhc_jax.parallel import distributed
from mhc_jax.runs.checkpoint import differences
from mhc_jax.runs.metrics import plain


def write_json(path: Path, value: Any) -> None:
    """Write atomically.

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
    """Read what `write_json` wrote.

    Raises:
      InputError: the file is no JSON object.
    """
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({error}); restore it or use another run folder.") from error
    require(isinstance(value, dict), f"{path} holds no JSON object; restore it or use another run folder.")
    return value


def recorded_data(folder: Path) -> dict[str, Any]:
    """What env.json says of the text and tokenizer that a run was trained with (`Data.summary`); empty without that file.

    Raises:
      InputError: the file is no JSON object.
    """
    file = folder / "env.json"
    return read_json(file).get("data", {}) if file.is_file() else {}


def check_run_folder(folder: Path, config: dict[str, Any]) -> dict[str, Any] | None:
    """Recognise a run folder that this very configuration began, or a place for a new one; nothing is written.

    Returns:
      The summary if the run has already ended, else None.

    Raises:
      InputError: the folder holds something else, or a run of another configuration.
    """
    saved = folder / "config.json"
    if saved.exists():
        # The mesh and what its stages do may change: a run goes on on the devices there are.
        free = {"mesh": None, "pipeline": None}
        changed = differences({**read_json(saved), **free}, {**config, **free})
        if changed:
            raise InputError(
                f"{folder} already holds a run with another configuration ({'; '.join(changed[:6])}); "
                f"choose another folder, or the same configuration to go on with it."
            )
        summary = folder / "summary.json"
        if summary.exists():
            ended = read_json(summary)
            return ended if ended.get("status") != "interrupted" else None
        return None
    # config.tmp alone: killed while it was written.
    if folder.exists() and (not folder.is_dir() or any(p.name != "config.tmp" for p in folder.iterdir())):
        raise InputError(f"{folder} exists and is not a run folder; choose a new or empty one.")
    return None


def create_run_folder(folder: Path, config: dict[str, Any]) -> None:
    """Make the folder and write config.json; of several processes the first does, and the others look.

    Raises:
      InputError: it cannot be written, or another process does not see it.
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
