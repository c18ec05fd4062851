"""Decide questions 1 and 2 from the runs of their sweeps, by the rules in the docstrings of the sweep files.

The sweep files are which_map.py and mixing_needed.py in experiments/sweeps, and their siblings which_map_large.py and
residual_longer.py.  Question 3 stands in rate_margins.py.  All losses are final validation losses in nats/token, and below 0 a
difference is better.
"""

from __future__ import annotations

import itertools
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
DESIGNS = [("copy", "dynamic"), ("copy", "static"), ("scaled", "dynamic"), ("scaled", "static")]
"""Designs of question 1: its arms and forms."""
MARGIN = 0.005
"""Margin of equivalence in question 2, in nats/token."""
MIXING_KINDS = ("identity", "diagonal", "identity_mix", "go_mhc")
"""Kinds that question 2 compares with mHC.  The first is H_res = I."""

# -- question 1: which map carries the gain


Cell = tuple[str, str, frozenset[str]]
"""A cell of the factorial: its arm (`copy`, `scaled`, `home`), its form (`dynamic`, `static`) and the maps that are learned."""


def cell_of(run: RunRecord) -> Cell | None:
    """Return the cell of question 1 that a run belongs to, or None for a control.

    The cell that learns no map is the same for both forms, and its form is `static`.  The arm of a run of which_map_home.py is
    `home`, and its optimizer says which maps are learned.
    """
    connection = run.config["model"]["connection"]
    _, home, learned = run.config["optimizer"]["name"].partition("which_map_home.py:learn_")
    if home:
        return "home", "dynamic", frozenset(learned.split("_")) & frozenset(MAPS)
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
        """Seeds with which the two most negative effects would be told apart, or None if these seeds tell them apart."""
        return _seeds_to_tell(self.primary, self.against)


def which_map(runs: Sequence[RunRecord]) -> WhichMap:
    """Decide question 1 by the rule in the docstring of experiments/sweeps/which_map.py.

    Raises:
      InputError: a design, or a cell of one, has no run.
    """
    losses = cells(runs)
    arms = sorted({(arm, form) for arm, form, _ in losses})
    require(
        arms == DESIGNS, f"The runs have {len(arms)} of the {len(DESIGNS)} designs of the rule; record the whole sweep."
    )
    for arm, form in arms:
        missing = 8 - sum((arm, form) == (a, f) for a, f, _ in losses)
        require(
            not missing, f"{missing} of the 8 cells of the design {arm}, {form} have no run; record the whole sweep."
        )
    all_effects = {design: effects(losses, *design) for design in arms}
    averaged = {m: mean_over([found[frozenset({m})] for found in all_effects.values()]) for m in MAPS}
    primary = contrasts(averaged)
    against = _against(averaged)
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
    return WhichMap(primary, against, designs, total, controls, _winner(primary, against))


def _winner(primary: Sequence[Contrast], against: Mapping[tuple[str, str], Contrast]) -> str | None:
    """Return the map whose effect is negative, resolved and below both others, or None."""
    for c in primary:
        others = [against[c.label, other].result for other in MAPS if other != c.label]
        if c.resolved and mean_of(c) < 0 and all(r and r.resolved and r.mean < 0 for r in others):
            return c.label
    return None


def _against(of: Mapping[str, Seeds]) -> dict[tuple[str, str], Contrast]:
    """Return the differences of the effects of any two maps."""
    pairs = itertools.permutations(MAPS, 2)
    return {(a, b): contrasts({f"{a} - {b}": minus(of[a], of[b])})[0] for a, b in pairs}


class WhichMapHome(NamedTuple):
    """The answer to question 1 where streams differ."""

    primary: Sequence[Contrast]
    """The main effects of pre, post and res."""
    against: Mapping[tuple[str, str], Contrast]
    """Differences of two of these effects, first minus second."""
    interactions: Sequence[Contrast]
    """Not corrected."""
    total: Contrast
    """Loss with all maps learned minus loss with all of them frozen.  Not corrected."""
    winner: str | None
    """The map that carries the lower loss by the rule, or None."""

    @property
    def seeds_needed(self) -> int | None:
        """Seeds with which the two most negative effects would be told apart, or None if these seeds tell them apart."""
        return _seeds_to_tell(self.primary, self.against)


def _seeds_to_tell(primary: Sequence[Contrast], against: Mapping[tuple[str, str], Contrast]) -> int | None:
    first, second = sorted(primary, key=lambda c: mean_of(c))[:2]
    difference = against[first.label, second.label]
    return None if difference.result and difference.result.resolved else needed(difference.values)


def which_map_home(runs: Sequence[RunRecord]) -> WhichMapHome:
    """Decide by the rule in the docstring of experiments/sweeps/which_map_home.py.

    Raises:
      InputError: a cell has no run.
    """
    losses = cells(runs)
    missing = 8 - sum((arm, form) == ("home", "dynamic") for arm, form, _ in losses)
    require(not missing, f"{missing} of the 8 cells of which_map_home have no run; record the whole sweep.")
    found = {"x".join(m for m in MAPS if m in of): v for of, v in effects(losses, "home", "dynamic").items()}
    primary, against = contrasts({m: found[m] for m in MAPS}), _against(found)
    interactions = [contrasts({label: values})[0] for label, values in found.items() if label not in MAPS]
    every, none = (losses["home", "dynamic", frozenset(maps)] for maps in (MAPS, ()))
    total = contrasts({"all - none": minus(every, none)})[0]
    return WhichMapHome(primary, against, interactions, total, _winner(primary, against))


# -- question 2: is H_res needed


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
    """Decide question 2 by the rule in the docstring of experiments/sweeps/mixing_needed.py.

    Raises:
      InputError: a kind has no run with one of the numbers of streams and entries.
    """
    groups: dict[tuple[int, str], dict[str, list[RunRecord]]] = {}
    for run in runs:
        connection = run.config["model"]["connection"]
        place = connection["num_streams"], connection["entry"]
        groups.setdefault(place, {}).setdefault(connection["kind"], []).append(run)
    for (streams, entry), of in groups.items():
        missing = [kind for kind in ("mhc", *MIXING_KINDS) if kind not in of]
        require(
            not missing,
            f"{', '.join(missing)} has no run with {streams} streams and entry={entry}; record the whole sweep.",
        )
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
