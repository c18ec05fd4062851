"""The exception for mistakes in what a user gives the program, and checks that raise it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


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


def require(condition: bool, sentence: str) -> None:
    """Raise `InputError(sentence)` unless `condition` holds."""
    if not condition:
        raise InputError(sentence)
