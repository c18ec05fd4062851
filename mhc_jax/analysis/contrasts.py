"""Numbers that each seed has once, such as the effect of a map: their means, differences and tests against 0.

All losses are final validation losses in nats/token, and below 0 a difference is better.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from mhc_jax.analysis.run_reader import RunRecord
from mhc_jax.analysis.statistics import MIN_SEEDS, Paired, holm, paired, seeds_to_resolve

ALPHA = 0.05
"""Level of every test."""

Seeds = Mapping[int, float]
"""One number for each seed."""


class Contrast(NamedTuple):
    """One number for each seed, such as the effect of a map, and its test against 0."""

    label: str
    values: Seeds
    result: Paired | None
    """The paired t test.  None if no seed has a value."""
    p_holm: float | None
    """p-value of the t test with Holm's correction over the family of contrasts that was tested with it."""

    @property
    def resolved(self) -> bool:
        """Whether the corrected p-value is below 5 %."""
        return self.p_holm is not None and self.p_holm < ALPHA

    @property
    def same(self) -> bool:
        """Whether three seeds or more all have the same number and it is not 0.  A t test has no spread then."""
        numbers = [*self.values.values()]
        return len(numbers) >= MIN_SEEDS and numbers[0] != 0 and len(set(numbers)) == 1


def contrasts(values: Mapping[str, Seeds]) -> list[Contrast]:
    """Test each of a family of numbers against 0, with Holm's correction over the whole family.

    A number without a t test counts in the family too: with p = 0 if `Contrast.same`, else with p = 1.
    """
    tested = [Contrast(k, seeds, paired(seeds, dict.fromkeys(seeds, 0.0)), None) for k, seeds in values.items()]
    p_values = [None if c.result is None else c.result.p_t for c in tested]
    counted = [float(not c.same) if p is None else p for c, p in zip(tested, p_values, strict=True)]
    corrected = zip(tested, p_values, holm(counted), strict=True)
    return [c._replace(p_holm=None if p is None else adjusted) for c, p, adjusted in corrected]


def final_losses(runs: Sequence[RunRecord]) -> Seeds:
    """Return the final validation loss of each finished run by its seed.  Runs that diverged are left out."""
    return {run.seed[0]: float(run.result("validation_loss")) for run in runs if run.status == "finished"}


def by_connection(runs: Sequence[RunRecord]) -> dict[str, Seeds]:
    """Return the final losses of runs by the text of their connection."""
    groups: dict[str, list[RunRecord]] = {}
    for run in runs:
        groups.setdefault(run.connection, []).append(run)
    return {connection: final_losses(members) for connection, members in groups.items()}


def mean_over(parts: Sequence[Seeds]) -> dict[int, float]:
    """Return the mean of several numbers for the seeds that have all of them."""
    common = set.intersection(*(set(part) for part in parts)) if parts else set()
    return {seed: float(np.mean([part[seed] for part in parts])) for seed in sorted(common)}


def minus(a: Seeds, b: Seeds) -> dict[int, float]:
    """Return a - b for the seeds that have both."""
    return {seed: a[seed] - b[seed] for seed in a if seed in b}


def needed(values: Seeds) -> int | None:
    """Return the seeds with which a paired t test would resolve the mean of these numbers with a power of 80 %, or None."""
    numbers = np.asarray(list(values.values()))
    if len(numbers) < 2 or not numbers.std() or not numbers.mean():
        return None
    return seeds_to_resolve(float(numbers.std(ddof=1)), float(numbers.mean()))


def mean_of(contrast: Contrast) -> float:
    """Return the mean of a contrast over seeds, and infinity if no seed has a value."""
    return contrast.result.mean if contrast.result else math.inf


def equal_time(losses: Seeds, ratio: float, longer: Mapping[int, Seeds]) -> dict[int, float] | None:
    """Return, for each seed, a connection's loss minus that of residual after as much time.  None outside the steps of `longer`.

    A seed needs its losses at the two numbers of steps in `longer` that are next to the wanted one.

    Args:
      losses: final losses of the connection, trained for the smallest number of steps in `longer`.
      ratio: time of a step of the connection over that of residual.
      longer: final losses of residual by the number of its steps.  Between two numbers of steps a loss is interpolated linearly in
        the logarithm of steps.
    """
    steps = sorted(longer)
    wanted = ratio * steps[0]
    if not steps[0] <= wanted <= steps[-1]:
        return None
    next_to = {max(s for s in steps if s <= wanted), min(s for s in steps if s >= wanted)}
    low, high = min(next_to), max(next_to)
    share = math.log(wanted / low) / math.log(high / low) if high > low else 0.0
    common = sorted(set(losses).intersection(longer[low], longer[high]))
    return {seed: losses[seed] - (1 - share) * longer[low][seed] - share * longer[high][seed] for seed in common}
