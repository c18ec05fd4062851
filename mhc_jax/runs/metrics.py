"""The writer of metrics.jsonl, which also feeds the trackers of a run, and the detector of loss spikes.

Each line of metrics.jsonl is a JSON object with a `kind`, a `step` (the number of updates done) and the values of its kind:

    train        loss [nats/token], the mean over the batch before the update; grad_norm (before clipping); clipped (1 if
                 grad_norm exceeds optimizer.grad_clip); learning_rate of this update; tokens trained on, this step included;
                 step_time_s; tokens_per_s.  If the model has experts, means over layers: router_load_cv, router_max_load,
                 router_entropy and router_bias_range (`layers.moe.router_health`), and router_dropped (share of dropped pairs
                 of token and expert) if model.experts sets a buffer
    validation   loss, the mean over all tokens of the validation batches; bits_per_byte of these tokens (`Data.bits_per_nat`)
    diagnostics  arrays of `diagnostics.summarize` as lists; after step 0 also grad_norm_per_layer [L/2] (of each block) and, if
                 the model has experts, router_* of each layer
    event        event (spike, resumed, diverged, interrupted or checkpoint_skipped), and details of this event

A train line is written every train.log_every steps, and at the last step.  NaN and infinity are written as null.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import statistics
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any, TypeVar

import numpy as np

from mhc_jax.errors import InputError
from mhc_jax.files.json_files import replacing
from mhc_jax.parallel import distributed
from mhc_jax.runs.trackers import Tracker, make_trackers, one_line, warn

T = TypeVar("T")


def plain(value: Any) -> Any:
    """Return `value` as JSON values: arrays as lists, floats rounded to 9 significant digits, NaN and infinity as None."""
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
"""Number of last losses whose median each new loss is compared with, in order to find spikes."""
SPIKE_THRESHOLD = 0.5
"""A loss is a spike if it exceeds the median of the last `SPIKE_WINDOW` losses by more than this, in nats per token."""


class SpikeDetector:
    """Finds spikes: steps whose loss exceeds the median of the last `window` losses by more than `threshold` nats per token.

    The median leaves out losses of spikes and losses that are not finite.  It takes `window` / 2 losses before a spike can be
    found.  Spikes of consecutive steps count as one.
    """

    def __init__(self, window: int, threshold: float, state: dict[str, Any] | None = None):
        self.window, self.threshold = window, threshold
        state = state or {"recent": [], "steps": [], "last": -1}
        self.recent = deque(state["recent"], maxlen=window)
        self.steps: list[int] = list(state["steps"])
        self.last: int = state["last"]

    @property
    def median(self) -> float:
        """The median of the last `window` losses, in nats per token."""
        return statistics.median(self.recent)

    def update(self, step: int, loss: float) -> bool:
        """Add the loss of a step, in nats per token.  Return whether a spike begins with this step."""
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
        """Return the state of the detector as JSON values.  The constructor takes them as `state`."""
        return {"recent": list(self.recent), "steps": self.steps, "last": self.last}


def place_of(line: bytes) -> tuple[str, int] | None:
    """Return kind and step of a line of metrics.jsonl, or None if the line is damaged."""
    try:
        record = json.loads(line.decode())
        kind, step = record["kind"], record["step"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    return (kind, step) if isinstance(kind, str) and type(step) is int else None


class MetricsWriter:
    """A context manager that appends lines to metrics.jsonl and hands them to the trackers of the run.

    A line that is written stays in the file if the process is killed.  In a run of several processes only the first one writes.
    """

    def __init__(
        self,
        folder: Path,
        keep_until: int,
        trackers: Sequence[str] = (),
        config: Any = None,
        measured: str = "",
    ):
        """Open the files of a run.

        Args:
          folder: folder of the run.
          keep_until: the last step whose lines in metrics.jsonl are kept.  Lines of later steps, half-written
            lines and damaged lines are dropped.  -1 drops all lines, for a run that starts anew.
          trackers: the trackers that get the metrics too, as in train.trackers.
          config: configuration of the run, which wandb shows.
          measured: `measured` of the writer that wrote the lines that are kept.  If it is another now, `remark` says so.  Empty:
            it is not known.

        Raises:
          InputError: the folder cannot be written, or wandb refuses its settings.
        """
        self.path = folder / "metrics.jsonl"
        self._file: IO[str] | None = None
        self._trackers: dict[str, Tracker] = {}
        self.remark = ""
        """A sentence about lines that were damaged, doubled or changed; empty if there were none."""
        self._measured = hashlib.sha256()
        if distributed.is_first_process():
            self._keep(keep_until)
            if measured and self.measured != measured and not self.remark:
                self.remark = (
                    "metrics.jsonl is damaged: its lines of earlier steps are not those that were written; restore it "
                    "from a copy if there is one"
                )
            self._trackers = make_trackers(trackers, folder, keep_until, config)
            self._file = self.path.open("a")

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    @property
    def measured(self) -> str:
        """SHA-256, in hex, of all lines of the file but those of events."""
        return self._measured.hexdigest()

    def write(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """Append one line with `kind`, `step` and `values`.

        Raises:
          InputError: the disk is full, or the file is gone.
        """
        if self._file is None:
            return
        record = plain(values)
        line = json.dumps({"kind": kind, "step": step, **record}) + "\n"
        self._write_line(self._file, line)
        if kind != "event":
            self._measured.update(line.encode())
        for name in [*self._trackers]:
            self._to_tracker(name, lambda tracker: tracker.write(kind, step, record))

    def close(self) -> None:
        """Flush and close metrics.jsonl and the trackers."""
        if self._file is not None:
            with contextlib.suppress(OSError):  # a failed `write` has already raised this error
                self._file.close()
        for name in [*self._trackers]:
            self._to_tracker(name, lambda tracker: tracker.close())

    def _to_tracker(self, name: str, action: Callable[[Tracker], None]) -> None:
        """Do something with a tracker.  A tracker that fails is left out from then on, so that the run goes on without it."""
        try:
            action(self._trackers[name])
        except Exception as error:  # whatever a library raises that has lost its server or its files
            del self._trackers[name]
            warn(f"{name} has failed ({one_line(error)}); the run goes on without it, and metrics.jsonl has all lines.")

    def _keep(self, until: int) -> None:
        """Rewrite metrics.jsonl so that it holds the complete lines up to the step `until` alone, each measurement once."""
        kept, measured, damaged = [], set(), 0
        *raw, last = self._guard(self.path.read_bytes).split(b"\n") if self.path.exists() else [b""]
        # A last line without a line feed was being written when the process was killed.
        for line in [*raw, *([last] if place_of(last) else [])]:
            place = place_of(line)
            if place is None or place in measured:
                damaged += 1
            elif place[1] <= until:
                kept.append(line + b"\n")
                if place[0] != "event":
                    self._measured.update(kept[-1])
                measured |= {place} - {("event", place[1])}
        if damaged and until >= 0:
            self.remark = f"{damaged} lines of metrics.jsonl were damaged or doubled and are left out"
        with replacing(self.path) as file:
            self._guard(lambda: file.write_bytes(b"".join(kept)))

    def _write_line(self, file: IO[str], line: str) -> None:
        self._guard(lambda: (file.write(line), file.flush()))

    def _guard(self, action: Callable[[], T]) -> T:
        try:
            return action()
        except OSError as error:
            raise InputError(
                f"Cannot write {self.path}: {error.strerror}. What is on disk stays; make room and run the same "
                f"command again."
            ) from error
