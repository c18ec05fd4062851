"""Grouping, baselines, verdicts, findings and the figures of variants follow one rule for comparisons and sweeps."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
from support.synthetic_runs import make_four, make_run

from mhc_jax import plots
from mhc_jax.analysis.comparison import findings, rows, statistics_rows, validation_gap
from mhc_jax.analysis.grouping import baselines, frontier_lines, group, loss_threshold, mean_record
from mhc_jax.analysis.run_reader import labels
from mhc_jax.errors import InputError
from mhc_jax.plots.sweeps import SWEEP_FIGURES

LOSS = {"residual": (2.00, 2.10, 2.05), "hc": (1.98, 2.13, 2.04), "mhc": (1.90, 2.01, 1.94)}
RATES = (1e-3, 1e-2)
INFERENCE = ("t interval", "p (t)", "p (sign flip)", "effect")


def write(root, name, kind, seed, rate=3e-3, loss=None, data_seed=None, connection=None, results=None, **more):
    """Write a synthetic run with this learning rate and, where it finishes, this final validation loss."""
    config = {"optimizer.learning_rate": rate, "data.seed": seed if data_seed is None else data_seed}
    config |= {f"model.connection.{key}": value for key, value in (connection or {}).items()} | more.pop("config", {})
    loss = {} if more.get("diverged_at") else {"validation_loss": LOSS[kind][seed] if loss is None else loss}
    return make_run(root, name, kind, seed=seed, config=config, results=loss | (results or {}), **more)


@pytest.fixture(scope="module")
def connections(tmp_path_factory):
    """Runs of three seeds of each connection; the largest gains of seed k are 10 k + 1."""
    root = tmp_path_factory.mktemp("connections")
    gains = [{f"max_composite_{side}": 10 * seed + 1 for side in ("forward", "backward")} for seed in range(3)]
    return [write(root, f"{kind}-seed{seed}", kind, seed, results=gains[seed]) for kind in LOSS for seed in range(3)]


@pytest.fixture(scope="module")
def rates(tmp_path_factory):
    """Runs at two learning rates; HC's second seed diverges at the higher one."""
    root, out = tmp_path_factory.mktemp("rates"), []
    for kind, rate, seed in itertools.product(LOSS, RATES, range(2)):
        lost = 120 if (kind, rate, seed) == ("hc", 1e-2, 1) else None
        out.append(write(root, f"{kind}-lr{rate}-seed{seed}", kind, seed, rate, diverged_at=lost))
    return out


@pytest.fixture(scope="module")
def singles(tmp_path_factory):
    return make_four(tmp_path_factory.mktemp("runs"))


def test_runs_that_differ_in_seeds_alone_are_one_variant(connections, rates):
    names = ["residual", "hc", "mhc:init=paper"]
    assert [(s.label, len(s.runs)) for s in group(connections)] == [(name, 3) for name in names]
    variants = group(rates)
    assert [s.label for s in variants] == [f"{name} lr={rate}" for name in names for rate in RATES]
    assert dict(variants[0].varying) == {"optimizer.learning_rate": 1e-3}
    assert (variants[3].diverged, variants[3].results("validation_loss")) == (1, {(0, 0): 1.98})
    for runs, sentence in (([connections[0]] * 2, "is the same run as"), ([], "no runs")):
        with pytest.raises(InputError, match=sentence):
            group(runs)


def test_runs_that_differ_in_the_seed_of_the_data_alone_are_runs_of_one_variant(tmp_path):
    both = itertools.product((("residual", 2.0), ("hc", 1.9)), range(3))
    runs = [write(tmp_path, f"{kind}-{k}", kind, 0, loss=loss + 0.1 * k * k, data_seed=k) for (kind, loss), k in both]
    residual, hc = group(runs)
    assert list(hc.runs) == [(0, 0), (0, 1), (0, 2)]
    assert labels(runs)[:3] == ["residual seed 0", "residual seeds 0/1", "residual seeds 0/2"]
    assert findings([residual, hc])[0].startswith("hc: no claim: the 3 differences from residual are all -0.1000")


def test_a_label_names_the_init_and_what_else_is_no_default(tmp_path):
    home = write(tmp_path, "a", "mhc", 0, connection={"init": "home", "t_max": 5})
    paper = write(tmp_path, "b", "mhc", 0, rate=1e-2)
    assert labels([home, paper]) == ["mhc:init=home:t_max=5 lr=0.003", "mhc:init=paper lr=0.01"]
    assert [s.label for s in group([home])] == ["mhc:init=home:t_max=5"]


def test_labels_leave_out_what_paths_share(tmp_path):
    def named(*optimizers):
        config = [{"optimizer.name": name} for name in optimizers]
        runs = [write(tmp_path / "+".join(optimizers) / str(k), "a", "hc", 0, config=c) for k, c in enumerate(config)]
        return labels(runs)

    assert named("my/sweeps/a.py:one", "my/sweeps/a.py:other") == ["hc optimizer=one", "hc optimizer=other"]
    assert named("my/a.py:one", "my/b.py:one") == ["hc optimizer=a.py:one", "hc optimizer=b.py:one"]
    assert named("adamw", "my/a.py:adamw") == ["hc optimizer=adamw", "hc optimizer=a.py:adamw"]
    for pair in (("a.py:f", "my/a.py:f"), ("my/", "my/a.py:f"), ("adamw", "my/")):
        assert named(*pair) == [f"hc optimizer={name}" for name in pair]


def bases(variants):
    return [variant.baseline and variant.baseline.label for variant in variants]


def test_a_baseline_agrees_in_everything_but_the_connection_and_a_sweep_chooses_it(rates):
    variants = group(rates)
    assert bases(variants) == [None, None, *["residual lr=0.001", "residual lr=0.01"] * 2]
    assert [s.is_baseline for s in variants] == [True, True] + 4 * [False]
    # Without residual the first connection is the baseline.
    variants = group([run for run in rates if run.kind != "residual"])
    assert bases(variants) == [None, None, "hc lr=0.001", "hc lr=0.01"]
    said = findings(variants)
    assert "mhc:init=paper lr=0.001: loss minus hc lr=0.001's -0.0800, -0.1200; 2 seeds, no claim." in said
    variants = group(rates, {"connection": "mhc"})
    assert variants[0].baseline is variants[4]
    rated = bases(group(rates, {"optimizer.learning_rate": 1e-3}))
    assert rated == [None, "residual lr=0.001", None, "hc lr=0.001", None, "mhc:init=paper lr=0.001"]


def test_a_confounded_pair_has_no_number(rates):
    runs = [*rates[:2], *rates[-2:]]  # residual at the lower rate, and mHC at the higher
    residual, mhc = group(runs)
    assert (residual.label, mhc.label) == ("residual lr=0.001", "mhc:init=paper lr=0.01")
    assert mhc.baseline is None
    said = f"{mhc.label}: not compared: no baseline agrees with it in the other settings."
    assert said in findings([residual, mhc])
    row = statistics_rows([residual, mhc])[1]
    assert row["verdict"].text == "not compared"
    assert [row[key].value for key in ("difference", *INFERENCE)] == [None] * 5
    assert rows(runs)[-1]["gap to baseline"].value is None


def test_settings_without_effect_separate_no_pairs_and_label_runs_that_nothing_else_tells_apart(tmp_path):
    more = {"train.trackers": ["wandb"], "train.checkpoint_every": 9, "mesh.data": 2}
    residual, hc = write(tmp_path, "residual", "residual", 0), write(tmp_path, "hc", "hc", 0, config=more)
    assert labels([residual, hc]) == ["residual", "hc"]
    assert baselines([residual, hc]) == [None, residual]
    other = write(tmp_path, "two", "hc", 0, config=more | {"mesh.data": 1})
    assert [variant.label for variant in group([hc, other])] == ["hc data=2", "hc data=1"]


def test_rows_hold_the_numbers_of_the_summaries_and_the_gap_its_step(singles, tmp_path):
    residual, hc, mhc, diverged = rows(singles)
    found = [residual[key] for key in ("parameters", "step time (ms)", "gap to baseline")]
    assert found == [("400k", 400_000), ("100", 0.1), ("–", None)]
    assert hc["parameters"] == ("403k (+0.75\N{NO-BREAK SPACE}%)", 403_000)
    found = [hc[key] for key in ("peak memory (MiB)", "max gain forward", "max gain backward", "spikes")]
    assert found == [("–", None), ("38.25", 38.25), ("52", 52), ("2", 2)]
    found = [mhc[key] for key in ("FLOPs per token", "step time (ms)", "peak memory (MiB)")]
    assert found == [("2.81M", 2.81e6), ("180 (×1.80)", 0.18), ("512", 512)]
    assert mhc["validation loss"].text == f"{1.7 + 3.9 * 2.718281828**-6 - 0.03:.4f}"
    assert mhc["gap to baseline"].text == "-0.0300"
    assert (diverged["status"].text, diverged["validation loss"].text) == ("diverged at step 120", "–")
    lost = make_run(tmp_path, "lost", "hc", diverged_at=120)
    assert rows([singles[0], lost])[1]["gap to baseline"].text == "-0.0300 (step\N{NO-BREAK SPACE}100)"
    assert validation_gap(lost, singles[0]) == (100, pytest.approx(-0.06 * 100 / 200))


def test_findings_claim_what_the_seeds_resolve_and_nothing_else(connections, rates):
    hc, mhc = findings(group(connections))[:2]
    assert hc.startswith("hc: not resolved at this size: the interval of loss minus residual's holds 0 (+0.0000 [")
    assert mhc.startswith(
        "mhc:init=paper: resolved at this size: loss lower than residual's (-0.1000 [-0.1248, -0.0752], 3 "
    )
    said = findings(group(rates))
    assert "hc lr=0.01: loss minus residual lr=0.01's -0.0200; one seed, no claim." in said
    assert "hc lr=0.01 diverged in 1 of 2 runs, at step 120: these have no final loss." in said
    for stable in (
        "hc: all runs finished below 2.455 nats/token at learning rate 0.001, not at 0.01; 2 seeds, no claim about stability.",
        "mhc:init=paper: all runs finished below 2.455 nats/token at learning rate 0.01, the largest whose runs have ended; 2",
    ):
        assert any(sentence.startswith(stable) for sentence in said)


def test_three_runs_for_each_rate_make_a_claim_about_stability(tmp_path):
    for count in (1, 3):
        runs = [
            write(tmp_path / str(count), f"{rate}-{seed}", "hc", seed, rate, loss=2.0)
            for rate in RATES
            for seed in range(count)
        ]
        (said,) = [sentence for sentence in findings(group(runs)) if "learning rate" in sentence]
        assert said.startswith("hc: stable up to learning rate 0.01, ") == (count == 3)
        assert said.endswith("; one seed, no claim about stability.") == (count == 1)
        assert ("at least 3 runs for each rate" in said) == (count == 3)
        figure = SWEEP_FIGURES["frontier"].draw(group(runs))
        names = [text.get_text() for text in figure.axes[0].get_yticklabels()]
        assert names == ["hc" if count == 3 else "hc (one seed, no claim)"]


def test_step_times_that_differ_over_seeds_have_a_range_and_no_ratio(tmp_path):
    def cells(*times):
        folder, runs = tmp_path / "-".join(map(str, times)), []
        for k, time in enumerate(times):
            kind = "residual" if k < 2 else "mhc"
            runs.append(write(folder, str(k), kind, k % 2, results={"step_time_s": time}))
        return [row["step time (ms)"].text.replace("\N{NO-BREAK SPACE}", " ") for row in rows(runs)]

    assert cells(0.008, 0.010, 0.016, 0.024) == ["8", "10", "16 (×2.00)", "24 (×2.40)"]
    assert cells(0.008, 0.010, 0.024, 0.078) == ["8", "10", "24 (seeds: 24 to 78)", "78 (seeds: 24 to 78)"]
    assert cells(0.0079, 0.016, 0.024, 0.025) == ["7.9 (seeds: 7.9 to 16)", "16 (seeds: 7.9 to 16)", "24", "25"]


def test_one_seed_ranks_nothing(singles):
    said = findings(group(singles[:3]))
    assert "hc: loss minus residual's -0.0600; one seed, no claim." in said
    assert "mhc:init=paper: loss minus residual's -0.0300; one seed, no claim." in said
    assert not any(word in sentence for sentence in said for word in ("lowest loss", "resolved", "interval", "best"))
    assert "Loss spikes, one number for each run: hc 2." in said
    assert any("hc 38.25 forward, 52 backward" in s for s in said if s.startswith("Largest composite gain"))


def test_the_frontier_takes_losses_by_learning_rate_and_ends_before_runs_that_have_not_ended(rates):
    variants = group(rates)
    assert loss_threshold(variants) == pytest.approx(1.955 + 0.5)
    assert frontier_lines(variants)["hc"] == {1e-3: [1.98, 2.13], 1e-2: [1.98, None]}

    def without_mhc(*at):
        """Return the variants of all runs, of which mHC's at these rates have not ended."""
        going = [run.kind == "mhc" and run.config["optimizer"]["learning_rate"] in at for run in rates]
        return group([dataclasses.replace(r, summary=None) if g else r for r, g in zip(rates, going, strict=True)])

    high = without_mhc(RATES[1])
    assert "mhc:init=paper lr=0.01: 2 of 2 runs have not ended and have no final loss." in findings(high)
    assert frontier_lines(high)["mhc:init=paper"] == {1e-3: [1.90, 2.01]}
    (said,) = [s for s in findings(high) if s.startswith("mhc:init=paper: all runs")]
    assert "nats/token at learning rate 0.001, the largest whose runs have ended; 2 seeds" in said
    lost = [run.kind == "mhc" and run.config["optimizer"]["learning_rate"] == RATES[0] for run in rates]
    lowest = [
        dataclasses.replace(r, summary={**r.summary, "validation_loss": None}) if gone else r
        for r, gone in zip(rates, lost, strict=True)
    ]
    (said,) = [s for s in findings(group(lowest)) if s.startswith("mhc:init=paper: at no learning rate up to 0.001")]
    assert "have all runs finished below" in said, "the higher rate finished"
    assert "mhc:init=paper" not in frontier_lines(without_mhc(*RATES))


def with_streams(record, cosine, rank, rms=1.0, absolute=1.0):
    """Return the run with these measures of its streams in every diagnostics line; `rms` is the second stream's."""
    sizes = np.tile([1.0, rms, 1.0, 1.0], (len(rank), 1))
    more = {"stream_cosine": np.asarray(cosine), "stream_rank": np.asarray(rank), "stream_rms": sizes}
    more["stream_cosine_abs"] = np.full(len(rank), absolute)
    return dataclasses.replace(record, diagnostics=[{**line, **more} for line in record.diagnostics])


def test_findings_tell_equal_collapsed_and_different_streams_apart(singles):
    residual, hc, mhc, _ = singles
    said = findings(group([residual, with_streams(mhc, [1.0, 0.9996], [1.0, 1.001])]))
    equal = "mhc:init=paper: streams stayed equal in direction and size at every sub-layer (cosine above 0.999). A mixing matrix"
    assert any(s.startswith(equal) and s.endswith("H_res is inert.") for s in said)
    assert not any("inert" in s for s in findings(group([residual, with_streams(mhc, [1.0, 0.9996], [1.0, 1.0], 2.0)])))
    # Three streams against their negative: the mean of signed cosines is 0, and there is one direction.
    said = findings(group([residual, with_streams(hc, [1.0, 0.0, 0.6, 0.5], [1.0, 1.001, 2.1, 2.6])]))
    opposed = "hc: streams are nearly one vector up to sign and scale at 1 of the 3 sub-layers after the first: at least 99 % "
    assert any(s.startswith(opposed) and s.endswith("The rank lies between 1.00 and 2.60 of 4.") for s in said)
    # One stream outweighs three others, which point elsewhere.
    said = findings(group([residual, with_streams(hc, [1.0, 0.6, 0.6], [1.0, 1.004, 1.3], 40.0, absolute=0.657)]))
    assert "hc: streams differ at every sub-layer: their rank lies between 1.00 and 1.30 of 4." in said
    said = findings(group([residual, with_streams(hc, [1.0, 0.1, 0.2], [1.0, 2.604, 2.6])]))
    assert "hc: streams differ at every sub-layer: their rank is 2.60 of 4." in said
    said = findings(group([residual, with_streams(hc, [1.0, 0.1, 0.2], [1.0, 2.1, 2.6])]))
    assert "hc: streams differ at every sub-layer: their rank lies between 2.10 and 2.60 of 4." in said


def test_statistics_rows(connections, rates):
    residual, _, mhc = statistics_rows(group(connections))
    assert (residual["verdict"].text, residual["difference"].value) == ("baseline", None)
    # LOSS: deviations from the mean 2.05 are -0.05, 0.05 and 0.
    assert (residual["mean loss"].text, residual["st. dev."].text) == ("2.0500", f"{math.sqrt(0.005 / (3 - 1)):.4f}")
    said = [mhc[key].text for key in ("difference", "t interval", "verdict")]
    assert said == ["-0.1000", "-0.1248 to -0.0752", "lower"]
    assert (mhc["effect"].value, mhc["p (sign flip)"].value) == (pytest.approx(-0.1 / 0.05), 0.25)
    assert (mhc["max gain forward"].value, mhc["max gain backward"].value) == (21, 21), "the largest of any seed"
    assert mhc["effect"].text == "-2.0"
    assert any("mhc:init=paper 21 forward, 21 backward" in sentence for sentence in findings(group(connections)))
    for row in statistics_rows(group(rates)):  # of two seeds
        assert [row[key].value for key in INFERENCE] == [None] * 4
        assert row["verdict"].text in ("baseline", "no claim")


def test_mean_record_averages_what_all_seeds_logged(connections, rates):
    mean, runs = mean_record(group(connections)[1]), connections[3:6]
    np.testing.assert_allclose(mean.train["loss"], np.mean([run.train["loss"] for run in runs], axis=0))
    np.testing.assert_array_equal(mean.train["step"], runs[0].train["step"])
    matrices = [run.diagnostics[-1]["h_res"] for run in runs]
    np.testing.assert_allclose(mean.diagnostics[-1]["h_res"], np.mean(matrices, axis=0))
    assert mean.result("validation_loss") == pytest.approx(2.05)
    assert labels([mean_record(s) for s in group(connections)]) == ["residual", "hc", "mhc:init=paper"]
    assert mean_record(group(rates)[3]).diverged_at is None, "the mean is that of the run that finished"


def test_bands_reach_over_the_seeds(connections):
    loss, norm = SWEEP_FIGURES["seed_bands"].draw(group(connections)).axes
    assert norm.get_yscale() == "log"
    found = next(line for line in loss.lines if line.get_label() == "hc (3 seeds)")
    values = np.stack([plots.smooth(run.train["loss"]) for run in connections[3:6]])[:, : len(found.get_xdata())]
    np.testing.assert_allclose(found.get_ydata(), values.mean(0))
    edges = loss.collections[1].get_paths()[0].vertices[:, 1]
    assert (edges.min(), edges.max()) == pytest.approx((values.min(), values.max()))
    bare = [dataclasses.replace(run, train={"step": np.empty(0)}) for run in connections]
    with pytest.raises(plots.NothingToDraw, match="no run has logged a loss"):
        SWEEP_FIGURES["seed_bands"].draw(group(bare))


def test_ladder_fits_runs_of_three_sizes(tmp_path):
    """The losses are 3 (x / x_0)^-0.1, where x is the FLOPs per token times 200 steps of 16 x 128 tokens."""
    runs = []
    for k, width in enumerate((32, 64, 128)):
        more = {"results": {"flops_per_token": 1e6 * 4.0**k}, "config": {"model.width": width}}
        runs.append(write(tmp_path, f"w{width}", "residual", 0, loss=3 * 4.0 ** (-0.1 * k), **more))
    figure = SWEEP_FIGURES["ladder"].draw(group(runs))
    assert figure.legends[0].get_texts()[0].get_text().startswith("residual: exponent -0.100 [-0.1")
    dots, line = figure.axes[0].lines
    for drawn in (dots, line):
        np.testing.assert_allclose(drawn.get_xdata(), 1e6 * 4.0 ** np.arange(3) * 200 * 16 * 128)
        np.testing.assert_allclose(drawn.get_ydata(), 3 * 4.0 ** (-0.1 * np.arange(3)))


@pytest.mark.parametrize("loser", ["hc", "residual"])
def test_the_seeds_that_finished_alone_give_no_verdict(tmp_path, loser):
    """One of two diverges with three of six seeds, after low losses; with the others HC's losses are lower than residual's."""
    runs, losses = [], {"residual": [2.0, 2.01, 2.02], "hc": [1.8, 1.811, 1.822]}
    for kind, k in itertools.product(losses, range(6)):
        ends = {"diverged_at": 60, "results": {"validation_loss": 1.0}} if kind == loser and k > 2 else {}
        runs.append(write(tmp_path, f"{kind}-{k}", kind, k, loss=losses[kind][k % 3], **ends))
    variants = group(runs)
    row = statistics_rows(variants)[1]
    assert (row["seeds"].text, row["verdict"].text) == ("3 of 6" if loser == "hc" else "6", "no claim")
    assert row["mean loss"].text == "1.8110"
    assert [row[key].value for key in INFERENCE] == [None] * 4
    said = (
        "hc: no claim, since 3 runs of it and residual did not finish; loss minus residual's -0.1990 over the 3 seeds"
    )
    assert any(sentence.startswith(said) for sentence in findings(variants))
    assert rows(runs, variants)[5 if loser == "residual" else -1]["validation loss"].text == "–"
    assert mean_record(variants[1]).result("validation_loss") == pytest.approx(1.811)


def test_runs_on_two_texts_are_not_compared(tmp_path):
    texts = {"residual": {"train_sha256": "a" * 64}, "hc": {"train_sha256": "b" * 64}}
    runs = [dataclasses.replace(write(tmp_path, kind, kind, 0), env={"data": texts[kind]}) for kind in texts]
    assert [variant.label for variant in group(runs)] == ["residual text=aaaaaaaa", "hc text=bbbbbbbb"]
    assert group(runs)[1].baseline is None


def test_streams_of_a_run_that_diverged_or_is_not_finite_are_not_judged(singles, tmp_path):
    lost = with_streams(make_run(tmp_path, "lost", "hc", diverged_at=120), [1.0, 1.0], [1.0, 1.0])
    broken = with_streams(singles[2], [1.0, 1.0, np.nan], [1.0, 1.0, np.nan])
    assert not any("streams" in sentence for sentence in findings(group([singles[0], lost, broken])))


def test_a_gain_beyond_float64_is_called_an_overflow(singles):
    lost = {"max_composite_forward": None, "gains_overflowed": True}
    run = dataclasses.replace(singles[1], summary={**singles[1].summary, **lost})
    assert rows([singles[0], run])[1]["max gain forward"].text == "overflow"
    gains = next(s for s in findings(group([singles[0], run])) if s.startswith("Largest composite gain"))
    assert "hc overflow forward, overflow backward" in gains
