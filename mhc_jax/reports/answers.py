"""Write the tables of questions 1 and 2, and the page of all tables, experiments/records/ANSWERS.md, from records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from mhc_jax.analysis import afterwards, answers
from mhc_jax.analysis.comparison import Cell
from mhc_jax.analysis.contrasts import (
    Contrast,
    Seeds,
    by_connection,
    contrasts,
    equal_time,
    final_losses,
    mean_of,
    needed,
)
from mhc_jax.analysis.run_reader import RunRecord
from mhc_jax.analysis.statistics import MIN_SEEDS, Paired
from mhc_jax.reports.markup import markdown_table


def number(value: float | None, form: str) -> Cell:
    """Return the cell of a number, or of a dash for None."""
    return Cell("–" if value is None else form.format(value), value)


def interval(result: Paired | None, form: str = "{:+.4f}") -> Cell:
    """Return the cell of the 95 % interval of paired differences."""
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
        "mean": number(result and result.mean, form),
        "95 % interval": interval(result, form),
        "p (t)": number(result and result.p_t, "{:.2g}"),
        **({"p (Holm)": number(contrast.p_holm, "{:.2g}")} if corrected else {}),
        "seeds": Cell(str(len(contrast.values)), len(contrast.values)),
    }


def runs_line(runs: Sequence[RunRecord]) -> str:
    """Return the number of runs, how they ended, their commit and their dates."""
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
    out = ["## 1. Which map carries the lower loss?", "", f"Sweep `which_map`: {runs_line(runs)}", "", *_lost(runs)]
    if answer.winner:
        out += [f"**Decision by the rule: H_{answer.winner} carries the lower loss.**", ""]
    else:
        out += [f"**Decision by the rule: not resolved.**{_more_seeds(answer)}", ""]
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
    out += afterwards_lines(afterwards.of_which_map(runs, home))
    out += _home(home) if home else ["Streams that differ (`which_map_home`): not run yet.", ""]
    out += _larger(answer, larger) if larger else ["Larger model: not run yet.", ""]
    return "\n".join(out)


def _more_seeds(answer: answers.WhichMap | answers.WhichMapHome) -> str:
    """Return the sentence that says how many seeds would tell the two lowest effects apart, or nothing if these seeds do."""
    seeds = answer.seeds_needed
    return f" About {seeds} seeds would tell the two lowest effects apart, at their present size." if seeds else ""


def afterwards_lines(of: Mapping[str, Seeds], form: str = "{:+.4f}", what: str = "") -> list[str]:
    """Return the lines on contrasts that were looked at after the results.  `what` says what the contrasts are."""
    rows = [row(c.label, c, form, corrected=False) for label, values in of.items() for c in contrasts({label: values})]
    if not rows:
        return []
    return [f"Looked at after the results, which no rule uses{what}. Not corrected.", "", markdown_table(rows), ""]


def _home(runs: Sequence[RunRecord]) -> list[str]:
    """Return the lines on question 1 where streams differ."""
    answer = answers.which_map_home(runs)
    decision = (
        f"H_{answer.winner} carries the lower loss"
        if answer.winner
        else "not resolved which map carries the lower loss, because no effect is both resolved and shown to lie below both others"
    )
    pairs = [("post", "pre"), ("post", "res"), ("pre", "res")]
    secondary = [row(f"H_{a} - H_{b}", answer.against[a, b], corrected=False) for a, b in pairs]
    secondary += [row(c.label, c, corrected=False) for c in (*answer.interactions, answer.total)]
    return [
        f"Streams that differ (`which_map_home`): {runs_line(runs)}",
        "",
        *_lost(runs),
        f"**Decision by the rule of this sweep: {decision}.**{'' if answer.winner else _more_seeds(answer)}",
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
        rows.append({**line, "at the smaller size": number(before and before.mean, "{:+.4f}")})
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
    kept = not untold and orders[0] == orders[1]
    lowest = min(tests, key=mean_of)
    seeds = None if untold or (lowest.result and lowest.result.resolved) else needed(lowest.values)
    told += [f"H_{lowest.label} would be resolved with about {seeds} seeds, at its present size."] if seeds else []
    verdict = "the answer has moved" if moved else "the answer has kept its order" if kept else "not told"
    return [
        f"Larger model (`which_map_large`): {runs_line(larger)} The design is scaled, dynamic.",
        "",
        *_lost(larger),
        f"**Decision by the rule of this sweep: {verdict}.**",
        "",
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
        rows.append({**line, "time of a step": number(ratio, "{:.2f}")})
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
            "p (TOST)": number(test and test.p, "{:.2g}"),
            "verdict": Cell(found.verdict, found.verdict),
        }

    out = [
        "## 2. Is a learned H_res needed once streams differ?",
        "",
        f"Sweep `mixing_needed`: {runs_line(runs)}",
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
    out += afterwards_lines(afterwards.of_mixing_needed(answer))
    if shares:
        out += [
            "Looked at after the results: share of H_res's weight off its diagonal, in the mean over tokens, sub-layers and seeds.",
            "",
        ]
        means = {name: np.mean(of, axis=0) for name, of in shares.items() if np.any(of)}
        out += [
            markdown_table(
                [
                    {
                        "": Cell(f"`{name}`", name),
                        "at the start": number(float(first), "{:.4f}"),
                        "at the end": number(float(last), "{:.4f}"),
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
