"""Decide three questions from the runs of their sweeps, by the rules in the docstrings of the sweep files.

The sweep files are which_map.py, mixing_needed.py and muon_margin.py in experiments/sweeps, and their siblings which_map_large.py,
muon_rates.py and residual_longer.py.  All losses are final validation losses in nats/token, and below 0 a difference is better.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from mhc_jax.analysis.contrasts import (
    Contrast,
    Seeds,
    by_connection,
    contrasts,
    final_losses,
    mean_of,
    mean_over,
    minus,
    needed,
)
from mhc_jax.analysis.run_reader import RunRecord
from mhc_jax.analysis.statistics import MOST_SEEDS, Equivalence, equivalence, seeds_for_equivalence
from mhc_jax.errors import require

MAPS = ("pre", "post", "res")
MARGIN = 0.005
"""Margin of equivalence in question 2, in nats/token."""
MIXING_KINDS = ("identity", "diagonal", "identity_mix", "go_mhc")
"""Kinds that question 2 compares with mHC.  The first is H_res = I."""

MHC = "mhc:init=paper"
"""The connection whose margin decides question 3."""

# -- question 1


Cell = tuple[str, str, frozenset[str]]
"""A cell of the factorial: its arm (`copy`, `scaled`), its form (`dynamic`, `static`) and the maps that are learned."""


def cell_of(run: RunRecord) -> Cell | None:
    """Return the cell of question 1 that a run belongs to, or None for a control.

    The cell that learns no map is the same for both forms, and its form is `static`.
    """
    connection = run.config["model"]["connection"]
    if connection["kind"] == "residual":
        return "copy", "static", frozenset()
    if connection["kind"] != "mhc":
        return None
    learned = frozenset(MAPS) - frozenset(connection["disable"])
    return connection["entry"], "dynamic" if connection["dynamic"] else "static", learned


def cells(runs: Sequence[RunRecord]) -> dict[Cell, Seeds]:
    """Return the final losses of each cell of question 1, with the cell that learns nothing under both forms."""
    groups: dict[Cell, list[RunRecord]] = {}
    for run in runs:
        if (cell := cell_of(run)) is not None:
            groups.setdefault(cell, []).append(run)
    out = {cell: final_losses(members) for cell, members in groups.items()}
    return out | {(arm, "dynamic", learned): losses for (arm, _, learned), losses in out.items() if not learned}


def effects(losses: Mapping[Cell, Seeds], arm: str, form: str) -> dict[frozenset[str], dict[int, float]]:
    r"""Return the main effects and interactions of the three maps in one design, for each seed that finished in all its cells.

    The effect of a set S of maps is $\frac{1}{4} \sum_T \prod_{m \in S} \pm 1 \cdot \text{loss}(T)$ over the eight sets T of
    learned maps, with + where m is in T.  For one map it is the mean loss of the cells that learn it minus that of the others.
    The four effects of an odd number of maps sum to the loss with all maps minus the loss with none.
    """
    subsets = [frozenset(s) for size in range(4) for s in itertools.combinations(MAPS, size)]
    parts = {learned: losses.get((arm, form, learned), {}) for learned in subsets}
    common = set.intersection(*(set(part) for part in parts.values()))

    def effect(of: frozenset[str], seed: int) -> float:
        return sum(parts[t][seed] * (-1) ** len(of - t) for t in subsets) / 4

    return {of: {seed: effect(of, seed) for seed in sorted(common)} for of in subsets if of}


@dataclass(frozen=True)
class WhichMap:
    """The answer to question 1."""

    primary: Sequence[Contrast]
    """The main effects of pre, post and res, averaged over the four designs."""
    against: Mapping[tuple[str, str], Contrast]
    """Differences of two of these effects, first minus second."""
    designs: Mapping[tuple[str, str], Sequence[Contrast]]
    """All seven effects of each design (arm, form), with Holm's correction over all of them."""
    total: Mapping[tuple[str, str], Contrast]
    """Loss with all maps learned minus loss with none, in each design.  Not corrected."""
    controls: Sequence[Contrast]
    """lanes and scalar_gated minus residual.  Not corrected."""
    winner: str | None
    """The map that carries the gain by the rule, or None."""

    @property
    def seeds_needed(self) -> int | None:
        """Seeds with which the two most negative effects would be told apart, from their mean difference and its deviation."""
        first, second = sorted(self.primary, key=lambda c: mean_of(c))[:2]
        return needed(self.against[first.label, second.label].values)


def which_map(runs: Sequence[RunRecord]) -> WhichMap:
    """Decide question 1 by the rule in the docstring of experiments/sweeps/which_map.py."""
    losses = cells(runs)
    arms = sorted({(arm, form) for arm, form, _ in losses})
    all_effects = {design: effects(losses, *design) for design in arms}
    averaged = {m: mean_over([found[frozenset({m})] for found in all_effects.values()]) for m in MAPS}
    primary = contrasts(averaged)
    against = {
        (a, b): contrasts({f"{a} - {b}": minus(averaged[a], averaged[b])})[0]
        for a, b in itertools.permutations(MAPS, 2)
    }
    labelled = {
        (design, "x".join(m for m in MAPS if m in of)): values
        for design, found in all_effects.items()
        for of, values in found.items()
    }
    tested = contrasts({f"{arm} {form} {of}": values for ((arm, form), of), values in labelled.items()})
    designs: dict[tuple[str, str], list[Contrast]] = {design: [] for design in arms}
    for (design, of), contrast in zip(labelled, tested, strict=True):
        designs[design].append(contrast._replace(label=of))
    total = {
        (arm, form): contrasts(
            {"all - none": minus(losses[arm, form, frozenset(MAPS)], losses[arm, form, frozenset()])}
        )[0]
        for arm, form in arms
    }
    kinds = by_connection(runs)
    controls = [
        contrasts({f"{kind} - residual": minus(kinds[kind], kinds["residual"])})[0]
        for kind in ("lanes", "scalar_gated")
        if kind in kinds
    ]
    below = [
        c.label
        for c in primary
        if c.resolved
        and mean_of(c) < 0
        and all(
            (r := against[c.label, other].result) and r.resolved and r.mean < 0 for other in MAPS if other != c.label
        )
    ]
    return WhichMap(primary, against, designs, total, controls, below[0] if below else None)


# -- question 2


@dataclass(frozen=True)
class Comparison:
    """A kind of question 2 against mHC: the difference of their losses, its test against 0, and the test of equivalence."""

    contrast: Contrast
    equivalence: Equivalence | None

    @property
    def seeds_needed(self) -> int | None:
        """Seeds for equivalence within the margin if the kinds do not differ at all.  None below two seeds or without spread."""
        numbers = list(self.contrast.values.values())
        deviation = float(np.std(numbers, ddof=1)) if len(numbers) > 1 else 0.0
        return seeds_for_equivalence(deviation, MARGIN) if deviation > 0 else None

    @property
    def verdict(self) -> str:
        """The decision of the rule: equivalent, different, both or not resolved."""
        words = []
        if self.equivalence and self.equivalence.equivalent:
            words.append("equivalent")
        if self.contrast.resolved:
            words.append("lower" if mean_of(self.contrast) < 0 else "higher")
        if words or self.seeds_needed is None:
            return " and ".join(words) or "not resolved"
        seeds = "more than 10,000" if self.seeds_needed >= MOST_SEEDS else f"about {self.seeds_needed}"
        return f"not resolved; if the kinds do not differ, equivalence would need {seeds} seeds"


@dataclass(frozen=True)
class MixingNeeded:
    """The answer to question 2."""

    primary: Mapping[str, Comparison]
    """Each kind against mHC, averaged over numbers of streams and entries, with Holm's correction over the kinds."""
    combinations: Mapping[tuple[int, str], Mapping[str, Comparison]]
    """The same in each combination of number of streams and entry, without a correction over the combinations."""

    @property
    def decision(self) -> str:
        """Whether H_res is needed, by the rule."""
        found = self.primary[MIXING_KINDS[0]]
        if found.equivalence and found.equivalence.equivalent:
            return "not needed"
        if found.contrast.resolved:
            return "needed" if mean_of(found.contrast) > 0 else "not needed"
        return "not resolved"


def mixing_needed(runs: Sequence[RunRecord]) -> MixingNeeded:
    """Decide question 2 by the rule in the docstring of experiments/sweeps/mixing_needed.py."""
    groups: dict[tuple[int, str], dict[str, list[RunRecord]]] = {}
    for run in runs:
        connection = run.config["model"]["connection"]
        place = connection["num_streams"], connection["entry"]
        groups.setdefault(place, {}).setdefault(connection["kind"], []).append(run)
    differences = {
        place: {kind: minus(final_losses(of[kind]), final_losses(of["mhc"])) for kind in MIXING_KINDS}
        for place, of in sorted(groups.items())
    }
    averaged = {kind: mean_over([of[kind] for of in differences.values()]) for kind in MIXING_KINDS}
    return MixingNeeded(_compared(averaged), {place: _compared(of) for place, of in differences.items()})


def _compared(differences: Mapping[str, Seeds]) -> dict[str, Comparison]:
    return {
        contrast.label: Comparison(contrast, equivalence(list(contrast.values.values()), MARGIN))
        for contrast in contrasts(differences)
    }


# -- question 3


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
    censored: int
    """Number of lines without a stable or without an unstable rate.  They count with half the lowest or with the highest rate."""

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
      InputError: the search of a line is not over, or no run is residual.
    """
    rates = largest_stable(runs, loss_below, grid)
    log_rate = {line: math.log2(stable if stable else grid[0] / 2) for line, (stable, _) in rates.items()}
    lines = sorted(rates)
    optimizers = sorted({line.optimizer for line in lines})
    clips = sorted({line.grad_clip for line in lines})
    connections = [c for c in dict.fromkeys(line.connection for line in lines) if c != "residual"]
    seeds = sorted({line.seed for line in lines})
    require(
        any(line.connection == "residual" for line in lines), "No run of the sweep is residual, to which margins are."
    )

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
    censored = sum(stable is None or unstable is None for stable, unstable in rates.values())
    return MuonMargin(margins, alone, rates, lost, censored)
