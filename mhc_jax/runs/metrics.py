"""The record of a run: JSON lines, a loss-spike detector, and optional TensorBoard and wandb writers.

`metrics.jsonl` holds one object a line with `kind` and `step` (updates done, counted from 1):

    train        loss [nats/token], the mean over the batch before the update; grad_norm (before clipping); clipped (1 where
                 grad_norm exceeds optimizer.grad_clip); learning_rate of this update; tokens trained on up to and with this
                 step; step_time_s of this step; tokens_per_s of this step; with experts, means over layers of
                 router_load_cv, router_max_load, router_entropy, router_bias_range (`layers.moe.router_health`), and
                 router_dropped where model.experts sets a buffer
    validation   loss, the mean over all tokens of the validation batches; bits_per_byte of these (`Data.bits_per_nat`)
    diagnostics  `diagnostics.summarize` as lists, grad_norm_per_layer; with experts, the router_* numbers of each layer
    event        event = spike | resumed | saved | diverged | interrupted | checkpoint_skipped, and details

A train line is written every train.log_every steps, and at the last.  NaN and infinity are written as null.

`summary.json` holds, of the whole run however often it was stopped:

    steps                  updates in the saved state
    parameters             all; connection_parameters: those of them that connections have
    flops_per_token        operations of one train step over its tokens, recomputation included (`cost.counts.flops`)
    step_time_s            median of the last 200 steps, validation, diagnostics and checkpoints not included
    peak_memory_bytes      most that arrays took on the first device; what the compiler says of the train step where the device
                           keeps no count, or where something before the run in the same process took more
    train_loss             mean of the losses of the last 10 steps, without those that are not finite
    validation_loss        of the last validation, and bits_per_byte
    spikes                 number of spike_steps (`SpikeDetector`)
    first_nonfinite_step   step at which a loss or a gradient norm was not finite, if that ended the run
    wall_clock_s           sum of compile_s, train_s, validation_s, diagnostics_s and checkpoint_s: reading text, making the
                           first state and steps lost to a kill are not included
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import statistics
import uuid
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mhc_jax.errors import InputError, require


def plain(value: Any) -> Any:
    """Numbers and arrays as JSON has them; NaN and infinity become None."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if hasattr(value, "tolist"):
        return plain(np.asarray(value).tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return float(f"{value:.9g}") if isinstance(value, float) else value


SPIKE_WINDOW = 50
"""Losses whose median a spike is measured against."""
SPIKE_THRESHOLD = 0.5
"""Nats above that median from which on a loss is a spike."""


class SpikeDetector:
    """A step is a spike when its loss exceeds the median of the last `window` non-spike losses by `threshold` nats.

    It starts to judge once `window` / 2 losses are seen; a run of spikes in consecutive steps counts once.
    """

    def __init__(self, window: int, threshold: float, state: dict[str, Any] | None = None):
        self.window, self.threshold = window, threshold
        state = state or {"recent": [], "steps": [], "last": -1}
        self.recent = deque(state["recent"], maxlen=window)
        self.steps: list[int] = list(state["steps"])
        self.last: int = state["last"]

    @property
    def median(self) -> float:
        """Of the losses in the window, in nats."""
        return statistics.median(self.recent)

    def update(self, step: int, loss: float) -> bool:
        """True when a new spike begins at this step."""
        if len(self.recent) >= max(self.window // 2, 1) and loss > self.median + self.threshold:
            begins = step != self.last + 1
            self.last = step
            if begins:
                self.steps.append(step)
            return begins
        if math.isfinite(loss):
            self.recent.append(loss)
        return False

    def state(self) -> dict[str, Any]:
        """JSON-serialisable, for checkpoints."""
        return {"recent": list(self.recent), "steps": self.steps, "last": self.last}


def check_trackers(trackers: Sequence[str]) -> None:
    """Raise `InputError` if the package of a tracker is not installed."""
    for name in trackers:
        package = {"tensorboard": "tensorboardX", "wandb": "wandb"}[name]
        require(
            importlib.util.find_spec(package) is not None,
            f"train.trackers has {name!r}, but {package} is missing: pip install 'mhc-jax[{name}]', or leave it out.",
        )


class MetricsWriter:
    """Appends to `metrics.jsonl` (and TensorBoard, wandb); a line that `write` has written outlives a kill."""

    def __init__(self, folder: Path, keep_until: int, trackers: Sequence[str] = (), config: Any = None):
        """Continue the file of a resumed run: lines of steps after `keep_until` are dropped, as are half-written ones.

        A run that starts anew gives -1.
        """
        self.path = folder / "metrics.jsonl"
        kept = []
        if self.path.exists():
            for line in self.path.read_text().splitlines():
                try:
                    record = json.loads(line)
                except json.JSONDecodeError:
                    continue
                if record["step"] <= keep_until:
                    kept.append(line + "\n")
        replacement = self.path.with_suffix(".tmp")
        self._guard(lambda: replacement.write_text("".join(kept)))
        replacement.replace(self.path)
        self._file = self.path.open("a")
        self._tensorboard = self._wandb = None
        if "tensorboard" in trackers:
            from tensorboardX import SummaryWriter

            self._tensorboard = SummaryWriter(str(folder / "tensorboard"), purge_step=keep_until + 1)
        if "wandb" in trackers:
            import wandb

            # Runs of other comparisons may have folders of the same name; the id is this folder's own.
            id_file = folder / "wandb_id"
            if not id_file.exists():
                self._guard(lambda: id_file.write_text(uuid.uuid4().hex))
            self._wandb = wandb.init(
                dir=str(folder), name=folder.name, config=config, resume="allow", id=id_file.read_text()
            )

    def _guard(self, action):
        try:
            return action()
        except OSError as error:
            raise InputError(
                f"Cannot write {self.path}: {error.strerror}. What is on disk stays; make room and run the same "
                f"command again."
            ) from error

    def write(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """Append one record."""
        record = {"kind": kind, "step": step, **plain(values)}
        self._guard(lambda: (self._file.write(json.dumps(record) + "\n"), self._file.flush()))
        scalars = {f"{kind}/{k}": v for k, v in record.items() if isinstance(v, float | int) and k != "step"}
        if self._tensorboard is not None:
            for name, value in scalars.items():
                self._tensorboard.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(scalars, step=step)

    def close(self) -> None:
        """Flush and close every writer."""
        with contextlib.suppress(OSError):  # what `write` could not flush, it has reported
            self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()


class NoWriter:
    """The writer of the processes that write nothing."""

    def write(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""
