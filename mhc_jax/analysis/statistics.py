"""Statistics over a handful of seeds: paired differences, stability frontiers and power laws.

One rule holds for every table, figure and sentence of the project: below `MIN_SEEDS` paired seeds there are differences, but no
interval, no p-value, no effect size and no claim.  SciPy computes the tests and intervals.

Letters: K is the number of seeds that both the variant and its baseline have.  d is the difference of one measurement at one
seed, variant minus baseline; for a loss, below 0 is better.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float
from scipy import stats

from mhc_jax.errors import require

CONFIDENCE = 0.95
MIN_SEEDS = 3
"""Smallest number of paired seeds for an interval.  With two seeds, the factor t of Student's 95 % interval would be 12.7."""
SPREAD = 1e-9
"""Losses, or differences of losses, count as equal if they deviate by at most this, in nats/token.

summary.json holds nine digits, so smaller deviations come from rounding.
"""
MOST_FLIPS = 2**14
"""Largest number of sign patterns that `sign_flip_p` tries: all patterns for up to 14 seeds, random patterns for more."""


@dataclass(frozen=True)
class Paired:
    """Differences of a variant from its baseline, paired by seed, and the statistics of these differences.

    The interval has a confidence of 95 %, and the p-values are two-sided.  Interval, p-values and effect are None below `MIN_SEEDS`
    seeds, and if the differences are all equal.
    """

    differences: tuple[float, ...]
    mean: float
    t_interval: tuple[float, float] | None
    r"""Student's interval of the mean difference: $\bar d \pm t_{0.975, K-1}\, s_d / \sqrt{K}$, with standard deviation $s_d$."""
    p_t: float | None
    r"""p-value of the paired t test, whose statistic is $\bar d \sqrt{K} / s_d$."""
    p_sign_flip: float | None
    r"""p-value of the permutation test that flips signs of the differences; with K seeds it is at least $2^{1-K}$."""
    effect: float | None
    """Mean difference divided by the baseline's standard deviation over the same seeds.  None if that deviation is 0."""

    @property
    def seeds(self) -> int:
        """Number K of seeds that both the variant and the baseline have."""
        return len(self.differences)

    @property
    def p_lower(self) -> float | None:
        """p-value of the one-sided paired t test whose alternative is a mean difference below 0, or None where `p_t` is None."""
        if self.p_t is None:
            return None
        return self.p_t / 2 if self.mean < 0 else 1 - self.p_t / 2

    @property
    def resolved(self) -> bool:
        """Whether there is an interval of the mean difference and 0 lies outside it."""
        return self.t_interval is not None and (self.t_interval[0] > 0 or self.t_interval[1] < 0)


def paired(variant: Mapping[Any, float], baseline: Mapping[Any, float]) -> Paired | None:
    """Compare a variant with its baseline seed by seed.  The result is None if no seed has a finite value in both.

    Args:
      variant: values of one measurement of the variant, by seed.
      baseline: values of the same measurement of the baseline, by seed.
    """
    common = [s for s in variant if s in baseline and math.isfinite(variant[s]) and math.isfinite(baseline[s])]
    if not common:
        return None
    base = np.asarray([baseline[s] for s in common])
    d = np.asarray([variant[s] for s in common]) - base
    interval = p_t = p_flip = effect = None
    if len(d) >= MIN_SEEDS and np.ptp(d) > SPREAD:
        test: Any = stats.ttest_1samp(d, 0)
        interval, p_t, p_flip = t_interval(d), float(test.pvalue), sign_flip_p(d)
        effect = float(d.mean() / base.std(ddof=1)) if np.ptp(base) > SPREAD else None
    return Paired(tuple(d.tolist()), float(d.mean()), interval, p_t, p_flip, effect)


def t_interval(values: Float[np.ndarray, " K"]) -> tuple[float, float]:
    """Return Student's 95 % interval of the mean of at least two values."""
    interval = stats.ttest_1samp(values, 0).confidence_interval(CONFIDENCE)
    return float(interval.low), float(interval.high)


def sign_flip_p(differences: Float[np.ndarray, " K"]) -> float:
    """Return the two-sided p-value of the mean of paired differences in a permutation test that flips their signs.

    The p-value is exact for up to 14 differences.  For more, it is estimated from `MOST_FLIPS` random sign patterns.
    """
    test = stats.permutation_test(
        (differences,), np.mean, permutation_type="samples", n_resamples=MOST_FLIPS, rng=np.random.default_rng(0)
    )
    return float(test.pvalue)


def verdict(result: Paired | None, baseline: str) -> str:
    """Return one sentence that says whether a variant's loss differs from its baseline's, as far as the seeds allow.

    Args:
      result: result of `paired` for the variant's losses.
      baseline: name of the baseline.
    """
    if result is None:
        return f"no claim: no seed has a final loss here and in {baseline}."
    if result.seeds < MIN_SEEDS:
        which = "one seed" if result.seeds == 1 else f"{result.seeds} seeds"
        differences = ", ".join("0.0000" if abs(d) < 5e-5 else f"{d:+.4f}" for d in result.differences)
        return f"loss minus {baseline}'s {differences}; {which}, no claim."
    if result.t_interval is None:
        return f"no claim: the {result.seeds} differences from {baseline} are all {result.mean:+.4f}, without spread."
    low, high = result.t_interval
    size = f"{result.mean:+.4f} [{low:+.4f}, {high:+.4f}], {result.seeds} seeds"
    if result.resolved:
        side = "lower" if result.mean < 0 else "higher"
        return f"resolved at this size: loss {side} than {baseline}'s ({size})."
    return f"not resolved at this size: the interval of loss minus {baseline}'s holds 0 ({size})."


def stability_frontier(
    losses: Mapping[float, Sequence[float | None]], threshold: float
) -> tuple[float | None, float | None]:
    """Find the lowest unstable learning rate, and the largest stable learning rate below it.

    A rate is stable if the losses of all seeds are finite and below `threshold`, else unstable.  But a rate below all stable rates
    is unstable only if a loss is missing or not finite, because slow training alone may leave its losses above `threshold`.

    Args:
      losses: final losses of the seeds by learning rate, None for a run without a final loss.
      threshold: loss from which a run is unstable, in nats/token.

    Returns:
      (stable rate, unstable rate).  Either is None if there is no such rate in `losses`.
    """
    last = None
    for rate in sorted(losses):
        values = losses[rate]
        lost = not values or any(v is None or not math.isfinite(v) for v in values)
        if lost or (last is not None and any(v is not None and v >= threshold for v in values)):
            return last, rate
        if all(v is not None and v < threshold for v in values):
            last = rate
    return last, None


@dataclass(frozen=True)
class PowerLaw:
    r"""The law $\text{loss} = a (x / x_0)^{-b}$ of models of size x, where $x_0$ is the geometric mean of the sizes.

    The law is fitted to the logarithms by least squares, so that equal relative errors of losses count alike.
    """

    a: float
    b: float
    x_0: float
    b_interval: tuple[float, float] | None
    """Student's 95 % interval of the exponent b.  None for two models, whose losses a power law fits exactly."""


def power_law(x: Sequence[float], loss: Sequence[float]) -> PowerLaw:
    """Fit a power law to the losses of models of several sizes.

    Args:
      x: size of each model: training FLOPs, or any other positive size.
      loss: loss of each model, positive.

    Raises:
      InputError: there are fewer than two different sizes, or a value is not positive.
    """
    require(
        len(set(x)) >= 2 and min(*x, *loss) > 0, "A power law takes at least two different sizes, and positive values."
    )
    log_x, log_loss = np.log(np.asarray(x, float)), np.log(np.asarray(loss, float))
    line: Any = stats.linregress(log_x, log_loss)
    b_interval = None
    if len(x) > 2:
        half = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(x) - 2) * line.stderr)
        b_interval = float(-line.slope) - half, float(-line.slope) + half
    return PowerLaw(float(np.exp(log_loss.mean())), float(-line.slope), float(np.exp(log_x.mean())), b_interval)


@dataclass(frozen=True)
class Equivalence:
    """Result of two one-sided t tests (TOST) on paired differences (Schuirmann 1987).

    Both means beyond the margin, above and below, are rejected at 5 % if the 90 % interval of the mean lies within the margin.
    """

    margin: float
    interval: tuple[float, float]
    """Student's 90 % interval of the mean difference."""
    p: float
    """The larger of the p-values of the two one-sided tests."""

    @property
    def equivalent(self) -> bool:
        """Whether the 90 % interval lies within the margin on both sides of 0."""
        return -self.margin < self.interval[0] and self.interval[1] < self.margin


def equivalence(differences: Sequence[float], margin: float) -> Equivalence | None:
    """Test whether the mean of paired differences lies within a margin of 0.  None below `MIN_SEEDS` differences or without spread.

    Args:
      differences: one difference for each seed.
      margin: largest mean difference that counts as none, in the unit of the differences.

    Examples:
      >>> equivalence([0.001, -0.001, 0.002, 0.0], 0.005).equivalent
      True
    """
    d = np.asarray(differences, float)
    if len(d) < MIN_SEEDS or np.ptp(d) <= SPREAD:
        return None
    above: Any = stats.ttest_1samp(d, -margin, alternative="greater")
    below: Any = stats.ttest_1samp(d, margin, alternative="less")
    interval = stats.ttest_1samp(d, 0).confidence_interval(2 * CONFIDENCE - 1)
    return Equivalence(margin, (float(interval.low), float(interval.high)), float(max(above.pvalue, below.pvalue)))


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values corrected for their number by the method of Holm (1979), in the order in which they are given.

    Examples:
      >>> holm([0.01, 0.04, 0.03])
      [0.03, 0.06, 0.06]
    """
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    out, largest = [0.0] * len(order), 0.0
    for rank, k in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * p_values[k]))
        out[k] = largest
    return out


MOST_SEEDS = 10_000
"""Largest number of seeds that the two functions below return.  Where more are needed they return this number."""


def seeds_to_resolve(deviation: float, effect: float, power: float = 0.8) -> int:
    """Return the number of seeds with which a paired t test at 5 % finds a mean difference of size `effect` with this power.

    Args:
      deviation: standard deviation of the differences over seeds, in the unit of `effect`.
      effect: the mean difference.
      power: probability that the test resolves it.

    Examples:
      >>> seeds_to_resolve(0.012, 0.01)
      14
    """

    def resolved(seeds: int) -> float:
        t = stats.t.ppf((1 + CONFIDENCE) / 2, seeds - 1)
        shift = abs(effect) / deviation * math.sqrt(seeds)
        return float(stats.nct.sf(t, seeds - 1, shift) + stats.nct.cdf(-t, seeds - 1, shift))

    return _fewest(resolved, power)


def seeds_for_equivalence(deviation: float, margin: float, power: float = 0.8) -> int:
    """Return the number of seeds with which TOST at 5 % finds equivalence with this power, if the true mean difference is 0.

    Args:
      deviation: standard deviation of the differences over seeds, in the unit of `margin`.
      margin: margin of the test.
      power: probability that the test finds equivalence.

    Examples:
      >>> seeds_for_equivalence(0.005, 0.005)
      11
    """
    # For each size s of the sample's standard deviation, the mean must lie within margin - t s / sqrt(seeds).
    quantiles = (np.arange(2000) + 0.5) / 2000

    def equivalent(seeds: int) -> float:
        error = deviation / math.sqrt(seeds)
        s = np.sqrt(stats.chi2.ppf(quantiles, seeds - 1) / (seeds - 1))
        room = margin / error - stats.t.ppf(CONFIDENCE, seeds - 1) * s
        return float(np.mean(np.where(room > 0, 2 * stats.norm.cdf(room) - 1, 0.0)))

    return _fewest(equivalent, power)


def _fewest(power_of: Callable[[int], float], power: float) -> int:
    """Return the smallest number of seeds, from `MIN_SEEDS` to `MOST_SEEDS`, whose power reaches `power`."""
    low, high = MIN_SEEDS - 1, MIN_SEEDS
    while high < MOST_SEEDS and power_of(high) < power:
        low, high = high, min(2 * high, MOST_SEEDS)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if power_of(middle) >= power else (middle, high)
    return high
