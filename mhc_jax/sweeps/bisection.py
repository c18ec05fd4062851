"""Search for the largest stable value of a setting, such as the learning rate, among the values of a sweep's grid.

A sweep file asks for it by `Sweep(..., bisection=Bisection("optimizer.learning_rate", loss_below=3.3))`.  Its grid has every value
that may be tried.  The search trains a few runs of the grid and leaves out the others: the runs that differ in this setting alone
are one line, each line is bisected by itself, and each seed has lines of its own.  With 12 values, 3 or 4 runs decide a line.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mhc_jax.errors import require

if TYPE_CHECKING:
    from mhc_jax.sweeps.grid import Run

Outcome = Callable[["Run"], bool | None]
"""Function that says whether a run was stable, and None if it has not ended."""


@dataclass(frozen=True)
class Bisection:
    """The setting whose largest stable value a sweep searches for, and the rule that says which runs are stable.

    The search takes for granted that values above an unstable one are unstable.  It does not try them all.
    """

    key: str
    """Dotted key of the setting, to which each point of the sweep gives a number."""
    loss_below: float
    """A run is stable if it finished with a validation loss below this, in nats/token."""

    def stable(self, status: str, validation_loss: float | None) -> bool | None:
        """Return whether a run of this status and final validation loss was stable, or None if it has not ended.

        >>> rule = Bisection("optimizer.learning_rate", loss_below=3.0)
        >>> rule.stable("finished", 2.5), rule.stable("diverged", None), rule.stable("begun", None)
        (True, False, None)
        """
        if status not in ("finished", "diverged"):
            return None
        return status == "finished" and validation_loss is not None and validation_loss < self.loss_below


def lines(runs: Sequence[Run], key: str) -> list[list[Run]]:
    """Return the lines of a grid: the runs that differ in the setting `key` alone, from the lowest value to the highest.

    Raises:
      InputError: a point does not set `key` to a number.
    """
    out: dict[str, list[Run]] = {}
    for run in runs:
        value = run.point.get(key)
        require(
            isinstance(value, int | float) and not isinstance(value, bool),
            f"The bisection of the sweep searches {key!r}, and the point of run {run.name!r} sets it to {value!r}: let every "
            "point of the sweep set it to a number.",
        )
        rest = {name: v for name, v in run.point.items() if name != key}
        out.setdefault(json.dumps(rest, sort_keys=True, default=str), []).append(run)
    return [sorted(line, key=lambda run: run.point[key]) for line in out.values()]


def bracket(line: Sequence[Run], outcome: Outcome) -> tuple[int, int]:
    """Return (index of the last run known to be stable, index of the first run known to be unstable) of a line.

    They are -1 and `len(line)` at the start.  The search is over when they differ by 1.  Until then, the run in the middle between
    them is the next to train.
    """
    low, high = -1, len(line)
    while high - low > 1:
        middle = (low + high) // 2
        stable = outcome(line[middle])
        if stable is None:
            break
        low, high = (middle, high) if stable else (low, middle)
    return low, high


def next_runs(runs: Sequence[Run], bisection: Bisection, outcome: Outcome) -> list[Run]:
    """Return the runs to train next: one of each line whose search is not over."""
    out = []
    for line in lines(runs, bisection.key):
        low, high = bracket(line, outcome)
        if high - low > 1:
            out.append(line[(low + high) // 2])
    return out
