"""The exception for mistakes in what a user gives the program, and checks that raise it."""

from __future__ import annotations

import asyncio
import dataclasses
import difflib
import errno
import math
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

LARGEST = 3.4028234663852886e38
"""Largest finite number of the type float32."""
MOST = 2**31 - 1
"""Largest value of a setting that is an int.  JAX counts with int32."""
SEEDS = 2**32
"""Number of different seeds.  JAX takes a larger seed modulo this number."""
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EACCES)
"""Numbers of the errors of a disk that is full, read-only, broken, or not open to this user."""
LONGEST_NAME = 255
"""Number of bytes that the name of a file may have in the usual file systems."""
LONGEST_PATH = 4095
"""Number of bytes that a path may have in Linux."""


LONG_VALUE = re.compile(r"""(?<![^\s(\[{])('[^'\n]{500,}'|"[^"\n]{500,}")|\S{500,}""")
"""A value in a message, in quotes or without blanks, that is too long to be read."""


class InputError(ValueError):
    """The error for a wrong setting, file or folder.  Its message says what was given, what is allowed and what to do.

    Values of more than 500 characters that are in quotes or have no blanks are cut in the middle.  The scripts in `experiments/`
    print this message alone, without a traceback, and exit with status 2.
    """

    def __init__(self, message: str) -> None:
        super().__init__(LONG_VALUE.sub(lambda value: f"{value[0][:60]}...{value[0][-30:]}", message))


def of_disk(error: BaseException | None) -> str:
    """Return a sentence about a disk that is full, read-only or broken if it is the cause of an error, and else an empty text.

    Libraries that write, such as Matplotlib, may raise another error once a write has failed.
    """
    while error is not None:
        if isinstance(error, OSError) and error.errno in DISK_ERRORS:
            where = f" {shown(error.filename)}" if error.filename else ""
            return f"Cannot use the disk{where}: {error.strerror}; mend that and run the same command again."
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return ""


def raise_interrupt(error: BaseException | None) -> None:
    """Raise `KeyboardInterrupt` if Ctrl-C is the cause of an error.

    Orbax replaces the exception by which asyncio ends a read on Ctrl-C by one that tells of a damaged file.
    """
    while error is not None:
        if isinstance(error, KeyboardInterrupt | asyncio.CancelledError):
            raise KeyboardInterrupt from error
        error = error.__cause__ or error.__context__


def one_of(name: str, given: object, allowed: Iterable[str], more: str = "") -> None:
    """Raise `InputError` unless `given` is among `allowed`.  The message names the allowed value with the nearest spelling.

    `more` says in words what else is allowed, behind the list of allowed values.
    """
    allowed = list(allowed)
    if given in allowed:
        return
    near = difflib.get_close_matches(str(given), allowed, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    values = ", ".join(filter(None, [*map(repr, allowed), more]))
    raise InputError(f"{name} is {shown(given)}; it must be one of {values}.{hint}")


def at_least(least: int, config: object, prefix: str, *names: str) -> None:
    """Raise `InputError` unless each setting of `config` that `names` lists is at least `least`, and an int at most `MOST`.

    The message puts `prefix` before the setting's name, as in `model.width`.
    """
    for name in names:
        value = getattr(config, name)
        bound = f"be at least {least}" if least else "not be negative"
        require(value >= least, f"{prefix}{name} is {shown(value)}; it must {bound}.")
        most(config, prefix, name)


def most(config: object, prefix: str, *names: str) -> None:
    """Raise `InputError` unless each int setting of `config` that `names` lists is at most `MOST`."""
    for name in names:
        value = getattr(config, name)
        require(
            not isinstance(value, int) or value <= MOST, f"{prefix}{name} is {shown(value)}; it must be at most {MOST}."
        )


def shown(value: object) -> str:
    """Return `repr(value)` for a sentence, cut at 100 characters.

    >>> shown("mhc"), shown(10**5000)
    ("'mhc'", 'a very large int')
    """
    try:
        text = repr(value)
    except Exception:  # Python spells no int of more than 4300 digits, and a class may have a faulty __repr__
        return f"a very large {type(value).__name__}"
    text = " ".join(text.splitlines())
    return text if len(text) <= 100 else f"{text[:90]}..."


def finite(config: Any, prefix: str) -> None:
    """Raise `InputError` unless every float setting of the dataclass `config` is finite, also in float32.

    The message puts `prefix` before the setting's name, as in `model.norm_eps`.
    """
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        good = not isinstance(value, float) or (math.isfinite(value) and abs(value) <= LARGEST)
        require(
            good,
            f"{prefix}{field.name} is {shown(value)}; it must be a finite number, at most 3.4e38 in size (float32).",
        )


def check_seed(name: str, value: int) -> None:
    """Raise `InputError` unless the seed `value` lies between 0 and `SEEDS` - 1."""
    require(0 <= value < SEEDS, f"{name} is {shown(value)}; a seed must lie between 0 and {SEEDS - 1}.")


def require(condition: bool, sentence: str) -> None:
    """Raise `InputError(sentence)` unless `condition` holds."""
    if not condition:
        raise InputError(sentence)


def user_path(text: str | os.PathLike[str], utf8: bool = False) -> Path:
    """Return the path that a user has given, in which `~` and `~name` stand for home folders.  The disk is not read.

    >>> user_path("texts/a.txt").name
    'a.txt'

    Args:
      text: the path.
      utf8: whether the path must be UTF-8, as that of a folder with checkpoints.

    Raises:
      InputError: the home folder is not known, a file system cannot have such a path, or it is not UTF-8 though it must be.
    """
    given = os.fspath(text)
    shown = repr(given if len(given) <= 60 else f"{given[:40]}...{given[-15:]}")
    try:
        path = Path(given).expanduser()
    except RuntimeError:
        home = given.partition("/")[0]
        why = (
            "$HOME is not set, and this user has no entry in the list of users"
            if home == "~"
            else "there is no such user"
        )
        raise InputError(f"The home folder {home!r} in {shown} is not known: {why}; give the whole path.") from None
    try:
        encoded = os.fsencode(path)
    except UnicodeEncodeError as error:
        raise InputError(
            f"Character {error.start} of the path {shown} cannot be in a path; give another name."
        ) from None
    require(
        not utf8 or os.fsdecode(encoded).encode(errors="replace").decode() == str(path),
        f"The path {shown} is not UTF-8 in this locale, and checkpoints cannot be written there; give another name, or set "
        "$LC_ALL to C.UTF-8.",
    )
    require(b"\0" not in encoded, f"The path {shown} has a NUL character; give it without.")
    longest = max(map(len, encoded.split(b"/")))
    require(
        longest <= LONGEST_NAME and len(encoded) <= LONGEST_PATH,
        f"The path {shown} has {len(encoded)} bytes, and {longest} between two slashes; at most {LONGEST_PATH} and "
        f"{LONGEST_NAME} are possible: give a shorter one.",
    )
    return path
