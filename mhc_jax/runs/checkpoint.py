"""Save and read checkpoints.

A checkpoint is an Orbax folder with all that a run needs to go on, and with a checksum of each of its files.  A kill leaves it
whole or absent, and a damaged one is not used.
"""

from __future__ import annotations

import contextlib
import copy
import errno
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from mhc_jax.errors import InputError, raise_interrupt
from mhc_jax.files.checksums import damage, write_checksums
from mhc_jax.files.json_files import read_json
from mhc_jax.parallel import distributed
from mhc_jax.runs.folder import differences
from mhc_jax.runs.read_back import read_back, shapes
from mhc_jax.train_step import TrainState

ITEMS = ("state", "loop", "config", "tokenizer")
"""Names of the parts of a checkpoint: train state, other state of the training loop, configuration and tokenizer."""
KEEP_CHECKPOINTS = 2
"""Number of checkpoints that a run keeps: the newest, and the one before, in case the newest cannot be read."""
REPLACED = "replaced-checkpoint-"
"""Beginning of the name of an old checkpoint, in the run folder, while a new one of the same step is saved."""
MAY_CHANGE = "_CHECKPOINT_METADATA"
"""Name of a file of Orbax that may still change after the checksums are written.  No value is read from it."""
WRITE_ERRORS = (OSError, ValueError, RuntimeError)
"""Exceptions that Orbax raises if writing to disk fails.  Errors of TensorStore arrive as ValueError."""


class Checkpoints:
    """A context manager that saves and reads the checkpoints of one run, `folder/checkpoints/<step>/`.

    `save` returns once the arrays are copied to the host, and writing goes on in the background.  The folder of a step gets its
    final name when it is complete and has its checksums.  A kill therefore leaves at most a temporary folder, which the next start
    removes.

    The first checkpoint of an instance is opened again before it gets its name: JSON parts and shapes of arrays must be as given.
    """

    def __init__(self, folder: Path, keep: int):
        self.folder = (folder / "checkpoints").resolve()
        # Orbax calls `_complete` on the first process, once all files are written and before the folder gets its name.
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            create=False,
            cleanup_tmp_directories=True,
            enable_async_checkpointing=True,
            async_options=ocp.AsyncOptions(post_finalization_callback=self._complete),
        )
        self._failed = self._opened = False
        self._keep = keep
        self._saving: tuple[int, dict[str, Any], dict[str, list[int]]] = (0, {}, {})
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            distributed.on_every_process(self._put_back)
            self._manager = ocp.CheckpointManager(self.folder, options=options, item_names=ITEMS)
        except OSError as error:
            raise InputError(f"Cannot use {self.folder} for checkpoints: {error.strerror or error}.") from error

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_) -> None:
        # Closing waits for all processes of the run.  After an error another process may be gone, and the wait would not end.
        if kind is None or not distributed.is_multiprocess():
            self.close()

    def steps(self) -> list[int]:
        """Return the saved steps, oldest first."""
        return sorted(self._manager.all_steps())

    def newest(self) -> str:
        """Return a text such as `the checkpoint of step 100` for the newest whole checkpoint on disk; empty if there is none."""
        steps = saved_steps(self.folder)
        return f"the checkpoint of step {max(steps)}" if steps else ""

    def save(
        self,
        step: int,
        state: TrainState,
        loop: dict[str, Any],
        config: dict[str, Any],
        tokenizer: dict[str, str],
        replace: bool = False,
    ) -> None:
        """Start saving a checkpoint, unless the step is saved already.

        Args:
          step: number of updates done.
          state: train state.
          loop: state of the training loop besides the train state, as JSON values.
          config: configuration of the run, as from `mapping.to_mapping`.
          tokenizer: tokenizer of the run, as from `Tokenizer.saved`.
          replace: whether to save a step that is saved already once more, and to return only when it is on disk.  The old
            checkpoint stays until then.

        Raises:
          InputError: this or the previous save could not be written (disk full, folder gone).
        """
        there = step in self._manager.all_steps()
        if there and not replace:
            return
        # Orbax writes `loop` while the run goes on and changes its lists.  So Orbax gets a copy.
        parts = {"loop": copy.deepcopy(loop), "config": config, "tokenizer": tokenizer}
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(state), **{name: ocp.args.JsonSave(part) for name, part in parts.items()}
        )
        with self._writing():
            self._manager.wait_until_finished()
            if there:
                old = self.folder.parent / f"{REPLACED}{step}"
                distributed.on_every_process(lambda: self._rename(self.folder / str(step), old))
                self._manager.reload()
            self._saving = step, parts, shapes(state)
            self._manager.save(step, args=items)
            if there:
                self._manager.wait_until_finished()
                distributed.on_every_process(self._put_back)

    def _put_back(self) -> None:
        """Remove old checkpoints whose step is saved anew, and put back those whose new one is not whole."""
        if distributed.is_first_process():
            for old in [path for path in self.folder.parent.iterdir() if path.name.startswith(REPLACED)]:
                if (step := self.folder / old.name.removeprefix(REPLACED)).is_dir():
                    shutil.rmtree(old, ignore_errors=True)
                else:
                    self._rename(old, step)

    def _complete(self) -> None:
        """Write the checksums of the checkpoint whose files are all written, and open the first one of this instance again."""
        step, parts, arrays = self._saving
        [folder] = [path for path in self.folder.iterdir() if path.name.startswith(f"{step}.")]
        if not self._opened:
            read_back(folder, parts, arrays)
            self._opened = True
        write_checksums(folder, without=(MAY_CHANGE,))

    def wait(self) -> None:
        """Wait until every save that has started is on disk.

        Raises:
          InputError: a save failed.
        """
        with self._writing():
            self._manager.wait_until_finished()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except WRITE_ERRORS as error:
            if distributed.is_lost_process(error):
                raise
            raise self._failure(error) from error

    def _failure(self, error: Exception) -> InputError:
        full = "no space left" in str(error).lower() or getattr(error, "errno", None) == errno.ENOSPC
        reason = "the disk is full" if full else _reason(error)
        self._failed = True
        # After a failure Orbax never starts its other writes.  Python would warn of each of them at exit.
        warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
        with contextlib.suppress(InputError):
            self._put_back()
        newest = self.newest()
        kept = f"{newest} is whole" if newest else "there is no earlier one"
        return InputError(
            f"Could not save a checkpoint in {self.folder}: {reason}; {kept}. {'Make room' if full else 'Mend that'} "
            f"and run the same command again to go on."
        )

    def restore_newest(
        self, abstract: TrainState, config: dict[str, Any]
    ) -> tuple[TrainState, dict[str, Any], list[str]] | None:
        """Return the newest checkpoint that can be read, or None if there is no checkpoint.

        Args:
          abstract: shapes, dtypes and shardings of the train state.
          config: configuration of the run that is to go on.  Its model must be the model of the checkpoint.

        Returns:
          (state, loop, remarks): the train state, the other state of the training loop, and a sentence for each checkpoint that
          could not be read and was moved out of the way.

        Raises:
          InputError: the newest readable checkpoint belongs to another model, or there are checkpoints and none can be read.
        """
        broken: dict[int, str] = {}
        for step in reversed(self.steps()):
            out, reason = None, ""
            try:
                out = self._read(step, abstract, config)
            except InputError:
                raise
            except Exception as error:
                reason = _reason(error)
            # Each process reads its own part of the checkpoint.  If one part is broken, no process uses the checkpoint.
            reason = next(filter(None, distributed.allgather_text(reason)), "")
            if out and not reason:
                return *out, self._set_aside(broken)
            broken[step] = reason
        if broken:
            listed = "; ".join(f"{step}: {reason}" for step, reason in broken.items())
            raise InputError(
                f"No checkpoint in {self.folder} can be read ({listed}); restore one from a copy, or start in another "
                f"run folder."
            )
        return None

    def _read(self, step: int, abstract: TrainState, config: dict[str, Any]) -> tuple[TrainState, dict[str, Any]]:
        if distributed.is_first_process() and (reason := damage(self.folder / str(step))):
            raise ValueError(reason)
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
        return out["state"], out["loop"]

    def _set_aside(self, broken: Mapping[int, str]) -> list[str]:
        """Move broken checkpoints out of the folder, so that their steps can be saved again.  Return a sentence for each.

        Of the others the newest `keep` stay: a kill may have left older ones.
        """
        remarks = []
        for step, reason in broken.items():
            aside = self.folder.parent / f"broken-checkpoint-{step}"
            distributed.on_every_process(lambda step=step, aside=aside: self._rename(self.folder / str(step), aside))
            remarks.append(f"checkpoint {step} cannot be read ({reason}); moved to {aside.name}, using an earlier one")
        distributed.on_every_process(self._remove_old)
        self._manager.reload()
        return remarks

    def _remove_old(self) -> None:
        for step in sorted(saved_steps(self.folder))[: -self._keep] if distributed.is_first_process() else ():
            shutil.rmtree(self.folder / str(step), ignore_errors=True)

    def _rename(self, old: Path, new: Path) -> None:
        """Rename a checkpoint's folder on the first process, in place of what has the new name."""
        if not distributed.is_first_process():
            return
        shutil.rmtree(new, ignore_errors=True)
        try:
            old.rename(new)
        except OSError as error:
            raise InputError(f"Cannot move the checkpoint {old} to {new}: {error.strerror}.") from error

    def close(self) -> None:
        """Wait for pending saves and release threads.

        Raises:
          InputError: a save failed, and neither `save` nor `wait` has raised this error.
        """
        try:
            self._manager.close()
        except WRITE_ERRORS as error:
            if not self._failed:
                raise self._failure(error) from error


def _reason(error: Exception) -> str:
    raise_interrupt(error)
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]


def check_tokenizer(saved: str, given: str, folder: Path) -> None:
    """Raise `InputError` unless the given tokenizer is the one that a run was trained with.

    Args:
      saved: fingerprint (SHA-256) of the tokenizer of the run.
      given: fingerprint of the given tokenizer.
      folder: folder of the run.
    """
    if saved != given:
        raise InputError(
            f"The tokenizer is not the one that {folder} was trained with (SHA-256 {given[:12]}, not {saved[:12]}): its ids mean "
            "other text; leave the tokenizer out to use that of the checkpoint, or restore the file."
        )


def check_text(saved: Mapping[str, str], given: Mapping[str, str], folder: Path) -> None:
    """Raise `InputError` if the given text is not the one that a run was trained with.

    Args:
      saved: hashes of the training and validation text of the run, by name.  A name that is missing is not compared.
      given: hashes of the given text, as from `Data.identity`.
      folder: folder of the run.
    """
    for name, new in given.items():
        if (old := saved.get(name, new)) != new:
            split = {"train_sha256": "training", "validation_sha256": "validation"}[name]
            raise InputError(
                f"The {split} text is not the one that {folder} was trained with (SHA-256 of its tokens {new[:12]}, not "
                f"{old[:12]}); restore the files, or choose another run folder."
            )


def saved_steps(checkpoints: Path) -> list[int]:
    """Return the steps whose checkpoints are whole on disk, in no particular order."""
    return [int(p.name) for p in checkpoints.iterdir() if p.name.isdigit()] if checkpoints.is_dir() else []


def newest_step(folder: Path) -> int:
    """Return the step of the newest checkpoint of a run folder.  Raise `InputError` if it holds none."""
    steps = saved_steps(folder / "checkpoints")
    if not steps:
        raise InputError(
            f"{folder} holds no checkpoint; give the folder of a run (it has config.json and checkpoints/)."
        )
    return max(steps)


def load_params(folder: Path, shardings: Callable[[Any], Any] | None = None) -> tuple[dict[str, Any], Any]:
    """Return (configuration as a nested mapping, parameters) of the newest checkpoint of a run folder.

    In this configuration model.vocab_size is never 0.  Where config.json has 0, it is the size of the tokenizer.

    Args:
      folder: the run folder.
      shardings: a function from the shapes and dtypes of the train state to its shardings (`sharding.state_shardings`).  None
        puts everything on the first device.

    Raises:
      InputError: the folder holds no checkpoint, or the newest checkpoint cannot be read.
    """
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])

    def target(saved: Any) -> Any:
        # The checkpoint names the devices on which the run saved it.  The arrays are restored to devices of this process.
        places = jax.tree.map(lambda _: device, saved) if shardings is None else shardings(saved)
        return jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), saved, places)

    out = _restored(folder, target)
    return out["config"], out["state"]["params"]


def load_state(folder: Path, abstract: TrainState) -> tuple[TrainState, dict[str, Any]]:
    """Return (train state, other state of the training loop) of the newest checkpoint of a run folder.

    Args:
      folder: the run folder.
      abstract: shapes, dtypes and shardings of the train state.

    Raises:
      InputError: the folder holds no checkpoint, or the newest one cannot be read or has a train state of another form.
    """
    out = _restored(folder, lambda _: abstract)
    return out["state"], out["loop"]


def _restored(folder: Path, target: Callable[[Any], Any]) -> Any:
    """Return the items of the newest checkpoint of a run folder by name.

    `target` makes the shapes, dtypes and shardings of the train state to restore from the shapes and dtypes of the saved one.
    """
    step = newest_step(folder)
    root = (folder / "checkpoints").resolve()
    advice = "remove it to use an earlier one"
    if reason := damage(root / str(step)):
        raise InputError(f"The checkpoint {root / str(step)} cannot be read ({reason}); {advice}.")
    options = ocp.CheckpointManagerOptions(create=False, enable_async_checkpointing=False)
    # Every item gets a handler, because Orbax warns of an item without one, even if the item is not read.
    handlers = {"state": ocp.StandardCheckpointHandler()}
    handlers |= {name: ocp.JsonCheckpointHandler() for name in ITEMS[1:]}
    try:
        with ocp.CheckpointManager(root, options=options, item_handlers=handlers) as manager:
            state = ocp.args.StandardRestore(target(manager.item_metadata(step)["state"]))
            wanted = ocp.args.Composite(state=state, config=ocp.args.JsonRestore(), loop=ocp.args.JsonRestore())
            return manager.restore(step, args=wanted)
    except Exception as error:
        raise InputError(f"The checkpoint {root / str(step)} cannot be read ({_reason(error)}); {advice}.") from error


def saved_tokenizer(folder: Path) -> dict[str, str]:
    """Return the tokenizer of the newest checkpoint of a run folder, in the form of `Tokenizer.saved`, or raise `InputError`."""
    return _saved_json(folder, "tokenizer")


def saved_config(folder: Path) -> dict[str, Any]:
    """Return the configuration in the newest checkpoint of a run folder (model.vocab_size is never 0), or raise `InputError`."""
    return _saved_json(folder, "config")


def _saved_json(folder: Path, item: str) -> dict[str, Any]:
    return read_json(folder / "checkpoints" / str(newest_step(folder)) / item / "metadata")
