"""Decide question 3 from the runs of its sweep, by the rule in the docstring of experiments/sweeps/muon_margin.py.

A margin is log2 of a connection's largest stable learning rate over that of residual.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from mhc_jax.analysis.contrasts import Contrast, contrasts, mean_of, mean_over, minus
from mhc_jax.analysis.run_reader import RunRecord
from mhc_jax.errors import require

MHC = "mhc:init=paper"
"""The connection whose margin decides question 3."""
OPTIMIZERS = ("adamw", "muon", "muon, connections under adamw")
"""The optimizers of question 3."""


class Line(NamedTuple):
    """A line of rates of question 3: the runs that differ in the learning rate alone."""

    connection: str
    optimizer: str
    """adamw, muon, or `muon, connections under adamw`."""
    grad_clip: float
    seed: int


def line_of(run: RunRecord) -> Line:
    """Return the line of rates that a run belongs to."""
    optimizer = run.config["optimizer"]
    apart = optimizer.get("connections") == "adamw" and optimizer["name"] != "adamw"
    name = optimizer["name"] + (", connections under adamw" if apart else "")
    return Line(run.connection, name, optimizer["grad_clip"], run.seed[0])


def largest_stable(
    runs: Sequence[RunRecord], loss_below: float, grid: Sequence[float]
) -> dict[Line, tuple[float | None, float | None]]:
    """Return (largest stable rate, smallest unstable rate above it) of each line, from the runs that a bisection trained.

    The first is None if no rate below the unstable ones was found stable, the second if none was found unstable.

    Args:
      runs: the runs, all ended.
      loss_below: a run is stable if it finished with a validation loss below this.
      grid: every rate that the search may try, from the lowest.

    Raises:
      InputError: the search of a line is not over.
    """
    place = {None: -1} | {rate: k for k, rate in enumerate(grid)}
    out: dict[Line, tuple[float | None, float | None]] = {}
    members: dict[Line, dict[float, bool]] = {}
    for run in runs:
        loss = run.result("validation_loss") if run.status == "finished" else None
        members.setdefault(line_of(run), {})[run.config["optimizer"]["learning_rate"]] = (
            loss is not None and loss < loss_below
        )
    for line, stable in members.items():
        unstable = min((rate for rate, ok in stable.items() if not ok), default=None)
        below = [rate for rate, ok in stable.items() if ok and (unstable is None or rate < unstable)]
        out[line] = largest, unstable = max(below, default=None), unstable
        require(
            (len(grid) if unstable is None else place[unstable]) - place[largest] == 1,
            f"The search of {line.connection}, {line.optimizer}, clipping {line.grad_clip:g}, seed {line.seed} is not over: rates "
            f"between {largest} and {unstable} were not tried. Run the sweep's command again.",
        )
    return out


def found(margin: Contrast) -> float:
    """Return the mean of a margin that the rule of question 3 counts as resolved, and 0 for any other margin."""
    return mean_of(margin) if margin.resolved or margin.same else 0.0


@dataclass(frozen=True)
class MuonMargin:
    """The answer to question 3.  A margin is log2 of a largest stable rate over residual's."""

    margins: Mapping[tuple[str, str], Contrast]
    """By (connection, optimizer): the margin, averaged over clippings.  mHC's are corrected over the three optimizers."""
    by_clip: Mapping[tuple[str, str, float], Contrast]
    """The margin under each clipping alone.  Not corrected."""
    rates: Mapping[Line, tuple[float | None, float | None]]
    lost: Mapping[str, Contrast]
    """mHC's margin under each variant of Muon minus that under AdamW."""
    lowest: float
    """The lowest rate of the grid."""

    @property
    def censored(self) -> int:
        """Number of lines without a stable or without an unstable rate."""
        return sum(stable is None or unstable is None for stable, unstable in self.rates.values())

    def counted(self, line: Line) -> float:
        """Return the rate with which a line counts: its largest stable rate, or half the lowest of the grid if none is stable."""
        return self.rates[line][0] or self.lowest / 2

    def decision(self, optimizer: str) -> str:
        """Return whether mHC's margin survives under a variant of Muon: `survives`, `is lost` or `not resolved`.

        A line without an unstable or without a stable rate gives a bound of its largest stable rate.  Where a margin may lie on the
        other side of such a bound, nothing is decided.
        """
        under, adamw = self.margins[MHC, optimizer], self.margins[MHC, "adamw"]
        if found(under) > 0:
            return "survives" if self.at_least(optimizer) else "not resolved, because the grid of rates ends"
        difference = self.lost[optimizer]
        below = difference.result is not None and (difference.result.resolved or difference.same)
        if found(adamw) > 0 and below and mean_of(difference) < 0:
            ends = self.at_least("adamw") and self.at_most(optimizer)
            return "is lost" if ends else "not resolved, because the grid of rates ends"
        return "not resolved"

    def at_least(self, optimizer: str) -> bool:
        """Return whether no margin of mHC under this optimizer may be smaller than counted."""
        return self._ends(MHC, optimizer, 0) and self._ends("residual", optimizer.partition(",")[0], 1)

    def at_most(self, optimizer: str) -> bool:
        """Return whether no margin of mHC under this optimizer may be larger than counted."""
        return self._ends(MHC, optimizer, 1) and self._ends("residual", optimizer.partition(",")[0], 0)

    def _ends(self, connection: str, optimizer: str, side: int) -> bool:
        """Return whether every line of a connection and optimizer has a stable rate (side 0) or an unstable one (side 1)."""
        lines = [line for line in self.rates if (line.connection, line.optimizer) == (connection, optimizer)]
        return all(self.rates[line][side] is not None for line in lines)


def muon_margin(runs: Sequence[RunRecord], loss_below: float, grid: Sequence[float]) -> MuonMargin:
    """Decide question 3 by the rule in the docstring of experiments/sweeps/muon_margin.py.

    Args:
      runs: the runs that the bisection trained.
      loss_below: a run is stable if it finished with a validation loss below this.
      grid: every rate that the search may try, from the lowest.

    Raises:
      InputError: the search of a line is not over, or a connection or optimizer that the rule names has no run.
    """
    rates = largest_stable(runs, loss_below, grid)
    log_rate = {line: math.log2(stable if stable else grid[0] / 2) for line, (stable, _) in rates.items()}
    lines = sorted(rates)
    optimizers = sorted({line.optimizer for line in lines})
    clips = sorted({line.grad_clip for line in lines})
    connections = [c for c in dict.fromkeys(line.connection for line in lines) if c != "residual"]
    seeds = sorted({line.seed for line in lines})
    for name, found_names in (
        ("residual", {line.connection for line in lines}),
        (MHC, set(connections)),
        *((name, set(optimizers)) for name in OPTIMIZERS),
    ):
        require(name in found_names, f"No run has {name}, which the rule needs; record the whole sweep.")

    def margin(connection: str, optimizer: str, clip: float) -> dict[int, float]:
        base = optimizer.partition(",")[0]
        pairs = {s: (Line(connection, optimizer, clip, s), Line("residual", base, clip, s)) for s in seeds}
        return {s: log_rate[a] - log_rate[b] for s, (a, b) in pairs.items() if a in log_rate and b in log_rate}

    each = {(c, o, k): margin(c, o, k) for c in connections for o in optimizers for k in clips}
    averaged = {(c, o): mean_over([each[c, o, k] for k in clips]) for c in connections for o in optimizers}
    margins: dict[tuple[str, str], Contrast] = {}
    for c in connections:
        for o, contrast in zip(optimizers, contrasts({o: averaged[c, o] for o in optimizers}), strict=True):
            margins[c, o] = contrast
    lost = {
        o: contrasts({f"{o} - adamw": minus(averaged[MHC, o], averaged[MHC, "adamw"])})[0]
        for o in optimizers
        if o != "adamw"
    }
    alone = {key: contrasts({"margin": values})[0] for key, values in each.items()}
    return MuonMargin(margins, alone, rates, lost, grid[0])
