"""Paired differences, intervals, p-values, verdicts, stability frontiers and power laws agree with SciPy and the textbook."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from support.thinned import thin

from mhc_jax.analysis.statistics import (
    MIN_SEEDS,
    MOST_SEEDS,
    equivalence,
    holm,
    paired,
    power_law,
    seeds_for_equivalence,
    seeds_to_resolve,
    sign_flip_p,
    stability_frontier,
    t_interval,
    verdict,
)
from mhc_jax.errors import InputError


def series(*values):
    return dict(enumerate(values))


LOSSES = st.lists(st.tuples(st.integers(-999, 999), st.integers(-999, 999)), min_size=3, max_size=6)
"""Losses of a variant and its baseline, in hundredths of a nat above 20."""


@settings(max_examples=30)
@given(LOSSES, st.integers(-500, 500), st.sampled_from([0.5, 2.0, 64.0]))
def test_p_values_and_interval_are_those_of_the_paired_test(losses, shift, scale):
    """They do so whatever the losses are.  A shift of all losses changes nothing, and the unit of the loss scales the interval."""
    a, b = 20 + np.asarray(losses).T / 100
    result, d = paired(series(*a), series(*b)), a - b
    assert result.differences == pytest.approx(d.tolist())
    if np.ptp(d) < 1e-9:
        assert (result.t_interval, result.p_t, result.p_lower, result.p_sign_flip, result.effect) == (None,) * 5
        return
    expected = stats.ttest_rel(a, b)
    assert result.p_t == pytest.approx(expected.pvalue, rel=1e-9)
    assert result.t_interval == pytest.approx(tuple(expected.confidence_interval()), rel=1e-9)
    assert result.p_lower == pytest.approx(stats.ttest_rel(a, b, alternative="less").pvalue, rel=1e-9)
    assert result.resolved == (expected.pvalue < 0.05)
    assert result.effect == (None if len(set(b)) == 1 else pytest.approx(d.mean() / b.std(ddof=1)))
    signs = np.stack(np.meshgrid(*[[-1, 1]] * len(d)), -1).reshape(-1, len(d))
    assert result.p_sign_flip == pytest.approx(np.mean(np.abs(signs @ d) >= abs(d.sum()) - 1e-9))
    moved = paired(series(*(scale * (a + shift))), series(*(scale * (b + shift))))
    assert moved.t_interval == pytest.approx([scale * end for end in result.t_interval], rel=1e-6, abs=1e-9)
    assert moved.p_t == pytest.approx(result.p_t, rel=1e-6, abs=1e-9)
    assert moved.effect == (None if result.effect is None else pytest.approx(result.effect, rel=1e-6, abs=1e-9))


@pytest.mark.parametrize("seeds", thin([3, 5, 8], lambda seeds: seeds == 3))
def test_the_interval_covers_the_truth_19_times_in_20(seeds):
    """2,000 paired experiments: seeds move both variants together, the difference is -0.03 with noise of its own."""
    rng = np.random.default_rng(seeds)
    shared = rng.normal(2, 0.1, (2000, seeds))
    differences = shared + rng.normal(-0.03, 0.05, (2000, seeds)) - shared
    covered = np.mean([low <= -0.03 <= high for low, high in map(t_interval, differences)])
    assert 0.93 <= covered <= 0.97
    # The two-sided test at 5 % rejects a true difference of 0 as often as the interval of it leaves 0 out.
    rejected = np.mean(stats.ttest_1samp(differences + 0.03, 0, axis=1).pvalue < 0.05)
    assert rejected == pytest.approx(1 - covered, abs=1e-12)


def test_seeds_are_paired_by_number_and_lost_ones_left_out():
    result = paired({0: 1.0, 1: math.nan, 3: 5.0, 2: 3.0, 4: 1.0}, {2: 2.0, 0: 3.0, 1: 0.0, 4: math.nan})
    assert (result.differences, result.mean) == ((-2.0, 1.0), -0.5)
    assert paired({0: 1.0}, {1: 1.0}) is paired({0: math.nan}, {0: 1.0}) is None


def test_many_seeds_flip_signs_at_random():
    assert sign_flip_p(np.full(20, 0.1)) <= 4 / 2**14
    assert sign_flip_p(np.tile([0.1, -0.1], 10)) == 1.0


@pytest.mark.parametrize(
    ("variant", "sentence"),
    [
        (series(1.9), "loss minus residual's -0.1000; one seed, no claim."),
        (series(1.9, 2.0), "loss minus residual's -0.1000, -0.2000; 2 seeds, no claim."),
        (series(1.9, 2.0, 2.1, 1.9), "resolved at this size: loss lower than residual's (-0.1500 ["),
        (series(2.0, 2.2, 2.21, 2.1), "not resolved at this size: the interval of loss minus residual's holds 0 ("),
        (series(2.5, 2.7, 2.7, 2.68), "resolved at this size: loss higher than residual's (+0.5200 ["),
        ({7: 1.0}, "no claim: no seed has a final loss here and in residual."),
    ],
)
def test_verdict(variant, sentence):
    assert verdict(paired(variant, series(2.0, 2.2, 2.2, 2.1)), "residual").startswith(sentence)


def test_fewer_seeds_than_three_and_equal_differences_have_no_interval():
    equal = paired(series(1.0, 2.0, 3.0), series(1.5, 2.5, 3.5))
    assert (equal.t_interval, equal.resolved) == (None, False)
    assert verdict(equal, "hc") == "no claim: the 3 differences from hc are all -0.5000, without spread."
    same = paired(series(1.0, 2.0, 3.0, 4.0, 5.0, 7.0), series(*[20.1] * 6))  # whose deviation rounds to 4e-15
    assert (same.effect, same.t_interval is None) == (None, False)
    few = paired(series(1.0, 1.1), series(2.0, 2.2))
    assert (few.t_interval, few.p_t, few.p_sign_flip, few.effect, few.resolved) == (*[None] * 4, False)
    assert MIN_SEEDS == 3
    assert paired(series(1.0, 1.1, 1.05), series(2.0, 2.2, 2.1)).resolved


def test_stability_frontier():
    losses = {1e-2: [2.0, 2.1], 1e-3: [2.5, 2.4], 3e-2: [2.0, None], 1e-1: [2.0, 2.0]}
    assert stability_frontier(losses, 3.0) == (1e-2, 3e-2)
    assert stability_frontier(losses, 2.1) == (None, 3e-2)
    assert stability_frontier({1e-3: [9.0], 1e-2: [2.0], 3e-2: [9.0]}, 3.0) == (1e-2, 3e-2), "the lowest rate is slow"
    assert stability_frontier({1e-3: [2.0]}, 3.0) == (1e-3, None)
    assert stability_frontier({1e-3: [math.inf], 1e-2: [2.0]}, 3.0) == (None, 1e-3)
    assert stability_frontier({}, 3.0) == (None, None)
    assert stability_frontier({1e-3: [2.0], 1e-2: [3.0]}, 3.0) == (1e-3, 1e-2), "at the threshold is not below it"


def test_power_law_recovers_its_exponent_and_matches_linear_regression():
    x = np.asarray([1e9, 3e9, 1e10, 3e10])
    exact = power_law(x.tolist(), (5 * (x / 1e9) ** -0.1).tolist())
    assert exact.b == pytest.approx(0.1, rel=1e-6)
    assert exact.a * (1e9 / exact.x_0) ** -exact.b == pytest.approx(5, rel=1e-6)
    noisy = 5 * x**-0.1 * np.asarray([1.01, 0.98, 1.02, 1.0])
    fit = power_law(x.tolist(), noisy.tolist())
    line = stats.linregress(np.log(x), np.log(noisy))
    half = 4.30265 * line.stderr  # t(0.975, 2)
    assert fit.b == pytest.approx(-line.slope, rel=1e-6)
    assert fit.b_interval == pytest.approx((-line.slope - half, -line.slope + half), rel=1e-4)


def test_power_law_of_two_points_has_no_interval_and_of_one_is_refused():
    fit = power_law([1.0, 4.0], [2.0, 1.0])
    assert (fit.b, fit.b_interval) == (pytest.approx(0.5), None)
    with pytest.raises(InputError, match="two different sizes"):
        power_law([1.0, 1.0], [2.0, 1.0])


def test_equivalence_is_two_one_sided_tests_and_needs_the_interval_within_the_margin():
    random = np.random.default_rng(1)
    for mean in (0.0, 0.003, -0.02):
        d = random.normal(mean, 0.004, 8)
        result = equivalence(d.tolist(), 0.005)
        error, t = d.std(ddof=1) / math.sqrt(8), stats.t.ppf(0.95, 7)
        assert result.interval == pytest.approx((d.mean() - t * error, d.mean() + t * error))
        assert result.p == pytest.approx(stats.t.sf((0.005 - abs(d.mean())) / error, 7))
        assert result.equivalent == (result.p < 0.05)
    assert not equivalence([0.006, 0.0061, 0.0059], 0.005).equivalent
    assert equivalence([0.001, 0.002], 0.005) is equivalence([0.001] * 4, 0.005) is None


def test_holm_rejects_in_steps_and_keeps_the_order():
    p = [0.04, 0.001, 0.03, 0.02]
    assert holm(p) == pytest.approx([0.06, 0.004, 0.06, 0.06])
    assert holm([0.7, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def test_seeds_reach_the_power_that_simulation_finds():
    """The number returned has at least 80 % power, and one seed less has not, within the error of 40,000 draws."""
    random, draws = np.random.default_rng(2), 40_000

    def share(test, seeds, deviation, mean):
        return np.mean(test(random.normal(mean, deviation, (draws, seeds))))

    def resolved(d):
        return stats.ttest_1samp(d, 0, axis=1).pvalue < 0.05

    def equivalent(d):
        interval = stats.ttest_1samp(d, 0, axis=1).confidence_interval(0.9)
        return (interval.low > -0.005) & (interval.high < 0.005)

    for deviation in (0.006, 0.012):
        n = seeds_to_resolve(deviation, 0.01)
        assert share(resolved, n, deviation, 0.01) > 0.79 > share(resolved, n - 1, deviation, 0.01) - 0.02
        n = seeds_for_equivalence(deviation, 0.005)
        assert share(equivalent, n, deviation, 0) > 0.79 > share(equivalent, n - 1, deviation, 0) - 0.02
    assert seeds_to_resolve(0.03, 1e-6) == MOST_SEEDS
    assert seeds_to_resolve(1e-9, 1.0) == MIN_SEEDS
