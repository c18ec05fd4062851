"""Contrasts of the three questions that were looked at after the results.  No rule decides by them, and none is corrected."""

from __future__ import annotations

from collections.abc import Sequence

from mhc_jax.analysis.answers import DESIGNS, MAPS, MIXING_KINDS, MixingNeeded, cells, effects
from mhc_jax.analysis.contrasts import Seeds, by_connection, mean_over, minus
from mhc_jax.analysis.rate_margins import MHC, OPTIMIZERS, MuonMargin
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
        out["scalar_gated - mHC (copy, dynamic, all maps)"] = minus(kinds["scalar_gated"], kinds["mhc:init=paper"])
    if home:
        there = cells(home)
        of_home = effects(there, "home", "dynamic")
        for m in MAPS:
            one = frozenset({m})
            out[f"H_{m}, home - (copy, dynamic)"] = minus(of_home[one], found["copy", "dynamic"][one])
        nothing = there["home", "dynamic", NO_MAP]
        out["home, nothing learned - residual"] = minus(nothing, kinds["residual"])
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
        out |= {f"{kind} - mHC, n = {n}": values for n, values in of.items()}
        first, last = numbers[0], numbers[-1]
        out[f"{kind} - mHC, n = {last} minus n = {first}"] = minus(of[last], of[first])
    return out


def of_muon_margin(answer: MuonMargin) -> dict[str, Seeds]:
    """Return contrasts of question 3, in octaves for each seed, by what they say."""
    margins = answer.margins
    return {
        f"mHC - HC, {optimizer}": minus(margins[MHC, optimizer].values, margins["hc", optimizer].values)
        for optimizer in OPTIMIZERS
        if (MHC, optimizer) in margins and ("hc", optimizer) in margins
    }
