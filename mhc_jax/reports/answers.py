"""Write the page of tables of the three questions, experiments/records/ANSWERS.md, from the records of their sweeps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from mhc_jax.analysis import answers, rate_margins
from mhc_jax.analysis.comparison import Cell
from mhc_jax.analysis.contrasts import (
    Contrast,
    by_connection,
    contrasts,
    equal_time,
    final_losses,
    mean_of,
    minus,
)
from mhc_jax.analysis.run_reader import RunRecord
from mhc_jax.analysis.statistics import MIN_SEEDS, Paired
from mhc_jax.reports.markup import markdown_table


def _text(value: float | None, form: str) -> Cell:
    return Cell("–" if value is None else form.format(value), value)


def _interval(result: Paired | None, form: str = "{:+.4f}") -> Cell:
    if result and result.t_interval:
        return Cell(f"{form} to {form}".format(*result.t_interval), result.t_interval[0])
    return Cell("no spread" if result and result.seeds >= MIN_SEEDS else "–", None)


def row(name: str, contrast: Contrast, form: str = "{:+.4f}", corrected: bool = True) -> dict[str, Cell]:
    """Return the row of a table for one test: mean, 95 % interval, p-values and number of seeds.

    Without `corrected` there is no p-value with Holm's correction.
    """
    result = contrast.result
    return {
        "": Cell(name, name),
        "mean": _text(result and result.mean, form),
        "95 % interval": _interval(result, form),
        "p (t)": _text(result and result.p_t, "{:.2g}"),
        **({"p (Holm)": _text(contrast.p_holm, "{:.2g}")} if corrected else {}),
        "seeds": Cell(str(len(contrast.values)), len(contrast.values)),
    }


def _runs(runs: Sequence[RunRecord]) -> str:
    ended = [run.status for run in runs]
    commits = sorted({str(run.env.get("commit"))[:7] for run in runs})
    dates = sorted(str(run.env.get("date"))[:10] for run in runs)
    return (
        f"{len(runs)} runs ({ended.count('finished')} finished, {ended.count('diverged')} diverged), commit "
        f"{', '.join(commits)}, {dates[0]}{'' if dates[0] == dates[-1] else ' to ' + dates[-1]}."
    )


def _lost(runs: Sequence[RunRecord]) -> list[str]:
    """Return the line that names the runs without a final loss.  Empty if every run finished."""
    lost = [f"`{_cell(run)}` seed {run.seed[0]} ({run.status})" for run in runs if run.status != "finished"]
    told = "Tests that use one of these cells leave out its seed"
    return [f"**{len(lost)} of {len(runs)} runs have no final loss**: {'; '.join(lost)}. {told}.", ""] if lost else []


def _cell(run: RunRecord) -> str:
    """Return the connection of a run, or the function of its optimizer if that function makes the cell (which_map_home)."""
    return str(run.config["optimizer"]["name"]).partition(":")[2] or run.connection


def which_map_part(
    runs: Sequence[RunRecord],
    home: Sequence[RunRecord],
    larger: Sequence[RunRecord],
    longer: Sequence[RunRecord],
    ratios: Mapping[str, float],
) -> str:
    """Return the section of question 1.

    Args:
      runs: the runs of which_map.
      home: the runs of which_map_home, or none.
      larger: the runs of which_map_large, or none.
      longer: the runs of residual_longer, or none.
      ratios: time of a step over residual's, by the text of the connection.
    """
    answer = answers.which_map(runs)
    out = ["## 1. Which map carries the lower loss?", "", f"Sweep `which_map`: {_runs(runs)}", "", *_lost(runs)]
    if answer.winner:
        out += [f"**Decision by the rule: H_{answer.winner} carries the lower loss.**", ""]
    else:
        seeds = answer.seeds_needed
        more = f" About {seeds} seeds would tell the two lowest effects apart." if seeds else ""
        out += [f"**Decision by the rule: not resolved.**{more}", ""]
    out += [
        "Primary tests: effect of learning a map, averaged over the four designs (nats/token, below 0 is better).",
        "",
    ]
    out += [markdown_table([row(f"H_{c.label}", c) for c in answer.primary]), ""]
    pairs = [("post", "pre"), ("post", "res"), ("pre", "res")]
    out += ["Differences of these effects, not corrected.", ""]
    out += [markdown_table([row(f"H_{a} - H_{b}", answer.against[a, b], corrected=False) for a, b in pairs]), ""]
    out += ["Secondary: every design. x marks an interaction. Holm's correction is over all 28.", ""]
    rows = [row(f"{arm}, {form}: {c.label}", c) for (arm, form), found in answer.designs.items() for c in found]
    out += [markdown_table(rows), ""]
    totals = [row(f"{arm}, {form}: all maps - none", c, corrected=False) for (arm, form), c in answer.total.items()]
    totals += [row(c.label, c, corrected=False) for c in answer.controls]
    out += ["Secondary: all maps against none in each design, and the controls. Not corrected.", ""]
    out += [markdown_table(totals), ""]
    out += _equal_time(runs, longer, ratios)
    out += _home(home) if home else ["Streams that differ (`which_map_home`): not run yet.", ""]
    out += _larger(answer, larger) if larger else ["Larger model: not run yet.", ""]
    return "\n".join(out)


def _home(runs: Sequence[RunRecord]) -> list[str]:
    """Return the lines on question 1 where streams differ."""
    answer = answers.which_map_home(runs)
    decision = (
        f"H_{answer.winner} carries the lower loss"
        if answer.winner
        else "not resolved which map carries the lower loss, because no effect is shown to lie below both others"
    )
    pairs = [("post", "pre"), ("post", "res"), ("pre", "res")]
    secondary = [row(f"H_{a} - H_{b}", answer.against[a, b], corrected=False) for a, b in pairs]
    secondary += [row(c.label, c, corrected=False) for c in (*answer.interactions, answer.total)]
    return [
        f"Streams that differ (`which_map_home`): {_runs(runs)}",
        "",
        *_lost(runs),
        f"**Decision by the rule of this sweep: {decision}.**",
        "",
        "Effect of learning a map, against freezing it at its start (nats/token, below 0 is better).",
        "",
        markdown_table([row(f"H_{c.label}", c) for c in answer.primary]),
        "",
        "Differences of these effects, interactions, and all maps learned minus none. Not corrected.",
        "",
        markdown_table(secondary),
        "",
    ]


def _larger(answer: answers.WhichMap, larger: Sequence[RunRecord]) -> list[str]:
    """Return the lines on the larger model: its effects, and whether they moved."""
    design = ("scaled", "dynamic")
    losses = answers.cells(larger)
    effects = {"x".join(m for m in answers.MAPS if m in of): v for of, v in answers.effects(losses, *design).items()}
    tests = contrasts({m: effects[m] for m in answers.MAPS})
    small = {c.label: c for c in answer.designs[design]}
    rows: list[dict[str, Cell]] = []
    moved, held, untold = [], [], []
    for test in tests:
        before = small[test.label].result
        line = row(f"H_{test.label}", test)
        rows.append({**line, "at the smaller size": _text(before and before.mean, "{:+.4f}")})
        interval = test.result.t_interval if test.result else None
        if not before or not interval:
            untold.append(f"H_{test.label}")
        else:
            (held if interval[0] <= before.mean <= interval[1] else moved).append(f"H_{test.label}")
    told = [
        f"{sentence}: {', '.join(names)}."
        for sentence, names in (
            ("Moved, because the 95 % interval excludes the smaller model's mean", moved),
            ("Not shown to have moved, because the 95 % interval holds the smaller model's mean", held),
            ("Not told, because too few seeds finished", untold),
        )
        if names
    ]
    orders = [sorted(answers.MAPS, key=lambda m: mean_of(found[m])) for found in ({c.label: c for c in tests}, small)]
    if not untold:
        told.append(f"The three effects have {'the same' if orders[0] == orders[1] else 'another'} order.")
    return [
        f"Larger model (`which_map_large`): {_runs(larger)} The design is scaled, dynamic.",
        "",
        *_lost(larger),
        " ".join(told),
        "",
        markdown_table(rows),
        "",
    ]


def _equal_time(runs: Sequence[RunRecord], longer: Sequence[RunRecord], ratios: Mapping[str, float]) -> list[str]:
    """Return the lines that compare connections with residual after as much time."""
    if not longer or not ratios:
        return ["Equal wall clock: not measured yet.", ""]
    by_steps: dict[int, list[RunRecord]] = {}
    for run in longer:
        by_steps.setdefault(run.config["train"]["steps"], []).append(run)
    losses_of = {steps: final_losses(members) for steps, members in by_steps.items()}
    rows = []
    for connection, losses in by_connection(runs).items():
        if connection == "residual":
            continue
        ratio = ratios.get(connection)
        found = None if ratio is None else equal_time(losses, ratio, losses_of)
        line = row(f"`{connection}`", contrasts({connection: found or {}})[0], corrected=False)
        rows.append({**line, "time of a step": _text(ratio, "{:.2f}")})
    steps = sorted(losses_of)
    return [
        "Secondary, equal wall clock: loss minus that of residual after as much time (`residual_longer`, interpolated between "
        "numbers of steps). The time of a step is over residual's, measured in turns on two CPU cores. Not corrected. A row is "
        f"empty if its time was not measured, or if residual would need fewer than {steps[0]} or more than {steps[-1]} steps.",
        "",
        markdown_table(rows),
        "",
    ]


def mixing_needed_part(
    runs: Sequence[RunRecord],
    frozen: Mapping[str, Mapping[int, float]],
    shares: Mapping[str, Sequence[tuple[float, float]]],
    longer: Sequence[RunRecord],
    ratios: Mapping[str, float],
) -> str:
    """Return the section of question 2.

    Args:
      runs: the runs of mixing_needed.
      frozen: rise of the validation loss with H_res = I in the trained model, by connection and seed.
      shares: weight of H_res off its diagonal (`freezing.off_diagonal`) at the start and the end of each run, by connection.
      longer: the runs of residual_longer, or none.
      ratios: time of a step over residual's, by the text of the connection.
    """
    answer = answers.mixing_needed(runs)

    def line(name: str, found: answers.Comparison) -> dict[str, Cell]:
        test = found.equivalence
        inner = Cell("{:+.4f} to {:+.4f}".format(*test.interval), test.interval[0]) if test else Cell("–", None)
        return {
            **row(name, found.contrast),
            "90 % interval": inner,
            "p (TOST)": _text(test and test.p, "{:.2g}"),
            "verdict": Cell(found.verdict, found.verdict),
        }

    out = [
        "## 2. Is a learned H_res needed once streams differ?",
        "",
        f"Sweep `mixing_needed`: {_runs(runs)}",
        "",
        *_lost(runs),
    ]
    out += [f"**Decision by the rule: {answer.decision}.**", ""]
    out += ["Primary tests: loss minus that of mHC, averaged over the four combinations (nats/token).", ""]
    out += [markdown_table([line(kind, found) for kind, found in answer.primary.items()]), ""]
    out += ["Secondary: each combination. Holm's correction is over the four kinds of a combination.", ""]
    rows = [
        line(f"n = {n}, {entry}: {kind}", c) for (n, entry), of in answer.combinations.items() for kind, c in of.items()
    ]
    out += [markdown_table(rows), ""]
    both = contrasts({"go_mhc - identity": answer.learned})
    out += ["Not planned before the runs: both averaged over the four combinations. Not corrected.", ""]
    out += [markdown_table([row(c.label, c, corrected=False) for c in both]), ""]
    if shares:
        out += ["Share of H_res's weight off its diagonal, in the mean over tokens, sub-layers and seeds.", ""]
        means = {name: np.mean(of, axis=0) for name, of in shares.items() if np.any(of)}
        out += [
            markdown_table(
                [
                    {
                        "": Cell(f"`{name}`", name),
                        "at the start": _text(float(first), "{:.4f}"),
                        "at the end": _text(float(last), "{:.4f}"),
                        "seeds": Cell(str(len(shares[name])), len(shares[name])),
                    }
                    for name, (first, last) in means.items()
                ]
            ),
            "",
        ]
    if frozen:
        tests = contrasts({name: values for name, values in frozen.items()})
        out += ["Freezing: rise of the validation loss when H_res of a trained mHC model is replaced by I.", ""]
        out += [markdown_table([row(f"`{c.label}`", c) for c in tests]), ""]
    out += _equal_time(runs, longer, ratios)
    return "\n".join(out)


def muon_margin_part(
    runs: Sequence[RunRecord],
    loss_below: float,
    grid: Sequence[float],
    rates: Sequence[RunRecord],
    norms: Mapping[str, float],
) -> str:
    """Return the section of question 3.

    Args:
      runs: the runs of muon_margin that the bisection trained.
      loss_below: loss below which a finished run is stable.
      grid: every rate that the search may try, from the lowest.
      rates: the runs of muon_rates, or none.
      norms: the largest norm of a gradient after the warm-up, by the name of a run of muon_rates.
    """
    answer = rate_margins.muon_margin(runs, loss_below, grid)
    out = ["## 3. Does mHC's learning-rate margin survive Muon?", "", f"Sweep `muon_margin`: {_runs(runs)}", ""]
    for optimizer in rate_margins.OPTIMIZERS[1:]:
        out += [f"**Decision by the rule, {optimizer}: {answer.decision(optimizer)}.**", ""]
    out += [
        f"{answer.censored} of {len(answer.rates)} lines have no stable or no unstable rate. They count with half the lowest or "
        "with the highest rate.",
        "",
        "Largest stable learning rate, geometric mean over seeds, and range.",
        "",
    ]
    table = []
    for connection in dict.fromkeys(line.connection for line in sorted(answer.rates)):
        for optimizer in rate_margins.OPTIMIZERS:
            cells = {"": Cell(f"{connection}, {optimizer}", None)}
            for clip, name in ((1.0, "clipped at 1"), (0.0, "not clipped")):
                found = [
                    answer.counted(line)
                    for line in answer.rates
                    if (line.connection, line.optimizer, line.grad_clip) == (connection, optimizer, clip)
                ]
                mean = float(np.exp(np.mean(np.log(found)))) if found else None
                cells[name] = Cell(f"{mean:.3g} ({min(found):g} to {max(found):g})" if found else "–", mean)
            if any(cell.value is not None for cell in cells.values()):
                table.append(cells)
    out += [markdown_table(table), ""]
    out += ["Margins in octaves (log2 of the largest stable rate over residual's), averaged over clippings.", ""]
    rows = [
        row(f"{c}, {o}", answer.margins[c, o], "{:+.2f}")
        for c, o in sorted(answer.margins, key=lambda k: k[0] != rate_margins.MHC)
    ]
    rows += [row(f"{rate_margins.MHC}: {o} - adamw", c, "{:+.2f}") for o, c in answer.lost.items()]
    out += [markdown_table(rows), ""]
    out += ["Secondary: each clipping by itself, in octaves. Not corrected.", ""]
    alone = [
        row(f"{c}, {o}, clip {k:g}", found, "{:+.2f}", corrected=False) for (c, o, k), found in answer.by_clip.items()
    ]
    out += [markdown_table(alone), ""]
    if rates:
        out += _best_losses(rates, norms)
    return "\n".join(out)


def _best_losses(runs: Sequence[RunRecord], norms: Mapping[str, float]) -> list[str]:
    """Return the lines on best losses and surges of `muon_rates`.  For `norms` see `muon_margin_part`."""
    groups: dict[tuple[str, str], dict[float, list[RunRecord]]] = {}
    for run in runs:
        line = rate_margins.line_of(run)
        rate = run.config["optimizer"]["learning_rate"]
        groups.setdefault((line.connection, line.optimizer), {}).setdefault(rate, []).append(run)
    best = {}
    for key, by_rate in groups.items():
        whole = {rate: final_losses(r) for rate, r in by_rate.items() if all(x.status == "finished" for x in r)}
        if whole:
            rate = min(whole, key=lambda rate: float(np.mean(list(whole[rate].values()))))
            best[key] = rate, whole[rate]
    rows = []
    for (connection, optimizer), (rate, losses) in best.items():
        base = best.get(("residual", optimizer.partition(",")[0]))
        found = contrasts({"": minus(losses, base[1]) if base else {}})[0]
        by_rate = groups[connection, optimizer]
        every = [run for members in by_rate.values() for run in members]
        found_norms = [norms[run.name] for run in by_rate[rate] if run.name in norms]
        dropped = [r for r in by_rate if any(run.status != "finished" for run in by_rate[r])]
        rows.append(
            {
                "": Cell(f"{connection}, {optimizer}", None),
                "best rate": Cell(f"{rate:g}", rate),
                "mean loss": _text(float(np.mean(list(losses.values()))), "{:.4f}"),
                "minus residual's best": _text(found.result and found.result.mean, "{:+.4f}"),
                "95 % interval": _interval(found.result),
                "largest gradient norm": _text(max(found_norms, default=None), "{:.3g}"),
                "spikes, all rates": Cell(str(sum(len(run.spike_steps) for run in every)), None),
                "diverged": Cell(str(sum(run.status == "diverged" for run in every)), None),
                "rates left out": Cell(", ".join(f"{r:g}" for r in sorted(dropped)) or "none", None),
            }
        )
    return [
        f"Secondary, best of four rates and surges (`muon_rates`): {_runs(runs)} The interval does not count that the best of four "
        "rates was chosen on both sides. The largest norm is of gradients before clipping, after the warm-up, over the seeds of "
        "the best rate. A rate is left out where a seed diverged.",
        "",
        markdown_table(rows),
        "",
    ]


def page(parts: Sequence[str]) -> str:
    """Return the text of ANSWERS.md from its sections."""
    head = [
        "# Tables of the three questions",
        "",
        "Made by `python experiments/answers.py` from the records beside this file. The rules by which each question is decided",
        "stand in the docstrings of the sweep files and were committed before the first run.",
        "Losses are validation losses in nats a byte. Intervals are Student's over paired seeds.",
        "",
        "",
    ]
    return "\n".join(head) + "\n".join(parts).rstrip() + "\n"
