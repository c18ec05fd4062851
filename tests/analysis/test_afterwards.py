"""Contrasts that were looked at after the results, on made-up losses whose answer is known."""

import pytest
from analysis.test_answers import RATES, additive, home_runs, margin_runs, mixing_runs, which_map_runs

from mhc_jax.analysis import afterwards, answers, rate_margins
from mhc_jax.analysis.contrasts import mean_of


def means(of):
    return {label: sum(values.values()) / len(values) for label, values in of.items()}


def test_of_which_map():
    found = means(afterwards.of_which_map(which_map_runs(additive(-0.01, -0.04, 0.0)), home_runs()))
    assert found["H_post, mean of the dynamic designs"] == pytest.approx(-0.04, abs=1e-3)
    assert found["H_post, dynamic - static"] == pytest.approx(0, abs=2e-3)
    assert found["H_res, home - (copy, dynamic)"] == pytest.approx(-0.03, abs=2e-3)
    # All of home have -0.01 for H_post, -0.03 for H_res, and +0.01 where pre and post are both learned.
    assert found["home, all maps learned - all but H_res"] == pytest.approx(-0.03, abs=2e-3)


def test_of_mixing_needed():
    answer = answers.mixing_needed(mixing_runs({"go_mhc": -0.02, "identity": 0.01}, 0.0))
    found = means(afterwards.of_mixing_needed(answer))
    assert found["go_mhc - identity"] == pytest.approx(-0.03)
    assert found["identity - mhc:init=home, n = 8"] == pytest.approx(0.01)
    assert found["identity - mhc:init=home, n = 8 minus n = 4"] == pytest.approx(0)


def test_of_muon_margin():
    runs = margin_runs(lambda connection, *_: {"residual": 11, "hc": 2}.get(connection, 4))
    answer = rate_margins.muon_margin(runs, 3.3, RATES)
    found = means(afterwards.of_muon_margin(answer))
    assert found["mhc:init=paper - hc, adamw"] == 2
    assert mean_of(answer.margins["mhc:init=paper", "adamw"]) == -7

    ends = afterwards.line_ends(answer, runs)
    # Of the 4th and 5th rate, margin_runs lets the one diverge whose place is a multiple of 3.
    assert ends["residual"] == (16, 16, 0, 2.5)
    assert ends["hc"] == (24, 0, 24, 2.5)
    assert ends["mhc:init=paper"] == (24, 0, 0, 2.5)

    losses = means(afterwards.losses_at_equal_rates(runs))
    assert losses["adamw, rate 0.001"] == 0
    assert losses["muon, connections under adamw, rate 2.048"] == 4.0 - 2.5
    assert set(losses) == {
        f"{optimizer}, rate {rate:g}" for optimizer in rate_margins.OPTIMIZERS for rate in (RATES[0], RATES[11])
    }
