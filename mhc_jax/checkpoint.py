"""Checkpoints: train state, data position, loop state and configuration, in one Orbax step folder that is whole or absent."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from mhc_jax.errors import InputError
from mhc_jax.train_step import TrainState


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """`model.width: 64 -> 128` for every leaf that two nested mappings do not share."""
    out = []
    for key in sorted({*old, *new}):
        a, b = old.get(key), new.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            out += differences(a, b, f"{prefix}{key}.")
        elif a != b:
            out.append(f"{prefix}{key}: {a!r} -> {b!r}")
    return out


class Checkpoints:
    """The checkpoints of one run, `folder/checkpoints/<step>/`.

    Saving is asynchronous: `save` returns once the arrays are copied to the host.  A step folder gets its final name only when it
    is complete, so a kill leaves at most a temporary folder, which the next start removes.
    """

    def __init__(self, folder: Path, keep: int):
        self.folder = (folder / "checkpoints").resolve()
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, create=True, cleanup_tmp_directories=True, enable_async_checkpointing=True
        )
        try:
            self._manager = ocp.CheckpointManager(self.folder, options=options, item_names=("state", "loop", "config"))
        except OSError as error:
            raise InputError(f"Cannot use {self.folder} for checkpoints: {error.strerror or error}.") from error

    def steps(self) -> list[int]:
        """Steps saved, oldest first."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, state: TrainState, loop: dict[str, Any], config: dict[str, Any]) -> None:
        """Start saving.

        Args:
          step: updates done.
          state: train state.
          loop: JSON-serialisable: position of the data iterator, spike detector, clocks.
          config: the run's configuration (`config.to_mapping`).

        Raises:
          InputError: this or the previous save could not be written (disk full, folder gone).
        """
        if step in self._manager.all_steps():
            return
        try:
            self._manager.wait_until_finished()
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state),
                    loop=ocp.args.JsonSave(loop),
                    config=ocp.args.JsonSave(config),
                ),
            )
        except Exception as error:
            raise self._failure(error) from error

    def wait(self) -> None:
        """Until everything started is on disk.

        Raises:
          InputError: a save failed.
        """
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            raise self._failure(error) from error

    def _failure(self, error: Exception) -> InputError:
        full = "no space left" in str(error).lower() or getattr(error, "errno", None) == errno.ENOSPC
        reason = "the disk is full" if full else str(error).strip().splitlines()[0][:200]
        steps = [int(p.name) for p in self.folder.iterdir() if p.name.isdigit()] if self.folder.is_dir() else []
        newest = f"step {max(steps)} is whole and will be used" if steps else "there is no earlier one"
        return InputError(
            f"Could not save a checkpoint in {self.folder}: {reason}. Of the earlier checkpoints, {newest} when the run is started "
            f"again; make room first."
        )

    def restore_newest(
        self, abstract: TrainState, config: dict[str, Any]
    ) -> tuple[TrainState, dict[str, Any], list[str]] | None:
        """Newest checkpoint that can be read, or None if there is none.

        Args:
          abstract: shapes and dtypes of the state (`jax.eval_shape`), with shardings if it is to be placed.
          config: of the run that wants to go on.

        Returns:
          (state, loop, remarks): the remarks name the broken checkpoints that were passed over and set aside.

        Raises:
          InputError: the newest readable checkpoint belongs to another architecture, or none can be read though some exist.
        """
        remarks = []
        for step in reversed(self.steps()):
            try:
                saved = self._manager.restore(step, args=ocp.args.Composite(config=ocp.args.JsonRestore()))["config"]
                changed = differences(saved["model"], config["model"], "model.")
                if changed:
                    raise InputError(
                        f"The checkpoint {self.folder / str(step)} was made by another model ({'; '.join(changed)}); "
                        f"use its configuration or another run folder."
                    )
                out = self._manager.restore(
                    step, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract), loop=ocp.args.JsonRestore())
                )
                return out["state"], out["loop"], remarks
            except InputError:
                raise
            except Exception as error:
                aside = self._set_aside(step)
                reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:120]
                remarks.append(f"Checkpoint {step} cannot be read ({reason}); moved to {aside.name}, using an earlier one.")
        if remarks:
            raise InputError(f"No checkpoint in {self.folder} can be read: {' '.join(remarks)} Start in another run folder.")
        return None

    def _set_aside(self, step: int) -> Path:
        aside = self.folder.parent / f"broken-checkpoint-{step}"
        shutil.rmtree(aside, ignore_errors=True)
        shutil.move(self.folder / str(step), aside)
        self._manager.reload()
        return aside

    def close(self) -> None:
        """Wait for pending saves and release threads."""
        self._manager.close()


def load_params(folder: Path) -> tuple[dict[str, Any], Any]:
    """(configuration mapping, parameters) of the newest checkpoint of a run folder, for evaluation and notebooks.

    Raises:
      InputError: the folder holds no checkpoint.
    """
    root = (folder / "checkpoints").resolve()
    steps = sorted(int(p.name) for p in root.iterdir() if p.name.isdigit()) if root.is_dir() else []
    if not steps:
        raise InputError(f"{folder} holds no checkpoint; give the folder of a run (it has config.json and checkpoints/).")
    config = json.loads((folder / "config.json").read_text())
    with ocp.StandardCheckpointer() as checkpointer:
        state = checkpointer.restore(root / str(steps[-1]) / "state")
    return config, jax.tree.map(jax.numpy.asarray, state["params"])
