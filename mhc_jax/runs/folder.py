"""Check and create the folder of a run."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mhc_jax.errors import InputError, require
from mhc_jax.files.json_files import read_json, write_json
from mhc_jax.parallel import distributed
from mhc_jax.runs.lock import LOCK, lock_text, run_lock

PATTERNS = "*?[\\"
"""Characters that Orbax takes for a pattern of file names, in the path of a checkpoint too."""
NEUTRAL_KEYS = ("train.checkpoint_every", "train.trackers")
"""Dotted keys of neutral settings, which change no number that a run measures.  A run may go on with other values of them."""
NEUTRAL_SECTIONS = ("mesh", "pipeline")
"""Sections whose settings are neutral, too, because they change numbers by rounding alone."""
TEXT_KEYS = ("data.source", "data.validation_source", "data.tokenizer")
"""Dotted keys of settings that name texts and a tokenizer, whose content a run records (`recorded_data`)."""
ENDS = ("finished", "diverged", "interrupted")
"""Values of `status` in summary.json."""


def recorded_data(folder: Path) -> dict[str, Any]:
    """Return what env.json says of the text and the tokenizer of a run (`Data.summary`), or {} if there is no env.json yet.

    Raises:
      InputError: the file is damaged.
    """
    file, advice = folder / "env.json", "restore it from a copy, or remove it to go on without it"
    data = read_json(file, advice).get("data") if file.is_file() else {}
    if not isinstance(data, dict):
        raise InputError(f"{file} does not describe the data of the run; {advice}.")
    return data


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
      InputError: the folder is not a run folder and not empty, holds a run of another configuration, or has a path in which Orbax
        cannot read checkpoints.
    """
    where = str(folder.resolve())
    require(
        where.isprintable() and not set(where) & set(PATTERNS),
        f"The run folder {where!r} has one of the characters {' '.join(PATTERNS)} or one that cannot be printed in its path, and "
        "checkpoints there could not be read again; choose another folder.",
    )
    saved = folder / "config.json"
    if saved.exists():
        changed = [line for line in differences(read_json(saved), config) if not _is_free(line.partition(":")[0])]
        # The text may have another name than in config.json if its identity is recorded, with which `train` compares it.
        if changed or (respelled(folder, config) and not recorded_data(folder)):
            changed = changed or respelled(folder, config)
            more = all(line.startswith("train.steps:") for line in changed)
            more_steps = " docs/warm_start.md (More steps) says how a new run goes on from this one." if more else ""
            raise InputError(
                f"{folder} already holds a run with another configuration ({'; '.join(changed[:6])}); "
                f"choose another folder, or the same configuration to go on with it.{more_steps}"
            )
        summary = read_summary(folder)
        return summary if summary and summary["status"] != "interrupted" else None
    # A run that was killed before it had written config.json leaves its lock and a temporary file.
    if folder.exists() and (
        not folder.is_dir() or any(p.name != LOCK and p.suffix != ".tmp" for p in folder.iterdir())
    ):
        raise InputError(f"{folder} exists and is not a run folder; choose a new or empty one.")
    return None


def respelled(folder: Path, config: dict[str, Any]) -> list[str]:
    """Return the lines of `differences` for the names of texts and tokenizer in which `config` differs from config.json.

    The text may be the same all the same: its files may have moved, or their paths may be spelled otherwise.
    """
    lines = differences(read_json(folder / "config.json"), config) if (folder / "config.json").exists() else []
    return [line for line in lines if line.partition(":")[0] in TEXT_KEYS]


def _is_free(key: str) -> bool:
    """Return whether a setting, by dotted key, may differ from config.json when a run goes on."""
    return key in NEUTRAL_KEYS + TEXT_KEYS or key.partition(".")[0] in NEUTRAL_SECTIONS


def read_summary(folder: Path) -> dict[str, Any] | None:
    """Return the content of summary.json, or None if the file is missing or damaged.

    A damaged file is no loss: the same command goes on from the last checkpoint and writes the file anew.
    """
    with contextlib.suppress(InputError):
        summary = read_json(folder / "summary.json")
        if summary.get("status") in ENDS and isinstance(summary.get("steps", 0), int):
            return summary
    return None


@contextlib.contextmanager
def run_folder(folder: Path, config: dict[str, Any]) -> Iterator[dict[str, Any] | None]:
    """Make a run folder with config.json, and hold its lock while the body of the `with` statement runs.

    In a run of several processes the first process holds the lock for all of them.

    Yields:
      What `check_run_folder` returns once the lock is held, because another command may have ended the run before.

    Raises:
      Busy: another command trains the run.
      InputError: the folder cannot be used, or a process does not see config.json.
    """
    with contextlib.ExitStack() as stack:

        def claim() -> None:
            if distributed.is_first_process():
                _make(folder)
                stack.enter_context(run_lock(folder))

        distributed.on_every_process(claim)
        ended = distributed.on_every_process(lambda: check_run_folder(folder, config))
        create_run_folder(folder, config)
        distributed.require_same(
            lock_text(folder), "The processes have different run folders; give all the same one, which all hosts share."
        )
        yield ended


def create_run_folder(folder: Path, config: dict[str, Any]) -> None:
    """Make the run folder and write config.json on the first process.  Then every process checks that it sees config.json.

    Raises:
      InputError: the folder cannot be written, or another process does not see config.json.
    """
    distributed.on_every_process(lambda: _create(folder, config) if distributed.is_first_process() else None)
    sentence = f"{folder} is not the folder that the first process writes to; give a run folder that all hosts share."
    distributed.on_every_process(lambda: require((folder / "config.json").exists(), sentence))


def _create(folder: Path, config: dict[str, Any]) -> None:
    _make(folder)
    if not (folder / "config.json").exists():
        write_json(folder / "config.json", config)


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"Cannot create {folder}: {error.strerror}; choose a folder you may write to.") from error
