"""The decisions of the three questions on made-up losses whose answer is known, by the rules in the sweep files."""

import copy
import dataclasses
import itertools
import math
import re
import runpy
from pathlib import Path

import numpy as np
import pytest
from support.tiny_runs import ROOT

from mhc_jax import connections
from mhc_jax.analysis import answers, rate_margins
from mhc_jax.analysis.contrasts import contrasts, equal_time
from mhc_jax.analysis.run_reader import RunRecord
from mhc_jax.config import ExperimentConfig
from mhc_jax.config.mapping import to_mapping
from mhc_jax.errors import InputError
from mhc_jax.plots import answers as figures
from mhc_jax.reports import answers as tables
from mhc_jax.reports import rate_margins as margin_tables

BASE = to_mapping(ExperimentConfig())
SWEEPS = ROOT / "experiments" / "sweeps"


def made(spec, seed, loss, **optimizer):
    """A finished run with this final loss, or a diverged one if the loss is None."""
    config = copy.deepcopy(BASE)
    config["model"]["connection"] = to_mapping(connections.parse(spec))
    config["train"]["seed"] = config["data"]["seed"] = seed
    config["optimizer"] |= optimizer
    summary = {"status": "diverged"} if loss is None else {"status": "finished", "validation_loss": loss}
    return RunRecord("run", Path("run"), config, {}, summary, {}, {}, [], [])


def which_map_runs(effect, deviation=0.001, seeds=8):
    """Runs of every cell of which_map.py, whose loss is `effect` of the set of learned maps plus noise."""
    random, sweep = np.random.default_rng(0), runpy.run_path(str(SWEEPS / "which_map.py"))["get_sweep"]()
    runs = []
    for point in sweep.points:
        if point["seed"] < seeds:
            run = made(point["connection"], point["seed"], 0.0)
            cell = answers.cell_of(run)
            loss = 2.2 + 0.1 * point["seed"] + random.normal(0, deviation) + (effect(cell[2]) if cell else 0.0)
            runs.append(made(point["connection"], point["seed"], loss))
    return runs


def additive(pre, post, res, both=0.0):
    return lambda m: pre * ("pre" in m) + post * ("post" in m) + res * ("res" in m) + both * ({"pre", "post"} <= m)


def test_every_point_of_the_factorial_is_a_cell_and_every_design_is_whole():
    runs = which_map_runs(additive(0, 0, 0), seeds=1)
    cells = answers.cells(runs)
    subsets = [frozenset(s) for k in range(4) for s in itertools.combinations(answers.MAPS, k)]
    assert {*cells} == {*itertools.product(("copy", "scaled"), ("static", "dynamic"), subsets)}
    assert sum(answers.cell_of(run) is None for run in runs) == 2, "lanes and scalar_gated"


def test_effects_are_those_that_the_losses_were_made_of():
    """An interaction d of pre and post adds d / 2 to both main effects and is d / 2 itself.  The odd effects sum to the total."""
    result = answers.which_map(which_map_runs(additive(-0.01, -0.04, 0.002, both=0.02), deviation=0.0))
    for effects in result.designs.values():
        expected = {
            "pre": 0.0,
            "post": -0.03,
            "res": 0.002,
            "prexpost": 0.01,
            "prexres": 0,
            "postxres": 0,
            "prexpostxres": 0,
        }
        assert {c.label: c.result.mean for c in effects} == pytest.approx(expected, abs=1e-12)
    for design, total in result.total.items():
        odd = [c.result.mean for c in result.designs[design] if c.label.count("x") != 1]
        assert sum(odd) == pytest.approx(total.result.mean)


def test_the_map_that_carries_the_gain_is_below_both_others():
    result = answers.which_map(which_map_runs(additive(-0.01, -0.04, 0.0)))
    assert result.winner == "post"
    assert [c.label for c in result.primary if c.resolved] == ["pre", "post"]
    assert result.against["post", "pre"].result.mean == pytest.approx(-0.03, abs=2e-3)
    assert answers.which_map(which_map_runs(additive(0.02, 0.03, 0.01))).winner is None, "none is negative"
    tie = answers.which_map(which_map_runs(additive(-0.02, -0.0201, 0.0), deviation=0.01))
    assert tie.winner is None
    assert tie.seeds_needed > 8


def test_a_diverged_run_takes_its_seed_out_of_its_design():
    runs = which_map_runs(additive(0, 0, 0))
    k = next(k for k, run in enumerate(runs) if answers.cell_of(run) == ("copy", "static", frozenset({"post"})))
    runs[k] = made(runs[k].connection, runs[k].seed[0], None)
    result = answers.which_map(runs)
    seeds = {design: {len(c.values) for c in effects} for design, effects in result.designs.items()}
    assert seeds == {d: {7 if d == ("copy", "static") else 8} for d in seeds}
    assert {len(c.values) for c in result.primary} == {7}


def home_runs():
    sweep = runpy.run_path(str(SWEEPS / "which_map_home.py"))["get_sweep"]()
    random, runs = np.random.default_rng(2), []
    for point in sweep.points:
        run = made(point["connection"], point["seed"], 0.0, name=point["optimizer.name"])
        loss = 2.2 + random.normal(0, 0.001) + additive(0.0, -0.01, -0.03, both=0.01)(answers.cell_of(run)[2])
        runs.append(made(point["connection"], point["seed"], loss, name=point["optimizer.name"]))
    return runs


def test_the_design_with_streams_that_differ_has_its_own_decision():
    runs = home_runs()
    answer = answers.which_map_home(runs)
    assert answer.winner == "res"
    assert [c.result.mean for c in answer.primary] == pytest.approx([0.005, -0.005, -0.03], abs=1e-3)
    assert answer.total.result.mean == pytest.approx(-0.03, abs=1e-3)
    text = tables.which_map_part(which_map_runs(additive(0, 0, 0)), runs, [], [], {})
    assert "**Decision by the rule of this sweep: H_res carries the lower loss.**" in text
    with pytest.raises(InputError, match="1 of the 8 cells of which_map_home have no run"):
        answers.which_map_home([run for run in runs if answers.cell_of(run)[2]])


def mixing_runs(shift, deviation):
    random, sweep = np.random.default_rng(1), runpy.run_path(str(SWEEPS / "mixing_needed.py"))["get_sweep"]()
    loss = lambda p: 2 + 0.1 * p["seed"] + shift.get(p["connection"].split(":")[0], 0) + random.normal(0, deviation)  # noqa: E731
    return [made(p["connection"], p["seed"], loss(p)) for p in sweep.points]


def test_kinds_are_equivalent_different_or_not_resolved():
    result = answers.mixing_needed(mixing_runs({"diagonal": 0.02, "go_mhc": -0.003, "identity_mix": 0.0}, 0.002))
    assert {kind: c.verdict for kind, c in result.primary.items()} == {
        "identity": "equivalent",
        "diagonal": "higher",
        "identity_mix": "equivalent",
        "go_mhc": "equivalent and lower",
    }
    assert result.decision == "not needed"
    assert {*result.combinations} == {*itertools.product((4, 8), ("copy", "scaled"))}
    assert answers.mixing_needed(mixing_runs({"identity": 0.02}, 0.002)).decision == "needed"
    noisy = answers.mixing_needed(mixing_runs({}, 0.05))
    assert noisy.decision == "not resolved"
    assert noisy.primary["identity"].verdict.startswith(
        "not resolved; if the kinds do not differ, equivalence would need about "
    )


RATES = [1e-3 * 2**k for k in range(12)]
CONNECTIONS = ("residual", "hc", "mhc:init=paper")


def margin_runs(top):
    """The runs that a bisection trains, if the largest stable rate is the `top`-th of (connection, name, apart, clip, seed)."""
    runs = []
    for connection, (name, apart), clip, seed in itertools.product(
        CONNECTIONS, [("adamw", ""), ("muon", ""), ("muon", "adamw")], (1.0, 0.0), range(4)
    ):
        if connection == "residual" and apart:
            continue
        last = top(connection, name, apart, clip, seed)
        for k in {last, last + 1, 0, 11} & {*range(12)}:
            loss = 2.5 if k <= last else [None, 3.3, 4.0][k % 3]
            settings = {"name": name, "connections": apart, "grad_clip": clip, "learning_rate": RATES[k]}
            runs.append(made(connection, seed, loss, **settings))
    return runs


def decided(top):
    return rate_margins.muon_margin(margin_runs(top), loss_below=3.3, grid=RATES)


def test_the_margin_is_in_octaves_over_residual_of_the_same_optimizer_clipping_and_seed():
    result = decided(
        lambda c, name, apart, clip, seed: 3 + (c != "residual") * (2 + seed % 2) - (name == "muon") + (clip == 0)
    )
    for optimizer in ("adamw", "muon", "muon, connections under adamw"):
        assert result.margins["mhc:init=paper", optimizer].values == {0: 2, 1: 3, 2: 2, 3: 3}
    assert [result.decision(o) for o in ("muon", "muon, connections under adamw")] == ["survives"] * 2
    assert result.censored == 0
    line = rate_margins.Line("residual", "adamw", 0.0, 1)
    assert result.rates[line] == (RATES[4], RATES[5])


def test_a_margin_that_muon_takes_away_is_lost_and_a_noisy_one_is_not_resolved():
    same = lambda c, name, apart, clip, seed: 4 + 2 * (c != "residual" and name == "adamw")  # noqa: E731
    assert decided(same).decision("muon") == "is lost", "without spread, equal margins count as resolved"
    noisy = lambda c, name, apart, clip, seed: 4 + (c != "residual" and name == "adamw") * [2, -2, 1, 0][seed]  # noqa: E731
    assert decided(noisy).decision("muon") == "not resolved"


def test_a_line_without_an_end_is_counted():
    result = decided(lambda c, name, apart, clip, seed: -1 if c == "hc" else 11 if c == "mhc:init=paper" else 4)
    assert result.rates[rate_margins.Line("hc", "adamw", 1.0, 0)] == (None, RATES[0])
    assert result.rates[rate_margins.Line("mhc:init=paper", "adamw", 1.0, 0)] == (RATES[11], None)
    assert result.censored == 2 * 3 * 2 * 4
    assert {*result.margins["hc", "adamw"].values.values()} == {-5.0}


def test_equal_time_compares_with_residual_after_as_many_steps_as_take_as_long():
    longer = {steps: {s: 3 - math.log(steps) + s for s in range(3)} for steps in (600, 900, 1800)}
    assert equal_time({0: -3.0, 1: -2.0, 7: 0.0}, 2.0, longer) == pytest.approx(
        {s: -3.0 - (3 - math.log(1200)) for s in (0, 1)}
    )
    assert equal_time({0: 1.0}, 3.1, longer) is None
    assert equal_time({0: 1.0}, 0.9, longer) is None


def test_the_page_has_the_decisions_and_the_numbers_of_the_tests():
    runs = which_map_runs(additive(-0.01, -0.04, 0.0))
    answer = answers.which_map(runs)
    text = tables.which_map_part(runs, [], [r for r in runs if answers.cell_of(r)], [], {})
    post = answer.primary[1].result
    low, high = post.t_interval
    assert "**Decision by the rule: H_post carries the lower loss.**" in text
    assert f"| H_post | {post.mean:+.4f} | {low:+.4f} to {high:+.4f} |" in text
    assert "256 runs (256 finished, 0 diverged)" in text
    held = "Not shown to have moved, because the 95 % interval holds the smaller model's mean: H_pre, H_post, H_res."
    assert f"{held} The three effects have the same order." in text
    assert text.count("| scaled, dynamic: ") == 7 + 1
    risen = {"mhc": {0: 0.01, 1: 0.02, 2: 0.03}}
    shares = {"mhc": [(0.01, 0.02), (0.01, 0.04)], "identity": [(0.0, 0.0)]}
    text = tables.mixing_needed_part(mixing_runs({}, 0.05), risen, shares, [], {})
    assert "**Decision by the rule: not resolved.**" in text
    assert "| `mhc` | +0.0200 |" in text
    assert "| `mhc` | 0.0100 | 0.0300 | 2 |" in text
    assert "| `identity` | 0.0000 |" not in text
    text = tables.mixing_needed_part(mixing_runs({"go_mhc": -0.02, "identity": 0.01}, 0.0), {}, {}, [], {})
    assert "| go_mhc - identity | -0.0300 |" in text
    text = margin_tables.muon_margin_part(margin_runs(lambda c, *_: 3 + (c != "residual")), 3.3, RATES, [], {})
    assert "**Decision by the rule, muon: survives.**" in text
    assert "| mhc:init=paper, muon | 0.016 (0.016 to 0.016) | 0.016 (0.016 to 0.016) |" in text


def test_equal_time_has_a_row_for_each_connection_whose_time_is_known():
    runs = which_map_runs(additive(-0.01, -0.04, 0.0))
    longer = [made("residual", seed, 2.2 - 0.01 * k) for k in range(3) for seed in range(8)]
    for k, run in enumerate(longer):
        run.config["train"]["steps"] = [600, 900, 1800][k // 8]
    text = tables.which_map_part(runs, [], [], longer, {"lanes": 1.2, "scalar_gated": 9.0, "residual": 1.0})
    assert text.count("| `lanes` | -") + text.count("| `lanes` | +") == 1
    assert "| `scalar_gated` | – | – | – | 0 | 9.00 |" in text, "beyond the longest run of residual"
    assert "| `mhc:init=paper` | – | – | – | 0 | – |" in text, "its time is not known"
    longer[-1] = made("residual", 7, None)
    longer[-1].config["train"]["steps"] = 1800
    row = tables.which_map_part(runs, [], [], longer, {"lanes": 1.2}).partition("| `lanes` |")[2].split("|")
    assert row[3].strip() == "8", "the lost run of 1800 steps is not next to 720 steps"


def test_best_losses_are_of_the_best_rate_on_both_sides():
    runs = []
    for connection, loss in (("residual", 2.0), ("mhc:init=paper", 1.9)):
        for rate, more in ((1e-3, 0.2), (4e-3, 0.0), (1.6e-2, None)):
            for seed in range(3):
                found = (
                    None
                    if more is None and seed == 2
                    else loss + (more or 0.0) - 0.3 * (more is None) + 0.01 * seed * rate
                )
                runs.append(made(connection, seed, found, name="adamw", learning_rate=rate))
                runs[-1] = dataclasses.replace(runs[-1], name=f"{connection}-{rate:g}-{seed}")
    norms = {run.name: 10.0 * run.seed[0] + (run.config["optimizer"]["learning_rate"] > 0.01) * 100 for run in runs}
    text = margin_tables.muon_margin_part(margin_runs(lambda *_: 3), 3.3, RATES, runs, norms)
    assert "| mhc:init=paper, adamw | 0.004 | 1.9000 | -0.1000 | no spread | 20 | 0 | 1 | 0.016 |" in text, (
        "a rate at which a run diverged is not the best"
    )


def test_figures_draw_every_test_and_every_seed():
    runs = which_map_runs(additive(-0.01, -0.04, 0.0))
    (axis,) = figures.which_map_figure(answers.which_map(runs)).axes
    assert len(axis.get_yticklabels()) == 3 + 4 * 3
    (axis,) = figures.which_map_figure(answers.which_map(runs), answers.which_map_home(home_runs())).axes
    assert [label.get_text() for label in axis.get_yticklabels()][3:6] == [
        f"H_{m}, which_map_home" for m in ("pre", "post", "res")
    ]
    (axis,) = figures.mixing_needed_figure(answers.mixing_needed(mixing_runs({}, 0.01))).axes
    assert len(axis.get_yticklabels()) == 4 + 4 * 4
    panels = figures.muon_margin_figure(decided(lambda c, *_: 3 + (c == "hc"))).axes
    drawn = [sorted({round(float(y), 9) for line in axis.lines for y in line.get_ydata()}) for axis in panels]
    assert drawn == [pytest.approx([RATES[3], RATES[4]])] * 3
    bounds = decided(lambda c, *_: -1 if c == "hc" else 11 if c == "residual" else 4)
    marks = {
        (line.get_marker(), round(float(line.get_ydata()[0]), 9))
        for line in figures.muon_margin_figure(bounds).axes[0].lines
    }
    assert marks >= {("v", RATES[0] / 2), ("^", RATES[11]), ("o", RATES[4])}


def test_a_bound_that_could_overturn_a_decision_leaves_it_open():
    """Under Muon every rate is stable for both, so that the margin there is not known to be smaller than AdamW's 3 octaves."""
    ends = "not resolved, because the grid of rates ends"
    assert decided(lambda c, name, *_: 11 if name == "muon" else 4 + 3 * (c != "residual")).decision("muon") == ends
    assert decided(lambda c, name, *_: 11 if name == "muon" and c != "residual" else 4).decision("muon") == "survives"
    assert decided(lambda c, name, *_: -1 if c == "residual" else 4).decision("muon") == "survives"


def test_what_is_lost_or_not_told_is_said():
    runs = which_map_runs(additive(-0.01, -0.04, 0.0))
    larger = [run for run in runs if run.seed[0] < 3]
    k = next(k for k, run in enumerate(runs) if run.connection == "lanes")
    runs[k] = made("lanes", runs[k].seed[0], None)
    text = tables.which_map_part(runs, [], [run for run in larger if run.seed[0] < 2], [], {})
    assert "**1 of 256 runs have no final loss**: `lanes` seed 0 (diverged)." in text
    assert "Not told, because too few seeds finished: H_pre, H_post, H_res.\n" in text
    assert "the same order" not in text
    decision = "**Decision by the rule of this sweep: {}.**"
    assert decision.format("not told") in text
    assert decision.format("the answer has kept its order") in tables.which_map_part(runs, [], larger, [], {})
    frozen = made("mhc:init=home", 3, None, name="experiments/sweeps/which_map_home.py:learn_pre_res")
    assert "`learn_pre_res` seed 3" in tables._lost([frozen])[0]
    moved = tables.which_map_part(
        runs, [], [run for run in which_map_runs(additive(-0.01, -0.06, 0.0)) if run.seed[0] < 3], [], {}
    )
    assert "Moved, because the 95 % interval excludes the smaller model's mean: H_post. Not shown" in moved
    assert decision.format("the answer has moved") in moved
    assert "would be resolved with about" not in moved, "H_post is resolved"
    noisy = [run for run in which_map_runs(additive(0, 0, 0), deviation=0.05) if run.seed[0] < 3]
    assert re.search(r"H_\w+ would be resolved with about \d+ seeds", tables.which_map_part(runs, [], noisy, [], {}))


def test_a_decision_that_is_resolved_needs_no_more_seeds():
    """The lowest effect is above 0, so that no map carries the gain, but it is told apart from the next."""
    answer = answers.which_map(which_map_runs(additive(0.02, 0.03, 0.01)))
    assert (answer.winner, answer.seeds_needed) == (None, None)


def test_records_that_lack_a_part_of_the_protocol_are_refused():
    runs = which_map_runs(additive(0, 0, 0), seeds=3)
    gone = ("copy", "static", frozenset({"post"}))
    with pytest.raises(InputError, match="1 of the 8 cells of the design copy, static have no run"):
        answers.which_map([run for run in runs if answers.cell_of(run) != gone])
    with pytest.raises(InputError, match="diagonal has no run with 4 streams and entry=copy"):
        answers.mixing_needed([run for run in mixing_runs({}, 0.01) if run.kind != "diagonal"])
    for name in ("residual", "mhc:init=paper"):
        with pytest.raises(InputError, match=f"No run has {name}, which the rule needs"):
            rate_margins.muon_margin([run for run in margin_runs(lambda *_: 4) if run.connection != name], 3.3, RATES)


def test_a_search_that_is_not_over_is_refused():
    runs = [run for run in margin_runs(lambda *_: 4) if run.config["optimizer"]["learning_rate"] != RATES[5]]
    with pytest.raises(InputError, match=r"is not over: rates between 0\.016 and 2\.048 were not tried"):
        rate_margins.muon_margin(runs, 3.3, RATES)


def test_numbers_without_spread_count_in_the_family():
    values = {"a": {0: 1.0, 1: 1.2, 2: 1.1}, "b": dict.fromkeys(range(3), 0.0), "c": dict.fromkeys(range(3), 2.0)}
    a, b, c = contrasts(values)
    assert a.p_holm == pytest.approx(2 * a.result.p_t), "c comes before it, and b after it"
    assert (b.p_holm, b.same, c.p_holm, c.same) == (None, False, None, True)


def test_higher_within_the_margin_is_not_needed():
    result = answers.mixing_needed(mixing_runs({"identity": 0.003}, 0.0005))
    assert (result.primary["identity"].verdict, result.decision) == ("equivalent and higher", "not needed")
    assert answers.mixing_needed(mixing_runs({}, 0.0)).primary["identity"].verdict == "not resolved"
