"""Contrasts that were looked at after the results, on made-up losses whose answer is known."""

import dataclasses

import pytest
from analysis.test_answers import RATES, additive, home_runs, margin_runs, mixing_runs, which_map_runs

from mhc_jax.analysis import afterwards, answers, rate_margins
from mhc_jax.errors import InputError
from mhc_jax.reports import answers as tables
from mhc_jax.reports import rate_margins as margin_tables


def means(of):
    return {label: sum(values.values()) / len(values) for label, values in of.items()}


def shifted(runs, shift):
    """Return the runs with `shift(run)` added to their losses."""
    loss = lambda run: {**run.summary, "validation_loss": run.summary["validation_loss"] + shift(run)}  # noqa: E731
    return [dataclasses.replace(run, summary=loss(run)) for run in runs]


def test_of_which_map():
    runs = which_map_runs(additive(-0.01, -0.04, 0.0))

    def more(run):
        """H_post gives 0.02 more where it is dynamic; scalar_gated lies 0.1 higher."""
        cell = answers.cell_of(run)
        return 0.1 * (run.kind == "scalar_gated") - 0.02 * bool(cell and cell[1] == "dynamic" and "post" in cell[2])

    before = means(afterwards.of_which_map(runs, home_runs()))
    found = means(afterwards.of_which_map(shifted(runs, more), home_runs()))
    assert found["H_post, mean of the dynamic designs"] == pytest.approx(-0.06, abs=1e-3)
    assert found["H_post, mean of the static designs"] == pytest.approx(-0.04, abs=1e-3)
    assert found["H_post, dynamic - static"] == pytest.approx(-0.02, abs=2e-3)
    # In home, H_post gives -0.01 and H_res -0.03, and pre and post together 0.01, which is 0.005 in each main effect.
    assert found["H_res, home - (copy, dynamic)"] == pytest.approx(-0.03, abs=2e-3)
    assert found["H_post, home - (copy, dynamic)"] == pytest.approx(-0.005 + 0.06, abs=2e-3)
    assert found["home, all maps learned - all but H_res"] == pytest.approx(-0.03, abs=2e-3)
    gated = "scalar_gated - mhc:init=paper"
    assert found[gated] - before[gated] == pytest.approx(0.1 + 0.02)
    higher = shifted(home_runs(), lambda run: 0.5 * (not answers.cell_of(run)[2]))
    nothing = "home, nothing learned - residual"
    assert means(afterwards.of_which_map(runs, higher))[nothing] - before[nothing] == pytest.approx(0.5)


def test_of_mixing_needed():
    runs = shifted(
        mixing_runs({"go_mhc": -0.02, "identity": 0.01}, 0.0),
        lambda run: 0.004 * (run.kind == "identity" and run.config["model"]["connection"]["num_streams"] == 8),
    )
    found = means(afterwards.of_mixing_needed(answers.mixing_needed(runs)))
    assert found["go_mhc - identity"] == pytest.approx(-0.032)
    assert found["identity - mhc:init=home, n = 4"] == pytest.approx(0.01)
    assert found["identity - mhc:init=home, n = 8"] == pytest.approx(0.014)
    assert found["identity - mhc:init=home, n = 8 minus n = 4"] == pytest.approx(0.004)


def test_of_muon_margin():
    runs = margin_runs(lambda connection, *_: {"residual": 11, "hc": 2}.get(connection, 4))
    answer = rate_margins.muon_margin(runs, 3.3, RATES)
    assert means(afterwards.of_muon_margin(answer))["mhc:init=paper - hc, adamw"] == 2

    ends = afterwards.line_ends(answer, runs)
    # A rate diverges in margin_runs if its place is a multiple of 3: HC's first unstable one does, mHC's does not.
    assert ends["residual"] == (16, 16, 0, 2.5)
    assert ends["hc"] == (24, 0, 24, 2.5)
    assert ends["mhc:init=paper"] == (24, 0, 0, 2.5)

    losses = means(afterwards.losses_at_equal_rates(runs))
    assert losses["adamw, rate 0.001"] == 0
    assert losses["muon, connections under adamw, rate 2.048"] == 4.0 - 2.5
    both = (RATES[0], RATES[11])
    assert set(losses) == {f"{optimizer}, rate {rate:g}" for optimizer in rate_margins.OPTIMIZERS for rate in both}


def test_parts_of_the_sweeps_are_enough_or_are_told():
    runs = margin_runs(lambda connection, *_: 4 if connection == "residual" else 5)
    few = [run for run in runs if run.kind in ("residual", "mhc")]
    text = margin_tables.muon_margin_part(few, 3.3, RATES, [], {})
    assert "octaves between largest stable rates" not in text
    assert "rates that all their lines tried" in text
    clipped = [run for run in few if run.config["optimizer"]["grad_clip"]]
    assert set(afterwards.losses_at_equal_rates(clipped)) == set(afterwards.losses_at_equal_rates(few))
    for lost in (set(), {"pre", "post", "res"}):
        home = [run for run in home_runs() if set(answers.cell_of(run)[2]) != lost]
        with pytest.raises(InputError, match="1 of the 8 cells of which_map_home have no run"):
            tables.which_map_part(which_map_runs(additive(0, 0, 0)), home, [], [], {})
