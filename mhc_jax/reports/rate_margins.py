"""Write the tables of question 3, on the margin of learning rates, from the records of its sweeps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from mhc_jax.analysis import afterwards, rate_margins
from mhc_jax.analysis.comparison import Cell
from mhc_jax.analysis.contrasts import contrasts, final_losses, minus, needed
from mhc_jax.analysis.run_reader import RunRecord
from mhc_jax.reports.answers import afterwards_lines, interval, number, row, runs_line
from mhc_jax.reports.markup import markdown_table


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
    out = ["## 3. Does mHC's learning-rate margin survive Muon?", "", f"Sweep `muon_margin`: {runs_line(runs)}", ""]
    for optimizer in rate_margins.OPTIMIZERS[1:]:
        out += [f"**Decision by the rule, {optimizer}: {answer.decision(optimizer)}.**", ""]
    out += [
        f"{answer.censored} of {len(answer.rates)} lines have no stable or no unstable rate. They count with half the lowest or "
        "with the highest rate, so that a mean over such lines is a bound. A rate is the peak of its schedule.",
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
    for optimizer in rate_margins.OPTIMIZERS:
        margin = answer.margins[rate_margins.MHC, optimizer]
        seeds = None if margin.result and margin.result.resolved else needed(margin.values)
        if seeds:
            told = f"mHC's margin under {optimizer} would be resolved with about {seeds} seeds, at its present size."
            out += [told, ""]
    out += ["Secondary: each clipping by itself, in octaves. Not corrected.", ""]
    alone = [
        row(f"{c}, {o}, clip {k:g}", found, "{:+.2f}", corrected=False) for (c, o, k), found in answer.by_clip.items()
    ]
    out += [markdown_table(alone), ""]
    out += afterwards_lines(afterwards.of_muon_margin(answer), "{:+.2f}", ": octaves between largest stable rates")
    at_equal_rates = ": loss of mHC minus that of residual (nats/token) at rates that all their lines tried"
    out += afterwards_lines(afterwards.losses_at_equal_rates(runs), what=at_equal_rates)
    ends = [
        {
            "": Cell(connection, None),
            "lines": Cell(str(end.lines), end.lines),
            "no rate unstable": Cell(str(end.unbounded), end.unbounded),
            "smallest unstable rate diverged": Cell(str(end.diverged), end.diverged),
            "median loss at the largest stable rate": number(end.loss, "{:.3f}"),
        }
        for connection, end in afterwards.line_ends(answer, runs).items()
    ]
    out += [
        "How lines end, over all optimizers and clippings. Looked at after the results.",
        "",
        markdown_table(ends),
        "",
    ]
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
    order = sorted(best, key=lambda key: (key[0] != "residual", key[0], rate_margins.OPTIMIZERS.index(key[1])))
    for connection, optimizer in order:
        rate, losses = best[connection, optimizer]
        base = best.get(("residual", optimizer.partition(",")[0])) if connection != "residual" else None
        found = contrasts({"": minus(losses, base[1]) if base else {}})[0]
        by_rate = groups[connection, optimizer]
        every = [run for members in by_rate.values() for run in members]
        found_norms = [norms[run.name] for run in by_rate[rate] if run.name in norms]
        dropped = [r for r in by_rate if any(run.status != "finished" for run in by_rate[r])]
        rows.append(
            {
                "": Cell(f"{connection}, {optimizer}", None),
                "best rate": Cell(f"{rate:g}", rate),
                "mean loss": number(float(np.mean(list(losses.values()))), "{:.4f}"),
                "minus residual's best": number(found.result and found.result.mean, "{:+.4f}"),
                "95 % interval": interval(found.result),
                "largest gradient norm": number(max(found_norms, default=None), "{:.3g}"),
                "spikes, all rates": Cell(str(sum(len(run.spike_steps) for run in every)), None),
                "diverged": Cell(str(sum(run.status == "diverged" for run in every)), None),
                "rates left out": Cell(", ".join(f"{r:g}" for r in sorted(dropped)) or "none", None),
            }
        )
    at_each_rate = []
    for connection in ("hc", rate_margins.MHC):
        what = f": loss of `{connection}` minus that of residual (nats/token) at each rate of `muon_rates`"
        at_each_rate += afterwards_lines(afterwards.losses_at_equal_rates(runs, connection), what=what)
    return [
        f"Secondary, best of four rates and surges (`muon_rates`): {runs_line(runs)} The interval does not count that the best of "
        "four rates was chosen on both sides. The largest norm is of gradients before clipping, after the warm-up, over the seeds "
        "of the best rate. A rate is left out where a seed diverged.",
        "",
        markdown_table(rows),
        "",
        *at_each_rate,
    ]
