"""Contrasts of the three questions that were looked at after the results.  No rule decides by them, and none is corrected."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from mhc_jax.analysis.answers import DESIGNS, MAPS, MIXING_KINDS, MixingNeeded, cells, effects, which_map_home
from mhc_jax.analysis.contrasts import Seeds, by_connection, mean_over, minus
from mhc_jax.analysis.rate_margins import MHC, OPTIMIZERS, MuonMargin, line_of
from mhc_jax.analysis.run_reader import RunRecord

NO_MAP, ALL_MAPS = frozenset[str](), frozenset(MAPS)


def of_which_map(runs: Sequence[RunRecord], home: Sequence[RunRecord]) -> dict[str, Seeds]:
    """Return contrasts of question 1, in nats/token for each seed, by what they say.

    Args:
      runs: the runs of which_map.
      home: the runs of which_map_home, or none.
    """
    losses, kinds = cells(runs), by_connection(runs)
    found = {design: effects(losses, *design) for design in DESIGNS}

    def post(form: str) -> Seeds:
        return mean_over([of[frozenset({"post"})] for (_, like), of in found.items() if like == form])

    out: dict[str, Seeds] = {
        "H_post, mean of the dynamic designs": post("dynamic"),
        "H_post, mean of the static designs": post("static"),
        "H_post, dynamic - static": minus(post("dynamic"), post("static")),
    }
    if "scalar_gated" in kinds and "mhc:init=paper" in kinds:
        out["scalar_gated - mhc:init=paper"] = minus(kinds["scalar_gated"], kinds["mhc:init=paper"])
    if home:
        which_map_home(home)  # says which cell is missing
        there = cells(home)
        of_home = effects(there, "home", "dynamic")
        for m in MAPS:
            one = frozenset({m})
            out[f"H_{m}, home - (copy, dynamic)"] = minus(of_home[one], found["copy", "dynamic"][one])
        if "residual" in kinds:
            out["home, nothing learned - residual"] = minus(there["home", "dynamic", NO_MAP], kinds["residual"])
        without_res = there["home", "dynamic", ALL_MAPS - {"res"}]
        out["home, all maps learned - all but H_res"] = minus(there["home", "dynamic", ALL_MAPS], without_res)
    return out


def of_mixing_needed(answer: MixingNeeded) -> dict[str, Seeds]:
    """Return contrasts of question 2, in nats/token for each seed, by what they say."""
    primary = {kind: found.contrast.values for kind, found in answer.primary.items()}
    out: dict[str, Seeds] = {"go_mhc - identity": minus(primary["go_mhc"], primary["identity"])}
    numbers = sorted({streams for streams, _ in answer.combinations})
    for kind in [kind for kind in MIXING_KINDS if kind != "go_mhc"]:
        of = {
            n: mean_over([part[kind].contrast.values for (k, _), part in answer.combinations.items() if k == n])
            for n in numbers
        }
        out |= {f"{kind} - mhc:init=home, n = {n}": values for n, values in of.items()}
        first, last = numbers[0], numbers[-1]
        if first != last:
            out[f"{kind} - mhc:init=home, n = {last} minus n = {first}"] = minus(of[last], of[first])
    return out


def of_muon_margin(answer: MuonMargin) -> dict[str, Seeds]:
    """Return contrasts of question 3, in octaves for each seed, by what they say."""
    margins = answer.margins
    return {
        f"{MHC} - {other}, {optimizer}": minus(margins[MHC, optimizer].values, margins[other, optimizer].values)
        for other in ("hc", "identity:init=paper")
        for optimizer in OPTIMIZERS
        if (MHC, optimizer) in margins and (other, optimizer) in margins
    }


def losses_at_equal_rates(runs: Sequence[RunRecord], connection: str = MHC) -> dict[str, Seeds]:
    """Return a connection's loss minus residual's at each rate that every line of both tried and finished, over all clippings.

    Args:
      runs: the runs of muon_margin or muon_rates.
      connection: the text of the connection.
    """
    losses: dict[tuple[str, str, float], dict[float, dict[int, float]]] = {}
    for run in runs:
        line = line_of(run)
        if line.connection in (connection, "residual") and run.status == "finished":
            place = line.connection, line.optimizer, run.config["optimizer"]["learning_rate"]
            of_clip = losses.setdefault(place, {}).setdefault(line.grad_clip, {})
            of_clip[line.seed] = run.result("validation_loss")
    seeds, clips = {line_of(run).seed for run in runs}, {line_of(run).grad_clip for run in runs}
    whole = {place: mean_over([*of.values()]) for place, of in losses.items() if set(of) == clips}
    whole = {place: of for place, of in whole.items() if set(of) == seeds}
    return {
        f"{optimizer}, rate {rate:g}": minus(of, whole["residual", optimizer.partition(",")[0], rate])
        for (found, optimizer, rate), of in sorted(whole.items())
        if found == connection and ("residual", optimizer.partition(",")[0], rate) in whole
    }


class LineEnds(NamedTuple):
    """How the lines of rates of one connection end, for all optimizers and clippings."""

    lines: int
    unbounded: int
    """Lines in which no rate was unstable."""
    diverged: int
    """Lines whose smallest unstable rate diverged.  The others finished with a loss above the threshold."""
    loss: float | None
    """Median validation loss at the largest stable rate, in nats/token."""


def line_ends(answer: MuonMargin, runs: Sequence[RunRecord]) -> dict[str, LineEnds]:
    """Return how the lines of each connection end.

    Args:
      answer: the answer to question 3.
      runs: the runs of muon_margin.
    """
    by = {(line_of(run), run.config["optimizer"]["learning_rate"]): run for run in runs}
    out = {}
    for connection in dict.fromkeys(line.connection for line in sorted(answer.rates)):
        ends = {line: ends for line, ends in answer.rates.items() if line.connection == connection}
        losses = [
            by[line, stable].result("validation_loss") for line, (stable, _) in ends.items() if stable is not None
        ]
        out[connection] = LineEnds(
            len(ends),
            sum(unstable is None for _, unstable in ends.values()),
            sum(u is not None and by[line, u].status == "diverged" for line, (_, u) in ends.items()),
            float(np.median(losses)) if losses else None,
        )
    return out
