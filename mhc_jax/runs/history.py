"""The history of a run: times, losses, spikes and gains of its steps, how it ended, and the summary of all that."""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np

from mhc_jax.config import ExperimentConfig
from mhc_jax.cost import counts
from mhc_jax.diagnostics import STREAM_MEASURES
from mhc_jax.runs.environment import devices_of
from mhc_jax.runs.metrics import SPIKE_THRESHOLD, SPIKE_WINDOW, SpikeDetector, plain
from mhc_jax.train_step import TrainState

KEPT_TIMES, KEPT_LOSSES = 200, 10
"""Steps whose times and losses summary.json is made from."""


class Clock:
    """Seconds of a run by what they were spent on."""

    def __init__(self) -> None:
        parts = ("compile_s", "train_s", "validation_s", "diagnostics_s", "checkpoint_s")
        self.seconds: dict[str, float] = dict.fromkeys(parts, 0.0)
        self._step_began = 0.0

    @contextlib.contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Add the time that the body takes to `part`."""
        began = time.perf_counter()
        yield
        self.seconds[part] += time.perf_counter() - began

    def restart_step(self) -> None:
        """Let the next step begin now, so that pauses are no part of it."""
        self._step_began = time.perf_counter()

    def end_step(self) -> float:
        """Seconds since the last step ended, or since `restart_step`; they are added to `train_s`."""
        now = time.perf_counter()
        elapsed, self._step_began = now - self._step_began, now
        self.seconds["train_s"] += elapsed
        return elapsed


@dataclass
class History:
    """The state of the loop beside the train state.  A checkpoint holds it, so that summary.json covers the whole run."""

    spikes: SpikeDetector = field(default_factory=lambda: SpikeDetector(SPIKE_WINDOW, SPIKE_THRESHOLD))
    clock: Clock = field(default_factory=Clock)
    step: int = 0
    """Updates that have been dispatched."""
    losses: list[float] = field(default_factory=list)
    """Losses of the last steps, in nats per token."""
    step_times: list[float] = field(default_factory=list)
    """Seconds of the last steps."""
    validation_loss: float | None = None
    gains: dict[str, float | None] = field(
        default_factory=lambda: dict.fromkeys(("max_composite_forward", "max_composite_backward", "max_column_error"))
    )
    """The largest value over depth and over all diagnostics steps so far."""
    last_diagnostics: dict[str, float | None] = field(
        default_factory=lambda: {f"final_{key}": None for key in STREAM_MEASURES}
    )
    diverged_at: int | None = None
    """The step at which the run diverged."""
    first_nonfinite: int | None = None
    """The step at which a number was not finite."""
    compiled_bytes: int | None = None
    """Bytes of the train step, as the compiler says."""

    def saved(self) -> dict[str, Any]:
        """The history as JSON has it, for `restore`; later steps change its lists."""
        return {**vars(self), "spikes": self.spikes.state(), "clock": self.clock.seconds}

    def restore(self, saved: dict[str, Any]) -> None:
        """Go on from what `saved` gave."""
        self.spikes = SpikeDetector(self.spikes.window, self.spikes.threshold, saved["spikes"])
        self.clock.seconds = saved["clock"]
        vars(self).update({f.name: saved[f.name] for f in fields(self) if f.name not in ("spikes", "clock")})

    def ended(self, steps: int) -> str | None:
        """`diverged` or `finished`; None while some of the `steps` are left to do."""
        if self.diverged_at is not None:
            return "diverged"
        return "finished" if self.step == steps else None

    def add_step(self, loss: float) -> float:
        """Remember a step that has ended; returns its seconds."""
        seconds = self.clock.end_step()
        self.step_times = [*self.step_times, seconds][-KEPT_TIMES:]
        self.losses = [*self.losses, loss][-KEPT_LOSSES:]
        return seconds

    def add_validation(self, loss: float) -> None:
        """Remember the loss of a validation."""
        self.validation_loss = loss
        self.first_nonfinite = None if math.isfinite(loss) else self.step

    def add_diagnostics(self, values: dict[str, np.ndarray]) -> None:
        """Remember what `diagnostics.summarize` gave."""
        for key, before in self.gains.items():
            largest = float(np.max(np.nan_to_num(values[key.removeprefix("max_")], nan=np.inf)))
            self.gains[key] = largest if before is None else max(before, largest)
        self.last_diagnostics = {f"final_{key}": plain(np.mean(values[key])) for key in STREAM_MEASURES}
        if not all(np.isfinite(values[key]).all() for key in ("stream_rms", "branch_rms")):
            self.first_nonfinite = self.step


def summary_of(
    config: ExperimentConfig,
    state: TrainState,
    history: History,
    flops: float,
    bits_per_nat: float,
    peak_before: int,
) -> dict[str, Any]:
    """The values of summary.json, which are those of the whole run however often it was stopped.

    steps                 updates in the saved state
    parameters            all; connection_parameters: those of connections
    flops_per_token       operations of one train step over its tokens, recomputation included (`cost.counts.flops`)
    step_time_s           median of the last 200 steps, without validation, diagnostics and checkpoints
    peak_memory_bytes     the most that arrays took on the first device.  It is the compiler's estimate of the train step where the
                          device keeps no count, or where something before the run in this process took more
    train_loss            mean of the losses of the last 10 steps, without those that are not finite
    validation_loss       of the last validation, and bits_per_byte
    max_*                 largest gain or error over depth and diagnostics steps; gains_overflowed: one of them is infinite
    final_*               mean over sub-layers at the last diagnostics step (`diagnostics.STREAM_MEASURES`)
    spikes                number of spike_steps (`SpikeDetector`)
    first_nonfinite_step  step at which a number that is not finite ended the run
    wall_clock_s          sum of compile_s, train_s, validation_s, diagnostics_s and checkpoint_s.  Reading text, making the first
                          state and steps lost to a kill are not included

    Args:
      config: with the size of the vocabulary.
      state: at the end.
      history: of the run.
      flops: `programs.flops_per_token`.
      bits_per_nat: of the validation batches.
      peak_before: `counts.device_peak` before the run.
    """
    parameters, of_connections = counts.parameter_counts(state.params)
    peak = counts.device_peak()
    finite = [loss for loss in history.losses if math.isfinite(loss)]
    validated = history.validation_loss
    return {
        "status": history.ended(config.train.steps) or "interrupted",
        "steps": history.step,
        **devices_of(config),
        "parameters": parameters,
        "connection_parameters": of_connections,
        "flops_per_token": flops,
        "step_time_s": statistics.median(history.step_times or [math.nan]),
        "peak_memory_bytes": peak if peak > peak_before else history.compiled_bytes,
        "train_loss": float(np.mean(finite)) if finite else None,
        "validation_loss": validated,
        "bits_per_byte": None if validated is None else validated * bits_per_nat,
        **history.gains,
        "gains_overflowed": math.inf in history.gains.values(),
        **history.last_diagnostics,
        "spikes": len(history.spikes.steps),
        "spike_steps": history.spikes.steps,
        "first_nonfinite_step": history.first_nonfinite,
        "wall_clock_s": sum(history.clock.seconds.values()),
        **history.clock.seconds,
    }
