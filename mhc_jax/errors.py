"""The exception for mistakes in what a user gives the program, and checks that raise it."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Iterable
from typing import Any

LARGEST = 3.4028234663852886e38
"""Largest finite number of the type float32."""
SEEDS = 2**32
"""Number of different seeds.  JAX takes a larger seed modulo this number."""


class InputError(ValueError):
    """The error for a wrong setting, file or folder.  Its message says what was given, what is allowed and what to do.

    The scripts in `experiments/` print this message alone, without a traceback, and exit with status 2.
    """


def one_of(name: str, given: object, allowed: Iterable[str]) -> None:
    """Raise `InputError` unless `given` is among `allowed`.  The message names the allowed value with the nearest spelling."""
    allowed = list(allowed)
    if given in allowed:
        return
    near = difflib.get_close_matches(str(given), allowed, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise InputError(f"{name} is {given!r}; it must be one of {', '.join(map(repr, allowed))}.{hint}")


def at_least(least: int, config: object, prefix: str, *names: str) -> None:
    """Raise `InputError` unless each setting of `config` that `names` lists is at least `least`.

    The message puts `prefix` before the setting's name, as in `model.width`.
    """
    for name in names:
        value = getattr(config, name)
        bound = f"be at least {least}" if least else "not be negative"
        require(value >= least, f"{prefix}{name} is {value}; it must {bound}.")


def finite(config: Any, prefix: str) -> None:
    """Raise `InputError` unless every float setting of the dataclass `config` is finite, also in float32.

    The message puts `prefix` before the setting's name, as in `model.norm_eps`.
    """
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        good = not isinstance(value, float) or (math.isfinite(value) and abs(value) <= LARGEST)
        require(good, f"{prefix}{field.name} is {value}; it must be a finite number, at most 3.4e38 in size (float32).")


def check_seed(name: str, value: int) -> None:
    """Raise `InputError` unless the seed `value` lies between 0 and `SEEDS` - 1."""
    require(0 <= value < SEEDS, f"{name} is {value}; a seed must lie between 0 and {SEEDS - 1}.")


def require(condition: bool, sentence: str) -> None:
    """Raise `InputError(sentence)` unless `condition` holds."""
    if not condition:
        raise InputError(sentence)
