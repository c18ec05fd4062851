"""The history of a run: times, losses, spikes and gains of its steps, how it ended, and its summary."""

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
"""summary.json is made from the times of the last `KEPT_TIMES` steps and the losses of the last `KEPT_LOSSES` steps."""


class Clock:
    """A clock that adds up the seconds that a run spends on each kind of work, such as compilation or validation."""

    def __init__(self) -> None:
        parts = ("compile_s", "train_s", "validation_s", "diagnostics_s", "checkpoint_s")
        self.seconds: dict[str, float] = dict.fromkeys(parts, 0.0)
        self._step_began = 0.0

    @contextlib.contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Add the seconds that the body of the `with` statement takes to the total of `part`, such as `compile_s`."""
        began = time.perf_counter()
        yield
        self.seconds[part] += time.perf_counter() - began

    def restart_step(self) -> None:
        """Let the time of the next train step begin now, so that validation or saving before it does not count."""
        self._step_began = time.perf_counter()

    def end_step(self) -> float:
        """Return the seconds since the previous train step ended or `restart_step` was called, and add them to `train_s`."""
        now = time.perf_counter()
        elapsed, self._step_began = now - self._step_began, now
        self.seconds["train_s"] += elapsed
        return elapsed


@dataclass
class History:
    """The measurements of a run so far.  Checkpoints hold them, so that summary.json covers a run that was interrupted, too."""

    spikes: SpikeDetector = field(default_factory=lambda: SpikeDetector(SPIKE_WINDOW, SPIKE_THRESHOLD))
    clock: Clock = field(default_factory=Clock)
    step: int = 0
    """Number of optimizer updates that have been dispatched to the devices."""
    losses: list[float] = field(default_factory=list)
    """Losses of the last `KEPT_LOSSES` steps, in nats per token."""
    step_times: list[float] = field(default_factory=list)
    """Seconds that each of the last `KEPT_TIMES` steps took."""
    validation_loss: float | None = None
    gains: dict[str, float | None] = field(
        default_factory=lambda: dict.fromkeys(("max_composite_forward", "max_composite_backward", "max_column_error"))
    )
    """Largest composite gains, and largest error of a column sum of H_res, so far; None before the first diagnostics step."""
    last_diagnostics: dict[str, float | None] = field(
        default_factory=lambda: {f"final_{key}": None for key in STREAM_MEASURES}
    )
    diverged_at: int | None = None
    """Step at which the run diverged; None if it has not diverged."""
    first_nonfinite: int | None = None
    """Step with a loss, a gradient norm, or an RMS of streams or branches that is not finite; None if there is none."""
    compiled_bytes: int | None = None
    """Memory of the compiled train step in bytes, as the compiler estimates it; None if unknown."""

    def saved(self) -> dict[str, Any]:
        """Return the history as JSON values for `restore`.  Later steps change these values, so copy them to keep them."""
        return {**vars(self), "spikes": self.spikes.state(), "clock": self.clock.seconds}

    def restore(self, saved: dict[str, Any]) -> None:
        """Replace the content of this history by values that `saved` returned."""
        self.spikes = SpikeDetector(self.spikes.window, self.spikes.threshold, saved["spikes"])
        self.clock.seconds = saved["clock"]
        vars(self).update({f.name: saved[f.name] for f in fields(self) if f.name not in ("spikes", "clock")})

    def ended(self, steps: int) -> str | None:
        """Return `diverged` or `finished`, or None if the run has not diverged and has done fewer than `steps` steps."""
        if self.diverged_at is not None:
            return "diverged"
        return "finished" if self.step == steps else None

    def add_step(self, loss: float) -> float:
        """Record the loss and the time of a step that has ended, and return its seconds."""
        seconds = self.clock.end_step()
        self.step_times = [*self.step_times, seconds][-KEPT_TIMES:]
        self.losses = [*self.losses, loss][-KEPT_LOSSES:]
        return seconds

    def add_validation(self, loss: float) -> None:
        """Record the loss of a validation, and whether it is finite."""
        self.validation_loss = loss
        self.first_nonfinite = None if math.isfinite(loss) else self.step

    def add_diagnostics(self, values: dict[str, np.ndarray]) -> None:
        """Update the largest gains and the last stream measures, and note whether an RMS of streams or branches is not finite.

        Args:
          values: what `diagnostics.summarize` returned.
        """
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
    """Return the values of summary.json.  They cover the whole run, however often it was stopped.

    steps                 number of updates in the saved state
    parameters            number of all parameters; connection_parameters: number of the parameters of connections
    flops_per_token       FLOPs of one train step divided by its number of tokens, recomputation included (`cost.counts.flops`)
    step_time_s           median time of the last 200 steps, without validation, diagnostics and checkpoints
    peak_memory_bytes     most bytes that arrays took on the first device.  If the device keeps no count, or if the process had
                          taken as much before the run, it is the compiler's estimate of the train step
    train_loss            mean of the losses of the last 10 steps, without those that are not finite
    validation_loss       loss of the last validation; bits_per_byte: its value in bits per byte
    max_*                 largest composite gains and error of H_res's column sums, over sub-layers and diagnostics steps
    gains_overflowed      whether one of max_* is infinite
    final_*               means over sub-layers of `diagnostics.STREAM_MEASURES` at the last diagnostics step
    spikes                number of loss spikes; spike_steps: the steps at which they begin (`SpikeDetector`)
    first_nonfinite_step  step at which a number that is not finite ended the run
    wall_clock_s          sum of compile_s, train_s, validation_s, diagnostics_s and checkpoint_s.  It leaves out reading text,
                          making the first state, and steps lost to a kill

    Args:
      config: configuration of the run.
      state: train state at the end.
      history: history of the run.
      flops: FLOPs per token (`programs.flops_per_token`).
      bits_per_nat: factor from nats/token to bits per byte, over the validation batches.
      peak_before: most bytes that arrays took on the first device before the run (`counts.device_peak`).
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
