"""Check the types of what a sweep file gives, because nothing else does before its fields are used."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from mhc_jax.errors import require, shown
from mhc_jax.sweeps.bisection import Bisection

if TYPE_CHECKING:
    from mhc_jax.sweeps.grid import Sweep


def check_types(sweep: Sweep) -> None:
    """Raise `InputError` if a field of a sweep has another type than its annotation says."""
    require(
        isinstance(sweep.base, str) and bool(sweep.base),
        f"base of the sweep is {shown(sweep.base)}; give the path of a config file, such as '../configs/prototype.py'.",
    )
    listed = isinstance(sweep.points, Sequence) and not isinstance(sweep.points, str)
    require(
        listed,
        f"points of the sweep is {shown(sweep.points)}; give a list of points, such as over('connection', ['hc']).",
    )
    for name, point in (("settings", sweep.settings), *(("A point", point) for point in sweep.points)):
        require(
            isinstance(point, Mapping) and all(isinstance(key, str) for key in point),
            f"{name} of the sweep is {shown(point)}; give a mapping from keys to values, such as {{'train.steps': 100}}.",
        )
    require(
        sweep.bisection is None
        or (
            isinstance(sweep.bisection, Bisection)
            and isinstance(sweep.bisection.key, str)
            and _number(sweep.bisection.loss_below)
        ),
        f"bisection of the sweep is {shown(sweep.bisection)}; give Bisection(KEY, loss_below=NUMBER).",
    )


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
