"""Times of train steps that take turns in one process, so that whatever else runs on the machine slows all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping

import jax

from mhc_jax.config import ExperimentConfig
from mhc_jax.remat_plan import resolve
from mhc_jax.timing.step_times import CompiledStep, compile_step, random_batch
from mhc_jax.timing.worker_steps import WorkerStep


def median_times(steps: Mapping[str, CompiledStep | WorkerStep], rounds: int) -> dict[str, float]:
    """Time compiled train steps, one for each connection, and return the median seconds of each over all rounds, by name.

    In a round each of them runs twice, and the second time counts, so that a step follows itself as it does in training.
    """
    times: dict[str, list[float]] = {name: [] for name in steps}
    for k in range(rounds):
        for name in list(steps) if k % 2 else list(steps)[::-1]:
            for _ in range(2):
                began = time.perf_counter()
                steps[name].launch(k)
                jax.block_until_ready(steps[name].state)
                seconds = time.perf_counter() - began
            times[name].append(seconds)
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def step_beside_baseline(config: ExperimentConfig, baseline: ExperimentConfig, rounds: int) -> tuple[float, float]:
    """Return the median seconds of a train step with `config`, and with `baseline`, which take turns in this process.

    In neither configuration model.vocab_size may be 0.
    """
    steps = {}
    for name, one in (("baseline", baseline), ("entry", config)):
        resolved = resolve(one)[0]
        steps[name] = compile_step(resolved, random_batch(resolved))
    medians = median_times(steps, rounds)
    return medians["entry"], medians["baseline"]
